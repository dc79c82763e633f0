"""Backbones of other libraries by name: `timm/vit_small_patch16_224`, `torchvision/resnet50`.

They take one resolution at a time; what they are given is a new model, without pretrained weights and classifier.
"""

from __future__ import annotations

import inspect
from typing import Any, cast

from torch import nn

from dino_fast.errors import UserError, nearest

# Where torchvision's families keep what comes after the features.
_CLASSIFIERS = ("fc", "classifier", "head", "heads")


def build(arch: str, **options: Any) -> nn.Module:
    """`library/NAME`, with `embed_dim` set; see `dino_fast.models.build_backbone`."""
    library, _, name = arch.partition("/")
    given = [key for key in ("embed_dim", "depth", "num_heads") if key in options]
    if given:
        raise UserError(f"{arch} has its own sizes; leave out {', '.join(given)}, or take a vit_* architecture")
    return {"timm": _timm, "torchvision": _torchvision}[library](name, options)


def _timm(name: str, options: dict[str, Any]) -> nn.Module:
    try:
        import timm
    except ImportError as error:
        raise UserError("timm/... needs timm: pip install timm") from error
    if not timm.is_model(name):
        raise UserError(f"timm has no model '{name}'{nearest(name, timm.list_models())}")
    settings = {"in_chans": options.get("in_chans", 3), "drop_path_rate": options.get("drop_path_rate", 0.0)}
    # Transformers are made for one size; those that can take others interpolate their positions.
    sized = settings | {"img_size": options.get("img_size", 224), "dynamic_img_size": True}
    for more in (sized, settings, {"in_chans": settings["in_chans"]}):
        try:
            model = timm.create_model(name, pretrained=False, num_classes=0, **more)
        except TypeError:  # it has no such setting
            continue
        model.embed_dim = getattr(model, "head_hidden_size", None) or model.num_features
        return model
    raise UserError(f"timm/{name} cannot be built without its classifier; take another model")


def _torchvision(name: str, options: dict[str, Any]) -> nn.Module:
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
    taken = inspect.signature(builder).parameters
    if "aux_logits" in taken or name in ("googlenet", "inception_v3"):  # no auxiliary outputs
        settings |= {"aux_logits": False, "init_weights": True}
    model = builder(**settings)
    for attribute in _CLASSIFIERS:
        if isinstance(getattr(model, attribute, None), nn.Module):
            layers = [layer for layer in getattr(model, attribute).modules() if isinstance(layer, nn.Linear)]
            if layers:
                model.embed_dim = layers[0].in_features
                setattr(model, attribute, _kept_norm(getattr(model, attribute)))
                return cast(nn.Module, model)
    raise UserError(f"torchvision/{name} has no linear classifier to take off; take another model")


def _kept_norm(classifier: nn.Module) -> nn.Module:
    """What a classifier does before its first linear layer (a norm and a flatten, in some), or nothing."""
    before = []
    for layer in classifier.children():
        if isinstance(layer, nn.Linear):
            break
        if not isinstance(layer, nn.Dropout):
            before.append(layer)
    return nn.Sequential(*before) if before else nn.Identity()
