"""Tables of crops: as the operation takes them, and as its compiled backends do (csrc/bindings/multi_crop.cpp)."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import PIL
import torch
from torch import Tensor

# Since 13, Pillow resizes boxes that lose far more height than width along their columns first.
MAY_GO_DOWN_FIRST = int(PIL.__version__.split(".")[0]) >= 13


class CropTable(NamedTuple):
    """The crops of n images of known sizes, as the operation multi_crop takes them; CPU tensors."""

    boxes: Tensor  # [n, V, 4] int64: top, left, height, width
    switches: Tensor  # [n, V, 4] bool: flip, grey, blur, solarize
    order: Tensor  # [n, V, 4] int64: brightness 0, contrast 1, saturation 2, hue 3; -1 for none
    factors: Tensor  # [n, V, 4] float32
    radius: Tensor  # [n, V] float32


def planar(image: Tensor) -> Tensor:
    """The image, contiguous. Decoders write pixel by pixel, of which PyTorch's strided copy makes planes slowly."""
    channels, height, width = image.shape
    if image.is_contiguous() or image.is_cuda or channels != 3 or image.stride() != (1, 3 * width, 3):
        return image.contiguous()
    from dino_fast import _C

    planes = torch.empty((3, height, width), dtype=torch.uint8, device="cpu")
    _C.multi_crop_planes(image.data_ptr(), planes.data_ptr(), height * width)
    return planes


class Tasks(NamedTuple):
    """The arguments of a compiled backend; `keep` holds the tensors whose addresses are among them."""

    arguments: tuple[Any, ...]
    keep: tuple[Any, ...]


def tasks(
    images: list[Tensor],
    boxes: Tensor,
    switches: Tensor,
    order: Tensor,
    factors: Tensor,
    radius: Tensor,
    mean: Tensor,
    std: Tensor,
    global_crops: Tensor,
    local_crops: Tensor,
) -> Tasks:
    """Tables of V n crops, see csrc/bindings/multi_crop.cpp."""
    images = [planar(image) for image in images]
    mean, std = mean.float().contiguous(), std.float().contiguous()
    (n, V), (C, T) = boxes.shape[:2], (images[0].shape[0], len(global_crops))
    source = np.array([(image.data_ptr(), image.shape[1], image.shape[2]) for image in images], dtype=np.int64)
    table = np.empty((V, n, 18), dtype=np.int64)  # crop-major: the large crops come first and balance the threads
    table[..., 0:3] = source
    table[..., 3:7] = boxes.numpy().swapaxes(0, 1)
    for crops, views in ((global_crops, slice(0, T)), (local_crops, slice(T, V))):
        table[views, :, 7:9] = crops.shape[3:]
        rows = np.arange(crops.shape[0] * n, dtype=np.int64).reshape(-1, n)
        table[views, :, 9] = crops.data_ptr() + rows * (C * crops.shape[3] * crops.shape[4] * crops.element_size())
    table[..., 10:14] = switches.numpy().swapaxes(0, 1)
    table[..., 14:18] = order.numpy().swapaxes(0, 1)
    numbers = np.empty((V, n, 5), dtype=np.float32)
    numbers[..., :4] = factors.numpy().swapaxes(0, 1)
    numbers[..., 4] = radius.numpy().T
    half = global_crops.dtype == torch.bfloat16
    arguments = (V * n, table, numbers, C, half, MAY_GO_DOWN_FIRST, mean.data_ptr(), std.data_ptr())
    return Tasks(arguments, (images, mean, std))
