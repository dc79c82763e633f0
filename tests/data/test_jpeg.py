"""JPEG files by torchcodec, and by torchvision where that does not load."""

from __future__ import annotations

import io
import sys
import warnings
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from PIL import Image

from dino_fast.data import jpeg
from dino_fast.data.jpeg import decode_jpegs

from . import fuzz

CPU = torch.device("cpu")


@pytest.fixture
def fresh() -> Iterator[None]:
    """The library is chosen anew, in the test and after it."""
    jpeg.decoder.cache_clear()
    yield
    jpeg.decoder.cache_clear()


def files(channels: int) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Ordinary JPEG files, and the pixels that Pillow gives."""
    mode, data, pixels = ("RGB" if channels == 3 else "L"), [], []
    for file in fuzz.seeds():
        with Image.open(io.BytesIO(file)) as image:
            if image.mode in ("RGB", mode) and image.getexif().get(0x0112, 1) == 1 and channels in (3, image.layers):
                data.append(torch.frombuffer(bytearray(file), dtype=torch.uint8))
                pixels.append(
                    torch.from_numpy(np.array(image.convert(mode))).reshape(image.height, image.width, channels)
                )
    assert data
    return data, [p.permute(2, 0, 1) for p in pixels]


def decoded_as_pillow_does(channels: int) -> None:
    data, expected = files(channels)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # nothing that is called is about to go
        found = decode_jpegs(data, channels, CPU)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("channels", [3, 1])
def test_torchcodec_gives_pillows_bits_without_a_warning(channels: int, fresh: None) -> None:
    pytest.importorskip("torchcodec.decoders", exc_type=(ImportError, OSError, RuntimeError))
    decoded_as_pillow_does(channels)
    assert "torchvision" not in jpeg.decoder().__qualname__


@pytest.mark.parametrize("channels", [3, 1])
def test_so_does_torchvision_where_torchcodec_does_not_load(
    channels: int, fresh: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "torchcodec.decoders", None)  # its import is an ImportError
    decoded_as_pillow_does(channels)
    assert "torchvision" in jpeg.decoder().__qualname__
