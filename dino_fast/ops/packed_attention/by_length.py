"""`packed_attention` as one call of an attention per distinct length, on q, k, v [n, H, L, d].

The attentions here are PyTorch's on a CPU, and the definition in steps. They give the output and each row's logarithm
of the sum of exponentials.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from dino_fast.ops.layout import contiguous_rows

# An attention on q, k, v [n, H, L, d] -> (out [n, H, L, d], logsumexp [n, H, L]), and its backward: (grad, q, k, v,
# out, logsumexp) -> the gradients w.r.t. q, k and v.
Attention = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
AttentionBackward = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor], tuple[Tensor, ...]]


def wide(x: Tensor) -> torch.dtype:
    """The dtype of statistics and of the reference's arithmetic: float64 for float64, else float32."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def empty_outputs(qkv: Tensor) -> tuple[Tensor, Tensor]:
    """Uninitialized out [tokens, H, d] and statistics [2, H, tokens] of an operator call on `qkv`."""
    tokens, _, H, d = qkv.shape
    return qkv.new_empty((tokens, H, d)), qkv.new_empty((2, H, tokens), dtype=wide(qkv))


class Group(NamedTuple):
    """The sequences of one length: n of L tokens, adjacent from `start`, or at `rows` [n * L] of the buffer."""

    n: int
    L: int
    start: int
    rows: Tensor | None

    def read(self, x: Tensor) -> Tensor:
        """[tokens, ...] -> [n, L, ...], a view where the sequences are adjacent."""
        taken = x[self.start : self.start + self.n * self.L] if self.rows is None else x.index_select(0, self.rows)
        sequences: Tensor = taken.unflatten(0, (self.n, self.L))
        return sequences

    def write(self, x: Tensor, value: Tensor) -> None:
        """Puts value [n, L, ...] where `read` would find it in x."""
        if self.rows is None:
            self.read(x).copy_(value)
        else:
            x.index_copy_(0, self.rows, value.flatten(0, 1).to(x.dtype))


def by_length(cu_seqlens: Tensor) -> Iterator[Group]:
    """The sequences in groups of one length, empty ones left out."""
    ends = cu_seqlens.tolist()
    starts = defaultdict(list)
    for begin, end in pairwise(ends):
        if end > begin:
            starts[end - begin].append(begin)
    for L, begins in starts.items():
        rows = None
        if begins[-1] - begins[0] != (len(begins) - 1) * L:
            first = torch.tensor(begins, dtype=torch.int64, device=cu_seqlens.device)
            rows = (first[:, None] + torch.arange(L, dtype=torch.int64, device=cu_seqlens.device)).flatten()
        yield Group(len(begins), L, begins[0], rows)


def _heads(group: Group, qkv: Tensor) -> tuple[Tensor, ...]:
    """q, k, v of a group, each [n, H, L, d]."""
    return group.read(qkv).permute(2, 0, 3, 1, 4).unbind(0)


def per_length(forward: Attention) -> Callable[[Tensor, Tensor, int], tuple[Tensor, Tensor]]:
    """Forward of an attention on q, k, v [n, H, L, d] -> (out, logsumexp [n, H, L]) for packed sequences."""

    def run(qkv: Tensor, cu_seqlens: Tensor, max_seqlen: int) -> tuple[Tensor, Tensor]:
        out, statistics = empty_outputs(qkv)
        statistics[1] = 0
        qkv = contiguous_rows(qkv)
        for group in by_length(cu_seqlens):
            group_out, group_logsumexp = forward(*_heads(group, qkv))
            group.write(out, group_out.transpose(1, 2))
            group.write(statistics[0].T, group_logsumexp.transpose(1, 2))
        return out, statistics

    return run


def per_length_backward(backward: AttentionBackward) -> Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, int], Tensor]:
    """Backward of the same: (grad, q, k, v, out, logsumexp) -> gradients w.r.t. q, k and v."""

    def run(grad: Tensor, qkv: Tensor, cu_seqlens: Tensor, out: Tensor, statistics: Tensor, max_seqlen: int) -> Tensor:
        gradient, logsumexp = qkv.new_empty(qkv.shape), statistics[0]
        grad, qkv = contiguous_rows(grad), contiguous_rows(qkv)
        for group in by_length(cu_seqlens):
            rows = [group.read(x).transpose(1, 2) for x in (grad, out, logsumexp.T)]  # [n, H, L, d], [n, H, L]
            for part, value in enumerate(backward(rows[0], *_heads(group, qkv), *rows[1:])):
                group.write(gradient[:, part], value.transpose(1, 2))
        return gradient

    return run


def math(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """The definition in steps, with all scores [n, H, L, L] in memory; results in `wide(q)`."""
    dtype = wide(q)
    scores = q.to(dtype) @ k.to(dtype).mT * q.shape[-1] ** -0.5  # [n, H, L, L]
    return scores.softmax(-1) @ v.to(dtype), scores.logsumexp(-1)


def math_backward(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, logsumexp: Tensor) -> tuple[Tensor, ...]:
    """The gradients of `math`, in `wide(q)`; the probabilities are computed again from q and k."""
    dtype, scale = wide(q), q.shape[-1] ** -0.5
    grad, q, k, v = (x.to(dtype) for x in (grad, q, k, v))
    # Not from the logsumexp: its rounding is an error of every probability of the row.
    p = (q @ k.mT * scale).softmax(-1)  # [n, H, L, L]
    dp = grad @ v.mT
    # p . dp is grad . out, here with the output that was not rounded
    ds = p * (dp - (p * dp).sum(-1, keepdim=True)) * scale
    return ds @ k, ds.mT @ q, p.mT @ grad


def sdpa(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """PyTorch's flash attention on a CPU: out in q's dtype, float32 logsumexp (float64 for float64)."""
    out, logsumexp = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v)
    # In short sequences it takes a row of nothing but NaN for a masked one, and gives zeros and a logsumexp of 0.
    suspect = logsumexp == 0
    if suspect.any():
        exact, exact_logsumexp = math(q, k, v)
        out = torch.where(suspect[..., None], exact.to(out.dtype), out)
        logsumexp = torch.where(suspect, exact_logsumexp, logsumexp)
    return out, logsumexp


def sdpa_backward(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, logsumexp: Tensor) -> tuple[Tensor, ...]:
    """The gradients of `sdpa` w.r.t. q, k and v, in their dtype."""
    backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
    gradients: tuple[Tensor, ...] = backward(grad, q, k, v, out, logsumexp, 0.0, False)
    return gradients
