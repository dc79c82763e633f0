"""Architectures by name: the vision transformers of DINO and DINOv2, and the models of timm and torchvision.

`timm/NAME` and `torchvision/NAME` give a new model of that library, without pretrained weights and classifier. Such a
model runs on one resolution at a time.
"""

from __future__ import annotations

import inspect
from typing import Any, cast

from torch import nn

from dino_fast.errors import UserError, nearest
from dino_fast.models import custom, dinov2
from dino_fast.models.dinov2 import DINOv2
from dino_fast.models.vit import VisionTransformer

# name -> embed_dim, depth, num_heads
ARCHITECTURES = {
    "vit_tiny": (192, 12, 3),
    "vit_small": (384, 12, 6),
    "vit_base": (768, 12, 12),
    "vit_large": (1024, 24, 16),
}

LIBRARIES = ("timm", "torchvision")  # whose models are called library/NAME


def build_backbone(arch: str, **options: Any) -> Any:
    """A backbone by name; `options` are those of `VisionTransformer` and may replace the name's sizes too.

    `timm/NAME` and `torchvision/NAME` are models of those libraries without weights and classifier, in which only
    `in_chans`, `img_size` and `drop_path_rate` are set, as far as they have them; `custom/NAME` is a module that the
    program gave. The name of either is the attribute `arch`.
    Every backbone has `embed_dim`, `img_size` (height, width) and `in_chans`, and turns `[B, C, H, W]` into
    `[B, embed_dim]`. Raises UserError for a name that is not there.
    """
    library, _, name = arch.partition("/")
    if library == custom.LIBRARY:
        return custom.build(name, **options)
    if library in LIBRARIES:
        return _library_model(arch, library, name, options)
    released = dinov2.model_options(arch)
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


def transformer_sizes() -> dict[str, tuple[int, int, int]]:
    """Name -> embed_dim, depth, num_heads of every vision transformer here, DINO's and DINOv2's."""
    released = {name: sizes[:3] for name, sizes in dinov2.SIZES.items()}
    return {**ARCHITECTURES, **released, **{f"{name}_reg": sizes for name, sizes in released.items()}}


# ---- models of other libraries ----

# Attributes in which torchvision's families keep their classifier.
_CLASSIFIERS = ("fc", "classifier", "head", "heads")


def _library_model(arch: str, library: str, name: str, options: dict[str, Any]) -> nn.Module:
    sizes = [key for key in ("embed_dim", "depth", "num_heads") if key in options]
    if sizes:
        raise UserError(f"{arch} has its own sizes; leave out {', '.join(sizes)}, or take a vit_* architecture")
    model: Any = {"timm": _timm_model, "torchvision": _torchvision_model}[library](name, options)
    size = options.get("img_size", 224)
    model.arch, model.in_chans, model.patch_size = arch, options.get("in_chans", 3), 1
    model.img_size = (size, size) if isinstance(size, int) else (size[0], size[-1])
    return cast(nn.Module, model)


def _timm_model(name: str, options: dict[str, Any]) -> nn.Module:
    try:
        import timm
    except ImportError as error:
        raise UserError("timm/... needs timm: pip install timm") from error
    if not timm.is_model(name):
        raise UserError(f"timm has no model '{name}'{nearest(name, timm.list_models())}")
    settings = {"in_chans": options.get("in_chans", 3), "drop_path_rate": options.get("drop_path_rate", 0.0)}
    # Transformers are made for one size; those that can take others interpolate their positions.
    sized = settings | {"img_size": options.get("img_size", 224), "dynamic_img_size": True}
    for accepted in (sized, settings, {"in_chans": settings["in_chans"]}):
        try:
            model: Any = timm.create_model(name, pretrained=False, num_classes=0, **accepted)
        except TypeError:  # it has no such setting
            continue
        model.embed_dim = getattr(model, "head_hidden_size", None) or model.num_features
        model.model_args = {key: value for key, value in accepted.items() if key != "drop_path_rate"}
        return cast(nn.Module, model)
    raise UserError(f"timm/{name} cannot be built without its classifier; take another model")


def _torchvision_model(name: str, options: dict[str, Any]) -> nn.Module:
    from torchvision import models

    known = models.list_models(module=models)
    if name not in known:
        raise UserError(f"torchvision has no classification model '{name}'{nearest(name, known)}")
    if options.get("in_chans", 3) != 3:
        raise UserError(f"torchvision/{name} takes three channels; use --channels 3, or timm/..., which takes any")
    if name.startswith("vit_"):
        raise UserError(f"torchvision/{name} takes images of one size alone; use vit_base, say, or timm/vit_...")
    builder = models.get_model_builder(name)
    settings: dict[str, Any] = {"weights": None}
    parameters = inspect.signature(builder).parameters
    if "aux_logits" in parameters or name in ("googlenet", "inception_v3"):  # no auxiliary outputs
        settings |= {"aux_logits": False, "init_weights": True}
    model = builder(**settings)
    for attribute in _CLASSIFIERS:
        if isinstance(getattr(model, attribute, None), nn.Module):
            layers = [layer for layer in getattr(model, attribute).modules() if isinstance(layer, nn.Linear)]
            if layers:
                model.embed_dim = layers[0].in_features
                setattr(model, attribute, _before_first_linear(getattr(model, attribute)))
                return cast(nn.Module, model)
    raise UserError(f"torchvision/{name} has no linear classifier to take off; take another model")


def _before_first_linear(classifier: nn.Module) -> nn.Module:
    """The layers of a classifier before its first linear one (a norm and a flatten, in some), without dropout."""
    before = []
    for layer in classifier.children():
        if isinstance(layer, nn.Linear):
            break
        if not isinstance(layer, nn.Dropout):
            before.append(layer)
    return nn.Sequential(*before) if before else nn.Identity()
