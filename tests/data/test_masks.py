from __future__ import annotations

import numpy as np
import pytest

from dino_fast.data.masks import block_mask, draw_masks

GRID = (14, 14)


def test_a_mask_is_a_function_of_seed_epoch_index_and_view() -> None:
    masks = draw_masks(7, 3, range(40), GRID)
    assert masks.shape == (2, 40, 196) and masks.dtype == bool
    np.testing.assert_array_equal(draw_masks(7, 3, [31, 5], GRID), masks[:, [31, 5]])
    for other in (draw_masks(8, 3, range(40), GRID), draw_masks(7, 4, range(40), GRID), masks[::-1]):
        assert (other != masks).any(axis=(0, 2)).sum() > 20


def test_shares_are_as_asked() -> None:
    shares = draw_masks(0, 0, range(2000), GRID).mean(axis=2).ravel()
    masked = shares[shares > 0]
    # 4,000 crops: the deviation of the share of masked ones is .008, of the mean share .115 / sqrt(2,000) = .0026.
    assert abs(len(masked) / len(shares) - 0.5) < 0.04
    assert 0.09 < masked.min() < 0.12 and 0.45 < masked.max() <= 0.5
    assert abs(masked.mean() - 0.3) < 0.015
    assert draw_masks(0, 0, range(50), GRID, probability=0.0).sum() == 0
    assert draw_masks(0, 0, range(50), GRID, probability=1.0, ratio=(0.3, 0.3)).mean(axis=2).min() > 0.25


def test_blocks_are_blocks() -> None:
    """Most masked patches have a masked neighbor to the right or left, which single patches at random have not."""
    masks = draw_masks(0, 0, range(200), GRID, probability=1.0, ratio=(0.2, 0.2)).reshape(-1, *GRID)

    def neighbors(masks: np.ndarray) -> float:
        padded = np.pad(masks, ((0, 0), (0, 0), (1, 1)))
        return float((masks & (padded[:, :, 2:] | padded[:, :, :-2])).sum() / masks.sum())

    shuffled = np.random.default_rng(0).permuted(masks.reshape(len(masks), -1), axis=1).reshape(masks.shape)
    assert neighbors(masks) > 0.9 > 0.5 > neighbors(shuffled)


@pytest.mark.parametrize("grid", [(1, 1), (2, 3), (1, 20), (3, 30)])
@pytest.mark.parametrize("count", [0, 1, 5, 1000])
def test_any_grid_and_count(grid: tuple[int, int], count: int) -> None:
    mask = block_mask(np.random.default_rng(0), grid, count)
    assert mask.shape == grid and mask.sum() <= min(count, mask.size)


@pytest.mark.parametrize(
    "change", [{"ratio": (0.5, 0.1)}, {"ratio": (0.1, 1.5)}, {"probability": 2.0}, {"grid": (0, 3)}]
)
def test_bad_input(change: dict) -> None:
    given = {"grid": GRID} | change
    with pytest.raises(ValueError, match="masks: ratio is two shares"):
        draw_masks(0, 0, [0], given.pop("grid"), **given)
