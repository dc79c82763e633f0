"""k nearest neighbors on frozen features: the weighted vote of the original's evaluation, exact.

Features are scaled to length 1; a query's k most similar bank images vote for their class with weight exp(similarity /
temperature). Similarities exist for one tile of queries by bank images at a time, so memory does not grow with either;
the neighbors are searched once, for the largest k, whatever the numbers of k and of temperatures.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dino_fast.errors import UserError
from dino_fast.ops.linear.matmul import matmul

_SIMILARITIES = 1 << 22  # held at once: 2^22 float32 are 16 MB. 2^20 is a fifth slower, 2^24 hardly faster
_FEW = 50  # neighbors
_BLOCK = 16  # similarities whose maximum is looked at first; 32 takes as long for k = 20, a fifth longer for k = 200


@torch.no_grad()
def extract_features(
    backbone: nn.Module, batches: Iterable[tuple[Tensor, Tensor]], feature: Callable[[Tensor], Tensor] | None = None
) -> tuple[Tensor, Tensor]:
    """Batches (images `[B, C, H, W]`, labels `[B]`) -> (float32 features `[N, dim]`, int64 labels `[N]`), on the CPU.

    `feature` maps images to features, by default `backbone` itself, which is in evaluation mode meanwhile.
    Raises UserError for features that are not finite.
    """
    training = backbone.training
    device = next(backbone.parameters()).device
    features, labels = [], []
    backbone.eval()
    try:
        for images, label in batches:
            features.append((feature or backbone)(images.to(device)).float().cpu())
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
def neighbors(bank: Tensor, queries: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest products of each query with the bank: values `[M, k]`, falling, and bank indices `[M, k]`.

    `bank` `[N, dim]`, `queries` `[M, dim]`, of one dtype and device. Of equal products any may be taken. Raises
    UserError where k is not from 1 to N.
    """
    if not 1 <= k <= len(bank):
        raise UserError(f"k is {k} and the bank has {len(bank)} images; k must be from 1 to {len(bank)}: try --k 1")
    # Few long rows where k is large, so that fewer pieces of the bank have to be merged: k = 200 in 0.44 s for 0.58 s.
    rows = max(1, min(len(queries), math.isqrt(_SIMILARITIES) // (8 if k <= _FEW else 32)))
    columns = math.ceil(len(bank) / max(1, round(len(bank) * rows / _SIMILARITIES)))  # pieces of one size
    rows = max(1, min(len(queries), _SIMILARITIES // columns))
    # One piece of memory for all tiles: fresh pages for each of 64 MB cost 40 % of the product itself.
    room = queries.new_empty(rows * columns)
    parts = [_search(bank, part, k, columns, room) for part in queries.split(rows)]
    return torch.cat([values for values, _ in parts]), torch.cat([index for _, index in parts])


def knn_accuracy(
    bank: Tensor,
    bank_labels: Tensor,
    queries: Tensor,
    query_labels: Tensor,
    k: int = 20,
    temperature: float = 0.07,
    num_classes: int | None = None,
) -> tuple[float, float]:
    """The shares of queries whose class is first, and among the first five, by votes; see `knn_grid`."""
    row = knn_grid(bank, bank_labels, queries, query_labels, [k], [temperature], num_classes)[0]
    return row["top1"], row["top5"]


def leave_one_out_accuracy(
    features: Tensor, labels: Tensor, k: int = 20, temperature: float = 0.07
) -> tuple[float, float]:
    """`knn_accuracy` of each image among all others: features `[N, dim]`, labels int64 `[N]` from 0, k from 1 to N - 1.

    Raises UserError where k is not, or for labels out of range.
    """
    if not 1 <= k < len(features):
        raise UserError(f"k is {k} and each image has {len(features) - 1} others; k must be from 1 to their number")
    row = knn_grid(features, labels, features, labels, [k], [temperature], leave_one_out=True)[0]
    return row["top1"], row["top5"]


@torch.no_grad()
def knn_grid(
    bank: Tensor,
    bank_labels: Tensor,
    queries: Tensor,
    query_labels: Tensor,
    ks: Sequence[int] = (20,),
    temperatures: Sequence[float] = (0.07,),
    num_classes: int | None = None,
    leave_one_out: bool = False,
) -> list[dict[str, Any]]:
    """One row `{k, temperature, top1, top5}` for each pair, shares of queries, for one search.

    `bank` `[N, dim]` and `queries` `[M, dim]` of any length, labels int64 from 0. Equal votes go to the lower class;
    with five classes or fewer `top5` is 1. With k < 5, `top5` counts only classes that a neighbor votes for.
    `leave_one_out`: the queries are the bank's own images in its order, and none votes for itself.
    Raises UserError where a k exceeds the bank, or for labels out of range.
    """
    for k in ks:
        if not 1 <= k <= len(bank):
            raise UserError(f"k is {k} and the bank has {len(bank)} images; k must be from 1 to {len(bank)}: try --k 1")
    for temperature in temperatures:
        if not temperature > 0:
            raise UserError(f"the temperature is {temperature}; it must be above 0 (the usual value is 0.07)")
    if not len(queries):
        raise UserError("there are no images to classify: the test data is empty")
    highest = int(max(bank_labels.max(), query_labels.max()))
    if min(bank_labels.min(), query_labels.min()) < 0 or (num_classes is not None and highest >= num_classes):
        raise UserError(f"labels must be from 0 to {(num_classes or highest + 1) - 1}; -1 marks an image without one")
    classes = num_classes or highest + 1
    most = max(ks) + leave_one_out
    values, index = neighbors(F.normalize(bank.float(), dim=1), F.normalize(queries.float(), dim=1), most)
    if leave_one_out:
        values, index = _without_itself(values, index)
    voters = bank_labels.to(index.device)[index]  # [M, k], classes
    labels = query_labels.to(index.device)
    hits = {(k, temperature): [0, 0] for k in ks for temperature in temperatures}
    rows = max(1, _SIMILARITIES // classes)
    for value, voter, label in zip(values.split(rows), voters.split(rows), labels.split(rows), strict=True):
        for (k, temperature), count in hits.items():
            rank = _ranks(value[:, :k], voter[:, :k], label, temperature, classes)
            count[0] += int((rank < 1).sum())
            count[1] += int((rank < 5).sum())
    total = len(queries)
    return [
        {"k": k, "temperature": temperature, "top1": one / total, "top5": five / total}
        for (k, temperature), (one, five) in hits.items()
    ]


def _without_itself(values: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
    """Row i without image i, or, where copies of it came first, without its last neighbor: one column less."""
    itself = index == torch.arange(len(index), dtype=torch.int64, device=index.device)[:, None]
    itself[:, -1] |= ~itself.any(dim=1)
    shape = len(index), index.shape[1] - 1
    return values[~itself].view(shape), index[~itself].view(shape)


def _search(bank: Tensor, queries: Tensor, k: int, columns: int, room: Tensor) -> tuple[Tensor, Tensor]:
    """`neighbors` of a few queries, by running over the bank in pieces of `columns` images, products in `room`."""
    values = index = None
    for start in range(0, len(bank), columns):
        piece = bank[start : start + columns]
        similarity = room[: len(queries) * len(piece)].view(len(queries), len(piece))
        matmul(queries, piece.T, out=similarity)
        value, place = largest(similarity, min(k, similarity.shape[1]))
        place += start
        if values is not None and index is not None:
            value, place = torch.cat((values, value), dim=1), torch.cat((index, place), dim=1)
            value, order = value.topk(min(k, value.shape[1]), dim=1)
            place = place.gather(1, order)
        values, index = value, place
    assert values is not None and index is not None
    return values, index


def largest(x: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """`x.topk(k, dim=1)`. The k largest of a row lie in the k blocks of largest maximum, so only these are sorted.

    A block is every (n // _BLOCK)-th number, so that maxima of neighboring blocks are found side by side.
    """
    m, n = x.shape
    blocks = n // _BLOCK
    if blocks < 2 * k:
        value, index = x.topk(k, dim=1)
        return value, index
    chosen = x[:, : blocks * _BLOCK].view(m, _BLOCK, blocks).amax(dim=1).topk(k, dim=1, sorted=False).indices  # [m, k]
    steps = torch.arange(0, blocks * _BLOCK, blocks, dtype=torch.int64, device=x.device)
    index = (chosen[:, :, None] + steps).flatten(1)  # [m, k * _BLOCK]
    rest = torch.arange(blocks * _BLOCK, n, dtype=torch.int64, device=x.device).expand(m, -1)
    index = torch.cat((index, rest), dim=1)
    value, order = x.gather(1, index).topk(k, dim=1)
    return value, index.gather(1, order)


def _ranks(similarity: Tensor, voters: Tensor, labels: Tensor, temperature: float, classes: int) -> Tensor:
    """How many classes come before the right one, `[rows]`."""
    # Relative to the largest, so that a low temperature cannot overflow; it scales a query's votes alike.
    weight = ((similarity - similarity[:, :1]) / temperature).exp()
    votes = weight.new_zeros(len(labels), classes).scatter_add_(1, voters, weight)
    own = votes.gather(1, labels[:, None])
    lower = torch.arange(classes, dtype=torch.int64, device=votes.device) < labels[:, None]
    rank = ((votes > own) | ((votes == own) & lower)).sum(dim=1)
    if voters.shape[1] < 5:  # or classes without any vote would fill up the first five
        rank[~(voters == labels[:, None]).any(dim=1)] = max(5, classes)
    return rank
