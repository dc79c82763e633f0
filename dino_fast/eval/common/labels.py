"""Labeled images to learn from and to classify, with one numbering of their classes."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np

from dino_fast.data import Source, open_source
from dino_fast.data.labels import names_to_match
from dino_fast.data.open import split
from dino_fast.errors import UserError, nearest

logger = logging.getLogger(__name__)


def open_labeled(data: str | Path, test: str | Path | None = None) -> tuple[Source, Source, int]:
    """(images to learn from, images to classify, number of classes), labels numbered alike, -1 where one is missing.

    `test` defaults to the held-out part of `data`. Raises UserError where labels are missing, of another set, or all
    of one class.
    """
    source = open_source(data)
    bank, queries = split(source) if test is None else (source, open_source(test))
    path = data if test is None else test
    for part, where in ((bank, data), (queries, path)):
        if part.labels is None or not (part.labels >= 0).any():
            if part.unused_labels:
                raise UserError(f"{where}: this evaluation needs labels, and {part.unused_labels}")
            raise UserError(
                f"{where} has no labels, and this evaluation needs them: give a folder with one sub-folder per class, "
                "or a parquet file with a label column"
            )
    assert bank.labels is not None and queries.labels is not None
    queries.labels = _same_numbers(bank, queries)
    known = np.unique(bank.labels[bank.labels >= 0])
    asked = np.unique(queries.labels[queries.labels >= 0])
    if len(known) < 2:
        raise UserError(f"all labeled images of {data} are of one class ({_class(bank, known[0])}); give at least two")
    unseen = [_class(bank, label) for label in np.setdiff1d(asked, known)]
    if unseen and (test is not None or source.test is not None):
        raise UserError(
            f"the test data has images of {len(unseen)} classes that {data} has none of: {', '.join(unseen[:5])}"
            f"{' ...' if len(unseen) > 5 else ''}. Are the labels of another set?"
        )
    if unseen:
        logger.warning("held-out images of %s count as wrong: no other image has the class", ", ".join(unseen[:5]))
    return bank, queries, int(max(known.max(), asked.max())) + 1


def left_out(source: Source, used: int) -> int:
    """How many images of `source` an evaluation that used `used` of them could not read or had no label for."""
    return len(source) - used


def _same_numbers(bank: Source, queries: Source) -> np.ndarray:
    """The queries' labels in the bank's numbering, matched by the classes' names where both have some."""
    assert queries.labels is not None
    names, others = names_to_match(bank, queries)
    if names is None or others is None or names == others:
        return queries.labels
    number = {name: i for i, name in enumerate(names)}
    used = set(np.unique(queries.labels[queries.labels >= 0]).tolist())
    for i, name in enumerate(others):
        if name not in number and i in used:
            raise UserError(f"the test data has a class '{name}' that --data lacks{nearest(name, names)}")
    numbers = np.asarray([*(number.get(name, -1) for name in others), -1], dtype=np.int64)
    return np.asarray(numbers[queries.labels])  # -1 takes the last entry, which is -1


def _class(source: Source, label: int) -> str:
    return f"'{source.classes[label]}'" if source.classes else f"label {label}"
