"""Features of any images in a table: one row an image, its name and label beside them, also for those that failed.

The images are read and centered as an evaluation does, by threads ahead of the network. Rows are kept in pieces beside
the output, in OUT.parts/, so that the same call continues one that was interrupted; the output appears whole.
"""

from __future__ import annotations

import contextlib
import csv
import hashlib
import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from dino_fast.atomic import atomic_write
from dino_fast.data import ImageError, Source, open_source
from dino_fast.data.eval_loader import centered_images
from dino_fast.defaults import torch_defaults
from dino_fast.errors import UserError, make_folder, unwritable
from dino_fast.eval.common.backbone import Frozen, open_backbone
from dino_fast.eval.loaded import Backbone, feature_of
from dino_fast.progress import watched

ENDINGS = (".parquet", ".npy", ".csv")
_PIECE = 1 << 26  # bytes of features, at most, that a piece holds
_ROWS = 1024  # images, at most, of a piece


@dataclass(frozen=True)
class Embeddings:
    """Features float32 `[N, dim]`, or `[N, patches, dim]`, of N images, with their names and labels.

    A label is the class's name, or its number where classes have none, or None. `errors` says of the images that could
    not be read why, by row; their features are NaN.
    """

    features: np.ndarray
    paths: list[str]
    labels: list[Any]
    errors: dict[int, str] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.paths)

    def readable(self) -> Embeddings:
        """Without the rows of images that could not be read."""
        rows = [row for row in range(len(self)) if row not in self.errors]
        return Embeddings(self.features[rows], [self.paths[r] for r in rows], [self.labels[r] for r in rows])

    @classmethod
    def read(cls, path: str | Path) -> Embeddings:
        """What `dino-fast embed` wrote. Raises UserError for another file."""
        path = Path(path)
        try:
            return {".parquet": _read_parquet, ".npy": _read_npy, ".csv": _read_csv}[path.suffix](path)
        except (KeyError, OSError, ValueError, StopIteration) as error:
            raise UserError(f"{path} is no file of 'dino-fast embed' that can be read: {error}") from error


def embed(
    images: Any,
    run_or_file: Any,
    out: str | Path | None = None,
    *,
    features: str = "cls",
    which: str = "teacher",
    image_size: int | None = None,
    batch_size: int = 64,
    device: str | None = None,
) -> Embeddings:
    """Features of all `images` (what `open_source` takes; both parts of a set with a test part) by a checkpoint.

    Args:
        images: a folder, list, .parquet, ... or Python objects: an array, a list of PIL images, a Dataset.
        run_or_file: what `dino_fast.load` takes, or the backbone that it returned.
        out: a .parquet, .npy or .csv file to write; the same call continues one that was interrupted.
        features: "cls" [N, dim], "mean" of the patch tokens [N, dim], or "patches" [N, patches, dim].
        which: "teacher" or "student".
        image_size: pixels, by default what the checkpoint was trained for.
        batch_size: images of a forward pass.
        device: by default a GPU where there is one.

    Raises UserError for what cannot be opened, none of the images readable, and an `out` that exists.
    """
    if out is not None:
        options = {"features": features, "which": which, "image_size": image_size, "batch_size": batch_size}
        write_embeddings(images, run_or_file, out, **options, device=device)
        return Embeddings.read(out)
    job = _Job(images, run_or_file, features, which, image_size, batch_size, device)
    pieces = list(job.pieces(0))
    job.check(pieces)
    errors = {row: text for piece in pieces for row, text in piece.errors.items()}
    rows = range(len(job.source))
    return Embeddings(
        np.concatenate([piece.features for piece in pieces]),
        [job.source.name(row) for row in rows],
        [job.label(row) for row in rows],
        errors,
    )


def write_embeddings(images: Any, run_or_file: Any, out: str | Path, **options: Any) -> dict[str, Any]:
    """`embed` to a file, with its options.

    Returns `out`, `images` (how many), `errors` (name -> reason of each that could not be read), `shape` of an image's
    features, `continued` (rows that were there from an interrupted call).
    """
    out = Path(out).expanduser()
    if out.suffix not in ENDINGS:
        raise UserError(f"--out {out.name} must end in {', '.join(ENDINGS)}: the ending says the format")
    if options.get("features") == "patches" and out.suffix == ".csv":
        raise UserError("the features of patches do not fit into a .csv; use --out with .parquet or .npy")
    if out.exists():
        raise UserError(f"--out {out} exists; give another name, or delete it")
    make_folder(out.absolute().parent)
    names = ("features", "which", "image_size", "batch_size", "device")
    defaults = dict(zip(names, ("cls", "teacher", None, 64, None), strict=True))
    job = _Job(images, run_or_file, **{**defaults, **options})
    folder = out.with_name(f"{out.name}.parts")
    try:
        done = _open_folder(folder, job.fingerprint())
        first = len(done)
        try:
            for piece in job.pieces(first):
                done.append(_save(folder, len(done), piece))
        except KeyboardInterrupt as error:
            count = min(len(done) * job.rows, len(job.source))
            raise KeyboardInterrupt(
                f"interrupted after {count:,} of {len(job.source):,} images; the same command continues there"
            ) from error
        pieces = [_load(file) for file in done]
        job.check(pieces)
        with atomic_write(out) as temporary:
            {".parquet": _write_parquet, ".npy": _write_npy, ".csv": _write_csv}[out.suffix](temporary, job, done)
            if out.suffix == ".npy":
                _write_rows(_rows_file(out), job, done)
    except OSError as error:
        raise unwritable(out, error) from error
    shutil.rmtree(folder, ignore_errors=True)
    errors = {job.source.name(row): text for piece in pieces for row, text in piece.errors.items()}
    shape = list(next(piece.features.shape[1:] for piece in pieces))
    continued = min(first * job.rows, len(job.source))
    return {"out": str(out), "images": len(job.source), "errors": errors, "shape": shape, "continued": continued}


@dataclass
class _Piece:
    """Rows of the table: features of some images in order, NaN where `errors` says why."""

    first: int
    features: np.ndarray
    errors: dict[int, str]


class _Job:
    """Images, the network, and what to take of it."""

    def __init__(
        self,
        images: Any,
        run_or_file: Any,
        features: str,
        which: str,
        image_size: int | None,
        batch_size: int,
        device: str | None,
    ) -> None:
        if batch_size < 1:
            raise UserError(f"--batch-size is {batch_size}; it must be 1 or more")
        source = open_source([images] if isinstance(images, Image.Image) else images)
        self.source = source if source.test is None else _Joined([source, source.test])
        if isinstance(run_or_file, Backbone):
            net = run_or_file
            frozen = Frozen(net.backbone, net.mean, net.std, net.name, net.which, net.device)
        else:
            frozen = open_backbone(run_or_file, which, device, tokens=False)
        self.frozen, self.features, self.batch_size = frozen, features, batch_size
        self.take = feature_of(frozen.backbone, features)
        self.size = frozen.size(image_size)
        self.source.channels = frozen.backbone.in_chans
        with torch_defaults(), torch.no_grad():
            blank = torch.zeros(1, frozen.backbone.in_chans, *self.size, dtype=torch.float32, device=frozen.device)
            self.shape = tuple(self.take(blank).shape[1:])
        self.rows = max(1, min(_ROWS, _PIECE // (4 * int(np.prod(self.shape)))))

    def label(self, row: int) -> Any:
        """The class's name, or number, or None."""
        label = self.source.label(row)
        return label if label is None or self.source.classes is None else self.source.classes[label]

    def fingerprint(self) -> str:
        """Changes with the weights, the kind of features, and the images' names."""
        frozen = self.frozen
        about = (self.features, self.size, self.shape, frozen.mean, frozen.std, self.rows, len(self.source))
        digest = hashlib.sha256(repr(about).encode())
        for name, tensor in frozen.backbone.state_dict().items():
            digest.update(name.encode())
            digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
        for row in range(len(self.source)):
            digest.update(self.source.name(row).encode(errors="surrogateescape") + b"\n")
        return digest.hexdigest()[:32]

    def pieces(self, done: int) -> Iterator[_Piece]:
        """The pieces after the first `done`, in order."""
        first, total = done * self.rows, len(self.source)
        piece = self._blank(first)
        images: list[torch.Tensor] = []
        places: list[int] = []
        found = watched(centered_images(self.source, self.size, first), total - first, "images embedded")
        for row, image in enumerate(found, first):
            if isinstance(image, ImageError):
                piece.errors[row] = str(image)
            else:
                images.append(image)
                places.append(row - piece.first)
            complete = row + 1 == total or row + 1 == piece.first + self.rows
            if images and (complete or len(images) == self.batch_size):
                piece.features[places] = self._run(images)
                images, places = [], []
            if complete:
                yield piece
                piece = self._blank(row + 1)

    def check(self, pieces: list[_Piece]) -> None:
        """Raises UserError where not one image could be read."""
        errors = {row: text for piece in pieces for row, text in piece.errors.items()}
        if len(errors) == len(self.source):
            raise UserError(
                f"none of the {len(self.source)} images can be read; the first: {next(iter(errors.values()))}"
            )

    def _blank(self, first: int) -> _Piece:
        count = min(self.rows, len(self.source) - first)
        return _Piece(first, np.full((max(count, 0), *self.shape), np.nan, np.float32), {})

    def _run(self, images: list[torch.Tensor]) -> np.ndarray:
        with torch_defaults(), torch.no_grad():
            made = self.take(self.frozen.normalize(torch.stack(images))).float().cpu()
        if not made.isfinite().all():
            raise UserError("the backbone gives features that are not finite: its weights are damaged or have diverged")
        return made.numpy()  # type: ignore[no-any-return]


class _Joined(Source):
    """Sources one after the other, whose classes are numbered alike."""

    def __init__(self, parts: list[Source]) -> None:
        self.parts = parts
        self.starts = np.cumsum([0, *map(len, parts)])
        self.classes = parts[0].classes
        if any(part.labels is not None for part in parts):
            labels = [np.full(len(p), -1, np.int64) if p.labels is None else p.labels for p in parts]
            self.labels = np.concatenate(labels)

    @property
    def channels(self) -> int:  # type: ignore[override]
        return self.parts[0].channels

    @channels.setter
    def channels(self, value: int) -> None:
        for part in self.parts:
            part.channels = value

    def __len__(self) -> int:
        return int(self.starts[-1])

    def prepare(self) -> None:
        for part in self.parts:
            part.prepare()

    def name(self, index: int) -> str:
        part, place = self._at(index)
        return part.name(place)

    def read(self, index: int) -> torch.Tensor:
        part, place = self._at(index)
        return part.read(place)

    def _at(self, index: int) -> tuple[Source, int]:
        which = int(np.searchsorted(self.starts, index, side="right")) - 1
        return self.parts[which], index - int(self.starts[which])


# ---- pieces on disk ----


def _open_folder(folder: Path, fingerprint: str) -> list[Path]:
    """The pieces that are there, from the first on without a gap. Raises UserError where they are of other features."""
    about = folder / "about.json"
    if folder.exists():
        try:
            known = json.loads(about.read_text(encoding="utf-8"))["fingerprint"]
        except (OSError, ValueError, KeyError):
            known = None
        if known != fingerprint:
            raise UserError(
                f"{folder} is left of an interrupted call with other images, weights or options; delete it to begin "
                "anew, or repeat that call to continue it"
            )
    else:
        folder.mkdir()
        with atomic_write(about) as temporary:
            temporary.write_text(json.dumps({"fingerprint": fingerprint}) + "\n", encoding="utf-8")
    done: list[Path] = []
    while (file := folder / f"{len(done):08d}.safetensors").exists():
        done.append(file)
    return done


def _save(folder: Path, number: int, piece: _Piece) -> Path:
    from safetensors.numpy import save_file

    file = folder / f"{number:08d}.safetensors"
    facts = {"first": str(piece.first), "errors": json.dumps({str(row): text for row, text in piece.errors.items()})}
    with atomic_write(file) as temporary:
        save_file({"features": piece.features}, temporary, facts)
    return file


def _load(file: Path) -> _Piece:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, "np") as kept:
            facts = kept.metadata()
            errors = {int(row): text for row, text in json.loads(facts["errors"]).items()}
            return _Piece(int(facts["first"]), kept.get_tensor("features"), errors)
    except (SafetensorError, KeyError, ValueError) as error:
        raise UserError(f"{file} is damaged ({error}); delete it and those after it, then repeat the call") from error


# ---- formats ----


def _write_parquet(path: Path, job: _Job, files: list[Path]) -> None:
    import pyarrow
    from pyarrow import parquet

    kind = pyarrow.float32()
    for length in reversed(job.shape):
        kind = pyarrow.list_(kind, length)
    label = pyarrow.int64() if job.source.classes is None else pyarrow.string()
    fields = [("path", pyarrow.string()), ("label", label), ("feature", kind), ("error", pyarrow.string())]
    schema = pyarrow.schema(fields)
    with parquet.ParquetWriter(path, schema) as writer:
        for file in files:
            piece = _load(file)
            rows = range(piece.first, piece.first + len(piece.features))
            column = pyarrow.array(np.ascontiguousarray(piece.features).reshape(-1))
            for length in reversed(job.shape[1:]):
                column = pyarrow.FixedSizeListArray.from_arrays(column, length)
            unread = pyarrow.array([row in piece.errors for row in rows])
            column = pyarrow.FixedSizeListArray.from_arrays(column, job.shape[0], mask=unread)
            columns = [
                pyarrow.array([job.source.name(row) for row in rows], pyarrow.string()),
                pyarrow.array([job.label(row) for row in rows], label),
                column,
                pyarrow.array([piece.errors.get(row) for row in rows], pyarrow.string()),
            ]
            writer.write_table(pyarrow.Table.from_arrays(columns, schema=schema))


def _write_npy(path: Path, job: _Job, files: list[Path]) -> None:
    shape = (len(job.source), *job.shape)
    with open(path, "wb") as file:
        header = {"descr": "<f4", "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(file, header)
        for piece in map(_load, files):
            file.write(piece.features.astype("<f4", copy=False).tobytes())


def _write_rows(path: Path, job: _Job, files: list[Path]) -> None:
    with atomic_write(path) as temporary, open(temporary, "w", encoding="utf-8", newline="") as file:
        table = csv.writer(file)
        table.writerow(["path", "label", "error"])
        for piece in map(_load, files):
            for row in range(piece.first, piece.first + len(piece.features)):
                table.writerow([job.source.name(row), job.label(row), piece.errors.get(row)])


def _write_csv(path: Path, job: _Job, files: list[Path]) -> None:
    with open(path, "w", encoding="utf-8", newline="") as file:
        table = csv.writer(file)
        table.writerow(["path", "label", "error", *(f"f{i}" for i in range(job.shape[0]))])
        for piece in map(_load, files):
            for row, values in enumerate(piece.features, piece.first):
                numbers = [] if row in piece.errors else [repr(x) for x in values.tolist()]
                table.writerow([job.source.name(row), job.label(row), piece.errors.get(row), *numbers])


def _rows_file(path: Path) -> Path:
    """Beside an .npy: the names, labels and errors of its rows."""
    return path.with_suffix(".rows.csv")


def _read_parquet(path: Path) -> Embeddings:
    from pyarrow import parquet, types

    table = parquet.read_table(path)
    errors = {row: text for row, text in enumerate(table["error"].to_pylist()) if text}
    column, shape = table["feature"].combine_chunks(), [len(table)]
    while types.is_fixed_size_list(column.type):
        shape.append(column.type.list_size)
        column = column.values  # with those of null rows
    features = np.array(column.to_numpy(zero_copy_only=False), np.float32).reshape(shape)
    features[list(errors)] = np.nan
    return Embeddings(features, table["path"].to_pylist(), table["label"].to_pylist(), errors)


def _read_npy(path: Path) -> Embeddings:
    features = np.load(path, mmap_mode="r", allow_pickle=False)
    with open(_rows_file(path), encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    return _from_rows(features, rows)


def _read_csv(path: Path) -> Embeddings:
    with open(path, encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    names = [name for name in rows[0] if name not in ("path", "label", "error")]
    features = np.array([[float(row[name] or "nan") for name in names] for row in rows], np.float32)
    return _from_rows(features, rows)


def _from_rows(features: np.ndarray, rows: list[dict[str, str]]) -> Embeddings:
    labels: list[Any] = [row["label"] or None for row in rows]
    with contextlib.suppress(ValueError):  # numbers, unless one is a name
        labels = [None if label is None else int(label) for label in labels]
    errors = {place: row["error"] for place, row in enumerate(rows) if row["error"]}
    return Embeddings(features, [row["path"] for row in rows], labels, errors)
