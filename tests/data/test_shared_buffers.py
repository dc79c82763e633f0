"""The memory that workers use again: nothing that anyone still holds is written to."""

from __future__ import annotations

import random

import pytest
import torch

from dino_fast.augment import MultiCrop
from dino_fast.data import ArraySource, train_loader
from dino_fast.data.shared_buffers import SlotPool, WorkerBuffers

from . import soak
from .test_train_loader import images, load, same


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("held", [0, 1, 4, 1000])
def test_batches_that_are_held_stay_as_they_are(workers: int, held: int) -> None:
    """Among them views of which the batch itself is gone; more batches than slots, and more held than there are."""
    source, options = ArraySource(images(40)), {"batch_size": 2, "epochs": 3}
    whole, rng, kept = load(source=source, **options), random.Random(0), []
    for wanted, batch in zip(whole, load_lazily(source, workers=workers, **options), strict=True):
        assert same(wanted, batch)
        kept.append((wanted.local_crops[1], batch.local_crops[1]))  # a view: the batch may go
        del batch
        while len(kept) > held:
            kept.pop(rng.randrange(len(kept)))
        assert all(torch.equal(a, b) for a, b in kept)


def load_lazily(source: ArraySource, **options):
    crops = MultiCrop(global_size=16, local_size=8, n_local=2)
    return train_loader(source, crops, seed=3, **options)


def test_a_slot_is_used_again_once_its_batch_is_gone() -> None:
    """Two batches are alive at a time, so few places in memory are seen however many batches there are."""
    places = set()
    for batch in load_lazily(ArraySource(images(40)), batch_size=2, epochs=4, workers=1):
        assert batch.global_crops.is_shared() and batch.slot is not None
        places.add(batch.slot)
    assert 1 < len(places) <= 7


def test_slots_by_hand() -> None:
    slots = SlotPool(2, 2)
    first, other = WorkerBuffers(slots.free, 0), WorkerBuffers(slots.free, 1)
    a, b = first.acquire([(2, 3), (4,)]), first.acquire([(2, 3), (4,)])
    assert a[0] == (0, 0) and b[0] == (0, 1) and [x.shape for x in a[1]] == [(2, 3), (4,)]
    assert first.acquire([(1,)]) is None and other.acquire([(1,)])[0] == (1, 0)
    for (slot, crops), number in ((a, 1.0), (b, 2.0)):
        crops[0].fill_(number)
        slots.lend(slot, crops[0])
    slots.collect()
    assert first.acquire([(1,)]) is None  # both are still held
    assert torch.all(a[1][0] == 1) and torch.all(b[1][0] == 2) and not torch.all(a[1][1] == 1)
    slots.lend((1, 0), torch.empty(1))  # received as a copy in memory of its own
    assert other.acquire([(1,)])[0] == (1, 0)


def test_a_larger_batch_gets_larger_memory() -> None:
    slots = SlotPool(1, 1)
    worker = WorkerBuffers(slots.free, 0)
    small = worker.acquire([(2,)])[1][0]
    slots.free[0] = 1
    large = worker.acquire([(1000,)])[1][0]
    assert len(small) == 2 and len(large) == 1000
    slots.free[0] = 1
    assert worker.acquire([(3,)])[1][0].data_ptr() == large.data_ptr()


def test_memory_is_flat_over_many_images() -> None:
    """A short form of `python -m tests.data.soak 100000`, whose output is in benchmarks/results/loader_memory.txt."""
    rows = soak.soak(3200, MultiCrop(global_size=48, local_size=32), parts=8)
    assert rows[-1][0] >= 3200
    for column in (1, 2, 3):  # after the first parts, in which slots and caches are filled
        assert rows[-1][column] - rows[3][column] < 8, rows
