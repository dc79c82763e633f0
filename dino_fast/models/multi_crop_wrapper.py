"""Backbone and head on crops of several resolutions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn

from dino_fast.models.vit import VisionTransformer


class MultiCropWrapper(nn.Module):
    """Crops, one tensor `[rows, C, H, W]` per resolution, -> logits `[sum of rows, K]` in the given order.

    A backbone of ours takes all resolutions at once, as one buffer of tokens; any other runs once per resolution. The
    head runs once. State-dict names: `backbone.*`, `head.*`.
    """

    def __init__(self, backbone: nn.Module, head: nn.Module) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = head

    def forward(self, crops: Sequence[Tensor]) -> Tensor:
        """The head's output `[sum of rows, out_dim]` of crops, each `[B, C, h, w]`, crop by crop."""
        return cast(Tensor, self.head(self.features(crops)))

    def features(self, crops: Sequence[Tensor], keep_indices: Tensor | None = None) -> Tensor:
        """The head's input `[sum of rows, embed_dim]`; `keep_indices` as in the backbone's forward."""
        if isinstance(self.backbone, VisionTransformer):
            return cast(Tensor, self.backbone(crops, keep_indices))
        outputs = [self.backbone(crop) for crop in crops]
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs)
