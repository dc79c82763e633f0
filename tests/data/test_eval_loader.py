"""The batches of an evaluation."""

from __future__ import annotations

import time

import numpy as np
import pytest
import torch
from PIL import Image

from dino_fast.data import ArraySource, eval_batches, eval_loader, open_source
from dino_fast.data.eval_loader import center_crop
from dino_fast.errors import UserError

from .test_train_loader import Broken, images


def test_eval_batches_at_native_size() -> None:
    source = open_source("demo").test
    mean, std = (0.3,), (0.4,)
    batches = list(eval_batches(source, 28, mean, std, 300))
    assert [len(x) for x, _ in batches] == [300, 300, 300, 100]
    pixels = torch.cat([x for x, _ in batches])
    torch.testing.assert_close(pixels, (source.images / 255 - 0.3) / 0.4)
    assert torch.cat([y for _, y in batches]).bincount().tolist() == [100] * 10


@pytest.mark.parametrize("extent", [(320, 213), (150, 200), (40, 300)])
def test_eval_batches_scale_and_cut_at_the_center_crop(extent: tuple[int, int]) -> None:
    import torchvision.transforms.functional as tvf

    pixels = np.random.default_rng(0).integers(0, 256, (*extent, 3), dtype=np.uint8)
    image = torch.from_numpy(pixels).permute(2, 0, 1)
    got = center_crop(image, (112, 112))
    resized = tvf.resize(Image.fromarray(pixels), 128, tvf.InterpolationMode.BICUBIC)
    want = tvf.pil_to_tensor(tvf.center_crop(resized, 112))
    assert got.shape == (3, 112, 112)
    assert torch.equal(got, want)
    assert center_crop(image, (96, 64)).shape == (3, 96, 64)


def test_eval_batches_leave_out_bad_images(caplog: pytest.LogCaptureFixture) -> None:
    source = Broken(images(10), {0, 9})
    (x, y), *rest = eval_batches(source, 16, batch_size=16)
    assert len(x) == 8 and y.tolist() == [-1] * 8 and not rest and "image 9: gone" in caplog.text
    with pytest.raises(UserError, match="none of the 10 images"):
        list(eval_batches(Broken(images(10), set(range(10))), 16))


def test_eval_batches_read_ahead_in_order_and_within_bounds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(eval_loader, "_READERS", 2)
    started: list[int] = []

    class Slow(ArraySource):
        def read(self, index: int) -> torch.Tensor:
            started.append(index)
            time.sleep(0.001 * (index % 3))
            return super().read(index)

    pixels = torch.arange(200, dtype=torch.uint8).view(-1, 1, 1, 1).expand(-1, 1, 4, 4)
    batches = eval_batches(Slow(pixels, list(range(200))), 4, (0.0,), (1.0,), 10)
    first, labels = next(batches)
    assert labels.tolist() == list(range(10)) and 10 <= len(started) <= 16 * 6
    rest = list(batches)
    assert torch.cat([labels, *(y for _, y in rest)]).tolist() == list(range(200)) == sorted(started)
    shown = torch.cat([first, *(x for x, _ in rest)])[:, 0, 0, 0]
    assert (shown * 255).round().int().tolist() == list(range(200))
