"""SGD with the interface of `AdamWEMA`: one call clips, updates the student, then moves the teacher.

For the published recipes of convolutional networks. SGD's own momentum is 0.9, as in torch.optim.SGD (the learning rate
multiplies the buffer), and each gradient is clipped by its own norm, as in the original DINO.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from dino_fast.optim.adamw_ema import as_found_inf, ema_update, only_makes_state, warn_that_teacher_stays

MOMENTUM = 0.9


class SGDEMA(torch.optim.Optimizer):
    """SGD with momentum, gradient clipping and the teacher's EMA.

    For each parameter p with gradient g, clipped to the 2-norm `clip_grad`, and buffer b, all in the parameter's dtype:

        b <- 0.9 b + g + weight_decay * p,   p <- p - lr * b,   then   teacher <- m teacher + (1 - m) p

    Args:
        groups: dicts with `params`, and any of `teacher_params` (the teacher's counterparts in the same order), `lr`,
            `weight_decay` and `momentum` (SGD's own).
        lr, weight_decay: of groups that bring none.
        clip_grad: largest 2-norm of each gradient; 0 does not clip.

    torch.amp.GradScaler passes its scale and `found_inf` instead of waiting for them, as with `AdamWEMA`. The teacher
    is in no group and in no state dict.
    """

    _step_supports_amp_scaling = True
    found_inf: Tensor | None
    grad_scale: Tensor | None

    def __init__(self, groups: Sequence[dict[str, Any]], lr: float, weight_decay: float, clip_grad: float) -> None:
        self.teacher: list[Tensor] = []  # in no group and no state dict
        self.clip_grad, self._warned = clip_grad, False
        super().__init__(groups, {"lr": lr, "weight_decay": weight_decay, "momentum": MOMENTUM})

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As in every optimizer; the group may bring `teacher_params`."""
        super().add_param_group({name: value for name, value in param_group.items() if name != "teacher_params"})
        self.teacher += param_group.get("teacher_params") or ()

    def __getstate__(self) -> dict[str, Any]:
        own = {name: getattr(self, name) for name in ("teacher", "clip_grad", "_warned")}
        return {**super().__getstate__(), **own}

    @torch.no_grad()
    def step(  # type: ignore[override]
        self,
        closure: Callable[[], Any] | None = None,
        *,
        momentum: float | None = None,
        skip: Tensor | None = None,
    ) -> Any:
        """Clip, update the parameters, then the teacher; the arguments are those of `AdamWEMA.step`.

        Gradients are unscaled and clipped in place. `momentum` is the teacher's, in [0, 1]; without it the teacher
        stays as it is, with a warning the first time.

        Raises:
            ValueError: a momentum outside [0, 1], or teachers that do not fit the parameters; see `ema_update`.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if momentum is None and self.teacher and not self._warned and not only_makes_state(self):
            self._warned = True
            warn_that_teacher_stays(f"Call {type(self).__name__}.step(momentum=0.996).")
        found_inf = as_found_inf(skip, getattr(self, "found_inf", None))
        self._prepare()
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    self._move(p, group, None if found_inf is None else found_inf.reshape(()) > 0)
        if momentum is not None:
            students = [p for group in self.param_groups for p in group["params"]]
            ema_update(self.teacher, students, momentum, skip=skip)
        return loss

    def _prepare(self) -> None:
        """Unscales and clips the gradients in place."""
        scale = getattr(self, "grad_scale", None)
        grads = [p.grad for group in self.param_groups for p in group["params"] if p.grad is not None]
        if scale is not None and grads:
            torch._foreach_mul_(grads, 1.0 / scale.to(grads[0].device))
        if self.clip_grad and grads:
            shares = [(self.clip_grad / (norm + 1e-6)).clamp(max=1.0) for norm in torch._foreach_norm(grads)]
            torch._foreach_mul_(grads, shares)

    def _move(self, p: Tensor, group: dict[str, Any], stays: Tensor | None) -> None:
        state = self.state[p]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(p)
        buffer = state["momentum_buffer"]
        new_buffer = buffer * group["momentum"] + self._update(p, group)
        new = p.add(new_buffer, alpha=-group["lr"])
        p.copy_(new if stays is None else torch.where(stays, p, new))
        buffer.copy_(new_buffer if stays is None else torch.where(stays, buffer, new_buffer))

    def _update(self, p: Tensor, group: dict[str, Any]) -> Tensor:
        """The update that is added to the momentum buffer."""
        assert p.grad is not None
        return p.grad.add(p, alpha=group["weight_decay"])
