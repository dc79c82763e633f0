"""Memory of the loader over many images: `python -m tests.data.soak COUNT` prints it every tenth of COUNT images.

One worker reads JPEGs and makes 2 x 224 + 8 x 96 crops; the bytes are its own (anonymous) memory, the shared memory it
has mapped, and the training process's own memory. Photographs of caltech101.tar where the shared files are at hand.
"""

from __future__ import annotations

import io
import os
import re
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image

from dino_fast.augment import MultiCrop
from dino_fast.data import Source, open_source, train_loader

BATCH = 16


def photographs(folder: Path, crops: MultiCrop) -> Source:
    """The shared photographs, else sixteen drawn ones of several sizes in `folder`."""
    shared = Path(os.environ.get("DINO_FAST_TEST_DATA", Path(__file__).parents[2].parent / "shared" / "data"))
    if (shared / "caltech101.tar").is_file():
        return open_source(shared / "caltech101.tar")
    for i in range(16):
        data, size = io.BytesIO(), (200 + 10 * i, 300 - 7 * i)
        pixels = np.random.default_rng(i).integers(0, 256, (12, 9, 3), dtype=np.uint8)
        Image.fromarray(pixels).resize(size).save(data, "JPEG")
        (folder / f"{i:02d}.jpg").write_bytes(data.getvalue())
    return open_source(folder)


def memory(process: str) -> tuple[float, float]:
    """MB of a process: its own, and shared with others."""
    text = Path(f"/proc/{process}/status").read_text()
    own, shared = (int(re.search(rf"{name}:\s+(\d+) kB", text)[1]) / 1024 for name in ("RssAnon", "RssShmem"))  # type: ignore[index]
    return own, shared


def soak(count: int, crops: MultiCrop | None = None, parts: int = 10) -> list[tuple[int, float, float, float]]:
    """(images so far, MB of the worker, MB that it shares, MB of this process) at the end of each part."""
    import multiprocessing

    crops, rows, begun, done = crops or MultiCrop(), [], time.perf_counter(), 0
    with tempfile.TemporaryDirectory() as folder:
        source = photographs(Path(folder), crops)
        for batch in train_loader(source, crops, batch_size=BATCH, seed=0, workers=1):
            done += len(batch.index)
            if done * parts // count > len(rows):
                (worker,) = multiprocessing.active_children()
                row = (done, *memory(str(worker.pid)), memory("self")[0])
                rows.append(row)
                print("{:7d} images: worker {:.1f} MB and {:.1f} MB shared, here {:.1f} MB".format(*row), end="")
                print(f", {time.perf_counter() - begun:.0f} s", flush=True)
            if done >= count:
                return rows
    return rows


if __name__ == "__main__":
    soak(int(sys.argv[1]))
