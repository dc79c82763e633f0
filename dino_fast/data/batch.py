"""One batch of crops, and the images of a batch packed for a GPU that will crop them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from dino_fast.augment import Cuts
from dino_fast.data.decode import Jpeg
from dino_fast.data.shared_buffers import Slot


@dataclass
class PackedImages:
    """Images of different sizes, or JPEG files, one after the other in one buffer, and where to cut them."""

    buffer: Tensor  # uint8 [bytes]
    shapes: Tensor  # int64 [n, 4]: C, H, W and the bytes of the file, 0 where there are pixels
    cuts: Cuts

    def parts(self) -> list[Tensor]:
        """Views of the buffer: uint8 [C, H, W], or [bytes] of a file."""
        at, parts = 0, []
        for channels, height, width, size in self.shapes.tolist():
            end = at + (size or channels * height * width)
            part = self.buffer[at:end]
            parts.append(part if size else part.view(channels, height, width))
            at = end
        return parts

    def pin_memory(self) -> PackedImages:
        """A copy in pinned memory, from which copies to a GPU do not block."""
        return replace(self, buffer=self.buffer.pin_memory())


@dataclass
class Batch:
    """This process's part of one global batch."""

    global_crops: Tensor  # [2, B, C, h, w] float32
    local_crops: Tensor  # [n_local, B, C, h, w] float32
    index: Tensor  # [B] int64, the images used (replacements where one could not be read)
    epoch: int
    batch: int  # position in the epoch; (epoch, batch + 1) is where to start after it
    bad: list[tuple[int, str]] = field(default_factory=list)  # (index, reason) of images that could not be read
    failure: str = ""  # set when not even replacements could be read
    packed: PackedImages | None = None  # the images, between a worker and the GPU that makes the crops
    slot: Slot | None = None  # of a worker's memory that the crops are in

    def pin_memory(self) -> Batch:
        """For the loader: a copy from which a GPU can fetch by itself."""
        if self.packed is not None:
            return replace(self, packed=self.packed.pin_memory())
        return replace(self, global_crops=self.global_crops.pin_memory(), local_crops=self.local_crops.pin_memory())


def pack(images: Sequence[Tensor | Jpeg], cuts: Cuts, channels: int) -> PackedImages:
    """Copies the images, uint8 [C, H, W], or the files behind each other."""
    shapes = [
        (channels, image.height, image.width, len(image.data)) if isinstance(image, Jpeg) else (*image.shape, 0)
        for image in images
    ]
    rows = [
        torch.frombuffer(bytearray(image.data), dtype=torch.uint8) if isinstance(image, Jpeg) else image.reshape(-1)
        for image in images
    ]
    return PackedImages(torch.cat(rows), torch.tensor(shapes, dtype=torch.int64, device="cpu"), cuts)
