"""Tar files: WebDataset's layout, packed folders, cut ones."""

from __future__ import annotations

import io
import os
import resource
import tarfile
import warnings
from pathlib import Path

import pytest
import torch

from dino_fast.augment import MultiCrop
from dino_fast.data import ImageError, SourceNote, open_source, train_loader
from dino_fast.data import index_cache as index
from dino_fast.data.formats.tar import TarSource
from dino_fast.errors import UserError

from ..example_files import pack, png, shard


def test_shards_of_webdataset_are_read_at_any_place(tmp_path: Path) -> None:
    for number in range(3):
        shard(tmp_path / f"data-{number:03d}.tar", 10 * number, 10)
    for given in (tmp_path, f"{tmp_path}/data-{{000..002}}.tar", f"{tmp_path}/*.tar"):
        source = open_source(given)
        assert len(source) == 30 and [source.label(i) for i in (0, 1, 2, 29)] == [0, 1, 2, 2]
        assert [source.read(i).unique().tolist() for i in (29, 0, 15)] == [[29], [0], [15]]
        assert source.name(15) == f"{tmp_path}/data-001.tar, 000015.png"
    assert len(open_source(f"{tmp_path}/data-{{000,002}}.tar")) == 20
    with pytest.raises(UserError, match="No such file"):
        open_source(f"{tmp_path}/data-{{000..003}}.tar")
    with pytest.raises(UserError, match="matches no file"):
        open_source(f"{tmp_path}/no-*.tar")


def test_shards_that_the_library_wrote(tmp_path: Path) -> None:
    webdataset = pytest.importorskip("webdataset", reason="needs the library webdataset, which writes the shards")
    with webdataset.TarWriter(str(tmp_path / "a.tar")) as writer:
        for i in range(5):
            writer.write({"__key__": f"some/where/{i}", "png": png(40 + i), "cls": i, "txt": "words"})
    source = open_source(tmp_path / "a.tar")
    theirs = list(webdataset.WebDataset(str(tmp_path / "a.tar"), shardshuffle=False))
    assert [source.data(i) for i in range(5)] == [sample["png"] for sample in theirs]
    assert source.labels.tolist() == list(range(5))


def test_a_packed_folder_has_its_classes_and_parts(tmp_path: Path) -> None:
    names = ["set/train/cat/1.png", "set/train/dog/2.png", "set/val/dog/3.png", "set/val/dog/._3.png"]
    source = open_source(pack(tmp_path / "x.tar", {name: png(i) for i, name in enumerate(names)}))
    assert len(source) == 2 and source.classes == ["cat", "dog"] and source.labels.tolist() == [0, 1]
    assert source.test.read(0).unique().tolist() == [2] and source.test.labels.tolist() == [1]
    flat = open_source(pack(tmp_path / "flat.tar", {"a.png": png(1), "sub/b.png": png(2)}))
    assert flat.labels is None and flat.classes is None
    texts = {"a.png": png(1), "a.cls": b"zebra", "b.png": png(2), "c.cls": b"ant\n", "c.png": png(3)}
    named = open_source(pack(tmp_path / "named.tar", texts))
    assert named.classes == ["ant", "zebra"] and named.labels.tolist() == [1, -1, 0]


def test_train_and_test_shards(tmp_path: Path) -> None:
    shard(tmp_path / "train-0.tar", 0, 6)
    shard(tmp_path / "test-0.tar", 6, 3)
    source = open_source(tmp_path)
    assert len(source) == 6 and len(source.test) == 3


@pytest.mark.parametrize("workers", [0, 2])
def test_training_reads_every_image_once_an_epoch(tmp_path: Path, workers: int) -> None:
    shard(tmp_path / "a.tar", 0, 7)
    shard(tmp_path / "b.tar", 7, 9)
    loader = train_loader(
        open_source(tmp_path), MultiCrop(8, 4, 1, grey_p=0, jitter_p=0), batch_size=8, seed=0, epochs=1, workers=workers
    )
    assert sorted(torch.cat([batch.index for batch in loader]).tolist()) == list(range(16))


def test_a_tar_cut_off_half_way(tmp_path: Path) -> None:
    """Inside an image, inside a header, between members: the whole images are used and the file is named."""
    whole = shard(tmp_path / "whole.tar", 0, 10, label=False).read_bytes()
    with tarfile.open(tmp_path / "whole.tar") as tar:
        member = tar.getmember("000006.png")
    cuts = {"image": member.offset_data + 20, "header": member.offset + 100, "between": member.offset}
    for kind, cut in cuts.items():
        path = tmp_path / f"{kind}.tar"
        path.write_bytes(whole[:cut])
        with pytest.warns(UserWarning, match=rf"{kind}\.tar is cut off or damaged after [67] images"):
            source = open_source(path)
        assert len(source) == (7 if kind == "image" else 6)
        assert [source.read(i).unique().tolist() for i in range(6)] == [[i] for i in range(6)]
        if kind == "image":
            with pytest.raises(ImageError, match=r"image\.tar, 000006\.png: the tar file is cut off inside this image"):
                source.read(6)


def test_damage_in_the_middle_is_named(tmp_path: Path) -> None:
    path = shard(tmp_path / "x.tar", 0, 10, label=False)
    with tarfile.open(path) as tar:
        at = tar.getmember("000004.png").offset
    data = bytearray(path.read_bytes())
    data[at : at + 512] = b"\xff" * 512
    path.write_bytes(data)
    with pytest.warns(UserWarning, match=r"x\.tar is cut off or damaged after 4 images"):
        assert len(open_source(path)) == 4


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [("x.tar", b"not a tar" * 100, "not a readable tar file"), ("x.tar", b"", "not a readable tar file"),
     ("x.tar.gz", b"\x1f\x8b", "compressed tar"), ("x.tgz", b"\x1f\x8b", "compressed tar")],
)  # fmt: skip
def test_what_is_no_tar_is_refused(tmp_path: Path, name: str, data: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(data)
    with pytest.raises(UserError, match=message):
        open_source(tmp_path / name)


def test_a_tar_without_images_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no images in the tar file"):
        open_source(pack(tmp_path / "x.tar", {"a.txt": b"words"}))


def test_the_index_is_kept_until_a_shard_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(index, "KEEP_AFTER", 0.0)
    monkeypatch.setenv("DINO_FAST_CACHE", str(tmp_path / "cache"))
    path = shard(tmp_path / "a.tar", 0, 4)
    os.utime(path, (1e9, 1e9))
    first = open_source(path)
    with monkeypatch.context() as patched:
        patched.setattr(tarfile, "open", None)  # any reading of headers would fail
        again = open_source(path)
        assert len(again) == 4 and again.labels.tolist() == first.labels.tolist() and again.name(3) == first.name(3)
        assert torch.equal(again.read(2), first.read(2))
    shard(path, 4, 5)
    assert len(open_source(path)) == 5


def test_more_shards_than_are_kept_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from dino_fast.data.formats import archive

    monkeypatch.setattr(archive, "_OPEN", 2)
    paths = [shard(tmp_path / f"{i}.tar", i, 1) for i in range(5)]
    source = TarSource(paths)
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(3):
        assert [source.read(i).unique().item() for i in range(5)] == list(range(5))
    assert len(os.listdir("/proc/self/fd")) == before + 2


def test_a_tar_that_goes_away_is_named(tmp_path: Path) -> None:
    path = shard(tmp_path / "x.tar", 0, 3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        source = open_source(path)
    path.unlink()
    with pytest.raises(ImageError, match=r"x\.tar, 000001\.png: No such file"):
        source.read(1)


def test_more_shards_than_files_may_be_open(tmp_path: Path) -> None:
    """A quarter of the limit is kept open at most: want of files is no fault of an image."""
    for i in range(40):
        shard(tmp_path / f"{i:02d}.tar", i, 1)
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/dev/fd")) + 32, limits[1]))
    try:
        source = open_source(tmp_path)
        assert [int(source.read(i).unique().item()) for i in range(40)] == list(range(40))
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)


def test_links_are_images_with_their_labels(tmp_path: Path) -> None:
    """`tar` stores a file that it meets again as a hard link; symbolic links are kept as such."""
    with tarfile.open(tmp_path / "x.tar", "w") as tar:

        def add(name: str, data: bytes = b"", kind: bytes = tarfile.REGTYPE, target: str = "") -> None:
            member = tarfile.TarInfo(name)
            member.size, member.type, member.linkname = len(data), kind, target
            tar.addfile(member, io.BytesIO(data))

        add("set/cat/1.png", png(1))
        add("set/dog/2.png", kind=tarfile.LNKTYPE, target="set/cat/1.png")
        add("set/dog/3.png", kind=tarfile.SYMTYPE, target="../cat/4.png")
        add("set/cat/4.png", png(4))
        add("set/cat/5.png", kind=tarfile.SYMTYPE, target="gone.png")
        add("set/cat/6.png", kind=tarfile.SYMTYPE, target="../dog/2.png")
    with pytest.warns(SourceNote, match="left out: 1 links to images that are not in the tar"):
        source = open_source(tmp_path / "x.tar")
    found = {source.member(i): (source.read(i).unique().item(), source.label(i)) for i in range(len(source))}
    assert found == {
        "set/cat/1.png": (1, 0),
        "set/dog/2.png": (1, 1),
        "set/dog/3.png": (4, 1),
        "set/cat/4.png": (4, 0),
        "set/cat/6.png": (1, 0),
    }


def test_hard_links_of_labels(tmp_path: Path) -> None:
    names = {"a.png": png(1), "a.cls": b"7", "b.png": png(2)}
    pack(tmp_path / "x.tar", names)
    with tarfile.open(tmp_path / "x.tar", "a") as tar:
        member = tarfile.TarInfo("b.cls")
        member.type, member.linkname = tarfile.LNKTYPE, "a.cls"
        tar.addfile(member)
    assert open_source(tmp_path / "x.tar").labels.tolist() == [7, 7]


def test_tars_behind_each_other_are_read_whole(tmp_path: Path) -> None:
    parts = [shard(tmp_path / f"{i}.tar", 10 * i, 3).read_bytes() for i in range(3)]
    (tmp_path / "all.tar").write_bytes(b"".join(parts))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        source = open_source(tmp_path / "all.tar")
    assert [source.read(i).unique().item() for i in range(9)] == [0, 1, 2, 10, 11, 12, 20, 21, 22]
    assert source.labels.tolist() == [i % 3 for i in (0, 1, 2, 10, 11, 12, 20, 21, 22)]
    (tmp_path / "cut.tar").write_bytes(parts[0] + parts[1][:4000])
    with pytest.warns(UserWarning, match=r"cut\.tar is cut off or damaged after [45] images"):
        assert len(open_source(tmp_path / "cut.tar")) >= 4


def test_annotations_of_samples_are_left_out(tmp_path: Path) -> None:
    members = {"1.jpg": png(1), "1.mask.png": png(2), "1.depth.png": png(3), "1.cls": b"4", "2.jpg": png(5)}
    with pytest.warns(SourceNote, match=r"left out: 1 \.depth\.png \(annotations\), 1 \.mask\.png"):
        source = open_source(pack(tmp_path / "x.tar", members))
    assert [source.member(i) for i in range(len(source))] == ["1.jpg", "2.jpg"] and source.labels.tolist() == [4, -1]
