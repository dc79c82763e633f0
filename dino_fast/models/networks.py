"""What a file holds for a run to start from: student, teacher, heads, centre; and the models of timm."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dino_fast.errors import UserError, nearest
from dino_fast.models import ARCHITECTURES, VisionTransformer
from dino_fast.models.weights.read import architectures, backbone_from, backbone_state, extras_of, read, sizes_of


class Networks(NamedTuple):
    """What a file holds for a run to start from."""

    source: str
    states: dict[str, dict[str, Tensor]]  # of "student" and "teacher", or of one where the file has one network
    center: Tensor | None
    facts: dict[str, Any]

    def options(self) -> str:
        """The options of `dino-fast train` that fit the backbone, or nothing where it is no vision transformer."""
        state = backbone_state(next(iter(self.states.values())))
        try:
            sizes = sizes_of(state, self.facts, self.source)
        except UserError:
            return ""
        extras = extras_of(state)
        known = architectures() if extras else ARCHITECTURES
        fitting = [n for n, size in known.items() if size[:2] == (sizes["embed_dim"], sizes["depth"])]
        if extras:
            fitting = [name for name in fitting if name.endswith("_reg") == bool(extras["registers"])]
            fitting = [name for name in fitting if name.startswith("dinov2")]
        named = fitting[0] if fitting else f"vit_small --embed-dim {sizes['embed_dim']} --depth {sizes['depth']}"
        channels = "" if sizes["in_chans"] == 3 else f" --channels {sizes['in_chans']}"
        return f"--arch {named} --patch-size {sizes['patch_size']}{channels}"


def read_networks(path: str | Path) -> Networks:
    """Student and teacher of a full checkpoint, or the one network of any other file, `hub:NAME` or `timm:NAME`."""
    if str(path).startswith("timm:"):
        backbone, facts = timm_backbone(str(path).removeprefix("timm:"))
        return Networks(str(path), {"teacher": dict(backbone.state_dict())}, None, facts)
    found: dict[str, dict[str, Tensor]] = {}
    facts = {}
    problem = None
    for which in ("teacher", "student"):
        try:
            found[which], facts = read(Path(path), which)
        except UserError as error:
            problem = problem or error
    if problem is not None and not found:
        raise problem
    both = list(found.values())
    if (
        len(both) == 2
        and both[0].keys() == both[1].keys()
        and all(torch.equal(both[0][n], both[1][n]) for n in both[0])
    ):
        found.pop("student")
    try:
        center = read(Path(path), "dino_loss")[0].get("center")
    except UserError:
        center = None  # a file of backbones alone
    return Networks(str(path), found, center, facts)


def timm_backbone(name: str) -> tuple[VisionTransformer, dict[str, Any]]:
    """The backbone of that name with timm's weights, and the `mean` and `std` that go with them."""
    try:
        import timm
    except ImportError as error:
        raise UserError(f"timm:{name} needs the package timm: pip install timm") from error
    if name.split(".")[0] not in timm.list_models():
        near = nearest(name, timm.list_models("vit_*", pretrained=True))
        raise UserError(f"timm has no model '{name}'{near or '; one that it has is vit_small_patch16_224.dino'}")
    try:
        model: Any = timm.create_model(name, pretrained=True, num_classes=0)
    except (RuntimeError, OSError, ValueError) as error:
        raise UserError(
            f"timm cannot provide the weights of '{name}' ({str(error).splitlines()[0]}). Download them where there is "
            "a network and give the file"
        ) from error
    if not hasattr(model, "blocks") or not hasattr(model, "patch_embed") or not hasattr(model.blocks[0].attn, "qkv"):
        raise UserError(f"timm's '{name}' is not a plain vision transformer, for example vit_small_patch16_224.dino")
    size = tuple(model.patch_embed.img_size)
    sizes = {"img_size": size, "num_heads": model.blocks[0].attn.num_heads}
    backbone = backbone_from(model.state_dict(), sizes, f"timm:{name}")
    config = model.pretrained_cfg
    return backbone, {key: config[key] for key in ("mean", "std") if key in config}
