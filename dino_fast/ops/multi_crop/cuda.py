"""The CUDA backend of multi_crop: the batch's table goes to the device in one copy, six launches do the rest."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dino_fast.gpu import on_device, too_old
from dino_fast.ops.multi_crop.tables import tasks


def unsupported_reason(*images: Tensor) -> str | None:
    """Why the kernels cannot take these images, or None."""
    if any(image.dtype != torch.uint8 for image in images):
        return "the CUDA kernels take uint8 images; those of more bits are cropped by the reference"
    other = next((image.device for image in images if not image.is_cuda), None)
    return too_old(images[0].device) if other is None else f"the CUDA kernels take images on a GPU; one is on {other}"


def multi_crop(*arguments: Any) -> None:
    """Fills the crops; the arguments are those of `multi_crop_reference`, images and crops on one GPU.

    Queued on the current stream. Raises ValueError for a blurred crop with a side above 8192 pixels, or an order that
    has the contrast twice.
    """
    given = tasks(*arguments)
    crops = arguments[-2]
    with on_device(crops.device):
        table = _kernels().cuda_multi_crop_table(*given.arguments)
        memory = torch.empty(table.memory_bytes, dtype=torch.uint8, device=crops.device)
        pinned = torch.empty(table.table_bytes, dtype=torch.uint8, device="cpu", pin_memory=crops.is_cuda)
        table.write(pinned.data_ptr())
        memory[: len(pinned)].copy_(pinned, non_blocking=True)
        _kernels().cuda_multi_crop(table, memory.data_ptr(), _stream(crops))


# ---- the device; tests put the host in its place ----


def _kernels() -> Any:
    from dino_fast import _C

    return _C


def _stream(tensor: Tensor) -> int:
    return torch.cuda.current_stream(tensor.device).cuda_stream
