"""Images inside archives, read at any place without unpacking: what tar and zip files share.

One walk over the headers finds where each image's bytes lie; that index is kept (see index_cache.py), and an image is
then a read at an offset. So the order is a full permutation and a crop stays a function of (seed, epoch, index), which
a reader that streams its shards cannot offer.
"""

from __future__ import annotations

import os
import resource
from array import array
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from dino_fast.data.decode import ImageError
from dino_fast.data.formats.layout import counted, passed_over, read_layout
from dino_fast.data.index_cache import Index, cached, watch
from dino_fast.data.labels import class_numbers, share_classes
from dino_fast.data.source import EXTENSIONS, Source, Subset, printable
from dino_fast.errors import UserError

_OPEN = 256  # archives kept open, or a quarter of what the process may open; beyond, one is opened for each read


class ArchiveSource(Source):
    """The images of archives of one kind, `kind` being "tar" or "zip", whose headers `read_headers` reads."""

    kind = ""

    def __init__(self, paths: Sequence[Path], read_headers: Callable[[Path, int, Entries], None]) -> None:
        self.paths = list(paths)
        index = cached(f"{self.kind}s", self.paths, lambda: _index(self.paths, self.kind, read_headers))
        self._arrays, self.notes = index.arrays, list(index.facts["notes"])
        self.labels, self.part_classes = index.arrays.get("labels"), index.facts["classes"]
        self.classes, self.unused_labels = self.part_classes[0], index.facts["unused"]
        self._files: dict[int, int] = {}
        limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        self._open = _OPEN if limit == resource.RLIM_INFINITY else min(_OPEN, limit // 4)

    def __len__(self) -> int:
        return len(self._arrays["ends"])

    @property
    def parts(self) -> np.ndarray | None:
        """int8 [len]: 0 to train on, 1 held out, -1 left out; None where all are 0."""
        return self._arrays.get("parts")

    def member(self, index: int) -> str:
        """The image's name inside its archive."""
        start = self._arrays["ends"][index - 1] if index else 0
        return os.fsdecode(self._arrays["names"][start : self._arrays["ends"][index]].tobytes())

    def name(self, index: int) -> str:
        """The archive and the name inside it."""
        return printable(f"{self.paths[self._arrays['shards'][index]]}, {self.member(index)}")

    def data(self, index: int) -> bytes:
        """The encoded file. Raises ImageError naming the image."""
        size, offset = int(self._arrays["sizes"][index]), int(self._arrays["offsets"][index])
        return self._read(index, size, offset)

    def _read(self, index: int, size: int, offset: int) -> bytes:
        """Bytes of the image's archive. Raises ImageError where there are fewer."""
        try:
            data = self._pread(int(self._arrays["shards"][index]), size, offset)
        except OSError as error:
            raise ImageError(f"{self.name(index)}: {error.strerror or error}") from error
        if len(data) < size:
            raise ImageError(
                f"{self.name(index)}: the {self.kind} file is cut off inside this image ({len(data)} of {size} bytes)"
            )
        return data

    def _pread(self, shard: int, size: int, offset: int) -> bytes:
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


def split_parts(source: ArchiveSource) -> Source:
    """The source, or what to train on of it with what is held out as its `test`, where its folders say so."""
    if source.parts is None:
        return source
    train, test = (Subset(source, np.flatnonzero(source.parts == part)) for part in (0, 1))
    test.notes = ()  # they are those of both
    if len(test):
        test.classes = source.part_classes[1]
        share_classes(train, test)
        train.test = test
    return train


@dataclass
class Entries:
    """What the headers of all archives say, image by image."""

    names: bytearray = field(default_factory=bytearray)
    lengths: array[int] = field(default_factory=lambda: array("q"))
    shards: array[int] = field(default_factory=lambda: array("i"))
    offsets: array[int] = field(default_factory=lambda: array("q"))
    sizes: array[int] = field(default_factory=lambda: array("q"))
    extra: dict[str, array[int]] = field(default_factory=dict)  # further int64 arrays
    texts: list[str | None] = field(default_factory=list)  # of the labels that lie beside images
    notes: list[str] = field(default_factory=list)
    passed_over: Counter[str] = field(default_factory=Counter)

    def wanted(self, name: str) -> bool:
        """Whether a member is an image to train on; what is passed over is counted."""
        base = os.path.basename(name)
        if base.startswith("."):
            return False
        reason = passed_over(os.fsencode(base))
        if reason:
            self.passed_over[reason] += 1
            return False
        return os.path.splitext(base)[1].lower() in EXTENSIONS

    def add(self, name: str, shard: int, offset: int, size: int, **extra: int) -> None:
        """One more image."""
        encoded = os.fsencode(name)
        self.names += encoded
        self.lengths.append(len(encoded))
        self.shards.append(shard)
        self.offsets.append(offset)
        self.sizes.append(size)
        for key, value in extra.items():
            self.extra.setdefault(key, array("q")).append(value)


def _index(paths: Sequence[Path], kind: str, read_headers: Callable[[Path, int, Entries], None]) -> Index:
    try:
        watched = watch(paths)
    except OSError as error:
        raise UserError(f"{error.filename}: {error.strerror}") from error
    entries = Entries()
    for shard, path in enumerate(paths):
        read_headers(path, shard, entries)
    left_out = counted(entries.passed_over)
    if not entries.lengths:
        raise UserError(
            f"{paths[0]}{f' and {len(paths) - 1} more' if len(paths) > 1 else ''}: no images in the {kind} file; "
            f"looked for members that end in {', '.join(sorted(EXTENSIONS))}"
            + "".join(f" ({note})" for note in left_out)
        )
    arrays: dict[str, np.ndarray] = {
        "names": np.frombuffer(entries.names, np.uint8),
        "ends": np.cumsum(np.frombuffer(entries.lengths, np.int64)),
        "shards": np.frombuffer(entries.shards, np.int32),
        "offsets": np.frombuffer(entries.offsets, np.int64),
        "sizes": np.frombuffer(entries.sizes, np.int64),
        **{key: np.frombuffer(values, np.int64) for key, values in entries.extra.items()},
    }
    folders, rows = _folders(arrays["names"].tobytes(), arrays["ends"])
    layout = read_layout(folders, np.bincount(rows, minlength=len(folders)).tolist())
    if layout.parts is not None:
        arrays["parts"] = layout.parts[rows]
    classes, unused = layout.classes, ""
    labels = None if layout.labels is None else layout.labels[rows]
    if any(text is not None for text in entries.texts):
        labels, names, unused = class_numbers(entries.texts, where="the labels (.cls)")
        classes = [names, names]
    if labels is not None:
        arrays["labels"] = labels
    notes = [*entries.notes, *layout.notes, *left_out]
    return Index(arrays, {"classes": classes, "unused": unused, "notes": notes}, **watched)


def _folders(names: bytes, ends: np.ndarray) -> tuple[list[bytes], np.ndarray]:
    """The distinct folders of the images, and which of them each image lies in."""
    numbers: dict[bytes, int] = {}
    start, rows = 0, array("q")
    for end in ends.tolist():
        rows.append(numbers.setdefault(names[start:end].rpartition(b"/")[0], len(numbers)))
        start = end
    return list(numbers), np.frombuffer(rows, np.int64)
