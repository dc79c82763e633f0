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
from typing_extensions import override

from dino_fast.data.decode import ImageError
from dino_fast.data.index_cache import Index, cache_file, holds, load, save, watch
from dino_fast.data.labels import LABEL_COLUMNS, Labels, class_numbers
from dino_fast.data.source import Source, lfs_pointer, printable, read_file
from dino_fast.errors import UserError

# Names of columns that hold images, in any case, those before others.
IMAGE_COLUMNS = ("image", "img", "images", "image_bytes", "jpg", "jpeg", "png", "webp", "pixel_values")
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
        self.labels, self.classes, self.unused_labels = _labels(self.paths, files)
        self._rows = _rows(self.paths, files)

    def __len__(self) -> int:
        return int(self._starts[-1])

    @override
    def name(self, index: int) -> str:
        part = int(np.searchsorted(self._starts, index, side="right")) - 1
        return f"{self.paths[part]}, row {index - self._starts[part]}"

    @override
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
            return read_file(self.paths[part].parent / os.fsdecode(data))
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


def count_rows(paths: Sequence[Path]) -> int:
    """Rows of the files, by their footers. Raises UserError for a file without images."""
    return sum(_open(path).metadata.num_rows for path in paths)


def find_column(names: Sequence[str], known: Sequence[str]) -> str | None:
    """The column whose name comes first in `known`, in any case."""
    lower = {name.lower(): name for name in reversed(names)}
    return next((lower[name] for name in known if name in lower), None)


def _open(path: Path) -> Any:
    """The file with its footer read and its columns checked."""
    import pyarrow
    import pyarrow.parquet as parquet

    try:
        file = parquet.ParquetFile(path)
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(lfs_pointer(path) or f"{path}: not a readable Parquet file ({error})") from error
    names = file.schema_arrow.names
    image = find_column(names, IMAGE_COLUMNS)
    if image is None:
        raise UserError(
            f"{path} has the columns {', '.join(names) or '(none)'}; expected 'image' (bytes, or a struct of bytes "
            f"and path, as Hugging Face datasets stores images), or one of {', '.join(IMAGE_COLUMNS[1:])}, and "
            "optionally 'label'"
        )
    kind = file.schema_arrow.field(image).type
    if not _holds_images(kind):
        raise UserError(
            f"{path}: the column '{image}' is {kind}; expected binary, or a struct with a binary field 'bytes' (or a "
            "list or a dictionary of these)"
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
    column = _plain(column)
    values, paths = column, None
    if not _is_bytes(column.type):
        values = _plain(_field(column, "bytes"))
        paths = _plain(_field(column, "path")) if column.type.get_field_index("path") >= 0 else None
    kinds, parts = np.full(len(column), _BYTES, np.int8), []
    for row in range(len(column)):
        buffer = values[row].as_buffer()
        if buffer is None:
            text = paths[row].as_py() if paths is not None else None
            kinds[row] = _NULL if text is None else _PATH
            buffer = b"" if text is None else os.fsencode(text)
        parts.append(buffer)
    return b"".join(parts), np.array([len(part) for part in parts], np.int64), kinds


def _plain(column: Any) -> Any:
    """Without a dictionary, and of a list its first value."""
    import pyarrow

    types = pyarrow.types
    if types.is_dictionary(column.type):
        return _plain(column.dictionary_decode())
    if _is_list(column.type):
        rows, values = np.asarray(pyarrow.compute.list_parent_indices(column)), column.flatten()
        first = np.searchsorted(rows, np.arange(len(column)))  # where the row's values begin, if it has any
        here = np.append(rows, -1)[first] == np.arange(len(column))
        return _plain(values.take(pyarrow.array(np.where(here, first, 0), mask=~here)))
    return column


def _field(column: Any, name: str) -> Any:
    import pyarrow.compute

    return pyarrow.compute.struct_field(column, name)


def _holds_images(kind: Any) -> bool:
    """Whether `_pack` takes the type."""
    import pyarrow

    if pyarrow.types.is_dictionary(kind) or _is_list(kind):
        return _holds_images(kind.value_type)
    if pyarrow.types.is_struct(kind):
        place = kind.get_field_index("bytes")
        return place >= 0 and _is_bytes(kind.field(place).type)
    return _is_bytes(kind)


def _is_list(kind: Any) -> bool:
    import pyarrow

    types = pyarrow.types
    return bool(types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind))


def _is_bytes(kind: Any) -> bool:
    import pyarrow

    types = pyarrow.types
    return bool(types.is_binary(kind) or types.is_large_binary(kind) or types.is_binary_view(kind))


def _image(file: Any) -> str:
    return find_column(file.schema_arrow.names, IMAGE_COLUMNS) or ""


def _size(file: Any) -> int:
    """Bytes of the image column, uncompressed, as the footer says."""
    groups = [file.metadata.row_group(g) for g in range(file.num_row_groups)]
    columns = [group.column(c) for group in groups for c in range(group.num_columns)]
    return sum(c.total_uncompressed_size for c in columns if c.path_in_schema.split(".")[0] == _image(file))


def _labels(paths: Sequence[Path], files: Sequence[Any]) -> Labels:
    """The labels of all files; those of a file without the column are none."""
    import pyarrow

    schemas = [file.schema_arrow for file in files]
    label = next((name for schema in schemas if (name := find_column(schema.names, LABEL_COLUMNS))), None)
    if label is None:
        return Labels(None)
    parts: list[Any] = []
    for path, file, schema in zip(paths, files, schemas, strict=True):
        if label not in schema.names:
            parts.append(pyarrow.chunked_array([pyarrow.nulls(file.metadata.num_rows)]))
            continue
        try:
            parts.append(file.read(columns=[label])[label])
        except (pyarrow.ArrowException, OSError) as error:
            raise UserError(f"{path}: not a readable Parquet file ({error})") from error
    where = f"the labels '{label}'"
    try:
        tables = [pyarrow.table({label: _without_dictionary(part)}) for part in parts]
        column = pyarrow.concat_tables(tables, promote_options="permissive")[label]
    except pyarrow.ArrowException:
        kinds = ", ".join(sorted({str(part.type) for part in parts}))
        return Labels(None, None, f"{where} are not used: the files hold several types ({kinds})")
    names = (_class_names(schema.metadata, label) for schema in schemas)
    return class_numbers(column, next(filter(None, names), None), where)


def _without_dictionary(column: Any) -> Any:
    import pyarrow

    return column.cast(column.type.value_type) if pyarrow.types.is_dictionary(column.type) else column


def _class_names(metadata: dict[bytes, bytes] | None, label: str) -> list[str] | None:
    """Class names as Hugging Face datasets writes them into the schema."""
    try:
        return list(json.loads((metadata or {})[b"huggingface"])["info"]["features"][label]["names"])
    except (KeyError, TypeError, ValueError):
        return None
