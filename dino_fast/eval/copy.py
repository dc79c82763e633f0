"""Copy detection: each query is a distorted copy of an image of the database, which should be ranked first.

As the original's eval_copy_detection.py: a feature is the class token beside the generalized mean of the patch tokens
(power 4, of tokens raised to at least 1e-6), whitened by the principal components of a set of images and scaled to
length 1. Whitening subtracts the set's mean, but its components are those of the covariance about zero, both of the
features as they are, not scaled to length 1. Average precision counts the first 20 of a ranking.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dino_fast.defaults import torch_defaults
from dino_fast.errors import UserError
from dino_fast.eval.common.backbone import Frozen, open_backbone
from dino_fast.eval.common.frames import list_images, resize
from dino_fast.eval.retrieval import Question, mean_precision, scores
from dino_fast.progress import watched

_POWER, _LEAST = 4, 1e-6
_FLOOR = 1e-5  # of the largest variance; smaller ones are raised to it, as in the original
_RANKED = 20  # of each ranking


@dataclass
class Whitening:
    """x -> (x - mean) @ matrix, scaled to length 1."""

    mean: Tensor  # [dim]
    matrix: Tensor  # [dim, components]

    def __call__(self, features: Tensor) -> Tensor:
        """`[N, dim]` -> `[N, components]` of length 1."""
        return F.normalize((features - self.mean) @ self.matrix, dim=1)


def whitening(features: Tensor) -> Whitening:
    """Learns the whitening of features `[N, dim]` (not scaled to length 1), in float64.

    The matrix holds the principal components of the second moments x^T x / N, which are not centered, each divided by
    the square root of its eigenvalue: the original's PCA with exponent 0.5. Raises UserError for fewer than 2 images,
    or where all of them have one feature.
    """
    if len(features) < 2:
        raise UserError(f"whitening was to be learned from {len(features)} image; give at least 2, better thousands")
    x = features.double()
    mean = x.mean(dim=0)
    if not (x - mean).abs().amax() > 0:
        raise UserError("whitening cannot be learned: all images given for it have the same feature")
    moment, vectors = torch.linalg.eigh(x.T @ x / len(x))  # rising
    moment = moment.clamp(min=moment[-1] * _FLOOR).flip(0)
    return Whitening(mean.to(features), (vectors.flip(1) * moment.rsqrt()).to(features))


def copy_feature(tokens: Tensor) -> Tensor:
    """Normalized tokens `[B, 1 + N, dim]` -> float32 `[B, 2 * dim]`: class token, generalized mean of the patches."""
    pooled = tokens[:, 1:].float().clamp(min=_LEAST).pow(_POWER).mean(dim=1).pow(1 / _POWER)
    return torch.cat((tokens[:, 0].float(), pooled), dim=1)


@torch.no_grad()
def extract(frozen: Frozen, paths: list[Path], size: int, batch_size: int = 32) -> Tensor:
    """Features `[N, 2 * dim]` of images made `size` x `size`, on the CPU. Raises ImageError for an unreadable one."""
    parts = []
    starts = range(0, len(paths), batch_size)
    for start in watched(starts, len(starts), "batches of features"):
        images = [frozen.read(path) for path in paths[start : start + batch_size]]
        batch = torch.stack([resize(image, size, size) for image in images])
        parts.append(copy_feature(frozen.backbone.forward_features(frozen.normalize(batch))).cpu())
    features = torch.cat(parts)
    if not features.isfinite().all():
        raise UserError("the backbone gives features that are not finite: its weights are damaged or have diverged")
    return features


def match(queries: list[str], database: list[str], pattern: str | None = None) -> list[list[int]]:
    """Rows of the database that each query is a copy of, by name.

    Names are paths below their folders. A copy and its original share the first group of the regular expression
    `pattern`, by default the file name without its ending. Raises UserError for a pattern that is none, has no group
    or is not in a name.
    """
    try:
        compiled = re.compile(pattern) if pattern is not None else None
    except re.error as error:
        raise UserError(f"--match {pattern!r} is no regular expression: {error}") from error
    if compiled is not None and compiled.groups < 1:
        raise UserError(
            f"--match {pattern!r} has no group: put brackets around the part that a copy and its original share"
        )

    def key(name: str) -> str:
        if compiled is None:
            return Path(name).stem
        hit = compiled.search(name)
        if hit is None:
            raise UserError(f"--match {pattern!r} is nowhere in the name '{name}'")
        return hit.group(1)

    rows: dict[str, list[int]] = {}
    for i, name in enumerate(database):
        rows.setdefault(key(name), []).append(i)
    return [rows.get(key(name), []) for name in queries]


@torch_defaults()
def evaluate(
    checkpoint: str | Path,
    data: str | Path,
    test: str | Path,
    *,
    distractors: str | Path | None = None,
    whiten: str | Path | None = None,
    use_whitening: bool = True,
    pattern: str | None = None,
    image_size: int | None = None,
    which: str = "teacher",
    device: str | None = None,
) -> dict[str, Any]:
    """Mean average precision of the copies `test` among the originals `data` and the `distractors`.

    A copy scores by the places of its originals among the first 20 of its ranking. Whitening is learned from the images
    of `whiten`, by default the originals and distractors. `image_size` defaults to 320 in whole patches.

    Returns `map`, `first` (share of queries whose original is ranked first), `database`, `queries`, `left_out` (queries
    without original), `whitened_on` (images, 0 without) and the settings.
    """
    originals, copies = list_images(data), list_images(test)
    rows = match([_name(path, test) for path in copies], [_name(path, data) for path in originals], pattern)
    if not any(rows):
        raise UserError(
            f"no file name of {test} is one of {data}: copies are found by name, so name each as its original, or say "
            "with --match which part of the name they share"
        )
    others = [] if distractors is None else list_images(distractors)
    frozen = open_backbone(checkpoint, which, device)
    patch = frozen.backbone.patch_size
    size = frozen.size(image_size)[0] if image_size is not None else max(1, round(320 / patch)) * patch
    database = extract(frozen, originals + others, size)
    queries = extract(frozen, copies, size)
    learned = database if whiten is None or not use_whitening else extract(frozen, list_images(whiten), size)
    if use_whitening:
        white = whitening(learned)
        database, queries = white(database), white(queries)
    else:
        database, queries = F.normalize(database, dim=1), F.normalize(queries, dim=1)
    questions = [Question(row, [], []) for row in rows]
    value, unanswered = mean_precision(scores(queries, database, questions, ranked=_RANKED))
    best = (queries @ database.T).argmax(dim=1).tolist()
    return {
        "map": value,
        "first": sum(place in row for place, row in zip(best, rows, strict=True)) / (len(rows) - unanswered),
        "database": len(database),
        "queries": len(rows) - unanswered,
        "left_out": {"queries without an original": unanswered},
        "whitened_on": len(learned) if use_whitening else 0,
        "feature": f"class token and pooled patches [{database.shape[1]}]",
        "image_size": size,
        "which": which,
        "checkpoint": str(checkpoint),
    }


def _name(path: Path, root: str | Path) -> str:
    root = Path(root).expanduser()
    return path.relative_to(root).as_posix() if root.is_dir() else path.name
