"""Sinkhorn-Knopp centering (SwAV, DINOv2) as a center: neither the logits nor the targets are stored.

DINOv2 normalizes exp(L), L = teacher's logits [N, K] / temp, over rows and prototypes in turn, an image's targets last.
What it returns is diag(r) exp(L) diag(s), with each row's sum 1, so it is a softmax with a center:

    targets = softmax((temp L - c) / temp),   c = -temp log s

In the log domain an iteration, from f = 0, is

    g_k = -LSE_i(L_ik + f_i),   f_i = -LSE_k(L_ik + g_k),   and c = -temp g after the last g:

constants drop out, and nothing overflows (the published exp does, at logits of 30 and a temperature of 0.04).

One pass over the prototypes an iteration: a tile [prototypes, N] of L sees all rows, so its g is known at once. With
p_ik = exp(L_ik + f_i + g_k), which sums to 1 over rows and is made for g anyhow, the next f is f_i - log sum_k p_ik: an
exponential a logit and iteration. Where a row's sum is too small for that, and on a GPU, where the host must not ask,
f is made as written, relative to the row's maximum, in a pass of its own. Over several processes g needs the rows of
all (a K-vector is reduced), so that f always takes a pass of its own.

2 N K D floating-point operations an iteration (twice that, but for the last, over processes).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

# Logits that a tile holds, 4 MiB of float32. With 2 MiB 1.15x slower on two cores of an AMD EPYC (Zen 4), with 8 equal.
TILE = 1 << 20
# Sums of p below this have lost terms to underflow (float32 ends at 1e-38, K terms of which may be missing).
SMALLEST_SUM = 1e-25


@torch.no_grad()
def sinkhorn_center(
    teacher: Tensor,
    teacher_weight: Tensor,
    *,
    teacher_temp: float,
    teacher_gain: Tensor | None = None,
    iterations: int = 3,
    across_ranks: bool = True,
    group: Any = None,
) -> Tensor:
    """The center with which the teacher's softmax gives the targets of Sinkhorn-Knopp.

    Args:
        teacher: [..., D], the inputs of the teacher's last layer: all rows that are normalized together (both global
            crops of a batch, or the masked patches). float32, bfloat16, float16 or float64.
        teacher_weight: [K, D], that layer's matrix; with `teacher_gain` [K], weight-normed (see `linear_dino_loss`).
        teacher_temp: the teacher's temperature, > 0.
        iterations: as published 3.
        across_ranks: normalize over the rows of all processes of `group`, if a process group is initialized. The number
            of rows may differ, and be 0 in some.

    Returns:
        [K], float32 (float64 for float64 rows), for `linear_dino_loss` and `linear_ibot_loss`. A constant added to it
        changes nothing.

    Raises:
        ValueError: shapes, devices, temperature or iterations that do not fit, said in the message.
    """
    world = dist.get_world_size(group) if across_ranks and dist.is_available() and dist.is_initialized() else 1
    validate_inputs(teacher, teacher_weight, teacher_gain, teacher_temp, iterations, world)
    with torch.autocast(teacher.device.type, enabled=False):
        dtype = torch.float64 if teacher.dtype == torch.float64 else torch.float32
        rows = teacher.detach().reshape(-1, teacher.shape[-1]).to(dtype) / teacher_temp
        tiles = _Tiles(rows, teacher_weight.detach(), None if teacher_gain is None else teacher_gain.detach())
        f = torch.zeros(len(rows), dtype=dtype, device=rows.device)
        for _ in range(iterations - 1):
            g, sums = _iterate(tiles, f, world, group)
            f = f - sums.log().to(dtype) if _are_usable(sums) else _row_potential(tiles, g)
        g, _ = _iterate(tiles, f, world, group, last=True)
        return -teacher_temp * g


@torch.no_grad()
def sinkhorn_center_reference(
    teacher: Tensor,
    teacher_weight: Tensor,
    *,
    teacher_temp: float,
    teacher_gain: Tensor | None = None,
    iterations: int = 3,
) -> Tensor:
    """The definition with all logits, in the log domain, for one process; arguments and result of `sinkhorn_center`."""
    validate_inputs(teacher, teacher_weight, teacher_gain, teacher_temp, iterations, 1)
    dtype = torch.float64 if teacher.dtype == torch.float64 else torch.float32
    rows = teacher.reshape(-1, teacher.shape[-1]).to(dtype)
    logits = rows @ _effective(teacher_weight, teacher_gain, dtype).T / teacher_temp  # [N, K]
    f = torch.zeros(len(rows), dtype=dtype, device=rows.device)
    g = torch.zeros(len(teacher_weight), dtype=dtype, device=rows.device)
    for i in range(iterations):
        if i:
            f = -torch.logsumexp(logits + g, dim=1)
        g = -torch.logsumexp(logits + f[:, None], dim=0)
    return -teacher_temp * g


def validate_inputs(
    teacher: Tensor, weight: Tensor, gain: Tensor | None, temp: float, iterations: int, world: int
) -> None:
    """Raises ValueError for inputs that do not fit, with what was given and what is accepted."""
    if teacher.dim() < 2 or weight.dim() != 2 or teacher.shape[-1] != weight.shape[1] or 0 in weight.shape:
        raise ValueError(
            "sinkhorn_center: the teacher's rows are [..., D] and its weight [K, D]; "
            f"got {list(teacher.shape)} and {list(weight.shape)}"
        )
    if teacher.numel() == 0 and world == 1:
        raise ValueError("sinkhorn_center: there are no rows to normalize over; give at least one")
    if gain is not None and gain.shape != weight.shape[:1]:
        raise ValueError(f"sinkhorn_center: the gain is [K] = [{len(weight)}]; got {list(gain.shape)}")
    for name, tensor in (("rows", teacher), ("weight", weight), ("gain", gain)):
        if tensor is None:
            continue
        if not tensor.is_floating_point():
            raise ValueError(f"sinkhorn_center: the {name} must be of a floating-point dtype; got {tensor.dtype}")
        if tensor.device != teacher.device:
            raise ValueError(f"sinkhorn_center: the {name} is on {tensor.device}, the rows on {teacher.device}")
    if not temp > 0:
        raise ValueError(f"sinkhorn_center: the temperature must be positive; got {temp}")
    if iterations < 1:
        raise ValueError(f"sinkhorn_center: at least one iteration is needed; got {iterations}")


def _effective(weight: Tensor, gain: Tensor | None, dtype: torch.dtype) -> Tensor:
    weight = weight.to(dtype)
    if gain is None:
        return weight
    return weight * (gain.to(dtype) / torch.linalg.vector_norm(weight, dim=1))[:, None]


class _Tiles:
    """Logits over the temperature, some prototypes at a time."""

    def __init__(self, rows: Tensor, weight: Tensor, gain: Tensor | None) -> None:
        self.rows, self.weight, self.gain = rows, weight, gain
        self.step = max(1, TILE // max(1, len(rows)))

    def logits(self, f: Tensor) -> Iterator[tuple[slice, Tensor]]:
        """Prototypes, and [prototypes, N]: their logits plus `f` [N]. The caller may write into it."""
        columns = self.rows.T
        for first in range(0, len(self.weight), self.step):
            part = slice(first, first + self.step)
            gain = None if self.gain is None else self.gain[part]
            yield part, torch.addmm(f, _effective(self.weight[part], gain, self.rows.dtype), columns)


def _iterate(tiles: _Tiles, f: Tensor, world: int, group: Any, *, last: bool = False) -> tuple[Tensor, Tensor]:
    """g [K] from f [N], and sum_k p [N]; after the last g that is not made."""
    rows, K = tiles.rows, len(tiles.weight)
    g = torch.empty(K, dtype=rows.dtype, device=rows.device)
    sums = torch.zeros(len(rows), dtype=torch.float64, device=rows.device)
    here = world == 1 and not last and rows.device.type == "cpu"
    for part, logits in tiles.logits(f):
        if len(rows) == 0:
            g[part] = torch.inf
            continue
        top = logits.amax(dim=1, keepdim=True)
        exponentials = logits.sub_(top).exp_()
        total = exponentials.sum(dim=1)
        g[part] = -(top[:, 0] + total.log())
        if here:
            sums += total.reciprocal_() @ exponentials
    if world > 1:
        g = _minus_logsumexp_over_ranks(g, group)
        if not last and rows.device.type == "cpu":
            for part, logits in tiles.logits(f):
                sums += logits.add_(g[part, None]).exp_().sum(dim=0)
    return g, sums


def _minus_logsumexp_over_ranks(g: Tensor, group: Any) -> Tensor:
    """-LSE of all processes' rows, from -LSE of each process's; infinite where a process has none."""
    least = g.clone()
    dist.all_reduce(least, dist.ReduceOp.MIN, group=group)
    share = torch.where(g.isinf(), 0.0, (least - g).exp())
    dist.all_reduce(share, group=group)
    return least - share.log()


def _are_usable(sums: Tensor) -> bool:
    """Whether no row's sum of p has lost anything to underflow. Not asked on a GPU: the host would wait."""
    return sums.device.type == "cpu" and bool((sums > SMALLEST_SUM).all())


def _row_potential(tiles: _Tiles, g: Tensor) -> Tensor:
    """f [N] = -LSE over prototypes of the logits plus g [K], relative to each row's maximum so far."""
    zero = torch.zeros_like(tiles.rows[:, 0])
    lse = torch.full_like(zero, -torch.inf)
    for part, logits in tiles.logits(zero):
        lse = torch.logaddexp(lse, logits.add_(g[part, None]).logsumexp(dim=0))
    return -lse
