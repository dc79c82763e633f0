"""`datasets.Dataset` objects, and folders that `save_to_disk` wrote. The library is needed for the latter only."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from typing_extensions import override

from dino_fast.data.decode import ImageError
from dino_fast.data.formats.parquet import IMAGE_COLUMNS, find_column
from dino_fast.data.labels import LABEL_COLUMNS, class_numbers
from dino_fast.data.source import Source, read_file
from dino_fast.errors import UserError


class DatasetSource(Source):
    """The rows of a `datasets.Dataset`, whose images stay encoded and, as that library keeps them, on disk."""

    def __init__(self, dataset: Any) -> None:
        names = dataset.column_names
        image = find_column(names, IMAGE_COLUMNS)
        if image is None:
            raise UserError(f"the dataset has the columns {', '.join(names)}; expected 'image'")
        if len(dataset) == 0:
            raise UserError("the dataset has no rows")
        self._rows, self._image = dataset.select_columns([image]).with_format("arrow"), image
        label = find_column(names, LABEL_COLUMNS)
        if label is not None:
            column = dataset.select_columns([label]).with_format("arrow")[:][label]
            names = getattr(dataset.features[label], "names", None)
            self.labels, self.classes, self.unused_labels = class_numbers(column, names, f"the labels '{label}'")

    def __len__(self) -> int:
        return len(self._rows)

    @override
    def name(self, index: int) -> str:
        return f"dataset, row {index}"

    @override
    def data(self, index: int) -> bytes:
        value = self._rows[index][self._image][0].as_py()
        if isinstance(value, dict):
            file = value.get("path")
            value = value.get("bytes")
            if value is None and file is not None:
                try:
                    return read_file(file)
                except OSError as error:
                    raise ImageError(f"{self.name(index)}: {file}: {error.strerror or error}") from error
        if value is None:
            raise ImageError(f"{self.name(index)}: the image is null")
        if not isinstance(value, bytes):
            raise ImageError(f"{self.name(index)}: column '{self._image}' holds a {type(value).__name__}, not an image")
        return value


def load_saved(folder: Path) -> Any:
    """The dataset, or the dictionary of them, that `save_to_disk` wrote."""
    try:
        from datasets import load_from_disk
    except ImportError:
        raise UserError(
            f"{folder} was saved by the library 'datasets', which is needed to read it: pip install datasets"
        ) from None
    try:
        return load_from_disk(str(folder))
    except (OSError, ValueError) as error:
        raise UserError(f"{folder}: not a readable dataset ({error})") from error
