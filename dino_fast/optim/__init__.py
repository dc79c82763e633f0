"""Optimizers that move the teacher in the same pass over memory, and the moving average alone."""

from __future__ import annotations

from typing import Any

from dino_fast.optim.adamw_ema import CLIP_MODES, AdamWEMA, as_found_inf, ema_update
from dino_fast.optim.lars import LARSEMA
from dino_fast.optim.sgd import SGDEMA

__all__ = ["CLIP_MODES", "LARSEMA", "SGDEMA", "AdamWEMA", "as_found_inf", "build_optimizer", "ema_update"]

Optimizer = AdamWEMA | SGDEMA | LARSEMA


def build_optimizer(
    name: str, groups: list[dict[str, Any]], lr: float, weight_decay: float, clip_grad: float
) -> Optimizer:
    """The optimizer of a run.

    Args:
        name: "adamw", "sgd" or "lars".
        groups: dicts with `params`, and any of `teacher_params`, `lr` and `weight_decay`.
        lr, weight_decay: of groups that bring none.
        clip_grad: largest 2-norm of each parameter's gradient; 0 does not clip.
    """
    if name == "adamw":
        return AdamWEMA(groups, None, lr=lr, weight_decay=weight_decay, clip_grad=clip_grad)
    if name == "sgd":
        return SGDEMA(groups, lr, weight_decay, clip_grad)
    return LARSEMA(groups, lr, weight_decay, clip_grad)
