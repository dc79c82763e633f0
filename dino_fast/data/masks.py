"""Block masks of patches for iBOT's loss (Zhou et al. 2022, arXiv:2111.07832), as DINOv2 draws them.

A crop is masked with some probability; a share of its patches, uniform between two bounds, is then covered by blocks of
random sizes and aspect ratios (BEiT's, arXiv:2106.08254). Each crop's mask is a function of the seed, the epoch, the
image's index and the view: it is the same in any batch, on any number of processes, and after a resume. (DINOv2 spreads
the shares evenly over a batch instead; the distribution over crops is the same.)
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from dino_fast.seeding import derive_seed

VIEWS = 2  # global crops of an image
SMALLEST_BLOCK = 4  # patches
LOG_ASPECT = np.log(0.3), np.log(1 / 0.3)  # of a block's height to its width
TRIES = 10  # for a block that covers something new and not too much


def draw_masks(
    seed: int,
    epoch: int,
    indices: Sequence[int],
    grid: tuple[int, int],
    *,
    ratio: tuple[float, float] = (0.1, 0.5),
    probability: float = 0.5,
) -> np.ndarray:
    """Masks of both global crops of some images.

    Args:
        seed, epoch, indices: of the run, the pass over the data, and the images in the data set.
        grid: rows and columns of patches of a global crop.
        ratio: bounds of the share of patches that a masked crop loses, in [0, 1].
        probability: of a crop being masked, in [0, 1].

    Returns:
        bool [2, images, rows * columns], crop by crop as batches are, true where a patch is masked.

    Raises:
        ValueError: bounds or a probability outside of [0, 1], or a grid without patches.
    """
    if not 0 <= ratio[0] <= ratio[1] <= 1 or not 0 <= probability <= 1 or min(grid) < 1:
        raise ValueError(
            "masks: ratio is two shares 0 <= low <= high <= 1, probability one from 0 to 1, the grid at least 1 x 1; "
            f"got ratio {ratio}, probability {probability}, grid {grid}"
        )
    masks = np.zeros((VIEWS, len(indices), grid[0] * grid[1]), dtype=bool)
    for i, index in enumerate(indices):
        for view in range(VIEWS):
            generator = np.random.default_rng(derive_seed(seed, epoch, int(index), view))
            if generator.random() < probability:
                count = int(grid[0] * grid[1] * generator.uniform(*ratio))
                masks[view, i] = block_mask(generator, grid, count).ravel()
    return masks


def block_mask(generator: np.random.Generator, grid: tuple[int, int], count: int) -> np.ndarray:
    """bool [rows, columns] in which blocks cover `count` patches, or fewer where no block fits any more."""
    mask = np.zeros(grid, dtype=bool)
    left = count
    while left > 0 and (covered := _add_block(generator, mask, left)):
        left -= covered
    return mask


def _add_block(generator: np.random.Generator, mask: np.ndarray, most: int) -> int:
    """Covers one more block with at most `most` new patches; how many were new, 0 after too many tries."""
    for _ in range(TRIES):
        area = generator.uniform(SMALLEST_BLOCK, most) if most > SMALLEST_BLOCK else most
        aspect = np.exp(generator.uniform(*LOG_ASPECT))
        height, width = round(np.sqrt(area * aspect)), round(np.sqrt(area / aspect))
        if not (0 < height < mask.shape[0] and 0 < width < mask.shape[1]):
            continue
        top = generator.integers(mask.shape[0] - height + 1)
        left = generator.integers(mask.shape[1] - width + 1)
        block = mask[top : top + height, left : left + width]
        new = block.size - int(block.sum())
        if 0 < new <= most:
            block[:] = True
            return new
    return 0
