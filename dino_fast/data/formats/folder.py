"""Image files: a folder, a text file that lists them, a pattern."""

from __future__ import annotations

import io
import os
from array import array
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from dino_fast.data.decode import ImageError
from dino_fast.data.index_cache import Index, cached, stamp, watch
from dino_fast.data.source import EXTENSIONS, Source, printable, read_file
from dino_fast.errors import UserError

_CHECKED = 1000  # entries of a file list that are looked for when it is opened; a missing later one is an ImageError


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
        return self.root / os.fsdecode(self._names[self._starts[index] : self._ends[index]].tobytes())

    def name(self, index: int) -> str:
        return printable(str(self.path(index)))

    def data(self, index: int) -> bytes:
        try:
            return read_file(self.path(index))
        except OSError as error:
            raise ImageError(f"{self.name(index)}: {error.strerror or error}") from error


def open_images(root: Path) -> FileSource | None:
    """The images below a folder, or None where there are none.

    Where every image lies in a sub-folder, the first level of sub-folders are the classes.
    """
    index = cached("folder", [root], lambda: scan(root, EXTENSIONS))
    source = _files(root, index)
    source.notes = index.facts["notes"]
    return source if len(source) else None


def open_paths(paths: Sequence[str | Path]) -> FileSource:
    """These image files, in this order, without labels."""
    names = [os.fsencode(os.path.abspath(path)) for path in paths]
    return _files(Path("/"), Index({"names": _buffer(b"".join(names)), "ends": _ends([len(name) for name in names])}))


def open_list(path: Path) -> FileSource:
    """The images that a text file lists: a path a line, then optionally a tab and a whole number, the label."""
    index = cached("list", [path], lambda: _read_list(path))
    source = FileSource(path.parent, *(index.arrays[name] for name in ("names", "starts", "ends")))
    source.labels = index.arrays.get("labels")
    for i in range(min(len(source), _CHECKED)):
        if not source.path(i).is_file():
            raise UserError(
                f"{path}: entry {i + 1}, {os.path.relpath(source.path(i), path.parent)!r}, is no file (paths are "
                "relative to the list's folder)"
            )
    return source


def scan(root: Path, extensions: set[str]) -> Index:
    """Walks a folder: `names` one after the other, their `ends`, `labels` unless an image lies in `root` itself."""
    names, lengths, labels = bytearray(), array("q"), array("q")
    watched, stamps, notes = bytearray(), array("q"), []
    classes: list[str] = []
    top, flat = None, False
    for folder in walk(root, extensions):
        if folder.reason:
            notes.append(f"{folder.path}: {folder.reason}; its images are left out")
            continue
        watched += b"\0" * bool(watched) + os.fsencode(folder.path)
        stamps.extend(folder.stamp)
        if not folder.files:
            continue
        inside = folder.inside + b"/" if folder.inside else b""
        flat = flat or not inside
        if inside and inside.split(b"/", 1)[0] != top:
            top = inside.split(b"/", 1)[0]
            classes.append(printable(os.fsdecode(top)))
        names += b"".join(inside + name for name in folder.files)
        lengths.extend(len(inside) + len(name) for name in folder.files)
        labels.extend([len(classes) - 1] * len(folder.files))
    arrays = {"names": _buffer(names), "ends": _ends(lengths)}
    if classes and not flat:
        arrays["labels"] = np.frombuffer(labels, np.int64)
    facts = {"classes": None if flat or not classes else classes, "notes": notes}
    return Index(arrays, facts, bytes(watched), np.frombuffer(stamps, np.int64).reshape(-1, 2))


class Folder(NamedTuple):
    """One folder of a walk. `reason` says why it cannot be read, if it cannot."""

    path: str
    inside: bytes  # the path from the root, empty for the root itself
    files: list[bytes]
    stamp: tuple[int, int]
    reason: str = ""


def walk(root: Path, extensions: set[str]) -> Iterator[Folder]:
    """Folders and their files in a fixed order; hidden ones left out, links followed but in no circle."""
    known = {extension.encode() for extension in extensions}
    base, pending, seen = os.fsencode(root.absolute()), [b""], set()
    while pending:
        inside = pending.pop()
        path = os.path.join(base, inside) if inside else base
        files, folders = [], []
        try:
            stat = os.stat(path)  # before the names, so that a change while they are read is seen
            if (stat.st_dev, stat.st_ino) in seen:
                continue
            seen.add((stat.st_dev, stat.st_ino))
            with os.scandir(path) as entries:
                for entry in entries:
                    if entry.name.startswith(b"."):
                        continue
                    if entry.is_dir():
                        folders.append(entry.name)
                    elif os.path.splitext(entry.name)[1].lower() in known:
                        files.append(entry.name)
        except OSError as error:
            yield Folder(os.fsdecode(path), inside, [], (0, 0), error.strerror or str(error))
            continue
        yield Folder(os.fsdecode(path), inside, sorted(files), stamp(stat))
        pending.extend(os.path.join(inside, name) for name in sorted(folders, reverse=True))


def _files(root: Path, index: Index) -> FileSource:
    ends = index.arrays["ends"]
    starts = np.empty_like(ends)
    starts[:1], starts[1:] = 0, ends[:-1]
    source = FileSource(root, index.arrays["names"], starts, ends)
    source.labels, source.classes = index.arrays.get("labels"), index.facts.get("classes")
    return source


def _read_list(path: Path) -> Index:
    text = path.read_bytes()
    try:
        if b"\0" in text:
            raise ValueError
        text.decode("utf-8")
    except ValueError:
        raise UserError(
            f"{path} is not a list of images: it is no text. Accepted: a text file with one path a line, "
            "a .parquet or .tar file, a folder"
        ) from None
    starts, ends, labels, labelled = array("q"), array("q"), array("q"), False
    at = 0
    for line in io.BytesIO(text):
        row, start = line.rstrip(), at
        at += len(line)
        if not row:
            continue
        name, _, label = row.partition(b"\t")
        starts.append(start)
        ends.append(start + len(name))
        labelled = labelled or bool(label)
        labels.append(_label(path, label) if label else -1)
    if not starts:
        raise UserError(
            f"{path} lists no images; write one path a line, optionally a tab and a whole number as its label"
        )
    arrays = {
        "names": _buffer(text),
        "starts": np.frombuffer(starts, np.int64),
        "ends": np.frombuffer(ends, np.int64),
    }
    return Index(arrays | ({"labels": np.frombuffer(labels, np.int64)} if labelled else {}), {}, **watch([path]))


def _label(path: Path, text: bytes) -> int:
    try:
        return int(text)
    except ValueError:
        raise UserError(f"{path}: a label after a tab must be a whole number; found {text.decode()!r}") from None


def _buffer(text: bytes | bytearray) -> np.ndarray:
    return np.frombuffer(text, np.uint8) if text else np.zeros(0, np.uint8)


def _ends(lengths: Sequence[int]) -> np.ndarray:
    return np.cumsum(np.asarray(lengths, np.int64), dtype=np.int64)
