"""`data check` and `data preview`."""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dino_fast.augment import MultiCrop
from dino_fast.cli import data_check, data_preview
from dino_fast.data import ImageError, open_source
from dino_fast.data.decode import examine
from dino_fast.data.inspect import draw
from dino_fast.errors import UserError

from .example_files import picture, save


def spoil(tmp_path: Path) -> dict[str, str]:
    """Bad files and what must be said about each."""
    whole = save(tmp_path / "good.jpg", picture(size=(200, 100)), quality=95).read_bytes()
    (tmp_path / "empty.jpg").write_bytes(b"")
    (tmp_path / "text.jpg").write_text("hello, I am not a picture")
    (tmp_path / "cut.jpg").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "cut.png").write_bytes(save(tmp_path / "ok.png", picture(size=(90, 90))).read_bytes()[:-60])
    Image.new("1", (30000, 3000)).save(tmp_path / "bomb.png")
    Image.fromarray(np.full((4, 4), 0.5, dtype=np.float32)).save(tmp_path / "float.tif")
    (tmp_path / "gone.png").symlink_to(tmp_path / "nowhere.png")
    return {
        "empty.jpg": "empty",
        "text.jpg": "not an image",
        "cut.jpg": "cannot be decoded",
        "cut.png": "cannot be decoded",
        "bomb.png": "decompression bomb",
        "float.tif": "8 or 16 bits",
        "gone.png": "No such file",
    }


def test_bad_files_are_named_with_the_reason(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    expected = spoil(tmp_path)
    source = open_source(tmp_path)
    bad = {}
    for i in range(len(source)):
        try:
            source.read(i)
        except ImageError as error:
            bad[Path(source.name(i)).name] = str(error)
    assert bad.keys() == expected.keys()
    assert all(name in bad[name] and words in bad[name] for name, words in expected.items())
    parser = argparse.ArgumentParser()
    data_check.add_arguments(parser)
    assert data_check.run(parser.parse_args([str(tmp_path)])) == 1
    out = capsys.readouterr().out
    assert all(str(tmp_path / name) in out for name in expected) and "unreadable   7" in out and "JPEG RGB: 1" in out


def test_a_check_looks_at_both_parts_and_times_the_crops(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for part, count in (("train", 7), ("val", 3)):
        for i in range(count):
            save(tmp_path / part / f"class{i % 2}" / f"{i}.png", picture(size=(40 + i, 30)))
    (tmp_path / "val" / "class0" / "bad.png").write_bytes(b"")

    def lines(*words: str) -> list[str]:
        parser = argparse.ArgumentParser()
        data_check.add_arguments(parser)
        assert data_check.run(parser.parse_args([str(tmp_path), *words])) == 1
        return capsys.readouterr().out.splitlines()

    found = lines()
    middle = found.index("held out:")
    first, second = found[:middle], found[middle + 1 :]
    assert "images       7 read of 7" in first and "width        40 to 46, median 43 px" in first
    assert "channels     3, as what is read (colour)" in first and "unreadable   0" in first
    rate = next(line for line in first if line.startswith("training"))
    assert float(rate.split()[1].replace(",", "")) > 0 and "2 of 224x224 and 8 of 96x96" in rate
    assert "  images       4 read of 4" in second and "  unreadable   1" in second
    assert any(line.endswith("bad.png: the file is empty (0 bytes)") for line in second)
    assert "images       5 read of 7" in lines("--limit", "5")


def test_preview_writes_a_picture(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    parser = argparse.ArgumentParser()
    data_preview.add_arguments(parser)
    out = tmp_path / "p.png"
    data_preview.run(parser.parse_args(["demo", "--out", str(out), "--images", "3", "--local-crops", "2"]))
    with Image.open(out) as image:
        assert image.width > 600 and image.height > 3 * 160 and len(image.getcolors(1 << 20)) > 50
    assert str(out) in capsys.readouterr().out
    data_preview.run(parser.parse_args(["demo", "--out", str(tmp_path / "new" / "p.png")]))
    assert "2 global crops of 28 px, 2 local of 14" in capsys.readouterr().out  # the crops of the demo's recipe
    (tmp_path / "run.yaml").write_text("local_crops: 1\nglobal_size: 64\nlocal_size: 32\n")
    given = ["demo", "--config", str(tmp_path / "run.yaml"), "--global-size", "32", "--out", str(out)]
    with pytest.raises(UserError, match="--global-size is 32, which patches of 7 do not tile"):
        data_preview.run(parser.parse_args(given))
    assert (tmp_path / "new" / "p.png").exists()
    for place, message in (
        (out / "below.png", "p.png is a file, not a folder"),
        (tmp_path / "p.pnk", "end it in .png"),
    ):
        with pytest.raises(UserError, match=message):
            data_preview.run(parser.parse_args(["demo", "--out", str(place)]))


@pytest.mark.parametrize("size", [(30000, 20), (20, 3000), (1, 1)])
def test_preview_of_unusual_extents(size: tuple[int, int], tmp_path: Path) -> None:
    source = open_source(save(tmp_path / "odd.png", picture(size=size)).parent)
    crops = MultiCrop(32, 16, 8)
    for seed in range(5):
        sheet = draw([source.read(0)], crops, seed)
        assert sheet.width > 2 * 32 and sheet.height > 32


@pytest.mark.parametrize(
    "data", [b"", b"not a picture", b"\x89PNG\r\n\x1a\n" + b"x" * 50, b"II*\0" + b"\xff" * 60, b"\xff\xd8" * 9]
)
def test_what_is_no_image_is_an_image_error(data: bytes) -> None:
    with pytest.raises(ImageError):
        examine(data, 3)
