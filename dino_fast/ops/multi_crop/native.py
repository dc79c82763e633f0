"""The native backend of multi_crop: csrc/cpu/multi_crop.cpp over a table of crops."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dino_fast.ops.multi_crop.tables import tasks


def unsupported_reason(*images: Tensor) -> str | None:
    """Why the kernels cannot take these images, or None."""
    if any(image.dtype != torch.uint8 for image in images):
        return "the native code takes uint8 images; those of more bits are cropped by the reference"
    other = next((image.device for image in images if image.device.type != "cpu"), None)
    return None if other is None else f"the native code takes images on the CPU; one is on {other}"


def multi_crop(*arguments: Any) -> None:
    """Fills the crops; the arguments are those of `multi_crop_reference`, all on the CPU."""
    from dino_fast import _C

    given = tasks(*arguments)
    _C.multi_crop(*given.arguments, torch.get_num_threads())
