"""Shared memory in which workers put their crops, used again and again: fresh pages cost half as much as the crops.

A worker takes a free slot, the one that it used last where it can, so that few of them stay in the cache; the training
process notices when nothing refers to a batch's crops any more and gives the slot back. A worker without a free slot
leaves the crops to PyTorch, which makes shared memory for that batch alone.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

Slot = tuple[int, int]  # worker, and which of its slots


class SlotPool:
    """The training process's side; made before the workers are forked. `free` is shared with them."""

    def __init__(self, workers: int, count: int) -> None:
        self.free = torch.ones(workers, count, dtype=torch.uint8, device="cpu").share_memory_()
        self._lent: list[tuple[StorageWeakRef, Slot]] = []

    def lend(self, slot: Slot, crops: Tensor) -> None:
        """Notes that a batch in a slot was received; a copy of it (in pinned memory) gives the slot back at once."""
        if crops.is_shared():
            self._lent.append((StorageWeakRef(crops.untyped_storage()), slot))
        else:
            self.free[slot] = 1

    def collect(self) -> None:
        """Gives back the slots of batches that are gone."""
        kept = []
        for crops, slot in self._lent:
            if crops.expired():
                self.free[slot] = 1
            else:
                kept.append((crops, slot))
        self._lent = kept


class WorkerBuffers:
    """A worker's side."""

    def __init__(self, free: Tensor, worker: int) -> None:
        self._free, self._worker = free[worker], worker
        self._memory: list[Tensor | None] = [None] * len(self._free)
        self._recent = list(range(len(self._free)))  # the last used one first

    def acquire(self, shapes: Sequence[Sequence[int]]) -> tuple[Slot, list[Tensor]] | None:
        """A free slot and float32 tensors of these shapes in it; None where all are taken."""
        for slot in self._recent:
            if self._free[slot]:
                break
        else:
            return None
        self._free[slot] = 0
        self._recent.remove(slot)
        self._recent.insert(0, slot)
        sizes = [math.prod(shape) for shape in shapes]
        memory = self._memory[slot]
        if memory is None or len(memory) < sum(sizes):
            memory = self._memory[slot] = torch.empty(sum(sizes), dtype=torch.float32, device="cpu").share_memory_()
        parts = memory[: sum(sizes)].split(sizes)
        return (self._worker, slot), [part.view(*shape) for part, shape in zip(parts, shapes, strict=True)]
