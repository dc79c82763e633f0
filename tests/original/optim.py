"""What the published script does around the optimizer: groups, schedules, clipping, freezing, the teacher's average."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn


def get_params_groups(model: nn.Module) -> list[dict]:
    """Two groups: decayed matrices first, then biases and vectors without weight decay."""
    decayed: list[Tensor] = []
    plain: list[Tensor] = []
    for name, param in model.named_parameters():
        if not param.requires_grad:
            continue
        (plain if name.endswith(".bias") or param.ndim == 1 else decayed).append(param)
    return [{"params": decayed}, {"params": plain, "weight_decay": 0.0}]


def cosine_scheduler(
    base_value: float,
    final_value: float,
    epochs: int,
    steps_per_epoch: int,
    warmup_epochs: int = 0,
    start_warmup_value: float = 0.0,
) -> np.ndarray:
    """One value a step: a line from `start_warmup_value` to `base_value`, then half a cosine to `final_value`."""
    warmup_steps = warmup_epochs * steps_per_epoch
    warmup = np.linspace(start_warmup_value, base_value, warmup_steps) if warmup_epochs > 0 else np.array([])
    steps = np.arange(epochs * steps_per_epoch - warmup_steps)
    cosine = final_value + 0.5 * (base_value - final_value) * (1 + np.cos(np.pi * steps / len(steps)))
    schedule = np.concatenate((warmup, cosine))
    assert len(schedule) == epochs * steps_per_epoch
    return schedule


def clip_gradients(model: nn.Module, clip: float) -> list[float]:
    """Shortens each parameter's gradient on its own to at most `clip`; returns the norms before."""
    norms = []
    for param in model.parameters():
        if param.grad is None:
            continue
        norm = param.grad.data.norm(2)
        norms.append(norm.item())
        coefficient = clip / (norm + 1e-6)
        if coefficient < 1:
            param.grad.data.mul_(coefficient)
    return norms


def cancel_gradients_last_layer(epoch: int, model: nn.Module, freeze_last_layer: int) -> None:
    """During the first `freeze_last_layer` epochs the last layer gets no gradient, hence no decay either."""
    if epoch >= freeze_last_layer:
        return
    for name, param in model.named_parameters():
        if "last_layer" in name:
            param.grad = None


@torch.no_grad()
def ema(teacher: nn.Module, student: nn.Module, momentum: float) -> None:
    """Teacher <- momentum * teacher + (1 - momentum) * student, parameter by parameter (buffers stay)."""
    for student_param, teacher_param in zip(student.parameters(), teacher.parameters(), strict=True):
        teacher_param.data.mul_(momentum).add_((1 - momentum) * student_param.detach().data)


class LARS(torch.optim.Optimizer):
    """Layer-wise adaptive rates with momentum; vectors take plain steps without decay."""

    def __init__(self, params, lr=0.0, weight_decay=0.0, momentum=0.9, trust=0.001):
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum, "trust": trust})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for param in group["params"]:
                change = param.grad
                if change is None:
                    continue
                if param.ndim != 1:
                    change = change + group["weight_decay"] * param
                    length, reach = param.norm(), change.norm()
                    if length > 0 and reach > 0:
                        change = change * (group["trust"] * length / reach)
                state = self.state[param]
                state["mu"] = state.get("mu", torch.zeros_like(param)) * group["momentum"] + change
                param.sub_(group["lr"] * state["mu"])
