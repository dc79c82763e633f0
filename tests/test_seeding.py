"""Seeds derived from several numbers."""

from __future__ import annotations

import torch

from dino_fast.seeding import derive_seed


def test_a_seed_tells_order_and_place_apart() -> None:
    numbers = {derive_seed(a, b, c) for a in range(20) for b in range(20) for c in range(20)}
    assert len(numbers) == 8000 and max(numbers) < 2**63
    low = torch.tensor([n & 0xFFFFFFFF for n in numbers])  # the part that seeds torch's CPU generator
    assert len(low.unique()) == 8000


def test_seeds_are_those_of_stored_runs() -> None:
    """Orders, crops and stochastic depth of a run that goes on depend on these numbers."""
    assert derive_seed() == 0
    assert derive_seed(0) == 8147104208329303767
    assert derive_seed(3, 1, 0, 17) == 6724902752334069891
    assert derive_seed(2**40, 5, 7) == 2529815007113671672
