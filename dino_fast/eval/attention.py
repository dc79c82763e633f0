"""Pictures of the class token's attention: maps, overlays and masks of each head of the last block.

A mask keeps the smallest number of patches that hold a share (60 %) of a head's attention to patches: sorted rising,
those at which the running sum passes 1 - share.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from dino_fast.data import ImageError
from dino_fast.defaults import torch_defaults
from dino_fast.errors import UserError, make_folder, unwritable
from dino_fast.eval.common.backbone import Frozen, class_attention, open_backbone
from dino_fast.eval.common.frames import (
    VIDEOS,
    can_write_video,
    fit_to_patches,
    frame_rate,
    list_images,
    read_video,
    write_video,
)
from dino_fast.progress import watched

MASS = 0.6
_GAP = 4  # pixels between the pictures of a sheet


def mass_mask(attention: Tensor, mass: float = MASS) -> Tensor:
    """Non-negative `[..., N]` -> bool `[..., N]`: the largest entries, which together hold `mass` of each row's sum.

    The mask has at least one entry in each row.
    """
    if not 0 < mass <= 1:
        raise UserError(f"the mass is {mass}; it is a share above 0 and up to 1 (the usual value is 0.6)")
    value, order = attention.double().sort(dim=-1, stable=True)
    running = value.cumsum(dim=-1) / value.sum(dim=-1, keepdim=True).clamp(min=1e-300)
    inside = running > 1 - mass
    inside[..., -1] = True
    return torch.zeros_like(inside).scatter_(-1, order, inside)


def attention_maps(frozen: Frozen, image: Tensor, image_size: int) -> tuple[Tensor, Tensor]:
    """uint8 `[C, H, W]` -> (the image as the backbone saw it, uint8 `[C, h, w]`; attention `[heads, h/p, w/p]`)."""
    patch = frozen.backbone.patch_size
    seen = fit_to_patches(image, image_size, patch)
    attention = class_attention(frozen.backbone, frozen.normalize(seen[None]))[0].cpu()
    if not attention.isfinite().all():
        raise UserError("the attention is not finite: the weights are damaged or have diverged")
    return seen, attention.view(-1, seen.shape[1] // patch, seen.shape[2] // patch)


def heat(attention: Tensor, patch: int, colormap: str = "viridis") -> np.ndarray:
    """`[h, w]` -> uint8 `[h * patch, w * patch, 3]`: darkest at its least, brightest at its largest value."""
    import matplotlib

    low, high = attention.min(), attention.max()
    scaled = ((attention - low) / (high - low).clamp(min=1e-12)).numpy()
    picture: np.ndarray = (matplotlib.colormaps[colormap](scaled)[..., :3] * 255).round().astype(np.uint8)
    return picture.repeat(patch, axis=0).repeat(patch, axis=1)


def overlay(seen: np.ndarray, attention: Tensor, patch: int) -> np.ndarray:
    """The image `[h, w, 3]` with the map over it, the more opaque the more attention."""
    low, high = attention.min(), attention.max()
    share = ((attention - low) / (high - low).clamp(min=1e-12)).numpy().repeat(patch, axis=0).repeat(patch, axis=1)
    opacity = 0.25 + 0.5 * share[..., None]
    blend: np.ndarray = (seen * (1 - opacity) + heat(attention, patch, "inferno") * opacity).round().astype(np.uint8)
    return blend


def masked(seen: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """The image with all that is outside the mask dimmed, and the mask's edge in orange."""
    picture = np.where(mask[..., None], seen, seen // 4)
    padded = np.pad(mask, 1, mode="edge")
    inside = padded[:-2, 1:-1] & padded[2:, 1:-1] & padded[1:-1, :-2] & padded[1:-1, 2:]
    picture[mask & ~inside] = (255, 120, 0)
    return picture.astype(np.uint8)


def draw(seen: Tensor, attention: Tensor, patch: int, mass: float = MASS) -> dict[str, np.ndarray]:
    """Pictures of one image's attention, keyed by file name, all uint8 `[h, w, 3]` or `[h, w]`.

    `image`, `sheet`, and for each head and the heads' mean `NAME-map`, `NAME-overlay` and `NAME-mask` (white: inside).
    """
    image = seen.expand(3, -1, -1).permute(1, 2, 0).numpy()
    pictures = {"image": image}
    rows = []
    for name, one in [*((f"head{i}", one) for i, one in enumerate(attention)), ("mean", attention.mean(dim=0))]:
        mask = mass_mask(one.flatten(), mass).view_as(one).numpy().repeat(patch, axis=0).repeat(patch, axis=1)
        views = [heat(one, patch), overlay(image, one, patch)]
        pictures |= {f"{name}-map": views[0], f"{name}-overlay": views[1], f"{name}-mask": mask.astype(np.uint8) * 255}
        rows.append([image, *views, masked(image, mask)])
    pictures["sheet"] = _sheet(rows, [*(f"head {i}" for i in range(len(attention))), "mean"])
    return pictures


@torch_defaults()
def evaluate(
    checkpoint: str | Path,
    data: str | Path,
    out: Path,
    *,
    image_size: int = 480,
    mass: float = MASS,
    video: bool = False,
    fps: float | None = None,
    which: str = "teacher",
    device: str | None = None,
) -> dict[str, Any]:
    """Draws an image, every image of a folder, or with `video` the frames of a folder or of a video file, into `out`.

    An image NAME.jpg becomes the folder `out`/NAME (see `draw`). A video becomes `out`/frames/*.png, each frame beside
    its overlay of the heads' mean, and `out`/attention.mp4 where PyAV is installed. Returns `images` or `frames` (how
    many), `left_out` (messages of unreadable images), `out`, `heads`, `mp4` (its path, or the command that installs
    PyAV).
    """
    path = Path(data).expanduser()
    mass_mask(torch.ones(1, dtype=torch.float32, device="cpu"), mass)  # refuses a bad share before any time is spent
    is_file = path.is_file() and path.suffix.lower() in VIDEOS
    paths = [] if is_file else list_images(path)
    if fps is not None and not fps > 0:
        raise UserError(f"fps is {fps}; give a number of frames a second above 0")
    frozen = open_backbone(checkpoint, which, device)
    make_folder(out)
    result: dict[str, Any] = {"out": str(out), "heads": frozen.backbone.num_heads, "which": which, "left_out": []}
    result["checkpoint"] = str(checkpoint)
    if video or is_file:
        frames = read_video(path, frozen.backbone.in_chans) if is_file else _frames(frozen, paths)
        frames = watched(frames, None if is_file else len(paths), "frames drawn")
        rate = fps or (frame_rate(path) if is_file else None) or 30.0
        return result | _draw_video(frozen, frames, out, image_size, rate)
    root = path if path.is_dir() else path.parent
    stems = [str(p.relative_to(root).with_suffix("")) for p in paths]
    for p, stem in watched(zip(paths, stems, strict=True), len(paths), "images drawn"):
        try:
            image = frozen.read(p)
        except ImageError as error:
            result["left_out"].append(str(error))
            continue
        name = stem if stems.count(stem) == 1 else str(p.relative_to(root))  # a.jpg and a.png
        seen, attention = attention_maps(frozen, image, image_size)
        for part, pixels in draw(seen, attention, frozen.backbone.patch_size, mass).items():
            _save(pixels, out / name / f"{part}.png")
    result["images"] = len(paths) - len(result["left_out"])
    if not result["images"]:
        raise UserError(f"none of the {len(paths)} images can be read; the last: {result['left_out'][-1]}")
    return result


def _frames(frozen: Frozen, paths: list[Path]) -> Iterator[Tensor]:
    """The images of a folder as a video, which ends in an error at one that is unreadable or of another size."""
    first = None
    for path in paths:
        image = frozen.read(path)
        first = first or image.shape
        if image.shape != first:
            sizes = [f"{shape[2]}x{shape[1]}" for shape in (image.shape, first)]
            raise UserError(f"{path} is {sizes[0]} and the frames before it {sizes[1]}; a video has one size")
        yield image


def _draw_video(frozen: Frozen, frames: Iterable[Tensor], out: Path, image_size: int, fps: float) -> dict[str, Any]:
    written: list[Path] = []
    for number, frame in enumerate(frames):
        seen, attention = attention_maps(frozen, frame, image_size)
        image = seen.expand(3, -1, -1).permute(1, 2, 0).numpy()
        picture = np.concatenate((image, overlay(image, attention.mean(dim=0), frozen.backbone.patch_size)), axis=1)
        written.append(out / "frames" / f"{number:05d}.png")
        _save(picture, written[-1])
    missing = can_write_video()
    if not missing:
        write_video(out / "attention.mp4", (np.asarray(Image.open(p)) for p in written), fps)
    return {"frames": len(written), "mp4": missing or str(out / "attention.mp4")}


def _save(pixels: np.ndarray, path: Path) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(path, compress_level=1)  # of 6: twice the time, a seventh less
    except OSError as error:
        raise unwritable(path, error) from error


def _sheet(rows: list[list[np.ndarray]], names: list[str]) -> np.ndarray:
    """Pictures of one size in a grid, one row a head, with its name."""
    height, width = rows[0][0].shape[:2]
    shape = (len(rows) * (height + _GAP) + _GAP, len(rows[0]) * (width + _GAP) + _GAP, 3)
    sheet = np.full(shape, 176, dtype=np.uint8)  # neither black nor white
    for i, row in enumerate(rows):
        for j, picture in enumerate(row):
            top, left = _GAP + i * (height + _GAP), _GAP + j * (width + _GAP)
            sheet[top : top + height, left : left + width] = picture
    image = Image.fromarray(sheet)
    pen = ImageDraw.Draw(image)
    for i, name in enumerate(names):
        corner = (3 * _GAP, 3 * _GAP + i * (height + _GAP))
        pen.text(corner, name, fill="white", stroke_width=2, stroke_fill="black", font_size=max(10, height // 14))
    return np.asarray(image)
