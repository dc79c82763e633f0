"""Folders and lists of image files."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest
import torch

from dino_fast.data import ImageError, open_source
from dino_fast.data.formats import folder
from dino_fast.errors import UserError

from ..example_files import picture, png, save


def test_folder_with_classes(tmp_path: Path) -> None:
    for name in ("b/2.png", "b/deep/3.JPG", "a/1.jpeg", "a/.hidden.png", ".git/x.png", "a/notes.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        picture().save(tmp_path / name, "PNG")
    source = open_source(tmp_path)
    assert [Path(source.name(i)).name for i in range(len(source))] == ["1.jpeg", "2.png", "3.JPG"]
    assert source.classes == ["a", "b"] and [source.label(i) for i in range(3)] == [0, 1, 1]
    assert source.read(2).shape == (3, 12, 20) and source.read(2).dtype == torch.uint8


def test_flat_folder_has_no_labels_and_link_circles_end(tmp_path: Path) -> None:
    save(tmp_path / "x.png")
    save(tmp_path / "sub" / "y.png")
    os.symlink(tmp_path, tmp_path / "sub" / "again")
    source = open_source(str(tmp_path))
    assert len(source) == 2 and source.classes is None and source.label(0) is None


def test_file_list(tmp_path: Path) -> None:
    save(tmp_path / "with space.png")
    save(tmp_path / "in" / "b.png")
    listing = tmp_path / "list.txt"
    listing.write_text("with space.png\t3\n\nin/b.png\n")
    source = open_source(listing)
    assert len(source) == 2 and source.label(0) == 3 and source.label(1) is None and source.read(1).shape[0] == 3
    for text, message in [("", "lists no images"), ("nothing.png\n", "entry 1, 'nothing.png', is no file"),
                          ("in/b.png\tcat\n", "must be a whole number")]:  # fmt: skip
        listing.write_text(text)
        with pytest.raises(UserError, match=message):
            open_source(listing)


def test_a_file_without_permission_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = open_source(save(tmp_path / "mine.png").parent)

    def refuse(path: Path) -> bytes:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))

    monkeypatch.setattr(folder, "read_file", refuse)  # root may read anything, so no mode would do
    with pytest.raises(ImageError, match=r"mine\.png: Permission denied"):
        source.read(0)


def test_names_that_cannot_be_printed_are_escaped(tmp_path: Path) -> None:
    """One broken image of such a name is a line in the log, and ends no run."""
    folder = os.fsencode(tmp_path) + b"/caf\xe9\n"
    os.mkdir(folder)
    for name in (b"1.png", b"\xe9\x1b[2J\n.png"):
        with open(os.path.join(folder, name), "wb") as file:
            file.write(png(7) if name == b"1.png" else b"no image")
    source = open_source(tmp_path)
    assert source.classes == ["caf\\xe9\\n"] and source.read(0).unique().tolist() == [7]
    assert source.name(1) == f"{tmp_path}/caf\\xe9\\n/\\xe9\\x1b[2J\\n.png"
    with pytest.raises(ImageError) as caught:
        source.read(1)
    assert str(caught.value).startswith(source.name(1)) and str(caught.value).isprintable()
    os.remove(os.path.join(folder, b"1.png"))
    with pytest.raises(ImageError) as caught:
        source.read(0)
    assert str(caught.value) == f"{tmp_path}/caf\\xe9\\n/1.png: No such file or directory"
    assert str(caught.value).encode() and source.name(0).isprintable()
