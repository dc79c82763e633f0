"""Image files in folders."""

from __future__ import annotations

import os
import re
from array import array
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

import numpy as np
from typing_extensions import override

from dino_fast.data.decode import ImageError
from dino_fast.data.formats.layout import ARCHIVES, Layout, annotation, counted, passed_over, read_layout
from dino_fast.data.index_cache import Index, cached, stamp
from dino_fast.data.labels import class_numbers, share_classes
from dino_fast.data.source import EXTENSIONS, Source, printable, read_file


class FileSource(Source):
    """Image files, read from disk each time.

    Name i is `names[starts[i]:ends[i]]`, relative to `root`: one buffer instead of millions of strings, which forked
    workers share, since no reference count is written.
    """

    def __init__(self, root: Path, names: np.ndarray, starts: np.ndarray, ends: np.ndarray) -> None:
        self.root, self._names, self._starts, self._ends = root, names, starts, ends

    def __len__(self) -> int:
        return len(self._ends)

    def path(self, index: int) -> Path:
        """The file of an image."""
        return self.root / os.fsdecode(self._names[self._starts[index] : self._ends[index]].tobytes())

    @override
    def name(self, index: int) -> str:
        return printable(str(self.path(index)))

    @override
    def data(self, index: int) -> bytes:
        try:
            return read_file(self.path(index))
        except OSError as error:
            raise ImageError(f"{self.name(index)}: {error.strerror or error}") from error


class Contents(NamedTuple):
    """What lies below a folder: its image files, if any, with `.test` where a part is held out; and shards' paths."""

    images: FileSource | None
    shards: list[Path]
    notes: list[str]


def open_images(root: Path, extensions: set[str] = EXTENSIONS) -> Contents:
    """The images and shards below a folder. What its sub-folders mean is said in layout.py."""
    kind = "folder" if extensions is EXTENSIONS else "folder" + "".join(sorted(extensions))
    index = cached(kind, [root], lambda: scan(root, extensions))
    shards = [root / os.fsdecode(name.encode("latin-1")) for name in index.facts["shards"]]
    notes = index.facts["notes"]
    if not len(index.arrays["ends"]):
        return Contents(None, shards, notes)
    parts, (classes, test_classes) = index.arrays.get("parts"), index.facts["classes"]
    if parts is None:
        images = _files(root, index, None, classes)
    else:
        images = _files(root, index, np.flatnonzero(parts == 0), classes)
        test = _files(root, index, np.flatnonzero(parts == 1), test_classes)
        if len(test):
            share_classes(images, test)
            images.test = test
    images.notes = notes
    return Contents(images, shards, notes)


def open_paths(paths: Sequence[str | Path]) -> FileSource:
    """These image files, in this order, without labels."""
    names = [os.fsencode(os.path.abspath(path)) for path in paths]
    return _files(Path("/"), Index({"names": _buffer(b"".join(names)), "ends": _ends([len(name) for name in names])}))


def scan(root: Path, extensions: set[str]) -> Index:
    """Walks a folder once: the names of its images and where each ends, their labels and parts."""
    names, lengths, counts, shards = bytearray(), array("q"), array("q"), []
    watched, stamps, notes = bytearray(), array("q"), []
    folders: list[bytes] = []
    left_out: Counter[str] = Counter()
    for folder in walk(root, extensions):
        if folder.reason:
            notes.append(f"{folder.path}: {folder.reason}; its images are left out")
            continue
        watched += b"\0" * bool(watched) + os.fsencode(folder.path)
        stamps.extend(folder.stamp)
        left_out.update(folder.left_out)
        inside = folder.inside + b"/" if folder.inside else b""
        shards += [inside + name for name in folder.shards]
        if not folder.files:
            continue
        folders.append(folder.inside)
        counts.append(len(folder.files))
        names += b"".join(inside + name for name in folder.files)
        lengths.extend(len(inside) + len(name) for name in folder.files)
    arrays = {"names": _buffer(names), "ends": _ends(lengths)}
    layout = read_layout(folders, counts)
    if layout.parts is not None:
        arrays["parts"] = np.repeat(layout.parts, counts)
    if layout.labels is not None:
        arrays["labels"] = np.repeat(layout.labels, counts)
    if layout.held_out is not None and layout.classes[1] is None:
        file = _label_files(root, arrays, layout)
        if file is not None:
            watched += b"\0" + os.fsencode(file.absolute())
            stamps.extend(stamp(os.stat(file)))
    facts = {
        "classes": layout.classes,
        "notes": [*notes, *layout.notes, *counted(left_out)],
        "shards": [name.decode("latin-1") for name in shards],  # names may hold any bytes, JSON holds text
    }
    return Index(arrays, facts, bytes(watched), np.frombuffer(stamps, np.int64).reshape(-1, 2))


# Labels of a flat held-out part, as Tiny ImageNet, Kaggle's ImageNet and Caffe write them: an image's name, its class.
_LABEL_FILES = ("val_annotations.txt", "LOC_val_solution.csv", "val.txt")


def _label_files(root: Path, arrays: dict[str, np.ndarray], layout: Layout) -> Path | None:
    """Labels the held-out part from a file of `_LABEL_FILES` in its folder or one above, and returns the file."""
    assert layout.held_out is not None and layout.parts is not None
    held_out = root / os.fsdecode(layout.held_out)
    places = [held_out, *(place for place in held_out.parents if place.is_relative_to(root))]
    file = next((place / name for place in places for name in _LABEL_FILES if (place / name).is_file()), None)
    if file is None:
        return None
    given: dict[bytes, str] = {}
    for line in file.read_bytes().splitlines():
        name, label = [*re.split(rb"[\t, ]+", line, maxsplit=2), b"", b""][:2]
        given[os.path.splitext(os.path.basename(name))[0]] = os.fsdecode(label)
    rows = np.flatnonzero(arrays["parts"] == 1)
    buffer, ends = arrays["names"].tobytes(), arrays["ends"]
    texts = []
    for row in rows.tolist():
        name = buffer[int(ends[row - 1]) if row else 0 : int(ends[row])]
        texts.append(given.get(os.path.splitext(os.path.basename(name))[0]))
    labels = class_numbers(texts)
    if labels.numbers is None:
        layout.notes.append(f"{file} names none of the images beside it, so that they have no labels")
        return file
    arrays.setdefault("labels", np.full(len(ends), -1, np.int64))[rows] = labels.numbers
    layout.classes[1] = labels.classes
    return file


class Folder(NamedTuple):
    """One folder of a walk. `reason` says why it cannot be read, if it cannot."""

    path: str
    inside: bytes  # the path from the root, empty for the root itself
    files: list[bytes]
    stamp: tuple[int, int]
    reason: str = ""
    shards: Sequence[bytes] = ()
    left_out: Mapping[str, int] = MappingProxyType({})  # files that are passed over, by reason


def walk(root: Path, extensions: set[str]) -> Iterator[Folder]:
    """Folders and their files in a fixed order; hidden ones left out, links followed but in no circle."""
    known, archives = ({extension[1:].encode() for extension in kind} for kind in (extensions, ARCHIVES))
    base, pending, seen = os.fsencode(root.absolute()), [b""], set()
    while pending:
        inside = pending.pop()
        path = os.path.join(base, inside) if inside else base
        files, shards, folders = [], [], []
        left_out: Counter[str] = Counter()
        try:
            stat = os.stat(path)  # before the names, so that a change while they are read is seen
            if (stat.st_dev, stat.st_ino) in seen:
                continue
            seen.add((stat.st_dev, stat.st_ino))
            with os.scandir(path) as entries:
                for entry in entries:
                    name = entry.name
                    if name.startswith(b"."):
                        continue
                    if entry.is_dir():
                        folders.append(name)
                        continue
                    stem, _, extension = name.rpartition(b".")
                    extension = extension.lower()
                    is_image = extension in known
                    if not entry.is_file() and (is_image or extension in archives) and os.path.exists(entry.path):
                        left_out["of special kinds (FIFOs, sockets, devices)"] += 1  # opening one may never end
                    elif is_image:
                        reason = annotation(name) if b"." in stem else ""
                        if reason:
                            left_out[reason] += 1
                        else:
                            files.append(name)
                    elif extension in archives:
                        shards.append(name)
                    elif reason := passed_over(name):
                        left_out[reason] += 1
        except OSError as error:
            yield Folder(os.fsdecode(path), inside, [], (0, 0), error.strerror or str(error))
            continue
        yield Folder(os.fsdecode(path), inside, sorted(files), stamp(stat), "", sorted(shards), left_out)
        pending.extend(os.path.join(inside, name) for name in sorted(folders, reverse=True))


def _files(root: Path, index: Index, chosen: np.ndarray | None = None, classes: list[str] | None = None) -> FileSource:
    """The images of an index, or those `chosen` of them."""
    ends, labels = index.arrays["ends"], index.arrays.get("labels")
    starts = np.empty_like(ends)
    starts[:1], starts[1:] = 0, ends[:-1]
    if chosen is not None:
        starts, ends, labels = starts[chosen], ends[chosen], None if labels is None else labels[chosen]
    source = FileSource(root, index.arrays["names"], starts, ends)
    if labels is not None and (labels >= 0).any():
        source.labels, source.classes = labels, classes
    return source


def _buffer(text: bytes | bytearray) -> np.ndarray:
    return np.frombuffer(text, np.uint8) if text else np.zeros(0, np.uint8)


def _ends(lengths: Sequence[int]) -> np.ndarray:
    return np.cumsum(np.asarray(lengths, np.int64), dtype=np.int64)
