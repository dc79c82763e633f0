"""Optimizer and teacher in one pass over memory, for lists of hundreds of tensors.

Three operations, all on lists whose i-th entries belong together:

    ema_update   t <- m t + (1 - m) p                                  the teacher alone
    grad_norms   |g|_2 of every gradient, one vector [n]               first pass, only where gradients are clipped
    adamw_ema    g' = c g                                              c: clip coefficient over gradient scale, [n]
                 p  <- (1 - lr wd) p
                 m1 <- b1 m1 + (1 - b1) g',   m2 <- b2 m2 + (1 - b2) g'^2
                 p  <- p - lr / (1 - b1^k) * m1 / (sqrt(m2 / (1 - b2^k)) + eps)          (Loshchilov & Hutter 2019)
                 t  <- m t + (1 - m) p,  then bfloat16 copies of p and t

Bytes a parameter in float32: reads g, p, m1, m2, t (20), writes p, m1, m2, t (16), and 4 more to read g for its norm:
40 in all; bfloat16 copies add 2 each. Arithmetic is float32, also for bfloat16 and float16 tensors (float64 runs on the
reference, in float64). Scalars such as 1 - b2^k are computed in float64 and rounded once.

Nothing here reads a device tensor on the host: coefficients, `found_inf` and step counts stay where they are.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from dino_fast.backends import Backend, choose, cuda_unavailable_reason, native_unavailable_reason, register
from dino_fast.ops.autograd import define_operator
from dino_fast.ops.multi_tensor import cuda, native

# ---- reference: the specification ----


def ema_update_reference(
    teacher: Sequence[Tensor],
    student: Sequence[Tensor],
    momentum: float,
    copies: Sequence[Tensor] = (),
    found_inf: Tensor | None = None,
) -> None:
    """t <- m t + (1 - m) p, in place; then copies[i] <- t. In float64 where either tensor is, else in float32."""
    for i, (t, p) in enumerate(zip(teacher, student, strict=True)):
        wide = torch.float64 if torch.float64 in (t.dtype, p.dtype) else torch.float32
        new = torch.lerp(t.to(wide), p.to(wide), 1.0 - momentum).to(t.dtype)
        t.copy_(new if found_inf is None else torch.where(found_inf.reshape(()) == torch.inf, t, new))
        if copies and copies[i].shape == t.shape:
            copies[i].copy_(t)


def grad_norms_reference(grads: Sequence[Tensor]) -> Tensor:
    """The 2-norm of each gradient, [n]; float64 where any gradient is, else float32."""
    wide = torch.float64 if any(g.dtype == torch.float64 for g in grads) else torch.float32
    return torch.stack([torch.linalg.vector_norm(g.to(wide)) for g in grads])


def adamw_ema_reference(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    steps: Sequence[Tensor],
    teachers: Sequence[Tensor],
    param_copies: Sequence[Tensor],
    teacher_copies: Sequence[Tensor],
    multipliers: Tensor | None,
    found_inf: Tensor | None,
    lrs: Sequence[float],
    weight_decays: Sequence[float],
    beta1: float,
    beta2: float,
    eps: float,
    momentum: float,
) -> None:
    """One step for each parameter, in place; the arguments are those of `adamw_ema`."""
    for i, (p, m1, m2, step) in enumerate(zip(params, exp_avgs, exp_avg_sqs, steps, strict=True)):
        g = grads[i].to(p.dtype)
        if multipliers is not None:
            g = g * multipliers[i].to(p.dtype)
        k = step.double() + 1
        new_m1 = torch.lerp(m1, g, 1 - beta1)
        new_m2 = m2 * beta2 + (1 - beta2) * g * g
        denominator = new_m2.sqrt() / (1 - beta2**k).sqrt().to(p.dtype) + eps
        step_size = (lrs[i] / (1 - beta1**k)).to(p.dtype)
        new_p = p * (1 - lrs[i] * weight_decays[i]) - step_size * (new_m1 / denominator)
        # An overflow keeps the old values by selecting them: no branch, so nothing waits for the device.
        for old, new in ((p, new_p), (m1, new_m1), (m2, new_m2), (step, k.to(step.dtype))):
            old.copy_(new if found_inf is None else torch.where(found_inf.reshape(()) > 0, old, new))
        if param_copies and param_copies[i].shape == p.shape:
            param_copies[i].copy_(p)
    if teachers:
        ema_update_reference(teachers, params, momentum, teacher_copies, found_inf)


# ---- operations ----
# The run_* functions are what torch.ops.dino_fast.* run. AdamWEMA calls them directly where nothing traces: the
# dispatcher's handling of a thousand tensors takes longer than all else that is not arithmetic.


def run_ema_update(
    teacher: list[Tensor],
    student: list[Tensor],
    momentum: float,
    copies: list[Tensor],
    backend: str = "auto",
    found_inf: Tensor | None = None,
) -> None:
    """teacher[i] <- momentum * teacher[i] + (1 - momentum) * student[i], in place; then copies[i] <- teacher[i].

    Any mix of float32, bfloat16 and float16 (float64 on the reference), computed in float32. `copies` is empty, or
    bfloat16 tensors of the teachers' shapes; an entry without elements means no copy of that teacher. Nothing changes
    where `found_inf`, one float on the device, is infinite.
    """
    _check_ema(teacher, student, momentum, copies)
    if not teacher:
        return
    name = choose("multi_tensor", *_kinds(teacher, student, copies), backend=backend)
    _EMA_UPDATE[name](teacher, student, momentum, copies, found_inf)


def run_ema_update_tensor_momentum(
    teacher: list[Tensor],
    student: list[Tensor],
    momentum: Tensor,
    copies: list[Tensor],
    backend: str = "auto",
    found_inf: Tensor | None = None,
) -> None:
    """`run_ema_update` by a momentum in a scalar tensor on the CPU: a compiled program takes it as an input, where a
    number would be a constant of it, and another number another program."""
    _check_momentum_tensor(momentum)
    run_ema_update(teacher, student, momentum.item(), copies, backend, found_inf)


def run_grad_norms(grads: list[Tensor], backend: str = "auto") -> Tensor:
    """The 2-norm of each gradient, float32 [n] on the gradients' device (float64 where any gradient is).

    An infinite or NaN gradient gives an infinite or NaN norm. The same gradients give the same bits.
    """
    _check_devices(grads)
    return _GRAD_NORMS[choose("multi_tensor", *_kinds(grads), backend=backend)](grads)


def run_adamw_ema(
    params: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    steps: list[Tensor],
    teachers: list[Tensor],
    param_copies: list[Tensor],
    teacher_copies: list[Tensor],
    multipliers: Tensor | None,
    found_inf: Tensor | None,
    lrs: list[float],
    weight_decays: list[float],
    beta1: float,
    beta2: float,
    eps: float,
    momentum: float,
    backend: str = "auto",
) -> None:
    """One AdamW step, then the teachers' EMA, then the bfloat16 copies, in place.

    params, exp_avgs, exp_avg_sqs   float32 (float64 on the reference)
    grads                           float32, bfloat16 or float16, the parameters' shapes
    steps                           float32 scalars on the parameters' device, steps taken so far; counted up here
    teachers                        empty (no EMA), or one of the parameter's dtype and shape for each
    param_copies, teacher_copies    empty, or bfloat16 ones; an entry without elements means no copy of that tensor
    multipliers                     None, or [n] on the device: each gradient is multiplied by its entry
    found_inf                       None, or one float on the device: where it is positive, parameters, moments and
                                    steps stay as they are; the EMA and the copies are made all the same. Where it is
                                    infinite nothing changes at all
    lrs, weight_decays              one for each parameter
    """
    _check_adamw(params, grads, exp_avgs, exp_avg_sqs, steps, teachers, param_copies, teacher_copies)
    _check_multipliers(params, multipliers)
    _check_scalars(len(params), lrs, weight_decays, momentum)
    if not params:
        return
    name = choose("multi_tensor", *_kinds(params, grads), backend=backend)
    _ADAMW_EMA[name](
        params, grads, exp_avgs, exp_avg_sqs, steps, teachers, param_copies, teacher_copies,
        multipliers, found_inf, lrs, weight_decays, beta1, beta2, eps, momentum,
    )  # fmt: skip


def _fake_ema_update(teacher, student, momentum, copies, backend="auto", found_inf=None):
    _check_ema(teacher, student, momentum, copies)


def _fake_ema_update_tensor_momentum(teacher, student, momentum, copies, backend="auto", found_inf=None):
    _check_momentum_tensor(momentum)
    _check_ema(teacher, student, 1.0, copies)  # its value is checked where it is known


def _fake_grad_norms(grads, backend="auto"):
    wide = torch.float64 if any(g.dtype == torch.float64 for g in grads) else torch.float32
    return grads[0].new_empty(len(grads), dtype=wide)


def _fake_adamw_ema(
    params, grads, exp_avgs, exp_avg_sqs, steps, teachers, param_copies, teacher_copies, multipliers, *rest, **options
):
    _check_adamw(params, grads, exp_avgs, exp_avg_sqs, steps, teachers, param_copies, teacher_copies)
    _check_multipliers(params, multipliers)


define_operator(
    "ema_update",
    run_ema_update,
    _fake_ema_update,
    alternative="dino_fast.ops.multi_tensor.ema_update_reference",
    mutates_args=("teacher", "copies"),
)
define_operator(
    "ema_update_tensor_momentum",
    run_ema_update_tensor_momentum,
    _fake_ema_update_tensor_momentum,
    alternative="dino_fast.ops.multi_tensor.ema_update_reference",
    mutates_args=("teacher", "copies"),
)
define_operator(
    "grad_norms", run_grad_norms, _fake_grad_norms, alternative="dino_fast.ops.multi_tensor.grad_norms_reference"
)
define_operator(
    "adamw_ema",
    run_adamw_ema,
    _fake_adamw_ema,
    alternative="dino_fast.ops.multi_tensor.adamw_ema_reference",
    mutates_args=("params", "exp_avgs", "exp_avg_sqs", "steps", "teachers", "param_copies", "teacher_copies"),
)


# ---- what is accepted ----


def _check_ema(teacher: list[Tensor], student: list[Tensor], momentum: float, copies: list[Tensor]) -> None:
    if not 0.0 <= momentum <= 1.0:
        raise ValueError(f"momentum must lie in [0, 1]: the share of the old teacher that is kept; got {momentum}")
    _check_same({"teacher": teacher, "student": student})
    _check_copies("copies", copies, teacher)
    _check_devices([*teacher, *student, *copies])


def _check_momentum_tensor(momentum: Tensor) -> None:
    if momentum.numel() != 1 or not momentum.is_cpu:
        raise ValueError(
            f"momentum must be a number, or a tensor of one on the CPU, where reading it waits for nothing; "
            f"got a tensor of shape {tuple(momentum.shape)} on {momentum.device}"
        )


def _check_adamw(params, grads, exp_avgs, exp_avg_sqs, steps, teachers, param_copies, teacher_copies) -> None:
    columns = {"params": params, "grads": grads, "exp_avgs": exp_avgs, "exp_avg_sqs": exp_avg_sqs}
    _check_same(columns | ({"teachers": teachers} if teachers else {}))
    _check_copies("param_copies", param_copies, params)
    _check_copies("teacher_copies", teacher_copies, params)
    dtypes = {t.dtype for column in (params, exp_avgs, exp_avg_sqs, teachers) for t in column}
    for i, p in enumerate(params if dtypes not in ({torch.float32}, {torch.float64}) else ()):
        rows = (exp_avgs[i], exp_avg_sqs[i], *((teachers[i],) if teachers else ()))
        if p.dtype not in (torch.float32, torch.float64) or any(t.dtype != p.dtype for t in rows):
            raise TypeError(
                f"params, exp_avgs, exp_avg_sqs and teachers must all be float32 (or all float64), because small "
                f"updates round away in bfloat16; at {i} they are {', '.join(str(t.dtype) for t in (p, *rows))}"
            )
    if len(steps) != len(params) or any(s.numel() != 1 or s.dtype != torch.float32 for s in steps):
        raise ValueError(f"steps must be {len(params)} float32 scalars, one for each parameter")
    _check_devices([*params, *grads, *exp_avgs, *exp_avg_sqs, *steps, *teachers, *param_copies, *teacher_copies])


def _check_scalars(n: int, lrs, weight_decays, momentum: float) -> None:
    if not 0.0 <= momentum <= 1.0:
        raise ValueError(f"momentum must lie in [0, 1]: the share of the old teacher that is kept; got {momentum}")
    if len(lrs) != n or len(weight_decays) != n:
        raise ValueError(f"{n} parameters need {n} lrs and weight_decays; got {len(lrs)} and {len(weight_decays)}")


def _check_multipliers(params: list[Tensor], multipliers: Tensor | None) -> None:
    if multipliers is None or not params:
        return
    if multipliers.shape != (len(params),):
        given = tuple(multipliers.shape)
        raise ValueError(f"multipliers must have shape ({len(params)},), one for each gradient; got {given}")
    if multipliers.device != params[0].device:
        raise ValueError(
            f"multipliers must be on the parameters' device, {params[0].device}; they are on {multipliers.device}"
        )


def _check_same(columns: dict[str, list[Tensor]]) -> None:
    """Lists by name, of which each must have the first one's length and shapes, and floating-point tensors."""
    (name, tensors), *rest = columns.items()
    shapes = [t.shape for t in tensors]
    floats = all(dtype.is_floating_point for dtype in {t.dtype for column in columns.values() for t in column})
    for other_name, others in rest:
        if len(tensors) != len(others):
            raise ValueError(
                f"{name} has {len(tensors)} tensors but {other_name} has {len(others)}; they must correspond one to one"
            )
        if floats and shapes == [t.shape for t in others]:
            continue
        for i, (t, other) in enumerate(zip(tensors, others, strict=True)):
            if t.shape != other.shape:
                raise ValueError(
                    f"{name}[{i}] has shape {tuple(t.shape)} but {other_name}[{i}] {tuple(other.shape)}; "
                    f"they must correspond one to one, in the same order"
                )
            if not (t.is_floating_point() and other.is_floating_point()):
                raise TypeError(
                    f"{name}[{i}] is {t.dtype} and {other_name}[{i}] {other.dtype}; only floating-point tensors can be "
                    f"averaged or optimized. Leave integer buffers out of the lists, or copy them"
                )


def _check_copies(name: str, copies: list[Tensor], tensors: list[Tensor]) -> None:
    if not copies:
        return
    if len(copies) != len(tensors):
        raise ValueError(f"{name} has {len(copies)} tensors for {len(tensors)}; give one for each, or none at all")
    for i, (c, t) in enumerate(zip(copies, tensors, strict=True)):
        if c.dtype != torch.bfloat16 or (c.shape != t.shape and c.numel() > 0):
            raise ValueError(
                f"{name}[{i}] must be bfloat16 of shape {tuple(t.shape)}, or have no elements to mean no copy; "
                f"got {c.dtype} of shape {tuple(c.shape)}"
            )


def _check_devices(tensors: list[Tensor]) -> None:
    devices = {t.device for t in tensors}
    if len(devices) > 1:
        raise ValueError(f"all tensors must be on one device; got {', '.join(sorted(map(str, devices)))}")


# ---- backends ----


def _kinds(*lists: Sequence[Tensor]) -> list[Tensor]:
    """One tensor of each dtype, for the choice of backend; the checks have found all on one device."""
    return list({t.dtype: t for tensors in lists for t in tensors}.values())


_EMA_UPDATE: dict[str, Callable[..., None]] = {
    "cuda": cuda.ema_update,
    "native": native.ema_update,
    "reference": ema_update_reference,
}
_GRAD_NORMS: dict[str, Callable[..., Tensor]] = {
    "cuda": cuda.grad_norms,
    "native": native.grad_norms,
    "reference": grad_norms_reference,
}
_ADAMW_EMA: dict[str, Callable[..., Any]] = {
    "cuda": cuda.adamw_ema,
    "native": native.adamw_ema,
    "reference": adamw_ema_reference,
}

register(
    "multi_tensor",
    Backend("cuda", cuda_unavailable_reason, cuda.unsupported_reason),
    Backend("native", native_unavailable_reason, native.unsupported_reason),
    Backend("reference"),
    example=lambda device: (torch.empty(384, dtype=torch.float32, device=device),),
)
