"""The two measures of DAVIS for one object: J, the Jaccard index of regions, and F, the agreement of their outlines.

F is the harmonic mean of the share of the outline that lies within a tolerance of the true outline, and the reverse.
The tolerance is 0.8 % of the image's diagonal, rounded up, measured as a disk (Perazzi et al., CVPR 2016).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

TOLERANCE = 0.008


def outline(mask: Tensor) -> Tensor:
    """Outline of a mask, bool `[H, W]`: pixels that differ from their right, lower or lower right neighbor."""
    right, below, across = mask.clone(), mask.clone(), mask.clone()
    right[:, :-1], below[:-1], across[:-1, :-1] = mask[:, 1:], mask[1:], mask[1:, 1:]
    edge = (mask ^ right) | (mask ^ below) | (mask ^ across)
    edge[-1], edge[:, -1] = (mask ^ right)[-1], (mask ^ below)[:, -1]
    edge[-1, -1] = False
    return edge


def dilate(mask: Tensor, radius: int) -> Tensor:
    """Dilation by a disk, bool `[H, W]` -> bool `[H, W]`: all within `radius` pixels of the mask, center to center.

    The disk is written at each pixel of the mask: an outline has few.
    """
    height, width = mask.shape
    line = width + 2 * radius
    reach = torch.arange(-radius, radius + 1, dtype=torch.int64, device=mask.device)
    disk = ((reach[:, None] ** 2 + reach**2) <= radius * radius).nonzero()  # [n, 2], from 0
    canvas = torch.zeros((height + 2 * radius) * line, dtype=torch.bool, device=mask.device)
    points = mask.nonzero()
    first = points[:, 0] * line + points[:, 1]
    canvas[(first[:, None] + disk[:, 0] * line + disk[:, 1]).flatten()] = True
    return canvas.view(-1, line)[radius : radius + height, radius : radius + width]


def f_measure(mask: Tensor, truth: Tensor, tolerance: float = TOLERANCE) -> float:
    """F of bool `[H, W]` against bool `[H, W]`. Without any outline in either it is 1, in one of them 0."""
    radius = math.ceil(tolerance * math.hypot(*truth.shape))
    predicted, true = outline(mask), outline(truth)
    if not predicted.any() or not true.any():
        return float(not predicted.any() and not true.any())
    precision = (predicted & dilate(true, radius)).sum().item() / predicted.sum().item()
    recall = (true & dilate(predicted, radius)).sum().item() / true.sum().item()
    return 0.0 if precision + recall == 0 else 2 * precision * recall / (precision + recall)
