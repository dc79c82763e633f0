"""Video object segmentation on DAVIS: the masks of the first frame are carried along by the similarity of patches.

Each patch of a frame takes the mask values of its 5 most similar patches in the first and the last 7 frames, within 12
patches in both directions, weighted by softmax(similarity / 0.1). Similarities are cosines of the last block's patch
tokens. They are computed for a tile of patches against those within reach at a time, so memory stays flat.
"""

from __future__ import annotations

import itertools
import math
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from dino_fast.defaults import torch_defaults
from dino_fast.errors import UserError, nearest, unwritable
from dino_fast.eval.boundary import f_measure
from dino_fast.eval.common.backbone import Frozen, open_backbone
from dino_fast.eval.common.frames import list_images, resize
from dino_fast.eval.segment import jaccard, read_mask
from dino_fast.knn import largest
from dino_fast.progress import watched

_SIMILARITIES = 1 << 22  # held at once where the reach has no limit
_VOID = 255


@dataclass(frozen=True)
class Settings:
    """How masks are propagated from frame to frame."""

    last_frames: int = 7  # frames compared with, besides the first
    radius: int = 12  # patches in both directions that are compared; 0: all
    topk: int = 5  # most similar patches whose masks are averaged
    temperature: float = 0.1  # of the softmax over their similarities


@dataclass(frozen=True)
class Sequence:
    """A video of DAVIS: its frames and their masks, in order."""

    name: str
    frames: list[Path]
    masks: list[Path]


@torch.no_grad()
def propagate(features: Iterable[Tensor], first: Tensor, settings: Settings | None = None) -> Iterator[Tensor]:
    """Propagates the first frame's masks `[classes, h, w]` (one-hot) to each further frame.

    `features` yields each frame's patch features `[h, w, dim]`. Yields float32 `[classes, h, w]`, which sum to 1 over
    the classes.
    """
    settings = settings or Settings()
    context: deque[tuple[Tensor, Tensor]] = deque(maxlen=max(1, settings.last_frames))
    start: tuple[Tensor, Tensor] | None = None
    for frame in features:
        unit = F.normalize(frame.float(), dim=-1)
        if start is None:
            start = (unit, first.float().permute(1, 2, 0).to(unit.device))
            continue
        pairs = [start, *(context if settings.last_frames else ())]
        masks = carry(unit, torch.stack([f for f, _ in pairs]), torch.stack([m for _, m in pairs]), settings)
        context.append((unit, masks))
        yield masks.permute(2, 0, 1)


def carry(target: Tensor, sources: Tensor, masks: Tensor, settings: Settings) -> Tensor:
    """Masks `[h, w, classes]` of one frame, from its unit features `[h, w, dim]` and n earlier frames.

    `sources` `[n, h, w, dim]` are the earlier frames' unit features, `masks` `[n, h, w, classes]` their masks.
    """
    n, h, w, dim = sources.shape
    radius = settings.radius or max(h, w)
    # Tiles about as large as the reach: smaller ones copy neighbors more often, larger ones compare patches beyond it.
    side = settings.radius or max(1, math.isqrt(_SIMILARITIES // (n * h * w)))
    result = target.new_empty(h, w, masks.shape[-1])
    for (top, end), (left, right) in itertools.product(_parts(h, side), _parts(w, side)):
        low, high = max(0, top - radius), min(h, end + radius)
        near, far = max(0, left - radius), min(w, right + radius)
        queries = target[top:end, left:right].reshape(-1, dim)  # [q, dim]
        keys = sources[:, low:high, near:far].reshape(-1, dim)  # [n * s, dim]
        values = masks[:, low:high, near:far].reshape(keys.shape[0], -1)  # [n * s, classes]
        similarity = queries @ keys.T  # [q, n * s]
        out_of_reach = _beyond((top, end), (low, high), radius)[:, None, :, None].to(target.device)
        out_of_reach = out_of_reach + _beyond((left, right), (near, far), radius)[None, :, None].to(target.device)
        similarity.view(len(queries), n, -1).add_(out_of_reach.view(len(queries), 1, -1))
        value, place = largest(similarity, min(settings.topk, similarity.shape[1]))
        weight = (value / settings.temperature).softmax(dim=1)  # [q, topk]
        result[top:end, left:right] = torch.einsum("qk,qkc->qc", weight, values[place]).view(
            end - top, right - left, -1
        )
    return result


def _parts(length: int, side: int) -> list[tuple[int, int]]:
    """0 to `length` in equal parts of at most `side`."""
    count = -(-length // side)
    return [(i * length // count, (i + 1) * length // count) for i in range(count)]


def _beyond(these: tuple[int, int], those: tuple[int, int], radius: int) -> Tensor:
    """`[of these, of those]`: 0 within the radius, else -inf."""
    here, there = (torch.arange(*ends, dtype=torch.int64, device="cpu") for ends in (these, those))
    distance = (here[:, None] - there).abs()
    return torch.zeros(distance.shape, dtype=torch.float32, device="cpu").masked_fill_(distance > radius, -math.inf)


def labels_of(masks: Tensor, patch: int, height: int, width: int) -> Tensor:
    """Masks `[classes, h, w]` -> class of each pixel, int64 `[height, width]` on the CPU.

    Bilinear to the size the backbone saw, each class stretched to 0 to 1, the largest taken, then to that size.
    """
    large = F.interpolate(masks[None], scale_factor=patch, mode="bilinear", align_corners=False)[0]
    low = large.amin(dim=(1, 2), keepdim=True)
    stretched = (large - low) / (large.amax(dim=(1, 2), keepdim=True) - low).clamp(min=1e-12)
    present = large.amax(dim=(1, 2), keepdim=True) > 0
    labels = torch.where(present, stretched, large).argmax(dim=0)
    # By Pillow, as published: F.interpolate rounds a column differently here and there.
    image = Image.fromarray(labels.byte().cpu().numpy()).resize((width, height), Image.Resampling.NEAREST)
    return torch.from_numpy(np.array(image)).long()


def open_sequences(data: str | Path, names: list[str] | None = None) -> list[Sequence]:
    """The sequences of a folder in DAVIS layout: JPEGImages/[480p/]NAME/*.jpg and Annotations/[480p/]NAME/*.png.

    Raises UserError where frames and masks do not belong to each other one by one.
    """
    root = Path(data).expanduser()
    images, masks = _resolution(root / "JPEGImages"), _resolution(root / "Annotations")
    present = sorted(p.name for p in images.iterdir() if p.is_dir() and not p.name.startswith("."))
    for name in names or ():
        if name not in present:
            raise UserError(f"{images} has no sequence '{name}'{nearest(name, present)}")
    return [_sequence(images / name, masks / name) for name in names or present]


@torch_defaults()
def evaluate(
    checkpoint: str | Path,
    data: str | Path,
    *,
    sequences: list[str] | None = None,
    image_size: int = 480,
    settings: Settings | None = None,
    out: Path | None = None,
    which: str = "teacher",
    device: str | None = None,
) -> dict[str, Any]:
    """Carries the first frame's objects through each sequence and scores all frames between the first and the last.

    With `out`, masks are written there as DAVIS's own tools read them. Returns `j_mean`, `f_mean` (means over objects
    of means over frames), `jf_mean`, `sequences` with the same for each, `objects`, `frames`, and the settings.
    """
    settings = settings or Settings()
    if settings.topk < 1 or settings.radius < 0 or settings.last_frames < 0 or not settings.temperature > 0:
        raise UserError(f"{settings} cannot be: topk is at least 1, the temperature above 0, the others 0 or more")
    opened = open_sequences(data, sequences)
    frozen = open_backbone(checkpoint, which, device)
    shown = watched(opened, len(opened), "sequences")
    rows = [_score(frozen, sequence, image_size, settings, out) for sequence in shown]
    j = [value for row in rows for value in row.pop("j")]
    f = [value for row in rows for value in row.pop("f")]
    j_mean, f_mean = float(np.mean(j)), float(np.mean(f))
    return {
        "j_mean": j_mean,
        "f_mean": f_mean,
        "jf_mean": (j_mean + f_mean) / 2,
        "sequences": rows,
        "objects": len(j),
        "frames": sum(row["frames"] for row in rows),
        "image_size": image_size,
        "which": which,
        "checkpoint": str(checkpoint),
        **vars(settings),
    }


def _score(frozen: Frozen, sequence: Sequence, image_size: int, settings: Settings, out: Path | None) -> dict[str, Any]:
    truth = read_mask(sequence.masks[0])
    objects = [int(value) for value in np.unique(truth) if value not in (0, _VOID)]
    if not objects:
        raise UserError(f"the first mask of '{sequence.name}', {sequence.masks[0]}, has no object to follow")
    if len(objects) > 1 and Image.open(sequence.masks[0]).mode not in ("P", "L"):
        raise UserError(f"{sequence.masks[0]} has {len(objects)} objects by color; save masks with a palette, as DAVIS")
    height, width = truth.shape
    patch = frozen.backbone.patch_size
    size = _frame_size(height, width, image_size, patch)
    shown = torch.from_numpy(np.stack([truth == value for value in (0, *objects)]))
    shown[0] |= torch.from_numpy(truth == _VOID)
    small = F.interpolate(shown[None].float(), size=(size[0] // patch, size[1] // patch), mode="nearest-exact")[0]
    for value, mask in zip(objects, small[1:], strict=True):
        if not mask.any():
            raise UserError(f"object {value} of '{sequence.name}' is smaller than a patch; give a larger --image-size")
    features = (_features(frozen, path, (height, width), size) for path in sequence.frames)
    scores: list[tuple[list[float], list[float]]] = []
    if out is not None:
        _save(truth, out / sequence.name / f"{sequence.frames[0].stem}.png")
    for i, masks in enumerate(propagate(features, small, settings), start=1):
        labels = labels_of(masks, patch, height, width)
        if out is not None:
            lookup = np.array([0, *objects], dtype=np.uint8)
            _save(lookup[labels.numpy()], out / sequence.name / f"{sequence.frames[i].stem}.png")
        if i < len(sequence.frames) - 1:  # the first is given and, by the rules, the last does not count
            scores.append(_measures(labels, sequence.masks[i], objects, (height, width)))
    j, f = np.array(scores).mean(axis=0)  # each [objects]
    means = {"name": sequence.name, "j_mean": float(j.mean()), "f_mean": float(f.mean())}
    return {**means, "objects": len(objects), "frames": len(sequence.frames), "j": j.tolist(), "f": f.tolist()}


def _measures(labels: Tensor, path: Path, objects: list[int], size: tuple[int, int]) -> tuple[list[float], list[float]]:
    truth = torch.from_numpy(read_mask(path))
    if truth.shape != size:
        raise UserError(
            f"the mask {path} is {truth.shape[1]}x{truth.shape[0]}, the first one {size[1]}x{size[0]} pixels"
        )
    pairs = [(labels == number, truth == value) for number, value in enumerate(objects, start=1)]
    return [jaccard(*pair).item() for pair in pairs], [f_measure(*pair) for pair in pairs]


@torch.no_grad()
def _features(frozen: Frozen, path: Path, truth: tuple[int, int], size: tuple[int, int]) -> Tensor:
    """`[h, w, dim]`, the last block's normalized patch tokens."""
    image = frozen.read(path)
    if image.shape[1:] != truth:
        given = f"{image.shape[2]}x{image.shape[1]}"
        raise UserError(f"{path} is {given}, the first mask of the sequence {truth[1]}x{truth[0]} pixels")
    tokens = frozen.backbone.forward_features(frozen.normalize(resize(image, *size)[None]))[0, 1:]
    patch = frozen.backbone.patch_size
    return tokens.view(size[0] // patch, size[1] // patch, -1)


def _frame_size(height: int, width: int, side: int, patch: int) -> tuple[int, int]:
    """The shorter side is `side`, in whole patches; the longer is cut to a multiple of about 64, as in the original."""
    if side < patch:
        raise UserError(f"the image size {side} is smaller than one patch of {patch}; try --image-size {30 * patch}")
    short = round(side / patch) * patch
    step = max(patch, 64 // patch * patch)
    long = side * max(height, width) / min(height, width)
    long = int(long // step) * step or max(short, int(long // patch) * patch)
    return (short, long) if height <= width else (long, short)


def _resolution(folder: Path) -> Path:
    """The folder itself, or its 480p/ (or only) sub-folder when the sequences are one level down."""
    if not folder.is_dir():
        raise UserError(
            f"{folder} does not exist; a DAVIS folder has JPEGImages/ and Annotations/, each with sequences"
        )
    inside = sorted(p for p in folder.iterdir() if p.is_dir() and not p.name.startswith("."))
    if (folder / "480p").is_dir():
        return folder / "480p"
    if len(inside) == 1 and not any(p.is_file() for p in inside[0].iterdir()):
        return inside[0]
    return folder


def _sequence(frames: Path, masks: Path) -> Sequence:
    if not masks.is_dir():
        raise UserError(f"the sequence {frames} has no masks: {masks} does not exist")
    pictures, truth = list_images(frames), list_images(masks)
    if len(pictures) < 3:
        raise UserError(f"the sequence {frames} has {len(pictures)} frames; the first and last do not count, so give 3")
    names, marked = [p.stem for p in pictures], [p.stem for p in truth]
    if names != marked:
        only = sorted(set(names) ^ set(marked))
        raise UserError(
            f"the sequence '{frames.name}' has {len(names)} frames and {len(marked)} masks; without its counterpart is "
            f"{', '.join(only[:5])}{' ...' if len(only) > 5 else ''}. Does the video end early?"
        )
    return Sequence(frames.name, pictures, truth)


def _save(labels: np.ndarray, path: Path) -> None:
    """A PNG with VOC's palette, whose n-th color has n's bits spread from the top of its red, green and blue."""
    palette = [
        sum(((n >> (3 * bit + part)) & 1) << (7 - bit) for bit in range(3)) for n in range(256) for part in range(3)
    ]
    image = Image.fromarray(labels.astype(np.uint8)).convert("P")
    image.putpalette(palette)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        image.save(path)
    except OSError as error:
        raise unwritable(path, error) from error
