"""What can be opened, as one part or two, and what is refused."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import numpy as np
import pyarrow as arrow
import pyarrow.parquet
import pytest
import torch

from dino_fast.augment import MultiCrop
from dino_fast.data import ArraySource, ImageError, SourceNote, open_source, split, train_loader
from dino_fast.errors import UserError

from .example_files import hugging_face, pack, png, save, shard

RNG = np.random.default_rng(0)


def test_train_and_val_folders_share_class_numbers(tmp_path: Path) -> None:
    for name in ("train/cat/1.png", "train/dog/2.png", "val/dog/3.png", "val/ant/4.png"):
        save(tmp_path / name)
    source = open_source(tmp_path)
    assert len(source) == 2 and source.classes == ["cat", "dog", "ant"]
    test = source.test
    assert [(Path(test.name(i)).name, test.label(i)) for i in range(2)] == [("4.png", 2), ("3.png", 1)]
    assert split(source)[0] is source


def test_a_seeded_tenth_is_held_out() -> None:
    source = ArraySource(torch.arange(50, dtype=torch.uint8).view(50, 1, 1, 1).contiguous(), labels=range(50))
    train, test = split(source)
    assert len(train) == 45 and len(test) == 5
    assert {*train.labels, *test.labels} == set(range(50)) and test.labels.tolist() == split(source)[1].labels.tolist()
    assert test.read(3).item() == test.label(3) == test.labels[3] and "image" in test.name(0)
    with pytest.raises(UserError, match="at least 2"):
        split(ArraySource(source.images[:1]))


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


@pytest.mark.parametrize(
    ("shape", "want"), [((5, 8, 9), (1, 8, 9)), ((5, 8, 9, 3), (3, 8, 9)), ((5, 1, 8, 9), (1, 8, 9)),
                        ((5, 8, 9, 1), (1, 8, 9)), ((5, 3, 8, 9), (3, 8, 9))],
)  # fmt: skip
@pytest.mark.parametrize("torch_tensor", [False, True])
def test_arrays(shape: tuple[int, ...], want: tuple[int, ...], torch_tensor: bool) -> None:
    images = RNG.integers(0, 256, shape, dtype=np.uint8)
    given = torch.from_numpy(images) if torch_tensor else images
    source = open_source(given)
    assert len(source) == 5 and source.read(2).shape == want and source.labels is None
    flat = images[2].reshape(8, 9, -1) if shape[-1] != 9 else images[2].reshape(-1, 8, 9).transpose(1, 2, 0)
    assert np.array_equal(source.read(2).permute(1, 2, 0), flat)
    assert open_source((given, [4, 3, 2, 1, 0])).label(1) == 3
    assert open_source(source) is source


def test_arrays_of_numpy_on_disk(tmp_path: Path) -> None:
    images = RNG.integers(0, 256, (20, 8, 8, 3), dtype=np.uint8)
    np.save(tmp_path / "x.npy", images)
    source = open_source(tmp_path / "x.npy")
    assert np.array_equal(source.read(19).permute(1, 2, 0), images[19])
    (batch,) = train_loader(source, MultiCrop(8, 4, 1), batch_size=20, seed=0, epochs=1, workers=1)
    assert sorted(batch.index.tolist()) == list(range(20))
    (tmp_path / "y.npy").write_bytes(b"no array")
    with pytest.raises(UserError, match=r"y\.npy: not a readable array"):
        open_source(tmp_path / "y.npy")
    np.save(tmp_path / "z.npy", images.astype(np.float32))
    with pytest.raises(UserError, match=r"z\.npy holds float32 from 0 to 255, whose range is not known"):
        open_source(tmp_path / "z.npy")


def test_what_cannot_be_opened_is_said() -> None:
    with pytest.raises(UserError, match="entry 0 of the list is a int, not an image"):
        open_source([1, 2])
    with pytest.raises(UserError, match="which is the channel"):
        open_source(np.zeros((2, 3, 3, 3), np.uint8))
    with pytest.raises(UserError, match="shape"):
        open_source(np.zeros((2, 3), np.uint8))


def test_patterns(tmp_path: Path) -> None:
    for name in ("a/1.png", "a/2.png", "b/3.png", "b/c/4.png", "b/notes.txt"):
        save(tmp_path / name) if name.endswith("png") else (tmp_path / name).write_text("x")
    for pattern, count in (("*/*.png", 3), ("**/*.png", 4), ("{a,b}/[13].png", 2), ("a/{1..2}.png", 2)):
        source = open_source(f"{tmp_path}/{pattern}")
        assert len(source) == count and source.labels is None and source.read(0).shape == (3, 12, 20)
    with pytest.raises(UserError, match=r"\*\.gif matches no file"):
        open_source(f"{tmp_path}/*.gif")
    with pytest.raises(UserError, match=r"has files of \.png, \.txt; expected images"):
        open_source(f"{tmp_path}/b/*")
    strange = save(tmp_path / "[x]" / "1.png").parent
    assert len(open_source(strange)) == 1  # what exists is no pattern
    assert isinstance(open_source("demo"), ArraySource)


def test_the_larger_of_images_and_shards_is_taken(tmp_path: Path) -> None:
    """A picture for the README beside shards is not the data set, nor is an archive of something else beside images."""
    save(tmp_path / "a" / "docs" / "preview.png")
    (tmp_path / "a" / "data").mkdir()
    shard(tmp_path / "a" / "data" / "x.tar", 0, 20)
    with pytest.warns(SourceNote, match=r"images are the 20 in \.tar files; left out: 1 in image files"):
        assert len(open_source(tmp_path / "a")) == 20
    for i in range(3):
        save(tmp_path / "b" / f"{i}.png")
    pack(tmp_path / "b" / "weights.tar", {"model.bin": b"x"})
    arrow.parquet.write_table(arrow.table({"metadata": [1, 2, 3, 4]}), tmp_path / "b" / "metadata.parquet")
    with pytest.warns(SourceNote, match=r"3 in image files; left out: 0 in \.parquet files, 0 in \.tar files"):
        assert len(open_source(tmp_path / "b")) == 3
    (tmp_path / "c").mkdir()
    for name in ("x.tar", "y.tar"):
        shard(tmp_path / "c" / name, 0, 4)
    hugging_face(tmp_path / "c" / "x.parquet", [{"bytes": png(1), "path": None}])
    with pytest.warns(SourceNote, match=r"8 in \.tar files; left out: 1 in \.parquet"):
        assert len(open_source(tmp_path / "c")) == 8


def test_parts_of_shards(tmp_path: Path) -> None:
    for name, count in (("Train/0.tar", 3), ("Train/1.tar", 2), ("validation/0.tar", 1), ("test/0.tar", 4)):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shard(tmp_path / name, 0, count)
    with pytest.warns(SourceNote, match=r"validation is held out; left out: 1 files \(test/0\.tar\)"):
        source = open_source(tmp_path)
    assert len(source) == 5 and len(source.test) == 1


def test_pipes_and_sockets_are_never_opened(tmp_path: Path) -> None:
    """Opening a FIFO waits for its writer, for ever."""
    save(tmp_path / "x" / "0.png")
    for name in ("1.png", "2.tar", "3.parquet"):
        os.mkfifo(tmp_path / "x" / name)
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(tmp_path / "x" / "4.jpg"))
    with pytest.warns(SourceNote, match=r"left out: 4 of special kinds \(FIFOs, sockets, devices\)"):
        source = open_source(tmp_path / "x")
    assert len(source) == 1
    os.unlink(tmp_path / "x" / "0.png")
    os.mkfifo(tmp_path / "x" / "0.png")
    with pytest.raises(ImageError, match=r"0\.png: is no file but a FIFO"):
        source.read(0)
    for name in ("1.png", "2.tar", "3.parquet", "4.jpg"):
        with pytest.raises(UserError, match=r"is a (FIFO|socket), not a file"):
            open_source(tmp_path / "x" / name)
    (tmp_path / "list.txt").write_text("x/1.png\n")
    with pytest.raises(UserError, match="is no file"):
        open_source(tmp_path / "list.txt")


def test_formats_that_are_not_read_are_named(tmp_path: Path) -> None:
    for i in range(3):
        (tmp_path / f"{i}.DCM").write_bytes(b"x")
    with pytest.raises(UserError, match=r"holds no images .*\(left out: 3 \.dcm"):
        open_source(tmp_path)
