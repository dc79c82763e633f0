"""Vision transformers, the projection head and their files; state-dict names are the published ones."""

from __future__ import annotations

from dino_fast.models.dinov2 import DINOv2
from dino_fast.models.head import DINOHead, WeightNormLinear
from dino_fast.models.multi_crop_wrapper import MultiCropWrapper
from dino_fast.models.registry import (
    ARCHITECTURES,
    LIBRARIES,
    build_backbone,
    vit_base,
    vit_large,
    vit_small,
    vit_tiny,
)
from dino_fast.models.vit import VisionTransformer, set_drop_path_seed
from dino_fast.models.weights.read import export_backbone, load_backbone

__all__ = [
    "ARCHITECTURES",
    "LIBRARIES",
    "DINOHead",
    "DINOv2",
    "MultiCropWrapper",
    "VisionTransformer",
    "WeightNormLinear",
    "build_backbone",
    "export_backbone",
    "load_backbone",
    "set_drop_path_seed",
    "vit_base",
    "vit_large",
    "vit_small",
    "vit_tiny",
]
