"""The start with very many files: `python -m tests.data.many COUNT [FOLDERS]`.

The folders are real, the files in them made up: their names come from a generator in place of the walk. What is timed
the second time is all that a start does: the date of every folder, the kept index, the order of an epoch, a name.
"""

from __future__ import annotations

import os
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from dino_fast.data import index_cache as index
from dino_fast.data import open_source
from dino_fast.data.formats import folder
from dino_fast.data.train_loader import epoch_order


def made_up(root: Path, count: int, folders: int) -> Iterator[folder.Folder]:
    """What a walk of `root` would yield if each of its folders held count / folders images."""
    for c in range(folders):
        inside = b"n%08d" % c
        path = os.fsdecode(os.path.join(os.fsencode(root), inside))
        files = [b"n%08d_%06d.JPEG" % (c, i) for i in range(count // folders)]
        yield folder.Folder(path, inside, files, index.stamp(os.stat(path)))


def start(root: Path) -> tuple[float, float, float]:
    """Seconds to open the images, and to draw the order of an epoch; MB that this took."""
    before, begun = _resident(), time.perf_counter()
    source = open_source(root)
    opened = time.perf_counter()
    order = epoch_order(len(source), 0, 1)
    source.name(int(order[-1]))
    return opened - begun, time.perf_counter() - opened, (_resident() - before) / 1e6


def _resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def main(count: int, folders: int) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        os.environ["DINO_FAST_CACHE"] = f"{scratch}/cache"
        root = Path(scratch) / "photos"
        for c in range(folders):
            path = root / f"n{c:08d}"
            path.mkdir(parents=True)
            os.utime(path, (1e9, 1e9))  # what has just changed is not kept
        (root / "n00000000" / "n00000000_000000.JPEG").touch()
        os.utime(root / "n00000000", (1e9, 1e9))
        walk, folder.walk = folder.walk, lambda root, extensions: made_up(root, count, folders)
        print(f"first start: {start(root)[0]:.2f} s to open (names made up, none read from a disk)")
        folder.walk = walk
        (kept,) = Path(f"{scratch}/cache").iterdir()
        for _ in range(3):
            opened, ordered, grown = start(root)
            print(
                f"again: {opened:.2f} s to open {count:,} images in {folders:,} folders, {ordered:.2f} s for the order "
                f"of an epoch, {grown:+.0f} MB; the index is {kept.stat().st_size / 1e6:.0f} MB",
                flush=True,
            )


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 10_000)
