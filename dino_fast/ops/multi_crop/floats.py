"""multi_crop of float32 images, whose files had more than 8 bits.

The same operations on the same scale of 0 to 255, without rounding after each. Pillow resamples, numpy does the rest.

Values are clipped to 0..255 where 8 bits would clip them. The hue is turned by the factor itself, where 8-bit HSV has
255 steps a turn. Within the rounding of 8 bits it is what the operation makes of the rounded image.
"""

from __future__ import annotations

import math
from typing import cast

import numpy as np
from PIL import Image

_LUMA = np.array([0.299, 0.587, 0.114], dtype=np.float32)[:, None, None]
_PASSES = 3  # box blurs that make Pillow's Gaussian


def resize(image: np.ndarray, height: int, width: int, filter: Image.Resampling) -> np.ndarray:
    """float32 [C, H, W] from 0 to 255 -> [C, height, width], antialiased."""
    planes = [np.asarray(Image.fromarray(plane).resize((width, height), filter)) for plane in image]
    resized: np.ndarray = np.clip(np.stack(planes), 0, 255)
    return resized


def distort(
    pixels: np.ndarray, switches: list[bool], order: list[int], factors: list[float], radius: float
) -> np.ndarray:
    """float32 [C, h, w] from 0 to 255, what comes after the resizing; the arguments are the operator's, of one crop."""
    flip, gray, blur, solarize = switches
    if flip:
        pixels = pixels[..., ::-1]
    for operation in order:
        if operation >= 0:
            pixels = np.clip(_JITTER[operation](pixels, np.float32(factors[operation])), 0, 255)
    if gray and len(pixels) == 3:
        pixels = np.broadcast_to(_luma(pixels), pixels.shape)
    if blur and radius > 0:
        pixels = _blurred(_blurred(pixels, radius, 2), radius, 1)
    return np.minimum(pixels, 255 - pixels) if solarize else np.ascontiguousarray(pixels)


def _luma(pixels: np.ndarray) -> np.ndarray:
    return cast(np.ndarray, (pixels * _LUMA).sum(axis=0, keepdims=True))


def _brightness(pixels: np.ndarray, factor: np.float32) -> np.ndarray:
    return pixels * factor


def _contrast(pixels: np.ndarray, factor: np.float32) -> np.ndarray:
    level = (_luma(pixels) if len(pixels) == 3 else pixels).mean(dtype=np.float64).astype(np.float32)
    return cast(np.ndarray, level + (pixels - level) * factor)


def _saturation(pixels: np.ndarray, factor: np.float32) -> np.ndarray:
    if len(pixels) != 3:
        return pixels
    gray = _luma(pixels)
    return cast(np.ndarray, gray + (pixels - gray) * factor)


def _hue(pixels: np.ndarray, factor: np.float32) -> np.ndarray:
    """Through HSV: largest and smallest color stay, the hue moves by `factor` turns."""
    if len(pixels) != 3:
        return pixels
    most, least = pixels.max(axis=0), pixels.min(axis=0)
    spread = most - least
    r, g, b = (most - pixels) / np.where(spread > 0, spread, 1)
    sextant = np.where(pixels[0] == most, b - g, np.where(pixels[1] == most, 2 + r - b, 4 + g - r))
    turned = np.stack([(sextant + 6 * factor + offset) % 6 for offset in (0.0, -2.0, -4.0)])  # 0 is the color itself
    share = np.clip(np.abs(turned - 3) - 1, 0, 1)  # of the spread
    return cast(np.ndarray, (least + spread * share).astype(np.float32))


def _blurred(pixels: np.ndarray, sigma: float, axis: int) -> np.ndarray:
    """Box blurs along one axis, each of a width that is no whole number; beyond the edge is the edge."""
    variance = sigma * sigma / _PASSES
    whole = math.floor((math.sqrt(12 * variance + 1) - 1) / 2)
    part = (2 * whole + 1) * (whole * (whole + 1) - 3 * variance) / (6 * (variance - (whole + 1) ** 2))
    margin = whole + 1
    weights = np.array([part, *[1.0] * (2 * whole + 1), part]) / (2 * (whole + part) + 1)
    weights = weights.astype(np.float32)
    for _ in range(_PASSES):
        padded = np.pad(pixels, [(margin, margin) if a == axis else (0, 0) for a in range(3)], mode="edge")
        length = pixels.shape[axis]
        taken = (padded.take(range(d, d + length), axis=axis) * weight for d, weight in enumerate(weights))
        pixels = cast(np.ndarray, sum(taken, np.zeros_like(pixels)))
    return pixels


_JITTER = (_brightness, _contrast, _saturation, _hue)
