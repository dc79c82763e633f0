"""Batches of crops for training.

Every crop is a function of (seed, epoch, sample index); the order of the images is a function of (seed, epoch). So a
run continues exactly from (epoch, batch index), whatever the number of workers, and the global batch is the same for
any number of processes.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import cast

import torch
from torch import Tensor

from dino_fast.augment import GLOBALS, MultiCrop, pair
from dino_fast.data.batch import Batch, pack
from dino_fast.data.decode import ImageError, Jpeg, decode
from dino_fast.data.gpu_crops import prefetch_crops
from dino_fast.data.shared_buffers import Slot, SlotPool, WorkerBuffers
from dino_fast.data.source import Source
from dino_fast.data.workers import (
    ForkContext,
    explained_shortages,
    init_worker,
    next_batch,
    start_workers,
    stop_workers,
)
from dino_fast.errors import UserError
from dino_fast.seeding import derive_seed

logger = logging.getLogger(__name__)
_REPLACEMENTS = 32  # images tried in place of an unreadable one; all failing means that the source is gone
_PREFETCH = 4  # batches that a worker may be ahead
_ORDER, _CROPS, _REPLACE = range(3)  # what a random draw is for, so that no two uses share a seed


def train_loader(
    source: Source,
    crops: MultiCrop,
    *,
    batch_size: int,
    seed: int,
    workers: int = 0,
    start: tuple[int, int] = (0, 0),
    epochs: int | None = None,
    rank: int = 0,
    world: int = 1,
    max_bad: float = 0.05,
    on_bad: Callable[[str], None] | None = None,
    pin_memory: bool = False,
    gpu: torch.device | None = None,
    encoded: bool = False,
) -> TrainLoader:
    """Batches of crops from `start` (epoch, batch index) to the end of epoch `epochs` - 1, or for ever when it is None.

    `batch_size` counts the images of all `world` processes; incomplete batches at the end of an epoch are left out. An
    image that cannot be read is replaced by another one, `on_bad` gets a line about it (default: a log warning), and
    more than `max_bad` of all images failing raises UserError, as do sizes that do not fit together.

    With `gpu` the crops are made there (the same bits, on a stream beside the current one, a batch ahead), and workers
    only decode; with `encoded` they hand ordinary JPEGs on for that GPU to decode.
    """
    return TrainLoader(
        source, crops, batch_size, seed, workers, start, epochs, rank, world, max_bad, on_bad, pin_memory, gpu, encoded
    )


@dataclass
class TrainLoader:
    """See `train_loader`. Iterate over it once; `bad` then holds the images that could not be read."""

    source: Source
    crops: MultiCrop
    batch_size: int
    seed: int
    workers: int
    start: tuple[int, int]
    epochs: int | None
    rank: int
    world: int
    max_bad: float
    on_bad: Callable[[str], None] | None
    pin_memory: bool
    gpu: torch.device | None = None
    encoded: bool = False
    bad: dict[int, str] = field(default_factory=dict)
    _running: Iterator[Batch] | None = field(default=None, init=False, repr=False)

    def __post_init__(self) -> None:
        if self.batch_size < 1 or self.batch_size % self.world:
            raise UserError(
                f"batch size {self.batch_size} does not divide among {self.world} processes; "
                f"give a positive multiple of {self.world}"
            )
        if self.batch_size > len(self.source):
            raise UserError(
                f"batch size {self.batch_size} is larger than the data set ({len(self.source)} images); "
                f"give at most {len(self.source)}, or more images"
            )
        if self.workers < 0:
            raise UserError(f"workers is {self.workers}; give 0 to load in the training process, or more")

    @property
    def batches_per_epoch(self) -> int:
        """Whole global batches in a pass over the images; the rest of a pass is left out."""
        return len(self.source) // self.batch_size

    def __iter__(self) -> Iterator[Batch]:
        from torch.utils.data import DataLoader

        self.source.prepare()
        with explained_shortages():
            slots = SlotPool(self.workers, _PREFETCH + 3)  # what a worker may be ahead, and a step and its successor
            loader: DataLoader[Batch] = DataLoader(
                CropDataset(self.source, self.crops, self.seed, self.gpu is not None, self.encoded, slots.free),  # type: ignore[arg-type]
                batch_size=None,  # a request is a batch: what a worker makes does not depend on how many there are
                sampler=BatchSampler(self),
                num_workers=self.workers,
                worker_init_fn=init_worker,
                multiprocessing_context=ForkContext() if self.workers else None,
                prefetch_factor=_PREFETCH if self.workers else None,
                pin_memory=self.pin_memory,
            )
            self._running = start_workers(loader, self.workers)
        batches = self._received(self._running, slots)
        try:
            yield from batches if self.gpu is None else prefetch_crops(batches, self.source, self.crops, self.gpu)
        finally:
            self.close()

    def close(self) -> None:
        """Ends the workers, as the end of the iteration does.

        Call it where an exception may leave a loop over the batches: its traceback would keep the workers alive.
        """
        stop_workers(self._running)
        self._running = None

    def _received(self, batches: Iterator[Batch], slots: SlotPool) -> Iterator[Batch]:
        while (batch := next_batch(batches)) is not None:
            self._note(batch)
            if batch.slot is not None:
                slots.lend(batch.slot, batch.global_crops)
            yield batch
            del batch
            slots.collect()

    def _note(self, batch: Batch) -> None:
        """Reports the unreadable images of a batch, and gives up past the stated share."""
        say = self.on_bad or logger.warning
        for index, reason in batch.bad:
            if index not in self.bad:
                self.bad[index] = reason
                say(f"skipped an unreadable image ({len(self.bad)} so far): {reason}")
        if batch.failure:
            raise UserError(batch.failure)
        if len(self.bad) > self.max_bad * len(self.source) / self.world:  # each process sees its share of the images
            raise UserError(
                f"{len(self.bad)} of {len(self.source)} images cannot be read, more than the {self.max_bad:.1%} "
                f"accepted. The last: {next(reversed(self.bad.values()))}. 'dino-fast data check' lists them all"
            )


class BatchSampler:
    """The positions of a run and the images of each: yields (epoch, batch, indices of this process's part)."""

    def __init__(self, loader: TrainLoader) -> None:
        self.loader = loader

    def __iter__(self) -> Iterator[tuple[int, int, list[int]]]:
        run = self.loader
        epoch, batch = run.start
        part = run.batch_size // run.world
        while run.epochs is None or epoch < run.epochs:
            order = epoch_order(len(run.source), run.seed, epoch)
            while batch < run.batches_per_epoch:
                first = batch * run.batch_size + run.rank * part
                yield epoch, batch, order[first : first + part].tolist()
                batch += 1
            epoch, batch = epoch + 1, 0


class CropDataset:
    """What runs in a worker: reads the images of one request and cuts their crops, or packs them for a GPU."""

    def __init__(self, source: Source, crops: MultiCrop, seed: int, packed: bool, encoded: bool, free: Tensor) -> None:
        self.source, self.crops, self.seed, self.packed = source, crops, seed, packed
        self.free, self.slots = free, cast("WorkerBuffers | None", None)
        self.get: Callable[[int], Tensor | Jpeg] = source.jpeg_or_pixels if encoded else source.read

    def __getitem__(self, request: tuple[int, int, list[int]]) -> Batch:
        epoch, number, wanted = request
        bad: list[tuple[int, str]] = []
        read = [self._read(index, epoch, bad) for index in wanted]
        images = [image for image, _ in read if image is not None]
        if len(images) < len(read):
            failure = (
                f"{_REPLACEMENTS + 1} images in a row cannot be read; is the disk still there? The last: {bad[-1][1]}"
            )
            nothing = torch.empty(0, dtype=torch.float32, device="cpu")
            return Batch(nothing, nothing, torch.empty(0, dtype=torch.int64, device="cpu"), epoch, number, bad, failure)
        params = self.crops.sample_each([derive_seed(self.seed, _CROPS, epoch, index) for index in wanted])
        index = torch.tensor([index for _, index in read], dtype=torch.int64, device="cpu")
        sizes = [(i.height, i.width) if isinstance(i, Jpeg) else (i.shape[1], i.shape[2]) for i in images]
        cuts = self.crops.cuts(params, sizes)
        deep = any(isinstance(image, Tensor) and image.is_floating_point() for image in images)
        if self.packed and not deep:
            nothing, packed = (
                torch.empty(0, dtype=torch.float32, device="cpu"),
                pack(images, cuts, self.source.channels),
            )
            return Batch(nothing, nothing, index, epoch, number, bad, packed=packed)
        # Images of more than 8 bits are cropped here, even where the GPU crops: its kernels take 8 bits.
        channels = self.source.channels
        pixels = [decode(image.data, channels) if isinstance(image, Jpeg) else image for image in images]
        slot, room = self._room(len(images))
        return Batch(*self.crops.cut(pixels, cuts, out=room), index, epoch, number, bad, slot=slot)

    def _room(self, n: int) -> tuple[Slot | None, tuple[Tensor, Tensor] | None]:
        """Where a worker puts the crops of n images."""
        worker = torch.utils.data.get_worker_info()
        if worker is None:
            return None, None
        self.slots = self.slots or WorkerBuffers(self.free, worker.id)
        sizes = ((GLOBALS, pair(self.crops.global_size)), (self.crops.n_local, pair(self.crops.local_size)))
        taken = self.slots.acquire([(views, n, self.source.channels, *size) for views, size in sizes])
        return (None, None) if taken is None else (taken[0], (taken[1][0], taken[1][1]))

    def _read(self, index: int, epoch: int, bad: list[tuple[int, str]]) -> tuple[Tensor | Jpeg | None, int]:
        """The image and its index, or those of a stand-in that is a function of (seed, epoch, index)."""
        used = index
        for attempt in range(_REPLACEMENTS + 1):
            try:
                return self.get(used), used
            except ImageError as error:
                bad.append((used, str(error)))
            used = derive_seed(self.seed, _REPLACE, epoch, index, attempt) % len(self.source)
        return None, index


def epoch_order(n: int, seed: int, epoch: int) -> Tensor:
    """The permutation [n] int64 of an epoch."""
    return torch.randperm(
        n, generator=torch.Generator().manual_seed(derive_seed(seed, _ORDER, epoch)), dtype=torch.int64, device="cpu"
    )
