"""Types that the backends of linear_dino_loss share."""

from __future__ import annotations

from torch import Tensor

# Row statistics [2, T + V, B]; products d [T, V, B]; differences w E(v) - sum_u A(u, v) E(u) [V, B, D], or None where
# no gradient is wanted, or the reads E [T + V, B, D] where no pair weights are given; mean teacher logits [K].
ForwardOutputs = tuple[Tensor, Tensor, Tensor | None, Tensor]
