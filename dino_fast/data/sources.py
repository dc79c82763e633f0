"""Where images come from: a folder, a list of files, Parquet, an array in memory, or the demo set of the package.

`open_source` looks at a path once and keeps a flat index; `Source.read` decodes one image. What is wrong with the
source as a whole is a UserError when it is opened; what is wrong with one image is an ImageError when it is read.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dino_fast.data.decode import ImageError, decode
from dino_fast.errors import UserError

EXTENSIONS = {
    ".jpg",
    ".jpeg",
    ".jpe",
    ".png",
    ".bmp",
    ".gif",
    ".webp",
    ".tif",
    ".tiff",
    ".ppm",
    ".pgm",
    ".jp2",
    ".avif",
}
TRAIN_DIRS, TEST_DIRS = ("train", "training"), ("val", "test", "valid", "validation", "testing")
IMAGE_COLUMNS, LABEL_COLUMNS = ("image", "img"), ("label", "labels", "fine_label")
_CHECKED = 1000  # entries of a file list that are looked for when it is opened; a missing later one is an ImageError


class Source:
    """A numbered set of images, some with labels.

    `channels` is what `read` converts to: 3 unless the images are known to be grey; set it to 1 or 3 to choose.
    `labels` is int64 [len] with -1 where there is none, or None where no image has one.
    """

    channels: int = 3
    classes: list[str] | None = None
    labels: np.ndarray | None = None
    test: Source | None = None  # the held-out part that came with it

    def __len__(self) -> int:
        raise TypeError(f"{type(self).__name__} does not say how many images it has")

    def name(self, index: int) -> str:
        """What to call the image in a message: its path, or file and row."""
        raise TypeError(f"{type(self).__name__} does not name its images")

    def read(self, index: int) -> Tensor:
        """uint8 [channels, H, W]. Raises ImageError naming the image."""
        data = self.data(index)
        try:
            return decode(data, self.channels)
        except ImageError as error:
            raise ImageError(f"{self.name(index)}: {error}") from error

    def data(self, index: int) -> bytes:
        """The encoded file. Raises ImageError naming the image."""
        raise TypeError(f"{type(self).__name__} has no encoded images")

    def label(self, index: int) -> int | None:
        if self.labels is None or self.labels[index] < 0:
            return None
        return int(self.labels[index])


class FileSource(Source):
    """Image files, read from disk each time."""

    def __init__(
        self, root: Path, names: Sequence[str], labels: Sequence[int] | None, classes: list[str] | None
    ) -> None:
        self.root = root
        encoded = [os.fsencode(name) for name in names]
        # One buffer instead of millions of strings: forked workers then share it, since no reference count is written.
        self._names = b"".join(encoded)
        self._ends = np.cumsum([len(name) for name in encoded], dtype=np.int64)
        self.labels = None if labels is None else np.asarray(labels, dtype=np.int64)
        self.classes = classes

    def __len__(self) -> int:
        return len(self._ends)

    def path(self, index: int) -> Path:
        start = self._ends[index - 1] if index else 0
        return self.root / os.fsdecode(self._names[start : self._ends[index]])

    def name(self, index: int) -> str:
        return str(self.path(index))

    def data(self, index: int) -> bytes:
        try:
            return self.path(index).read_bytes()
        except OSError as error:
            raise ImageError(f"{self.path(index)}: {error.strerror or error}") from error


class ParquetSource(Source):
    """Rows of Parquet files, held in memory still encoded; column `image` is bytes or a struct of bytes and path."""

    def __init__(self, paths: Sequence[Path]) -> None:
        import pyarrow
        import pyarrow.parquet as parquet

        self.paths = list(paths)
        tables = []
        for path in self.paths:
            try:
                schema = parquet.read_schema(path)
                columns = _parquet_columns(path, schema.names)
                tables.append(parquet.read_table(path, columns=columns))
            except (pyarrow.ArrowException, OSError) as error:
                raise UserError(f"{path}: not a readable Parquet file ({error})") from error
        self._starts = np.cumsum([0, *(table.num_rows for table in tables)])
        table = pyarrow.concat_tables(tables, promote_options="permissive")
        if table.num_rows == 0:
            raise UserError(f"{self.paths[0]}: the Parquet file has no rows")
        image = next(name for name in IMAGE_COLUMNS if name in table.column_names)
        self._bytes, self._files = _image_columns(self.paths[0], image, table[image])
        if self._bytes.null_count == table.num_rows and self._files is None:
            raise UserError(f"{self.paths[0]}: every value of the column '{image}' is null")
        label = next((name for name in LABEL_COLUMNS if name in table.column_names), None)
        if label:
            self.labels, self.classes = _labels(table[label], _class_names(table.schema.metadata, label))

    def __len__(self) -> int:
        return len(self._bytes)

    def name(self, index: int) -> str:
        part = int(np.searchsorted(self._starts, index, side="right")) - 1
        return f"{self.paths[part]}, row {index - self._starts[part]}"

    def data(self, index: int) -> bytes:
        value = self._bytes[index].as_buffer()
        if value is not None:
            return value.to_pybytes()
        file = self._files[index].as_py() if self._files is not None else None
        if file is None:
            raise ImageError(f"{self.name(index)}: the image is null")
        try:
            return (self.paths[0].parent / file).read_bytes()
        except OSError as error:
            raise ImageError(f"{self.name(index)}: {file}: {error.strerror or error}") from error


class ArraySource(Source):
    """Decoded images in memory: uint8 [N, C, H, W] with C = 1 or 3, and optional labels."""

    def __init__(
        self,
        images: Tensor,
        labels: Sequence[int] | np.ndarray | None = None,
        classes: list[str] | None = None,
        name: str = "array",
    ) -> None:
        if images.dtype != torch.uint8 or images.dim() != 4 or images.shape[1] not in (1, 3):
            raise UserError(f"images in memory are uint8 [N, 1 or 3, H, W], not {images.dtype} {list(images.shape)}")
        self.images, self.channels, self.classes, self._name = images, images.shape[1], classes, name
        self.labels = None if labels is None else np.asarray(labels, dtype=np.int64)
        if self.labels is not None and len(self.labels) != len(images):
            raise UserError(f"{len(images)} images with {len(self.labels)} labels; give one for each")

    def __len__(self) -> int:
        return len(self.images)

    def name(self, index: int) -> str:
        return f"{self._name}, image {index}"

    def read(self, index: int) -> Tensor:
        image = self.images[index]
        if self.channels == len(image):
            return image
        if self.channels == 3:
            return image.expand(3, -1, -1)
        luma = torch.tensor([19595, 38470, 7471], dtype=torch.int32).view(3, 1, 1)  # Pillow's weights, times 65536
        return ((image.int() * luma).sum(0, keepdim=True) + 0x8000 >> 16).to(torch.uint8)


class Subset(Source):
    """Some images of another source, by index."""

    def __init__(self, source: Source, indices: np.ndarray) -> None:
        self.source, self.indices, self.classes = source, indices, source.classes
        self.labels = None if source.labels is None else source.labels[indices]

    @property
    def channels(self) -> int:  # type: ignore[override]
        return self.source.channels

    @channels.setter
    def channels(self, value: int) -> None:
        self.source.channels = value

    def __len__(self) -> int:
        return len(self.indices)

    def name(self, index: int) -> str:
        return self.source.name(int(self.indices[index]))

    def read(self, index: int) -> Tensor:
        return self.source.read(int(self.indices[index]))

    def data(self, index: int) -> bytes:
        return self.source.data(int(self.indices[index]))


def open_source(path: str | Path) -> Source:
    """Opens `demo`, a folder, a .parquet file, a folder of them, or a text file with one image path a line.

    A folder with train/ beside val/ or test/ opens its train/ and keeps the other as `.test`. In a folder where every
    image lies in a sub-folder, the first level of sub-folders are the classes. Raises UserError saying what was found
    and what is accepted.
    """
    if str(path) == "demo":
        from dino_fast.data.demo import open_demo

        return open_demo()
    path = Path(path).expanduser()
    if not path.exists():
        raise UserError(f"{path} does not exist; give a folder, a .parquet file, a text file listing images, or 'demo'")
    if path.is_dir():
        return _open_folder(path)
    if path.suffix.lower() == ".parquet":
        return ParquetSource([path])
    return _open_list(path)


def split(source: Source) -> tuple[Source, Source]:
    """(what to train and build the k-NN bank on, what to hold out): the test part that came with the source, else a
    seeded tenth of it. The two share no image."""
    if source.test is not None:
        return source, source.test
    if len(source) < 2:
        raise UserError(f"{len(source)} image cannot be split into training and held-out images; give at least 2")
    order = np.random.default_rng(0).permutation(len(source))
    count = max(1, len(source) // 10)
    return Subset(source, np.sort(order[count:])), Subset(source, np.sort(order[:count]))


def held_out(source: Source) -> Source:
    """The second part of `split`."""
    return split(source)[1]


def _open_folder(root: Path) -> Source:
    train = next((root / name for name in TRAIN_DIRS if (root / name).is_dir()), None)
    test = next((root / name for name in TEST_DIRS if (root / name).is_dir()), None)
    if train and test:
        source, held = _open_folder(train), _open_folder(test)
        _share_classes(source, held)
        source.test = held
        return source
    names = list(_walk(root, EXTENSIONS))
    if names:
        return _folder_source(root, names)
    shards = [root / name for name in _walk(root, {".parquet"})]
    if not shards:
        raise UserError(
            f"{root} holds no images (looked in all sub-folders for {', '.join(sorted(EXTENSIONS))}) "
            "and no .parquet files"
        )
    parts = {p: [s for s in shards if s.name.startswith(p)] for p in (*TRAIN_DIRS, *TEST_DIRS)}
    training = next((parts[p] for p in TRAIN_DIRS if parts[p]), None)
    testing = next((parts[p] for p in TEST_DIRS if parts[p]), None)
    if not (training and testing):
        return ParquetSource(shards)
    parquet = ParquetSource(training)
    parquet.test = ParquetSource(testing)
    return parquet


def _folder_source(root: Path, names: list[str]) -> FileSource:
    tops = [name.split(os.sep, 1) for name in names]
    if any(len(parts) == 1 for parts in tops):
        return FileSource(root, names, None, None)
    classes = sorted({parts[0] for parts in tops})
    number = {name: i for i, name in enumerate(classes)}
    return FileSource(root, names, [number[parts[0]] for parts in tops], classes)


def _walk(root: Path, extensions: set[str]) -> Iterator[str]:
    """Paths below `root`, relative to it, in a fixed order; hidden ones left out, links followed but in no circle."""
    seen = set()
    for folder, folders, files in os.walk(root, followlinks=True):
        real = os.path.realpath(folder)
        if real in seen:
            folders.clear()
            continue
        seen.add(real)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        inside = os.path.relpath(folder, root)
        for name in sorted(files):
            if os.path.splitext(name)[1].lower() in extensions and not name.startswith("."):
                yield name if inside == "." else os.path.join(inside, name)


def _share_classes(train: Source, test: Source) -> None:
    """Numbers the classes of both parts alike; classes that only the test part has come last."""
    if train.classes is None or test.classes is None or test.labels is None or train.classes == test.classes:
        return
    names = train.classes + [name for name in test.classes if name not in set(train.classes)]
    test.labels = np.asarray([names.index(name) for name in test.classes], dtype=np.int64)[test.labels]
    train.classes = test.classes = names


def _open_list(path: Path) -> FileSource:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError:
        raise UserError(
            f"{path} is not a list of images: it is no text. Accepted: a text file with one path a line, "
            "a .parquet file, a folder"
        ) from None
    rows = [line.rstrip().partition("\t") for line in lines if line.strip()]
    if not rows:
        raise UserError(
            f"{path} lists no images; write one path a line, optionally a tab and a whole number as its label"
        )
    names = [row[0] for row in rows]
    for number, name in enumerate(names[:_CHECKED]):
        if not (path.parent / name).is_file():
            raise UserError(
                f"{path}: entry {number + 1}, {name!r}, is no file (paths are relative to the list's folder)"
            )
    texts = {row[2].strip() for row in rows}
    if texts == {""}:
        return FileSource(path.parent, names, None, None)
    try:
        return FileSource(path.parent, names, [int(row[2]) if row[2].strip() else -1 for row in rows], None)
    except ValueError:
        raise UserError(f"{path}: a label after a tab must be a whole number; found {sorted(texts)[:3]}") from None


def _parquet_columns(path: Path, names: list[str]) -> list[str]:
    if not set(IMAGE_COLUMNS) & set(names):
        raise UserError(
            f"{path} has the columns {', '.join(names) or '(none)'}; expected 'image' (bytes, or a struct of bytes "
            "and path, as Hugging Face datasets stores images), and optionally 'label'"
        )
    return [name for name in names if name in (*IMAGE_COLUMNS, *LABEL_COLUMNS)]


def _image_columns(path: Path, name: str, column: Any) -> tuple[Any, Any]:
    """(bytes, paths or None) of an image column."""
    import pyarrow

    kind = column.type
    if pyarrow.types.is_binary(kind) or pyarrow.types.is_large_binary(kind):
        return column, None
    if pyarrow.types.is_struct(kind):
        parts = {kind.field(i).name: i for i in range(kind.num_fields)}
        if "bytes" in parts:
            import pyarrow.compute

            files = pyarrow.compute.struct_field(column, "path") if "path" in parts else None
            return pyarrow.compute.struct_field(column, "bytes"), files
    raise UserError(f"{path}: the column '{name}' is {kind}; expected binary, or a struct with a binary field 'bytes'")


def _labels(column: Any, names: list[str] | None) -> tuple[np.ndarray, list[str] | None]:
    """Whole numbers as they are, strings numbered in sorted order, null as -1."""
    values = column.to_pylist()
    if any(isinstance(value, str) for value in values):
        names = sorted({value for value in values if value is not None})
        values = [None if value is None else names.index(value) for value in values]
    return np.asarray([-1 if value is None else int(value) for value in values], dtype=np.int64), names


def _class_names(metadata: dict[bytes, bytes] | None, label: str) -> list[str] | None:
    """Class names as Hugging Face datasets writes them into the schema."""
    try:
        return list(json.loads((metadata or {})[b"huggingface"])["info"]["features"][label]["names"])
    except (KeyError, TypeError, ValueError):
        return None
