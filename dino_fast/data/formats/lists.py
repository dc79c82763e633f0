"""Text files that list images: a path a line, or a table with a column of paths and one of labels."""

from __future__ import annotations

import csv
import os
from array import array
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from dino_fast.data.formats.folder import FileSource
from dino_fast.data.index_cache import Index, cached, watch
from dino_fast.data.labels import LABEL_COLUMNS, class_numbers
from dino_fast.errors import UserError

_CHECKED = 1000  # entries that are looked for when a list is opened; a missing later one is an ImageError
_PATH_COLUMNS = ("path", "file", "filename", "file_name", "filepath", "file_path", "image", "img", "image_path", "name")
_LABEL_COLUMNS = (*LABEL_COLUMNS, "class", "target", "category", "class_name", "label_name", "species")
Row = tuple[str, str | None]  # path and label


def open_list(path: Path) -> FileSource:
    """The images that a text file lists, relative to its folder.

    A line is a path, or a path and a label with a tab, a comma or a space between; quotes around a path, a byte-order
    mark, `~`, empty lines and lines that begin with # are understood. A table may have a header. Labels are whole
    numbers or text (see labels.py). Raises UserError where one of the first 1000 entries is no file.
    """
    index = cached("list", [path], lambda: _read_list(path))
    source = FileSource(path.parent, *(index.arrays[name] for name in ("names", "starts", "ends")))
    source.labels, source.classes = index.arrays.get("labels"), index.facts["classes"]
    source.unused_labels = index.facts["unused"]
    for i in range(min(len(source), _CHECKED)):
        if not source.path(i).is_file():
            raise UserError(
                f"{path}: entry {i + 1}, {os.path.relpath(source.path(i), path.parent)!r}, is no file (paths are "
                "relative to the list's folder)"
            )
    return source


def _read_list(path: Path) -> Index:
    lines = [line for line in _text(path).split("\n") if line.strip() and not line.lstrip().startswith("#")]
    names, labels = bytearray(), list[str | None]()
    lengths = array("q")
    for name, label in _rows(path, lines):
        encoded = os.fsencode(os.path.expanduser(name) if name.startswith("~") else name)
        names += encoded
        lengths.append(len(encoded))
        labels.append(label)
    if not lengths:
        raise UserError(
            f"{path} lists no images; write one path a line, optionally with a tab, a comma or a space and a label"
        )
    ends = np.cumsum(np.frombuffer(lengths, np.int64))
    arrays = {"names": np.frombuffer(names, np.uint8), "starts": ends - lengths, "ends": ends}
    numbers, classes, unused = class_numbers(labels, where=f"the labels in {path}")
    if numbers is not None:
        arrays["labels"] = numbers
    return Index(arrays, {"classes": classes, "unused": unused}, **watch([path]))


def _text(path: Path) -> str:
    data = path.read_bytes()
    if data.startswith((b"\xff\xfe", b"\xfe\xff")):
        return data.decode("utf-16", "replace")
    if b"\0" in data:
        raise UserError(
            f"{path} is not a list of images: it is no text. Accepted: a text file with one path a line, "
            "a .parquet, .tar, .zip or .npy file, a folder"
        )
    return os.fsdecode(data.removeprefix(b"\xef\xbb\xbf"))


def _rows(path: Path, lines: list[str]) -> Iterator[Row]:
    """Path and label of each line, by the first way to read the lines under which one of the first two names a file."""
    comma = lines[:1] and ("," in lines[0] or path.suffix.lower() == ".csv")
    tab = any("\t" in line for line in lines[:_CHECKED])
    ways: list[Callable[[list[str]], Iterator[Row]]] = [_tabbed if tab else _whole]
    ways += [lambda lines: _table(path, lines, "\t")] * tab
    ways += [lambda lines: _table(path, lines, ",")] * bool(comma)
    ways += [_spaced]
    for way in ways:
        if any(_is_file(path, name) for name, _ in way(lines[:2])):
            return way(lines)
    return ways[0](lines)  # whose first entry is then named as missing


def _is_file(path: Path, name: str) -> bool:
    return bool(name) and (path.parent / os.path.expanduser(name)).is_file()


def _unquoted(text: str) -> str:
    text = text.strip()
    return text[1:-1] if len(text) > 1 and text[0] == text[-1] and text[0] in "\"'" else text


def _whole(lines: list[str]) -> Iterator[Row]:
    for line in lines:
        yield _unquoted(line), None


def _tabbed(lines: list[str]) -> Iterator[Row]:
    for line in lines:
        name, _, label = line.partition("\t")
        yield _unquoted(name), _unquoted(label) or None


def _spaced(lines: list[str]) -> Iterator[Row]:
    """The label is what follows the last space; a quoted path may be followed by nothing."""
    for line in lines:
        name, _, label = line.strip().rpartition(" ")
        if not name or label[-1:] in "\"'":
            yield _unquoted(line), None
        else:
            yield _unquoted(name), _unquoted(label)


def _table(path: Path, lines: list[str], delimiter: str) -> Iterator[Row]:
    """The columns of paths and labels: by the header's names, else the first whose value is a file and its neighbor."""
    first = next(csv.reader(lines[:1], delimiter=delimiter, skipinitialspace=True), [])
    header = [cell.strip().lower() for cell in first]
    column = next((header.index(name) for name in _PATH_COLUMNS if name in header), None)
    label = next((header.index(name) for name in _LABEL_COLUMNS if name in header), None)
    if column is None:
        rows = csv.reader(lines[:2], delimiter=delimiter, skipinitialspace=True)
        found = ((number, i) for number, row in enumerate(rows) for i, cell in enumerate(row) if _is_file(path, cell))
        number, column = next(found, (0, 0))
        if label is None and len(first) > 1:
            label = column + 1 if column + 1 < len(first) else column - 1
        lines = lines[number:]
    else:
        lines = lines[1:]
    for row in csv.reader(lines, delimiter=delimiter, skipinitialspace=True):
        if column < len(row):
            yield row[column].strip(), row[label].strip() if label is not None and label < len(row) else None
