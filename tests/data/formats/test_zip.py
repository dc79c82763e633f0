"""Zip files as sources."""

from __future__ import annotations

import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dino_fast.augment import MultiCrop
from dino_fast.data import ImageError, SourceNote, open_source, train_loader
from dino_fast.errors import UserError

from ..example_files import png, save


def write(path: Path, names: list[str], method: int = zipfile.ZIP_DEFLATED) -> Path:
    with zipfile.ZipFile(path, "w", method) as file:
        for i, name in enumerate(names):
            file.writestr(name, png(i))
    return path


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_images_are_read_at_any_place(tmp_path: Path, method: int) -> None:
    write(
        tmp_path / "a.zip", ["cat/0.png", "dog/grüße.png", "dog/._1.png", "__MACOSX/dog/._1.png", "notes.txt"], method
    )
    write(tmp_path / "b.zip", ["cat/0.png", "cat/1.png"], method)
    source = open_source(tmp_path)
    assert [source.read(i).unique().tolist() for i in (3, 0, 2, 1)] == [[1], [0], [0], [1]]
    assert source.classes == ["cat", "dog"] and source.labels.tolist() == [0, 1, 0, 0]
    assert source.name(1) == f"{tmp_path}/a.zip, dog/grüße.png"
    assert len(open_source(tmp_path / "b.zip")) == 2 and len(open_source(f"{tmp_path}/*.zip")) == 4
    loader = train_loader(source, MultiCrop(8, 4, 1), batch_size=4, seed=0, epochs=1, workers=2)
    assert sorted(torch.cat([batch.index for batch in loader]).tolist()) == [0, 1, 2, 3]


def test_files_behind_other_data_and_with_extra_fields(tmp_path: Path) -> None:
    """A self-extracting archive, and local headers that are longer than those of the directory."""
    whole = write(tmp_path / "x.zip", ["0.png", "1.png"]).read_bytes()
    (tmp_path / "y.zip").write_bytes(b"#!/bin/sh\n" * 100 + whole)
    assert open_source(tmp_path / "y.zip").read(1).unique().tolist() == [1]
    with zipfile.ZipFile(tmp_path / "z.zip", "w") as file, file.open("0.png", "w", force_zip64=True) as member:
        member.write(png(7))
    assert open_source(tmp_path / "z.zip").read(0).unique().tolist() == [7]


def test_damage_is_named(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8)
    data = save(tmp_path / "noise.png", Image.fromarray(noise)).read_bytes()
    with zipfile.ZipFile(tmp_path / "x.zip", "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("0.png", data)
    whole = bytearray((tmp_path / "x.zip").read_bytes())
    for at, reason in ((200, "damaged"), (0, "no header")):
        broken = bytearray(whole)
        broken[at : at + 4] = bytes(x ^ 0xFF for x in broken[at : at + 4])
        (tmp_path / "x.zip").write_bytes(broken)
        with pytest.raises(ImageError, match=rf"x\.zip, 0\.png: the zip file is damaged.*{reason if at == 0 else ''}"):
            open_source(tmp_path / "x.zip").read(0)
    for text, message in ((b"no zip", "not a readable zip file"), (whole[:100], "not a readable zip file"),
                          (b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull")):  # fmt: skip
        (tmp_path / "x.zip").write_bytes(text)
        with pytest.raises(UserError, match=rf"x\.zip: .*{message}"):
            open_source(tmp_path / "x.zip")
    with pytest.raises(UserError, match="no images in the zip file"):
        open_source(write(tmp_path / "x.zip", ["a.txt"]))


def test_members_that_cannot_be_read_at_their_place_are_counted(tmp_path: Path) -> None:
    path = write(tmp_path / "x.zip", ["0.png", "1.png"])
    with zipfile.ZipFile(path, "a", zipfile.ZIP_BZIP2) as file:
        file.writestr("2.png", png(2))
    data = bytearray(path.read_bytes())
    second = data.index(b"PK\1\2", data.index(b"PK\1\2") + 1)
    data[second + 8] |= 1  # the flag of an encrypted member
    path.write_bytes(data)
    with pytest.warns(SourceNote, match=r"left out: 1 compressed by zip's method 12, .*, 1 encrypted"):
        source = open_source(path)
    assert len(source) == 1
