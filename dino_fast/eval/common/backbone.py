"""The frozen network of an evaluation: opened from a run, a file of weights or `timm:NAME`; its features and attention.

A feature is a function of images `[B, C, H, W]` to `[B, dim]`. The attention of the class token is computed from the
queries and keys of the last block, so that fused and packed attention, which keep no matrix, give it too.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dino_fast.augment import IMAGENET_MEAN, IMAGENET_STD
from dino_fast.cpus import shorten_spinning
from dino_fast.data import Source
from dino_fast.data.deep_pixels import Range, range_of
from dino_fast.data.source import configure
from dino_fast.errors import UserError
from dino_fast.eval.common.frames import read_image
from dino_fast.models import VisionTransformer, load_backbone

Feature = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Frozen:
    """A backbone in evaluation mode on its device, with the statistics its images are normalized by."""

    backbone: VisionTransformer
    mean: tuple[float, ...]
    std: tuple[float, ...]
    name: str
    which: str
    device: torch.device
    pixel_range: Range | None = None  # that it was trained with, of images of more than 8 bits

    def prepare(self, source: Source) -> None:
        """Has the images of `source` read as the backbone takes them."""
        configure(source, self.backbone.in_chans, self.pixel_range)

    def read(self, path: Path) -> Tensor:
        """The image in a file, `[C, H, W]` as the backbone takes it. Raises ImageError naming the file."""
        return read_image(path, self.backbone.in_chans, self.pixel_range)

    def normalize(self, images: Tensor) -> Tensor:
        """Pixels from 0 to 255, `[B, C, H, W]` -> float32 on the backbone's device, as it was trained."""
        from dino_fast.augment import statistics

        offset, scale = statistics(self.mean, self.std, images.shape[1])
        return images.float().div(255).sub(offset).div(scale).to(self.device)

    def size(self, image_size: int | None) -> tuple[int, int]:
        """Height and width in pixels: those asked for, or those the position embeddings were learned for."""
        height, width = self.backbone.img_size if image_size is None else (image_size, image_size)
        patch = self.backbone.patch_size
        if height % patch or width % patch or min(height, width) < patch:
            near = max(1, round(height / patch)) * patch
            raise UserError(f"--image-size {height} is not a multiple of the patch size {patch}; try {near}")
        return height, width


def pick_device(device: str | None) -> torch.device:
    """The device of that name, or the GPU where there is one; the host's threads do not spin long from now on.

    Raises UserError for one that is not there.
    """
    shorten_spinning()
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        picked = torch.device(device)
        torch.empty(0, dtype=torch.float32, device=picked)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"the device '{device}' cannot be used ({reason}); try --device cpu") from error
    return picked


def open_backbone(
    checkpoint: str | Path, which: str = "teacher", device: str | None = None, tokens: bool = True
) -> Frozen:
    """Opens a run, a checkpoint, a weights file or folder, `hub:NAME` of torch.hub, or `timm:NAME` that timm downloads.

    Raises UserError where it is not a vision transformer as DINO names it, or a key does not fit. With
    `tokens` False other libraries' models are taken too: a ResNet-50 of the original's, or a run's `timm/NAME`.
    """
    from dino_fast.models.weights.pretrained import timm_backbone
    from dino_fast.models.weights.read import describe

    where = pick_device(device)
    if str(checkpoint).startswith("timm:"):
        backbone, facts = timm_backbone(str(checkpoint).removeprefix("timm:"))
    else:
        facts = describe(checkpoint, which=which)
        backbone = load_backbone(checkpoint, which=which)
    if tokens and not isinstance(backbone, VisionTransformer):
        raise UserError(
            f"{checkpoint} is {getattr(backbone, 'arch', type(backbone).__name__)}, another library's model, of which "
            "pooled features are read, no tokens and no attention: 'dino-fast eval' knn, linear or retrieval judge it"
        )
    backbone.eval().requires_grad_(False).to(where)
    mean, std = (tuple(facts.get(name, default)) for name, default in (("mean", IMAGENET_MEAN), ("std", IMAGENET_STD)))
    limits = range_of(facts.get("bit_depth"), facts.get("pixel_range"))
    return Frozen(backbone, mean, std, str(checkpoint), which, where, limits)


def tokens_feature(backbone: VisionTransformer, blocks: int = 1, patch_mean: bool = False) -> tuple[Feature, str]:
    """A function from images `[B, C, H, W]` to features `[B, width]`, and the feature's name.

    The feature is the normalized class tokens of the last `blocks` blocks side by side, width `blocks * dim`; with
    `patch_mean` also the mean of the last block's patch tokens, width `(blocks + 1) * dim`. Of a convolutional network
    it is the pooled output. Raises UserError for `blocks` out of range.
    """
    if not isinstance(backbone, VisionTransformer):
        if patch_mean:
            raise UserError("--patch-mean needs patch tokens, which a convolutional network has not")
        return backbone, f"pooled features [{backbone.embed_dim}]"
    depth = len(backbone.blocks)
    if not 1 <= blocks <= depth:
        raise UserError(
            f"the class tokens of {blocks} blocks were asked for; the backbone has {depth}: give 1 to {depth}"
        )

    def feature(images: Tensor) -> Tensor:
        layers = backbone.get_intermediate_layers(images, blocks)
        parts = [layer[:, 0] for layer in layers]
        if patch_mean:
            parts.append(layers[-1][:, 1:].mean(dim=1))
        return torch.cat(parts, dim=1)

    width = backbone.embed_dim * (blocks + patch_mean)
    named = f"class token of the last {blocks} blocks" if blocks > 1 else "class token"
    return feature, f"{named}{' and mean patch token' if patch_mean else ''} [{width}]"


@torch.no_grad()
def class_attention(backbone: nn.Module, images: Tensor) -> Tensor:
    """Attention of the class token to each patch in the last block, `[B, heads, N]`.

    A row's sum is at most 1: the rest goes to the class token itself and to registers.
    Read off the packed queries and keys as they leave `blocks[-1].attn.qkv`, so memory is linear in N, whatever
    computes the attention.
    """
    attention: Any = backbone.blocks[-1].attn  # type: ignore[index, union-attr]
    caught: list[Tensor] = []
    hook = attention.qkv.register_forward_hook(lambda module, given, out: caught.append(out))
    try:
        backbone.forward_features(images)  # type: ignore[operator]  # which runs all of the last block
    finally:
        hook.remove()
    qkv = caught[0].unflatten(-1, (3, attention.num_heads, -1))  # [..., 3, H, d], all tokens of all images
    q, k, _ = qkv.reshape(len(images), -1, *qkv.shape[-3:]).permute(2, 0, 3, 1, 4).unbind(0)  # [B, H, 1 + N, d]
    scores = (q[:, :, :1].float() @ k.float().transpose(-2, -1)).squeeze(2) * q.shape[-1] ** -0.5  # [B, H, 1 + N]
    weights: Tensor = scores.softmax(dim=-1)
    return weights[:, :, 1 + getattr(backbone, "registers", 0) :]
