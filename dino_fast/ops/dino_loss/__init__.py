"""DINO's cross-entropy over all pairs of crops of an image, on logits.

With s the student's logits [V, B, K], t the teacher's [2, B, K], c the centre [K]:

    p[u] = softmax((t[u] - c) / tau_t)                              u = 0, 1: the two global crops
    loss = mean over b and pairs u != v of  -<p[u, b], log_softmax(s[v, b] / tau_s)>        2 V - 2 pairs

(Caron et al. 2021, "Emerging properties in self-supervised vision transformers", algorithm 1 with multi-crop.)

On a CPU the kernels write the gradient w.r.t. the student's logits in the forward pass, for an upstream gradient of 1,
which is what `loss.backward()` brings. Another one multiplies it; for bfloat16, where that would round a second time,
the backward makes the gradient anew with the upstream gradient included, from the logits and each row's maximum and sum
that the forward saved. float16 logits never get theirs in the forward: divided by tau_s B (2 V - 2) it would underflow
before a loss scale could lift it.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from dino_fast import gpu
from dino_fast.backends import Backend, choose, native_unavailable_reason, register, triton_unavailable_reason
from dino_fast.ops import autograd
from dino_fast.ops.dino_loss import native, triton
from dino_fast.ops.dino_loss.common import KERNEL_DTYPES, TEACHER_CROPS, pair_weights

DTYPES = (*KERNEL_DTYPES, torch.float64)
REFERENCE = "dino_fast.ops.dino_loss.dino_loss_reference"


class DinoLoss(NamedTuple):
    """What `dino_loss` returns."""

    loss: Tensor  # scalar, float32 (float64 for float64 logits), differentiable by the student's logits
    teacher_mean: Tensor  # [K], mean of the raw teacher logits over its 2 B rows, detached
    teacher_entropy: Tensor  # scalar, mean entropy of the teacher's target rows in nats, detached


def dino_loss(
    student: Tensor,
    teacher: Tensor,
    center: Tensor,
    *,
    student_temp: float | Tensor,
    teacher_temp: float | Tensor,
    inplace: bool = False,
    backend: str = "auto",
) -> DinoLoss:
    """The loss, the mean of the teacher's logits and the entropy of its targets, in one operation.

    Args:
        student: logits [V, B, K], V >= 2 crops of which the first two are the teacher's; float32, bfloat16, float16 or
            (reference only) float64. Any strides; rows that are not contiguous are copied.
        teacher: logits [2, B, K] of the same kinds, not necessarily the student's. Not differentiated.
        center: [K], taken from the teacher's logits. Not differentiated.
        student_temp, teacher_temp: positive temperatures. Compiled code is compiled anew for each number; give a tensor
            on the host, of no dimensions, for one that changes from call to call.
        inplace: the gradient may take the memory of the student's logits, which then hold it instead. The native
            backend does so where the logits are contiguous float32 or bfloat16 and need a gradient, outside of
            torch.compile. Where an earlier operation kept the logits for its own backward, that backward raises. In
            bfloat16 an upstream gradient that is no power of two then rounds the gradient a second time.
        backend: "auto", "triton", "native" or "reference"; see `dino_fast.backends`.

    NaN or infinite logits give a loss and gradients that are not finite, as the formula does; they raise nothing, which
    would cost a pass over the data. One derivative, in reverse mode; others are refused.

    Raises:
        ValueError: shapes, dtypes, devices or temperatures that do not fit; `inplace` where teacher or centre share
            memory with the student's logits.
        BackendError: an explicitly chosen backend cannot run these inputs.
    """
    differentiable = student.requires_grad and torch.is_grad_enabled()
    if teacher.requires_grad:
        teacher = teacher.detach()
    if center.requires_grad:
        center = center.detach()
    if autograd.is_plain(student, teacher, center):
        numbers = float(student_temp), float(teacher_temp)
        return DinoLoss(*_Direct.apply(student, teacher, center, *numbers, differentiable, backend, inplace))
    *temps, changing = autograd.split_temps(student_temp, teacher_temp)
    outputs = torch.ops.dino_fast.dino_loss(student, teacher, center, *temps, differentiable, backend, changing)
    return DinoLoss(*outputs[:3])


def validate_inputs(
    student: Tensor, teacher: Tensor, center: Tensor, student_temp: float = 1.0, teacher_temp: float = 1.0
) -> None:
    """Raises ValueError for inputs that do not fit, with what was given and what is accepted."""
    if wrong := _wrong_shapes(student.shape, teacher.shape, center.shape):
        shapes = f"got student {list(student.shape)}, teacher {list(teacher.shape)}, centre {list(center.shape)}"
        raise ValueError(f"dino_loss: {wrong}; {shapes}")
    for name, tensor in (("student", student), ("teacher", teacher), ("centre", center)):
        if tensor.dtype not in DTYPES:
            known = ", ".join(str(dtype).removeprefix("torch.") for dtype in DTYPES)
            raise ValueError(f"dino_loss: the {name}'s dtype is {tensor.dtype}; accepted are {known}")
        if tensor.device != student.device:
            raise ValueError(
                f"dino_loss: the {name} is on {tensor.device} but the student on {student.device}; move one of them"
            )
    if not (student_temp > 0 and teacher_temp > 0):
        raise ValueError(
            f"dino_loss: temperatures must be positive; got student {student_temp}, teacher {teacher_temp}"
        )


def _wrong_shapes(student: torch.Size, teacher: torch.Size, center: torch.Size) -> str | None:
    if len(student) != 3 or len(teacher) != 3 or len(center) != 1:
        return "student logits are [crops, images, K], teacher logits [2, images, K], the centre [K]"
    if teacher[0] != TEACHER_CROPS:
        return f"the teacher sees {TEACHER_CROPS} crops of each image, so its first size is 2"
    if student[0] < 2:
        return "the student needs at least the two global crops, so its first size is 2 or more"
    if student[1] != teacher[1]:
        return "student and teacher must have the same number of images (second size)"
    if not student[2] == teacher[2] == center[0]:
        return "student, teacher and centre must have the same number of prototypes K (last size)"
    if 0 in student:
        return "there is nothing to average over"
    return None


def dino_loss_reference(
    student: Tensor, teacher: Tensor, center: Tensor, *, student_temp: float, teacher_temp: float
) -> DinoLoss:
    """The definition in plain PyTorch, pair by pair, in float64 for float64 logits and float32 for all others."""
    dtype = torch.float64 if student.dtype == torch.float64 else torch.float32
    student, teacher, center = student.to(dtype), teacher.detach().to(dtype), center.detach().to(dtype)
    centred = (teacher - center) / teacher_temp
    targets = torch.softmax(centred, dim=-1)  # [2, B, K]
    log_predictions = torch.log_softmax(student / student_temp, dim=-1)  # [V, B, K]
    terms = [
        -(targets[u] * log_predictions[v]).sum(-1).mean()
        for u in range(TEACHER_CROPS)
        for v in range(student.shape[0])
        if u != v
    ]
    entropy = -(targets * torch.log_softmax(centred, dim=-1)).sum(-1).mean()
    return DinoLoss(torch.stack(terms).mean(), teacher.mean(dim=(0, 1)), entropy)


# --- the operator ---------------------------------------------------------------------------------------------------
# For the backward alone: `gradient`, for an upstream gradient of 1, empty where none is written; `row_statistics`
# [2, 2 + V, B], each row's maximum and sum of exponentials, the teacher's two crops first; `kept_center` [K], a copy of
# the centre where the backward may need it, or empty. (Copied here, not when the context is set up: there torch.compile
# drops the copy, and the backward would see the centre that the next update writes in place.)
# `changing_temps`: float64 [2] on the host, which takes the place of the two numbers.


def _forward(
    student: Tensor,
    teacher: Tensor,
    center: Tensor,
    student_temp: float,
    teacher_temp: float,
    differentiable: bool,
    backend: str = "auto",
    changing_temps: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    temps = autograd.read_temps(student_temp, teacher_temp, changing_temps)
    return _run(student, teacher, center, *temps, differentiable, backend)


def _run(student, teacher, center, student_temp, teacher_temp, differentiable, backend, inplace=False, direct=False):
    validate_inputs(student, teacher, center, student_temp, teacher_temp)
    chosen = choose("dino_loss", student, teacher, backend=backend)
    written = differentiable and _written_in_forward(student, direct)
    overwritten = inplace and written and student.is_contiguous()
    if overwritten:
        _refuse_shared_memory(student, teacher, center)
    outputs = FORWARD[chosen](
        student, teacher, center, student_temp, teacher_temp,
        _empty_outputs(student, differentiable, written, overwritten),
    )  # fmt: skip
    if overwritten:
        torch.autograd.graph.increment_version(student)
    kept_center = outputs[-1]
    if kept_center.numel() > 0:
        kept_center.copy_(center)
    return outputs


def _fake_forward(
    student, teacher, center, student_temp, teacher_temp, differentiable, backend="auto", changing_temps=None
):
    temps = (student_temp, teacher_temp) if changing_temps is None else ()
    validate_inputs(student, teacher, center, *temps)
    written = differentiable and _written_in_forward(student, direct=False)
    return _empty_outputs(student, differentiable, written, overwritten=False)


def _empty_outputs(student: Tensor, differentiable: bool, written: bool, overwritten: bool) -> tuple[Tensor, ...]:
    V, B, K = student.shape
    result = torch.float64 if student.dtype == torch.float64 else torch.float32
    made_anew = differentiable and (not written or (_rounds_twice(student) and not overwritten))
    return (
        student.new_empty((), dtype=result),
        student.new_empty((K,), dtype=result),
        student.new_empty((), dtype=result),
        student.detach() if overwritten else student.new_empty((V, B, K) if written else (0,)),
        student.new_empty((2, TEACHER_CROPS + V, B), dtype=result),
        student.new_empty((K,) if made_anew else (0,), dtype=result),
    )


def _written_in_forward(student: Tensor, direct: bool) -> bool:
    """Whether the forward writes the gradient.

    Not in float16, where 1 / (tau_s B N) underflows. Not on an accelerator, whose upstream gradient the host cannot see
    without waiting: one pass that scales as it writes costs less than multiplying afterwards. Not in bfloat16 in traced
    code, which cannot look at the upstream gradient either.
    """
    if student.dtype == torch.float16 or student.device.type != "cpu":
        return False
    return direct or student.dtype != torch.bfloat16


def _rounds_twice(student: Tensor) -> bool:
    """Whether multiplying a written gradient would add to its error; the CPU alone sees when it must."""
    return student.dtype == torch.bfloat16 and student.device.type == "cpu"


def _refuse_shared_memory(student: Tensor, teacher: Tensor, center: Tensor) -> None:
    first, last = student.data_ptr(), student.data_ptr() + student.numel() * student.element_size()
    for name, other in (("teacher's logits", teacher), ("centre", center)):
        span = 1 + sum((size - 1) * stride for size, stride in zip(other.shape, other.stride(), strict=True))
        if other.data_ptr() < last and first < other.data_ptr() + span * other.element_size():
            raise ValueError(
                f"dino_loss: inplace=True would write the gradient over the {name}, which share memory with the "
                "student's logits; give a copy of one of them, or inplace=False"
            )


def _gradient(
    student: Tensor,
    teacher: Tensor,
    center: Tensor,
    row_statistics: Tensor,
    upstream: Tensor,
    student_temp: float,
    teacher_temp: float,
    backend: str = "auto",
    changing_temps: Tensor | None = None,
) -> Tensor:
    """The gradient w.r.t. the student's logits, times `upstream`, from the logits and the forward's row statistics."""
    temps = autograd.read_temps(student_temp, teacher_temp, changing_temps)
    validate_inputs(student, teacher, center, *temps)
    _validate_backward(student, row_statistics, upstream)
    chosen = choose("dino_loss", student, teacher, backend=backend)
    return GRADIENT[chosen](student, teacher, center, row_statistics, upstream, *temps)


def _fake_gradient(
    student, teacher, center, row_statistics, upstream, student_temp, teacher_temp, backend="auto", changing_temps=None
):
    validate_inputs(student, teacher, center)
    _validate_backward(student, row_statistics, upstream)
    return student.new_empty(student.shape)


def _validate_backward(student: Tensor, row_statistics: Tensor, upstream: Tensor) -> None:
    V, B, _ = student.shape
    dtype = torch.float64 if student.dtype == torch.float64 else torch.float32
    if row_statistics.shape != (2, TEACHER_CROPS + V, B) or row_statistics.dtype != dtype:
        raise ValueError(
            f"dino_loss: the row statistics are {dtype} {[2, TEACHER_CROPS + V, B]}, as the forward returns them; "
            f"got {row_statistics.dtype} {list(row_statistics.shape)}"
        )
    if upstream.numel() != 1 or not upstream.is_floating_point():
        raise ValueError(
            f"dino_loss: the upstream gradient is one floating-point number; got {upstream.dtype} "
            f"{list(upstream.shape)}"
        )
    for name, tensor in (("row statistics are", row_statistics), ("upstream gradient is", upstream)):
        if tensor.device != student.device:
            raise ValueError(f"dino_loss: the {name} on {tensor.device} but the student on {student.device}")


def _setup_context(ctx, inputs, output) -> None:
    ctx.mark_non_differentiable(*output[1:])
    _keep_for_backward(ctx, inputs, output, keep_student=True)


def _keep_for_backward(ctx, inputs, output, keep_student: bool) -> None:
    student, teacher, _, student_temp, teacher_temp, differentiable, backend, changing_temps = inputs
    gradient, row_statistics, kept_center = output[3:]
    ctx.set_materialize_grads(False)
    ctx.differentiable = differentiable
    ctx.written = gradient.numel() > 0
    ctx.numbers = student_temp, teacher_temp, backend
    ctx.anchors = ()
    kept = [gradient] if ctx.written else []
    if kept_center.numel() > 0:
        kept += [student, autograd.savable(teacher), kept_center, row_statistics, changing_temps]
    elif keep_student:  # for autograd to see what the gradient depends on; compiled code drops it
        kept += [student]
    elif differentiable:
        ctx.anchors = (autograd.anchor(student),)
    ctx.save_for_backward(*kept)


@autograd.once_differentiable("dino_loss", REFERENCE)
def _backward(ctx, upstream, *unused):
    nothing = (None,) * 7
    if upstream is None:
        return None, *nothing
    if not ctx.differentiable:
        raise RuntimeError("dino_fast::dino_loss was called with differentiable=False, so it kept no gradient")
    if not ctx.written:
        return _make_anew(ctx, ctx.saved_tensors, upstream), *nothing
    gradient, *inputs = ctx.saved_tensors
    plain = type(upstream) is Tensor and type(gradient) is Tensor
    if plain and len(inputs) > 1 and not _is_power_of_two(upstream.item()):
        return _make_anew(ctx, inputs, upstream), *nothing
    return _scale_grad(gradient, upstream), *nothing


def _make_anew(ctx, inputs, upstream: Tensor) -> Tensor:
    *tensors, changing_temps = inputs
    return torch.ops.dino_fast.dino_loss_gradient(*tensors, upstream, *ctx.numbers, changing_temps)


def _scale_grad(gradient: Tensor, upstream: Tensor) -> Tensor:
    """gradient * upstream, without a copy where upstream is known to be 1. Never in place: a graph may be run twice."""
    # While a graph is traced there is no number to look at, and on an accelerator looking would wait for it.
    if type(upstream) is Tensor and upstream.device.type == "cpu" and upstream.item() == 1.0:
        return gradient
    return gradient * upstream


def _is_power_of_two(number: float) -> bool:
    """Whether multiplying by it rounds nothing (but the smallest numbers)."""
    return math.frexp(abs(number))[0] == 0.5


autograd.define_operator(
    "dino_loss", _forward, _fake_forward, alternative=REFERENCE, backward=_backward, setup_context=_setup_context
)
autograd.define_operator("dino_loss_gradient", _gradient, _fake_gradient, alternative=REFERENCE)


class _Direct(torch.autograd.Function):
    """The operator without the dispatcher, for plain tensors."""

    # Not a `setup_context`: for a function that has one, PyTorch binds the arguments by signature at each call.
    @staticmethod
    def forward(ctx, *arguments):
        outputs = _run(*arguments, direct=True)
        _keep_for_backward(ctx, (*arguments[:-1], None), outputs, keep_student=False)
        ctx.mark_non_differentiable(*outputs[1:3])
        return outputs[:3]

    @staticmethod
    def backward(ctx, *upstream):
        return _backward(ctx, *upstream)


# --- backends, fastest first ----------------------------------------------------------------------------------------
# Forwards fill the outputs they are given, but for the three results, which they may return in tensors of their own; a
# gradient that is not empty is to be written, for an upstream gradient of 1. It may be the student's logits.


def _example(device: torch.device) -> tuple[Tensor, ...]:
    dtype = gpu.usual_dtype(device)
    return tuple(torch.empty((n, 2, 4096), dtype=dtype, device=device) for n in (10, 2))


register(
    "dino_loss",
    Backend("triton", unavailable_reason=triton_unavailable_reason, unsupported_reason=triton.unsupported_reason),
    Backend("native", unavailable_reason=native_unavailable_reason, unsupported_reason=native.unsupported_reason),
    Backend("reference"),
    example=_example,
)


def _reference_forward(student, teacher, center, student_temp, teacher_temp, outputs):
    temps = {"student_temp": student_temp, "teacher_temp": teacher_temp}
    loss, teacher_mean, teacher_entropy = dino_loss_reference(student, teacher, center, **temps)
    *_, gradient, row_statistics, kept_center = outputs
    dtype = row_statistics.dtype
    crops = [((t - center).to(dtype), teacher_temp) for t in teacher] + [(s.to(dtype), student_temp) for s in student]
    for statistics, (logits, temp) in zip(row_statistics.unbind(1), crops, strict=True):
        maxima = logits.amax(-1)
        statistics[0] = maxima
        statistics[1] = ((logits - maxima[:, None]) / temp).exp().sum(-1)
    if gradient.numel() > 0:
        gradient.copy_(_reference_gradient(student, teacher, center, None, torch.ones_like(loss), **temps))
    return loss, teacher_mean, teacher_entropy, gradient, row_statistics, kept_center


def _reference_gradient(student, teacher, center, row_statistics, upstream, student_temp, teacher_temp):
    """(w softmax(s / tau_s) - q) / (tau_s B N), q the sum of a student crop's targets and w their number.

    Written out, because inside an operator's implementation autograd does not record.
    """
    V, B, _ = student.shape
    dtype = torch.float64 if student.dtype == torch.float64 else torch.float32
    targets = torch.softmax((teacher.to(dtype) - center.to(dtype)) / teacher_temp, dim=-1)  # [2, B, K]
    pairs = torch.tensor(pair_weights(V), dtype=dtype, device=student.device).view(TEACHER_CROPS, V)
    predictions = torch.softmax(student.to(dtype) / student_temp, dim=-1)  # [V, B, K]
    difference = pairs.sum(0)[:, None, None] * predictions - torch.einsum("uv,ubk->vbk", pairs, targets)
    return (difference * (upstream / (student_temp * B * pairs.sum()))).to(student.dtype).contiguous()


FORWARD = {
    "triton": triton.forward,
    "native": native.forward,
    "reference": _reference_forward,
}
GRADIENT = {
    "triton": triton.gradient,
    "native": native.gradient,
    "reference": _reference_gradient,
}
