"""The Triton backend of linear_dino_loss: kernels/linear_dino_loss.py."""

from __future__ import annotations

import os

import torch
from torch import Tensor

from dino_fast import gpu
from dino_fast.ops.linear_dino_loss.common import ForwardOutputs

KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def unsupported_reason(*tensors: Tensor) -> str | None:
    """Why the kernels cannot take this student, weight, teacher and weight, or None."""
    student, _, teacher, _ = tensors
    for tensor in tensors:
        if tensor.device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
            return f"it runs on CUDA (on the CPU under TRITON_INTERPRET=1), the inputs are on {tensor.device}"
        if tensor.dtype not in KERNEL_DTYPES:
            return f"it takes float32, bfloat16 and float16, not {tensor.dtype}"
        if sum((size - 1) * abs(stride) for size, stride in zip(tensor.shape, tensor.stride(), strict=True)) >= 2**31:
            return "it counts elements in 32 bits, and one of the inputs spans 2^31 or more"
    if max(len(student), len(teacher)) > 16:
        return f"it takes at most 16 crops of an image, not {max(len(student), len(teacher))}"
    rows, D = torch.promote_types(student.dtype, teacher.dtype), student.shape[-1]
    widest = 256 if rows == torch.float32 else 512
    if widest < D:
        return f"it takes {str(rows).removeprefix('torch.')} rows of at most {widest} elements, not {D}"
    return gpu.too_old(student.device)


def forward(
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
    """The forward pass: see `ForwardOutputs`. Statistics and products are float32."""
    from dino_fast.kernels import linear_dino_loss as kernels

    T = len(teacher)
    rows = _rows_of_one_dtype(student, teacher)
    student_layer = kernels.Layer(student_weight, student_gain)
    teacher_layer = kernels.Layer(teacher_weight, teacher_gain, teacher.to(torch.float32).mean(dim=(0, 1)))
    statistics, pairs, read = kernels.attend(
        rows[0], student_layer, rows[1], teacher_layer, center.to(torch.float32).contiguous(), student_temp,
        teacher_temp, wanted=differentiable,
    )  # fmt: skip
    if not differentiable or pair_weights is None:
        return statistics, pairs, read, teacher_layer.logits
    A, wide = pair_weights.double(), read.double()
    difference = A.sum(0)[:, None, None] * wide[T:] - torch.einsum("uv,ubd->vbd", A, wide[:T])
    return statistics, pairs, difference, teacher_layer.logits


def weight_gradient(
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
    """The gradients w.r.t. weight [K, D] and gain [K] (without one: empty), in their dtypes: see the operator."""
    from dino_fast.kernels import linear_dino_loss as kernels

    rows = _rows_of_one_dtype(student, teacher)
    layers = (kernels.Layer(student_weight, student_gain), kernels.Layer(teacher_weight, teacher_gain))
    gradient, grad_gain = kernels.weight_gradient(
        rows[0], layers[0], rows[1], layers[1], center.to(torch.float32).contiguous(), row_statistics, factors,
        pair_factors, student_temp, teacher_temp,
    )  # fmt: skip
    return gradient, student_weight.new_empty(0) if student_gain is None else grad_gain.to(student_gain.dtype)


def _rows_of_one_dtype(student: Tensor, teacher: Tensor) -> list[Tensor]:
    """The same, contiguous, both of the wider dtype."""
    dtype = torch.promote_types(student.dtype, teacher.dtype)
    return [x.detach().to(dtype).contiguous() for x in (student, teacher)]
