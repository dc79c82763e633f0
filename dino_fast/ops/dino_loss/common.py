"""What the backends of dino_loss share."""

from __future__ import annotations

import torch
from torch import Tensor

TEACHER_CROPS = 2
KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)  # in the order of csrc/cpu/dino_loss.h's LogitType


def pair_weights(V: int) -> list[float]:
    """[2 x V], row by row: 1 for a pair that counts, 0 for a crop with itself."""
    return [float(u != v) for u in range(TEACHER_CROPS) for v in range(V)]


def contiguous_rows(*logits: Tensor) -> list[Tensor]:
    """The same tensors, copied only where the elements of a row do not lie side by side."""
    return [x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous() for x in logits]
