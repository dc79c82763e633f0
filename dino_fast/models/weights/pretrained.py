"""The weights that a run starts from instead of drawn ones: another run's, the original's, or a released backbone."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from dino_fast.errors import UserError, nearest
from dino_fast.loss import DINOLoss
from dino_fast.models.dinov2 import DINOv2
from dino_fast.models.head import DINOHead
from dino_fast.models.multi_crop_wrapper import MultiCropWrapper
from dino_fast.models.registry import ARCHITECTURES, transformer_sizes
from dino_fast.models.vit import VisionTransformer
from dino_fast.models.weights.read import (
    backbone_from,
    backbone_state,
    extras_of,
    load_weights,
    read,
    sizes_of,
)


@torch.no_grad()
def load_pretrained(
    source: str, student: MultiCropWrapper, teacher: MultiCropWrapper, loss: DINOLoss, head: bool
) -> None:
    """Copies the weights in `source` into student, teacher and center: backbones; with `head` also heads and center.

    `source` is anything that `dino-fast eval` takes. A file with one network gives it to both; without a head the heads
    stay as they were drawn. Position embeddings of another grid are interpolated. A warning says which weights were
    taken, interpolated or left out. Raises UserError naming each key that does not fit, and the options that would fit.
    """
    weights = read_pretrained(source)
    notes = []
    for name, module in (("student", student), ("teacher", teacher)):
        state = weights.states.get(name) or next(iter(weights.states.values()))
        notes.append(_load_backbone(module.backbone, state, weights, name))
        head_state = {key.removeprefix("head."): tensor for key, tensor in state.items() if key.startswith("head.")}
        if head and _is_head(head_state):
            notes.append(", its head" + _load_head(module.head, head_state, f"{source}, head of the {name}"))
            notes.append(_norm_last_layer(module.head))
        notes.append("; ")
    has_head = any(note.startswith(", its head") for note in notes)
    if has_head and weights.center is not None and weights.center.numel() == loss.center.numel():
        loss.center.copy_(weights.center.reshape(loss.center.shape))
        notes.append("the center; ")
    if not has_head:
        notes.append("the heads are new; ")
    if len(weights.states) == 1:
        notes.append("student and teacher start alike; ")
    others = sorted({key.split(".")[0] for key in next(iter(weights.states.values())) if _is_other_part(key)})
    if others:
        notes.append(f"left out: {', '.join(others)}; ")
    warnings.warn(f"starting from {source}: {''.join(notes).rstrip('; ')}", stacklevel=2)


def _load_backbone(backbone: nn.Module, state: dict[str, Tensor], weights: PretrainedWeights, name: str) -> str:
    """Loads the backbone; returns the note about it."""
    state, note = backbone_state(state), f"the {name}'s backbone"
    if isinstance(backbone, VisionTransformer):
        state, resampled = _on_grid(backbone, state)
        note += resampled
    try:
        load_weights(backbone, state, f"{weights.source}, backbone of the {name}")
    except UserError as error:
        fitting = weights.options()
        raise UserError(f"{error}{f'. For these weights: {fitting}' if fitting else ''}") from error
    return note


def _on_grid(backbone: VisionTransformer, state: dict[str, Tensor]) -> tuple[dict[str, Tensor], str]:
    """The weights with their position embeddings brought to the backbone's grid, and the note about it."""
    table = state.get("pos_embed")
    rows, columns = backbone.grid
    if table is None or table.ndim != 3 or table.shape[1] == 1 + rows * columns or table.shape[1] < 2:
        return state, ""
    side = round((table.shape[1] - 1) ** 0.5)
    if side * side != table.shape[1] - 1 or table.shape[2] != backbone.embed_dim:
        return state, ""
    patch = backbone.patch_size
    like = type(backbone)(side * patch, patch, embed_dim=backbone.embed_dim, depth=0, num_heads=backbone.num_heads)
    if isinstance(like, DINOv2) and isinstance(backbone, DINOv2):
        like.antialias = backbone.antialias
    like.pos_embed.copy_(table)
    note = f" (positions interpolated from {side}x{side} to {rows}x{columns} patches)"
    return {**state, "pos_embed": like.position_embedding(rows, columns).clone()}, note


def _load_head(head: nn.Module, weights: dict[str, Tensor], source: str) -> str:
    """Loads the head; returns the note about a predictor that only one of the two has."""
    note = ""
    own = {name: tensor for name, tensor in head.state_dict().items() if name.startswith("predictor.")}
    given = [name for name in weights if name.startswith("predictor.")]
    if own and not given:
        weights, note = {**weights, **own}, " (the predictor is new)"
    elif given and not own:
        weights, note = {n: w for n, w in weights.items() if n not in given}, " (without its predictor)"
    try:
        load_weights(head, weights, source)
    except UserError as error:
        last = weights.get("last_layer.weight_v")
        fitting = (
            f" (this one's --out-dim is {last.shape[0]}, its --head-bottleneck-dim {last.shape[1]})"
            if last is not None
            else ""
        )
        raise UserError(f"{error}; --no-init-head starts with new heads{fitting}") from error
    return note


def _norm_last_layer(head: nn.Module) -> str:
    """Scales prototypes to length 1 where the head keeps them at it; returns the note about it.

    The loaded lengths would otherwise stay for good: `weight_g` is frozen, so that neither the student nor the
    teacher's moving average changes it.
    """
    if not isinstance(head, DINOHead) or not head.norm_last_layer:
        return ""
    length = head.last_layer.weight_g
    low, high = length.min().item(), length.max().item()
    length.fill_(1)
    return "" if low == high == 1 else f" (prototypes of length {low:.3f} to {high:.3f} brought to 1: norm_last_layer)"


def _is_head(weights: dict[str, Tensor]) -> bool:
    return any(name.startswith(("mlp.", "last_layer.")) for name in weights)


def _is_other_part(name: str) -> bool:
    """Whether a tensor of a full checkpoint is of neither backbone nor head, such as the second head of DINOv2."""
    return name.startswith("ibot_head.")


# ---- files ----


class PretrainedWeights(NamedTuple):
    """The networks in a file for a run to start from."""

    source: str
    states: dict[str, dict[str, Tensor]]  # keys "student" and "teacher", or one where the file has one network
    center: Tensor | None
    facts: dict[str, Any]

    def options(self) -> str:
        """The options of `dino-fast train` that fit the backbone; empty where it is no vision transformer."""
        state = backbone_state(next(iter(self.states.values())))
        try:
            sizes = sizes_of(state, self.facts, self.source)
        except UserError:
            return ""
        extras = extras_of(state)
        known = transformer_sizes() if extras else ARCHITECTURES
        fitting = [n for n, size in known.items() if size[:2] == (sizes["embed_dim"], sizes["depth"])]
        if extras:
            fitting = [name for name in fitting if name.endswith("_reg") == bool(extras["registers"])]
            fitting = [name for name in fitting if name.startswith("dinov2")]
        named = fitting[0] if fitting else f"vit_small --embed-dim {sizes['embed_dim']} --depth {sizes['depth']}"
        channels = "" if sizes["in_chans"] == 3 else f" --channels {sizes['in_chans']}"
        return f"--arch {named} --patch-size {sizes['patch_size']}{channels}"


def read_pretrained(path: str | Path) -> PretrainedWeights:
    """Student and teacher of a full checkpoint, or the one network of any other file, `hub:NAME` or `timm:NAME`."""
    if str(path).startswith("timm:"):
        backbone, facts = timm_backbone(str(path).removeprefix("timm:"))
        return PretrainedWeights(str(path), {"teacher": dict(backbone.state_dict())}, None, facts)
    states: dict[str, dict[str, Tensor]] = {}
    facts = {}
    problem = None
    for which in ("teacher", "student"):
        try:
            states[which], facts = read(Path(path), which)
        except UserError as error:
            problem = problem or error
    if problem is not None and not states:
        raise problem
    both = list(states.values())
    if (
        len(both) == 2
        and both[0].keys() == both[1].keys()
        and all(torch.equal(both[0][n], both[1][n]) for n in both[0])
    ):
        states.pop("student")
    try:
        center = read(Path(path), "dino_loss")[0].get("center")
    except UserError:
        center = None  # a file of backbones alone
    return PretrainedWeights(str(path), states, center, facts)


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
