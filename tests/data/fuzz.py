"""Damaged JPEG files, each a function of a number: `python -m tests.data.fuzz COUNT [FIRST]` decodes that many.

The pixels that come out must be those that Pillow alone would give, or the file must be refused; memory must not grow.
"""

from __future__ import annotations

import io
import os
import sys
import tarfile
import time
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch

from dino_fast.data import decode
from dino_fast.data.decode import ImageError

_MARKERS = (0xC0, 0xC1, 0xC2, 0xC4, 0xD0, 0xD8, 0xD9, 0xDA, 0xDB, 0xDD, 0xE1, 0xEE, 0xFE)


def seeds() -> list[bytes]:
    """Real photographs where the shared files are at hand, else drawn ones; some progressive, grey, CMYK, with EXIF."""
    from PIL import Image

    folder = Path(os.environ.get("DINO_FAST_TEST_DATA", Path(__file__).parents[2].parent / "shared" / "data"))
    files: list[bytes] = []
    if (folder / "caltech101.tar").is_file():
        with tarfile.open(folder / "caltech101.tar") as tar:
            members = sorted((m for m in tar if m.name.endswith(".jpg")), key=lambda m: (m.size, m.name))
            files = [
                tar.extractfile(member).read() for member in members[:400:20]
            ]  # small files: more of them a second
    exif = Image.Exif()
    exif[0x0112] = 6
    pixels = np.random.default_rng(0).integers(0, 256, (9, 12, 3), dtype=np.uint8)
    drawn = Image.fromarray(pixels).resize((120, 90))
    for mode, options in (("RGB", {}), ("RGB", {"progressive": True}), ("L", {}), ("CMYK", {}), ("RGB", {"exif": exif}),
                          ("RGB", {"subsampling": 0, "restart_marker_blocks": 4})):  # fmt: skip
        data = io.BytesIO()
        drawn.convert(mode).save(data, "JPEG", **options)
        files.append(data.getvalue())
    return files


def damaged(files: list[bytes], number: int) -> bytes:
    """File `number`: one to eight changes to one of the files."""
    rng = np.random.default_rng(number)
    data = bytearray(files[rng.integers(len(files))])
    for _ in range(rng.integers(1, 9)):
        at = int(rng.integers(len(data))) if rng.random() < 0.5 else int(rng.integers(min(700, len(data))))  # headers
        length = int(rng.integers(1, 64))
        kind = rng.integers(8)
        if kind <= 1:
            data[at] ^= 1 << int(rng.integers(8))
        elif kind == 2:
            data[at : at + length] = rng.bytes(length)
        elif kind == 3:
            del data[at : at + length]
        elif kind == 4:
            data[at:at] = data[max(0, at - length) : at]
        elif kind == 5:
            data[at : at + 2] = bytes([0xFF, _MARKERS[rng.integers(len(_MARKERS))]])
        elif kind == 6:
            data[at : at + 2] = int(rng.choice([0, 1, 7, 255, 32767, 65535])).to_bytes(2, "big")
        else:
            other = files[rng.integers(len(files))]
            cut = int(rng.integers(len(other)))
            data[at:] = other[cut:] if rng.random() < 0.3 else b""
        if not data:
            break
    return bytes(data)


def fuzz(numbers: Iterable[int], every: int = 1) -> Counter[str]:
    """Decodes the damaged files; compares every `every`-th with Pillow alone. An AssertionError names the number."""
    files, seen = seeds(), Counter[str]()
    for number in numbers:
        data = damaged(files, number)
        pixels = _decoded(data)
        seen["refused" if pixels is None else "decoded"] += 1
        if pixels is not None:
            assert pixels.dtype == torch.uint8 and pixels.dim() == 3 and pixels.shape[0] == 3, number
        if number % every == 0:
            fast, decode._jpeg = decode._jpeg, lambda *given: None
            try:
                alone = _decoded(data)
            finally:
                decode._jpeg = fast
            seen["compared"] += 1
            if (pixels is None) != (alone is None):
                seen["only libjpeg" if alone is None else "only Pillow"] += 1
            elif pixels is not None and not torch.equal(pixels, alone):
                seen["differ"] += 1
    return seen


def _decoded(data: bytes) -> torch.Tensor | None:
    try:
        return decode.decode(data, 3)
    except ImageError:
        return None


def resident() -> int:
    """Bytes of memory in use."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


if __name__ == "__main__":
    torch.set_num_threads(1)
    count, first = int(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 0
    fuzz(range(first, first + 500))
    before, start = resident(), time.perf_counter()
    for part in range(first, first + count, 10_000):
        seen = fuzz(range(part, min(part + 10_000, first + count)), every=10)
        print(
            part, dict(seen), f"{(resident() - before) / 1e6:+.1f} MB, {time.perf_counter() - start:.0f} s", flush=True
        )
