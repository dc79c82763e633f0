"""One published training iteration, from crops to the teacher's update."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .loss import DINOLoss
from .optim import LARS, cancel_gradients_last_layer, clip_gradients, ema, get_params_groups


@dataclass
class Trainer:
    """The state of a published run. `lr`, `weight_decay` and `momentum` hold one value a step.

    The optimizer is AdamW over two groups, of which only the first has its weight decay scheduled. The teacher is
    given ready: the student's weights, no gradients, never in evaluation mode.
    """

    student: nn.Module
    teacher: nn.Module
    loss: DINOLoss
    lr: Sequence[float]
    weight_decay: Sequence[float]
    momentum: Sequence[float]
    clip_grad: float = 3.0
    freeze_last_layer: int = 1  # epochs
    optimizer_class: str = "adamw"

    def __post_init__(self) -> None:
        self.teacher.load_state_dict(self.student.state_dict())
        for param in self.teacher.parameters():
            param.requires_grad = False
        groups = get_params_groups(self.student)
        self.optimizer: torch.optim.Optimizer
        if self.optimizer_class == "sgd":
            self.optimizer = torch.optim.SGD(groups, lr=0, momentum=0.9)
        elif self.optimizer_class == "lars":
            self.optimizer = LARS(groups)
        else:
            self.optimizer = torch.optim.AdamW(groups)

    def step(self, crops: list[Tensor], step: int, epoch: int) -> float:
        """Trains on `crops`, one tensor `[B, C, h, w]` a crop with the two global ones first; returns the loss."""
        return train_step(self, crops, step, epoch)


def train_step(run: Trainer, crops: list[Tensor], step: int, epoch: int) -> float:
    """Schedules, forward, loss, backward, clip, freeze, AdamW, teacher's average: in the published order."""
    for i, group in enumerate(run.optimizer.param_groups):
        group["lr"] = float(run.lr[step])
        if i == 0:
            group["weight_decay"] = float(run.weight_decay[step])

    with torch.no_grad():  # the original lets the frozen parameters say so; the numbers are the same
        teacher_output = run.teacher(crops[:2])
    student_output = run.student(crops)
    loss = run.loss(student_output, teacher_output, epoch)

    run.optimizer.zero_grad()
    loss.backward()
    if run.clip_grad:
        clip_gradients(run.student, run.clip_grad)
    cancel_gradients_last_layer(epoch, run.student, run.freeze_last_layer)
    run.optimizer.step()
    ema(run.teacher, run.student, float(run.momentum[step]))
    return loss.item()
