"""Attention within sequences of different lengths that lie one after the other in one buffer.

With q, k, v the three parts of row i of the packed projection [tokens, 3, H, d], for each head and each sequence

    p(i, j) = softmax_j(q_i . k_j / sqrt(d))       j over the tokens of i's own sequence
    out(i)  = sum_j p(i, j) v_j

    dv_j = sum_i p(i, j) do_i,   ds(i, j) = p(i, j) (do_i . v_j - do_i . out_i),
    dq_i = sum_j ds(i, j) k_j / sqrt(d),   dk_j = sum_i ds(i, j) q_i / sqrt(d)

(Vaswani et al. 2017, section 3.2.1; the backward from the output as in Dao et al. 2022, appendix B.)

The native kernels read the buffer where it lies and keep nothing for the backward but it. PyTorch's attention, the next
choice on a CPU, takes all sequences of one length in one call: where they lie side by side on views of the buffer,
elsewhere on rows gathered from it. On a GPU one Triton kernel each way takes all lengths, without looking at them from
the host.
"""

from __future__ import annotations

import functools
import importlib
import os
from collections.abc import Callable
from itertools import pairwise
from typing import Any, cast

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from dino_fast import gpu
from dino_fast.backends import (
    Backend,
    Preference,
    choose,
    native_unavailable_reason,
    register,
    triton_unavailable_reason,
)
from dino_fast.ops import autograd
from dino_fast.ops.layout import contiguous_rows
from dino_fast.ops.packed_attention import by_length as grouped
from dino_fast.ops.packed_attention import native as packed_attention_cpu

KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
DTYPES = (*KERNEL_DTYPES, torch.float64)
REFERENCE = "dino_fast.ops.packed_attention.packed_attention_reference"


def packed_attention(qkv: Tensor, cu_seqlens: Tensor, max_seqlen: int, *, backend: str = "auto") -> Tensor:
    """Every token attends to the tokens of its own sequence, head by head: [tokens, 3, H, d] -> [tokens, H, d].

    Args:
        qkv: queries, keys and values [tokens, 3, H, d] as one projection writes them; float32, bfloat16, float16 or
            float64. Any strides; rows of d that are not contiguous are copied. Under autocast float32 is taken in
            autocast's dtype, as PyTorch's own attention does.
        cu_seqlens: int32 [n + 1] on the same device, 0, then the end of each sequence; the last is `tokens`. A sequence
            may be empty.
        max_seqlen: the longest sequence, or more.
        backend: "auto" or a name that `dino-fast info` lists; see `dino_fast.backends`.

    The values of `cu_seqlens` are checked on a CPU only: on an accelerator looking at them would wait for it, and ends
    that do not fit `qkv` or a `max_seqlen` that is too small give wrong results. NaN and inf spread within their own
    sequence. One derivative, w.r.t. `qkv`, in reverse mode; others are refused.

    Raises:
        ValueError: shapes, dtypes, devices or ends that do not fit, said in the message.
        BackendError: an explicitly chosen backend cannot run these inputs.
    """
    device = qkv.device.type
    if qkv.dtype == torch.float32 and device != "meta" and torch.is_autocast_enabled(device):
        qkv = qkv.to(torch.get_autocast_dtype(device))
    if autograd.is_plain(qkv, cu_seqlens):
        # The dispatcher's way to the same functions takes 0.2 ms, a third of the time of a batch of short crops.
        return cast(Tensor, _Direct.apply(qkv, cu_seqlens, max_seqlen, backend))
    return cast(Tensor, torch.ops.dino_fast.packed_attention_forward(qkv, cu_seqlens, max_seqlen, backend)[0])


def validate_inputs(qkv: Tensor, cu_seqlens: Tensor, max_seqlen: int) -> None:
    """Raises ValueError for inputs that do not fit; the message names the given and the accepted ones."""
    if qkv.ndim != 4 or qkv.shape[1] != 3:
        raise ValueError(
            f"packed_attention: qkv is [tokens, 3, heads, width of a head]; got {list(qkv.shape)}. "
            "A projection's output [tokens, 3 * H * d] becomes that with .view(tokens, 3, H, d)"
        )
    if 0 in qkv.shape[2:]:
        raise ValueError(
            f"packed_attention: there must be at least one head, of width at least one; got qkv {list(qkv.shape)}"
        )
    if qkv.dtype not in DTYPES:
        known = ", ".join(str(dtype).removeprefix("torch.") for dtype in DTYPES)
        raise ValueError(f"packed_attention: qkv's dtype is {qkv.dtype}; accepted are {known}")
    if cu_seqlens.ndim != 1 or cu_seqlens.shape[0] < 1:
        raise ValueError(
            f"packed_attention: cu_seqlens is [n + 1] for n sequences, beginning with 0; got {list(cu_seqlens.shape)}"
        )
    if cu_seqlens.dtype != torch.int32:
        raise ValueError(
            f"packed_attention: cu_seqlens is int32; got {cu_seqlens.dtype}. Convert it with .to(torch.int32)"
        )
    if cu_seqlens.device != qkv.device:
        raise ValueError(
            f"packed_attention: cu_seqlens is on {cu_seqlens.device} but qkv on {qkv.device}; move one of them"
        )
    if max_seqlen < 0:
        raise ValueError(f"packed_attention: max_seqlen is the longest sequence's number of tokens; got {max_seqlen}")


def packed_attention_reference(qkv: Tensor, cu_seqlens: Tensor) -> Tensor:
    """The definition in plain PyTorch, sequence by sequence, in float64 for float64 and float32 for all others."""
    ends = cu_seqlens.tolist()
    outputs = [qkv.new_empty((0, *qkv.shape[2:]), dtype=grouped.wide(qkv))]
    for begin, end in pairwise(ends):
        q, k, v = qkv[begin:end].to(grouped.wide(qkv)).unbind(1)  # [L, H, d] each
        scores = torch.einsum("ihd,jhd->hij", q, k) * q.shape[-1] ** -0.5
        outputs.append(torch.einsum("hij,jhd->ihd", scores.softmax(-1), v))
    return torch.cat(outputs).to(qkv.dtype)


# --- the operator ---------------------------------------------------------------------------------------------------
# For the backward alone: `statistics` [2, H, tokens], float32 (float64 for float64). Of a row, either the largest q . k
# and the sum of e^((q . k - largest) / sqrt(d)), which is at least 1; or, where a backend has no other, the logarithm
# of the sum of e^(q . k / sqrt(d)) and 0.


def _forward(qkv: Tensor, cu_seqlens: Tensor, max_seqlen: int, backend: str) -> tuple[Tensor, Tensor]:
    validate_inputs(qkv, cu_seqlens, max_seqlen)
    chosen = choose("packed_attention", qkv, max_seqlen, backend=backend)
    _check_ends(qkv, cu_seqlens, max_seqlen)
    return FORWARD[chosen](qkv, cu_seqlens, max_seqlen)


def _fake_forward(qkv: Tensor, cu_seqlens: Tensor, max_seqlen: int, backend: str) -> tuple[Tensor, Tensor]:
    validate_inputs(qkv, cu_seqlens, max_seqlen)
    return grouped.empty_outputs(qkv)


def _gradient(
    grad: Tensor,
    qkv: Tensor,
    cu_seqlens: Tensor,
    out: Tensor,
    statistics: Tensor,
    max_seqlen: int,
    backend: str,
) -> Tensor:
    """The gradient w.r.t. qkv, [tokens, 3, H, d], from the output's and the same backend's `out` and statistics."""
    _validate_backward(grad, qkv, cu_seqlens, out, statistics, max_seqlen)
    return _run_backward(grad, qkv, cu_seqlens, out, statistics, max_seqlen, backend)


def _fake_gradient(
    grad: Tensor,
    qkv: Tensor,
    cu_seqlens: Tensor,
    out: Tensor,
    statistics: Tensor,
    max_seqlen: int,
    backend: str,
) -> Tensor:
    _validate_backward(grad, qkv, cu_seqlens, out, statistics, max_seqlen)
    return qkv.new_empty(qkv.shape)


def _validate_backward(
    grad: Tensor, qkv: Tensor, cu_seqlens: Tensor, out: Tensor, statistics: Tensor, max_seqlen: int
) -> None:
    validate_inputs(qkv, cu_seqlens, max_seqlen)
    tokens, _, H, d = qkv.shape
    expected = {
        "output's gradient": (grad, (tokens, H, d), None),
        "output": (out, (tokens, H, d), qkv.dtype),
        "statistics": (statistics, (2, H, tokens), grouped.wide(qkv)),
    }
    for name, (tensor, shape, dtype) in expected.items():
        if tensor.shape != shape or tensor.dtype != (dtype or tensor.dtype):
            raise ValueError(
                f"packed_attention: the {name} must be {dtype or 'a float'} {list(shape)}, as qkv {list(qkv.shape)} "
                f"says; got {tensor.dtype} {list(tensor.shape)}"
            )
        if tensor.device != qkv.device:
            raise ValueError(f"packed_attention: the {name} is on {tensor.device} but qkv on {qkv.device}")


def _run_backward(
    grad: Tensor,
    qkv: Tensor,
    cu_seqlens: Tensor,
    out: Tensor,
    statistics: Tensor,
    max_seqlen: int,
    backend: str,
) -> Tensor:
    _check_ends(qkv, cu_seqlens, max_seqlen)  # compiled code saves the caller's, which numpy may have changed
    chosen = choose("packed_attention", qkv, max_seqlen, backend=backend)
    return BACKWARD[chosen](grad, qkv, cu_seqlens, out, statistics, max_seqlen)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    qkv, cu_seqlens, max_seqlen, backend = inputs
    out, statistics = output
    ctx.mark_non_differentiable(statistics)
    ctx.set_materialize_grads(False)
    _keep_for_backward(ctx, qkv, cu_seqlens, out, statistics, max_seqlen, backend)


def _keep_for_backward(
    ctx: Any, qkv: Tensor, cu_seqlens: Tensor, out: Tensor, statistics: Tensor, max_seqlen: int, backend: str
) -> None:
    ctx.max_seqlen, ctx.backend = max_seqlen, backend
    # numpy may write new ends between forward and backward, and autograd would not see it: on the host, a copy is kept.
    ends = cu_seqlens.clone() if cu_seqlens.device.type == "cpu" else autograd.savable(cu_seqlens)
    ctx.save_for_backward(qkv, ends, out, statistics)


@autograd.once_differentiable("packed_attention", REFERENCE)
def _backward(ctx: Any, grad: Tensor | None, unused: Tensor | None) -> tuple[Tensor | None, ...]:
    if grad is None:
        return None, None, None, None
    saved = ctx.saved_tensors
    gradient = torch.ops.dino_fast.packed_attention_backward(grad, *saved, ctx.max_seqlen, ctx.backend)
    return gradient, None, None, None


def flops(qkv: Tensor, cu_seqlens: Tensor, max_seqlen: int, *, products: int = 2) -> int:
    """Floating-point operations of `products` matrix products a head and sequence: 2 in the forward, 5 in the backward.

    Where the ends have no values (fake tensors), those of sequences that all have `max_seqlen` tokens: an upper bound.
    """
    tokens, _, H, d = qkv.shape
    fake = isinstance(cu_seqlens, FakeTensor)
    pairs = tokens * max_seqlen if fake else int(cu_seqlens.long().diff().square().sum())
    return products * 2 * pairs * H * d


def _forward_flops(qkv: Tensor, cu_seqlens: Tensor, max_seqlen: int, *_: Any) -> int:
    return flops(qkv, cu_seqlens, max_seqlen)


def _backward_flops(*arguments: Any) -> int:
    return flops(arguments[1], arguments[2], arguments[5], products=5)


autograd.define_operator(
    "packed_attention_forward", _forward, _fake_forward, alternative=REFERENCE, backward=_backward,
    setup_context=_setup_context, flops=_forward_flops,
)  # fmt: skip
autograd.define_operator(
    "packed_attention_backward", _gradient, _fake_gradient, alternative=REFERENCE, flops=_backward_flops
)


class _Direct(torch.autograd.Function):
    """The operator without the dispatcher, for plain tensors."""

    @staticmethod
    def forward(ctx: Any, qkv: Tensor, cu_seqlens: Tensor, max_seqlen: int, backend: str) -> Tensor:
        out, statistics = _forward(qkv, cu_seqlens, max_seqlen, backend)
        _keep_for_backward(ctx, qkv, cu_seqlens, out, statistics, max_seqlen, backend)
        return out

    @staticmethod
    @autograd.once_differentiable("packed_attention", REFERENCE)
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        qkv, ends, out, statistics = ctx.saved_tensors
        return _run_backward(grad, qkv, ends, out, statistics, ctx.max_seqlen, ctx.backend), None, None, None


def _check_ends(qkv: Tensor, cu_seqlens: Tensor, max_seqlen: int) -> None:
    """Raises ValueError for ends that do not fit, where looking at them does not wait for an accelerator."""
    if cu_seqlens.device.type != "cpu":
        return
    ends = cu_seqlens.tolist()
    lengths = [end - begin for begin, end in pairwise(ends)]
    if ends[0] != 0 or ends[-1] != qkv.shape[0] or min(lengths, default=0) < 0:
        shown = f"{ends[:8]}{' ...' if len(ends) > 8 else ''} to {ends[-1]}"
        raise ValueError(
            f"packed_attention: cu_seqlens begins with 0, never falls and ends with the number of tokens, "
            f"{qkv.shape[0]}; got {shown}. It is the cumulative sum of the lengths with a 0 in front"
        )
    if max(lengths, default=0) > max_seqlen:
        raise ValueError(
            f"packed_attention: the longest sequence has {max(lengths)} tokens, max_seqlen is {max_seqlen}"
        )


# --- backends, fastest first ----------------------------------------------------------------------------------------
# Which is fastest on a GPU depends on the length of the sequences; benchmarks/bench_packed_attention.py measures it.

# By the name of a GPU: (longest sequence up to which a backend was fastest in 16 bits, its name), in order. No GPU has
# measured it yet.
MEASURED: dict[str, tuple[tuple[int, str], ...]] = {}
# Until then: the kernel here is made for crops, of up to 518 pixels in patches of 14; past them PyTorch's, made for
# long sequences. One that cannot run the inputs is passed over.
UNMEASURED = ((1370, "triton"), (1 << 31, "varlen"))


def _rule() -> tuple[tuple[tuple[int, str], ...], str]:
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else ""
    return MEASURED.get(name, UNMEASURED), name


def _fastest(qkv: Tensor, max_seqlen: int = 0) -> str | None:
    if qkv.device.type != "cuda":
        return None
    return next(name for longest, name in _rule()[0] if max_seqlen <= longest)


def _explain() -> str:
    rule, gpu = _rule()
    parts = [f"{name} up to {longest} tokens" if longest < 1 << 31 else f"then {name}" for longest, name in rule]
    source = f"measured on {gpu}" if gpu in MEASURED else "a guess that no measurement stands behind yet"
    return f"on a GPU, by the longest sequence: {', '.join(parts)} ({source})"


def _triton_unsupported_reason(qkv: Tensor, max_seqlen: int = 0) -> str | None:
    if qkv.device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        return f"it runs on CUDA (on the CPU under TRITON_INTERPRET=1), qkv is on {qkv.device}"
    if qkv.dtype not in KERNEL_DTYPES:
        return f"it takes float32, bfloat16 and float16, not {qkv.dtype}"
    if qkv.shape[-1] > 128:
        return f"it takes heads of at most 128 elements, not {qkv.shape[-1]}"
    if qkv.ndim == 4 and qkv.shape[2] > 65535:
        return f"it takes at most 65535 heads, not {qkv.shape[2]}"
    return gpu.too_old(qkv.device)


def _native_unsupported_reason(qkv: Tensor, max_seqlen: int = 0) -> str | None:
    return packed_attention_cpu.unsupported_reason(qkv)


def _sdpa_unsupported_reason(qkv: Tensor, max_seqlen: int = 0) -> str | None:
    if qkv.device.type == "cpu":
        return None
    from dino_fast.ops.packed_attention.cuda import sdpa_unsupported_reason

    return sdpa_unsupported_reason(qkv)


def _varlen_unsupported_reason(qkv: Tensor, max_seqlen: int = 0) -> str | None:
    from dino_fast.ops.packed_attention.cuda import varlen_unsupported_reason

    return varlen_unsupported_reason(qkv)


def _xformers_unsupported_reason(qkv: Tensor, max_seqlen: int = 0) -> str | None:
    from dino_fast.ops.packed_attention.cuda import xformers_unsupported_reason

    return xformers_unsupported_reason(qkv)


@functools.cache
def _xformers_unavailable_reason() -> str | None:
    try:
        import xformers.ops  # noqa: F401
    except ImportError as error:
        return f"xformers does not import ({error}); it comes with `pip install dino-fast[xformers]`"
    return None


def _example(device: torch.device) -> tuple[Tensor, int]:
    return torch.empty((2 * 197, 3, 6, 64), dtype=gpu.usual_dtype(device), device=device), 197


register(
    "packed_attention",
    Backend("triton", unavailable_reason=triton_unavailable_reason, unsupported_reason=_triton_unsupported_reason),
    Backend("varlen", unsupported_reason=_varlen_unsupported_reason),
    Backend(
        "xformers", unavailable_reason=_xformers_unavailable_reason, unsupported_reason=_xformers_unsupported_reason
    ),
    Backend("native", native_unavailable_reason, _native_unsupported_reason),
    Backend("sdpa", unsupported_reason=_sdpa_unsupported_reason),
    Backend("reference"),
    example=_example,
    preference=Preference(_fastest, _explain),
)


def _triton_forward(qkv: Tensor, cu_seqlens: Tensor, max_seqlen: int) -> tuple[Tensor, Tensor]:
    from dino_fast.kernels import packed_attention as kernels

    out, statistics = grouped.empty_outputs(qkv)
    kernels.forward(contiguous_rows(qkv), cu_seqlens.contiguous(), max_seqlen, out, *statistics)
    return out, statistics


def _triton_backward(
    grad: Tensor, qkv: Tensor, cu_seqlens: Tensor, out: Tensor, statistics: Tensor, max_seqlen: int
) -> Tensor:
    from dino_fast.kernels import packed_attention as kernels

    gradient, (grad, qkv) = qkv.new_empty(qkv.shape), (contiguous_rows(grad), contiguous_rows(qkv))
    kernels.backward(grad, qkv, cu_seqlens.contiguous(), max_seqlen, out, *statistics, gradient)
    return gradient


def _sdpa_functions(qkv: Tensor) -> tuple[grouped.Attention, grouped.AttentionBackward]:
    if qkv.device.type == "cpu":
        return grouped.sdpa, grouped.sdpa_backward
    from dino_fast.ops.packed_attention.cuda import sdpa, sdpa_backward

    return sdpa, sdpa_backward


def _sdpa_forward(qkv: Tensor, cu_seqlens: Tensor, max_seqlen: int) -> tuple[Tensor, Tensor]:
    return grouped.per_length(_sdpa_functions(qkv)[0])(qkv, cu_seqlens, max_seqlen)


def _sdpa_gradient(
    grad: Tensor, qkv: Tensor, cu_seqlens: Tensor, out: Tensor, statistics: Tensor, max_seqlen: int
) -> Tensor:
    return grouped.per_length_backward(_sdpa_functions(qkv)[1])(grad, qkv, cu_seqlens, out, statistics, max_seqlen)


def _peer(name: str) -> Callable[..., Any]:
    """A function of dino_fast.ops.packed_attention.cuda, imported when it is called."""

    def call(*arguments: Any) -> Any:
        return getattr(importlib.import_module("dino_fast.ops.packed_attention.cuda"), name)(*arguments)

    return call


FORWARD: dict[str, Callable[..., tuple[Tensor, Tensor]]] = {
    "triton": _triton_forward,
    "varlen": _peer("varlen"),
    "xformers": _peer("xformers"),
    "native": packed_attention_cpu.forward,
    "sdpa": _sdpa_forward,
    "reference": grouped.per_length(grouped.math),
}
BACKWARD: dict[str, Callable[..., Tensor]] = {
    "triton": _triton_backward,
    "varlen": _peer("varlen_backward"),
    "xformers": _peer("xformers_backward"),
    "native": packed_attention_cpu.backward,
    "sdpa": _sdpa_gradient,
    "reference": grouped.per_length_backward(grouped.math_backward),
}
