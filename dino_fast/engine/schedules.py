"""Schedules: learning rate, weight decay, the teacher's momentum and temperature, and the frozen last layer."""

from __future__ import annotations

import math
from dataclasses import dataclass

from dino_fast.engine.config import Config
from dino_fast.loss import teacher_temp_at


@dataclass(frozen=True)
class StepHyperparams:
    """Hyperparameters of one step."""

    lr: float
    weight_decay: float
    momentum: float  # weight of the old teacher in its moving average
    teacher_temp: float
    frozen: bool  # the last layer is not updated


@dataclass(frozen=True)
class Schedules:
    """The published schedules of a run of `config.epochs` epochs of `steps_per_epoch` optimizer steps."""

    config: Config
    steps_per_epoch: int

    @property
    def steps(self) -> int:
        """Length of the schedules, in optimizer steps."""
        return self.config.epochs * self.steps_per_epoch

    @property
    def warmup_steps(self) -> int:
        """Warm-up steps of the learning rate; a tenth of the run if the warm-up is longer than the run."""
        wanted = self._count(self.config.warmup_epochs)
        return wanted if wanted <= self.steps else self.steps // 10

    @property
    def freeze_steps(self) -> int:
        """First steps in which the last layer is frozen."""
        return self._count(self.config.freeze_last_layer)

    def values_at(self, step: int) -> StepHyperparams:
        """The values of step `step`, counted from 0."""
        config, end = self.config, self.steps
        return StepHyperparams(
            lr=cosine(step, config.lr * config.batch_size / 256, config.min_lr, end, self.warmup_steps),
            weight_decay=cosine(step, config.weight_decay, config.weight_decay_end, end),
            momentum=self.momentum(step),
            teacher_temp=self.teacher_temp(step // self.steps_per_epoch),
            frozen=step < self.freeze_steps,
        )

    def momentum(self, step: int) -> float:
        """The teacher's momentum m of `step`: teacher = m teacher + (1 - m) student, after the student's update."""
        kind, config = self.config.teacher_update, self.config
        if kind == "ema":
            return cosine(step, config.momentum_teacher, 1.0, self.steps)
        if kind == "previous-epoch":
            return 0.0 if (step + 1) % self.steps_per_epoch == 0 else 1.0
        return 0.0 if kind == "copy" else 1.0  # previous-step: `train_step` copies the student before its update

    def teacher_temp(self, epoch: int) -> float:
        """The published warm-up, constant within an epoch: see `teacher_temp_at`."""
        config = self.config
        warmup = config.warmup_teacher_temp, config.teacher_temp, config.warmup_teacher_temp_epochs
        return teacher_temp_at(epoch, *warmup, config.epochs)

    def notes(self) -> list[str]:
        """Notes for a run that is shorter than its schedules ask for."""
        config, notes = self.config, []
        if config.warmup_epochs > config.epochs:
            notes.append(
                f"the warm-up of {config.warmup_epochs:g} epochs is longer than the run of {config.epochs}: shortened "
                f"to {self.warmup_steps} of its {self.steps} steps"
            )
        if config.warmup_teacher_temp_epochs > config.epochs:
            notes.append(
                f"the teacher temperature's warm-up of {config.warmup_teacher_temp_epochs} epochs is longer than the "
                f"run: shortened to its {config.epochs}"
            )
        if config.freeze_last_layer >= config.epochs:
            notes.append(
                f"the last layer stays frozen for the whole run (freeze_last_layer {config.freeze_last_layer:g})"
            )
        stop = config.max_steps
        if stop is not None and stop < self.steps:
            text = f"stops at step {stop} of the {self.steps} that the schedules span ({config.epochs} epochs)"
            if stop < self.warmup_steps:
                text += (
                    f", within the learning rate's warm-up of {self.warmup_steps} steps; for a short run with whole "
                    "schedules use --epochs and --warmup-epochs"
                )
            notes.append(text)
        elif stop is not None and stop > self.steps:
            notes.append(
                f"ends after {self.steps} steps ({config.epochs} epochs), before max_steps {stop}; see --epochs"
            )
        return notes

    def _count(self, epochs: float) -> int:
        return round(epochs * self.steps_per_epoch)


def cosine(step: int, start: float, end: float, steps: int, warmup: int = 0) -> float:
    """Value at `step`: linear from 0 to `start` over `warmup` steps (both included), then half a cosine towards `end`.

    `end` itself would be the value at step `steps`, as published.
    """
    if step < warmup:
        return start * step / max(warmup - 1, 1)
    share = min(1.0, (step - warmup) / max(steps - warmup, 1))
    return end + 0.5 * (start - end) * (1 + math.cos(math.pi * share))
