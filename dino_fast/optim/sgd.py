"""SGD with the interface of `AdamWEMA`: one call clips, updates the student, then moves the teacher.

For the published recipes of convolutional networks. Its momentum is 0.9 (torch's kind: the learning rate is outside of
the buffer), and each gradient is clipped by its own norm, as the original does.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from dino_fast.optim.adamw_ema import as_found_inf, ema_update, only_makes_state, warn_that_teacher_stays

MOMENTUM = 0.9


class SGDEMA(torch.optim.Optimizer):
    """SGD with momentum over groups that carry `params` and `teacher_params`; see `AdamWEMA` for `step`. Nothing waits
    for the device."""

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
