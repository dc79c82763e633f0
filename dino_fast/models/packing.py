"""Crops of several resolutions as one buffer of tokens: where each lies, how they attend, which of them are kept.

The crops of one resolution are a group; groups lie one after the other, so a buffer is [sum of crops * tokens, C] and a
group is a view of it. Everything that works token by token is then one call for all resolutions.
"""

from __future__ import annotations

import functools
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


class Kept(NamedTuple):
    """The crops whose branch is computed."""

    crops: tuple[Tensor, ...]  # their indices in each group, int64
    packing: Packing  # of a buffer that holds them alone


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


def kept_count(n: int, rate: float) -> int:
    """How many of n crops are kept: a fixed number, so that shapes never change."""
    return max(1, round(n * (1 - rate)))


def take(x: Tensor, packing: Packing, kept: Kept) -> Tensor:
    """The kept crops' rows of [tokens, C], a copy."""
    return x.index_select(0, joined(_rows(packing, kept)))


def add_to_kept(x: Tensor, branch: Tensor, packing: Packing, kept: Kept) -> Tensor:
    """x [tokens, C] with `branch` added to the kept crops' rows, scaled up so that its mean is that over all crops."""
    scales = [n / len(crops) for (n, _), crops in zip(packing.groups, kept.crops, strict=True)]
    function = _add_rows if torch.compiler.is_compiling() else _AddRows.apply
    return cast(Tensor, function(x, branch, scales, *_rows(packing, kept)))


def _add_rows(x: Tensor, branch: Tensor, scales: list[float], *rows: Tensor) -> Tensor:
    parts = branch.split([len(indices) for indices in rows])
    out = x.index_add(0, rows[0], parts[0], alpha=scales[0])
    for indices, part, scale in zip(rows[1:], parts[1:], scales[1:], strict=True):
        out.index_add_(0, indices, part, alpha=scale)
    return out


class _AddRows(torch.autograd.Function):
    """PyTorch's keeps the branch for its backward, to know its shape; here it can be freed."""

    @staticmethod
    def forward(x: Tensor, branch: Tensor, scales: list[float], *rows: Tensor) -> Tensor:
        return _add_rows(x, branch, scales, *rows)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, _, ctx.scales, *rows = inputs
        ctx.save_for_backward(*rows)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        rows = ctx.saved_tensors
        parts = [grad.index_select(0, i).mul_(scale) for i, scale in zip(rows, ctx.scales, strict=True)]
        return grad, joined(parts), None, *(None for _ in rows)


def _rows(packing: Packing, kept: Kept) -> list[Tensor]:
    """The kept crops' rows in a buffer of `packing`, group by group."""
    rows, start = [], 0
    for (n, length), crops in zip(packing.groups, kept.crops, strict=True):
        within = torch.arange(length, dtype=torch.int64, device=crops.device)
        rows.append((crops[:, None] * length + within).flatten() + start)
        start += n * length
    return rows
