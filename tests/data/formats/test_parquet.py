"""Parquet files: their columns and labels, and those larger than what is held in memory."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pyarrow as arrow
import pyarrow.parquet
import pytest
from PIL import Image

from dino_fast.augment import MultiCrop
from dino_fast.data import ImageError, held_out, open_source, train_loader
from dino_fast.data.formats import parquet
from dino_fast.errors import UserError

from ..example_files import hugging_face, png, save


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(parquet, "IN_MEMORY", 0)
    monkeypatch.setenv("DINO_FAST_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def shards(folder: Path) -> Path:
    """Two files of 25 rows in row groups of 10; rows 3 and 28 are null, row 4 names a file beside it."""
    folder.mkdir()
    save(folder / "side.png", Image.new("L", (5, 4), 77))
    for part in range(2):
        rows: list = [{"bytes": png(25 * part + i), "path": None} for i in range(25)]
        rows[3] = None
        if part == 0:
            rows[4] = {"bytes": None, "path": "side.png"}
        table = arrow.parquet.read_table(hugging_face(folder / f"{part}.parquet", rows, [part] * 25))
        arrow.parquet.write_table(table, folder / f"{part}.parquet", row_group_size=10)
    return folder


def values(source) -> list[int | str]:
    found: list[int | str] = []
    for i in range(len(source)):
        try:
            found.append(int(source.read(i).unique().item()))
        except ImageError as error:
            found.append(str(error).rpartition("/")[2])
    return found


EXPECTED = [i if i not in (3, 4, 28) else "" for i in range(50)]
EXPECTED[3], EXPECTED[4], EXPECTED[28] = (
    "0.parquet, row 3: the image is null",
    77,
    "1.parquet, row 3: the image is null",
)


def test_large_files_are_copied_once_and_read_at_any_place(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = shards(tmp_path / "data")
    with pytest.warns(UserWarning, match=r"copying 0\.0 GB of images"):
        source = open_source(f"{folder}/*.parquet")
    assert values(source) == EXPECTED and source.labels.tolist() == [0] * 25 + [1] * 25
    assert len(list(cache.iterdir())) == 2
    with monkeypatch.context() as patched:
        patched.setattr(parquet, "_batches", None)  # the copy is not made again
        assert values(open_source(f"{folder}/*.parquet")) == EXPECTED
    hugging_face(folder / "1.parquet", [{"bytes": png(99), "path": None}], [1])
    with pytest.warns(UserWarning, match="copying"):
        assert values(open_source(f"{folder}/*.parquet")) == [*EXPECTED[:25], 99]


def test_a_damaged_copy_is_made_again_or_named(cache: Path, tmp_path: Path) -> None:
    folder = shards(tmp_path / "data")
    with pytest.warns(UserWarning, match="copying"):
        source = open_source(f"{folder}/*.parquet")
    (copy,) = cache.glob("*.bin")
    os.truncate(copy, 100)
    with pytest.raises(ImageError, match=r"1\.parquet, row 20: .*is cut off; delete it"):
        source.read(45)
    with pytest.warns(UserWarning, match="copying"):
        assert values(open_source(f"{folder}/*.parquet")) == EXPECTED


@pytest.mark.parametrize("why", ["full", "forbidden"])
def test_files_whose_copy_has_no_room_are_refused(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, why: str
) -> None:
    folder = shards(tmp_path / "data")
    if why == "full":
        monkeypatch.setattr(parquet, "_SPARE", 1 << 62)
    else:
        cache.write_text("a file where the folder should be")
    with pytest.raises(UserError, match=r"0\.0 GB of images must be copied once .*\(\d+\.\d GB are free\)\. Name"):
        open_source(f"{folder}/*.parquet")


def test_files_without_the_label_column_of_others_have_no_labels(tmp_path: Path) -> None:
    hugging_face(tmp_path / "a.parquet", [{"bytes": png(1), "path": None}])
    hugging_face(tmp_path / "b.parquet", [{"bytes": png(1), "path": None}], [1])
    assert open_source(tmp_path).labels.tolist() == [-1, 1]
    hugging_face(tmp_path / "c.parquet", [{"bytes": png(1), "path": None}], ["cat"])
    with pytest.warns(UserWarning, match=r"the labels 'label' are not used: .*several types \(int64, null, string\)"):
        assert open_source(tmp_path).labels is None


def test_a_file_cut_in_half_is_refused(tmp_path: Path) -> None:
    hugging_face(tmp_path / "a.parquet", [{"bytes": png(1), "path": None}], [1])
    whole = (tmp_path / "a.parquet").read_bytes()
    (tmp_path / "a.parquet").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match=r"a\.parquet: not a readable Parquet file"):
        open_source(tmp_path)


def test_damage_inside_a_file_is_named(tmp_path: Path) -> None:
    """The footer is whole, so only reading the rows finds it."""
    path = hugging_face(tmp_path / "a.parquet", [{"bytes": png(i), "path": None} for i in range(200)])
    data = bytearray(path.read_bytes())
    data[4:400] = b"\xff" * 396
    path.write_bytes(data)
    with pytest.raises(UserError, match=r"a\.parquet: not a readable Parquet file"):
        open_source(path)


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


def test_image_columns_of_every_kind(tmp_path: Path) -> None:
    """As other libraries write them, under the names that people give them."""
    encoded = [png(i) for i in range(4)]
    struct = arrow.struct({"bytes": arrow.binary(), "path": arrow.string()})
    rows = [{"bytes": data, "path": None} for data in encoded]
    lists = arrow.array([[rows[0]], [rows[1], rows[0]], [rows[2]], [rows[3]]], arrow.list_(struct))
    views = arrow.StructArray.from_arrays([arrow.array(encoded, arrow.binary_view())], ["bytes"])
    columns = {
        "Image": arrow.array(encoded),
        "img": arrow.array(encoded, arrow.large_binary()),
        "jpg": arrow.array(encoded, arrow.binary_view()),
        "image_bytes": arrow.array(encoded).dictionary_encode(),
        "pixel_values": arrow.array(rows, struct),
        "images": lists,
        "IMG": arrow.array([[row] for row in rows], arrow.list_(struct, 1)),
        "png": views,
    }
    for name, column in columns.items():
        path = tmp_path / f"{name}.parquet"
        arrow.parquet.write_table(arrow.table({"id": [1, 2, 3, 4], name: column}), path)
        assert values(open_source(path)) == [0, 1, 2, 3], name
    holes = arrow.array([[rows[0]], [], None, [rows[3]]], arrow.list_(struct))
    arrow.parquet.write_table(arrow.table({"image": holes}), tmp_path / "holes.parquet")
    expected = [0, *(f"holes.parquet, row {i}: the image is null" for i in (1, 2)), 3]
    assert values(open_source(tmp_path / "holes.parquet")) == expected
    arrow.parquet.write_table(arrow.table({"image": [[0.5, 0.1]]}), tmp_path / "floats.parquet")
    with pytest.raises(UserError, match=r"column 'image' is list<.*double>; expected binary"):
        open_source(tmp_path / "floats.parquet")


@pytest.mark.parametrize("name", ["x.parquet", "x.tar", "x.jpg"])
def test_a_pointer_of_git_lfs_says_what_to_do(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n")
    with pytest.raises(UserError, match=rf"{name}: a Git LFS pointer.*'git lfs pull'"):
        open_source(tmp_path).read(0)
