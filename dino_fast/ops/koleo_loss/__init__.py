"""The KoLeo regularizer (Sablayrolles et al. 2019, arXiv:1806.03198), which spreads features over the sphere.

    loss = -mean_i log(|x_i - x_n(i)| + eps),   n(i) = argmax_j!=i <x_i, x_j>,   rows x of unit length

Plain PyTorch: B^2 D multiplications for a batch of B rows, made for some rows at a time, no kernel needed.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

EPS = 1e-8
# Similarities made at a time.
BUFFER = 1 << 22


def koleo_loss(features: Tensor, *, across_ranks: bool = False, group: Any = None) -> Tensor:
    """Minus the mean log distance of each row to its nearest neighbor in the batch.

    Args:
        features: [N, D], one row an image, float32, bfloat16, float16 or float64; normalized here.
        across_ranks: look for neighbors in the batches of all processes of `group` (same N in each); by default in
            this process's own, as published. The loss stays the mean over this process's rows: averaged over
            processes, it and its gradient are those of one process with all rows.
        group: the processes; by default all.

    Returns:
        A scalar, float32 (float64 for float64 features). Rows that equal their neighbor count -log(eps) = 18.4 with a
        gradient of 0: no direction leads away from a duplicate. (The published form moves both by 1e8 times an
        arbitrary direction.)

    Raises:
        ValueError: fewer than two rows in all, or features that are not [N, D] of a floating-point dtype.
    """
    if features.dim() != 2 or 0 in features.shape or not features.is_floating_point():
        raise ValueError(
            "koleo_loss: features are [rows, D], one row an image, of a floating-point dtype; "
            f"got {list(features.shape)}, {features.dtype}"
        )
    world = dist.get_world_size(group) if across_ranks and dist.is_available() and dist.is_initialized() else 1
    if len(features) * world < 2:
        raise ValueError(
            "koleo_loss: one row has no neighbor; give two images or more (a larger batch a process), "
            "or across_ranks=True with several processes"
        )
    with torch.autocast(features.device.type, enabled=False):
        dtype = torch.float64 if features.dtype == torch.float64 else torch.float32
        x = F.normalize(features.to(dtype), dim=1)
        everyone, first = (x, 0) if world == 1 else (_AllGather.apply(x, group), dist.get_rank(group) * len(x))
        nearest = nearest_neighbors(x.detach(), everyone.detach(), first)
        difference = x - everyone[nearest]
        square = difference.square().sum(1)
        duplicate = square == 0
        distance = torch.where(duplicate, 1.0, square).sqrt()
        return -torch.where(duplicate, 0.0, distance).add(EPS).log().mean()


@torch.no_grad()
def nearest_neighbors(rows: Tensor, everyone: Tensor, first: int) -> Tensor:
    """Index [N] in `everyone` [M, D] of the row most similar to each of `rows` [N, D], which are its rows `first`, ...

    A row is not its own neighbor; of several equally near the first counts.
    """
    nearest = torch.empty(len(rows), dtype=torch.int64, device=rows.device)
    step = max(1, BUFFER // len(everyone))
    for start in range(0, len(rows), step):
        part = rows[start : start + step]
        similarity = part @ everyone.T
        similarity.diagonal(first + start).fill_(-torch.inf)
        nearest[start : start + step] = similarity.argmax(1)
    return nearest


class _AllGather(torch.autograd.Function):
    """[N, D] of each process -> [world * N, D], process by process; the gradients of a process's rows are summed."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Any) -> Tensor:
        ctx.group, ctx.count = group, len(x)
        parts = [torch.empty_like(x) for _ in range(dist.get_world_size(group))]
        dist.all_gather(parts, x.contiguous(), group=group)
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        upstream = upstream.contiguous()
        dist.all_reduce(upstream, group=ctx.group)
        first = dist.get_rank(ctx.group) * ctx.count
        return upstream[first : first + ctx.count], None
