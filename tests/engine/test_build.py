"""What of the images is trained on, and what the k-NN during training is of."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dino_fast.engine.build import open_data
from dino_fast.engine.config import Config


def _images(root: Path, **folders: int) -> Path:
    for folder, count in folders.items():
        place = root / folder.replace("__", "/")
        place.mkdir(parents=True)
        for i in range(count):
            Image.fromarray(np.full((8, 8, 3), i, np.uint8)).save(place / f"{i}.png")
    return root


def _config(data: Path, **given: object) -> Config:
    return Config(data=str(data), **given)  # type: ignore[arg-type]


def test_all_images_are_trained_on(tmp_path: Path) -> None:
    data = open_data(_config(_images(tmp_path, a=12, b=8)))
    assert data.bank is not None and data.test is None
    assert (len(data.train), len(data.bank)) == (20, 20)
    assert "leaves each of 20 out" in data.note and "--hold-out" in data.note


def test_a_share_is_held_out_if_asked(tmp_path: Path) -> None:
    data = open_data(_config(_images(tmp_path, a=12, b=8), hold_out=0.25, knn_images=9))
    assert data.bank is not None and data.test is not None
    assert (len(data.train), len(data.bank), len(data.test)) == (15, 9, 5)
    assert data.note == "5 of 20 images are held out for the k-NN and not trained on"


def test_a_part_that_came_with_them_is_held_out(tmp_path: Path) -> None:
    data = open_data(_config(_images(tmp_path, train__a=6, train__b=6, val__a=2, val__b=2), hold_out=0.25))
    assert data.test is not None
    assert (len(data.train), len(data.test), data.note) == (12, 4, "")


@pytest.mark.parametrize(
    ("folders", "reason"),
    [
        ({"photos": 9}, r"of one class \(photos\)"),
        ({f"image{i}": 1 for i in range(5)}, "each label is of one image only"),
        ({"train__a": 3, "train__b": 3, "val__images": 4}, "the held-out images have no labels"),
        ({"train__a": 3, "train__b": 3, "val__c": 4, "val__d": 4}, "no held-out image is of a class"),
    ],
)
def test_labels_that_are_no_classes_give_no_accuracy(tmp_path: Path, folders: dict[str, int], reason: str) -> None:
    import re

    data = open_data(_config(_images(tmp_path, **folders)))
    assert data.bank is None and re.search(f"no k-NN evaluation: .*{reason}", data.note)
