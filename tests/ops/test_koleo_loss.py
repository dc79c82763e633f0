from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from dino_fast.loss import koleo_loss
from dino_fast.ops.koleo_loss import nearest_neighbors


def published(features: torch.Tensor, eps: float = 1e-8) -> torch.Tensor:
    """DINOv2's loss/koleo_loss.py (Apache-2.0), transcribed."""
    x = nn.functional.normalize(features, eps=eps, p=2, dim=-1)
    dots = torch.mm(x, x.t())
    dots.view(-1)[:: (x.shape[0] + 1)].fill_(-1)
    nearest = torch.max(dots, dim=1)[1]
    distances = nn.PairwiseDistance(2, eps=eps)(x, x[nearest])
    return -torch.log(distances + eps).mean()


def rows(n: int, d: int = 16, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(n), dtype=torch.float64).to(dtype)


@pytest.mark.parametrize("n", [2, 3, 64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_equals_the_published_form(n: int, dtype: torch.dtype) -> None:
    x = rows(n, dtype=dtype).requires_grad_()
    got, wanted = koleo_loss(x), published(x)
    torch.testing.assert_close(got, wanted, rtol=1e-6, atol=1e-7)  # published: 1e-8 added to each difference
    torch.testing.assert_close(torch.autograd.grad(got, x)[0], torch.autograd.grad(wanted, x)[0], rtol=1e-5, atol=1e-6)


def test_finite_for_duplicates() -> None:
    x = rows(1).repeat(2, 1) * torch.tensor([[1.0], [2.0]])  # the same direction
    x.requires_grad_()
    loss = koleo_loss(x)
    assert loss.item() == pytest.approx(-math.log(1e-8))
    assert torch.autograd.grad(loss, x)[0].abs().max() == 0
    both = torch.cat([x, rows(4)])
    loss = koleo_loss(both)
    distances = torch.cdist(*[nn.functional.normalize(both.detach().double(), dim=1)] * 2).fill_diagonal_(math.inf)
    others = -distances.min(1).values[2:].log().sum()
    assert loss.item() == pytest.approx((-2 * math.log(1e-8) + others.item()) / 6, rel=1e-6)
    assert torch.autograd.grad(loss, x)[0].isfinite().all()


def test_neighbors_are_found_piece_by_piece(monkeypatch: pytest.MonkeyPatch) -> None:
    x = nn.functional.normalize(rows(50), dim=1)
    whole = nearest_neighbors(x, x, 0)
    monkeypatch.setattr("dino_fast.ops.koleo_loss.BUFFER", 7 * 50)
    assert torch.equal(nearest_neighbors(x, x, 0), whole)
    assert torch.equal(nearest_neighbors(x[20:30], x, 20), whole[20:30])
    assert (whole != torch.arange(50)).all()


@pytest.mark.parametrize("features", [rows(1), rows(0), torch.ones(2, 3, 4), torch.ones(3, 4, dtype=torch.int64)])
def test_bad_input(features: torch.Tensor) -> None:
    with pytest.raises(ValueError, match=r"one row has no neighbor; give two images or more|features are \[rows, D\]"):
        koleo_loss(features)
