"""Constants and types that the backends of dino_loss share."""

from __future__ import annotations

import torch
from torch import Tensor

# loss, teacher_mean, teacher_entropy, gradient, row_statistics, kept_center: see dino_fast/ops/dino_loss/__init__.py.
Outputs = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]

TEACHER_CROPS = 2
KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)  # in the order of csrc/cpu/dino_loss.h's LogitType


def pair_weights(V: int) -> list[float]:
    """The matrix [2, V] of pair weights, flattened row by row: 1 for two different crops, 0 for a crop with itself."""
    return [float(u != v) for u in range(TEACHER_CROPS) for v in range(V)]
