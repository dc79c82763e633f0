"""The image set that ships with the package: 28x28 grey pictures of clothes, a part of Fashion-MNIST (see demo.md)."""

from __future__ import annotations

from pathlib import Path

import torch

from dino_fast.data.formats.parquet import ParquetSource
from dino_fast.data.source import ArraySource

DEMO_FILES = {part: Path(__file__).parents[1].joinpath(f"demo-{part}.parquet") for part in ("train", "test")}


def open_demo() -> ArraySource:
    """Decodes the demo set into memory: 5,000 training images; 1,000 held-out ones are its `.test`."""
    source = _load("train")
    source.test = _load("test")
    return source


def _load(part: str) -> ArraySource:
    rows = ParquetSource([DEMO_FILES[part]])
    rows.channels = 1
    images = torch.stack([rows.read(i) for i in range(len(rows))])  # [N, 1, 28, 28]
    return ArraySource(images, rows.labels, rows.classes, name=f"demo-{part}")
