"""LARS with the interface of `AdamWEMA`, for large batches and convolutional networks."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dino_fast.optim.sgd import SGDEMA

TRUST = 0.001  # eta of the paper: a matrix moves by this share of its own 2-norm at learning rate 1


class LARSEMA(SGDEMA):
    """Layer-wise adaptive rate scaling (You, Gitman & Ginsburg 2017, arXiv:1708.03888), as the original has it.

    A matrix p with gradient g moves along u = g + weight_decay * p, scaled by TRUST * |p| / |u| where neither is 0;
    vectors are neither decayed nor scaled. Arguments and groups are those of `SGDEMA`.
    """

    def _update(self, p: Tensor, group: dict[str, Any]) -> Tensor:
        assert p.grad is not None
        if p.ndim == 1:
            return p.grad
        update = super()._update(p, group)
        length, reach = p.norm(), update.norm()
        ratio = torch.where((length > 0) & (reach > 0), TRUST * length / reach, torch.ones_like(length))
        return update * ratio
