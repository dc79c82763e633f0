"""k nearest neighbours on frozen features: the weighted vote of the original's evaluation, exact.

Features are scaled to length 1; a query's k most similar bank images vote for their class with weight exp(similarity /
temperature). Similarities are computed for as many queries at a time as fit a fixed budget, whatever the bank's size.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dino_fast.data import Source, eval_batches, open_source
from dino_fast.data.sources import split
from dino_fast.errors import UserError, nearest

# Similarities held at once: 2^24 float32 are 64 MB.
_SIMILARITIES = 1 << 24


@torch.no_grad()
def extract_features(backbone: nn.Module, batches: Iterable[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Batches (images `[B, C, H, W]`, labels `[B]`) -> (float32 features `[N, dim]`, int64 labels `[N]`), on the CPU.

    The backbone is put in evaluation mode for the time. Raises UserError for features that are not finite.
    """
    training = backbone.training
    device = next(backbone.parameters()).device
    features, labels = [], []
    backbone.eval()
    try:
        for images, label in batches:
            features.append(backbone(images.to(device)).float().cpu())
            labels.append(label)
    finally:
        backbone.train(training)
    if not features:
        raise UserError("no images to extract features from")
    stacked = torch.cat(features)
    if not stacked.isfinite().all():
        raise UserError("the backbone gives features that are not finite: its weights are damaged or have diverged")
    return stacked, torch.cat(labels)


@torch.no_grad()
def knn_accuracy(
    bank: Tensor,
    bank_labels: Tensor,
    queries: Tensor,
    query_labels: Tensor,
    k: int = 20,
    temperature: float = 0.07,
    num_classes: int | None = None,
) -> tuple[float, float]:
    """The shares of queries whose class is first, and among the first five, by votes.

    `bank` `[N, dim]` and `queries` `[M, dim]` of any length, labels int64 from 0. Equal votes go to the lower class;
    with five classes or fewer the second share is 1. Raises UserError where k exceeds the bank.
    """
    if not 1 <= k <= len(bank):
        raise UserError(f"k is {k} and the bank has {len(bank)} images; k must be from 1 to {len(bank)}: try --k 1")
    if not temperature > 0:
        raise UserError(f"the temperature is {temperature}; it must be above 0 (the usual value is 0.07)")
    if not len(queries):
        raise UserError("there are no images to classify: the test data is empty")
    highest = int(max(bank_labels.max(), query_labels.max()))
    if min(bank_labels.min(), query_labels.min()) < 0 or (num_classes is not None and highest >= num_classes):
        raise UserError(f"labels must be from 0 to {(num_classes or highest + 1) - 1}; -1 marks an image without one")
    classes = num_classes or highest + 1
    bank = F.normalize(bank.float(), dim=1).T  # [dim, N]
    queries = F.normalize(queries.float(), dim=1)
    first = five = 0
    rows = max(1, _SIMILARITIES // max(bank.shape[1], classes))
    for query, label in zip(queries.split(rows), query_labels.split(rows), strict=True):
        similarity, index = (query @ bank).topk(k, dim=1)  # [rows, k]
        # Relative to the largest, so that a low temperature cannot overflow; it scales a query's votes alike.
        weight = ((similarity - similarity[:, :1]) / temperature).exp()
        votes = weight.new_zeros(len(query), classes).scatter_add_(1, bank_labels[index], weight)
        best = votes.sort(dim=1, descending=True, stable=True).indices[:, :5]
        hits = best == label[:, None]
        first += int(hits[:, 0].sum())
        five += int(hits.sum())
    return first / len(queries), five / len(queries)


def evaluate(
    checkpoint: str | Path,
    data: str | Path,
    test: str | Path | None = None,
    *,
    k: int = 20,
    temperature: float = 0.07,
    which: str = "teacher",
    batch_size: int = 128,
    device: str = "cpu",
    image_size: int | None = None,
) -> dict[str, Any]:
    """k-NN accuracy of a checkpoint, ours or the original's, on a labelled image source.

    The bank is `data`, the queries `test`, or without it the held-out part of `data`. `image_size` defaults to the
    size the position embeddings were learned for. Returns `top1` and `top5` (fractions), `k`, `temperature`, `bank` and
    `queries` (numbers of images), `feature`, `which`, `image_size`, `checkpoint`.
    """
    from dino_fast.models.checkpoints import describe, load_backbone

    bank_source, query_source = _sources(data, test)
    facts = describe(checkpoint, which=which)
    backbone = load_backbone(checkpoint, which=which).eval().to(device)
    size = backbone.img_size if image_size is None else (image_size, image_size)
    statistics = {name: facts[name] for name in ("mean", "std") if name in facts}
    parts = []
    for source in (bank_source, query_source):
        source.channels = backbone.in_chans
        parts.append(extract_features(backbone, eval_batches(source, size, batch_size=batch_size, **statistics)))
    (bank, bank_labels), (queries, query_labels) = [(f[labels >= 0], labels[labels >= 0]) for f, labels in parts]
    query_labels = _same_classes(bank_source, query_source, query_labels)
    top1, top5 = knn_accuracy(bank, bank_labels, queries, query_labels, k, temperature)
    return {
        "top1": top1,
        "top5": top5,
        "k": k,
        "temperature": temperature,
        "bank": len(bank),
        "queries": len(queries),
        "feature": f"class token [{backbone.embed_dim}]",
        "which": which,
        "image_size": list(size),
        "checkpoint": str(checkpoint),
    }


def _sources(data: str | Path, test: str | Path | None) -> tuple[Source, Source]:
    """Bank and queries. Raises UserError where labels are missing, before any feature is computed."""
    source = open_source(data)
    bank, queries = split(source) if test is None else (source, open_source(test))
    for part, path in ((bank, data), (queries, data if test is None else test)):
        if part.labels is None or not (part.labels >= 0).any():
            raise UserError(
                f"{path} has no labels, and k-NN accuracy needs them: give a folder with one sub-folder per class, or "
                "a parquet file with a label column"
            )
    return bank, queries


def _same_classes(bank: Source, queries: Source, labels: Tensor) -> Tensor:
    """The queries' labels in the bank's numbering, matched by the classes' names where both have some."""
    if bank.classes is None or queries.classes is None or bank.classes == queries.classes:
        return labels
    for name in queries.classes:
        if name not in bank.classes:
            raise UserError(f"the test data has a class '{name}' that --data lacks{nearest(name, bank.classes)}")
    return torch.tensor([bank.classes.index(name) for name in queries.classes])[labels]
