from __future__ import annotations

import pytest
import torch

from dino_fast.loss import gram_loss
from dino_fast.ops.gram_loss import gram_loss_reference


def patches(P: int, D: int, apart: float, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    """Patches [3, P, D] and an anchor `apart` from them."""
    generator = torch.Generator().manual_seed(P)
    x, noise = (torch.randn(3, P, D, generator=generator, dtype=torch.float64) for _ in range(2))
    return x.to(dtype).requires_grad_(), (x + apart * noise).to(dtype)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("P,D", [(40, 8), (8, 8), (5, 24), (1, 3)])
def test_equals_the_definition(P: int, D: int, reduction: str) -> None:
    x, anchor = patches(P, D, 0.5, torch.float64)
    loss, wanted = (f(x, anchor, reduction=reduction) for f in (gram_loss, gram_loss_reference))
    torch.testing.assert_close(loss, wanted)
    torch.testing.assert_close(*(torch.autograd.grad(value, x)[0] for value in (3 * loss, 3 * wanted)))
    assert P == 1 or wanted > 1e-3


@pytest.mark.parametrize("P,D", [(400, 16), (16, 400)])
def test_near_the_anchor_rounding_does_not_take_over(P: int, D: int) -> None:
    """Unit rows x, y are rounded by eps, so that x - y, and the loss with it, have a relative error of eps / |x - y|.
    The difference of three Frobenius norms would have one of eps P^2 / loss: all of it, here."""
    apart = 1e-3
    x, anchor = patches(P, D, apart)
    loss = gram_loss(x, anchor)
    exact = gram_loss_reference(x.detach().double(), anchor.double())
    assert abs(loss.item() / exact.item() - 1) < 4 * torch.finfo(torch.float32).eps / apart
    same = gram_loss(x, x.detach())
    assert same == 0 and torch.autograd.grad(same, x)[0].abs().max() == 0


def test_stores_no_matrix_of_patches_by_patches(monkeypatch: pytest.MonkeyPatch) -> None:
    class Largest(torch.utils._python_dispatch.TorchDispatchMode):
        size = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            self.size = max(
                self.size, *(x.numel() for x in torch.utils._pytree.tree_leaves(out) if torch.is_tensor(x)), 0
            )
            return out

    x, anchor = patches(200, 10, 0.1)
    with Largest() as seen:
        gram_loss(x, anchor).backward()
    assert seen.size == x.numel()


def test_half_precision_autocast_and_compiled_code() -> None:
    x, anchor = patches(30, 8, 0.5)
    wanted = gram_loss(x, anchor)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(gram_loss(x, anchor), wanted)
    half = x.detach().bfloat16().requires_grad_()
    loss = gram_loss(half, anchor.bfloat16())
    loss.backward()
    assert loss.dtype == torch.float32 and half.grad is not None and half.grad.dtype == torch.bfloat16
    torch.testing.assert_close(torch.compile(gram_loss, backend="aot_eager", fullgraph=True)(x, anchor), wanted)


def test_second_derivatives_are_refused() -> None:
    x, anchor = patches(30, 8, 0.5)
    (gradient,) = torch.autograd.grad(gram_loss(x, anchor), x, create_graph=True)
    with pytest.raises(RuntimeError, match=r"gram_loss has no second derivative.*gram_loss_reference"):
        gradient.sum().backward()


@pytest.mark.parametrize(
    "student,anchor,message",
    [
        (torch.ones(2, 4, 3), torch.ones(2, 9, 3), r"same sizes.*\[2, 4, 3\] and \[2, 9, 3\].*Resize the anchor"),
        (torch.ones(4, 3), torch.ones(4, 3), r"\[images, patches, features\]"),
        (torch.ones(2, 0, 3), torch.ones(2, 0, 3), "none of them 0"),
        (torch.ones(2, 4, 3, dtype=torch.int64), torch.ones(2, 4, 3), "student must be of a floating-point dtype"),
        (torch.ones(2, 4, 3), torch.ones(2, 4, 3, device="meta"), "anchor on meta"),
    ],
)
def test_bad_input(student: torch.Tensor, anchor: torch.Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        gram_loss(student, anchor)
    with pytest.raises(ValueError, match="reduction is one of mean, sum; got 'max'"):
        gram_loss(torch.ones(2, 4, 3), torch.ones(2, 4, 3), reduction="max")
