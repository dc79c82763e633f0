"""Text files that list images: a path a line, or a table with a column of paths and one of labels."""

from __future__ import annotations

import contextlib
import csv
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np

from dino_fast.data.formats.folder import FileSource
from dino_fast.data.index_cache import Index, cached, watch
from dino_fast.data.labels import LABEL_COLUMNS, class_numbers
from dino_fast.data.source import EXTENSIONS
from dino_fast.errors import UserError

_CHECKED = 1000  # entries that are looked for when a list is opened; a missing later one is an ImageError
_PATH_COLUMNS = ("path", "file", "filename", "file_name", "filepath", "file_path", "image", "img", "image_path", "name")
_LABEL_COLUMNS = (*LABEL_COLUMNS, "class", "target", "category", "class_name", "label_name", "species")
_QUOTES = ('"', "'")
Columns = tuple[list[str], list[str]]  # paths, and labels ("" where one has none), or no labels at all
Way = Callable[[list[str]], Columns]  # to read lines


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
        if not os.path.isfile(source.path(i)):
            raise UserError(
                f"{path}: entry {i + 1}, {os.path.relpath(source.path(i), path.parent)!r}, is no file (paths are "
                "relative to the list's folder)"
            )
    return source


def _read_list(path: Path) -> Index:
    lines = [line for text in _text(path).split("\n") if (line := text.strip()) and line[0] != "#"]
    names, labels = _columns(path, lines)
    if not names:
        raise UserError(
            f"{path} lists no images; write one path a line, optionally with a tab, a comma or a space and a label"
        )
    names = [os.path.expanduser(name) if name[0] == "~" else name for name in names]
    encoded = "".join(names).encode("utf-8", "surrogateescape")
    if len(encoded) == sum(map(len, names)):  # in ASCII
        ends = np.cumsum(np.fromiter(map(len, names), np.int64, len(names)))
    else:
        ends = np.cumsum([len(name.encode("utf-8", "surrogateescape")) for name in names], dtype=np.int64)
    arrays = {"names": np.frombuffer(encoded, np.uint8), "starts": np.concatenate([[0], ends[:-1]]), "ends": ends}
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


def _columns(path: Path, lines: list[str]) -> Columns:
    """Paths and labels, by the first way to read the lines under which they name files.

    The first line must name one, or the second where the first is a header.
    """
    tab = any("\t" in line for line in lines[:_CHECKED])
    plain = _tabbed if tab else _whole
    tables: list[Way] = [lambda lines: _table(path, lines, "\t")] * tab
    tables += [lambda lines: _table(path, lines, ",")]
    for ways, first in (([plain, *tables, _spaced], lines[:1]), (tables, lines[:2])):
        for way in ways:
            with contextlib.suppress(csv.Error):  # no table
                if any(_is_file(path, name) for name in way(first)[0]):
                    return way(lines)
    return plain(lines)  # whose first entry is then named as missing


def _is_file(path: Path, name: str) -> bool:
    return bool(name) and os.path.isfile(path.parent / os.path.expanduser(name))


def _unquoted(text: str) -> str:
    return text[1:-1] if text[:1] in _QUOTES and len(text) > 2 and text[0] == text[-1] else text


def _whole(lines: list[str]) -> Columns:
    return [_unquoted(line) if line[0] in _QUOTES else line for line in lines], []


def _tabbed(lines: list[str]) -> Columns:
    rows = [line.partition("\t") for line in lines]
    names = [row[0].rstrip() for row in rows]
    return [_unquoted(n) if n[0] in _QUOTES else n for n in names], [_unquoted(row[2].lstrip()) for row in rows]


def _spaced(lines: list[str]) -> Columns:
    """The label is what follows the last space; a quoted path may be followed by nothing."""
    rows = [line.rpartition(" ") if line[-1] not in _QUOTES else (line, "", "") for line in lines]
    return [_unquoted(row[0].rstrip() or row[2]) for row in rows], [row[2] if row[0] else "" for row in rows]


def _table(path: Path, lines: list[str], delimiter: str) -> Columns:
    """The columns of paths and labels: by the header's names, else the first whose value is a file and its neighbor."""
    rows = [[cell.strip() for cell in row] for row in csv.reader(lines, delimiter=delimiter, skipinitialspace=True)]
    if not rows:
        return [], []
    header = [cell.lower() for cell in rows[0]]
    column = next((header.index(name) for name in _PATH_COLUMNS if name in header), None)
    label = next((header.index(name) for name in _LABEL_COLUMNS if name in header), None)
    begin = 1
    if column is None:
        places = ((number, i) for number, row in enumerate(rows[:2]) for i in range(len(row)))
        begin, column = next((place for place in places if _is_file(path, rows[place[0]][place[1]])), (0, 0))
        if os.path.splitext(header[column])[1] in EXTENSIONS:
            begin = 0  # no header, but a file that is missing
        if label is None and len(header) > 1:
            label = column + 1 if column + 1 < len(header) else column - 1
    rows = [row for row in rows[begin:] if column < len(row) and row[column]]
    labels = [] if label is None else [row[label] if label < len(row) else "" for row in rows]
    return [row[column] for row in rows], labels
