"""How well the attention's masks find objects: Jaccard index of the 60 %-mass mask of each head with the true masks.

Jaccard = |mask and truth| / |mask or truth| over the pixels that are not void. The published figure (Figure 4 of the
paper, its code in facebookresearch/dino#54) takes the best head for each object, the mean over an image's objects, and
the mean over images. The best single head is given beside it.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from dino_fast.defaults import torch_defaults
from dino_fast.errors import UserError
from dino_fast.eval.attention import MASS, attention_maps, mass_mask
from dino_fast.eval.common.backbone import open_backbone
from dino_fast.eval.common.frames import list_images
from dino_fast.progress import watched

_VOID = 255
# Folders of images and of masks in known layouts: PASCAL VOC, DAVIS, and the plain one.
_LAYOUTS = (("JPEGImages", "SegmentationClass"), ("JPEGImages", "Annotations"), ("images", "masks"))


def read_mask(path: Path) -> np.ndarray:
    """uint8 `[H, W]`: 0 background, 255 void, else the object's or class's number.

    In images with a palette these are the indices. In gray images of two values, the higher is object 1; in images with
    colors, each color but black is an object, numbered by rising color.
    """
    try:
        with Image.open(path) as image:
            image.load()
            if image.mode == "P":
                return np.array(image)
            pixels = np.array(image.convert("RGB" if image.mode not in ("1", "L", "I", "I;16") else "L"))
    except (OSError, ValueError, SyntaxError) as error:
        raise UserError(f"the mask {path} cannot be read: {error}") from error
    flat = pixels.astype(np.int64) if pixels.ndim == 2 else pixels.astype(np.int64) @ np.array([65536, 256, 1])
    values = np.unique(flat)
    objects = values[values > 0]
    if len(objects) > 254:
        raise UserError(f"{path} has {len(values)} colors; it is a picture, not a mask. Save masks as PNG, not JPEG")
    if pixels.ndim == 2 and not np.array_equal(objects, [_VOID]):
        return pixels  # class or object numbers, perhaps with void
    number = np.zeros(len(values), dtype=np.uint8)
    number[values > 0] = np.arange(1, len(objects) + 1)
    return number[np.searchsorted(values, flat)]


def pair_masks(data: str | Path, masks: str | Path | None = None) -> tuple[list[tuple[Path, Path]], int]:
    """((image, mask) of the same name, how many images of a VOC folder have no mask).

    `masks` is a folder laid out as `data`; without it `data` holds both, as VOC, DAVIS or `images` and `masks` do.
    Raises UserError for a mask without image or, outside VOC, an image without mask.
    """
    images, truth = _folders(Path(data).expanduser(), None if masks is None else Path(masks).expanduser())
    pictures = {str(p.relative_to(images).with_suffix("")): p for p in list_images(images)}
    found = {str(p.relative_to(truth).with_suffix("")): p for p in list_images(truth)}
    lost = sorted(found.keys() - pictures.keys())
    if lost:
        raise UserError(f"{len(lost)} masks of {truth} have no image in {images}, the first: {lost[0]}")
    bare = sorted(pictures.keys() - found.keys())
    if bare and truth.name != "SegmentationClass":
        raise UserError(f"{len(bare)} images of {images} have no mask in {truth}, the first: {bare[0]}")
    return [(pictures[name], found[name]) for name in sorted(found)], len(bare)


def jaccard(masks: Tensor, truth: Tensor, valid: Tensor | None = None) -> Tensor:
    """Jaccard index over `valid` pixels: bool `[..., H, W]`, `[H, W]` -> float64 `[...]`; of two empty masks 1."""
    if valid is not None:
        masks, truth = masks & valid, truth & valid
    both = (masks & truth).flatten(-2).sum(-1).double()
    either = (masks | truth).flatten(-2).sum(-1).double()
    return torch.where(either > 0, both / either.clamp(min=1), 1.0)


def patch_jaccard(masks: Tensor, truth: Tensor, valid: Tensor) -> Tensor:
    """`jaccard` of masks of patches, bool `[..., h, w]`, each pixel being in its patch's -> float64 `[...]`.

    Counts the pixels of each patch once, for all masks: no mask is made as large as the image.
    """
    h, w = masks.shape[-2:]
    true, all_pixels = (_per_patch(pixels, h, w) for pixels in (truth & valid, valid))  # [h, w]
    both = (masks * true).sum(dim=(-2, -1))
    either = (masks * all_pixels).sum(dim=(-2, -1)) + true.sum() - both
    return torch.where(either > 0, both / either.clamp(min=1), 1.0)


def _per_patch(pixels: Tensor, h: int, w: int) -> Tensor:
    """Set pixels of bool `[H, W]` in each patch, float64 `[h, w]`; pixel (y, x) is in (y h // H, x w // W)."""
    columns = torch.zeros(len(pixels), w, dtype=torch.float64, device="cpu")
    columns.index_add_(
        1, torch.arange(pixels.shape[1], dtype=torch.int64, device="cpu") * w // pixels.shape[1], pixels.double()
    )
    rows = torch.arange(len(pixels), dtype=torch.int64, device="cpu") * h // len(pixels)
    return torch.zeros(h, w, dtype=torch.float64, device="cpu").index_add_(0, rows, columns)


@torch_defaults()
def evaluate(
    checkpoint: str | Path,
    data: str | Path,
    masks: str | Path | None = None,
    *,
    image_size: int = 480,
    mass: float = MASS,
    which: str = "teacher",
    device: str | None = None,
) -> dict[str, Any]:
    """Jaccard index of attention masks with the masks that belong to the images (see `pair_masks`).

    Objects are the values of a mask but 0 and 255 (void): instances, or the classes of a VOC mask. Returns `jaccard`
    (the best head for each object; mean over an image's objects, then over images), `heads` (the same for each head
    alone), `best_head` and `best_head_jaccard`, `images`, `objects`, `left_out` (images without mask, images whose mask
    has no object), and the settings.
    """
    pairs, bare = pair_masks(data, masks)
    mass_mask(torch.ones(1, dtype=torch.float32, device="cpu"), mass)
    frozen = open_backbone(checkpoint, which, device)
    scores: list[Tensor] = []  # of each image, [objects, heads]
    empty = 0
    for picture, mask in watched(pairs, len(pairs), "images compared"):
        image, truth = frozen.read(picture), torch.from_numpy(read_mask(mask))
        if image.shape[1:] != truth.shape:
            sizes = [f"{size[1]}x{size[0]}" for size in (truth.shape, image.shape[1:])]
            raise UserError(f"the mask {mask} is {sizes[0]} pixels, its image {picture} is {sizes[1]}; make them equal")
        objects = [value for value in truth.unique().tolist() if value not in (0, _VOID)]
        if not objects:
            empty += 1
            continue
        _, attention = attention_maps(frozen, image, image_size)
        inside = mass_mask(attention.flatten(1), mass).view_as(attention)
        scores.append(torch.stack([patch_jaccard(inside, truth == value, truth != _VOID) for value in objects]))
    if not scores:
        raise UserError(f"no mask of the {len(pairs)} has an object in it; objects are the pixels above 0")
    heads: Sequence[float] = torch.stack([score.mean(dim=0) for score in scores]).mean(dim=0).tolist()
    return {
        "jaccard": torch.stack([score.amax(dim=1).mean() for score in scores]).mean().item(),
        "heads": heads,
        "best_head": int(np.argmax(heads)),
        "best_head_jaccard": max(heads),
        "images": len(scores),
        "objects": sum(map(len, scores)),
        "left_out": {"images without a mask": bare, "images whose mask has no object": empty},
        "mass": mass,
        "which": which,
        "image_size": image_size,
        "checkpoint": str(checkpoint),
    }


def _folders(data: Path, masks: Path | None) -> tuple[Path, Path]:
    if masks is not None:
        return data, masks
    for images, truth in _LAYOUTS:
        if (data / images).is_dir() and (data / truth).is_dir():
            return data / images, data / truth
    names = ", ".join(f"{images}/ and {truth}/" for images, truth in _LAYOUTS)
    raise UserError(f"{data} holds no masks (looked for {names}); name their folder with --masks")
