"""Vision transformers, the projection head and their files; state-dict names are the published ones."""

from __future__ import annotations

from typing import Any, cast

from dino_fast.errors import UserError, nearest
from dino_fast.models import custom, dinov2
from dino_fast.models.dinov2 import DINOv2
from dino_fast.models.head import DINOHead, WeightNormLinear
from dino_fast.models.multi_crop_wrapper import MultiCropWrapper
from dino_fast.models.vit import VisionTransformer, set_drop_path_seed

# name -> embed_dim, depth, num_heads
ARCHITECTURES = {
    "vit_tiny": (192, 12, 3),
    "vit_small": (384, 12, 6),
    "vit_base": (768, 12, 12),
    "vit_large": (1024, 24, 16),
}

LIBRARIES = ("timm", "torchvision")  # whose models go by library/NAME

__all__ = [
    "ARCHITECTURES",
    "LIBRARIES",
    "DINOHead",
    "DINOv2",
    "MultiCropWrapper",
    "VisionTransformer",
    "WeightNormLinear",
    "build_backbone",
    "set_drop_path_seed",
    "vit_base",
    "vit_large",
    "vit_small",
    "vit_tiny",
]


def build_backbone(arch: str, **options: Any) -> Any:
    """A backbone by name; `options` are those of `VisionTransformer` and may replace the name's sizes too.

    `timm/NAME` and `torchvision/NAME` are models of those libraries without weights and classifier, in which only
    `in_chans`, `img_size` and `drop_path_rate` are set, as far as they have them; `custom/NAME` is a module that the
    program gave. Every backbone has `embed_dim` and
    turns `[B, C, H, W]` into `[B, embed_dim]`. Raises UserError for a name that is not there.
    """
    if arch.partition("/")[0] == custom.LIBRARY:
        return custom.build(arch.partition("/")[2], **options)
    if arch.partition("/")[0] in LIBRARIES:
        from dino_fast.models.libraries import build

        return build(arch, **options)
    released = dinov2.options_of(arch)
    if released is not None:
        return DINOv2(**{**released, **options})
    if arch not in ARCHITECTURES:
        known = [*ARCHITECTURES, *dinov2.SIZES]
        raise UserError(
            f"unknown architecture '{arch}'{nearest(arch, known)}; known: {', '.join(known)} (each dinov2_* also with "
            f"registers: dinov2_vits14_reg), and timm/NAME and torchvision/NAME (torchvision/resnet50, say)"
        )
    embed_dim, depth, num_heads = ARCHITECTURES[arch]
    return VisionTransformer(**{"embed_dim": embed_dim, "depth": depth, "num_heads": num_heads, **options})


def vit_tiny(patch_size: int = 16, **options: Any) -> VisionTransformer:
    """12 blocks of width 192 with 3 heads."""
    return cast(VisionTransformer, build_backbone("vit_tiny", patch_size=patch_size, **options))


def vit_small(patch_size: int = 16, **options: Any) -> VisionTransformer:
    """12 blocks of width 384 with 6 heads."""
    return cast(VisionTransformer, build_backbone("vit_small", patch_size=patch_size, **options))


def vit_base(patch_size: int = 16, **options: Any) -> VisionTransformer:
    """12 blocks of width 768 with 12 heads."""
    return cast(VisionTransformer, build_backbone("vit_base", patch_size=patch_size, **options))


def vit_large(patch_size: int = 16, **options: Any) -> VisionTransformer:
    """24 blocks of width 1024 with 16 heads."""
    return cast(VisionTransformer, build_backbone("vit_large", patch_size=patch_size, **options))
