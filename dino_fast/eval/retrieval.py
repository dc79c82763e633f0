"""Image retrieval: the mean average precision of rankings of a database by cosine similarity to each query.

A feature is the class token averaged over the image at three sizes, 1, 1/sqrt 2 and 1/2. Relevant images are those of
the query's class, or are listed in a file in the manner of the revisited Oxford and Paris buildings
(Radenovic et al., CVPR 2018): easy, hard and junk images. Medium counts easy and hard ones as relevant and passes
over junk; Hard counts hard ones and passes over the others.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from dino_fast.data import Source, open_source
from dino_fast.data.formats.folder import FileSource
from dino_fast.data.labels import names_to_match
from dino_fast.defaults import torch_defaults
from dino_fast.errors import UserError, nearest
from dino_fast.eval.common.backbone import Frozen, open_backbone
from dino_fast.eval.common.frames import list_images
from dino_fast.ops.multi_crop import from_pillow, to_pillow
from dino_fast.progress import watched

SCALES = (1.0, 2**-0.5, 0.5)
_ROWS = 256  # queries ranked at once


@dataclass
class Question:
    """The images relevant to a query, as rows of the database."""

    easy: list[int]
    hard: list[int]
    junk: list[int]
    box: tuple[float, float, float, float] | None = None  # left, top, right, bottom: the part of the query that counts


def average_precision(
    similarity: Tensor, relevant: Tensor, ignored: Tensor | None = None, ranked: int | None = None
) -> Tensor:
    """Average precision of rankings by similarity `[Q, N]`: float64 `[Q]`, NaN where no image is relevant.

    `relevant` and `ignored` are bool `[Q, N]`; ignored images are taken out of the ranking. It is the area under
    precision over recall by the trapezoid rule, as in the published evaluation: the i-th relevant image at rank r (both
    from 0) adds (i / r + (i + 1) / (r + 1)) / 2, with i / r = 1 at r = 0, divided by the number of relevant images.
    With `ranked`, relevant images after that many places add nothing.
    """
    order = similarity.argsort(dim=1, descending=True, stable=True)
    right = relevant.gather(1, order)
    counted = torch.ones_like(right) if ignored is None else ~ignored.gather(1, order)
    right = right & counted
    rank = (counted.cumsum(dim=1) - 1).double()
    place = (right.cumsum(dim=1) - 1).double()  # i
    before = torch.where(rank > 0, place / rank.clamp(min=1), 1.0)
    after = (place + 1) / (rank + 1)
    scored = right if ranked is None else right & (rank < ranked)
    return torch.where(scored, (before + after) / 2, 0.0).sum(dim=1) / right.sum(dim=1)


@torch.no_grad()
def multi_scale_feature(frozen: Frozen, image: Tensor, longest: int, scales: tuple[float, ...] = SCALES) -> Tensor:
    """uint8 `[C, H, W]` -> float32 `[dim]` of length 1, on the CPU: the mean class token over the scales.

    As in the original's eval_image_retrieval.py the image is made to fit `longest` pixels (Pillow's thumbnail, LANCZOS,
    never enlarged), scaled bilinearly, and what is no whole patch at its right and lower edges is left out.
    """
    patch = frozen.backbone.patch_size
    planes = to_pillow(image)
    for plane in planes:
        plane.thumbnail((longest, longest), Image.Resampling.LANCZOS)
    pixels = frozen.normalize(from_pillow(planes)[None])
    total = torch.zeros(frozen.backbone.embed_dim, dtype=torch.float32, device="cpu")
    for scale in scales:
        small = F.interpolate(pixels, scale_factor=scale, mode="bilinear", align_corners=False)
        if min(small.shape[2:]) < patch:
            size = [max(patch, side) for side in small.shape[2:]]
            small = F.interpolate(pixels, size=size, mode="bilinear", align_corners=False)
        height, width = (side // patch * patch for side in small.shape[2:])
        total += frozen.backbone(small[:, :, :height, :width])[0].float().cpu()
    feature = F.normalize(total, dim=0)
    if not feature.isfinite().all():
        raise UserError("the backbone gives features that are not finite: its weights are damaged or have diverged")
    return feature


def scores(
    queries: Tensor, database: Tensor, questions: list[Question], hard: bool = False, ranked: int | None = None
) -> Tensor:
    """Average precision of each query `[Q]` (features `[Q, dim]`, `[N, dim]`), Medium or Hard; NaN: nothing to find.

    `ranked` limits the ranking, see `average_precision`.
    """
    parts = []
    for start in range(0, len(questions), _ROWS):
        asked = questions[start : start + _ROWS]
        relevant = torch.zeros(len(asked), len(database), dtype=torch.bool, device="cpu")
        ignored = torch.zeros_like(relevant)
        for row, question in enumerate(asked):
            relevant[row, question.hard if hard else question.easy + question.hard] = True
            ignored[row, question.junk + (question.easy if hard else [])] = True
        similarity = queries[start : start + _ROWS] @ database.T
        parts.append(average_precision(similarity, relevant & ~ignored, ignored, ranked))
    return torch.cat(parts)


def mean_precision(values: Tensor) -> tuple[float, int]:
    """(the mean of those that are not NaN, how many are)."""
    answered = values[~values.isnan()]
    return (answered.mean().item() if len(answered) else float("nan")), len(values) - len(answered)


@torch_defaults()
def evaluate(
    checkpoint: str | Path,
    data: str | Path,
    test: str | Path | None = None,
    *,
    ground_truth: str | Path | None = None,
    image_size: int = 224,
    scales: tuple[float, ...] = SCALES,
    which: str = "teacher",
    device: str | None = None,
) -> dict[str, Any]:
    """Mean average precision of the queries `test` in the database `data`.

    Without `test` the queries are the held-out part that came with `data`, or else each image of the database in turn
    searches all others. `ground_truth` is a JSON file (see docs/evaluation.md); without it images of a query's class
    are right. A query's own file in the database is passed over. Returns `map` (Medium), `map_hard` where the file
    names hard images, `database`, `queries`, `left_out` (queries with nothing to find), and the settings.
    """
    if ground_truth is None:
        names, read, questions = _labeled_questions(data, test)
    else:
        names, read, questions = _listed_questions(data, test, Path(ground_truth))
    if not all(0 < scale <= 4 for scale in scales) or not scales:
        raise UserError(f"scales are {list(scales)}; give one or more above 0 and up to 4")
    frozen = open_backbone(checkpoint, which, device, tokens=False)

    def feature(where: str, index: int, box: tuple[float, ...] | None = None) -> Tensor:
        image = read[where](index, frozen)
        if box is not None:
            left, top, right, bottom = (round(value) for value in box)
            image = image[:, max(0, top) : bottom, max(0, left) : right]
            if not image.numel():
                raise UserError(f"the box {list(box)} of the query {index} holds no pixel of its image")
        return multi_scale_feature(frozen, image, image_size, scales)

    count = names["database"]
    database = torch.stack([feature("database", i) for i in watched(range(count), count, "images of the database")])
    queries = database
    if not names["same"]:
        asked = watched(enumerate(questions), len(questions), "queries")
        queries = torch.stack([feature("queries", i, question.box) for i, question in asked])
    medium, unanswered = mean_precision(scores(queries, database, questions))
    if unanswered == len(questions):
        raise UserError("no query has anything to find in the database: do its labels belong to another set?")
    result = {"map": medium}
    if any(question.hard for question in questions):
        result["map_hard"] = mean_precision(scores(queries, database, questions, hard=True))[0]
    return {
        **result,
        "database": len(database),
        "queries": len(queries) - unanswered,
        "left_out": {"queries with nothing to find": unanswered},
        "scales": list(scales),
        "image_size": image_size,
        "which": which,
        "checkpoint": str(checkpoint),
    }


Reader = dict[str, Callable[[int, Frozen], Tensor]]


def _labeled_questions(data: str | Path, test: str | Path | None) -> tuple[dict[str, Any], Reader, list[Question]]:
    source = open_source(data)
    asked = source.test if test is None else open_source(test)
    same = asked is None
    asked = source if asked is None else asked
    for part, where in ((source, data), (asked, test or data)):
        if part.labels is None or not (part.labels >= 0).any():
            if part.unused_labels:
                raise UserError(f"{where}: what a query should find is not known: {part.unused_labels}")
            raise UserError(
                f"{where} has no labels to say which images a query should find: give one sub-folder per class, or "
                "--ground-truth"
            )
    assert source.labels is not None and asked.labels is not None
    names, asked_names = names_to_match(source, asked)
    members: dict[str | int, list[int]] = {}
    for i, label in enumerate(source.labels.tolist()):
        if label >= 0:
            members.setdefault(names[label] if names else label, []).append(i)
    if len(members) < 2:
        raise UserError(f"all labeled images of {data} are of one class, so any ranking is right; give at least two")
    files = {path: i for i in range(len(source)) if (path := _path(source, i)) is not None}
    questions = []
    for i, label in enumerate(asked.labels.tolist()):
        path = _path(asked, i)
        own = i if same else None if path is None else files.get(path)
        right = members.get(asked_names[label] if asked_names else label, []) if label >= 0 else []
        questions.append(Question([j for j in right if j != own], [], [] if own is None else [own]))
    read = {"database": _reader(source), "queries": _reader(asked)}
    return {"database": len(source), "same": same}, read, questions


def _listed_questions(
    data: str | Path, test: str | Path | None, file: Path
) -> tuple[dict[str, Any], Reader, list[Question]]:
    try:
        rows = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{file} cannot be read as JSON: {error}") from error
    if not isinstance(rows, list) or not rows or not all(isinstance(row, dict) and "query" in row for row in rows):
        raise UserError(
            f'{file} must be a list of objects such as {{"query": "a", "easy": ["b"], "hard": [], "junk": []}}'
        )
    images, asked = _named(data), _named(test or data)
    number = {name: i for i, name in enumerate(images)}

    def rows_of(row: dict[str, Any], key: str) -> list[int]:
        for name in row.get(key, []):
            if name not in number:
                raise UserError(
                    f"{file}: '{name}' ({key} for '{row['query']}') is not in {data}{nearest(name, number)}"
                )
        return [number[name] for name in row.get(key, [])]

    questions, paths = [], []
    for row in rows:
        if row["query"] not in asked:
            raise UserError(
                f"{file}: the query '{row['query']}' is not in {test or data}{nearest(row['query'], asked)}"
            )
        paths.append(asked[row["query"]])
        junk = rows_of(row, "junk")
        own = [i for i, path in enumerate(images.values()) if path.resolve() == paths[-1].resolve()]
        box = tuple(row["box"]) if row.get("box") else None
        if box is not None and len(box) != 4:
            raise UserError(f"{file}: the box of '{row['query']}' is {list(box)}; it is left, top, right, bottom")
        questions.append(Question(rows_of(row, "easy"), rows_of(row, "hard"), junk + own, box))
    database = list(images.values())
    read = {
        "database": lambda i, frozen: frozen.read(database[i]),
        "queries": lambda i, frozen: frozen.read(paths[i]),
    }
    return {"database": len(images), "same": False}, read, questions


def _named(folder: str | Path) -> dict[str, Path]:
    """Images by their path below the folder without its ending."""
    root = Path(folder).expanduser()
    images: dict[str, Path] = {}
    for path in list_images(root):
        name = path.relative_to(root).with_suffix("").as_posix()
        if name in images:
            raise UserError(f"{images[name]} and {path} have one name; rename one of them")
        images[name] = path
    return images


def _path(source: Source, index: int) -> Path | None:
    return source.path(index).resolve() if isinstance(source, FileSource) else None


def _reader(source: Source) -> Callable[[int, Frozen], Tensor]:
    def read(index: int, frozen: Frozen) -> Tensor:
        frozen.prepare(source)
        return source.read(index)

    return read
