"""Optimizers that move the teacher in the same pass over memory, and the moving average alone."""

from __future__ import annotations

from dino_fast.optim.adamw_ema import CLIP_MODES, AdamWEMA, as_found_inf, ema_update

__all__ = ["CLIP_MODES", "AdamWEMA", "as_found_inf", "ema_update"]
