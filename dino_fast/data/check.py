"""Reads every image once and says what is there and what is wrong."""

from __future__ import annotations

import io
import time
import warnings
from collections import Counter
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import NamedTuple

from dino_fast.data.decode import ImageError
from dino_fast.data.sources import ArraySource, Source


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
    step = max(1, len(source) // limit) if limit else 1
    report = Report()
    start = time.perf_counter()
    with ThreadPoolExecutor(workers) as pool:
        for seen in pool.map(lambda index: _look(source, index), range(0, len(source), step), chunksize=16):
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


def describe(source: Source, report: Report) -> Iterable[str]:
    """The report as lines of text."""
    yield f"images       {report.images:,} read of {len(source):,}"
    if report.heights:
        yield f"height       {_spread(report.heights)} px"
        yield f"width        {_spread(report.widths)} px"
        yield "kinds        " + ", ".join(f"{kind}: {count:,}" for kind, count in report.kinds.most_common())
    labelled = sum(count for label, count in report.labels.items() if label is not None)
    if labelled:
        counts = [count for label, count in report.labels.items() if label is not None]
        yield f"labels       {labelled:,} images in {len(counts)} classes, {min(counts):,} to {max(counts):,} a class"
        if source.classes:
            yield "classes      " + ", ".join(source.classes[:12]) + (", ..." if len(source.classes) > 12 else "")
    else:
        yield "labels       none (training needs none; k-NN accuracy does)"
    yield f"reading      {report.images / max(report.seconds, 1e-9):,.0f} images/s here, without crops"
    yield f"unreadable   {len(report.bad):,}"
    yield from (f"  {reason}" for reason in report.bad)


def _look(source: Source, index: int) -> Seen:
    try:
        pixels = source.read(index)
        kind = "in memory" if isinstance(source, ArraySource) else _kind(source.data(index))
    except ImageError as error:
        return Seen(0, 0, "", None, str(error))
    return Seen(pixels.shape[1], pixels.shape[2], kind, source.label(index), "")


def _kind(data: bytes) -> str:
    from PIL import Image

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with Image.open(io.BytesIO(data)) as image:
            return f"{image.format} {image.mode}"


def _spread(values: list[int]) -> str:
    ordered = sorted(values)
    return f"{ordered[0]} to {ordered[-1]}, median {ordered[len(ordered) // 2]}"
