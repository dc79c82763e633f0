"""Every kind of image file, good and bad."""

from __future__ import annotations

import contextlib
import io
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dino_fast.augment import MultiCrop
from dino_fast.data import ImageError, open_source
from dino_fast.data.decode import decode, ignore_pillow_warnings

from .example_files import picture, save


def only(path: Path) -> torch.Tensor:
    source = open_source(path)
    assert len(source) == 1
    return source.read(0)


@pytest.mark.parametrize("mode", ["RGB", "L", "P", "CMYK", "RGBA", "LA", "1", "I;16"])
def test_every_colour_mode_is_read(tmp_path: Path, mode: str) -> None:
    deep = Image.fromarray(np.asarray(picture("L")).astype(np.uint16) * 257)
    image = deep if mode == "I;16" else picture(mode)
    pixels = only(save(tmp_path / f"x.{'tif' if mode == 'CMYK' else 'png'}", image).parent).float()
    assert pixels.shape == (3, 12, 20)
    nearest = {"L": "L", "LA": "L", "I;16": "L", "1": "1"}.get(mode, "RGB")
    want = torch.from_numpy(np.array(picture(nearest).convert("RGB"))).permute(2, 0, 1).float()
    assert (pixels - want).abs().max() <= (1 if mode == "CMYK" else 0)


def test_cmyk_jpeg_transparent_palette_and_animation(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    picture("CMYK").save(tmp_path / "a" / "x.jpg", quality=95)
    assert (only(tmp_path / "a")[:, 2, 3].int() - torch.tensor([120, 10, 10])).abs().max() < 30
    save(tmp_path / "b" / "x.png", picture("P"), transparency=bytes([0, 128]))
    save(tmp_path / "c" / "x.gif", picture("P"), save_all=True, append_images=[Image.new("P", (20, 12))])
    assert only(tmp_path / "b").shape == only(tmp_path / "c").shape == (3, 12, 20)
    assert only(tmp_path / "c")[0, 5, 2] == 120  # the first frame


@pytest.mark.parametrize("suffix", ["jpg", "png", "tif", "webp"])
def test_exif_rotation_is_applied(tmp_path: Path, suffix: str) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by 90 degrees: the left of the stored picture is the top
    pixels = only(save(tmp_path / f"x.{suffix}", picture(), exif=exif).parent)
    assert pixels.shape == (3, 20, 12)
    assert pixels[:, :8].float().mean() < 70 < 200 < pixels[:, 12:].float().mean()


def test_mutated_files_never_crash() -> None:
    rng = np.random.default_rng(0)
    for kind in ("JPEG", "PNG", "GIF", "TIFF", "WEBP", "BMP"):
        data = io.BytesIO()
        picture().save(data, kind)
        for _ in range(100):
            bytes_ = bytearray(data.getvalue())
            for _ in range(rng.integers(1, 8)):
                bytes_[rng.integers(len(bytes_))] = rng.integers(256)
            try:
                assert decode(bytes(bytes_), 3).shape[0] == 3
            except ImageError:
                continue


def test_unusual_extents_make_crops(tmp_path: Path) -> None:
    save(tmp_path / "dot.png", Image.new("RGB", (1, 1), "red"))
    save(tmp_path / "strip.png", Image.new("L", (30000, 20), 99))
    source = open_source(tmp_path)
    crops = MultiCrop(global_size=32, local_size=16)
    global_crops, local_crops = crops.apply([source.read(0), source.read(1)], crops.sample_each([0, 1]))
    assert global_crops.isfinite().all() and local_crops.isfinite().all()


def test_threads_that_decode_leave_the_warnings_of_others() -> None:
    """Pillow warns of a bomb; nobody is to see that, and everybody else's warnings are to be seen."""
    bomb = io.BytesIO()
    Image.new("1", (30000, 3000)).save(bomb, "PNG")
    ignore_pillow_warnings()
    before = list(warnings.filters)

    def read(number: int) -> None:
        with contextlib.suppress(ImageError):
            decode(bomb.getvalue(), 3)

    with ThreadPoolExecutor(8) as pool, warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        reading = [pool.submit(read, i) for i in range(400)]
        number = 0
        while not all(future.done() for future in reading):
            warnings.warn(f"mine {number}", UserWarning, stacklevel=1)
            number += 1
    seen = [str(warning.message) for warning in caught if "mine" in str(warning.message)]
    assert seen == [f"mine {i}" for i in range(number)]
    assert warnings.filters == before


def test_pillows_warnings_are_not_shown(recwarn: pytest.WarningsRecorder) -> None:
    bomb = io.BytesIO()
    Image.new("1", (30000, 3000)).save(bomb, "PNG")
    ignore_pillow_warnings()
    with pytest.raises(ImageError, match="decompression bomb"):
        decode(bomb.getvalue(), 3)
    assert not recwarn
