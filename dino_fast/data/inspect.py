"""`data check`: every image read once, and a report of what was found; `data preview`: a picture of the crops."""

from __future__ import annotations

import contextlib
import io
import time
from collections import Counter
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from PIL import Image, ImageDraw
from torch import Tensor

from dino_fast.augment import MultiCrop, pair
from dino_fast.data.decode import ImageError
from dino_fast.data.source import Source
from dino_fast.errors import UserError
from dino_fast.ops.multi_crop import to_pillow
from dino_fast.progress import watched
from dino_fast.seeding import derive_seed

_TIMED = 32  # images whose crops are timed
_SECONDS = 2.0  # after which no more of them are
_GAP = 4  # pixels between the pictures of a preview
_MARKS = ("#e4572e", "#2e86e4")  # boxes of global crops, of local crops


class Seen(NamedTuple):
    """What one image turned out to be; `reason` is empty unless it cannot be read."""

    height: int
    width: int
    kind: str
    label: int | None
    reason: str


@dataclass
class Report:
    """What `check` found in a source."""

    images: int = 0
    heights: list[int] = field(default_factory=list)
    widths: list[int] = field(default_factory=list)
    kinds: Counter[str] = field(default_factory=Counter)  # format and colour mode -> images
    labels: Counter[int | None] = field(default_factory=Counter)
    bad: list[str] = field(default_factory=list)
    seconds: float = 0.0


def check(source: Source, limit: int | None = None, workers: int = 2) -> Report:
    """Reads the images (or `limit` of them, evenly spread) in threads; decoding releases Python's lock."""
    if limit is not None and limit < 1:
        raise UserError(f"--limit is {limit}; give 1 or more images to look at, or leave it out to look at all")
    if workers < 1:
        raise UserError(f"--workers is {workers}; give 1 or more threads")
    count = min(limit or len(source), len(source))
    indices = [i * len(source) // count for i in range(count)]
    report = Report()
    source.prepare()  # so that the time of imports is not taken for that of reading
    start = time.perf_counter()
    with ThreadPoolExecutor(workers) as pool:
        # Some at a time: all at once would be millions of futures.
        for seen in watched(_in_order(pool, source, indices, 64 * workers), len(indices), "images read"):
            report.images += 1
            if seen.reason:
                report.bad.append(seen.reason)
                continue
            report.heights.append(seen.height)
            report.widths.append(seen.width)
            report.kinds[seen.kind] += 1
            report.labels[seen.label] += 1
    report.seconds = time.perf_counter() - start
    return report


def _in_order(pool: ThreadPoolExecutor, source: Source, indices: list[int], ahead: int) -> Iterable[Seen]:
    for start in range(0, len(indices), ahead):
        yield from pool.map(lambda index: _look(source, index), indices[start : start + ahead])


def crops_per_second(source: Source, crops: MultiCrop) -> float:
    """Images a second that one core reads and cuts into crops, from a few of them; 0 where none can be read."""
    generator, threads = torch.Generator().manual_seed(0), torch.get_num_threads()
    times: list[float] = []
    torch.set_num_threads(1)
    try:
        for index in range(0, len(source), max(1, len(source) // _TIMED)):
            start = time.perf_counter()
            with contextlib.suppress(ImageError):
                crops.apply([source.read(index)], crops.sample(1, generator))
                times.append(time.perf_counter() - start)
            if sum(times[1:]) > _SECONDS:
                break
    finally:
        torch.set_num_threads(threads)
    kept = times[1:] or times  # the first one warms up
    return len(kept) / sum(kept) if kept else 0.0


def describe(source: Source, report: Report) -> Iterable[str]:
    """The report as lines of text."""
    yield f"images       {report.images:,} read of {len(source):,}"
    if report.heights:
        yield f"height       {_spread(report.heights)} px"
        yield f"width        {_spread(report.widths)} px"
        yield "kinds        " + ", ".join(f"{kind}: {count:,}" for kind, count in report.kinds.most_common())
        yield f"channels     {source.channels}, as what is read ({'colour' if source.channels == 3 else 'grey'})"
    labelled = sum(count for label, count in report.labels.items() if label is not None)
    if labelled:
        counts = [count for label, count in report.labels.items() if label is not None]
        yield f"labels       {labelled:,} images in {len(counts)} classes, {min(counts):,} to {max(counts):,} a class"
        if source.classes:
            yield "classes      " + ", ".join(source.classes[:12]) + (", ..." if len(source.classes) > 12 else "")
    else:
        yield "labels       none (training needs none; k-NN accuracy does)"
    yield f"unreadable   {len(report.bad):,}"
    yield from (f"  {reason}" for reason in report.bad)


def speed(report: Report, workers: int, rate: float, crops: MultiCrop, cores: int) -> Iterable[str]:
    """Two lines: how fast images are read, and how fast they would reach training as crops."""
    read = report.images / max(report.seconds, 1e-9)
    yield f"reading      {read:,.0f} images/s with {workers} threads, without crops"
    if rate:
        (high, wide), (low, narrow) = pair(crops.global_size), pair(crops.local_size)
        sizes = f"2 of {high}x{wide}" + (f" and {crops.n_local} of {low}x{narrow}" if crops.n_local else "")
        yield (
            f"training     {rate:,.0f} images/s a core, read and cut into {sizes}; about {rate * cores:,.0f} on the "
            f"{cores} cores here, if nothing else runs on them"
        )


def _look(source: Source, index: int) -> Seen:
    try:
        pixels = source.read(index)
        try:
            kind = _kind(source.data(index))
        except TypeError:
            kind = "in memory"
    except ImageError as error:
        return Seen(0, 0, "", None, str(error))
    return Seen(pixels.shape[1], pixels.shape[2], kind, source.label(index), "")


def _kind(data: bytes) -> str:
    with Image.open(io.BytesIO(data)) as image:
        return f"{image.format} {image.mode}"


def _spread(values: list[int]) -> str:
    ordered = sorted(values)
    return f"{ordered[0]} to {ordered[-1]}, median {ordered[len(ordered) // 2]}"


def draw(images: list[Tensor], crops: MultiCrop, seed: int) -> Image.Image:
    """One row an image (uint8 [C, H, W]): itself with the boxes of its crops, then the crops before normalisation."""
    params = crops.sample_each([derive_seed(seed, i) for i in range(len(images))])
    global_crops, local_crops = crops.apply(images, params)
    boxes = crops.boxes(params, [(image.shape[1], image.shape[2]) for image in images]).tolist()
    mean, std = crops.statistics(images[0].shape[0])
    scale = max(1, round(160 / pair(crops.global_size)[0]))  # small images are enlarged, or nothing is to be seen
    rows = []
    for i, image in enumerate(images):
        views = [*global_crops[:, i], *local_crops[:, i]]
        tiles = [
            _enlarged(_picture(view.mul(std).add(mean).mul(255).round().clamp(0, 255).byte()), scale) for view in views
        ]
        rows.append([_boxed(image, boxes[i], tiles[0].height), *tiles])
    return _grid(rows)


def readable(source: Source, count: int) -> list[Tensor]:
    """`count` images spread over the source; those that cannot be read are left out and named."""
    if count < 1:
        raise UserError(f"--images is {count}; give 1 or more")
    images: list[Tensor] = []
    reason = ""
    for step in (
        torch.linspace(0, len(source) - 1, min(count, len(source)), dtype=torch.float32, device="cpu")
        .round()
        .long()
        .tolist()
    ):
        try:
            images.append(source.read(step))
        except ImageError as error:
            reason = str(error)
            print(f"left out: {reason}")
    if not images:
        raise UserError(f"none of the images chosen can be read; the last: {reason}")
    return images


def _picture(pixels: Tensor) -> Image.Image:
    return to_pillow(pixels)[0].convert("RGB")


def _enlarged(image: Image.Image, scale: int) -> Image.Image:
    return image.resize((image.width * scale, image.height * scale), Image.Resampling.NEAREST)


def _boxed(image: Tensor, boxes: list[list[int]], height: int) -> Image.Image:
    """The image at the height of its row, with the boxes of its crops."""
    factor = height / image.shape[1]
    width = min(max(1, round(image.shape[2] * factor)), 4 * height)  # very long images are squeezed
    picture = _picture(image).resize((width, height), Image.Resampling.BICUBIC)
    pen = ImageDraw.Draw(picture)
    across = width / image.shape[2]
    for v, (top, left, h, w) in reversed(list(enumerate(boxes))):
        x, y = left * across, top * factor
        box = (x, y, max(x, x + w * across - 1), max(y, y + h * factor - 1))  # a squeezed one may be under a pixel
        pen.rectangle(box, outline=_MARKS[v >= 2], width=2)
    return picture


def _grid(rows: list[list[Image.Image]]) -> Image.Image:
    first = max(row[0].width for row in rows)
    widths = [first + _GAP + sum(tile.width + _GAP for tile in row[1:]) for row in rows]
    heights = [max(tile.height for tile in row) + _GAP for row in rows]
    sheet = Image.new("RGB", (max(widths) + _GAP, sum(heights) + _GAP), "#b0b0b0")  # neither black nor white
    y = _GAP
    for row, height in zip(rows, heights, strict=True):
        sheet.paste(row[0], (_GAP, y))
        x = 2 * _GAP + first
        for tile in row[1:]:
            sheet.paste(tile, (x, y))
            x += tile.width + _GAP
        y += height
    return sheet
