"""Images in memory, and what a source converts them to."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from dino_fast.data import ArraySource, open_source
from dino_fast.errors import UserError

from .example_files import picture, save


def test_grey_on_request_is_pillows_luma(tmp_path: Path) -> None:
    source = open_source(save(tmp_path / "x.png").parent)
    source.channels = 1
    want = torch.from_numpy(np.array(picture().convert("L")))[None]
    assert torch.equal(source.read(0), want)
    memory = ArraySource(torch.from_numpy(np.array(picture())).permute(2, 0, 1)[None])
    memory.channels = 1
    assert torch.equal(memory.read(0), want)
    grey = ArraySource(want[None])
    grey.channels = 3
    assert torch.equal(grey.read(0), want.expand(3, -1, -1))


def test_arrays_of_another_kind_are_refused() -> None:
    for wrong in (torch.zeros(2, 3, 4, 4), torch.zeros(2, 4, 4, dtype=torch.uint8)):
        with pytest.raises(UserError, match="uint8"):
            ArraySource(wrong)
    with pytest.raises(UserError, match="2 images with 1 labels"):
        ArraySource(torch.zeros(2, 1, 4, 4, dtype=torch.uint8), [0])
