"""Attention within sequences of different lengths that lie one after the other in one buffer.

With q, k, v the three parts of row i of the packed projection [tokens, 3, H, d], for each head and each sequence

    p(i, j) = softmax_j(q_i . k_j / sqrt(d))       j over the tokens of i's own sequence
    out(i)  = sum_j p(i, j) v_j

    dv_j = sum_i p(i, j) do_i,   ds(i, j) = p(i, j) (do_i . v_j - do_i . out_i),
    dq_i = sum_j ds(i, j) k_j / sqrt(d),   dk_j = sum_i ds(i, j) q_i / sqrt(d)

(Vaswani et al. 2017, section 3.2.1; the backward from the output as in Dao et al. 2022, appendix B.)

The native kernels read the buffer where it lies and keep nothing for the backward but it. PyTorch's attention, the next
choice on a CPU, keeps the output and each row's log of the sum of exponentials; there all sequences of one length are
one call: where they lie side by side on views of the buffer, elsewhere on rows gathered from it.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from dino_fast.backends import Backend, choose, native_missing, register
from dino_fast.ops import packed_attention_cpu

KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
DTYPES = (*KERNEL_DTYPES, torch.float64)


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
    that do not fit `qkv` or a `max_seqlen` that is too small give wrong results. What is not finite spreads within its
    own sequence. One differentiation, by `qkv`.

    Raises:
        ValueError: shapes, dtypes, devices or ends that do not fit, said in the message.
        BackendError: an explicitly chosen backend cannot run these inputs.
    """
    problem = what_is_wrong(qkv, cu_seqlens, max_seqlen)
    if problem is not None:
        raise ValueError(f"packed_attention: {problem}")
    device = qkv.device.type
    if qkv.dtype == torch.float32 and torch.is_autocast_enabled(device):
        qkv = qkv.to(torch.get_autocast_dtype(device))
    if type(qkv) in _PLAIN and not torch.compiler.is_compiling():
        # The dispatcher's way to the same functions takes 0.2 ms, a third of what a batch of short crops does.
        return _Eager.apply(qkv, cu_seqlens, max_seqlen, backend)
    return torch.ops.dino_fast.packed_attention(qkv, cu_seqlens, max_seqlen, backend)[0]


def what_is_wrong(qkv: Tensor, cu_seqlens: Tensor, max_seqlen: int) -> str | None:
    """Why these inputs cannot be used, as far as shapes, dtypes and devices tell, or None."""
    if qkv.ndim != 4 or qkv.shape[1] != 3:
        return (
            f"qkv is [tokens, 3, heads, width of a head]; got {list(qkv.shape)}. "
            "A projection's output [tokens, 3 * H * d] becomes that with .view(tokens, 3, H, d)"
        )
    if 0 in qkv.shape[2:]:
        return f"there must be at least one head, of width at least one; got qkv {list(qkv.shape)}"
    if qkv.dtype not in DTYPES:
        known = ", ".join(str(dtype).removeprefix("torch.") for dtype in DTYPES)
        return f"qkv's dtype is {qkv.dtype}; accepted are {known}"
    if cu_seqlens.ndim != 1 or cu_seqlens.shape[0] < 1:
        return f"cu_seqlens is [n + 1] for n sequences, beginning with 0; got {list(cu_seqlens.shape)}"
    if cu_seqlens.dtype != torch.int32:
        return f"cu_seqlens is int32; got {cu_seqlens.dtype}. Convert it with .to(torch.int32)"
    if cu_seqlens.device != qkv.device:
        return f"cu_seqlens is on {cu_seqlens.device} but qkv on {qkv.device}; move one of them"
    if max_seqlen < 0:
        return f"max_seqlen is the longest sequence's number of tokens; got {max_seqlen}"
    return None


def packed_attention_reference(qkv: Tensor, cu_seqlens: Tensor) -> Tensor:
    """The definition in plain PyTorch, sequence by sequence, in float64 for float64 and float32 for all others."""
    ends = cu_seqlens.tolist()
    outputs = [qkv.new_empty((0, *qkv.shape[2:]), dtype=_wide(qkv))]
    for begin, end in pairwise(ends):
        q, k, v = qkv[begin:end].to(_wide(qkv)).unbind(1)  # [L, H, d] each
        scores = torch.einsum("ihd,jhd->hij", q, k) * q.shape[-1] ** -0.5
        outputs.append(torch.einsum("hij,jhd->ihd", scores.softmax(-1), v))
    return torch.cat(outputs).to(qkv.dtype)


def _wide(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


# --- the operator ---------------------------------------------------------------------------------------------------
# For the backward alone: `logsumexp` [H, tokens], float32 (float64 for float64), of q . k / sqrt(d), natural logarithm.


def _run(qkv: Tensor, cu_seqlens: Tensor, max_seqlen: int, backend: str = "auto") -> tuple[Tensor, Tensor]:
    chosen = choose("packed_attention", qkv, backend=backend)
    _check_ends(qkv, cu_seqlens, max_seqlen)
    return FORWARD[chosen](qkv, cu_seqlens, max_seqlen)


_operator = torch.library.custom_op("dino_fast::packed_attention", _run, mutates_args=())


@_operator.register_fake
def _(qkv, cu_seqlens, max_seqlen, backend="auto"):
    return _empty_outputs(qkv)


def _empty_outputs(qkv: Tensor) -> tuple[Tensor, Tensor]:
    tokens, _, H, d = qkv.shape
    return qkv.new_empty((tokens, H, d)), qkv.new_empty((H, tokens), dtype=_wide(qkv))


def _run_backward(
    grad: Tensor,
    qkv: Tensor,
    cu_seqlens: Tensor,
    out: Tensor,
    logsumexp: Tensor,
    max_seqlen: int,
    backend: str = "auto",
) -> Tensor:
    """The gradient by qkv, [tokens, 3, H, d], from the output's and what the forward kept."""
    chosen = choose("packed_attention", qkv, backend=backend)
    return BACKWARD[chosen](grad, qkv, cu_seqlens, out, logsumexp, max_seqlen)


_backward_operator = torch.library.custom_op("dino_fast::packed_attention_backward", _run_backward, mutates_args=())


@_backward_operator.register_fake
def _(grad, qkv, cu_seqlens, out, logsumexp, max_seqlen, backend="auto"):
    return qkv.new_empty(qkv.shape)


def _setup_context(ctx, inputs, output) -> None:
    qkv, cu_seqlens, max_seqlen, backend = inputs
    out, logsumexp = output
    ctx.mark_non_differentiable(logsumexp)
    ctx.set_materialize_grads(False)
    ctx.max_seqlen, ctx.backend = max_seqlen, backend
    ctx.save_for_backward(qkv, cu_seqlens, out, logsumexp)


def _backward(ctx, grad, unused):
    if grad is None:
        return None, None, None, None
    saved = ctx.saved_tensors
    gradient = torch.ops.dino_fast.packed_attention_backward(grad, *saved, ctx.max_seqlen, ctx.backend)
    return gradient, None, None, None


_operator.register_autograd(_backward, setup_context=_setup_context)


class _Eager(torch.autograd.Function):
    """The operator without the dispatcher, for plain tensors outside of tracing."""

    @staticmethod
    def forward(ctx, qkv, cu_seqlens, max_seqlen, backend):
        out, logsumexp = _run(qkv, cu_seqlens, max_seqlen, backend)
        ctx.max_seqlen, ctx.backend = max_seqlen, backend
        ctx.save_for_backward(qkv, cu_seqlens, out, logsumexp)
        return out

    @staticmethod
    def backward(ctx, grad):
        # Where the gradient is to be differentiated in its turn, the operator: it says that it cannot be.
        run = torch.ops.dino_fast.packed_attention_backward if torch.is_grad_enabled() else _run_backward
        return run(grad, *ctx.saved_tensors, ctx.max_seqlen, ctx.backend), None, None, None


_PLAIN = frozenset((Tensor, torch.nn.Parameter))  # no subclass with a dispatch of its own


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


# --- one call per distinct length -----------------------------------------------------------------------------------


class _Group(NamedTuple):
    """The sequences of one length: n of L tokens, adjacent from `start`, or at `rows` [n * L] of the buffer."""

    n: int
    L: int
    start: int
    rows: Tensor | None

    def read(self, x: Tensor) -> Tensor:
        """[tokens, ...] -> [n, L, ...], a view where the sequences are adjacent."""
        taken = x[self.start : self.start + self.n * self.L] if self.rows is None else x.index_select(0, self.rows)
        return taken.unflatten(0, (self.n, self.L))

    def write(self, x: Tensor, value: Tensor) -> None:
        """Puts value [n, L, ...] where `read` would find it in x."""
        if self.rows is None:
            self.read(x).copy_(value)
        else:
            x.index_copy_(0, self.rows, value.flatten(0, 1).to(x.dtype))


def by_length(cu_seqlens: Tensor) -> Iterator[_Group]:
    """The sequences in groups of one length, empty ones left out."""
    ends = cu_seqlens.tolist()
    starts = defaultdict(list)
    for begin, end in pairwise(ends):
        if end > begin:
            starts[end - begin].append(begin)
    for L, begins in starts.items():
        rows = None
        if begins[-1] - begins[0] != (len(begins) - 1) * L:
            first = torch.tensor(begins, device=cu_seqlens.device)
            rows = (first[:, None] + torch.arange(L, device=cu_seqlens.device)).flatten()
        yield _Group(len(begins), L, begins[0], rows)


def _heads(group: _Group, qkv: Tensor) -> tuple[Tensor, ...]:
    """q, k, v of a group, each [n, H, L, d]."""
    return group.read(qkv).permute(2, 0, 3, 1, 4).unbind(0)


def _contiguous_rows(x: Tensor) -> Tensor:
    """x, copied where the elements of a row of d do not lie side by side: the kernels assume that they do."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _per_length(forward):
    """Forward of an attention on q, k, v [n, H, L, d] -> (out, logsumexp [n, H, L]) for packed sequences."""

    def run(qkv: Tensor, cu_seqlens: Tensor, max_seqlen: int) -> tuple[Tensor, Tensor]:
        out, logsumexp = _empty_outputs(qkv)
        qkv = _contiguous_rows(qkv)
        for group in by_length(cu_seqlens):
            group_out, group_logsumexp = forward(*_heads(group, qkv))
            group.write(out, group_out.transpose(1, 2))
            group.write(logsumexp.T, group_logsumexp.transpose(1, 2))
        return out, logsumexp

    return run


def _per_length_backward(backward):
    """Backward of the same: (grad, q, k, v, out, logsumexp) -> gradients by q, k and v."""

    def run(grad: Tensor, qkv: Tensor, cu_seqlens: Tensor, out: Tensor, logsumexp: Tensor, max_seqlen: int) -> Tensor:
        gradient = qkv.new_empty(qkv.shape)
        grad, qkv = _contiguous_rows(grad), _contiguous_rows(qkv)
        for group in by_length(cu_seqlens):
            rows = [group.read(x).transpose(1, 2) for x in (grad, out, logsumexp.T)]  # [n, H, L, d], [n, H, L]
            for part, value in enumerate(backward(rows[0], *_heads(group, qkv), *rows[1:])):
                group.write(gradient[:, part], value.transpose(1, 2))
        return gradient

    return run


def _math(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    wide = _wide(q)
    scores = q.to(wide) @ k.to(wide).mT * q.shape[-1] ** -0.5  # [n, H, L, L]
    return scores.softmax(-1) @ v.to(wide), scores.logsumexp(-1)


def _math_backward(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, logsumexp: Tensor) -> tuple[Tensor, ...]:
    wide, scale = _wide(q), q.shape[-1] ** -0.5
    grad, q, k, v = (x.to(wide) for x in (grad, q, k, v))
    # Not from the logsumexp: at large scores its rounding alone is a larger error than the softmax's.
    p = (q @ k.mT * scale).softmax(-1)  # [n, H, L, L]
    dp = grad @ v.mT
    # p . dp is grad . out, here with the output that was not rounded
    ds = p * (dp - (p * dp).sum(-1, keepdim=True)) * scale
    return ds @ k, ds.mT @ q, p.mT @ grad


def _sdpa(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    out, logsumexp = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v)
    # In short sequences it takes a row of nothing but NaN for a masked one, and gives zeros and a logsumexp of 0.
    suspect = logsumexp == 0
    if suspect.any():
        exact, exact_logsumexp = _math(q, k, v)
        out = torch.where(suspect[..., None], exact.to(out.dtype), out)
        logsumexp = torch.where(suspect, exact_logsumexp, logsumexp)
    return out, logsumexp


def _sdpa_backward(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, logsumexp: Tensor) -> tuple[Tensor, ...]:
    backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
    return backward(grad, q, k, v, out, logsumexp, 0.0, False)


# --- backends, fastest first ----------------------------------------------------------------------------------------


def _sdpa_rejects(qkv: Tensor | None = None, *others: Tensor) -> str | None:
    if qkv is not None and qkv.device.type != "cpu":
        return f"it calls PyTorch's attention for CPUs, qkv is on {qkv.device}"
    return None


register(
    "packed_attention",
    Backend("native", native_missing, packed_attention_cpu.rejects),
    Backend("sdpa", rejects=_sdpa_rejects),
    Backend("reference"),
)

FORWARD = {"native": packed_attention_cpu.forward, "sdpa": _per_length(_sdpa), "reference": _per_length(_math)}
BACKWARD = {
    "native": packed_attention_cpu.backward,
    "sdpa": _per_length_backward(_sdpa_backward),
    "reference": _per_length_backward(_math_backward),
}
