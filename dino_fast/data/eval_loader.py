"""Batches of whole images for an evaluation, in order."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import torch
from PIL import Image
from torch import Tensor

from dino_fast.augment import IMAGENET_MEAN, IMAGENET_STD, Size, pair, statistics
from dino_fast.cpus import usable_cpus
from dino_fast.data.decode import ImageError
from dino_fast.data.source import Source
from dino_fast.errors import UserError
from dino_fast.ops.multi_crop import from_pillow, to_pillow

logger = logging.getLogger(__name__)
_READERS = 16  # threads, at most, that read: decoding releases Python's lock
_GROUP = 16  # images that one of them reads at a time


def eval_batches(
    source: Source,
    size: Size,
    mean: Sequence[float] = IMAGENET_MEAN,
    std: Sequence[float] = IMAGENET_STD,
    batch_size: int = 256,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Every readable image once, in order: (float32 [B, C, h, w], int64 labels [B], -1 where there is none).

    An image of just `size` is taken as it is; another one is scaled (bicubic) until its tighter side is 256/224 of
    `size` and cropped at the center, as the original evaluates. Unreadable images are left out with a log warning;
    UserError when all are.
    """
    offset, scale = statistics(mean, std, source.channels)
    images: list[Tensor] = []
    labels: list[int] = []
    found = False
    for index, image in enumerate(centered_images(source, pair(size))):
        if isinstance(image, ImageError):
            logger.warning("left out of the evaluation: %s", image)
        else:
            found = True
            images.append(image)
            label = source.label(index)
            labels.append(-1 if label is None else label)
        if images and (len(images) == batch_size or index == len(source) - 1):
            yield (
                torch.stack(images).float().div_(255).sub_(offset).div_(scale),
                torch.tensor(labels, dtype=torch.int64, device="cpu"),
            )
            images, labels = [], []
    if not found:
        raise UserError(f"none of the {len(source)} images can be read; 'dino-fast data check' says why")


def centered_images(source: Source, size: tuple[int, int], start: int = 0) -> Iterator[Tensor | ImageError]:
    """`center_crop` of every image from `start` on, in order, or why it cannot be read.

    Threads work two groups of images each ahead.
    """
    first = start

    def read(start: int) -> list[Tensor | ImageError]:
        found: list[Tensor | ImageError] = []
        for index in range(start, min(start + _GROUP, len(source))):
            try:
                found.append(center_crop(source.read(index), size))
            except ImageError as error:
                found.append(error)
        return found

    source.prepare()  # imports what decodes in one thread
    threads = min(_READERS, usable_cpus())
    ahead: deque[Future[list[Tensor | ImageError]]] = deque()
    with ThreadPoolExecutor(threads) as pool:
        for start in range(first, len(source), _GROUP):
            ahead.append(pool.submit(read, start))
            if len(ahead) > 2 * threads:
                yield from ahead.popleft().result()
        for group in ahead:
            yield from group.result()


def center_crop(image: Tensor, size: tuple[int, int]) -> Tensor:
    """uint8 [C, H, W] -> uint8 [C, h, w]; see `eval_batches`."""
    height, width = image.shape[1:]
    if (height, width) == size:
        return image
    if size[0] * width >= size[1] * height:  # the height is the tighter side
        h = round(size[0] * 256 / 224)
        w = max(size[1], h * width // height)
    else:
        w = round(size[1] * 256 / 224)
        h = max(size[0], w * height // width)
    top, left = round((h - size[0]) / 2), round((w - size[1]) / 2)
    box = (left, top, left + size[1], top + size[0])
    return from_pillow([p.resize((w, h), Image.Resampling.BICUBIC).crop(box) for p in to_pillow(image)])
