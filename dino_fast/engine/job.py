"""A training run under way, and when its parts are due."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

import torch

from dino_fast.data import Batch, TrainLoader
from dino_fast.engine.build import Data
from dino_fast.engine.config import Config
from dino_fast.engine.estimate import flops_per_image, peak_flops, sizes_of
from dino_fast.engine.later import Found
from dino_fast.engine.monitor import Health, Progress
from dino_fast.engine.run_dir import Run
from dino_fast.engine.saving import Writer
from dino_fast.engine.schedules import Rates, Schedules
from dino_fast.engine.signals import Stop
from dino_fast.engine.train_step import Learner

# Saving takes at most this share of the time, however short the epochs are.
SAVE_SHARE = 0.1


def reads_late(device: torch.device) -> bool:
    """Whether a step's numbers are read when the next one is under way: a GPU would stand still while they are waited
    for. A CPU has ended the step by then."""
    return device.type == "cuda"


@dataclass
class Unread:
    """A step that was begun: what it found, and what its line of metrics needs beside that."""

    step: int  # updates that the weights of its loss had seen
    batch: Batch
    rates: Rates
    found: Found
    measured: dict[str, float]  # speed, and k-NN accuracy where it was due


@dataclass
class Job:
    """A run under way."""

    config: Config
    data: Data
    loader: TrainLoader
    run: Run
    learner: Learner
    stop: Stop
    step: int = 0  # optimizer steps done
    best: float = -1.0  # the teacher's highest k-NN accuracy
    saved: int = -1  # step of the last checkpoint
    saved_at: float = field(default_factory=time.monotonic)
    skipped: int = 0  # steps in a row whose loss was not finite
    unread: Unread | None = None  # the last step, until its numbers are looked at

    def __post_init__(self) -> None:
        config, device = self.config, str(self.learner.device)
        self.schedules = Schedules(config, self.loader.batches_per_epoch)
        self.end = min(self.schedules.steps, config.max_steps or self.schedules.steps)
        self.ranks = self.learner.ranks
        self.agreed = [0, 1, 0]  # of all processes: the signal, whether the clock allows a save, lost data
        self.late = reads_late(self.learner.device)
        if self.learner.graph is not None:
            self.learner.graph.say = self.say
        channels = self.data.train.channels
        sizes = sizes_of(self.config, channels)
        self.tokens = sizes.tokens if sizes else 0  # of an image
        self.flops = flops_per_image(self.config, channels)
        precision = {None: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}[self.learner.autocast]
        peak = peak_flops(self.learner.device, precision)
        self.peak = None if peak is None else peak * self.ranks.world
        background = self.config.save_in_background
        self.writer = Writer(self.learner.device.type == "cuda" if background is None else background)
        self.progress = Progress(self.end, device=device, enabled=self.ranks.first)
        patience = max(200, self.schedules.freeze_steps + self.schedules.warmup_steps)
        self.health = Health(config.out_dim, patience=patience, workers=self.loader.workers, device=device)
        self.loader.on_bad = self.say if self.ranks.first else self.tell

    def say(self, text: str) -> None:
        """To the console and to log.txt, from the first process."""
        if self.ranks.first:
            self.progress.message(text)
            self.run.note(text)

    def tell(self, text: str) -> None:
        """What another process has to say: to log.txt."""
        self.run.note(f"process {self.ranks.rank}: {text}")

    def agree(self, failed: bool) -> None:
        """Before a step: what all processes will do after it."""
        if self.ranks.world > 1:
            self.agreed = self.ranks.agree(self.stop.number or 0, self.ranks.first and self._waited(), failed)

    def signal(self) -> int:
        """The signal that ends the run, or 0."""
        return self.agreed[0] if self.ranks.world > 1 else self.stop.number or 0

    def _waited(self) -> bool:
        """Whether the last save is long enough ago for another one not to become a burden."""
        return (time.monotonic() - self.saved_at) * SAVE_SHARE >= self.writer.seconds

    def _every(self, epochs: float) -> bool:
        return epochs > 0 and self.step % max(1, round(epochs * self.loader.batches_per_epoch)) == 0

    def knn_is_due(self) -> bool:
        """Every so many epochs and at the end; the first step's line has the measurement before any update."""
        due = self.step == self.end or self._every(self.config.knn_every)
        return self.step > 1 and self.config.knn_every > 0 and due

    def save_is_due(self, measured: dict[str, float]) -> bool:
        """At the end, at a new best, and every so many epochs, where saving does not become a burden."""
        if self.step == self.end or measured.get("knn", -1.0) > self.best:
            return True
        return self._every(self.config.save_every) and bool(self.agreed[1] if self.ranks.world > 1 else self._waited())
