"""The names that other libraries give to a vision transformer's weights, to and from the published ones.

`published` recognises a layout by names that only it has and renames without touching a value, except where the layouts
differ in kind: q, k and v are one matrix here and three in transformers; timm's models with registers have the class
token's position added into the class token.
"""

from __future__ import annotations

import re

import torch
from torch import Tensor

State = dict[str, Tensor]

# transformers' names of a block (as its files have them), ViT and DINOv2 -> ours
_BLOCK = {
    "layernorm_before": "norm1",
    "layernorm_after": "norm2",
    "attention.output.dense": "attn.proj",
    "intermediate.dense": "mlp.fc1",
    "output.dense": "mlp.fc2",
    "mlp.weights_in": "mlp.w12",
    "mlp.weights_out": "mlp.w3",
    "norm1": "norm1",
    "norm2": "norm2",
    "mlp.fc1": "mlp.fc1",
    "mlp.fc2": "mlp.fc2",
}
_OUTSIDE = {
    "embeddings.cls_token": "cls_token",
    "embeddings.position_embeddings": "pos_embed",
    "embeddings.register_tokens": "register_tokens",
    "embeddings.mask_token": "mask_token",
    "embeddings.patch_embeddings.projection.weight": "patch_embed.proj.weight",
    "embeddings.patch_embeddings.projection.bias": "patch_embed.proj.bias",
    "layernorm.weight": "norm.weight",
    "layernorm.bias": "norm.bias",
}
_LAYER = re.compile(r"encoder\.layer\.(\d+)\.(.+)")
_CHUNKED = re.compile(r"blocks\.\d+\.(\d+)\.(.+)")
_PREFIXES = ("vit.", "dinov2.", "dinov2_with_registers.")


def published(state: State) -> State:
    """The weights of a backbone under the published names, whichever library they are of; others stay as they are."""
    if any("embeddings.patch_embeddings." in name for name in state):
        return from_transformers(state)
    state = {_CHUNKED.sub(r"blocks.\1.\2", name): t for name, t in state.items()}  # DINOv2 trains blocks in chunks
    return _from_timm(state) if _is_timm(state) else state


def from_transformers(state: State) -> State:
    """From a `ViTModel`, `Dinov2Model` or `Dinov2WithRegistersModel`; the pooler and a classifier are left out."""
    found: State = {}
    parts: dict[str, dict[str, Tensor]] = {}
    for given, tensor in state.items():
        name = next((given.removeprefix(p) for p in _PREFIXES if given.startswith(p)), given)
        if name.startswith(("pooler.", "classifier.")):
            continue
        layer = _LAYER.fullmatch(name)
        if layer is None:
            found[_OUTSIDE.get(name, name)] = tensor
            continue
        block, inner = layer.groups()
        stem, _, kind = inner.rpartition(".")
        if stem in ("attention.attention.query", "attention.attention.key", "attention.attention.value"):
            parts.setdefault(f"blocks.{block}.attn.qkv.{kind}", {})[stem.rpartition(".")[2]] = tensor
        elif kind == "lambda1":
            found[f"blocks.{block}.ls{stem[-1]}.gamma"] = tensor
        else:
            found[f"blocks.{block}.{_BLOCK.get(stem, stem)}.{kind}"] = tensor
    for name, pieces in parts.items():
        if len(pieces) == 3:
            found[name] = torch.cat([pieces["query"], pieces["key"], pieces["value"]])
    return found


def to_transformers(state: State, dinov2: bool) -> State:
    """The published names as transformers' files have them, of `ViTModel` or of the DINOv2 models."""
    outside = {ours: theirs for theirs, ours in _OUTSIDE.items()}
    vit = ("layernorm_before", "layernorm_after", "intermediate.dense", "output.dense")
    block = {
        ours: theirs
        for theirs, ours in _BLOCK.items()
        if theirs == "attention.output.dense" or (theirs not in vit if dinov2 else theirs in vit)
    }
    found: State = {}
    for name, tensor in state.items():
        if not name.startswith("blocks."):
            found[outside[name]] = tensor
            continue
        _, number, inner = name.split(".", 2)
        stem, _, kind = inner.rpartition(".")
        prefix = f"encoder.layer.{number}"
        if stem == "attn.qkv":
            for part, piece in zip(("query", "key", "value"), tensor.chunk(3), strict=True):
                found[f"{prefix}.attention.attention.{part}.{kind}"] = piece.contiguous()
        elif stem in ("ls1", "ls2"):
            found[f"{prefix}.layer_scale{stem[-1]}.lambda1"] = tensor
        else:
            found[f"{prefix}.{block[stem]}.{kind}"] = tensor
    return found


def to_timm(state: State) -> State:
    """The published names as timm's models have them; the mask token, which no model of timm has, is left out."""
    found = {name: tensor for name, tensor in state.items() if name != "mask_token"}
    if "register_tokens" in found:
        found["reg_token"] = found.pop("register_tokens")
        found["cls_token"] = found["cls_token"] + found["pos_embed"][:, :1]
        found["pos_embed"] = found["pos_embed"][:, 1:].contiguous()
    return {name.replace(".mlp.w12.", ".mlp.fc1.").replace(".mlp.w3.", ".mlp.fc2."): t for name, t in found.items()}


def _is_timm(state: State) -> bool:
    return "reg_token" in state or _gated(state)


def _gated(state: State) -> bool:
    """Whether fc1 makes both halves of a gated MLP, which timm does not show in its names."""
    first, second = state.get("blocks.0.mlp.fc1.weight"), state.get("blocks.0.mlp.fc2.weight")
    return first is not None and second is not None and first.shape[0] == 2 * second.shape[1]


def _from_timm(state: State) -> State:
    gated = _gated(state)
    found = dict(state)
    if "reg_token" in found:
        found["register_tokens"] = found.pop("reg_token")
        if "pos_embed" in found:  # the class token's own position is in the class token already
            table = found["pos_embed"]
            found["pos_embed"] = torch.cat((torch.zeros_like(table[:, :1]), table), dim=1)
    if gated:
        found = {
            name.replace(".mlp.fc1.", ".mlp.w12.").replace(".mlp.fc2.", ".mlp.w3."): t for name, t in found.items()
        }
    return found
