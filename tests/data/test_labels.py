"""Labels of every type, from every source."""

from __future__ import annotations

import decimal
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as arrow
import pyarrow.parquet
import pytest
import torch

from dino_fast.data import ArraySource, open_source
from dino_fast.data.labels import class_numbers, share_classes
from dino_fast.errors import UserError
from dino_fast.eval.common.labels import open_labeled

from .example_files import pack, png

NAMES = ["cat", "dog"] * 3
IMAGES = arrow.array([png(i) for i in range(6)], arrow.binary())


def test_labels_that_number_classes() -> None:
    nan = float("nan")
    half = np.array([0, 1] * 3, np.float16)
    for values, numbers, classes in [
        (arrow.array([0, 1] * 3), [0, 1] * 3, None),
        (arrow.array(NAMES), [0, 1] * 3, ["cat", "dog"]),
        (arrow.array(NAMES, arrow.string_view()), [0, 1] * 3, ["cat", "dog"]),
        (arrow.array(NAMES).dictionary_encode(), [0, 1] * 3, ["cat", "dog"]),
        (arrow.array([7, 2] * 3).dictionary_encode(), [7, 2] * 3, None),
        (arrow.array(["dog", "", None, "cat"]), [1, -1, -1, 0], ["cat", "dog"]),
        (arrow.array(["10", "9", "-1"]), [10, 9, -1], None),
        (arrow.array(["010", "9"]), [0, 1], ["010", "9"]),
        (arrow.array([0.0, nan, 3.0]), [0, -1, 3], None),
        (arrow.array([0.0, None, 3.0]), [0, -1, 3], None),
        (arrow.array(half), [0, 1] * 3, None),
        (arrow.array([True, False, None]), [1, 0, -1], None),
        (arrow.array([5, -1, -100, None], arrow.int8()), [5, -1, -1, -1], None),
        (arrow.array([2**63 + 1, 1], arrow.uint64()), [1, 0], ["1", "9223372036854775809"]),
        (arrow.chunked_array([arrow.array(["b"]), arrow.array(["a", None])]), [1, 0, -1], ["a", "b"]),
        (np.array([1, 0]), [1, 0], None),
        (["a", "c", None], [0, 1, -1], ["a", "c"]),
    ]:
        found = class_numbers(values)
        assert found.numbers is not None and found.numbers.dtype == np.int64 and found.unused == ""
        assert found.numbers.tolist() == numbers and found.classes == classes, values
    named = class_numbers([1, 0], ["no", "yes"])
    assert named.numbers.tolist() == [1, 0] and named.classes == ["no", "yes"]
    assert class_numbers([1, 2], ["no", "yes"]).classes is None
    for none in (arrow.nulls(3), arrow.array([None], arrow.int64()), arrow.array([float("nan")]), ["", None], []):
        assert class_numbers(none) == (None, None, "")


def unusable() -> dict[str, tuple[Any, str]]:
    half = arrow.array(np.array([0.5, 1.5] * 3, np.float16))
    return {
        "multi-label": (arrow.array([[0, 3], [1]] * 3), "type list.*multi-label"),
        "one-hot": (arrow.array([[0.0, 1.0]] * 6, arrow.list_(arrow.float64(), 2)), "one-hot"),
        "struct": (arrow.array([{"name": "cat", "id": 0}] * 6), "type struct"),
        "fractions": (arrow.array([0.5, 1.0] * 3), "hold 0.5"),
        "half": (half, "hold 0.5"),
        "infinite": (arrow.array([float("inf"), 1.0] * 3), "hold inf"),
        "decimal": (arrow.array([decimal.Decimal("1.5")] * 6), "type decimal"),
        "binary": (arrow.array([b"cat", b"dog"] * 3), "type binary"),
        "binary_view": (arrow.array([b"cat", b"dog"] * 3, arrow.binary_view()), "type binary_view"),
        "time": (arrow.array(np.array(["2020-01-01"] * 6, "M8[D]")), "type date32"),
        "bytes category": (arrow.array([b"cat", b"dog"] * 3).dictionary_encode(), "type binary"),
    }


@pytest.mark.parametrize("kind", unusable())
def test_labels_that_number_no_classes_stop_only_what_needs_them(tmp_path: Path, kind: str) -> None:
    labels, reason = unusable()[kind]
    path = tmp_path / "x.parquet"
    arrow.parquet.write_table(arrow.table({"image": IMAGES, "label": labels}), path)
    with pytest.warns(UserWarning, match=f"the labels 'label' are not used: .*{reason}"):
        source = open_source(path)
    assert source.labels is None and source.label(0) is None and source.read(1).unique().tolist() == [1]
    with (
        pytest.warns(),
        pytest.raises(UserError, match=f"x.parquet: this evaluation needs labels, and the labels .*{reason}"),
    ):
        open_labeled(path)


def test_large_numbers_become_classes(tmp_path: Path) -> None:
    """As class numbers they would be the width of a linear layer and of the k-NN's votes."""
    for labels in ([1_200_000, 3] * 3, [600_000_000, 5] * 3, [9_000_000_000_000, 0] * 3):
        path = tmp_path / "x.parquet"
        arrow.parquet.write_table(arrow.table({"image": IMAGES, "label": labels}), path)
        source = open_source(path)
        assert source.labels.tolist() == [1, 0] * 3 and source.classes == [str(labels[1]), str(labels[0])]
        assert open_labeled(path, path)[2] == 2
    tar = pack(tmp_path / "x.tar", {"a.png": png(1), "a.cls": b"9000000000000", "b.png": png(2), "b.cls": b"5"})
    assert open_source(tar).labels.tolist() == [1, 0]


def test_parts_are_numbered_alike(tmp_path: Path) -> None:
    """Of two files one may hold numbers that stay as they are, and the other numbers that do not."""

    def file(name: str, labels: list) -> Path:
        table = arrow.table({"image": IMAGES.slice(0, len(labels)), "label": labels})
        arrow.parquet.write_table(table, tmp_path / name)
        return tmp_path / name

    bank, queries, classes = open_labeled(file("a.parquet", [1_200_000, 3, 7]), file("b.parquet", [7, 3]))
    assert bank.labels.tolist() == [2, 0, 1] and queries.labels.tolist() == [1, 0] and classes == 3
    bank, queries, classes = open_labeled(file("a.parquet", [0, 1, 5]), file("b.parquet", [5, 1]))
    assert bank.labels.tolist() == [0, 1, 5] and queries.labels.tolist() == [5, 1] and classes == 6
    with pytest.raises(UserError, match="has a class '1200000' that --data lacks"):
        open_labeled(file("a.parquet", [0, 1, 5]), file("b.parquet", [1_200_000, 1]))
    both = open_source({"train": open_source(tmp_path / "b.parquet"), "test": open_source(tmp_path / "a.parquet")})
    assert both.classes == ["1", "1200000", "0", "2", "3", "4", "5"] and both.test.labels.tolist() == [2, 0, 6]


def test_many_classes_are_numbered_quickly(tmp_path: Path) -> None:
    """Looking each name up in a list takes 20,000 x 20,000 comparisons, 4 s."""
    count = 20_000
    images = np.zeros((count, 1, 1, 1), np.uint8)

    def part(first: int) -> ArraySource:
        names = [f"class {first + i:06d}" for i in range(count)]
        return ArraySource(torch.from_numpy(images), np.arange(count), names)

    train, test = part(0), part(count // 2)
    start = time.perf_counter()
    share_classes(train, test)
    assert time.perf_counter() - start < 1
    assert len(train.classes) == count * 3 // 2 and test.labels[0] == count // 2 and test.labels[-1] == 29_999
    start = time.perf_counter()
    names = {f"set/{i:06d}/x.png": png(1) for i in range(3000)}
    source = open_source(pack(tmp_path / "x.tar", names))
    assert source.labels.tolist() == list(range(3000)) and time.perf_counter() - start < 10
