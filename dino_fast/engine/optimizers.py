"""SGD and LARS with the interface of `AdamWEMA`: one call clips, updates the student, then moves the teacher.

They are for the published recipes of convolutional networks. Both have momentum 0.9 (torch's kind: the learning rate is
outside the buffer) and clip each gradient by its own norm, as the original does.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from dino_fast.optim import AdamWEMA, ema_update

MOMENTUM = 0.9
TRUST = 0.001  # of LARS: the share of its own length by which a matrix moves at learning rate 1


class SGDEMA(torch.optim.SGD):
    """SGD with momentum over groups that carry `params` and `teacher_params`; see `AdamWEMA` for `step`."""

    _step_supports_amp_scaling = True
    found_inf: Tensor | None
    grad_scale: Tensor | None

    def __init__(self, groups: Sequence[dict[str, Any]], lr: float, weight_decay: float, clip_grad: float) -> None:
        plain, self.teacher = _split(groups)
        self.clip_grad = clip_grad
        super().__init__(plain, lr=lr, momentum=MOMENTUM, weight_decay=weight_decay)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None, *, momentum: float | None = None) -> Any:  # type: ignore[override]
        loss = _evaluate(closure)
        if _prepare(self, self.clip_grad):
            super().step()
        _follow(self, self.teacher, momentum)
        return loss


class LARSEMA(torch.optim.Optimizer):
    """Layer-wise adaptive rate scaling (You, Gitman & Ginsburg 2017, arXiv:1708.03888), as the original has it.

    A matrix p with gradient g moves along u = g + weight_decay * p, scaled by TRUST * |p| / |u| where neither is 0;
    vectors are neither decayed nor scaled. Groups carry `params` and `teacher_params`.
    """

    _step_supports_amp_scaling = True
    found_inf: Tensor | None
    grad_scale: Tensor | None

    def __init__(self, groups: Sequence[dict[str, Any]], lr: float, weight_decay: float, clip_grad: float) -> None:
        plain, self.teacher = _split(groups)
        self.clip_grad = clip_grad
        super().__init__(plain, {"lr": lr, "weight_decay": weight_decay, "momentum": MOMENTUM})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None, *, momentum: float | None = None) -> Any:  # type: ignore[override]
        loss = _evaluate(closure)
        if _prepare(self, self.clip_grad):
            for group in self.param_groups:
                for p in group["params"]:
                    if p.grad is not None:
                        self._move(p, group)
        _follow(self, self.teacher, momentum)
        return loss

    def _move(self, p: Tensor, group: dict[str, Any]) -> None:
        update = p.grad
        assert update is not None
        if p.ndim != 1:
            update = update.add(p, alpha=group["weight_decay"])
            length, reach = p.norm(), update.norm()
            ratio = torch.where((length > 0) & (reach > 0), TRUST * length / reach, torch.ones_like(length))
            update = update * ratio
        state = self.state[p]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(p)
        buffer = state["momentum_buffer"].mul_(group["momentum"]).add_(update)
        p.add_(buffer, alpha=-group["lr"])


Optimizer = AdamWEMA | SGDEMA | LARSEMA


def build_optimizer(
    name: str, groups: list[dict[str, Any]], lr: float, weight_decay: float, clip_grad: float
) -> Optimizer:
    """The optimizer called `adamw`, `sgd` or `lars` over groups of `params` and `teacher_params`."""
    if name == "adamw":
        return AdamWEMA(groups, None, lr=lr, weight_decay=weight_decay, clip_grad=clip_grad)
    if name == "sgd":
        return SGDEMA(groups, lr, weight_decay, clip_grad)
    return LARSEMA(groups, lr, weight_decay, clip_grad)


def _split(groups: Sequence[dict[str, Any]]) -> tuple[list[dict[str, Any]], list[Tensor]]:
    """The groups without their teachers, which no state dict repeats, and all of the teachers."""
    plain = [{name: value for name, value in group.items() if name != "teacher_params"} for group in groups]
    return plain, [t for group in groups for t in group.get("teacher_params", ())]


def _evaluate(closure: Callable[[], Any] | None) -> Any:
    if closure is None:
        return None
    with torch.enable_grad():
        return closure()


def _prepare(optimizer: SGDEMA | LARSEMA, clip: float) -> bool:
    """Unscales and clips the gradients in place. False where one is not finite: then only the teacher moves."""
    found_inf, scale = getattr(optimizer, "found_inf", None), getattr(optimizer, "grad_scale", None)
    optimizer.found_inf = optimizer.grad_scale = None  # dealt with here: torch's own step refuses them
    grads = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    if found_inf is not None and found_inf.item():
        return False
    if scale is not None and grads:
        torch._foreach_mul_(grads, 1.0 / scale.to(grads[0].device))
    if clip and grads:
        shares = [(clip / (norm + 1e-6)).clamp(max=1.0) for norm in torch._foreach_norm(grads)]
        torch._foreach_mul_(grads, shares)
    return True


def _follow(optimizer: SGDEMA | LARSEMA, teacher: list[Tensor], momentum: float | None) -> None:
    if momentum is not None:
        ema_update(teacher, [p for group in optimizer.param_groups for p in group["params"]], momentum)
