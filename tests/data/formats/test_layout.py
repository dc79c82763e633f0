"""What the folders of a data set mean: on disk, in a tar and in a zip file alike."""

from __future__ import annotations

import os
import warnings
import zipfile
from pathlib import Path

import pytest

from dino_fast.data import Source, SourceNote, open_source

from ..example_files import pack, png


def write(root: Path, kind: str, names: list[str]) -> Path:
    """Images of these names, image i with the value i, in a folder, a tar or a zip file."""
    if kind == "tar":
        return pack(root / "x.tar", {name: png(i) for i, name in enumerate(names)})
    if kind == "zip":
        with zipfile.ZipFile(root / "x.zip", "w") as file:
            for i, name in enumerate(names):
                file.writestr(name, png(i))
        return root / "x.zip"
    for i, name in enumerate(names):
        (root / "x" / name).parent.mkdir(parents=True, exist_ok=True)
        (root / "x" / name).write_bytes(png(i))
    return root / "x"


def seen(source: Source | None) -> dict[int, str | None]:
    """The class of each image, by its value."""
    if source is None:
        return {}
    found = {}
    for i in range(len(source)):
        label = source.label(i)
        found[int(source.read(i).unique().item())] = None if label is None else (source.classes or {})[label]
    return found


CASES: dict[str, tuple[list[str], dict, dict, str]] = {
    "capitals": (["Train/cat/0.png", "Train/dog/1.png", "VAL/dog/2.png"], {0: "cat", 1: "dog"}, {2: "dog"}, ""),
    "valid": (["train/cat/0.png", "train/dog/1.png", "valid/cat/2.png"], {0: "cat", 1: "dog"}, {2: "cat"}, ""),
    "validation": (["training/a/0.png", "training/b/1.png", "validation/b/2.png"], {0: "a", 1: "b"}, {2: "b"}, ""),
    "years": (["train2017/0.png", "val2017/1.png", "unlabeled2017/2.png"], {0: None, 2: None}, {1: None}, "without"),
    "two held out": (["train/a/0.png", "train/b/1.png", "val/b/2.png", "test/3.png", "read.png"],
                     {0: "a", 1: "b"}, {2: "b"}, r"left out: beside the folders \(1 images\), test/ \(1 images\)"),
    "flat val": (["train/a/0.png", "train/b/1.png", "val/ILSVRC2012_val_00000001.png"],
                 {0: "a", 1: "b"}, {2: None}, ""),
    "unlabeled": (["train/a/0.png", "train/b/1.png", "unlabeled/2.png"], {0: "a", 1: "b", 2: None}, {},
                  "unlabeled/ is trained on without labels"),
    "masks": (["images/0.png", "images/1.png", "masks/0.png"], {0: None, 1: None}, {},
              r"those of images/; left out: masks/ \(1 images\)"),
    "masks of classes": (["Images/a/0.png", "Images/b/1.png", "Annotations/a/0.png"], {0: "a", 1: "b"}, {},
                         "left out: Annotations/"),
    "masks of parts": (["images/train/0.png", "images/val/1.png", "gtFine/train/2.png"], {0: None}, {1: None},
                       "left out: gtFine/"),
    "parts with masks": (["train/images/0.png", "val/images/1.png", "train/masks/2.png", "val/masks/3.png"],
                         {0: None}, {1: None}, "left out: train/masks/"),
    "only parts": (["val/0.png", "test/1.png"], {0: None, 1: None}, {}, ""),
    "a class train": (["train/0.png", "car/1.png"], {0: "train", 1: "car"}, {}, ""),
    "wrapped": (["a/b/cat/0.png", "a/b/dog/1.png"], {0: "cat", 1: "dog"}, {}, ""),
    "wrapped parts": (["set/train/cat/0.png", "set/train/dog/1.png", "set/val/dog/2.png"],
                      {0: "cat", 1: "dog"}, {2: "dog"}, ""),
    "images a class": (["train/n1/images/0.png", "train/n2/images/1.png", "val/images/2.png"],
                       {0: "n1", 1: "n2"}, {2: None}, ""),
    "classes": (["cat/0.png", "dog/deep/1.png"], {0: "cat", 1: "dog"}, {}, ""),
    "flat": (["0.png", "deep/1.png"], {0: None, 1: None}, {}, ""),
}  # fmt: skip


@pytest.mark.parametrize("kind", ["folder", "tar", "zip"])
@pytest.mark.parametrize("case", CASES)
def test_folders_mean_the_same_everywhere(tmp_path: Path, kind: str, case: str) -> None:
    names, train, test, note = CASES[case]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        source = open_source(write(tmp_path, kind, names))
    assert seen(source) == train and seen(source.test) == test
    import re

    notes = [str(warning.message) for warning in caught if warning.category is SourceNote]
    assert any(re.search(note, text) for text in notes) if note else not notes


@pytest.mark.parametrize("kind", ["folder", "tar", "zip"])
def test_what_is_passed_over_is_counted(tmp_path: Path, kind: str) -> None:
    names = ["0.png", "1.jfif", "2.HEIC", "3.heic", "4.tga", "5.dcm", "0.mask.png", "0.depth.png", "1.2020.png"]
    expected = r"left out: 1 \.dcm \(not read\), 1 \.depth\.png \(annotations\), 1 \.mask\.png \(annotations\)$"
    with pytest.warns(SourceNote, match=expected):
        source = open_source(write(tmp_path, kind, names))
    assert sorted(seen(source)) == [0, 1, 2, 3, 4, 8]


@pytest.mark.parametrize("file", ["val/val_annotations.txt", "LOC_val_solution.csv", "val/val.txt"])
def test_labels_of_a_flat_held_out_part(tmp_path: Path, file: str) -> None:
    """Tiny ImageNet as it is unpacked, ImageNet as Kaggle and Caffe label it."""
    names = ["train/n01/images/0.png", "train/n02/images/1.png", "val/images/val_0.png", "val/images/val_1.png"]
    root = write(tmp_path, "folder", [*names, "test/images/test_0.png"])
    text = {
        "val/val_annotations.txt": "val_0.png\tn02\t0\t32\t44\t62\nval_1.png\tn01\t0\t0\t1\t1\n",
        "LOC_val_solution.csv": "ImageId,PredictionString\nval_0,n02 85 1 499 272\nval_1,n01 1 2 3 4 n01 5 6 7 8\n",
        "val/val.txt": "val_0.png 1\nval_1.png 0\n",
    }[file]
    (root / file).write_text(text)
    with pytest.warns(SourceNote, match=r"those of train/, val/; left out: test/ \(1 images\)"):
        source = open_source(root)
    assert seen(source) == {0: "n01", 1: "n02"} and seen(source.test) == {2: "n02", 3: "n01"}


def test_changed_labels_of_a_held_out_part_are_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from dino_fast.data import index_cache

    monkeypatch.setattr(index_cache, "KEEP_AFTER", 0.0)
    monkeypatch.setenv("DINO_FAST_CACHE", str(tmp_path / "cache"))
    root = write(tmp_path, "folder", ["train/a/0.png", "train/b/1.png", "val/2.png"])
    file = root / "val" / "val_annotations.txt"
    for label in ("a", "b"):
        file.write_text(f"2.png\t{label}\n")
        for path in (root, *root.rglob("*")):
            os.utime(path, (1e9, 1e9 + ord(label) * (path == file)))
        assert seen(open_source(root).test) == {2: label}
    assert len(list((tmp_path / "cache").iterdir())) == 1
