"""What a run's teacher makes of a few images: its attention over the checkpoints, neighbours, and a map of features."""

from __future__ import annotations

import base64
import contextlib
import io
import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from html import escape
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from dino_fast.data import ImageError, Source, open_source
from dino_fast.data.eval_loader import center_crop
from dino_fast.data.open import split
from dino_fast.engine.config import Config
from dino_fast.errors import UserError
from dino_fast.eval.attention import attention_maps, overlay
from dino_fast.eval.common.backbone import Frozen, open_backbone, tokens_feature
from dino_fast.knn import extract_features
from dino_fast.models import VisionTransformer

SEED = 0  # the same images every time, so that two reports of one run can be compared
ATTENDED, QUERIES, NEIGHBOURS, CHECKPOINTS = 4, 6, 6, 6
_BATCH = 64
_APART = 0.055  # of the map's side: closer thumbnails would hide each other


@dataclass(frozen=True)
class Picked:
    """Images as the backbone sees them, uint8 `[C, h, w]`, their classes (-1: none) and the classes' names, and the
    first `ATTENDED` of them as they were, uint8 `[C, H, W]`."""

    images: list[Tensor]
    originals: list[Tensor]
    labels: list[int]
    names: list[str]


def pictures(run: Path, config: Config | None, data: str | None, images: int, device: str | None) -> dict[str, str]:
    """HTML by section: `attention`, `neighbours`, `map`. Raises UserError where there is no checkpoint or no data."""
    trained = list(_checkpoints(run, device))
    if not trained:
        raise UserError("There is no complete checkpoint yet, so there is no network to ask.")
    data = data or (config.data if config else None)
    if data is None:
        raise UserError("The run's configuration does not say where its images are; give --data PATH.")
    try:
        source = open_source(data)
    except UserError as error:
        raise UserError(f"The images of the run have moved: {error}. Say where with --data PATH.") from error
    newest = trained[-1][1]
    source.channels = newest.backbone.in_chans
    bank, asked = split(source)  # to draw: two parts that share no image
    held_out = source.test is not None or (config is not None and config.hold_out > 0 and source.labels is not None)
    size = newest.size(None)
    queries = _pick(asked, max(ATTENDED, QUERIES), size, source.classes)
    known = _pick(bank, images, size, source.classes)
    feature = tokens_feature(newest.backbone)[0]
    features = [
        torch.nn.functional.normalize(extract_features(newest.backbone, _batches(newest, part.images), feature)[0])
        for part in (queries, known)
    ]
    start = _untrained(config, newest)
    compared = ([("untrained", start)] if start else []) + trained
    return {
        "attention": _attention(compared, queries),
        "neighbours": _neighbours(queries, known, features[0], features[1], len(bank), held_out),
        "map": _map(known, features[1]),
    }


def checkpoints(run: Path) -> list[tuple[str, Path]]:
    """(what to call it, folder) of the kept checkpoints by step, and which of them is the best."""
    folder = run / "checkpoints"
    found = {int(path.name[5:]): path for path in folder.glob("step-*") if path.name[5:].isdigit()}
    best = None
    with contextlib.suppress(OSError, ValueError, KeyError):  # where none was measured yet
        best = json.loads((folder / "best" / "state.json").read_bytes())["step"]
        found.setdefault(best, folder / "best")
    return [(f"step {step:,}{' (best)' if step == best else ''}", found[step]) for step in sorted(found)]


def _checkpoints(run: Path, device: str | None) -> Iterator[tuple[str, Frozen]]:
    """The teachers of at most `CHECKPOINTS` of them, the first and the last included; damaged ones are passed over."""
    kept = checkpoints(run)
    for index in sorted({round(i) for i in np.linspace(0, len(kept) - 1, CHECKPOINTS)} if kept else ()):
        name, folder = kept[index]
        try:
            yield name, open_backbone(folder, "teacher", device, tokens=False)
        except UserError:
            continue  # or dropped by the run a moment ago


def _untrained(config: Config | None, trained: Frozen) -> Frozen | None:
    """The run's first weights, drawn anew from its seed."""
    from dino_fast.engine.build import build_model

    if config is None or config.init_from is not None or not isinstance(trained.backbone, VisionTransformer):
        return None
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        backbone = build_model(config, trained.backbone.in_chans, config.drop_path_rate).backbone
        assert isinstance(backbone, VisionTransformer)
    backbone.eval().requires_grad_(False).to(trained.device)
    return replace(trained, backbone=backbone, name="untrained")


def _pick(source: Source, count: int, size: tuple[int, int], classes: list[str] | None) -> Picked:
    """`count` images drawn with the seed; the unreadable are passed over."""
    picked = Picked([], [], [], [])
    for index in np.random.default_rng(SEED).permutation(len(source)).tolist():
        if len(picked.images) == count:
            break
        try:
            image = source.read(index)
        except ImageError:
            continue
        label = source.label(index)
        label = -1 if label is None else label
        named = classes or source.classes
        picked.images.append(center_crop(image, size))
        if len(picked.originals) < ATTENDED:  # large photographs are not kept
            picked.originals.append(image)
        picked.labels.append(label)
        picked.names.append("" if label < 0 else named[label] if named else f"class {label}")
    if not picked.images:
        raise UserError("Not one of the run's images can be read. Say where others are with --data PATH.")
    return picked


def _batches(frozen: Frozen, images: list[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
    for start in range(0, len(images), _BATCH):
        batch = torch.stack(images[start : start + _BATCH])
        yield frozen.normalise(batch), torch.full((len(batch),), -1, dtype=torch.int64, device="cpu")


def _attention(compared: list[tuple[str, Frozen]], queries: Picked) -> str:
    """A row an image: itself, then the mean over the heads of each checkpoint's attention over it."""
    if not isinstance(compared[-1][1].backbone, VisionTransformer):
        return "<p class='note'>A convolutional network has no attention to draw.</p>"
    side = 2 * min(compared[-1][1].size(None))  # the published maps are of 480 pixels for networks of 224
    cells = ["<b>image</b>", *(f"<b>{escape(name)}</b>" for name, _ in compared)]
    for original, name in zip(queries.originals, queries.names, strict=False):
        drawn = []
        for at, frozen in compared:
            seen, attention = attention_maps(frozen, original, side)
            pixels = seen.expand(3, -1, -1).permute(1, 2, 0).numpy()
            picture = overlay(pixels, attention.mean(dim=0), frozen.backbone.patch_size)
            drawn.append(_image(picture, f"attention, {at}", 224))
        cells += [_image(pixels, name or "image", 224), *drawn]
    text = "Where the teacher's class token looks, as the mean over the heads of the last block. Bright: much."
    return f'<p>{text}</p><div class="maps" style="--columns:{len(compared) + 1}">{"".join(cells)}</div>'


def _neighbours(queries: Picked, known: Picked, asked: Tensor, bank: Tensor, total: int, held_out: bool) -> str:
    """A row a query: itself, then the images of the largest cosine similarity."""
    similarity, nearest = (asked[:QUERIES] @ bank.T).topk(min(NEIGHBOURS, len(bank)), dim=1)  # [QUERIES, NEIGHBOURS]
    cells = ["<b>image</b>", f'<b style="grid-column:span {nearest.shape[1]}">nearest, most alike first</b>']
    for i, (values, order) in enumerate(zip(similarity.tolist(), nearest.tolist(), strict=True)):
        cells.append(_captioned(queries, i, ""))
        for value, j in zip(values, order, strict=True):
            same = queries.labels[i] >= 0 and queries.labels[i] == known.labels[j]
            other = queries.labels[i] >= 0 and known.labels[j] >= 0 and not same
            cells.append(_captioned(known, j, f"{value:.2f}", "same" if same else "other" if other else ""))
    text = (
        f"{'Held-out' if held_out else 'Training'} images, and those closest to them (cosine) among "
        f"{len(known.images):,} of {total:,} {'' if held_out else 'other '}training images."
    )
    if any(label >= 0 for label in queries.labels):
        text += " A green frame is the same class, a dashed red one another."
    return f'<p>{text}</p><div class="maps near" style="--columns:{nearest.shape[1] + 1}">{"".join(cells)}</div>'


def _captioned(picked: Picked, index: int, text: str, style: str = "") -> str:
    picture = _image(_pixels(picked.images[index]), picked.names[index] or "image", 128)
    caption = f"<figcaption><span>{escape(picked.names[index])}</span> {text}</figcaption>"
    return f'<figure class="{style}">{picture}{caption}</figure>'


def _map(known: Picked, features: Tensor) -> str:
    """Every image a dot at its first two principal components, with thumbnails where there is room for them."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        centred = features - features.mean(dim=0)
        rank = min(2, *features.shape)
        axes = torch.pca_lowrank(centred, q=min(6, *features.shape), center=False)[2][:, :rank]
    place = centred @ axes  # [N, 2]
    place = torch.nn.functional.pad(place, (0, 2 - rank))
    share = float(place.square().sum() / centred.square().sum().clamp(min=1e-30))
    low, high = place.min(dim=0).values, place.max(dim=0).values
    place = ((place - low) / (high - low).clamp(min=1e-12)) * 0.94 + 0.03  # of the map's sides
    dots, thumbnails = [], []
    shown: list[tuple[float, float]] = []
    for (x, y), image, label, name in zip(place.tolist(), known.images, known.labels, known.names, strict=True):
        dots.append(f'<circle cx="{x * 1000:.0f}" cy="{y * 1000:.0f}" r="6" fill="{colour(label)}"/>')
        if all(max(abs(x - a), abs(y - b)) >= _APART for a, b in shown):
            shown.append((x, y))
            style = f"left:{x * 100:.1f}%;top:{y * 100:.1f}%;border-color:{colour(label)}"
            thumbnails.append(_image(_pixels(image), name, 40, f' style="{style}"'))
    classes = dict(sorted(pair for pair in zip(known.labels, known.names, strict=True) if pair[0] >= 0))
    legend = [
        f'<span><i style="background:{colour(label)}"></i>{escape(name)}</span>'
        for label, name in list(classes.items())[:20]
    ]
    legend += [f"<span>and {len(classes) - 20} more classes</span>"] if len(classes) > 20 else []
    return (
        f"<p>{len(known.images):,} images at the first two principal components of their features, which hold "
        f"{share:.0%} of the variance.{' Colours are classes, which training never saw.' if legend else ''}</p>"
        f'<div class="cloud"><svg viewBox="0 0 1000 1000" role="img" aria-label="map of the features">{"".join(dots)}'
        f'</svg>{"".join(thumbnails)}</div><div class="legend">{"".join(legend)}</div>'
    )


def colour(label: int) -> str:
    """Of a class: hues that stay apart for any number of classes; grey for none."""
    if label < 0:
        return "#888"
    return f"hsl({label * 137.508 % 360:.0f} 70% {(48, 60, 38)[label % 3]}%)"


def _pixels(image: Tensor) -> np.ndarray:
    return image.expand(3, -1, -1).permute(1, 2, 0).numpy()


def _image(pixels: np.ndarray, alt: str, side: int, attributes: str = "") -> str:
    """An `<img>` that holds its pixels. Larger pictures than `side` are shrunk; small ones keep their few pixels."""
    picture = Image.fromarray(np.ascontiguousarray(pixels))
    enlarged = max(picture.size) < side
    picture.thumbnail((side, side))
    if (pixels[..., :1] == pixels).all():
        picture = picture.convert("L")
    buffer = io.BytesIO()
    kind = "png" if enlarged or side <= 40 else "jpeg"
    picture.save(buffer, kind, **({"optimize": True} if kind == "png" else {"quality": 85}))
    data = base64.b64encode(buffer.getvalue()).decode()
    crisp = ' class="crisp"' if enlarged and side > 40 else ""
    name = escape(alt)
    return f'<img src="data:image/{kind};base64,{data}" alt="{name}" title="{name}"{crisp}{attributes}>'
