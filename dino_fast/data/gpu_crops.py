"""Batches that travel as uint8 and are cropped on a GPU.

A worker reads and decodes, packs the images of a batch into one buffer and draws their boxes; this process copies the
buffer and cuts the crops on a stream of its own, one batch ahead, while the step before it runs. With `encoded`,
ordinary JPEGs travel as files and nvJPEG decodes them on the GPU.
"""

from __future__ import annotations

import contextlib
import functools
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from dino_fast.augment import MultiCrop
from dino_fast.data.batch import Batch, PackedImages
from dino_fast.data.decode import ImageError, decode
from dino_fast.data.jpeg import decode_jpegs
from dino_fast.data.source import Source
from dino_fast.errors import UserError


def prefetch_crops(batches: Iterator[Batch], source: Source, crops: MultiCrop, device: torch.device) -> Iterator[Batch]:
    """The batches with their crops on `device`. What the next batch raises comes after the batch before it."""
    stream = CropStream(device)
    waiting: Batch | None = None
    while True:
        following, failure = None, None
        try:
            batch = next(batches, None)
            following = None if batch is None else stream.cut(batch, source, crops)
        except UserError as error:
            failure = error
        if waiting is not None:
            yield stream.hand_over(waiting)
        if failure is not None:
            raise failure
        if following is None:
            return
        waiting = following


class CropStream:
    """Where crops are cut: on a GPU a stream beside the one that trains, on a CPU (in the tests) nothing special."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def cut(self, batch: Batch, source: Source, crops: MultiCrop) -> Batch:
        """Queues the copy and the crops of a batch."""
        packed = batch.packed
        if packed is None:
            return batch
        on_stream: Any = contextlib.nullcontext() if self.stream is None else torch.cuda.stream(self.stream)
        with on_stream:
            images = unpack(packed, self.device, lambda i: source.name(int(batch.index[i])))
            made = crops.cut(images, packed.cuts)
        return replace(batch, global_crops=made[0], local_crops=made[1], packed=None)

    def hand_over(self, batch: Batch) -> Batch:
        """The batch, for the current stream, which waits for this one."""
        if self.stream is not None:
            current = torch.cuda.current_stream(self.device)
            current.wait_stream(self.stream)
            for crops in (batch.global_crops, batch.local_crops):
                crops.record_stream(current)
        return batch


def unpack(packed: PackedImages, device: torch.device, name: Any) -> list[Tensor]:
    """The images on `device`, uint8 [C, H, W]. Raises UserError with `name(i)` for a file that nobody can decode."""
    parts = packed.parts()
    files = [i for i, row in enumerate(packed.shapes.tolist()) if row[3]]
    if len(files) < len(parts):
        buffer = packed.buffer.to(device, non_blocking=True)
        images = replace(packed, buffer=buffer).parts()
    else:
        images = list(parts)
    channels = int(packed.shapes[0, 0])
    for i, image in zip(files, _decoded([parts[i] for i in files], channels, device), strict=True):
        if image is None or list(image.shape) != packed.shapes[i, :3].tolist():
            try:
                image = decode(parts[i].numpy().tobytes(), channels).to(device)
            except ImageError as error:
                raise UserError(f"{name(i)}: {error}. With --decode-on cpu such a file is skipped") from error
        images[i] = image
    return images


def _decoded(files: list[Tensor], channels: int, device: torch.device) -> Sequence[Tensor | None]:
    """uint8 [C, H, W] of each JPEG file by libjpeg-turbo, on a GPU by nvJPEG; all None where one of them is refused."""
    if not files:
        return []
    try:
        if device.type == "cuda":
            return _in_order(lambda: decode_jpegs(files, channels, device), files, device)
        return decode_jpegs(files, channels, device)
    except RuntimeError:
        return [None] * len(files)


# Files that nvJPEG may still read, each with the event after which it does not.
_reading: deque[tuple[torch.cuda.Event, list[Tensor]]] = deque()


@functools.cache
def _decode_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)


def _in_order(decode: Callable[[], Sequence[Tensor]], files: list[Tensor], device: torch.device) -> Sequence[Tensor]:
    """The images of `decode()`, ordered with the current stream by events; the host waits for nothing.

    torchvision's nvJPEG, unlike torchcodec's, works on a stream of its own, which the caller's stream waits for but
    which itself waits for none: it would write at once into memory that is free for the current stream but still read
    by work queued there. So images
    are allocated on a stream that has no other memory, and used on the current one by `record_stream`, after which
    the allocator hands their memory out again only when the current stream's work is done.
    """
    while _reading and _reading[0][0].query():
        _reading.popleft()
    current, stream = torch.cuda.current_stream(device), _decode_stream(device)
    with torch.cuda.stream(stream):
        images = decode()
    decoded = stream.record_event()
    _reading.append((decoded, files))
    current.wait_event(decoded)
    for image in images:
        image.record_stream(current)
    return images


def nvjpeg_unavailable_reason(device: torch.device) -> str | None:
    """Why JPEGs cannot be decoded on this device, or None."""
    import io

    from PIL import Image

    data = io.BytesIO()
    Image.new("RGB", (16, 16)).save(data, "JPEG")
    try:
        decode_jpegs([torch.frombuffer(bytearray(data.getvalue()), dtype=torch.uint8)], 3, device)
    except RuntimeError as error:
        return str(error).splitlines()[0]
    return None
