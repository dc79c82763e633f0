"""DINO's cross-entropy over all pairs of crops of an image, on logits.

With s the student's logits [V, B, K], t the teacher's [2, B, K], c the centre [K]:

    p[u] = softmax((t[u] - c) / tau_t)                              u = 0, 1: the two global crops
    loss = mean over b and pairs u != v of  -<p[u, b], log_softmax(s[v, b] / tau_s)>        2 V - 2 pairs

(Caron et al. 2021, "Emerging properties in self-supervised vision transformers", algorithm 1 with multi-crop.)

The kernels write the gradient by the student's logits in the forward pass, for an upstream gradient of 1, which is what
`loss.backward()` brings; another one multiplies it out of place. float16 logits are the exception: divided by
tau_s B (2 V - 2) their gradient would underflow before a loss scale could lift it, so their backward recomputes it from
the logits with the scale included, from each row's maximum and sum that the forward saved.
"""

from __future__ import annotations

import os
from typing import NamedTuple

import torch
from torch import Tensor

from dino_fast import gpu
from dino_fast.backends import Backend, choose, native_missing, register, triton_missing

TEACHER_CROPS = 2
KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)  # in the order of csrc/cpu/dino_loss.h's LogitType
DTYPES = (*KERNEL_DTYPES, torch.float64)


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
    student_temp: float,
    teacher_temp: float,
    inplace: bool = False,
    backend: str = "auto",
) -> DinoLoss:
    """The loss, the mean of the teacher's logits and the entropy of its targets, in one operation.

    Args:
        student: logits [V, B, K], V >= 2 crops of which the first two are the teacher's; float32, bfloat16, float16 or
            (reference only) float64. Any strides; rows that are not contiguous are copied.
        teacher: logits [2, B, K] of the same kinds, not necessarily the student's. Not differentiated.
        center: [K], taken from the teacher's logits. Not differentiated.
        student_temp, teacher_temp: positive temperatures.
        inplace: the gradient may take the memory of the student's logits, which then hold it instead. The native
            backend does so where the logits are contiguous float32 or bfloat16 and need a gradient, outside of
            torch.compile. Where an earlier operation kept the logits for its own backward, that backward raises.
        backend: "auto", "triton", "triton_sweep" (a GPU's gradient in the forward, not measured yet), "native" or
            "reference"; see `dino_fast.backends`.

    NaN or infinite logits give a loss and gradients that are not finite, as the formula does; they raise nothing, which
    would cost a pass over the data. Second derivatives are not available.

    Raises:
        ValueError: shapes, dtypes, devices or temperatures that do not fit, said in the message.
        BackendError: an explicitly chosen backend cannot run these inputs.
    """
    problem = what_is_wrong(student, teacher, center, student_temp, teacher_temp)
    if problem is not None:
        raise ValueError(f"dino_loss: {problem}")
    differentiable = student.requires_grad and torch.is_grad_enabled()
    if teacher.requires_grad:
        teacher = teacher.detach()
    if center.requires_grad:
        center = center.detach()
    arguments = (student, teacher, center, student_temp, teacher_temp, differentiable, backend)
    plain = _PLAIN.issuperset((type(student), type(teacher), type(center)))
    if plain and not torch.compiler.is_compiling():
        # The dispatcher's way to the same functions: with cold caches it costs 0.7 ms, a tenth of a large problem.
        loss, teacher_mean, teacher_entropy = _Eager.apply(*arguments, inplace)
    else:
        loss, teacher_mean, teacher_entropy, *_ = torch.ops.dino_fast.dino_loss(*arguments)
    return DinoLoss(loss, teacher_mean, teacher_entropy)


def what_is_wrong(
    student: Tensor, teacher: Tensor, center: Tensor, student_temp: float, teacher_temp: float
) -> str | None:
    """Why these inputs cannot be used, for the person who gave them, or None."""
    if wrong := _wrong_shapes(student.shape, teacher.shape, center.shape):
        shapes = f"got student {list(student.shape)}, teacher {list(teacher.shape)}, centre {list(center.shape)}"
        return f"{wrong}; {shapes}"
    for name, tensor in (("student", student), ("teacher", teacher), ("centre", center)):
        if tensor.dtype not in DTYPES:
            known = ", ".join(str(dtype).removeprefix("torch.") for dtype in DTYPES)
            return f"the {name}'s dtype is {tensor.dtype}; accepted are {known}"
        if tensor.device != student.device:
            return f"the {name} is on {tensor.device} but the student on {student.device}; move one of them"
    if not (student_temp > 0 and teacher_temp > 0):
        return f"temperatures must be positive; got student {student_temp}, teacher {teacher_temp}"
    return None


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
# the centre where the backward will need it, or empty. (Copied here, not when the context is set up: there
# torch.compile drops the copy, and the backward would see the centre that the next update writes in place.)


def _forward(
    student: Tensor,
    teacher: Tensor,
    center: Tensor,
    student_temp: float,
    teacher_temp: float,
    differentiable: bool,
    backend: str = "auto",
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    return _run(student, teacher, center, student_temp, teacher_temp, differentiable, backend, False)


def _run(student, teacher, center, student_temp, teacher_temp, differentiable, backend, inplace, eager=False):
    chosen = choose("dino_loss", student, teacher, backend=backend)
    written = differentiable and gradient_is_written_forward(student, chosen if eager else None)
    arguments = (student, teacher, center, student_temp, teacher_temp, differentiable)
    outputs = FORWARD[chosen](*arguments, _empty_outputs(student, teacher, differentiable, inplace, written))
    if inplace and written and outputs[3].data_ptr() == student.data_ptr():
        torch.autograd.graph.increment_version(student)
    kept_center = outputs[-1]
    if kept_center.numel() > 0:
        kept_center.copy_(center)
    return outputs


_operator = torch.library.custom_op("dino_fast::dino_loss", _forward, mutates_args=())


@_operator.register_fake
def _(student, teacher, center, student_temp, teacher_temp, differentiable, backend="auto"):
    return _empty_outputs(student, teacher, differentiable)


def _empty_outputs(
    student: Tensor, teacher: Tensor, differentiable: bool, inplace: bool = False, written: bool | None = None
) -> tuple[Tensor, ...]:
    V, B, K = student.shape
    result = torch.float64 if student.dtype == torch.float64 else torch.float32
    if written is None:
        written = differentiable and gradient_is_written_forward(student)
    overwritten = inplace and written and student.is_contiguous()
    return (
        student.new_empty((), dtype=result),
        student.new_empty((K,), dtype=result),
        student.new_empty((), dtype=result),
        student.detach() if overwritten else student.new_empty((V, B, K) if written else (0,)),
        student.new_empty((2, TEACHER_CROPS + V, B), dtype=result),
        student.new_empty((K,) if differentiable and not written else (0,), dtype=result),
    )


def gradient_is_written_forward(student: Tensor, backend: str | None = None) -> bool:
    """Whether the forward writes the gradient. float16 waits for the upstream gradient: 1 / (tau_s B N) underflows.
    So does an accelerator, whose upstream gradient the host cannot see without waiting: one pass that scales as it
    writes costs less than multiplying afterwards. `triton_sweep` alone, outside of traced graphs, writes it there."""
    return student.dtype != torch.float16 and (student.device.type == "cpu" or backend == "triton_sweep")


@torch.library.custom_op("dino_fast::dino_loss_gradient", mutates_args=())
def _gradient_operator(
    student: Tensor,
    teacher: Tensor,
    center: Tensor,
    row_statistics: Tensor,
    upstream: Tensor,
    student_temp: float,
    teacher_temp: float,
    backend: str = "auto",
) -> Tensor:
    """The gradient by the student's logits, times `upstream`, from the logits and the forward's row statistics."""
    chosen = choose("dino_loss", student, teacher, backend=backend)
    return GRADIENT[chosen](student, teacher, center, row_statistics, upstream, student_temp, teacher_temp)


@_gradient_operator.register_fake
def _(student, teacher, center, row_statistics, upstream, student_temp, teacher_temp, backend="auto"):
    return student.new_empty(student.shape)


def _setup_context(ctx, inputs, output) -> None:
    ctx.mark_non_differentiable(*output[1:])
    _keep_for_backward(ctx, inputs, output)


def _keep_for_backward(ctx, inputs, output) -> None:
    student, teacher, _, student_temp, teacher_temp, differentiable, backend = inputs
    gradient, row_statistics, kept_center = output[3:]
    ctx.set_materialize_grads(False)
    ctx.differentiable = differentiable
    ctx.written = gradient.numel() > 0
    ctx.taken = None  # the upstream gradient that a GPU has multiplied the written one by
    ctx.temps_and_backend = student_temp, teacher_temp, backend
    if ctx.written:
        ctx.save_for_backward(gradient)
    else:
        ctx.save_for_backward(student, teacher, kept_center, row_statistics)


def _backward(ctx, upstream, *unused):
    nothing = (None,) * 6
    if upstream is None:
        return None, *nothing
    if not ctx.differentiable:
        raise RuntimeError("dino_fast::dino_loss was called with differentiable=False, so it kept no gradient")
    if ctx.written:
        (gradient,) = ctx.saved_tensors
        if gradient.device.type == "cuda" and type(upstream) is Tensor and type(gradient) is Tensor:
            gradient = _times_on_gpu(ctx, gradient, upstream)
        else:
            gradient = _times(gradient, upstream)
    else:
        gradient = torch.ops.dino_fast.dino_loss_gradient(
            *ctx.saved_tensors[:3], ctx.saved_tensors[3], upstream, *ctx.temps_and_backend
        )
    if torch.is_grad_enabled() and type(upstream) is Tensor:
        gradient = _Once.apply(gradient, torch.empty(0, requires_grad=True))
    return gradient, *nothing


def _times(gradient: Tensor, upstream: Tensor) -> Tensor:
    """gradient * upstream, without a copy where upstream is known to be 1. Never in place: a graph may be run twice."""
    # While a graph is traced there is no number to look at, and on an accelerator looking would wait for it.
    if type(upstream) is Tensor and upstream.device.type == "cpu" and upstream.item() == 1.0:
        return gradient
    return gradient * upstream.to(gradient.dtype)


def _times_on_gpu(ctx, gradient: Tensor, upstream: Tensor) -> Tensor:
    """gradient * upstream, where only the GPU knows upstream: in place, by a kernel that returns at once if it is 1.
    A graph that is run again gets a new tensor, from what the first run left; if that was for an upstream gradient of
    0, the second run's is not finite."""
    from dino_fast.kernels.dino_loss_sweep import scale

    if ctx.taken is None:
        ctx.taken = upstream
        scale(gradient, upstream)
        return gradient
    return gradient * (upstream / ctx.taken).to(gradient.dtype)


class _Once(torch.autograd.Function):
    """Lets a gradient through, and refuses to differentiate it: it would be taken for a constant without a word."""

    @staticmethod
    def forward(ctx, gradient: Tensor, marker: Tensor) -> Tensor:
        return gradient.view_as(gradient)

    @staticmethod
    def backward(ctx, upstream):
        raise RuntimeError("dino_loss has no second derivative; differentiate dino_loss_reference instead")


_operator.register_autograd(_backward, setup_context=_setup_context)


class _Eager(torch.autograd.Function):
    """The operator without the dispatcher, for plain tensors outside of tracing."""

    # Not a `setup_context`: for a function that has one, PyTorch binds the arguments by signature at each call.
    @staticmethod
    def forward(ctx, *arguments):
        *inputs, inplace = arguments
        outputs = _run(*inputs, inplace, eager=True)
        _keep_for_backward(ctx, inputs, outputs)
        ctx.mark_non_differentiable(*outputs[1:3])
        return outputs[:3]

    @staticmethod
    def backward(ctx, *upstream):
        return *_backward(ctx, *upstream), None


_PLAIN = frozenset((Tensor, torch.nn.Parameter))  # no subclass with a dispatch of its own


# --- backends, fastest first ----------------------------------------------------------------------------------------


def _native_rejects(student: Tensor | None = None, *others: Tensor) -> str | None:
    for tensor in (student, *others):
        if tensor is None:
            continue
        if tensor.device.type != "cpu":
            return f"it runs on the CPU, the logits are on {tensor.device}"
        if tensor.dtype not in KERNEL_DTYPES:
            return f"it takes float32, bfloat16 and float16 logits, not {tensor.dtype}"
    return None


def _triton_rejects(student: Tensor | None = None, *others: Tensor) -> str | None:
    for tensor in (student, *others):
        if tensor is None:
            continue
        if tensor.device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
            return f"it runs on CUDA (on the CPU under TRITON_INTERPRET=1), the logits are on {tensor.device}"
        if tensor.dtype not in KERNEL_DTYPES:
            return f"it takes float32, bfloat16 and float16 logits, not {tensor.dtype}"
    return None if student is None else gpu.too_old(student.device)


def _sweep_rejects(student: Tensor | None = None, *others: Tensor) -> str | None:
    if (reason := _triton_rejects(student, *others)) or student is None:
        return reason
    from dino_fast.kernels import dino_loss_sweep

    return dino_loss_sweep.rejects(student)


def _example(device: torch.device) -> tuple[Tensor, Tensor]:
    dtype = gpu.usual_dtype(device)
    return tuple(torch.empty((n, 2, 4096), dtype=dtype, device=device) for n in (10, 2))


# Programs of `triton_sweep` wait for each other, and none has run on a GPU yet: only who asks for it gets it.
register(
    "dino_loss",
    Backend("triton", missing=triton_missing, rejects=_triton_rejects),
    Backend("triton_sweep", missing=triton_missing, rejects=_sweep_rejects),
    Backend("native", missing=native_missing, rejects=_native_rejects),
    Backend("reference"),
    example=_example,
)


# Forwards fill the outputs they are given, but for the three results, which they may return in tensors of their own; a
# gradient that is not empty is to be written, for an upstream gradient of 1. It may be the student's logits.


def _reference_forward(student, teacher, center, student_temp, teacher_temp, differentiable, outputs):
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


def _native_forward(student, teacher, center, student_temp, teacher_temp, differentiable, outputs):
    from dino_fast import _C

    problem, _alive = _native_problem(student, teacher, center, student_temp, teacher_temp)
    addresses = [output.data_ptr() for output in outputs]  # of an empty tensor: 0, "no gradient wanted"
    loss, mean, entropy, gradient, row_statistics, _ = addresses
    _C.dino_loss_forward(*problem, loss, mean, entropy, row_statistics, gradient)
    return outputs


def _native_gradient(student, teacher, center, row_statistics, upstream, student_temp, teacher_temp):
    from dino_fast import _C

    gradient = torch.empty(student.shape, dtype=student.dtype)
    problem, _alive = _native_problem(student, teacher, center, student_temp, teacher_temp)
    _C.dino_loss_gradient(*problem, row_statistics.data_ptr(), upstream.item(), gradient.data_ptr())
    return gradient


def _native_problem(
    student: Tensor, teacher: Tensor, center: Tensor, student_temp: float, teacher_temp: float
) -> tuple[tuple, tuple]:
    """The arguments that describe a problem to the native code, and the tensors that must outlive the call."""
    rows = _contiguous_rows(student, teacher)
    if center.dtype != torch.float32 or center.stride(0) != 1:
        center = center.to(torch.float32).contiguous()
    logits = [(x.data_ptr(), KERNEL_DTYPES.index(x.dtype), x.stride(0), x.stride(1)) for x in rows]
    V, B, K = student.shape
    temps = (student_temp, teacher_temp)
    problem = (*logits, center.data_ptr(), pair_weights(V), (V, B, K), temps, torch.get_num_threads())
    return problem, (rows, center)


def pair_weights(V: int) -> list[float]:
    """[2 x V], row by row: 1 for a pair that counts, 0 for a crop with itself."""
    return [float(u != v) for u in range(TEACHER_CROPS) for v in range(V)]


def _triton_forward(student, teacher, center, student_temp, teacher_temp, differentiable, outputs):
    from dino_fast.kernels import dino_loss as kernels

    *_, gradient, row_statistics, kept_center = outputs
    student, teacher = _contiguous_rows(student, teacher)
    center = center.to(torch.float32).contiguous()
    loss, entropy = kernels.statistics(student, teacher, center, student_temp, teacher_temp, row_statistics)
    if gradient.numel() > 0:
        one = torch.ones((), device=student.device)
        mean = kernels.gradient(student, teacher, center, row_statistics, one, gradient, student_temp, teacher_temp)
    else:
        mean = kernels.mean(student, teacher, center, row_statistics)
    return loss, mean, entropy, gradient, row_statistics, kept_center


def _sweep_forward(student, teacher, center, student_temp, teacher_temp, differentiable, outputs):
    *_, gradient, row_statistics, kept_center = outputs
    if gradient.numel() == 0:
        return _triton_forward(student, teacher, center, student_temp, teacher_temp, differentiable, outputs)
    from dino_fast.kernels import dino_loss_sweep

    rows = _contiguous_rows(student, teacher)
    center = center.to(torch.float32).contiguous()
    loss, entropy, mean = dino_loss_sweep.sweep(*rows, center, student_temp, teacher_temp, row_statistics, gradient)
    return loss, mean, entropy, gradient, row_statistics, kept_center


def _triton_gradient(student, teacher, center, row_statistics, upstream, student_temp, teacher_temp):
    from dino_fast.kernels import dino_loss as kernels

    gradient = student.new_empty(student.shape)
    student, teacher = _contiguous_rows(student, teacher)
    center = center.to(torch.float32).contiguous()
    kernels.gradient(student, teacher, center, row_statistics, upstream, gradient, student_temp, teacher_temp)
    return gradient


def _contiguous_rows(*logits: Tensor) -> list[Tensor]:
    """The same tensors, copied only where the elements of a row do not lie side by side."""
    return [x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous() for x in logits]


FORWARD = {
    "triton": _triton_forward,
    "triton_sweep": _sweep_forward,
    "native": _native_forward,
    "reference": _reference_forward,
}
GRADIENT = {
    "triton": _triton_gradient,
    "triton_sweep": _triton_gradient,
    "native": _native_gradient,
    "reference": _reference_gradient,
}
