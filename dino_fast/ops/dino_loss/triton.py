"""The Triton backend of dino_loss: kernels/dino_loss.py."""

from __future__ import annotations

import os

import torch
from torch import Tensor

from dino_fast import gpu
from dino_fast.ops.dino_loss.common import KERNEL_DTYPES
from dino_fast.ops.layout import contiguous_rows


def unsupported_reason(student: Tensor | None = None, *others: Tensor) -> str | None:
    """Why the kernels cannot take these logits, or None."""
    for tensor in (student, *others):
        if tensor is None:
            continue
        if tensor.device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
            return f"it runs on CUDA (on the CPU under TRITON_INTERPRET=1), the logits are on {tensor.device}"
        if tensor.dtype not in KERNEL_DTYPES:
            return f"it takes float32, bfloat16 and float16 logits, not {tensor.dtype}"
    return None if student is None else gpu.too_old(student.device)


def forward(student, teacher, center, student_temp, teacher_temp, outputs):
    from dino_fast.kernels import dino_loss as kernels

    *_, grad, row_statistics, kept_center = outputs
    student, teacher = contiguous_rows(student), contiguous_rows(teacher)
    center = center.to(torch.float32).contiguous()
    loss, entropy = kernels.statistics(student, teacher, center, student_temp, teacher_temp, row_statistics)
    if grad.numel() > 0:
        one = torch.ones((), dtype=torch.float32, device=student.device)
        mean = kernels.gradient(student, teacher, center, row_statistics, one, grad, student_temp, teacher_temp)
    else:
        mean = kernels.mean(student, teacher, center, row_statistics)
    return loss, mean, entropy, grad, row_statistics, kept_center


def gradient(student, teacher, center, row_statistics, upstream, student_temp, teacher_temp):
    from dino_fast.kernels import dino_loss as kernels

    grad = student.new_empty(student.shape)
    student, teacher = contiguous_rows(student), contiguous_rows(teacher)
    center = center.to(torch.float32).contiguous()
    statistics = row_statistics.contiguous()
    kernels.gradient(student, teacher, center, statistics, upstream, grad, student_temp, teacher_temp)
    return grad
