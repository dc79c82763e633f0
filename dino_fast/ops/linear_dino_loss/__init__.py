"""The head's last layer and the loss together: the logits of V crops by K prototypes are never stored.

With student rows z[v, b] and teacher rows z'[u, b] of width D, last layers W and W' [K, D], pair weights A [T, V], an
image's weight r[b], centre c and temperatures tau, tau':

    s = W z,   t = W' z',   p(u, b) = softmax((t - c) / tau')
    loss = sum over b, u, v of  r(b) A(u, v) * -<p(u, b), log_softmax(s(v, b) / tau)>

DINO has A = 1 but 0 where u = v, and r = 1 / (B sum A); the patch loss of iBOT has T = V = 1 and a weight per row.

The head is attention over prototypes: with E(u, b) = sum_k p_k W_k the read of a teacher's row, keys W' and values W,
E(v, b) that of softmax(s / tau), m(v) = max_k s / tau, l(v) = sum_k e^(s / tau - m) and w(v) = sum_u A(u, v),

    loss    = sum r (w log l - sum_u A(u, v) d(u, v)),   d(u, v) = sum_k p_k(u) (s_k(v) / tau - m(v))
    dloss/dz(v, b) = r / tau (w E(v, b) - sum_u A(u, v) E(u, b))
    dloss/dW       = sum over v, b  r / tau (w softmax(s / tau) - sum_u A(u, v) p(u, b)) z(v, b)^T

d could be had from E, as <p, s> = z . E, but then the loss is a difference of z . E and m + log l, which for a row that
fits its target is far smaller than either and inherits their errors. Summed from the very logits that l is summed from,
below their maximum, it has no such difference: an error of a logit counts only as far as p and the softmax differ.

Two passes over the prototypes, all rows of an image at a time, in floating-point operations per K D:
    forward   4 a row (2 where dz is not wanted): loss, dz, row maxima and sums
    backward  4 a student row, 2 a teacher row: dW, from logits made again; not run where the last layer is frozen
against 6 and 2 for a layer and a loss that store logits. `flops` is this formula.

With a gain g, the layer is weight-normed: W_k = g_k v_k / |v_k|, and dg_k = dW_k . v_k / |v_k|,
dv_k = g_k / |v_k| (dW_k - dg_k v_k / |v_k|).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dino_fast import gpu
from dino_fast.backends import Backend, choose, native_unavailable_reason, register, triton_unavailable_reason
from dino_fast.ops import autograd
from dino_fast.ops.linear_dino_loss import native, triton
from dino_fast.ops.linear_dino_loss.common import ForwardOutputs

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
REFERENCE = "dino_fast.ops.linear_dino_loss.linear_dino_loss_reference"


class LinearDinoLoss(NamedTuple):
    """The results of `linear_dino_loss`."""

    loss: Tensor  # scalar, float32 (float64 for a float64 student)
    teacher_mean: Tensor  # [K], mean of the raw teacher logits over its T B rows, detached


def linear_dino_loss(
    student: Tensor,
    student_weight: Tensor,
    teacher: Tensor,
    teacher_weight: Tensor,
    center: Tensor,
    pair_weights: Tensor,
    row_weights: Tensor,
    *,
    student_temp: float | Tensor,
    teacher_temp: float | Tensor,
    student_gain: Tensor | None = None,
    teacher_gain: Tensor | None = None,
    backend: str = "auto",
) -> LinearDinoLoss:
    """The loss and the mean of the teacher's logits from the inputs of the head's last layer.

    Args:
        student: [V, B, D], float32, bfloat16, float16 or (reference only) float64. Any strides.
        student_weight: [K, D], the same kinds, not necessarily the student's; with `student_gain` [K], weight-normed.
        teacher, teacher_weight, teacher_gain: [T, B, D], [K, D], [K]. Not differentiated.
        center: [K], taken from the teacher's logits. Not differentiated.
        pair_weights: [T, V], how much a pair counts; row_weights: [B]. The loss is the sum with these weights, so
            whoever wants a mean divides them. Not differentiated.
        student_temp, teacher_temp: positive temperatures. Compiled code is compiled anew for each number; give a tensor
            on the host, of no dimensions, for one that changes from call to call.
        backend: "auto" or a name that `dino-fast info` lists.

    Differentiable w.r.t. `student`, `student_weight` and `student_gain`, once and in reverse mode.
    Rows that are not finite give a loss and gradients that are not finite.

    Raises:
        ValueError: shapes, dtypes, devices or temperatures that do not fit, said in the message.
        BackendError: an explicitly chosen backend cannot run these inputs.
    """
    others = (teacher, teacher_weight, teacher_gain, center, pair_weights, row_weights)
    fixed = (x if x is None or not x.requires_grad else x.detach() for x in others)
    differentiable = student.requires_grad and torch.is_grad_enabled()
    *temps, changing = autograd.split_temps(student_temp, teacher_temp)
    outputs = torch.ops.dino_fast.linear_dino_loss(
        student, student_weight, student_gain, *fixed, *temps, differentiable, backend, changing
    )
    return LinearDinoLoss(*outputs[:2])


def validate_inputs(
    student: Tensor,
    student_weight: Tensor,
    student_gain: Tensor | None,
    teacher: Tensor,
    teacher_weight: Tensor,
    teacher_gain: Tensor | None,
    center: Tensor,
    pair_weights: Tensor,
    row_weights: Tensor,
    student_temp: float = 1.0,
    teacher_temp: float = 1.0,
) -> None:
    """Raises ValueError for inputs that do not fit; the message names the given and the accepted ones."""
    if student.dim() != 3 or teacher.dim() != 3 or student_weight.dim() != 2:
        raise ValueError(
            "linear_dino_loss: student and teacher are [crops, images, D] and the weights [K, D]; got student "
            f"{list(student.shape)}, teacher {list(teacher.shape)}, student weight {list(student_weight.shape)}"
        )
    V, B, D = student.shape
    T, K = teacher.shape[0], student_weight.shape[0]
    if 0 in (V, B, D, T, K):
        raise ValueError(
            f"linear_dino_loss: there is nothing to average over; got student {[V, B, D]}, teacher "
            f"{list(teacher.shape)}, K = {K}"
        )
    expected = {
        "student": (student, (V, B, D)),
        "student weight": (student_weight, (K, D)),
        "student gain": (student_gain, (K,)),
        "teacher": (teacher, (T, B, D)),
        "teacher weight": (teacher_weight, (K, D)),
        "teacher gain": (teacher_gain, (K,)),
        "centre": (center, (K,)),
        "pair weights": (pair_weights, (T, V)),
        "row weights": (row_weights, (B,)),
    }
    for name, (tensor, shape) in expected.items():
        if tensor is None:
            continue
        if tensor.shape != shape:
            raise ValueError(
                f"linear_dino_loss: the {name} must be {list(shape)}, as student [V, B, D] = {[V, B, D]} and K = {K} "
                f"say; got {list(tensor.shape)}"
            )
        if tensor.dtype not in DTYPES:
            known = ", ".join(str(dtype).removeprefix("torch.") for dtype in DTYPES)
            raise ValueError(f"linear_dino_loss: the {name}'s dtype is {tensor.dtype}; accepted are {known}")
        if tensor.device != student.device:
            raise ValueError(
                f"linear_dino_loss: the {name} is on {tensor.device} but the student on {student.device}; "
                "move one of them"
            )
    if not (student_temp > 0 and teacher_temp > 0):
        raise ValueError(
            f"linear_dino_loss: temperatures must be positive; got student {student_temp}, teacher {teacher_temp}"
        )


def linear_dino_loss_reference(
    student: Tensor,
    student_weight: Tensor,
    teacher: Tensor,
    teacher_weight: Tensor,
    center: Tensor,
    pair_weights: Tensor,
    row_weights: Tensor,
    *,
    student_temp: float,
    teacher_temp: float,
    student_gain: Tensor | None = None,
    teacher_gain: Tensor | None = None,
) -> LinearDinoLoss:
    """The definition in plain PyTorch, with logits, in float64 for a float64 student and float32 for all others."""
    dtype = result_dtype(student)
    student_logits = student.to(dtype) @ effective_weight(student_weight, student_gain, dtype).T  # [V, B, K]
    with torch.no_grad():
        teacher_logits = teacher.to(dtype) @ effective_weight(teacher_weight, teacher_gain, dtype).T  # [T, B, K]
        targets = torch.softmax((teacher_logits - center.to(dtype)) / teacher_temp, dim=-1)
    log_predictions = torch.log_softmax(student_logits / student_temp, dim=-1)
    pairs = -torch.einsum("ubk,vbk->uvb", targets, log_predictions)
    loss = torch.einsum("uvb,uv,b->", pairs, pair_weights.to(dtype), row_weights.to(dtype))
    return LinearDinoLoss(loss, teacher_logits.mean(dim=(0, 1)))


def result_dtype(student: Tensor) -> torch.dtype:
    """The dtype of the loss and of the row statistics: float64 for a float64 student, else float32."""
    return torch.float64 if student.dtype == torch.float64 else torch.float32


def effective_weight(weight: Tensor, gain: Tensor | None, dtype: torch.dtype) -> Tensor:
    """The last layer's matrix [K, D]: the weight, or with a gain [K] its rows scaled to those lengths."""
    weight = weight.to(dtype)
    if gain is None:
        return weight
    lengths: Tensor = torch.linalg.vector_norm(weight, dim=1)
    return weight * (gain.to(dtype) / lengths)[:, None]


def flops(V: int, T: int, B: int, K: int, D: int, *, student: bool = True, weight: bool = True) -> int:
    """Floating-point operations of the matrix products: the forward, with or without dz, and dW where it is wanted."""
    forward = (4 if student else 2) * (V + T)
    return (forward + (4 * V + 2 * T if weight else 0)) * B * K * D


# --- the operator ---------------------------------------------------------------------------------------------------
# `student_gradient` is for an upstream gradient of 1, in the result's dtype, and empty where none is wanted.
# `row_statistics` [2, T + V, B]: each row's largest (teacher: centred) logit and sum of exponentials, teacher first.
# `kept_center`: a copy for the backward, which may come after the centre's update in place. (Copied here, not when the
# context is set up: there torch.compile drops the copy.) `changing_temps`: float64 [2] on the host, which takes the
# place of the two numbers.


def _forward(
    student: Tensor,
    student_weight: Tensor,
    student_gain: Tensor | None,
    teacher: Tensor,
    teacher_weight: Tensor,
    teacher_gain: Tensor | None,
    center: Tensor,
    pair_weights: Tensor,
    row_weights: Tensor,
    student_temp: float,
    teacher_temp: float,
    differentiable: bool,
    backend: str = "auto",
    changing_temps: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    student_temp, teacher_temp = autograd.read_temps(student_temp, teacher_temp, changing_temps)
    tensors = (student, student_weight, student_gain, teacher, teacher_weight, teacher_gain, center)
    validate_inputs(*tensors, pair_weights, row_weights, student_temp, teacher_temp)
    chosen = choose("linear_dino_loss", student, student_weight, teacher, teacher_weight, backend=backend)
    with torch.autocast(student.device.type, enabled=False):
        statistics, pairs, difference, teacher_mean = FORWARD[chosen](
            *tensors, pair_weights, student_temp, teacher_temp, differentiable
        )
        loss = loss_from_rows(pair_weights, row_weights, statistics, pairs)
        gradient = student.new_empty((0,), dtype=statistics.dtype)
        if difference is not None:
            scale = (row_weights.double() / student_temp)[None, :, None]
            gradient = (difference * scale).to(statistics.dtype)
    return loss, teacher_mean, gradient, statistics, center.clone()


def _fake_forward(
    student: Tensor,
    student_weight: Tensor,
    student_gain: Tensor | None,
    teacher: Tensor,
    teacher_weight: Tensor,
    teacher_gain: Tensor | None,
    center: Tensor,
    pair_weights: Tensor,
    row_weights: Tensor,
    student_temp: float,
    teacher_temp: float,
    differentiable: bool,
    backend: str = "auto",
    changing_temps: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    tensors = (student, student_weight, student_gain, teacher, teacher_weight, teacher_gain, center)
    temps = (student_temp, teacher_temp) if changing_temps is None else ()
    validate_inputs(*tensors, pair_weights, row_weights, *temps)
    result = result_dtype(student)
    (V, B, D), T, K = student.shape, teacher.shape[0], student_weight.shape[0]
    return (
        student.new_empty((), dtype=result),
        student.new_empty((K,), dtype=result),
        student.new_empty((V, B, D) if differentiable else (0,), dtype=result),
        student.new_empty((2, T + V, B), dtype=result),
        torch.empty_like(center),
    )


def loss_from_rows(pair_weights: Tensor, row_weights: Tensor, statistics: Tensor, pairs: Tensor) -> Tensor:
    """The loss from [T + V, B] row statistics and the [T, V, B] products d, few enough to take them in float64."""
    T = pairs.shape[0]
    weights, rows = pair_weights.double(), row_weights.double()
    log_sums = weights.sum(0)[:, None] * statistics[1, T:].double().log()  # [V, B]
    products = torch.where(weights[..., None] == 0, 0.0, weights[..., None] * pairs.double()).sum(0)
    return ((log_sums - products) * rows).sum().to(statistics.dtype)


def _weight_gradient(
    student: Tensor,
    student_weight: Tensor,
    student_gain: Tensor | None,
    teacher: Tensor,
    teacher_weight: Tensor,
    teacher_gain: Tensor | None,
    center: Tensor,
    pair_weights: Tensor,
    row_weights: Tensor,
    row_statistics: Tensor,
    upstream: Tensor,
    student_temp: float,
    teacher_temp: float,
    backend: str = "auto",
    changing_temps: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The gradients w.r.t. the student's weight and gain (empty without one), times `upstream`."""
    student_temp, teacher_temp = autograd.read_temps(student_temp, teacher_temp, changing_temps)
    tensors = (student, student_weight, student_gain, teacher, teacher_weight, teacher_gain, center)
    validate_inputs(*tensors, pair_weights, row_weights, student_temp, teacher_temp)
    _validate_backward(student, teacher, row_statistics, upstream)
    chosen = choose("linear_dino_loss", student, student_weight, teacher, teacher_weight, backend=backend)
    with torch.autocast(student.device.type, enabled=False):
        # The factors of e^(logit - maximum) of a student's row, and of each teacher's row beside it.
        T, dtype = teacher.shape[0], row_statistics.dtype
        scale = row_weights.double() * upstream.double() / student_temp  # [B]
        sums, pairs = row_statistics[1].double(), pair_weights.double()
        factors = (pairs.sum(0)[:, None] * scale / sums[T:]).to(dtype)  # [V, B]
        pair_factors = (pairs[..., None] * (scale / sums[:T])[:, None]).to(dtype)  # [T, V, B]
        return WEIGHT_GRADIENT[chosen](*tensors, row_statistics, factors, pair_factors, student_temp, teacher_temp)


def _fake_weight_gradient(
    student: Tensor,
    student_weight: Tensor,
    student_gain: Tensor | None,
    teacher: Tensor,
    teacher_weight: Tensor,
    teacher_gain: Tensor | None,
    center: Tensor,
    pair_weights: Tensor,
    row_weights: Tensor,
    row_statistics: Tensor,
    upstream: Tensor,
    student_temp: float,
    teacher_temp: float,
    backend: str = "auto",
    changing_temps: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    tensors = (student, student_weight, student_gain, teacher, teacher_weight, teacher_gain, center)
    validate_inputs(*tensors, pair_weights, row_weights)
    _validate_backward(student, teacher, row_statistics, upstream)
    return _empty_weight_gradients(student_weight, student_gain)


def _validate_backward(student: Tensor, teacher: Tensor, row_statistics: Tensor, upstream: Tensor) -> None:
    shape, dtype = (2, len(teacher) + len(student), student.shape[1]), result_dtype(student)
    if row_statistics.shape != shape or row_statistics.dtype != dtype:
        raise ValueError(
            f"linear_dino_loss: the row statistics are {dtype} {list(shape)}, as the forward returns them; "
            f"got {row_statistics.dtype} {list(row_statistics.shape)}"
        )
    if upstream.numel() != 1 or not upstream.is_floating_point():
        raise ValueError(
            f"linear_dino_loss: the upstream gradient is one floating-point number; got {upstream.dtype} "
            f"{list(upstream.shape)}"
        )
    for name, tensor in (("row statistics are", row_statistics), ("upstream gradient is", upstream)):
        if tensor.device != student.device:
            raise ValueError(f"linear_dino_loss: the {name} on {tensor.device} but the student on {student.device}")


def _empty_weight_gradients(weight: Tensor, gain: Tensor | None) -> tuple[Tensor, Tensor]:
    return weight.new_empty(weight.shape), weight.new_empty((0,)) if gain is None else gain.new_empty(gain.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, student_temp, teacher_temp, differentiable, backend, changing_temps = inputs
    *_, student_gradient, row_statistics, kept_center = output
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)
    ctx.differentiable = differentiable
    ctx.numbers = student_temp, teacher_temp, backend
    tensors[6] = kept_center
    saved = [None if x is None else autograd.savable(x) for x in tensors]
    ctx.save_for_backward(*saved, student_gradient, row_statistics, changing_temps)


@autograd.once_differentiable("linear_dino_loss", REFERENCE)
def _backward(ctx: Any, upstream: Tensor | None, *unused: Tensor | None) -> tuple[Tensor | None, ...]:
    gradients: list[Tensor | None] = [None] * 14
    if upstream is None:
        return tuple(gradients)
    *tensors, student_gradient, row_statistics, changing_temps = ctx.saved_tensors
    if ctx.needs_input_grad[0]:
        if not ctx.differentiable:
            raise RuntimeError("dino_fast::linear_dino_loss was called with differentiable=False; it kept no gradient")
        gradients[0] = (student_gradient * upstream).to(tensors[0].dtype)
    if ctx.needs_input_grad[1] or ctx.needs_input_grad[2]:
        grad_weight, grad_gain = torch.ops.dino_fast.linear_dino_loss_weight_gradient(
            *tensors, row_statistics, upstream, *ctx.numbers, changing_temps
        )
        gradients[1] = grad_weight if ctx.needs_input_grad[1] else None
        gradients[2] = grad_gain if ctx.needs_input_grad[2] else None
    return tuple(gradients)


def _forward_flops(*arguments: Any) -> int:
    student, weight, teacher, differentiable = (arguments[i] for i in (0, 1, 3, 11))
    return flops(len(student), len(teacher), student.shape[1], *weight.shape, student=differentiable, weight=False)


def _weight_gradient_flops(*arguments: Any) -> int:
    student, weight, teacher = (arguments[i] for i in (0, 1, 3))
    sizes = (len(student), len(teacher), student.shape[1], *weight.shape)
    return flops(*sizes) - flops(*sizes, weight=False)


autograd.define_operator(
    "linear_dino_loss", _forward, _fake_forward, alternative=REFERENCE, backward=_backward,
    setup_context=_setup_context, flops=_forward_flops,
)  # fmt: skip
autograd.define_operator(
    "linear_dino_loss_weight_gradient", _weight_gradient, _fake_weight_gradient, alternative=REFERENCE,
    flops=_weight_gradient_flops,
)  # fmt: skip


# --- backends, fastest first ----------------------------------------------------------------------------------------
# Forward: `ForwardOutputs`. Weight gradient: (dW, dg), from a factor for each student row [V, B], and one for each
# teacher row beside it [T, V, B].


def _example(device: torch.device) -> tuple[Tensor, ...]:
    student, teacher, weight = (
        torch.empty(shape, dtype=gpu.usual_dtype(device), device=device)
        for shape in ((10, 2, 256), (2, 2, 256), (4096, 256))
    )
    return student, weight, teacher, weight


register(
    "linear_dino_loss",
    Backend("triton", unavailable_reason=triton_unavailable_reason, unsupported_reason=triton.unsupported_reason),
    Backend("native", unavailable_reason=native_unavailable_reason, unsupported_reason=native.unsupported_reason),
    Backend("reference"),
    example=_example,
)


def _reference_forward(
    student: Tensor,
    student_weight: Tensor,
    student_gain: Tensor | None,
    teacher: Tensor,
    teacher_weight: Tensor,
    teacher_gain: Tensor | None,
    center: Tensor,
    pair_weights: Tensor | None,
    student_temp: float,
    teacher_temp: float,
    differentiable: bool,
) -> ForwardOutputs:
    dtype = result_dtype(student)
    weight = effective_weight(student_weight, student_gain, dtype)
    raw = teacher.to(dtype) @ effective_weight(teacher_weight, teacher_gain, dtype).T
    logits = (raw - center.to(dtype), student.to(dtype) @ weight.T)
    maxima = [x.amax(-1) for x in logits]
    e = [
        ((x - m[..., None]) / temp).exp()
        for x, m, temp in zip(logits, maxima, (teacher_temp, student_temp), strict=True)
    ]
    sums = [x.sum(-1) for x in e]
    targets, predictions = (x / total[..., None] for x, total in zip(e, sums, strict=True))
    pairs = torch.einsum("ubk,vbk->uvb", targets, (logits[1] - maxima[1][..., None]) / student_temp)
    statistics = torch.stack([torch.cat(maxima), torch.cat(sums)])
    if pair_weights is None:
        return statistics, pairs, torch.cat([targets, predictions]) @ weight, raw.mean(dim=(0, 1))
    A = pair_weights.to(dtype)
    difference = A.sum(0)[:, None, None] * predictions - torch.einsum("uv,ubk->vbk", A, targets)
    return statistics, pairs, difference @ weight if differentiable else None, raw.mean(dim=(0, 1))


def _reference_weight_gradient(
    student: Tensor,
    student_weight: Tensor,
    student_gain: Tensor | None,
    teacher: Tensor,
    teacher_weight: Tensor,
    teacher_gain: Tensor | None,
    center: Tensor,
    row_statistics: Tensor,
    factors: Tensor,
    pair_factors: Tensor,
    student_temp: float,
    teacher_temp: float,
) -> tuple[Tensor, Tensor]:
    dtype, T = result_dtype(student), teacher.shape[0]
    s = student.to(dtype) @ effective_weight(student_weight, student_gain, dtype).T
    t = teacher.to(dtype) @ effective_weight(teacher_weight, teacher_gain, dtype).T - center.to(dtype)
    maxima = row_statistics[0][..., None]
    predictions = ((s - maxima[T:]) / student_temp).exp() * factors[..., None]
    targets = torch.einsum("uvb,ubk->vbk", pair_factors, ((t - maxima[:T]) / teacher_temp).exp())
    gradient = torch.einsum("vbk,vbd->kd", predictions - targets, student.to(dtype))
    grad_gain = project_weight_gradient(gradient, student_weight, student_gain)
    return gradient.to(student_weight.dtype), grad_gain


def project_weight_gradient(gradient: Tensor, weight: Tensor, gain: Tensor | None) -> Tensor:
    """Turns the gradient w.r.t. the effective weight into that w.r.t. `weight`, in place; returns the gain's."""
    if gain is None:
        return weight.new_empty((0,))
    v = weight.to(gradient.dtype)
    length: Tensor = torch.linalg.vector_norm(v, dim=1)
    grad_gain = (gradient * v).sum(1) / length
    gradient.addcmul_(v, (grad_gain / length)[:, None], value=-1).mul_((gain.to(gradient.dtype) / length)[:, None])
    return grad_gain.to(gain.dtype)


FORWARD: dict[str, Callable[..., ForwardOutputs]] = {
    "triton": triton.forward,
    "native": native.forward,
    "reference": _reference_forward,
}
WEIGHT_GRADIENT: dict[str, Callable[..., tuple[Tensor, Tensor]]] = {
    "triton": triton.weight_gradient,
    "native": native.weight_gradient,
    "reference": _reference_weight_gradient,
}
