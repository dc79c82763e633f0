"""A fingerprint of a run's images, kept in its checkpoints, by which a resume knows other images.

It is of the contents, so the same images may lie elsewhere, under other names or in another container.
"""

from __future__ import annotations

import zlib

import numpy as np

from dino_fast.data import ImageError, Source

SAMPLED = 32  # images that are read for it
DIFFERING = 0.1  # share of them up to which the images count as the same: some were repaired or replaced


def fingerprint(source: Source) -> list[int | None]:
    """CRC-32 of `SAMPLED` evenly spaced images: of the encoded bytes, or of the pixels where images come decoded.

    None for an image that cannot be read.
    """
    chosen = np.unique(np.linspace(0, len(source) - 1, min(len(source), SAMPLED), dtype=np.int64))
    return [_checksum(source, int(index)) for index in chosen]


def share_differing(before: list[int | None], now: list[int | None]) -> float:
    """Share of the images, of those that could be read both times, whose contents differ."""
    both = [a != b for a, b in zip(before, now, strict=False) if a is not None and b is not None]
    return sum(both) / max(1, len(both))


def _checksum(source: Source, index: int) -> int | None:
    try:
        try:
            return zlib.crc32(source.data(index))
        except TypeError:  # no encoded images
            return zlib.crc32(source.read(index).contiguous().numpy().data)
    except (ImageError, OSError):
        return None
