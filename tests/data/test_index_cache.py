"""Indexes: what is kept, when it is used again, and how fast."""

from __future__ import annotations

import os
import time
from pathlib import Path

import numpy as np
import pytest

from dino_fast.data import index_cache as index
from dino_fast.data import open_source
from dino_fast.data.formats import folder
from dino_fast.data.formats.folder import FileSource
from dino_fast.data.train_loader import epoch_order

from .example_files import save


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(index, "KEEP_AFTER", 0.0)
    monkeypatch.setenv("DINO_FAST_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def photos(root: Path) -> Path:
    for name in ("a/1.png", "a/deep/2.png", "b/3.png"):
        save(root / name)
    age(root)
    return root


def age(root: Path) -> None:
    """As if the folders had last been changed long ago: what has just changed is not kept."""
    for path in (root, *root.rglob("*")):
        os.utime(path, (1e9, 1e9))


def names(source: FileSource) -> list[str]:
    return [source.name(i) for i in range(len(source))]


def test_a_second_start_reads_no_folder(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = photos(tmp_path / "photos")
    first = open_source(root)
    monkeypatch.setattr(folder, "walk", None)
    second = open_source(root)
    assert names(first) == names(second) and second.classes == ["a", "b"] and second.labels.tolist() == [0, 0, 1]
    assert second.read(1).shape == (3, 12, 20)


@pytest.mark.parametrize("change", ["add", "remove", "rename", "folder"])
def test_a_changed_folder_is_walked_again(cache: Path, tmp_path: Path, change: str) -> None:
    root = photos(tmp_path / "photos")
    open_source(root)
    assert len(list(cache.iterdir())) == 1
    if change == "add":
        save(root / "a" / "deep" / "4.png")
    elif change == "remove":
        (root / "a" / "deep" / "2.png").unlink()
    elif change == "rename":
        (root / "b" / "3.png").rename(root / "b" / "5.png")
    else:
        (root / "a" / "deep").rename(root / "b" / "deep")
    found = {str(path) for path in root.rglob("*.png")}
    assert set(names(open_source(root))) == found


def test_a_folder_that_has_just_changed_is_not_kept(cache: Path, tmp_path: Path) -> None:
    """A further change within the same tick of the file system's clock would go unseen."""
    save(tmp_path / "photos" / "1.png")
    open_source(tmp_path / "photos")
    assert not cache.exists()


def test_damage_and_full_disks_cost_time_only(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = photos(tmp_path / "photos")
    want = names(open_source(root))
    (file,) = cache.iterdir()
    for data in (b"", b"junk", file.read_bytes()[:-40]):
        file.write_bytes(data)
        assert names(open_source(root)) == want
    file.unlink()
    monkeypatch.setenv("DINO_FAST_CACHE", str(root / "a" / "1.png"))  # no folder can be made there
    assert names(open_source(root)) == want


def test_quick_indexes_are_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DINO_FAST_CACHE", str(tmp_path / "cache"))
    open_source(photos(tmp_path / "photos"))
    assert not (tmp_path / "cache").exists()


def test_a_million_images_start_in_less_than_a_second(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A million names in a thousand folders, walked once (made up: no million files), then opened from the cache."""
    count, classes = 1_000_000, 1000
    root = photos(tmp_path / "photos")

    def walk(root: Path, extensions: set[str]):
        stamp = index.stamp(os.stat(root))
        for c in range(classes):
            files = [b"n%08d_%06d.JPEG" % (c, i) for i in range(count // classes)]
            yield folder.Folder(str(root), b"n%08d" % c, files, stamp)

    monkeypatch.setattr(folder, "walk", walk)
    first = open_source(root)
    monkeypatch.setattr(folder, "walk", None)
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        second = open_source(root)
        seconds.append(time.perf_counter() - start)
    assert (
        len(second) == count
        and second.name(count - 1) == first.name(count - 1) == f"{root}/n00000999/n00000999_000999.JPEG"
    )
    assert np.array_equal(first.labels, second.labels) and len(second.classes) == classes
    assert min(seconds) < 1.0  # 0.02 s on a quiet machine


def test_an_epoch_of_a_million_is_ordered_quickly() -> None:
    start = time.perf_counter()
    order = epoch_order(1_000_000, 0, 5)
    assert (
        time.perf_counter() - start < 1.0
    )  # 0.02 s on a quiet machine; it holds no state, so a resume replays nothing
    assert order.sort().values.equal(order.new_tensor(range(1_000_000)))
