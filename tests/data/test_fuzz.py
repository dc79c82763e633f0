"""Damaged JPEG files: no crash, no leak, and the pixels that Pillow would give or none."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from dino_fast.data import decode
from dino_fast.data.decode import ImageError

from . import fuzz


@pytest.fixture(autouse=True)
def quiet(capfd: pytest.CaptureFixture[str]) -> None:
    """libjpeg writes its warnings past Python."""


def check(count: int, every: int) -> None:
    fuzz.fuzz(range(count, count + 300))
    before = fuzz.resident()
    seen = fuzz.fuzz(range(count), every)
    assert seen["decoded"] > count / 10 and seen["refused"] > count / 10 and seen["compared"] == count // every
    assert not {"differ", "only libjpeg", "only Pillow"} & seen.keys(), seen
    assert fuzz.resident() - before < 100e6


def test_damaged_jpegs() -> None:
    check(2000, every=4)


@pytest.mark.slow
def test_a_hundred_thousand_damaged_jpegs() -> None:
    check(100_000, every=10)


def test_whole_files_take_the_fast_path(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ordinary JPEGs go through libjpeg-turbo; turned and CMYK ones, and all where it is missing, through Pillow."""
    taken: list[bool] = []
    fast = decode._jpeg

    def note(*given):
        pixels = fast(*given)
        taken.append(pixels is not None)
        return pixels

    monkeypatch.setattr(decode, "_jpeg", note)
    files = fuzz.seeds()
    want = [decode.decode(data, channels) for data in files for channels in (3, 1)]
    # drawn files: four RGB ones and a grey one in colour, the grey one in grey; not the CMYK and not the turned one
    real = [data for data in files[:-6]]
    assert taken[-5:] == [True] * 5 and len(taken) >= 5 + len(real)
    monkeypatch.setattr(decode, "_jpeg", lambda *given: None)
    assert all((a == b).all() for a, b in zip(want, [decode.decode(d, c) for d in files for c in (3, 1)], strict=True))


def test_without_libjpeg_turbo_pillow_decodes(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*given):
        raise RuntimeError("decode_jpeg: not compiled with libjpeg support")

    data = fuzz.seeds()[-6]
    want = decode.decode(data, 3)
    monkeypatch.setattr(decode, "decode_jpegs", missing)
    assert (decode.decode(data, 3) == want).all()


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9, 0.999])
def test_a_truncated_jpeg_is_refused_wherever_it_ends(share: float) -> None:
    for data in fuzz.seeds():
        with pytest.raises(ImageError, match=r"decoded|not an image"):
            decode.decode(data[: int(len(data) * share)], 3)


def test_seeds_are_the_shared_photographs_where_they_are_at_hand() -> None:
    folder = Path(os.environ.get("DINO_FAST_TEST_DATA", Path(__file__).parents[2].parent / "shared" / "data"))
    assert len(fuzz.seeds()) == (26 if (folder / "caltech101.tar").is_file() else 6)
