"""Backbone and head on crops of several resolutions."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn


class MultiCropWrapper(nn.Module):
    """Crops, one tensor `[rows, C, H, W]` per resolution, -> logits `[sum of rows, K]` in the given order.

    The backbone runs once per resolution, the head once. State-dict names: `backbone.*`, `head.*`.
    """

    def __init__(self, backbone: nn.Module, head: nn.Module) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = head

    def forward(self, crops: Sequence[Tensor]) -> Tensor:
        return self.head(self.features(crops))

    def features(self, crops: Sequence[Tensor]) -> Tensor:
        """What the head is given: `[sum of rows, embed_dim]`."""
        outputs = [self.backbone(crop) for crop in crops]
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs)
