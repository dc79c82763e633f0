"""Features of a whole source, kept in files between evaluations.

A file of features is found again by its inputs: the weights, the kind of feature, the image size and the
list of images with their sizes and times. Anything else is another file, so a stale one is never read.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

from torch import Tensor

from dino_fast.atomic import atomic_write
from dino_fast.data import ArraySource, ImageError, Source, Subset, eval_batches
from dino_fast.data.formats.folder import FileSource
from dino_fast.errors import UserError
from dino_fast.eval.common.backbone import Feature, Frozen
from dino_fast.knn import extract_features
from dino_fast.progress import watched


def labeled_features(
    frozen: Frozen,
    source: Source,
    size: tuple[int, int],
    feature: Feature,
    kind: str,
    batch_size: int = 128,
    cache: Path | None = None,
) -> tuple[Tensor, Tensor]:
    """Features `[N, dim]` and labels `[N]` of the labeled, readable images of `source`, from `cache` if there.

    `kind` names the feature. Raises UserError where not one image has both a label and readable pixels.
    """
    frozen.prepare(source)
    path = None if cache is None else cache / f"{_fingerprint(frozen, source, size, kind)}.safetensors"
    extracted = None if path is None or not path.exists() else _read(path)
    if extracted is None:
        batches = eval_batches(source, size, frozen.mean, frozen.std, batch_size)
        batches = watched(batches, -(-len(source) // batch_size), "batches of features")
        extracted = extract_features(frozen.backbone, batches, feature)
        if path is not None:
            _write(path, *extracted)
    features, labels = extracted
    if not (labels >= 0).any():
        raise UserError("no image that can be read has a label")
    return features[labels >= 0], labels[labels >= 0]


def _fingerprint(frozen: Frozen, source: Source, size: tuple[int, int], kind: str) -> str:
    settings = (kind, size, frozen.mean, frozen.std, len(source), source.channels, source.pixel_range)
    digest = hashlib.sha256(repr(settings).encode())
    for name, tensor in frozen.backbone.state_dict().items():
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    if source.labels is not None:
        digest.update(source.labels.tobytes())
    for index in range(len(source)):
        digest.update(_identity(source, index))
    return digest.hexdigest()[:32]


def _identity(source: Source, index: int) -> bytes:
    """Changes with the image: its file's name, size and time, or its bytes."""
    if isinstance(source, Subset):
        return _identity(source.source, int(source.indices[index]))
    if isinstance(source, FileSource):
        path = source.path(index)
        try:
            stat = path.stat()
        except OSError:
            return repr((str(path), None)).encode()
        return repr((str(path.resolve()), stat.st_size, stat.st_mtime_ns)).encode()
    if isinstance(source, ArraySource):
        return source.images[index].numpy().tobytes()
    try:
        return hashlib.sha256(source.data(index)).digest()
    except TypeError:  # no encoded images
        return hashlib.sha256(_pixels(source, index)).digest()
    except ImageError as error:
        return str(error).encode()


def _pixels(source: Source, index: int) -> bytes:
    try:
        return source.read(index).contiguous().numpy().tobytes()
    except ImageError as error:
        return str(error).encode()


def _read(path: Path) -> tuple[Tensor, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        tensors = load_file(path)
        return tensors["features"], tensors["labels"]
    except (SafetensorError, OSError, KeyError) as error:
        raise UserError(f"the cached features {path} are damaged ({error}); delete the file") from error


def _write(path: Path, features: Tensor, labels: Tensor) -> None:
    from safetensors.torch import save_file

    try:
        with atomic_write(path) as temporary:
            save_file({"features": features, "labels": labels}, temporary)
    except OSError as error:
        raise UserError(f"cannot keep features in {path.parent}: {error.strerror or error}") from error
