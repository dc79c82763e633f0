"""Text files that list images."""

from __future__ import annotations

from pathlib import Path

import pytest

from dino_fast.data import open_source
from dino_fast.errors import UserError

from ..example_files import png


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Images 0 to 3; the home folder holds another one."""
    for name, value in (("a.png", 0), ("with space.png", 1), ("in/b,c.png", 2), ("grüße.png", 3), ("home/h.png", 4)):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(png(value))
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    return tmp_path


def rows(path: Path) -> list[tuple[int, str | int | None]]:
    source = open_source(path)
    labels = [source.label(i) for i in range(len(source))]
    named = [label if label is None or source.classes is None else source.classes[label] for label in labels]
    return [(int(source.read(i).unique().item()), named[i]) for i in range(len(source))]


CASES: dict[str, tuple[str, list]] = {
    "plain": ("a.png\nwith space.png\n\n  in/b,c.png\n", [(0, None), (1, None), (2, None)]),
    "comments": ("# mine\na.png\n  # more\ngrüße.png", [(0, None), (3, None)]),
    "quotes": ('"a.png"\n\'with space.png\'\n', [(0, None), (1, None)]),
    "windows": ("\ufeffa.png\r\nwith space.png\r\n", [(0, None), (1, None)]),
    "home": ("~/h.png\na.png\n", [(4, None), (0, None)]),
    "tabs": ("with space.png\t3\na.png\ngrüße.png\t0\n", [(1, 3), (0, None), (3, 0)]),
    "tabs and words": ("with space.png\tdog\na.png\tcat\n", [(1, "dog"), (0, "cat")]),
    "spaces": ("a.png 5\nwith space.png 6\n", [(0, 5), (1, 6)]),
    "spaces and quotes": ('"with space.png" cat\n"a.png"\n~/h.png dog\n', [(1, "cat"), (0, None), (4, "dog")]),
    "csv": ('a.png,cat\n"in/b,c.png",dog\n', [(0, "cat"), (2, "dog")]),
    "csv with header": ('id,label,path\n7,cat,a.png\n8,dog,"in/b,c.png"\n', [(0, "cat"), (2, "dog")]),
    "csv of other names": ('picture,kind\na.png,1\nwith space.png,0\n', [(0, 1), (1, 0)]),
    "csv, label first": ("cat,a.png\ndog,with space.png\n", [(0, "cat"), (1, "dog")]),
    "csv of paths": ("filename\na.png\nwith space.png\n", [(0, None), (1, None)]),
    "header and tabs": ("path\tlabel\na.png\tcat\nwith space.png\tdog\n", [(0, "cat"), (1, "dog")]),
    "large numbers": ("a.png\t9000000000000\nwith space.png\t4\n", [(0, "9000000000000"), (1, "4")]),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_lists_as_people_write_them(folder: Path, case: str) -> None:
    text, expected = CASES[case]
    path = folder / ("list.csv" if "csv" in case else "list.txt")
    path.write_bytes(text.encode())
    assert rows(path) == expected


def test_lists_in_utf_16_and_other_bytes(folder: Path) -> None:
    (folder / "list.txt").write_bytes("a.png\r\ngrüße.png\r\n".encode("utf-16"))
    assert rows(folder / "list.txt") == [(0, None), (3, None)]
    with open(bytes(folder) + b"/caf\xe9.png", "wb") as file:
        file.write(png(9))
    (folder / "list.txt").write_bytes(b"a.png\ncaf\xe9.png\n")
    assert rows(folder / "list.txt") == [(0, None), (9, None)]


def test_what_is_no_list_is_named(folder: Path) -> None:
    path = folder / "list.txt"
    for text, message in (
        ("", "lists no images"),
        ("# only\n\n", "lists no images"),
        ("gone.png\n", "entry 1, 'gone.png', is no file"),
        ("a.png\ngone.png 3\n", "entry 2, 'gone.png 3', is no file"),
        ("path,label\ngone.png,3\n", "entry 1, 'path,label', is no file"),
        ('{"a": "' + "x" * 200_000 + '", "b": 1}', "entry 1, .* is no file"),
    ):
        path.write_text(text)
        with pytest.raises(UserError, match=message):
            open_source(path)


def test_an_empty_column_of_labels_is_none(folder: Path) -> None:
    (folder / "list.csv").write_text("path,label\na.png,\nwith space.png,\n")
    assert rows(folder / "list.csv") == [(0, None), (1, None)]
