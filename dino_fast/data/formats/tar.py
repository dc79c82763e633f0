"""Images in tar files, as WebDataset writes them or as a folder was packed, read at any place without unpacking.

One walk over the headers finds where each image's bytes lie; that index is kept (see index_cache.py), and an image is
then a read at an offset. So the order is a full permutation and a crop stays a function of (seed, epoch, index), which
a reader that streams its shards cannot offer; the layout on disk is the same.
"""

from __future__ import annotations

import os
import resource
import tarfile
from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from dino_fast.data.decode import ImageError
from dino_fast.data.index_cache import Index, cached, watch
from dino_fast.data.labels import class_numbers, share_classes
from dino_fast.data.source import EXTENSIONS, TEST_DIRS, TRAIN_DIRS, Source, Subset, lfs_pointer, printable
from dino_fast.errors import UserError

_OPEN = 256  # tar files kept open, or a quarter of what the process may open; beyond, one is opened for each read


class TarSource(Source):
    """The images of tar files. Labels are the members `.cls` of the same sample, or the first level of folders."""

    def __init__(self, paths: Sequence[Path]) -> None:
        self.paths = list(paths)
        index = cached("tars", self.paths, lambda: _index(self.paths))
        self._arrays, self.notes = index.arrays, list(index.facts["notes"])
        self.labels, self.classes = index.arrays.get("labels"), index.facts["classes"]
        self.unused_labels = index.facts["unused"]
        self._files: dict[int, int] = {}
        limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        self._open = _OPEN if limit == resource.RLIM_INFINITY else min(_OPEN, limit // 4)

    def __len__(self) -> int:
        return len(self._arrays["ends"])

    def member(self, index: int) -> str:
        """The image's name inside its tar file."""
        start = self._arrays["ends"][index - 1] if index else 0
        return os.fsdecode(self._arrays["names"][start : self._arrays["ends"][index]].tobytes())

    def name(self, index: int) -> str:
        return printable(f"{self.paths[self._arrays['shards'][index]]}, {self.member(index)}")

    def data(self, index: int) -> bytes:
        size, offset = int(self._arrays["sizes"][index]), int(self._arrays["offsets"][index])
        try:
            data = self._read(int(self._arrays["shards"][index]), size, offset)
        except OSError as error:
            raise ImageError(f"{self.name(index)}: {error.strerror or error}") from error
        if len(data) < size:
            raise ImageError(
                f"{self.name(index)}: the tar file is cut off inside this image ({len(data)} of {size} bytes)"
            )
        return data

    def _read(self, shard: int, size: int, offset: int) -> bytes:
        """Reads without moving a file position, so that threads and forked workers may share the open file."""
        file = self._files.get(shard)
        if file is not None:
            return os.pread(file, size, offset)
        file = os.open(self.paths[shard], os.O_RDONLY)
        if len(self._files) < self._open and self._files.setdefault(shard, file) == file:
            return os.pread(file, size, offset)
        try:
            return os.pread(file, size, offset)
        finally:
            os.close(file)

    def __del__(self) -> None:
        for file in getattr(self, "_files", {}).values():
            os.close(file)


def open_tars(paths: Sequence[Path]) -> Source:
    """Opens tar files as one source; folders train/ and val/ or test/ inside them are kept apart. Raises UserError."""
    source = TarSource(paths)
    parts = source._arrays.get("parts")
    if parts is None:
        return source
    train, test = (Subset(source, np.flatnonzero(parts == part)) for part in (0, 1))
    share_classes(train, test)
    train.test = test
    return train


@dataclass
class _Found:
    """What the headers of all tar files say, image by image."""

    names: bytearray = field(default_factory=bytearray)
    lengths: array[int] = field(default_factory=lambda: array("q"))
    shards: array[int] = field(default_factory=lambda: array("i"))
    offsets: array[int] = field(default_factory=lambda: array("q"))
    sizes: array[int] = field(default_factory=lambda: array("q"))
    texts: list[str | None] = field(default_factory=list)  # of the labels; numbers are shared strings
    notes: list[str] = field(default_factory=list)


def _index(paths: Sequence[Path]) -> Index:
    try:
        watched = watch(paths)
    except OSError as error:
        raise UserError(f"{error.filename}: {error.strerror}") from error
    found = _Found()
    for shard, path in enumerate(paths):
        _read_headers(path, shard, found)
    if not found.lengths:
        raise UserError(
            f"{paths[0]}{f' and {len(paths) - 1} more' if len(paths) > 1 else ''}: no images in the tar file; "
            f"looked for members that end in {', '.join(sorted(EXTENSIONS))}"
        )
    arrays: dict[str, np.ndarray] = {
        "names": np.frombuffer(found.names, np.uint8),
        "ends": np.cumsum(np.frombuffer(found.lengths, np.int64)),
        "shards": np.frombuffer(found.shards, np.int32),
        "offsets": np.frombuffer(found.offsets, np.int64),
        "sizes": np.frombuffer(found.sizes, np.int64),
    }
    labels: np.ndarray | None
    unused = ""
    if any(text is not None for text in found.texts):
        labels, classes, unused = class_numbers(found.texts, where="the labels (.cls)")
    else:
        labels, classes, parts = _folders(arrays["names"].tobytes(), arrays["ends"])
        if parts is not None:
            arrays["parts"] = parts
    if labels is not None:
        arrays["labels"] = labels
    return Index(arrays, {"classes": classes, "unused": unused, "notes": found.notes}, **watched)


def _read_headers(path: Path, shard: int, found: _Found) -> None:
    labels: dict[str, str] = {}
    keys: list[str] = []
    shared: dict[str, str] = {}
    try:
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                key, extension = _sample(member.name)
                if not member.isreg() or os.path.basename(member.name).startswith("."):
                    continue
                if extension in EXTENSIONS:
                    name = os.fsencode(member.name)
                    found.names += name
                    found.lengths.append(len(name))
                    found.shards.append(shard)
                    found.offsets.append(member.offset_data)
                    found.sizes.append(member.size)
                    keys.append(key)
                elif extension == ".cls":
                    file = tar.extractfile(member)
                    text = file.read().decode("utf-8", "replace").strip() if file else ""
                    labels[key] = shared.setdefault(text, text)
            whole = _ends_whole(path, tar.offset)
    except tarfile.ReadError as error:
        if not keys:
            raise UserError(lfs_pointer(path) or f"{path}: not a readable tar file ({error})") from error
        whole = False
    except OSError as error:
        raise UserError(f"{path}: {error.strerror or error}") from error
    if not whole:
        found.notes.append(f"{path} is cut off or damaged after {len(keys)} images; the rest of it is left out")
    found.texts.extend(labels.get(key) for key in keys)


def _sample(name: str) -> tuple[str, str]:
    """(what the members of a sample share, the last extension): WebDataset splits at the first dot of the file name."""
    folder, base = os.path.split(name)
    return os.path.join(folder, base.split(".", 1)[0]), os.path.splitext(base)[1].lower()


def _ends_whole(path: Path, offset: int) -> bool:
    """Whether the mark of a tar file's end stands where its last header was read; tarfile takes a cut for the end."""
    with open(path, "rb") as file:
        file.seek(offset)
        return file.read(tarfile.BLOCKSIZE) == bytes(tarfile.BLOCKSIZE)


def _folders(names: bytes, ends: np.ndarray) -> tuple[np.ndarray | None, list[str] | None, np.ndarray | None]:
    """Labels, classes and parts (0 train, 1 held out) by the folders inside the tar, as a folder on disk has them."""
    numbers: dict[bytes, int] = {}
    start, rows = 0, array("q")
    for end in ends:
        rows.append(numbers.setdefault(names[start:end].rpartition(b"/")[0], len(numbers)))
        start = end
    folders = [tuple(folder.split(b"/")) if folder else () for folder in numbers]
    shared = 0
    while len(starts := {folder[shared : shared + 1] for folder in folders}) == 1 and starts != {()}:
        shared += 1
    below = [folder[shared:] for folder in folders]
    parts, tops = None, {os.fsdecode(folder[0]) if folder else "" for folder in below}
    if len(tops) > 1 and tops <= {*TRAIN_DIRS, *TEST_DIRS} and tops & set(TRAIN_DIRS):
        parts = np.array([os.fsdecode(folder[0]) not in TRAIN_DIRS for folder in below], np.int8)[rows]
        below = [folder[1:] for folder in below]
    if not all(below):
        return None, None, parts
    classes = sorted({printable(os.fsdecode(folder[0])) for folder in below})
    labels = np.array([classes.index(printable(os.fsdecode(folder[0]))) for folder in below], np.int64)
    return labels[rows], classes, parts
