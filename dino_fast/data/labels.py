"""Labels of any type -> class numbers, by one rule for all sources. Labels that number no classes stop no training."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from dino_fast.data.source import Source

LABEL_COLUMNS = ("label", "labels", "fine_label")  # in any case
_UNUSED = 1000  # class numbers without an image up to which numbers stay as they are: CIFAR's 3 is 3 in any part of it


class Labels(NamedTuple):
    """Class numbers int64 [images], -1 where there is none; None where no image has one.

    `classes` are the names in the order of the numbers, where there are names. `unused` says why labels that are there
    cannot be used as classes.
    """

    numbers: np.ndarray | None
    classes: list[str] | None = None
    unused: str = ""


def class_numbers(values: Any, names: Sequence[str] | None = None, where: str = "the labels") -> Labels:
    """Numbers the classes of one label an image.

    Args:
        values: a pyarrow array, or anything that `pyarrow.array` takes. Text is numbered in sorted order; whole
            numbers stay as they are, unless they are so large that most classes would have no image: those are
            numbered in order, and are the names. None, NaN, negative numbers and empty text are no label. Of other
            types (lists, structs, fractions, decimals, binary, ...) the labels are not used.
        names: the classes' names by number, used if all numbers have one.
        where: what to call the labels in `unused`.
    """
    import pyarrow
    from pyarrow import types

    if not isinstance(values, pyarrow.Array | pyarrow.ChunkedArray):
        try:
            values = pyarrow.array(values, from_pandas=True)
        except (pyarrow.ArrowException, ValueError, TypeError, OverflowError) as error:
            return Labels(None, None, f"{where} are not used: {error}")
    kind = values.type
    if types.is_dictionary(kind):  # a text category, as pandas writes it
        return class_numbers(values.cast(kind.value_type), names, where)
    if types.is_null(kind):
        return Labels(None)
    if types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind):
        return _texts(values, names)
    if not (types.is_integer(kind) or types.is_boolean(kind) or types.is_floating(kind)):
        return Labels(None, None, f"{where} are not used: {_describe(values)}")
    if types.is_boolean(kind):
        values = values.cast(pyarrow.int8())
    known = values.is_valid().to_numpy(zero_copy_only=False) if values.null_count else np.ones(len(values), bool)
    # Not fill_null: it has no kernel for half floats.
    given = values.drop_null()
    numbers = given.to_numpy(zero_copy_only=False) if isinstance(given, pyarrow.Array) else given.to_numpy()
    if numbers.dtype.kind == "f":
        some = ~np.isnan(numbers)
        known[known] = some
        numbers = numbers[some]
        whole = np.isfinite(numbers) & (numbers == np.floor(numbers))
        if not whole.all():
            return Labels(None, None, f"{where} are not used: they hold {numbers[~whole][0]}, which numbers no class")
    if numbers.dtype.kind != "u":
        some = numbers >= 0
        known[known] = some
        numbers = numbers[some]
    return _integers(numbers, known, names)


def _texts(values: Any, names: Sequence[str] | None) -> Labels:
    """Whole numbers written as text are numbers, as in WebDataset's `.cls`; other text is numbered in sorted order."""
    import pyarrow

    encoded = values.cast(pyarrow.large_string()).dictionary_encode()
    if isinstance(encoded, pyarrow.ChunkedArray):
        encoded = encoded.unify_dictionaries().combine_chunks()
    distinct: list[str] = encoded.dictionary.to_pylist()
    index = encoded.indices.cast(pyarrow.int64()).fill_null(-1).to_numpy(zero_copy_only=False)
    given = [text for text in distinct if text]
    if not given:
        return Labels(None)
    if all(len(text) < 19 and text.removeprefix("-").isdecimal() and str(int(text)) == text for text in given):
        numbers = np.array([*(max(int(text), -1) if text else -1 for text in distinct), -1], np.int64)[index]
        return _integers(numbers[numbers >= 0], numbers >= 0, names)
    classes = sorted(given)
    number = {name: i for i, name in enumerate(classes)}
    return Labels(np.array([*(number.get(text, -1) for text in distinct), -1], np.int64)[index], classes)


def _integers(numbers: np.ndarray, known: np.ndarray, names: Sequence[str] | None) -> Labels:
    """`numbers` whole and not negative, one for each True of `known`."""
    if not len(numbers):
        return Labels(None)
    labels = np.full(len(known), -1, np.int64)
    if names is not None and numbers.max() < len(names):
        labels[known] = numbers.astype(np.int64)
        return Labels(labels, list(names))
    if numbers.max() >= _UNUSED:
        distinct, dense = np.unique(numbers, return_inverse=True)
    if numbers.max() < _UNUSED or distinct[-1] < len(distinct) + _UNUSED:
        labels[known] = numbers.astype(np.int64)
        return Labels(labels)
    labels[known] = dense
    return Labels(labels, [str(int(number)) for number in distinct])


def _describe(values: Any) -> str:
    """What the values are, and what to make of them."""
    from pyarrow import types

    kind = values.type
    advice = "a class is a whole number or a text"
    if types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind):
        advice = "several values an image (multi-label or one-hot), where a class is one whole number or text"
    return f"they are of type {kind}: {advice}"


def share_classes(train: Source, test: Source) -> None:
    """Numbers the classes of both parts alike; classes that only the test part has come last."""
    names, others = names_to_match(train, test)
    if names is not None and others is None and test.labels is not None and test.labels.max(initial=-1) < len(names):
        test.classes = names
    if names is None or others is None or test.labels is None or names == others:
        return
    known = set(names)
    names = names + [name for name in others if name not in known]
    number = {name: i for i, name in enumerate(names)}
    numbers = np.array([*(number[name] for name in others), -1], np.int64)
    test.labels = numbers[test.labels]  # -1 takes the last entry, which is -1
    train.classes = test.classes = names


def names_to_match(first: Source, second: Source) -> tuple[list[str] | None, list[str] | None]:
    """The classes' names of two sources, by which their labels are matched.

    Numbers that stayed as they are count as names beside names that are numbers; one without names beside real names
    has none, and its numbers are those of the names.
    """
    return _names_beside(first, second), _names_beside(second, first)


def _names_beside(source: Source, other: Source) -> list[str] | None:
    if source.classes is not None or source.labels is None or other.classes is None:
        return source.classes
    if not all(name.isdecimal() for name in other.classes):
        return None
    return [str(number) for number in range(int(source.labels.max(initial=-1)) + 1)]
