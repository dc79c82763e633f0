"""The loader, to a step that does nothing: JPEG files in a folder to batches of 2 x 224 + 8 x 96 crops.

Both sides are a torch DataLoader with the same number of worker processes and the same files, order and parameters of
every crop. The original's has its own pipeline on Pillow images and the default collation. Timed is the steady state:
what follows the first twelve batches of an epoch. The first batches are compared with the reference's crops. `note` has
images a second.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dino_fast.augment import MultiCrop
from dino_fast.cpus import usable_cpus
from dino_fast.data import Source, open_source, train_loader
from dino_fast.data.train_loader import _CROPS, epoch_order
from dino_fast.seeding import derive_seed

from .bench_multi_crop import Checked, Recipe, original, photographs, pillow_image
from .harness import Comparison, Contender, Row, run_all

BATCH, WARM, SEED = 16, 12, 0


class Pillow:
    """What an original's data set returns for an image: its ten crops; every number was drawn beforehand."""

    def __init__(self, source: Source, crops: MultiCrop) -> None:
        self.source = source
        params = crops.sample_each([derive_seed(SEED, _CROPS, 0, i) for i in range(len(source))])
        sizes = [(x.shape[1], x.shape[2]) for x in map(source.read, range(len(source)))]
        self.recipes = [
            [Recipe(crops, params, size, i, v) for v in range(crops.n_crops)] for i, size in enumerate(sizes)
        ]

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> list[Tensor]:
        image = pillow_image(self.source.data(index))
        return [original(image, recipe) for recipe in self.recipes[index]]


class Loading:
    """A contender whose `prepare` starts an epoch and whose call takes what follows the first batches."""

    def __init__(self, make: Any) -> None:
        self.make, self.batches = make, iter(())

    def prepare(self) -> None:
        for _ in self.batches:  # the workers of the epoch before end here
            pass
        self.batches = iter(self.make())
        self.first = next(self.batches)
        for _ in range(WARM - 1):
            next(self.batches)

    def __call__(self) -> Tensor:
        for _ in range(self.count):
            next(self.batches)
        return torch.ones(())

    count = 0


def comparison(folder: Path, batches: int, workers: int) -> Comparison:
    files, what = photographs((WARM + batches) * BATCH)
    for i, data in enumerate(files):
        (folder / f"{i:05d}.jpg").write_bytes(data)
    source, crops = open_source(folder), MultiCrop()
    order = epoch_order(len(source), SEED, 0)
    data = Pillow(source, crops)

    def theirs() -> Any:
        return torch.utils.data.DataLoader(
            data,  # type: ignore[arg-type]
            batch_size=BATCH,
            sampler=order.tolist(),
            num_workers=workers,
            multiprocessing_context="fork",
            worker_init_fn=_one_thread,
        )

    def ours() -> Any:
        return train_loader(source, crops, batch_size=BATCH, seed=SEED, workers=workers, epochs=1)

    fast, plain = Loading(ours), Loading(theirs)
    fast.count = plain.count = batches
    first = order[:BATCH].tolist()
    params = crops.sample_each([derive_seed(SEED, _CROPS, 0, i) for i in first])
    checked = Checked(crops, crops.apply([source.read(i) for i in first], params, backend="reference"))

    def our_first() -> tuple[Tensor, Tensor]:
        fast.prepare()
        return fast.first.global_crops, fast.first.local_crops

    def their_first() -> tuple[Tensor, Tensor]:
        plain.prepare()
        return torch.stack(plain.first[:2]), torch.stack(plain.first[2:])

    return Comparison(
        operation="loader",
        shape=f"{batches * BATCH} JPEG, {what}, to 2x224 + 8x96, {workers} workers",
        dtype="float32",
        reference=lambda: [torch.ones(()), torch.ones(())],
        contenders=[
            Contender("dino-fast", fast, ours=True, prepare=fast.prepare, check=checked(our_first, strict=True),
                      peak=lambda: None),
            Contender("DataLoader, original's Pillow pipeline", plain, baseline=True, prepare=plain.prepare,
                      check=checked(their_first, strict=True), peak=lambda: None),
        ],
        seconds=30.0,
    )  # fmt: skip


def _one_thread(worker: int) -> None:
    torch.set_num_threads(1)


def run(quick: bool = False, only: str = "") -> list[Row]:
    batches, workers = (4 if quick else 24), min(10, usable_cpus())
    with tempfile.TemporaryDirectory() as folder:
        rows = run_all(iter([comparison(Path(folder), batches, workers)]), quick=quick, only=only)
    for row in rows:
        if row.ms:
            speed = f"{1e3 * batches * BATCH / row.ms:,.0f} images/s"
            row.note = f"{row.note}; {speed}" if row.note else speed
    return rows


def comparisons(quick: bool = False) -> Iterator[Comparison]:
    """For the timing tests, whose files must outlive this call."""
    folder = tempfile.TemporaryDirectory()
    kept = comparison(Path(folder.name), 4, min(10, usable_cpus()))
    yield kept
    folder.cleanup()


def test_speed(benchmark, contender):
    contender.prepare()
    benchmark.pedantic(contender.call, setup=contender.prepare, rounds=3)
