"""What the backends of dino_loss share."""

from __future__ import annotations

import torch

TEACHER_CROPS = 2
KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)  # in the order of csrc/cpu/dino_loss.h's LogitType


def pair_weights(V: int) -> list[float]:
    """[2 x V], row by row: 1 for a pair that counts, 0 for a crop with itself."""
    return [float(u != v) for u in range(TEACHER_CROPS) for v in range(V)]
