"""Crops of several resolutions as one buffer of tokens: their places, their attention, and stochastic depth.

The crops of one resolution are a group; groups lie one after the other, so a buffer is [sum of crops * tokens, C] and a
group is a view of it. Everything that works token by token is then one call for all resolutions.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from itertools import accumulate
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from dino_fast.backends import BackendError, choose
from dino_fast.ops.packed_attention import packed_attention


class Packing(NamedTuple):
    """Where crops lie in a buffer of tokens."""

    groups: tuple[tuple[int, int], ...]  # crops and tokens of each, in the buffer's order
    cu_seqlens: Tensor  # int32 [crops + 1], the end of each crop with a 0 in front
    fused: bool  # packed_attention has kernels for the device; else each group is a call of PyTorch's

    def views(self, x: Tensor) -> list[Tensor]:
        """[tokens, ...] -> a view [crops, tokens of each, ...] of every group."""
        parts = x.split([n * length for n, length in self.groups])
        return [part.unflatten(0, group) for part, group in zip(parts, self.groups, strict=True)]

    def first(self, x: Tensor) -> Tensor:
        """[tokens, C] -> every crop's first row, [crops, C]."""
        return joined([view[:, 0] for view in self.views(x)])


class KeptSamples(NamedTuple):
    """The crops that a branch is computed for, and those of them that it is added to."""

    crops: tuple[Tensor, ...] | None  # the former's indices in each group, int64; None for all
    mask: Tensor | None  # of the former, int64 [crops]: 1 where the branch is added, 0 where it is not; None for all 1
    packing: Packing  # of a buffer that holds the former alone
    scale: float  # 1 / (1 - rate), for those it is added to


def pack(groups: Sequence[tuple[int, int]], device: torch.device) -> Packing:
    """The packing of (crops, tokens of each) by group; made once for each set of sizes."""
    return _pack(tuple(groups), device)


@functools.lru_cache(maxsize=256)
def _pack(groups: tuple[tuple[int, int], ...], device: torch.device) -> Packing:
    lengths = [length for n, length in groups for _ in range(n)]
    with torch.inference_mode(False):
        ends = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device=device)
    return Packing(groups, ends, _has_kernels(device))


def _has_kernels(device: torch.device) -> bool:
    try:
        return choose("packed_attention", torch.empty(1, 3, 1, 64, dtype=torch.float32, device=device)) != "reference"
    except BackendError:  # asked for by name and unable: let the operation itself say so
        return True


def attend(qkv: Tensor, packing: Packing) -> Tensor:
    """[tokens, 3, H, d] -> [tokens, H * d], every crop attending within itself."""
    if packing.fused:
        longest = max(length for _, length in packing.groups)
        return packed_attention(qkv, packing.cu_seqlens, longest).flatten(1)
    outputs = []
    for group in packing.views(qkv):  # [n, L, 3, H, d]
        q, k, v = group.unbind(2)
        outputs.append(_attention(q, k, v))
    return joined(outputs)


def attend_first(q: Tensor, kv: Tensor, packing: Packing) -> Tensor:
    """Queries of first tokens alone: [crops, H, d] and [tokens, 2, H, d] -> [crops, H * d]."""
    outputs = []
    queries = q.split([n for n, _ in packing.groups])
    for query, group in zip(queries, packing.views(kv), strict=True):  # [n, H, d], [n, L, 2, H, d]
        k, v = group.unbind(2)
        outputs.append(_attention(query[:, None], k, v))
    return joined(outputs)


def _attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """[n, Q, H, d], [n, L, H, d] twice -> [n * Q, H * d]."""
    out = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
    return out.transpose(1, 2).flatten(2).flatten(0, 1)


def joined(parts: list[Tensor]) -> Tensor:
    """The parts one after the other, without a copy where there is one alone."""
    return parts[0] if len(parts) == 1 else torch.cat(parts)


# ---- stochastic depth ----
#
# A crop's branch is dropped with probability p, and multiplied by 1 / (1 - p) where it is not, so that its expectation
# is the branch: (1 - p) / (1 - p) = 1. Below GATHER_FROM each crop is drawn on its own, as in the original. From there
# on, the branch is computed for m = ceil(n (1 - p)) of n crops, taken at random; m - 1 of them are kept, and the last
# with probability f = n (1 - p) - (m - 1). A crop is then kept with probability ((m - 1) + f) / n = 1 - p, for every n.
#
# A GPU computes the branch of all crops and masks it, or from GATHER_FROM on that of the m crops: shapes never change.
# A CPU, whose shapes may, computes it for the crops that are kept.

GATHER_FROM = 0.2  # rate of a block; below it, copying crops costs a GPU more than computing all


def computed_count(n: int, rate: float) -> int:
    """How many of n crops a branch is computed for: a fixed number, so that shapes never change."""
    return n if rate < GATHER_FROM else math.ceil(n * (1 - rate) - 1e-9)


def take(x: Tensor, packing: Packing, samples: KeptSamples) -> Tensor:
    """The rows of [tokens, C] that the branch is computed for; a copy where those are not all."""
    return x if samples.crops is None else x.index_select(0, _rows(packing, samples.crops))


def without_dropped(samples: KeptSamples) -> KeptSamples:
    """The same without the dropped crops, so that no branch is computed for them, unless a group would be empty.

    Reads the mask, so it must be on the CPU.
    """
    if samples.mask is None or bool(samples.mask.all()):
        return samples._replace(mask=None)
    parts = samples.mask.split([n for n, _ in samples.packing.groups])
    places = [part.nonzero()[:, 0] for part in parts]
    if not all(map(len, places)):
        return samples
    crops = places if samples.crops is None else [i[place] for i, place in zip(samples.crops, places, strict=True)]
    groups = [(len(i), length) for i, (_, length) in zip(crops, samples.packing.groups, strict=True)]
    return KeptSamples(tuple(crops), None, pack(groups, samples.packing.cu_seqlens.device), samples.scale)


def add_to_kept(x: Tensor, branch: Tensor, packing: Packing, samples: KeptSamples) -> Tensor:
    """x [tokens, C] with `branch`, the rows that it was computed for, added to the kept crops' rows, scaled up."""
    mask = None
    if samples.mask is not None:
        parts = samples.mask.split([n for n, _ in samples.packing.groups])
        lengths = [length for _, length in packing.groups]
        mask = joined([part[:, None].expand(-1, n).flatten() for part, n in zip(parts, lengths, strict=True)])[:, None]
    rows = None if samples.crops is None else _rows(packing, samples.crops)
    if torch.compiler.is_compiling():
        product = branch if mask is None else branch * mask.to(branch.dtype)
        return (
            x.add(product, alpha=samples.scale) if rows is None else x.index_add(0, rows, product, alpha=samples.scale)
        )
    return cast(Tensor, _AddRows.apply(x, branch, mask, rows, samples.scale))


class _AddRows(torch.autograd.Function):
    """PyTorch's own operation keeps the branch for its backward, to know its shape; here it can be freed.

    The scale is no tensor of the branch's dtype: rounded to bfloat16, it would no longer be the inverse of the share
    that is kept.
    """

    @staticmethod
    def forward(x: Tensor, branch: Tensor, mask: Tensor | None, rows: Tensor | None, scale: float) -> Tensor:
        mask = None if mask is None else mask.to(branch.dtype)
        if rows is None:
            return x.add(branch, alpha=scale) if mask is None else torch.addcmul(x, branch, mask, value=scale)
        return x.index_add(0, rows, branch if mask is None else branch * mask, alpha=scale)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, branch, mask, rows, ctx.scale = inputs
        ctx.dtype = branch.dtype
        ctx.save_for_backward(mask, rows)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        mask, rows = ctx.saved_tensors
        grad_branch = grad if rows is None else grad.index_select(0, rows)
        weights = ctx.scale
        if mask is not None:
            weights = mask.to(torch.promote_types(grad.dtype, torch.float32)) * ctx.scale
        return grad, (grad_branch * weights).to(ctx.dtype), None, None, None


def _rows(packing: Packing, crops: Sequence[Tensor]) -> Tensor:
    """The rows of crops, given by their indices in each group, in a buffer of `packing`."""
    rows, start = [], 0
    for (n, length), indices in zip(packing.groups, crops, strict=True):
        within = torch.arange(length, dtype=torch.int64, device=indices.device)
        rows.append((indices[:, None] * length + within).flatten() + start)
        start += n * length
    return joined(rows)
