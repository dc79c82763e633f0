"""The order, the crops and the failures of the training loader."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from dino_fast.augment import MultiCrop
from dino_fast.data import ArraySource, train_loader
from dino_fast.data.decode import ImageError
from dino_fast.data.train_loader import epoch_order
from dino_fast.errors import UserError

CROPS = MultiCrop(global_size=16, local_size=8, n_local=2)


class Broken(ArraySource):
    """Images in memory of which some cannot be read."""

    def __init__(self, images: torch.Tensor, bad: set[int]) -> None:
        super().__init__(images)
        self.missing = bad

    def read(self, index: int) -> torch.Tensor:
        if index in self.missing:
            raise ImageError(f"{self.name(index)}: gone")
        return super().read(index)


def images(n: int, channels: int = 1) -> torch.Tensor:
    return torch.randint(0, 256, (n, channels, 20, 24), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def load(n: int = 20, source: ArraySource | None = None, **options) -> list:
    options = {"batch_size": 6, "seed": 3, "epochs": 2} | options
    return list(train_loader(source or ArraySource(images(n)), CROPS, **options))


def same(a, b) -> bool:
    return all(
        torch.equal(getattr(a, name), getattr(b, name)) for name in ("global_crops", "local_crops", "index")
    ) and (a.epoch, a.batch) == (b.epoch, b.batch)


def test_epochs_are_permutations_without_the_rest() -> None:
    batches = load()
    assert [(b.epoch, b.batch) for b in batches] == [(e, b) for e in range(2) for b in range(3)]
    for epoch in range(2):
        used = torch.cat([b.index for b in batches if b.epoch == epoch])
        assert torch.equal(used, epoch_order(20, 3, epoch)[:18])
    assert not torch.equal(batches[0].index, batches[3].index)
    assert batches[0].global_crops.shape == (2, 6, 1, 16, 16) and batches[0].local_crops.shape == (2, 6, 1, 8, 8)
    assert not same(batches[0], load(seed=4)[0])


@pytest.mark.parametrize("workers", [1, 2])
def test_workers_do_not_change_anything(workers: int) -> None:
    for a, b in zip(load(), load(workers=workers), strict=True):
        assert same(a, b)


def test_resume_continues_exactly() -> None:
    whole = load()
    for cut, start in ((2, (0, 2)), (3, (0, 3)), (3, (1, 0)), (5, (1, 2))):
        rest = load(start=start)
        assert len(rest) == 6 - cut and all(same(a, b) for a, b in zip(whole[cut:], rest, strict=True))


@pytest.mark.parametrize("gpu", [None, torch.device("cpu")])
def test_a_resume_replays_nothing(gpu: torch.device | None) -> None:
    """From a place two thousand epochs on, the first batch costs as many reads as a batch has images, and one order."""

    class Counting(ArraySource):
        reads = 0

        def read(self, index: int) -> torch.Tensor:
            self.reads += 1
            return super().read(index)

    source = Counting(images(20))
    whole = load(source=source, start=(2000, 0), epochs=2001)
    source.reads = 0
    batches = iter(train_loader(source, CROPS, batch_size=6, seed=3, start=(2000, 2), gpu=gpu))
    assert same(next(batches), whole[2])
    assert source.reads == 6 if gpu is None else source.reads == 12  # a batch ahead


def test_the_order_is_drawn_once_an_epoch(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[int] = []

    def note(n: int, seed: int, epoch: int) -> torch.Tensor:
        drawn.append(epoch)
        return epoch_order(n, seed, epoch)

    monkeypatch.setattr(sys.modules["dino_fast.data.train_loader"], "epoch_order", note)
    load(start=(7, 1), epochs=9)
    assert drawn == [7, 8]


@pytest.mark.parametrize("world", [2, 3])
def test_ranks_share_one_global_batch(world: int) -> None:
    parts = [load(rank=rank, world=world) for rank in range(world)]
    for step, whole in enumerate(load()):
        assert torch.equal(whole.index, torch.cat([part[step].index for part in parts]))
        assert torch.equal(whole.global_crops, torch.cat([part[step].global_crops for part in parts], dim=1))
        assert torch.equal(whole.local_crops, torch.cat([part[step].local_crops for part in parts], dim=1))


def test_a_crop_is_a_function_of_seed_epoch_and_index() -> None:
    """The same image in batches of another size and place has the same crops."""
    one = {(b.epoch, i.item()): b.global_crops[:, k] for b in load() for k, i in enumerate(b.index)}
    other = {(b.epoch, i.item()): b.global_crops[:, k] for b in load(batch_size=4) for k, i in enumerate(b.index)}
    shared = one.keys() & other.keys()
    assert len(shared) > 20 and all(torch.equal(one[k], other[k]) for k in shared)
    index = next(i for e, i in one if (1 - e, i) in one)
    assert not torch.equal(one[0, index], one[1, index])


def test_bad_images_are_replaced_counted_and_named() -> None:
    said: list[str] = []
    bad = {4, 9}
    source = Broken(images(100), bad)
    loader = train_loader(source, CROPS, batch_size=10, seed=1, epochs=2, on_bad=said.append)
    batches = list(loader)
    assert set(loader.bad) == bad and len(said) == 2 and all("image 4" in s or "image 9" in s for s in said)
    assert len(batches) == 20 and not bad & set(torch.cat([b.index for b in batches]).tolist())
    again = list(train_loader(source, CROPS, batch_size=10, seed=1, epochs=2, workers=2, on_bad=said.append))
    assert all(same(a, b) for a, b in zip(batches, again, strict=True))


def test_too_many_bad_images_stop_the_run() -> None:
    source = Broken(images(100), set(range(0, 100, 10)))
    with pytest.raises(UserError, match=r"6 of 100 images cannot be read, more than the 5\.0% accepted"):
        load(source=source, batch_size=10, on_bad=lambda line: None)
    assert load(source=source, batch_size=10, max_bad=0.1, on_bad=lambda line: None)


def test_a_source_that_is_gone_stops_the_run() -> None:
    source = Broken(images(100000 // 500), set(range(200)))
    with pytest.raises(UserError, match="in a row cannot be read"):
        load(source=source, max_bad=1.0, on_bad=lambda line: None)


@pytest.mark.parametrize(
    ("options", "message"),
    [({"batch_size": 21}, "larger than the data set"), ({"world": 4}, "does not divide"),
     ({"batch_size": 0}, "batch size 0"), ({"workers": -1}, "workers is -1")],
)  # fmt: skip
def test_settings_that_do_not_fit_are_refused(options: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        load(**options)


def test_a_killed_worker_is_an_error_for_people(tmp_path: Path) -> None:
    class Killed(ArraySource):
        def read(self, index: int) -> torch.Tensor:
            import os
            import signal

            os.kill(os.getpid(), signal.SIGKILL)
            return super().read(index)

    with pytest.raises(UserError, match="worker died"):
        load(source=Killed(images(20)), workers=1)
