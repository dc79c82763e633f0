"""The weights that a run starts from instead of drawn ones: another run's, the original's, or a released backbone."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor, nn

from dino_fast.errors import UserError
from dino_fast.loss import DINOLoss
from dino_fast.models import DINOHead, DINOv2, MultiCropWrapper, VisionTransformer
from dino_fast.models.networks import Networks, read_networks
from dino_fast.models.weights.read import backbone_state, load_weights


@torch.no_grad()
def load_pretrained(
    source: str, student: MultiCropWrapper, teacher: MultiCropWrapper, loss: DINOLoss, head: bool
) -> None:
    """Copies what `source` holds into student, teacher and centre: backbones, and with `head` the heads and the centre.

    `source` is whatever `dino-fast eval` takes. A file with one network gives it to both; without a head the heads stay
    as they were drawn. Position embeddings of another grid are interpolated. What was taken, interpolated or left out
    is told in warnings. Raises UserError naming each key that does not fit, and what would.
    """
    found = read_networks(source)
    told = []
    for name, module in (("student", student), ("teacher", teacher)):
        state = found.states.get(name) or next(iter(found.states.values()))
        told.append(_take_backbone(module.backbone, state, found, name))
        weights = {key.removeprefix("head."): tensor for key, tensor in state.items() if key.startswith("head.")}
        if head and _is_head(weights):
            told.append(", its head" + _take_head(module.head, weights, f"{source}, head of the {name}"))
            told.append(_norm_last_layer(module.head))
        told.append("; ")
    taken_head = any(part.startswith(", its head") for part in told)
    if taken_head and found.center is not None and found.center.numel() == loss.center.numel():
        loss.center.copy_(found.center.reshape(loss.center.shape))
        told.append("the centre; ")
    if not taken_head:
        told.append("the heads are new; ")
    if len(found.states) == 1:
        told.append("student and teacher start alike; ")
    others = sorted({key.split(".")[0] for key in next(iter(found.states.values())) if _of_neither(key)})
    if others:
        told.append(f"left out: {', '.join(others)}; ")
    warnings.warn(f"starting from {source}: {''.join(told).rstrip('; ')}", stacklevel=2)


def _take_backbone(backbone: nn.Module, weights: dict[str, Tensor], found: Networks, name: str) -> str:
    state, note = backbone_state(weights), f"the {name}'s backbone"
    if isinstance(backbone, VisionTransformer):
        state, resampled = _on_grid(backbone, state)
        note += resampled
    try:
        load_weights(backbone, state, f"{found.source}, backbone of the {name}")
    except UserError as error:
        fitting = found.options()
        raise UserError(f"{error}{f'. For these weights: {fitting}' if fitting else ''}") from error
    return note


def _on_grid(backbone: VisionTransformer, state: dict[str, Tensor]) -> tuple[dict[str, Tensor], str]:
    """The weights with their position embeddings brought to the backbone's grid, and what to tell about it."""
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


def _take_head(head: nn.Module, weights: dict[str, Tensor], source: str) -> str:
    """Returns what to tell of a predictor that only one of the two has."""
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
    """Brings prototypes to length 1 where the head keeps them there; returns what to tell of it.

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


def _of_neither(name: str) -> bool:
    """Whether a tensor of a full checkpoint belongs to another part, such as the second head of DINOv2."""
    return name.startswith("ibot_head.")
