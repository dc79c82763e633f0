"""Every kind of source and every kind of image file, good and bad."""

from __future__ import annotations

import argparse
import errno
import json
import os
import time
from pathlib import Path

import numpy as np
import pyarrow as arrow
import pyarrow.parquet
import pytest
import torch
from PIL import Image

from dino_fast.augment import MultiCrop
from dino_fast.cli import data_check, data_preview
from dino_fast.data import ArraySource, ImageError, check, held_out, open_source, split, train_loader
from dino_fast.errors import UserError


def picture(mode: str = "RGB", size: tuple[int, int] = (20, 12)) -> Image.Image:
    """Left half dark red, right half bright; each mode the nearest it has."""
    pixels = np.zeros((size[1], size[0], 3), dtype=np.uint8)
    pixels[:, : size[0] // 2] = (120, 10, 10)
    pixels[:, size[0] // 2 :] = (250, 240, 230)
    image = Image.fromarray(pixels)
    return image.quantize(8) if mode == "P" else image.convert(mode)


def save(path: Path, image: Image.Image | None = None, **options) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    (image or picture()).save(path, **options)
    return path


def png(value: int) -> bytes:
    import io

    data = io.BytesIO()
    Image.new("L", (5, 4), value).save(data, "PNG")
    return data.getvalue()


def only(path: Path) -> torch.Tensor:
    source = open_source(path)
    assert len(source) == 1
    return source.read(0)


def test_folder_with_classes(tmp_path: Path) -> None:
    for name in ("b/2.png", "b/deep/3.JPG", "a/1.jpeg", "a/.hidden.png", ".git/x.png", "a/notes.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        picture().save(tmp_path / name, "PNG")
    source = open_source(tmp_path)
    assert [Path(source.name(i)).name for i in range(len(source))] == ["1.jpeg", "2.png", "3.JPG"]
    assert source.classes == ["a", "b"] and [source.label(i) for i in range(3)] == [0, 1, 1]
    assert source.read(2).shape == (3, 12, 20) and source.read(2).dtype == torch.uint8


def test_flat_folder_has_no_labels_and_link_circles_end(tmp_path: Path) -> None:
    save(tmp_path / "x.png")
    save(tmp_path / "sub" / "y.png")
    os.symlink(tmp_path, tmp_path / "sub" / "again")
    source = open_source(str(tmp_path))
    assert len(source) == 2 and source.classes is None and source.label(0) is None


def test_train_and_val_folders_share_class_numbers(tmp_path: Path) -> None:
    for name in ("train/cat/1.png", "train/dog/2.png", "val/dog/3.png", "val/ant/4.png"):
        save(tmp_path / name)
    source = open_source(tmp_path)
    assert len(source) == 2 and source.classes == ["cat", "dog", "ant"]
    test = held_out(source)
    assert [(Path(test.name(i)).name, test.label(i)) for i in range(2)] == [("4.png", 2), ("3.png", 1)]
    assert split(source)[0] is source


def test_a_seeded_tenth_is_held_out() -> None:
    source = ArraySource(torch.arange(50, dtype=torch.uint8).view(50, 1, 1, 1).contiguous(), labels=range(50))
    train, test = split(source)
    assert len(train) == 45 and len(test) == 5
    assert {*train.labels, *test.labels} == set(range(50)) and test.labels.tolist() == held_out(source).labels.tolist()
    assert test.read(3).item() == test.label(3) == test.labels[3] and "image" in test.name(0)
    with pytest.raises(UserError, match="at least 2"):
        split(ArraySource(source.images[:1]))


def test_file_list(tmp_path: Path) -> None:
    save(tmp_path / "with space.png")
    save(tmp_path / "in" / "b.png")
    listing = tmp_path / "list.txt"
    listing.write_text("with space.png\t3\n\nin/b.png\n")
    source = open_source(listing)
    assert len(source) == 2 and source.label(0) == 3 and source.label(1) is None and source.read(1).shape[0] == 3
    for text, message in [("", "lists no images"), ("nothing.png\n", "entry 1, 'nothing.png', is no file"),
                          ("in/b.png\tcat\n", "must be a whole number")]:  # fmt: skip
        listing.write_text(text)
        with pytest.raises(UserError, match=message):
            open_source(listing)


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


def test_a_file_without_permission_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = open_source(save(tmp_path / "mine.png").parent)

    def refuse(path: Path) -> bytes:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))

    monkeypatch.setattr(Path, "read_bytes", refuse)  # root may read anything, so no mode would do
    with pytest.raises(ImageError, match=r"mine\.png: Permission denied"):
        source.read(0)


def test_mutated_files_never_crash() -> None:
    from dino_fast.data.decode import decode

    rng = np.random.default_rng(0)
    import io

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


def hugging_face(path: Path, rows: list, labels: list | None = None, metadata: dict | None = None) -> Path:
    kind = arrow.struct({"bytes": arrow.binary(), "path": arrow.string()})
    columns = {"image": arrow.array(rows, type=kind)} | ({"label": arrow.array(labels)} if labels else {})
    arrow.parquet.write_table(arrow.table(columns).replace_schema_metadata(metadata), path)
    return path


def test_parquet_as_hugging_face_stores_images(tmp_path: Path) -> None:
    save(tmp_path / "side.png", Image.new("L", (5, 4), 77))
    names = {"info": {"features": {"label": {"names": ["no", "yes"], "_type": "ClassLabel"}}}}
    rows = [{"bytes": png(10), "path": None}, {"bytes": None, "path": "side.png"}, {"bytes": None, "path": None}, None]
    path = hugging_face(tmp_path / "x.parquet", rows, [1, 0, None, 1], {"huggingface": json.dumps(names)})
    source = open_source(path)
    assert (
        len(source) == 4 and source.classes == ["no", "yes"] and [source.label(i) for i in range(4)] == [1, 0, None, 1]
    )
    assert source.read(0).unique().tolist() == [10] and source.read(1).unique().tolist() == [77]
    for i in (2, 3):
        with pytest.raises(ImageError, match=rf"x\.parquet, row {i}: the image is null"):
            source.read(i)


def test_parquet_variants(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    for part, value in (("train-0", 1), ("train-1", 2), ("test-0", 3)):
        table = arrow.table({"img": [png(value)] * 3, "label": ["b", "a", "b"]})
        arrow.parquet.write_table(table, tmp_path / "data" / f"{part}.parquet")
    source = open_source(tmp_path)
    assert len(source) == 6 and source.classes == ["a", "b"] and source.label(0) == 1
    assert source.read(4)[0, 0, 0] == 2 and source.name(4).endswith("train-1.parquet, row 1")
    assert len(held_out(source)) == 3 and held_out(source).read(0)[0, 0, 0] == 3
    (batch,) = train_loader(source, MultiCrop(8, 4, 1), batch_size=6, seed=0, workers=1, epochs=1)
    assert sorted(batch.index.tolist()) == list(range(6))


@pytest.mark.parametrize("kind", ["columns", "type", "empty", "nulls", "text", "missing", "folder", "list"])
def test_bad_sources_are_refused_when_opened(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "x.parquet"
    if kind == "columns":
        arrow.parquet.write_table(arrow.table({"pixels": [b"1"], "target": [1]}), path)
        message = "has the columns pixels, target; expected 'image'"
    elif kind == "type":
        arrow.parquet.write_table(arrow.table({"image": [1, 2]}), path)
        message = "column 'image' is int64; expected binary"
    elif kind == "empty":
        hugging_face(path, [])
        message = "no rows"
    elif kind == "nulls":
        arrow.parquet.write_table(arrow.table({"image": arrow.array([None, None], arrow.binary())}), path)
        message = "every value of the column 'image' is null"
    elif kind == "text":
        path.write_text("no parquet")
        message = "not a readable Parquet file"
    elif kind == "missing":
        message = "does not exist; give a folder"
    elif kind == "folder":
        (path / "inside").mkdir(parents=True)
        message = "holds no images"
    else:
        path = save(tmp_path / "x.png")
        message = "is not a list of images"
    with pytest.raises(UserError, match=message):
        open_source(path)


def test_arrays_of_another_kind_are_refused() -> None:
    for wrong in (torch.zeros(2, 3, 4, 4), torch.zeros(2, 4, 4, dtype=torch.uint8)):
        with pytest.raises(UserError, match="uint8"):
            ArraySource(wrong)
    with pytest.raises(UserError, match="2 images with 1 labels"):
        ArraySource(torch.zeros(2, 1, 4, 4, dtype=torch.uint8), [0])


def test_demo_set() -> None:
    start = time.perf_counter()
    source = open_source("demo")
    assert time.perf_counter() - start < 5  # 0.35 s on a quiet machine
    assert len(source) == 5000 and len(source.test) == 1000 and source.channels == 1 and len(source.classes) == 10
    assert np.bincount(source.labels).tolist() == [500] * 10 and np.bincount(source.test.labels).tolist() == [100] * 10
    assert source.read(0).shape == (1, 28, 28) and 60 < source.images.float().mean() < 90
    folder = Path(check.__file__).parent
    assert sum(f.stat().st_size for f in folder.glob("demo-*.parquet")) < 5e6
    assert "Permission is hereby granted" in (folder / "demo.md").read_text()


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
    from dino_fast.augment import MultiCrop
    from dino_fast.data.preview import draw

    source = open_source(save(tmp_path / "odd.png", picture(size=size)).parent)
    crops = MultiCrop(32, 16, 8)
    for seed in range(5):
        sheet = draw([source.read(0)], crops, seed)
        assert sheet.width > 2 * 32 and sheet.height > 32
