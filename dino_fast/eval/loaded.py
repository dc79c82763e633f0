"""A trained backbone that takes images as they are: `dino_fast.load` gives one, and the Hugging Face Hub keeps them."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from dino_fast.data import ImageError, Source
from dino_fast.data.eval_loader import center_crop
from dino_fast.data.formats.python import image_pixels
from dino_fast.defaults import torch_defaults
from dino_fast.errors import UserError
from dino_fast.eval.common.backbone import Feature, Frozen, open_backbone
from dino_fast.models import VisionTransformer
from dino_fast.models.weights.hub_folder import download_folder, write_folder

FEATURES = ("cls", "mean", "patches")
_BATCH = 64  # images of a forward pass
try:
    from huggingface_hub import ModelHubMixin
except ImportError:  # an optional extra

    class ModelHubMixin:  # type: ignore[no-redef]
        """Says what the methods of the Hub need."""

        def save_pretrained(self, *_: Any, **__: Any) -> Any:
            """Raises UserError."""
            raise UserError("the Hugging Face Hub needs the package huggingface_hub: pip install 'dino-fast[hub]'")

        push_to_hub = save_pretrained


class Backbone(nn.Module, ModelHubMixin):  # type: ignore[misc]
    """A backbone in evaluation mode, with the preparation of images that it was trained with.

    Call it with an image of PIL, an array, a tensor, a path, or a list or batch of them, of any sizes: features
    float32 [images, dim]. `backbone` is the network itself, for images that are normalized already; `mean` and `std`
    are what to normalize by, `size` is (height, width).
    """

    def __init__(self, frozen: Frozen) -> None:
        super().__init__()
        self.backbone = frozen.backbone
        self.mean, self.std, self.name, self.which = frozen.mean, frozen.std, frozen.name, frozen.which
        self.size: tuple[int, int] = frozen.size(None)
        self.eval().requires_grad_(False)

    @classmethod
    def open(cls, run_or_file: str | os.PathLike[str], which: str = "teacher", device: str | None = None) -> Backbone:
        """Opens what `--checkpoint` takes. Raises UserError for what cannot be read."""
        return cls(open_backbone(os.fspath(run_or_file), which, device, tokens=False))

    @property
    def device(self) -> torch.device:
        """Where its weights are."""
        return next(self.backbone.parameters()).device

    @property
    def embed_dim(self) -> int:
        """The number of features of an image."""
        return int(self.backbone.embed_dim)

    @property
    def in_chans(self) -> int:
        """1 (gray) or 3 (RGB)."""
        return int(self.backbone.in_chans)

    @torch_defaults()
    @torch.no_grad()
    def forward(self, images: Any, features: str = "cls") -> Tensor:
        """Features of one image or many, float32 on the backbone's device.

        Args:
            images: an image of PIL; an array or tensor [H, W], [H, W, C], [C, H, W] or a batch [N, ...] of them; a
                path; or a list of these. Pixels are uint8, or floats from 0 to 1. Also a source of `dino_fast.data`.
            features: "cls", the class token (the pooled features of a convolutional network): [N, dim]; "mean", the
                mean of the patch tokens: [N, dim]; "patches": [N, patches, dim], row by row.

        Raises UserError for what is no image, naming its place.
        """
        take = feature_of(self.backbone, features)
        made: list[Tensor] = []
        batch: list[Tensor] = []
        for pixels in _pixels_of(images, self.in_chans):
            batch.append(center_crop(pixels, self.size))
            if len(batch) == _BATCH:
                made.append(take(self.normalize(torch.stack(batch))).float())
                batch = []
        if batch:
            made.append(take(self.normalize(torch.stack(batch))).float())
        if not made:
            raise UserError("there are no images to take features of")
        return torch.cat(made)

    def normalize(self, images: Tensor) -> Tensor:
        """uint8 `[B, C, H, W]` -> float32 on the backbone's device, as it was trained."""
        return Frozen(self.backbone, self.mean, self.std, self.name, self.which, self.device).normalize(images)

    # ---- the Hugging Face Hub: save_pretrained(folder) and push_to_hub(repository) are the mixin's ----

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls, path_or_repository: str | os.PathLike[str], **options: Any
    ) -> Backbone:
        """The backbone in a folder that `save_pretrained` or `dino-fast export --format hub` wrote, or a repository.

        `options` are those of the Hub (revision, token, cache_dir, force_download, local_files_only) and `device`. Runs
        and files are taken as by `dino_fast.load`. Raises UserError for what cannot be read or had.
        """
        device = options.pop("device", None)
        path = Path(path_or_repository).expanduser()
        if not path.exists():
            path = download_folder(str(path_or_repository), **options)
        return cls.open(path, device=device)

    def _save_pretrained(self, save_directory: Path) -> None:
        write_folder(self.backbone, save_directory, {"mean": list(self.mean), "std": list(self.std)})


def feature_of(backbone: Any, features: str) -> Feature:
    """A function from normalized images [B, C, H, W] to "cls" [B, dim], "mean" [B, dim] or "patches" [B, N, dim]."""
    if features not in FEATURES:
        raise UserError(f"features is {features!r}; accepted: {', '.join(FEATURES)}")
    if not isinstance(backbone, VisionTransformer):
        if features != "cls":
            name = getattr(backbone, "arch", type(backbone).__name__)
            raise UserError(f"{features!r} needs patch tokens, and {name} gives one feature an image: use 'cls'")
        return backbone  # type: ignore[no-any-return]
    if features == "cls":
        return backbone

    def take(images: Tensor) -> Tensor:
        patches = backbone.get_intermediate_layers(images, 1)[0][:, 1:]
        return patches.mean(dim=1) if features == "mean" else patches

    return take


def _pixels_of(images: Any, channels: int) -> Iterator[Tensor]:
    """uint8 [channels, H, W] of each image. Raises UserError naming the place of one that cannot be read."""
    if isinstance(images, Source):
        images.channels = channels
        for index in range(len(images)):
            yield images.read(index)
        return
    many = isinstance(images, list | tuple) or (isinstance(images, np.ndarray | Tensor) and images.ndim == 4)
    for place, image in enumerate(images if many else [images]):
        try:
            yield image_pixels(image, channels)
        except ImageError as error:
            raise UserError(f"image {place}: {error}" if many else str(error)) from error
