"""Linear classification of frozen features: one linear layer, SGD with momentum 0.9, cosine learning rate.

All learning rates of a grid are trained at once: their layers lie side by side in one matrix `[dim, L * classes]`, so a
step is two matrix products whatever L is. With x the batch, p the softmax and y the one-hot labels of each layer, the
gradient is x^T (p - y) / B in closed form. Features are computed once and kept, unless fresh crops are asked for.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dino_fast.data import Source
from dino_fast.defaults import torch_defaults
from dino_fast.errors import UserError
from dino_fast.knn import extract_features
from dino_fast.progress import watched
from dino_fast.seeding import derive_seed

RATES = (0.0003, 0.001, 0.003, 0.01, 0.03, 0.1)  # per 256 images; the published one is 0.001
_MOMENTUM = 0.9
_ROWS = 8192  # features classified at once
_ORDER = 3  # the draw's purpose, part of its seed (0 to 2 are the loader's)


@dataclass
class Heads:
    """Linear layers trained at different learning rates, side by side."""

    weight: Tensor  # [dim, L * classes] float32
    bias: Tensor  # [L * classes] float32
    rates: tuple[float, ...]
    classes: int

    def logits(self, features: Tensor) -> Tensor:
        """`[B, dim]` -> `[B, L, classes]`."""
        return torch.addmm(self.bias, features, self.weight).view(len(features), len(self.rates), self.classes)

    def layer(self, i: int) -> tuple[Tensor, Tensor]:
        """Weight `[classes, dim]` and bias `[classes]` of the i-th learning rate, as `nn.Linear` holds them."""
        part = slice(i * self.classes, (i + 1) * self.classes)
        return self.weight[:, part].T.contiguous(), self.bias[part].clone()


@torch.no_grad()
def fit(
    features_of: Callable[[int], tuple[Tensor, Tensor]],
    classes: int,
    rates: Sequence[float] = RATES,
    *,
    epochs: int = 100,
    batch_size: int = 1024,
    seed: int = 0,
    on_epoch: Callable[[int, Heads], None] | None = None,
) -> Heads:
    """Trains one layer a learning rate on `features_of(epoch) -> (features [N, dim] float32, labels [N])`.

    A rate is per 256 images, so batches of B use rate * B / 256; it follows half a cosine to 0 over the epochs, changed
    once an epoch. Weights begin normal with standard deviation 0.01 (alike for all rates), biases 0. No weight decay.
    `on_epoch` gets the epoch and the layers after it. Raises UserError for settings out of range.
    """
    if not rates or min(rates) <= 0:
        raise UserError(f"learning rates are {list(rates)}; give one or more above 0, for example 0.001")
    if epochs < 1 or batch_size < 1:
        raise UserError(f"epochs is {epochs} and the batch size {batch_size}; both must be at least 1")
    features, labels = features_of(0)
    dim, device, count = features.shape[1], features.device, len(rates)
    start = 0.01 * torch.randn(
        dim, 1, classes, generator=torch.Generator().manual_seed(seed), dtype=torch.float32, device="cpu"
    )
    heads = Heads(
        start.expand(-1, count, -1).reshape(dim, count * classes).to(device),
        torch.zeros(count * classes, dtype=torch.float32, device=device),
        tuple(rates),
        classes,
    )
    velocity, bias_velocity = torch.zeros_like(heads.weight), torch.zeros_like(heads.bias)
    step = torch.tensor(rates, dtype=torch.float32, device=device).repeat_interleave(classes) * (
        batch_size / 256
    )  # [L * classes]
    for epoch in watched(range(epochs), epochs, "epochs"):
        if epoch:
            features, labels = features_of(epoch)
        rate = step * (0.5 * (1 + math.cos(math.pi * epoch / epochs)))
        generator = torch.Generator().manual_seed(derive_seed(seed, _ORDER, epoch))
        order = torch.randperm(len(features), generator=generator, dtype=torch.int64, device="cpu")
        for index in order.to(device).split(batch_size):
            x = features[index]  # [B, dim]
            error = heads.logits(x).softmax(dim=2)
            error -= F.one_hot(labels[index], classes)[:, None]
            error = error.view(len(x), -1).div_(len(x))  # [B, L * classes]
            velocity.mul_(_MOMENTUM).addmm_(x.T, error)
            bias_velocity.mul_(_MOMENTUM).add_(error.sum(dim=0))
            heads.weight.sub_(velocity * rate)
            heads.bias.sub_(bias_velocity * rate)
        if on_epoch is not None:
            on_epoch(epoch, heads)
    return heads


@torch.no_grad()
def accuracy(heads: Heads, features: Tensor, labels: Tensor) -> list[tuple[float, float]]:
    """For each learning rate the shares of images whose class is first, and among the first five."""
    hits = torch.zeros(2, len(heads.rates), dtype=torch.int64, device="cpu")
    for x, label in zip(features.split(_ROWS), labels.split(_ROWS), strict=True):
        logits = heads.logits(x)  # [B, L, classes]
        own = logits.gather(2, label.view(-1, 1, 1).expand(-1, logits.shape[1], 1))
        above = (logits > own).sum(dim=2).cpu()  # [B, L]
        above[~logits.isfinite().all(dim=2).cpu()] = max(5, heads.classes)  # a layer that diverged is right nowhere
        hits += torch.stack(((above < 1).sum(dim=0), (above < 5).sum(dim=0)))
    return [(one / len(features), five / len(features)) for one, five in hits.T.tolist()]


@torch_defaults()
def evaluate(
    checkpoint: str | Path,
    data: str | Path,
    test: str | Path | None = None,
    *,
    blocks: int = 4,
    patch_mean: bool = False,
    rates: Sequence[float] = RATES,
    epochs: int = 100,
    batch_size: int = 1024,
    crops: str = "centre",
    seed: int = 0,
    which: str = "teacher",
    device: str | None = None,
    image_size: int | None = None,
    features: Path | None = None,
) -> tuple[dict[str, Any], Heads]:
    """Accuracy of linear layers on the class tokens of the last `blocks` blocks.

    `crops` is "centre" (features computed once) or "random" (a random crop and flip of each image anew each epoch, as
    published; the backbone runs every epoch).

    Returns (`top1` and `top5` of the best learning rate `rate` after the last epoch; `best_epoch_top1` and `best_epoch`
    (from 0) of that rate, which is the figure that the original reports; `results` with every rate, `train`,
    `test`, `left_out`, `feature`, and the settings; the trained layers).
    """
    from dino_fast.eval.common.backbone import open_backbone, tokens_feature
    from dino_fast.eval.common.crops import random_batches
    from dino_fast.eval.common.features import labeled_features
    from dino_fast.eval.common.labels import left_out, open_labeled

    if crops not in ("centre", "random"):
        raise UserError(f"crops is '{crops}'; it is 'centre' or 'random'")
    train, held_out, classes = open_labeled(data, test)
    frozen = open_backbone(checkpoint, which, device, tokens=False)
    size = frozen.size(image_size)
    feature, kind = tokens_feature(
        frozen.backbone, min(blocks, len(getattr(frozen.backbone, "blocks", [0]))), patch_mean
    )

    def centered(source: Source) -> tuple[Tensor, Tensor]:
        x, y = labeled_features(frozen, source, size, feature, kind, 128, features)
        return x.to(frozen.device), y.to(frozen.device)

    def fresh(epoch: int) -> tuple[Tensor, Tensor]:
        batches = random_batches(train, size, frozen.mean, frozen.std, 128, seed, epoch)
        x, y = extract_features(frozen.backbone, batches, feature)
        return x.to(frozen.device), y.to(frozen.device)

    test_features, test_labels = centered(held_out)
    epoch_results: list[list[tuple[float, float]]] = []  # [epochs][rates]: top-1, top-5

    def measure(epoch: int, heads: Heads) -> None:
        epoch_results.append(accuracy(heads, test_features, test_labels))

    if crops == "centre":
        fixed = centered(train)
        used = len(fixed[0])
    else:
        frozen.prepare(train)
        used = len(fresh(0)[0])
    features_of = fresh if crops == "random" else lambda epoch: fixed
    heads = fit(features_of, classes, rates, epochs=epochs, batch_size=batch_size, seed=seed, on_epoch=measure)
    rows: list[dict[str, Any]] = []
    for i, rate in enumerate(heads.rates):
        top1 = [epoch[i][0] for epoch in epoch_results]
        best = {"best_epoch_top1": max(top1), "best_epoch": top1.index(max(top1))}
        rows.append({"rate": rate, "top1": top1[-1], "top5": epoch_results[-1][i][1], **best})
    result = {
        **max(rows, key=lambda row: row["top1"]),
        "results": rows,
        "train": used,
        "test": len(test_features),
        "left_out": {"train": left_out(train, used), "test": left_out(held_out, len(test_features))},
        "classes": classes,
        "feature": kind,
        "epochs": epochs,
        "batch_size": batch_size,
        "crops": crops,
        "which": which,
        "image_size": list(size),
        "checkpoint": str(checkpoint),
    }
    return result, heads
