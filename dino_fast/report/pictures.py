"""Pictures of a run's teacher: attention over the checkpoints, nearest neighbors, and a map of the features."""

from __future__ import annotations

import base64
import contextlib
import io
import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

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
ATTENDED, QUERIES, NEIGHBORS, CHECKPOINTS = 4, 6, 6, 6
_BATCH = 64
_APART = 0.055  # of the map's side: closer thumbnails would hide each other


@dataclass(frozen=True)
class Images:
    """Images as the backbone sees them, uint8 `[C, h, w]`, with their labels (-1: none) and classes' names.

    `originals` are the first `ATTENDED` of them as stored, uint8 `[C, H, W]`.
    """

    images: list[Tensor]
    originals: list[Tensor]
    labels: list[int]
    names: list[str]


class Picture(NamedTuple):
    """An image of the page. `src` is a data URI; `crisp` pictures are enlarged without smoothing."""

    src: str
    alt: str
    crisp: bool


class Card(NamedTuple):
    """A captioned picture; `style` is "same" or "other" as its class compares with the query's, or empty."""

    picture: Picture
    name: str
    text: str
    style: str


class Map(NamedTuple):
    """Images at x, y from 0 to 1 with their classes' colors, and the share of the features' variance shown."""

    dots: list[tuple[float, float, str]]
    thumbnails: list[tuple[float, float, str, Picture]]
    legend: list[tuple[str, str]]  # (color, class)
    variance: float


class Pictures(NamedTuple):
    """The pictures of a page. `attention` is empty for a convolutional network."""

    networks: list[str]  # names of the checkpoints compared
    attention: list[list[Picture]]
    neighbors: list[list[Card]]
    map: Map
    images: int  # training images compared
    bank: int  # training images
    held_out: bool  # whether the queries were kept from training
    labeled: bool  # whether a query has a label


def draw_pictures(run: Path, config: Config | None, data: str | None, images: int, device: str | None) -> Pictures:
    """Pictures of the run's teachers. Raises UserError if there is no checkpoint or no data."""
    trained = list(_open_checkpoints(run, device))
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
    newest.prepare(source)
    training, asked = split(source)  # two parts that share no image
    held_out = source.test is not None or (config is not None and config.hold_out > 0 and source.labels is not None)
    size = newest.size(None)
    queries = _draw_images(asked, max(ATTENDED, QUERIES), size, source.classes)
    bank = _draw_images(training, images, size, source.classes)
    feature = tokens_feature(newest.backbone)[0]
    query_features, bank_features = (
        torch.nn.functional.normalize(extract_features(newest.backbone, _batches(newest, part.images), feature)[0])
        for part in (queries, bank)
    )
    start = _untrained(config, newest)
    networks = ([("untrained", start)] if start else []) + trained
    return Pictures(
        networks=[name for name, _ in networks],
        attention=_attention(networks, queries),
        neighbors=_neighbors(queries, bank, query_features, bank_features),
        map=_map(bank, bank_features),
        images=len(bank.images),
        bank=len(training),
        held_out=held_out,
        labeled=any(label >= 0 for label in queries.labels),
    )


def checkpoints(run: Path) -> list[tuple[str, Path]]:
    """(name, folder) of the run's checkpoints by step; the name says which is the best."""
    folder = run / "checkpoints"
    folders = {int(path.name[5:]): path for path in folder.glob("step-*") if path.name[5:].isdigit()}
    best = None
    with contextlib.suppress(OSError, ValueError, KeyError):  # where none was measured yet
        best = json.loads((folder / "best" / "state.json").read_bytes())["step"]
        folders.setdefault(best, folder / "best")
    return [(f"step {step:,}{' (best)' if step == best else ''}", folders[step]) for step in sorted(folders)]


def _open_checkpoints(run: Path, device: str | None) -> Iterator[tuple[str, Frozen]]:
    """The teachers of at most `CHECKPOINTS` of them, the first and the last included; damaged ones are passed over."""
    folders = checkpoints(run)
    for index in sorted({round(i) for i in np.linspace(0, len(folders) - 1, CHECKPOINTS)} if folders else ()):
        name, folder = folders[index]
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


def _draw_images(source: Source, count: int, size: tuple[int, int], classes: list[str] | None) -> Images:
    """`count` images drawn with the seed; the unreadable are passed over."""
    drawn = Images([], [], [], [])
    for index in np.random.default_rng(SEED).permutation(len(source)).tolist():
        if len(drawn.images) == count:
            break
        try:
            image = source.read(index)
        except ImageError:
            continue
        label = source.label(index)
        label = -1 if label is None else label
        named = classes or source.classes
        drawn.images.append(center_crop(image, size))
        if len(drawn.originals) < ATTENDED:  # large photographs are not kept
            drawn.originals.append(image)
        drawn.labels.append(label)
        drawn.names.append("" if label < 0 else named[label] if named else f"class {label}")
    if not drawn.images:
        raise UserError("Not one of the run's images can be read. Say where others are with --data PATH.")
    return drawn


def _batches(frozen: Frozen, images: list[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
    for start in range(0, len(images), _BATCH):
        batch = torch.stack(images[start : start + _BATCH])
        yield frozen.normalize(batch), torch.full((len(batch),), -1, dtype=torch.int64, device="cpu")


def _attention(networks: list[tuple[str, Frozen]], queries: Images) -> list[list[Picture]]:
    """A row an image: itself, then the mean over the heads of each network's attention. Empty for a CNN."""
    if not isinstance(networks[-1][1].backbone, VisionTransformer):
        return []
    side = 2 * min(networks[-1][1].size(None))  # the published maps are of 480 pixels for networks of 224
    rows = []
    for original, name in zip(queries.originals, queries.names, strict=False):
        maps = []
        for network, frozen in networks:
            seen, attention = attention_maps(frozen, original, side)
            pixels = _pixels(seen)
            blended = overlay(pixels, attention.mean(dim=0), frozen.backbone.patch_size)
            maps.append(_picture(blended, f"attention, {network}", 224))
        rows.append([_picture(pixels, name or "image", 224), *maps])
    return rows


def _neighbors(queries: Images, bank: Images, query_features: Tensor, bank_features: Tensor) -> list[list[Card]]:
    """A row a held-out image: itself, then the images of the largest cosine similarity."""
    similarity, nearest = (query_features[:QUERIES] @ bank_features.T).topk(
        min(NEIGHBORS, len(bank_features)), dim=1
    )  # [QUERIES, NEIGHBORS]
    rows = []
    for i, (values, order) in enumerate(zip(similarity.tolist(), nearest.tolist(), strict=True)):
        row = [_card(queries, i)]
        for value, j in zip(values, order, strict=True):
            labels = queries.labels[i], bank.labels[j]
            style = "" if min(labels) < 0 else "same" if labels[0] == labels[1] else "other"
            row.append(_card(bank, j, f"{value:.2f}", style))
        rows.append(row)
    return rows


def _card(images: Images, index: int, text: str = "", style: str = "") -> Card:
    name = images.names[index]
    return Card(_picture(_pixels(images.images[index]), name or "image", 128), name, text, style)


def _map(bank: Images, features: Tensor) -> Map:
    """Every image a dot at its first two principal components, with thumbnails where there is room for them."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        centered = features - features.mean(dim=0)
        rank = min(2, *features.shape)
        axes = torch.pca_lowrank(centered, q=min(6, *features.shape), center=False)[2][:, :rank]
    place = centered @ axes  # [N, 2]
    place = torch.nn.functional.pad(place, (0, 2 - rank))
    variance = float(place.square().sum() / centered.square().sum().clamp(min=1e-30))
    low, high = place.min(dim=0).values, place.max(dim=0).values
    place = ((place - low) / (high - low).clamp(min=1e-12)) * 0.94 + 0.03  # shares of the map's sides
    colors = [class_color(label) for label in bank.labels]
    dots = [(x, y, color) for (x, y), color in zip(place.tolist(), colors, strict=True)]
    thumbnails: list[tuple[float, float, str, Picture]] = []
    for (x, y, color), image, name in zip(dots, bank.images, bank.names, strict=True):
        if all(max(abs(x - a), abs(y - b)) >= _APART for a, b, *_ in thumbnails):
            thumbnails.append((x, y, color, _picture(_pixels(image), name, 40)))
    classes = dict(sorted(pair for pair in zip(bank.labels, bank.names, strict=True) if pair[0] >= 0))
    return Map(dots, thumbnails, [(class_color(label), name) for label, name in classes.items()], variance)


def class_color(label: int) -> str:
    """CSS color of a class: hues that stay apart for any number of classes; gray for -1."""
    if label < 0:
        return "#888"
    return f"hsl({label * 137.508 % 360:.0f} 70% {(48, 60, 38)[label % 3]}%)"


def _pixels(image: Tensor) -> np.ndarray:
    return image.expand(3, -1, -1).permute(1, 2, 0).numpy()


def _picture(pixels: np.ndarray, alt: str, side: int) -> Picture:
    """A picture at most `side` pixels large: larger ones are shrunk, small ones keep their few pixels."""
    picture = Image.fromarray(np.ascontiguousarray(pixels))
    enlarged = max(picture.size) < side
    picture.thumbnail((side, side))
    if (pixels[..., :1] == pixels).all():
        picture = picture.convert("L")
    buffer = io.BytesIO()
    kind = "png" if enlarged or side <= 40 else "jpeg"
    picture.save(buffer, kind, **({"optimize": True} if kind == "png" else {"quality": 85}))
    data = base64.b64encode(buffer.getvalue()).decode()
    return Picture(f"data:image/{kind};base64,{data}", alt, enlarged and side > 40)
