"""The native backend of dino_loss: csrc/cpu/dino_loss.cpp on the logits as they lie."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dino_fast.ops.dino_loss.common import KERNEL_DTYPES, Outputs, pair_weights
from dino_fast.ops.layout import contiguous_rows


def unsupported_reason(student: Tensor | None = None, *others: Tensor) -> str | None:
    """Why the kernels cannot take these logits, or None."""
    for tensor in (student, *others):
        if tensor is None:
            continue
        if tensor.device.type != "cpu":
            return f"it runs on the CPU, the logits are on {tensor.device}"
        if tensor.dtype not in KERNEL_DTYPES:
            return f"it takes float32, bfloat16 and float16 logits, not {tensor.dtype}"
    return None


def forward(
    student: Tensor, teacher: Tensor, center: Tensor, student_temp: float, teacher_temp: float, outputs: Outputs
) -> Outputs:
    """Fills the operator's outputs, the gradient [V, B, K] only if it has elements; it may be the student's logits."""
    from dino_fast import _C

    problem, _alive = _problem(student, teacher, center, student_temp, teacher_temp)
    addresses = [output.data_ptr() for output in outputs]  # of an empty tensor: 0, "no gradient wanted"
    loss, mean, entropy, gradient, row_statistics, _ = addresses
    _C.dino_loss_forward(*problem, loss, mean, entropy, row_statistics, gradient)
    return outputs


def gradient(
    student: Tensor,
    teacher: Tensor,
    center: Tensor,
    row_statistics: Tensor,
    upstream: Tensor,
    student_temp: float,
    teacher_temp: float,
) -> Tensor:
    """The gradient w.r.t. the student's logits [V, B, K], in their dtype, times `upstream`, one number."""
    from dino_fast import _C

    grad = torch.empty(student.shape, dtype=student.dtype, device="cpu")
    problem, _alive = _problem(student, teacher, center, student_temp, teacher_temp)
    statistics = row_statistics.contiguous()
    _C.dino_loss_gradient(*problem, statistics.data_ptr(), upstream.item(), grad.data_ptr())
    return grad


def _problem(
    student: Tensor, teacher: Tensor, center: Tensor, student_temp: float, teacher_temp: float
) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    """The arguments that describe a problem to the native code, and the tensors that must outlive the call."""
    rows = contiguous_rows(student), contiguous_rows(teacher)
    if center.dtype != torch.float32 or center.stride(0) != 1:
        center = center.to(torch.float32).contiguous()
    logits = [(x.data_ptr(), KERNEL_DTYPES.index(x.dtype), x.stride(0), x.stride(1)) for x in rows]
    V, B, K = student.shape
    temps = (student_temp, teacher_temp)
    problem = (*logits, center.data_ptr(), pair_weights(V), (V, B, K), temps, torch.get_num_threads())
    return problem, (rows, center)
