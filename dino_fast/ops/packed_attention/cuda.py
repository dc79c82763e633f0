"""`packed_attention` through other people's kernels on a GPU.

    varlen    PyTorch's flash attention over packed sequences, as in torch.nn.attention.varlen
    xformers  memory_efficient_attention under a block-diagonal mask, where xformers is installed
    sdpa      PyTorch's attention, a call per distinct length

The last two must know the lengths on the host, so they wait for the GPU; `varlen` does not. Statistics are those of
dino_fast/ops/packed_attention/__init__.py: each row's logarithm of the sum of exponentials, and 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from dino_fast import gpu
from dino_fast.ops.layout import contiguous_rows

HALF = (torch.bfloat16, torch.float16)
WIDEST = 256  # elements of a head that PyTorch's flash attention takes


def varlen_unsupported_reason(qkv: Tensor) -> str | None:
    """Why PyTorch's packed flash attention cannot take this qkv, or None."""
    return xformers_unsupported_reason(qkv) or gpu.too_old(qkv.device)


def xformers_unsupported_reason(qkv: Tensor) -> str | None:
    """Why xformers cannot take this qkv, or None."""
    if qkv.device.type != "cuda":
        return f"it runs on CUDA, qkv is on {qkv.device}"
    if qkv.dtype not in HALF:
        return f"it takes bfloat16 and float16, not {qkv.dtype}"
    if qkv.shape[-1] > WIDEST or qkv.shape[-1] % 8:
        return f"it takes heads of a multiple of 8 elements, at most {WIDEST}, not {qkv.shape[-1]}"
    return _no_bfloat16(qkv)


def _no_bfloat16(qkv: Tensor) -> str | None:
    return gpu.too_old(qkv.device) if qkv.dtype == torch.bfloat16 else None


def sdpa_unsupported_reason(qkv: Tensor) -> str | None:
    """Why PyTorch's attention on a GPU cannot take this qkv, or None."""
    if qkv.device.type != "cuda":
        return f"it calls PyTorch's attention for CPUs or for CUDA, qkv is on {qkv.device}"
    if qkv.dtype not in (*HALF, torch.float32):
        return f"on a GPU it takes float32, bfloat16 and float16, not {qkv.dtype}"
    if qkv.shape[-1] > WIDEST or qkv.shape[-1] % 8:
        return f"on a GPU it takes heads of a multiple of 8 elements, at most {WIDEST}, not {qkv.shape[-1]}"
    return _no_bfloat16(qkv)


def _flash(q: Tensor) -> bool:
    """Whether PyTorch's flash attention takes these; its memory-efficient attention takes all others here."""
    return q.dtype in HALF and gpu.too_old(q.device) is None


def _parts(qkv: Tensor) -> list[Tensor]:
    """q, k, v [tokens, H, d], views where the elements of a row lie side by side."""
    return list(contiguous_rows(qkv).unbind(1))


def _with_zeros(logsumexp: Tensor) -> Tensor:
    return torch.stack([logsumexp, torch.zeros_like(logsumexp)])


# --- flash attention over packed sequences ----------------------------------------------------------------------------


def varlen(qkv: Tensor, cu_seqlens: Tensor, max_seqlen: int) -> tuple[Tensor, Tensor]:
    """(out [tokens, H, d], statistics [2, H, tokens] float32): see the operator."""
    ends = (cu_seqlens, cu_seqlens, max_seqlen, max_seqlen)
    out, logsumexp, *_ = torch.ops.aten._flash_attention_forward(*_parts(qkv), *ends, 0.0, False, False)
    return out, _with_zeros(logsumexp)  # [tokens, H, d], [H, tokens]


def varlen_backward(
    grad: Tensor, qkv: Tensor, cu_seqlens: Tensor, out: Tensor, statistics: Tensor, max_seqlen: int
) -> Tensor:
    """The gradient w.r.t. qkv [tokens, 3, H, d], in its dtype."""
    ends = (cu_seqlens, cu_seqlens, max_seqlen, max_seqlen)
    no_dropout = (
        torch.zeros(2, dtype=torch.uint64, device=qkv.device),
        torch.empty(0, dtype=torch.uint64, device=qkv.device),
    )
    gradients = torch.ops.aten._flash_attention_backward(
        grad.contiguous(), *_parts(qkv), out, statistics[0].contiguous(), *ends, 0.0, False, *no_dropout
    )
    return torch.stack(gradients, dim=1)


# --- xformers ---------------------------------------------------------------------------------------------------------


def _mask(ops: Any, cu_seqlens: Tensor) -> Any:
    lengths = [end - begin for begin, end in pairwise(cu_seqlens.tolist())]
    return ops.fmha.attn_bias.BlockDiagonalMask.from_seqlens(lengths)


def xformers(qkv: Tensor, cu_seqlens: Tensor, max_seqlen: int) -> tuple[Tensor, Tensor]:
    """(out [tokens, H, d], statistics [2, H, tokens] float32): see the operator."""
    import xformers.ops as ops

    q, k, v = (x[None] for x in _parts(qkv))  # [1, tokens, H, d]
    out, logsumexp = ops.fmha.memory_efficient_attention_forward_requires_grad(
        q, k, v, attn_bias=_mask(ops, cu_seqlens)
    )
    tokens, _, H, _ = qkv.shape
    return out[0], _with_zeros(logsumexp.reshape(H, -1)[:, :tokens])


def xformers_backward(
    grad: Tensor, qkv: Tensor, cu_seqlens: Tensor, out: Tensor, statistics: Tensor, max_seqlen: int
) -> Tensor:
    """The gradient w.r.t. qkv [tokens, 3, H, d], in its dtype."""
    import xformers.ops as ops

    q, k, v = (x[None] for x in _parts(qkv))
    gradients = ops.fmha.memory_efficient_attention_backward(
        grad.contiguous()[None], out[None], statistics[0][None].contiguous(), q, k, v,
        attn_bias=_mask(ops, cu_seqlens),
    )  # fmt: skip
    return torch.stack([x[0] for x in gradients], dim=1)


# --- PyTorch's attention, n sequences of one length: q, k, v [n, H, L, d] ---------------------------------------------


def sdpa(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """(out [n, H, L, d] in q's dtype, logsumexp [n, H, L] float32)."""
    if _flash(q):
        out, logsumexp, *_ = torch.ops.aten._scaled_dot_product_flash_attention(q, k, v)
    else:
        out, logsumexp, *_ = torch.ops.aten._scaled_dot_product_efficient_attention(q, k, v, None, True)
    return out, logsumexp[..., : q.shape[2]]  # the second pads its rows to a multiple of 32


def sdpa_backward(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, logsumexp: Tensor) -> tuple[Tensor, ...]:
    """The gradients of `sdpa` w.r.t. q, k and v, in their dtype."""
    L = q.shape[2]
    gradients: Sequence[Tensor]
    if _flash(q):
        seed = torch.zeros(2, dtype=torch.uint64, device=q.device)
        nothing = torch.empty(0, dtype=torch.uint64, device=q.device)
        gradients = torch.ops.aten._scaled_dot_product_flash_attention_backward(
            grad, q, k, v, out, logsumexp.contiguous(), None, None, L, L, 0.0, False, seed, nothing
        )
        return tuple(gradients)
    padded = torch.nn.functional.pad(logsumexp, (0, -L % 32))
    seed = torch.zeros((), dtype=torch.int64, device=q.device)
    *gradients, _ = torch.ops.aten._scaled_dot_product_efficient_attention_backward(
        grad, q, k, v, None, out, padded.contiguous(), seed, seed, 0.0, [True, True, True, False]
    )
    return tuple(gradients)
