"""The native backend of packed_attention: csrc/cpu/packed_attention.cpp on the buffers as they lie."""

from __future__ import annotations

import torch
from torch import Tensor

from dino_fast.ops.layout import contiguous_rows

_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


def unsupported_reason(*tensors: Tensor) -> str | None:
    """Why the kernels cannot take these inputs, or None."""
    for t in tensors:
        if t.device.type != "cpu":
            return f"the C++ kernels run on CPU tensors; one is on {t.device}"
        if t.dtype not in _CODES:
            return f"the C++ kernels take float32, bfloat16 and float16; one tensor is {t.dtype}"
    return None


def forward(qkv: Tensor, cu_seqlens: Tensor, max_seqlen: int) -> tuple[Tensor, Tensor]:
    """(out [tokens, H, d], statistics [2, H, tokens]): see the operator."""
    from dino_fast import _C

    qkv, ends = contiguous_rows(qkv), cu_seqlens.contiguous()
    tokens, _, H, d = qkv.shape
    out, statistics = qkv.new_empty((tokens, H, d)), qkv.new_empty((2, H, tokens), dtype=torch.float32)
    statistics[1] = 0
    sequences = _description(qkv, ends)
    _C.packed_attention_forward(sequences, out.data_ptr(), statistics.data_ptr(), torch.get_num_threads())
    return out, statistics


def backward(grad: Tensor, qkv: Tensor, cu_seqlens: Tensor, out: Tensor, statistics: Tensor, max_seqlen: int) -> Tensor:
    """The gradient w.r.t. qkv [tokens, 3, H, d]; the softmax is taken anew, without rounding in between."""
    from dino_fast import _C

    grad, qkv, ends = grad.to(qkv.dtype).contiguous(), contiguous_rows(qkv), cu_seqlens.contiguous()
    gradient = torch.empty(qkv.shape, dtype=qkv.dtype, device="cpu")
    sequences = _description(qkv, ends)
    _C.packed_attention_backward(sequences, grad.data_ptr(), gradient.data_ptr(), torch.get_num_threads())
    return gradient


def _description(qkv: Tensor, ends: Tensor) -> tuple[int, ...]:
    """csrc/cpu/packed_attention.h's Sequences."""
    tokens, _, H, d = qkv.shape
    return qkv.data_ptr(), *qkv.stride()[:3], ends.data_ptr(), len(ends) - 1, tokens, H, d, _CODES[qkv.dtype]
