"""The set that ships with the package."""

from __future__ import annotations

import time

import numpy as np

from dino_fast.data import open_source
from dino_fast.data.formats.demo import DEMO_FILES


def test_demo_set() -> None:
    start = time.perf_counter()
    source = open_source("demo")
    assert time.perf_counter() - start < 5  # 0.35 s on a quiet machine
    assert len(source) == 5000 and len(source.test) == 1000 and source.channels == 1 and len(source.classes) == 10
    assert np.bincount(source.labels).tolist() == [500] * 10 and np.bincount(source.test.labels).tolist() == [100] * 10
    assert source.read(0).shape == (1, 28, 28) and 60 < source.images.float().mean() < 90
    folder = DEMO_FILES["train"].parent
    assert sum(f.stat().st_size for f in folder.glob("demo-*.parquet")) < 5e6
    assert "Permission is hereby granted" in (folder / "demo.md").read_text()
