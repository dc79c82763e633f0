"""Random crops of labeled images for training a classifier: area 8 to 100 %, a flip, nothing else.

Each crop is a function of (seed, epoch, image index), as all draws of the data side are.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence

import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import RandomResizedCrop

from dino_fast.augment import statistics
from dino_fast.data import ImageError, Source
from dino_fast.defaults import torch_defaults
from dino_fast.ops.multi_crop import from_pillow, to_pillow
from dino_fast.seeding import derive_seed

logger = logging.getLogger(__name__)
_CROP = 4  # the draw's purpose, part of its seed (0 to 2 are the loader's)


def random_crop(image: Tensor, size: tuple[int, int], seed: int) -> Tensor:
    """Random resized crop of uint8 `[C, H, W]` -> uint8 `[C, h, w]`, flipped half of the time.

    The crop is cut out first and then resized (bilinear with antialiasing), as `torchvision.transforms
    .RandomResizedCrop` does in the original's eval_linear.py: no pixel outside of the crop has an influence.
    """
    with torch_defaults(), torch.random.fork_rng(devices=[]):  # torchvision draws in the default dtype
        torch.manual_seed(seed)
        top, left, height, width = RandomResizedCrop.get_params(image, [0.08, 1.0], [3 / 4, 4 / 3])
        flip = bool(torch.rand((), dtype=torch.float32, device="cpu") < 0.5)
    inside = image[:, top : top + height, left : left + width]
    bilinear = Image.Resampling.BILINEAR
    crop = from_pillow([plane.resize((size[1], size[0]), bilinear) for plane in to_pillow(inside)])
    return crop.flip(-1) if flip else crop


def random_batches(
    source: Source,
    size: tuple[int, int],
    mean: Sequence[float],
    std: Sequence[float],
    batch_size: int,
    seed: int,
    epoch: int,
    indices: Sequence[int] | None = None,
) -> Iterator[tuple[Tensor, Tensor]]:
    """A random crop of every readable, labeled image (of `indices`), in order: float32 `[B, C, h, w]`, labels `[B]`.

    Unreadable images are left out with a log warning in epoch 0.
    """
    offset, scale = statistics(mean, std, source.channels)
    images: list[Tensor] = []
    labels: list[int] = []
    for index in range(len(source)) if indices is None else indices:
        label = source.label(index)
        if label is None:
            continue
        try:
            images.append(random_crop(source.read(index), size, derive_seed(seed, _CROP, epoch, index)))
        except ImageError as error:
            if epoch == 0:
                logger.warning("left out of the evaluation: %s", error)
            continue
        labels.append(label)
        if len(images) == batch_size:
            yield (
                torch.stack(images).float().div_(255).sub_(offset).div_(scale),
                torch.tensor(labels, dtype=torch.int64, device="cpu"),
            )
            images, labels = [], []
    if images:
        yield (
            torch.stack(images).float().div_(255).sub_(offset).div_(scale),
            torch.tensor(labels, dtype=torch.int64, device="cpu"),
        )
