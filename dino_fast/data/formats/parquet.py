"""Images in Parquet files, as Hugging Face datasets store them: column `image`, bytes or a struct of bytes and path.

Parquet is read by row groups of many images, so a random order would read and decompress a hundred images for each one
used. What fits is therefore held in memory, still encoded; of more, the images are copied once, in order, into one flat
file in the cache folder, from which an image is a read at an offset.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dino_fast.data.decode import ImageError
from dino_fast.data.index_cache import Index, cache_file, holds, load, save, watch
from dino_fast.data.source import Source, printable
from dino_fast.errors import UserError

IMAGE_COLUMNS, LABEL_COLUMNS = ("image", "img"), ("label", "labels", "fine_label")
IN_MEMORY = 1 << 30  # encoded bytes held in memory; forked workers share them
_SPARE = 1 << 30  # bytes left free on the disk of the cache
_BYTES, _PATH, _NULL = range(3)  # what a row holds


class ParquetSource(Source):
    """Rows of Parquet files."""

    def __init__(self, paths: Sequence[Path]) -> None:
        self.paths = list(paths)
        files = [_open(path) for path in self.paths]
        self._starts = np.cumsum([0, *(file.metadata.num_rows for file in files)])
        if len(self) == 0:
            raise UserError(f"{self.paths[0]}: the Parquet file has no rows")
        self.labels, self.classes = _labels(files)
        self._rows = _rows(self.paths, files)

    def __len__(self) -> int:
        return int(self._starts[-1])

    def name(self, index: int) -> str:
        part = int(np.searchsorted(self._starts, index, side="right")) - 1
        return f"{self.paths[part]}, row {index - self._starts[part]}"

    def data(self, index: int) -> bytes:
        try:
            kind, data = self._rows[index]
        except OSError as error:
            raise ImageError(f"{self.name(index)}: {error.strerror or error}") from error
        if kind == _NULL:
            raise ImageError(f"{self.name(index)}: the image is null")
        if kind == _BYTES:
            return data
        part = int(np.searchsorted(self._starts, index, side="right")) - 1
        try:
            return (self.paths[part].parent / os.fsdecode(data)).read_bytes()
        except OSError as error:
            file = printable(os.fsdecode(data))
            raise ImageError(f"{self.name(index)}: {file}: {error.strerror or error}") from error


class EncodedRows:
    """Rows one after the other, in memory or in a file: row i ends at `ends[i]` and is of `kinds[i]`."""

    def __init__(self, ends: np.ndarray, kinds: np.ndarray, data: bytes | Path) -> None:
        self._ends, self._kinds = ends, kinds
        self._data = data if isinstance(data, bytes) else b""
        # A file is read, not mapped: a disk that fails then is an error that names the image, not a dead process.
        self._file = open(data, "rb", buffering=0) if isinstance(data, Path) else None  # noqa: SIM115

    def __getitem__(self, row: int) -> tuple[int, bytes]:
        start, end = int(self._ends[row - 1]) if row else 0, int(self._ends[row])
        if self._file is None:
            return int(self._kinds[row]), self._data[start:end]
        data = os.pread(self._file.fileno(), end - start, start)
        if len(data) < end - start:
            raise OSError(f"{self._file.name} is cut off; delete it, and it is made again")
        return int(self._kinds[row]), data


def _open(path: Path) -> Any:
    """The file with its footer read and its columns checked."""
    import pyarrow
    import pyarrow.parquet as parquet

    try:
        file = parquet.ParquetFile(path)
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"{path}: not a readable Parquet file ({error})") from error
    names = file.schema_arrow.names
    image = next((name for name in IMAGE_COLUMNS if name in names), None)
    if image is None:
        raise UserError(
            f"{path} has the columns {', '.join(names) or '(none)'}; expected 'image' (bytes, or a struct of bytes "
            "and path, as Hugging Face datasets stores images), and optionally 'label'"
        )
    kind = file.schema_arrow.field(image).type
    if not _is_bytes(kind) and not (pyarrow.types.is_struct(kind) and kind.get_field_index("bytes") >= 0):
        raise UserError(
            f"{path}: the column '{image}' is {kind}; expected binary, or a struct with a binary field 'bytes'"
        )
    return file


def _rows(paths: Sequence[Path], files: Sequence[Any]) -> EncodedRows:
    size = sum(_size(file) for file in files)
    if size <= IN_MEMORY:
        parts = list(_batches(paths, files))
        lengths, kinds = (np.concatenate([part[i] for part in parts]) for i in (1, 2))
        if (kinds == _NULL).all():
            raise UserError(f"{paths[0]}: every value of the column '{_image(files[0])}' is null")
        return EncodedRows(np.cumsum(lengths), kinds, b"".join(part[0] for part in parts))
    packed = cache_file("parquet", paths, ".bin")
    copy = _copy(paths, files, packed, size)
    if copy is not None:
        return EncodedRows(copy.arrays["ends"], copy.arrays["kinds"], packed)
    raise UserError(
        f"{paths[0].parent}: {size / 1e9:.1f} GB of images must be copied once to be read in any order, and the cache "
        f"folder {packed.parent} has no room for them ({_free(packed.parent) / 1e9:.1f} GB are free). Name a larger "
        "folder in DINO_FAST_CACHE"
    )


def _free(folder: Path) -> int:
    """Bytes that are free where `folder` is or would be made."""
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free


def _copy(paths: Sequence[Path], files: Sequence[Any], packed: Path, size: int) -> Index | None:
    """The index of the flat copy, which is made where there is none; None where it has no room."""
    described = packed.with_suffix(".safetensors")
    made = load(described)
    if made is not None and holds(made) and packed.is_file() and packed.stat().st_size == made.facts["size"]:
        return made
    temporary = packed.with_name(f"{packed.name}.{os.getpid()}.part")
    try:
        packed.parent.mkdir(parents=True, exist_ok=True)
        if _free(packed.parent) < size + _SPARE:
            return None
        warnings.warn(
            f"copying {size / 1e9:.1f} GB of images to {packed} once, so that they can be read in any order "
            "(DINO_FAST_CACHE names another folder)",
            stacklevel=3,
        )
        watched = watch(paths)
        lengths, kinds = [], []
        with open(temporary, "wb") as out:
            for data, part_lengths, part_kinds in _batches(paths, files):
                out.write(data)
                lengths.append(part_lengths)
                kinds.append(part_kinds)
        ends = np.cumsum(np.concatenate(lengths))
        index = Index({"ends": ends, "kinds": np.concatenate(kinds)}, {"size": temporary.stat().st_size}, **watched)
        temporary.replace(packed)
        save(described, index)
        return index
    except OSError:  # a full disk, a quota, no permission
        return None
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


def _batches(paths: Sequence[Path], files: Sequence[Any]) -> Iterator[tuple[bytes, np.ndarray, np.ndarray]]:
    """The images row group by row group: their bytes joined, lengths [n], kinds [n]."""
    import pyarrow

    for path, file in zip(paths, files, strict=True):
        try:
            for batch in file.iter_batches(256, columns=[_image(file)]):
                yield _pack(batch.column(0))
        except (pyarrow.ArrowException, OSError) as error:
            raise UserError(f"{path}: not a readable Parquet file ({error})") from error


def _pack(column: Any) -> tuple[bytes, np.ndarray, np.ndarray]:
    """An array of bytes, or of structs of bytes and path -> (joined, lengths, kinds)."""
    values, paths = column, None
    if not _is_bytes(column.type):
        values = _field(column, "bytes")
        paths = _field(column, "path") if column.type.get_field_index("path") >= 0 else None
    kinds, parts = np.full(len(column), _BYTES, np.int8), []
    for row in range(len(column)):
        buffer = values[row].as_buffer()
        if buffer is None:
            text = paths[row].as_py() if paths is not None else None
            kinds[row] = _NULL if text is None else _PATH
            buffer = b"" if text is None else os.fsencode(text)
        parts.append(buffer)
    return b"".join(parts), np.array([len(part) for part in parts], np.int64), kinds


def _field(column: Any, name: str) -> Any:
    import pyarrow.compute

    return pyarrow.compute.struct_field(column, name)


def _is_bytes(kind: Any) -> bool:
    import pyarrow

    return bool(pyarrow.types.is_binary(kind) or pyarrow.types.is_large_binary(kind))


def _image(file: Any) -> str:
    return next(name for name in IMAGE_COLUMNS if name in file.schema_arrow.names)


def _size(file: Any) -> int:
    """Bytes of the image column, uncompressed, as the footer says."""
    groups = [file.metadata.row_group(g) for g in range(file.num_row_groups)]
    columns = [group.column(c) for group in groups for c in range(group.num_columns)]
    return sum(c.total_uncompressed_size for c in columns if c.path_in_schema.split(".")[0] == _image(file))


def _labels(files: Sequence[Any]) -> tuple[np.ndarray | None, list[str] | None]:
    import pyarrow

    schema = files[0].schema_arrow
    label = next((name for name in LABEL_COLUMNS if name in schema.names), None)
    if label is None:
        return None, None
    tables = [file.read(columns=[label]) for file in files if label in file.schema_arrow.names]
    if len(tables) < len(files):
        raise UserError(f"some of the Parquet files have a column '{label}' and others have none; use one kind")
    column = pyarrow.concat_tables(tables, promote_options="permissive")[label]
    return numbers(column, _class_names(schema.metadata, label))


def numbers(column: Any, names: list[str] | None) -> tuple[np.ndarray, list[str] | None]:
    """A ChunkedArray of labels: whole numbers as they are, strings numbered in sorted order, null as -1."""
    import pyarrow

    if pyarrow.types.is_string(column.type) or pyarrow.types.is_large_string(column.type):
        names = sorted(value for value in column.unique().to_pylist() if value is not None)
        number = {name: i for i, name in enumerate(names)}
        return np.array([number.get(value, -1) for value in column.to_pylist()], np.int64), names
    return column.cast(pyarrow.int64()).fill_null(-1).to_numpy().astype(np.int64), names


def _class_names(metadata: dict[bytes, bytes] | None, label: str) -> list[str] | None:
    """Class names as Hugging Face datasets writes them into the schema."""
    try:
        return list(json.loads((metadata or {})[b"huggingface"])["info"]["features"][label]["names"])
    except (KeyError, TypeError, ValueError):
        return None
