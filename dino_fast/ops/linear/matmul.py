"""Float32 matrix products on a CPU: a [M, K] b [K, N] (+ bias [N]).

Processors with AMX multiply bfloat16 some ten times as fast as float32, and a float32 is the sum of three bfloat16:

    x = x1 + x2 + x3,   x1 = bf16(x),  x2 = bf16(x - x1),  x3 = bf16(x - x1 - x2)

    a b = a1 b1 + (a1 b2 + a2 b1) + (a1 b3 + a2 b2 + a3 b1) + O(2^-25 |a b|)

Six bfloat16 products, summed in float32, are as exact as one float32 product (the tests hold both to float64), and the
backend `amx` makes them in less time. (Henry, Tang and Heinecke 2019, "Leveraging the bfloat16 artificial intelligence
datatype for higher-precision computations".) Splitting takes time too, M K + K N numbers of it for M N K of products:
where there is little to gain, on other processors, and for other dtypes and devices, PyTorch multiplies.
"""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import _get_current_dispatch_mode

from dino_fast.backends import Backend, Preference, choose, native_unavailable_reason, register
from dino_fast.ops import autograd

WORTH = 60  # M N / (M + N), the multiply-adds that a number takes part in: at 50 slower than torch, at 64 level
SMALLEST = 3 << 24  # multiply-adds


def matmul(a: Tensor, b: Tensor, bias: Tensor | None = None, *, out: Tensor | None = None, add: bool = False) -> Tensor:
    """a [M, K] @ b [K, N], plus bias [N]; with `add` on top of what is in `out` [M, N] (then without bias).

    No gradients. The result is the same for any number of threads. What is not finite, and magnitudes above 3.38e38,
    give inf or NaN.

    Raises:
        ValueError: an `out` of another shape, dtype or device, or some of whose elements share memory with others or
            with a, b or bias; `add` without `out`, or with a bias.
        RuntimeError: as torch does, for shapes and dtypes of a, b and bias that do not fit.
    """
    if add and (out is None or bias is not None):
        wanted = "out, what to add to" if out is None else "no bias, or add=False"
        raise ValueError(f"matmul: add=True adds to what is in out; give {wanted}")
    if out is None:
        out = a.new_empty(a.shape[0], b.shape[1])
    else:
        _validate_out(out, a, b, bias)
    tensors = (a, b, out) if bias is None else (a, b, out, bias)
    if choose("matmul", *tensors) == "amx":
        _amx(a, b, bias, add, out)
    elif add:
        torch.addmm(out, a, b, out=out)
    elif bias is not None:
        torch.addmm(bias, a, b, out=out)
    else:
        torch.mm(a, b, out=out)
    return out


def _validate_out(out: Tensor, a: Tensor, b: Tensor, bias: Tensor | None) -> None:
    shape = (a.shape[0], b.shape[-1])
    if out.shape != shape or out.dtype != a.dtype or out.device != a.device:
        raise ValueError(
            f"matmul: out must be {a.dtype} {list(shape)} on {a.device}, as the product is; "
            f"got {out.dtype} {list(out.shape)} on {out.device}"
        )
    if not autograd.is_plain(a, b, out):  # fake tensors have no memory
        return
    (M, N), (row, column) = shape, out.stride()
    if M > 1 and N > 1 and not (row >= N * column > 0 or column >= M * row > 0):
        raise ValueError(
            f"matmul: elements of out [{M}, {N}] of strides {(row, column)} share memory; give a contiguous one"
        )
    for name, other in (("a", a), ("b", b), ("bias", bias)):
        if other is not None and _share_memory(out, other):
            raise ValueError(f"matmul: out shares memory with {name}, which is read; give another out")


def _share_memory(x: Tensor, y: Tensor) -> bool:
    """Whether the memory from first to last element of these tensors overlaps; cheap where they have storages of their
    own."""
    if x.untyped_storage().data_ptr() != y.untyped_storage().data_ptr() or 0 in (x.numel(), y.numel()):
        return False
    begin_x, end_x, begin_y, end_y = (end for t in (x, y) for end in _ends(t))
    return begin_x < end_y and begin_y < end_x


def _ends(x: Tensor) -> tuple[int, int]:
    span = 1 + sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True))
    return x.data_ptr(), x.data_ptr() + span * x.element_size()


class Norm(NamedTuple):
    """A layer norm of rows [..., C]: gain [C], bias [C], eps."""

    weight: Tensor
    bias: Tensor
    eps: float

    def __call__(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], self.weight, self.bias, self.eps)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The normalised rows, and each row's mean and inverse standard deviation."""
        return torch.native_layer_norm(x, x.shape[-1:], self.weight, self.bias, self.eps)

    def backward(self, grad: Tensor, x: Tensor, mean: Tensor, rstd: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The gradients w.r.t. x, weight and bias."""
        function = torch.ops.aten.native_layer_norm_backward
        return function(grad, x, x.shape[-1:], mean, rstd, self.weight, self.bias, [True] * 3)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, norm: Norm | None = None) -> Tensor:
    """x [..., C] weight^T + bias for weight [D, C], as `torch.nn.functional.linear`; one differentiation.

    With `norm` of norm(x), which for float32 and float64 rows [n, C] on a CPU the backward makes again instead of
    keeping it.
    """
    if norm is not None:
        tensors = (x, weight, bias, norm.weight, norm.bias)
        wanted = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
        if wanted and x.ndim == 2 and is_plain(x, weight, torch.float32, torch.float64):
            return cast(Tensor, _NormLinear.apply(*tensors, norm.eps))
        return linear(norm(x), weight, bias)
    if x.ndim < 2 or not is_plain(x, weight, torch.float32):
        return F.linear(x, weight, bias)
    if x.ndim != 2:
        return linear(x.flatten(0, -2), weight, bias).unflatten(0, x.shape[:-1])
    if choose("matmul", x, weight.t()) != "amx":
        return F.linear(x, weight, bias)
    return cast(Tensor, _Linear.apply(x, weight, bias))


def is_plain(x: Tensor, weight: Tensor, *dtypes: torch.dtype) -> bool:
    """Whether these are tensors of one of `dtypes` on a CPU, and nothing traces or casts what is done to them."""
    return (
        x.device.type == "cpu"
        and x.dtype == weight.dtype
        and x.dtype in dtypes
        and autograd.is_plain(x, weight)
        and not torch.is_autocast_enabled("cpu")
    )


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, weight if ctx.needs_input_grad[0] else None)
        return matmul(x, weight.t(), bias)

    @staticmethod
    @autograd.once_differentiable("dino_fast.ops.linear.matmul.linear", "torch.nn.functional.linear")
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        grad = grad.contiguous()
        grad_x = None if weight is None else matmul(grad, weight)
        grad_weight = None if x is None else matmul(grad.t(), x)
        return grad_x, grad_weight, grad.sum(0) if ctx.needs_input_grad[2] else None


class _NormLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, gain: Tensor, shift: Tensor, eps: float
    ) -> Tensor:
        norm = Norm(gain, shift, eps)
        ctx.eps = eps
        ctx.save_for_backward(x, weight, gain, shift)
        return matmul(norm(x), weight.t(), bias)

    @staticmethod
    @autograd.once_differentiable("dino_fast.ops.linear.matmul.linear", "torch.nn.functional.linear")
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, *norm_params = ctx.saved_tensors
        norm = Norm(norm_params[0], norm_params[1], ctx.eps)
        grad = grad.contiguous()
        rows, mean, rstd = norm.forward(x)
        gradients = (
            matmul(grad.t(), rows) if ctx.needs_input_grad[1] else None,
            grad.sum(0) if ctx.needs_input_grad[2] else None,
        )
        del rows
        grad_x, *grad_norm = norm.backward(matmul(grad, weight), x, mean, rstd)
        return grad_x, *gradients, *grad_norm, None


# --- backends ---------------------------------------------------------------------------------------------------------


@cache
def _unavailable_reason() -> str | None:
    if reason := native_unavailable_reason():
        return reason
    from dino_fast import _C

    return cast("str | None", _C.matmul_unavailable_reason())


def _unsupported_reason(
    a: Tensor, b: Tensor | None = None, out: Tensor | None = None, bias: Tensor | None = None
) -> str | None:
    if _get_current_dispatch_mode() is not None:
        return "PyTorch's operations are being recorded, and this is none"
    for t in (a, b, out, bias):
        if t is not None and (t.device.type != "cpu" or t.dtype != torch.float32):
            return f"it multiplies float32 on a CPU; one tensor is {t.dtype} on {t.device}"
    if b is None:  # asked of a device alone
        return None
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[0]:
        return f"it takes [M, K] and [K, N]; got {list(a.shape)} and {list(b.shape)}"
    M, K = a.shape
    N = b.shape[1]
    if not (M and N and K) or M * N < WORTH * (M + N) or M * N * K < SMALLEST:
        return f"{M} x {K} by {K} x {N} is too little to be worth splitting"
    for t in (a, b):
        if 1 not in t.stride():
            return f"neither rows nor columns are contiguous (strides {t.stride()})"
    if out is not None and (out.shape != (M, N) or out.stride(1) != 1):
        return f"out must be [{M}, {N}] with contiguous rows; got {list(out.shape)}, strides {out.stride()}"
    if bias is not None and (bias.shape != (N,) or bias.stride(0) != 1):
        return f"bias must be [{N}], contiguous; got {list(bias.shape)}"
    return None


def _rule() -> str:
    return (
        f"products of [M, K] and [K, N] with M N / (M + N) of {WORTH} or more and {SMALLEST / 1e6:.0f} M multiply-adds"
    )


register(
    "matmul",
    Backend("amx", _unavailable_reason, _unsupported_reason),
    Backend("reference"),
    example=lambda device: tuple(torch.empty((512, 512), dtype=torch.float32, device=device) for _ in range(3)),
    preference=Preference(
        lambda *tensors: None,
        lambda: (
            f"reference: {_unavailable_reason()}" if _unavailable_reason() else f"amx for {_rule()}, else reference"
        ),
    ),
)


def _amx(a: Tensor, b: Tensor, bias: Tensor | None, add: bool, out: Tensor) -> None:
    from dino_fast import _C

    a_layout, b_layout = ((t.data_ptr(), *t.shape, *t.stride()) for t in (a, b))
    bias_address = 0 if bias is None else bias.data_ptr()
    _C.matmul(a_layout, b_layout, bias_address, add, out.data_ptr(), out.stride(0), torch.get_num_threads())
