"""k-NN accuracy of a checkpoint on labeled images; the search and the vote are `dino_fast.knn`'s."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dino_fast.defaults import torch_defaults
from dino_fast.errors import UserError
from dino_fast.eval.common.backbone import open_backbone, tokens_feature
from dino_fast.eval.common.features import labeled_features
from dino_fast.eval.common.labels import left_out, open_labeled
from dino_fast.knn import knn_grid


@torch_defaults()
def evaluate(
    checkpoint: str | Path,
    data: str | Path,
    test: str | Path | None = None,
    *,
    k: int | Sequence[int] = 20,
    temperature: float | Sequence[float] = 0.07,
    which: str = "teacher",
    batch_size: int = 128,
    device: str | None = None,
    image_size: int | None = None,
    features: Path | None = None,
) -> dict[str, Any]:
    """k-NN accuracy of a checkpoint on a labeled image source.

    The bank is `data`, the queries `test`, or without it the held-out part of `data`. `image_size` defaults to the
    size the position embeddings were learned for; `features` is a folder that keeps features between calls. Returns
    `top1` and `top5` (fractions), `k` and `temperature` of the best pair, `results` with all of them, `bank` and
    `queries` (numbers of images), `left_out`, `feature`, `which`, `image_size`, `checkpoint`.
    """
    ks = [k] if isinstance(k, int) else list(k)
    temperatures = [temperature] if isinstance(temperature, int | float) else list(temperature)
    sources = dict(zip(("bank", "queries"), open_labeled(data, test)[:2], strict=True))
    if max(ks) > len(sources["bank"]):  # said before an hour of features
        raise UserError(f"k is {max(ks)} and the bank has {len(sources['bank'])} images; give a smaller --k")
    frozen = open_backbone(checkpoint, which, device, tokens=False)
    size = frozen.size(image_size)
    feature, kind = tokens_feature(frozen.backbone)
    extracted = {
        name: labeled_features(frozen, source, size, feature, kind, batch_size, features)
        for name, source in sources.items()
    }
    (bank, bank_labels), (queries, query_labels) = extracted.values()
    bank, queries = bank.to(frozen.device), queries.to(frozen.device)
    rows = knn_grid(bank, bank_labels, queries, query_labels, ks, temperatures)
    return {
        **max(rows, key=lambda row: row["top1"]),
        "results": rows,
        "bank": len(bank),
        "queries": len(queries),
        "left_out": {name: left_out(source, len(extracted[name][0])) for name, source in sources.items()},
        "feature": kind,
        "which": which,
        "image_size": list(size),
        "checkpoint": str(checkpoint),
    }
