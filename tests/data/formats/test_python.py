"""Arrays, lists and data sets of PyTorch given from Python."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import ConcatDataset, DataLoader, Dataset, IterableDataset, Subset

from dino_fast.augment import MultiCrop
from dino_fast.data import eval_batches, open_source, split, train_loader
from dino_fast.data.inspect import check
from dino_fast.errors import UserError
from tests.data.example_files import save

RNG = np.random.default_rng(0)
RGB = RNG.integers(0, 256, (6, 8, 9, 3), dtype=np.uint8)
RGB[0, 0, 0] = 0, 128, 255


def _rows(source) -> np.ndarray:
    return np.stack([source.read(i).permute(1, 2, 0).numpy() for i in range(len(source))])


class Items(Dataset):
    def __init__(self, items, **attributes):
        self.items, self.read = items, []
        vars(self).update(attributes)

    def __len__(self):
        return len(self.items)

    def __getitem__(self, index):
        self.read.append(index)
        return self.items[index]


class Stream(IterableDataset):
    def __init__(self, items, count):
        self.items, self.count = items, count

    def __iter__(self):
        return iter(self.items)

    def __len__(self):
        if self.count is None:
            raise TypeError("no length")
        return self.count


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (RGB[..., ::-1], RGB[..., ::-1]),
        (RGB[:, ::-1, ::2], RGB[:, ::-1, ::2]),
        (np.asfortranarray(RGB), RGB),
        (RGB.astype(">u2"), RGB),
        (RGB.astype(np.int64), RGB),
        (RGB / 255, RGB),
        ((RGB / 255).astype(">f4"), RGB),
        (torch.from_numpy(RGB / 255).permute(0, 3, 1, 2).float(), RGB),
        (RGB[..., 0] > 127, (RGB[..., :1] > 127) * np.uint8(255)),
        (torch.from_numpy(RGB).bool()[..., 1], (RGB[..., 1:2] > 0) * np.uint8(255)),
        (RGB.astype(np.uint16) * 257, RGB),
        (list(RGB), RGB),
        (tuple(torch.from_numpy(RGB).permute(0, 3, 1, 2)), RGB),
        (list(RGB / 255), RGB),
        ([Image.fromarray(image) for image in RGB], RGB),
        ([Image.fromarray(RGB[0]).convert("L")], np.array(Image.fromarray(RGB[0]).convert("L"))[None, ..., None]),
        ({"images": RGB * 16.0 - 7, "range": (-7, 4073)}, RGB),
        ({"images": RGB.astype(np.uint16) * 16, "range": (0, 4080)}, RGB),
        ({"images": RGB.astype(np.int32) - 100, "range": [-100, 155]}, RGB),
    ],
)
def test_images_in_memory_are_read_whatever_their_format(given, expected) -> None:
    source = open_source(given)
    assert source.read(0).dtype == torch.uint8
    assert np.array_equal(_rows(source), expected)
    crops = MultiCrop(4, 2, 1, mean=(0.5,) * source.channels, std=(0.5,) * source.channels)
    (batch,) = train_loader(source, crops, batch_size=len(source), seed=0, epochs=1)
    assert batch.global_crops.isfinite().all() and not batch.bad


def test_a_read_only_array_gives_no_warning(recwarn) -> None:
    images = RGB.copy()
    images.setflags(write=False)
    assert np.array_equal(_rows(open_source(images)), RGB)
    assert not recwarn.list


def test_values_beyond_a_stated_range_are_clipped_and_nan_is_black() -> None:
    images = np.array([[[-5.0, 0.0, 5.0], [10.0, 20.0, np.nan]]])
    source = open_source({"images": images, "range": (0, 10)})
    assert source.read(0)[0].tolist() == [[0, 0, 128], [255, 255, 0]]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (RGB[:0], r"\[0, 8, 9, 3\]: there are no images"),
        (RGB[:, :0], "no pixels"),
        ([], "the list is empty"),
        (np.zeros((2, 4, 4), [("a", "u1")]), "images are numbers"),
        (RGB.astype(complex), "complex128; images are numbers"),
        (np.array(["2020-01-01"] * 3, "M8[D]"), "images are numbers"),
        (RGB[0, 0], "shape"),
        (np.zeros((2, 4, 5, 4), np.uint8), "1 or 3 channels"),
        (RGB * 1.0, r"from 0 to 255, whose range is not known.*'range': \(low, high\)"),
        (RGB / 255 - 0.5, "before any normalization"),
        (RGB.astype(np.uint16) * 16, "from 0 to 4080, whose range is not known"),
        (np.full((2, 4, 4), np.nan), "from nan to nan"),
        ({"images": RGB, "range": (5, 5)}, "smaller number first"),
        ({"images": RGB, "range": 5}, "two numbers"),
        ({"images": RGB, "lables": 5}, "not lables"),
        ([RGB[0], None], "entry 1 of the list is None"),
        (["no/such.jpg"], "entry 0 of the list, 'no/such.jpg', is no file"),
        (np.array(["no/such.jpg"]), "is no file"),
        (7, "cannot open a int; give a path"),
        ({"pixels": RGB}, "cannot open a dict"),
        ((RGB, np.eye(6)), r"\[6, 6\].*one-hot rows give labels.argmax\(1\)"),
        ((RGB, [[0, 1]] * 6), "one-hot"),
        ((RGB, [0, 1, float("nan"), 0, 1, 0]), "label 2 is NaN"),
        ((RGB, np.array([0, np.nan] * 3)), "label 1 is NaN"),
        ((RGB, [0.5] * 6), "label 0 is 0.5"),
        ((RGB, [0, 1]), "6 images with 2 labels"),
        ((RGB, [0, 1, -7, 0, 0, 0]), "label 2 is -7"),
        ((RGB, 3), "shape"),
        ((RGB, [10**20] * 6), "label"),
        ((RGB, [np.zeros(2), np.zeros(3), 0, 0, 0, 0]), "label"),
        (DataLoader(Items(list(RGB))), "a DataLoader gives batches"),
        (Items([]), "is empty"),
        (Items([(RGB[0], RGB[1], 3)]), "a tuple of 3 .*; expected an image or"),
        (Items([{"pixels": RGB[0]}]), "keys pixels; expected 'image'"),
        (Items([7]), "a int; expected an image"),
        (Items([torch.randn(3, 8, 9)]), "before any normalization"),
        (Items([[RGB[0]] * 3]), "a list of 3"),
        (Stream(RGB, None), "does not say how many"),
        (iter(RGB), "does not say how many"),
        (Stream(RGB, 5), "5 items and gives more"),
        (Stream(RGB, 9), "9 items and gives only 6"),
        (Stream([RGB[0], 5], 2), "a int; expected an image"),
    ],
)
def test_what_cannot_be_used_is_refused_by_name(given, message) -> None:
    with pytest.raises(UserError, match=message):
        open_source(given)


@pytest.mark.parametrize(
    ("labels", "numbers", "classes"),
    [
        (["cat", "dog", None, "cat", "ant", "cat"], [1, 2, -1, 1, 0, 1], ["ant", "cat", "dog"]),
        (torch.arange(6), [0, 1, 2, 3, 4, 5], None),
        ([1.0, 0.0, -1, None, True, np.int8(3)], [1, 0, -1, -1, 1, 3], None),
        (np.arange(6)[:, None], [0, 1, 2, 3, 4, 5], None),
        ([10**12, 7, 7, 10**15, -1, 7], [1, 0, 0, 2, -1, 0], ["7", str(10**12), str(10**15)]),
        ([torch.tensor(2)] * 6, [2] * 6, None),
    ],
)
def test_labels(labels, numbers, classes) -> None:
    source = open_source((RGB, labels))
    assert source.labels.dtype == np.int64 and source.labels.tolist() == numbers and source.classes == classes


def test_a_list_of_paths(tmp_path: Path, monkeypatch) -> None:
    paths = [save(tmp_path / f"{i}.png") for i in range(3)]
    source = open_source((paths, ["a", "b", "a"]))
    assert source.name(1) == str(paths[1]) and source.label(2) == 0 and source.read(0).shape == (3, 12, 20)
    assert len(open_source(np.array(list(map(str, paths))))) == 3
    monkeypatch.chdir(tmp_path)
    assert len(open_source(["0.png", "1.png"])) == 2  # two paths, not images and labels


def test_a_list_of_opened_files_is_read_by_several_threads(tmp_path: Path) -> None:
    images = [Image.open(save(tmp_path / f"{i}.png")) for i in range(40)]
    source = open_source((images, range(40)))
    ((batch, labels),) = eval_batches(source, 16, batch_size=40)
    assert batch.shape == (40, 3, 16, 16) and labels.tolist() == list(range(40))
    report = check(source)
    assert report.images == 40 and report.kinds == {"in memory": 40}


def test_a_broken_image_of_a_list_is_one_bad_image(tmp_path: Path) -> None:
    whole = save(tmp_path / "whole.png").read_bytes()
    file = io.BytesIO()
    Image.fromarray(RNG.integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(file, "jpeg")
    cut = Image.open(io.BytesIO(file.getvalue()[:-2000]))
    source = open_source([RGB[0], whole, RGB[0] / 2, *[RGB[0]] * 400, cut])
    assert source.read(1).shape == (3, 12, 20)
    report = check(source)
    assert [text.split(":")[0] for text in report.bad] == ["list, image 2", "list, image 403"]


def test_a_data_set_of_images() -> None:
    source = open_source(Items([Image.fromarray(image) for image in RGB]))
    assert source.labels is None and source.name(2) == "Items, item 2" and np.array_equal(_rows(source), RGB)
    with_workers = train_loader(source, MultiCrop(4, 2, 1), batch_size=6, seed=0, epochs=1, workers=1)
    alone = train_loader(source, MultiCrop(4, 2, 1), batch_size=6, seed=0, epochs=1)
    assert torch.equal(next(iter(with_workers)).global_crops, next(iter(alone)).global_crops)


def test_a_data_set_of_images_and_labels() -> None:
    items = [(torch.from_numpy(RGB[i] / 255).permute(2, 0, 1), i % 2) for i in range(6)]
    source = open_source(Items(items, classes=["even", "odd"]))
    assert source.labels.tolist() == [0, 1] * 3 and source.classes == ["even", "odd"]
    assert np.array_equal(_rows(source), RGB)
    known = Items(items, targets=[3, 4, 5, 6, 7, 8])
    assert open_source(known).labels.tolist() == [3, 4, 5, 6, 7, 8]
    assert known.read == [0]  # not every image for its label
    assert open_source(Subset(known, [5, 1])).labels.tolist() == [8, 4]
    assert open_source(ConcatDataset([known, Subset(known, [2])])).labels.tolist() == [3, 4, 5, 6, 7, 8, 5]
    named = open_source(Items([{"img": RGB[i], "target": f"c{i}"} for i in range(6)]))
    assert named.classes == ["c0", "c1", "c2", "c3", "c4", "c5"] and len(split(named)[1]) == 1
    both = open_source({"train": Items(items), "val": (RGB, [0] * 6)})
    assert both.test is not None and both.test.labels.tolist() == [0] * 6


def test_labels_of_a_data_set_that_are_no_classes_stop_nothing() -> None:
    for label in (np.eye(3)[0], float("nan"), {"boxes": 1}):
        with pytest.warns(UserWarning, match=r"the labels of Items are not used: .*(one-hot|NaN)"):
            source = open_source(Items([(image, label) for image in RGB]))
        assert source.labels is None and len(source) == 6


def test_a_data_set_that_fails_at_an_item_has_one_bad_image() -> None:
    class Failing(Items):
        def __getitem__(self, index):
            if index == 3:
                raise ZeroDivisionError("a fault of theirs")
            return self.items[index], 0

    source = open_source(Failing(RGB))
    assert source.labels.tolist() == [0, 0, 0, -1, 0, 0]
    assert check(source).bad == ["Failing, item 3: ZeroDivisionError: a fault of theirs"]


def test_an_iterable_data_set_with_a_length_is_read_once() -> None:
    source = open_source(Stream([(image, i) for i, image in enumerate(RGB)], 6))
    assert np.array_equal(_rows(source), RGB) and source.labels.tolist() == list(range(6))


def test_torchvision_data_sets() -> None:
    from torchvision.datasets import FakeData

    source = open_source(FakeData(4, (3, 20, 30)))
    assert source.read(3).shape == (3, 20, 30) and len(source.labels) == 4
