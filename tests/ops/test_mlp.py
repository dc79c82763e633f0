"""The MLP that takes some rows at a time, against PyTorch's layers."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from dino_fast.ops import mlp as operation


def _inputs(rows, dtype=torch.float64, width=6, hidden=20, out=5):
    torch.manual_seed(0)
    shapes = ((rows, width), (hidden, width), (hidden,), (out, hidden), (out,))
    return [torch.randn(shape, dtype=dtype, requires_grad=True) for shape in shapes]


def _eager(x, weight1, bias1, weight2, bias2):
    return F.linear(F.gelu(F.linear(x, weight1, bias1)), weight2, bias2)


@pytest.fixture(autouse=True)
def few_rows(monkeypatch):
    monkeypatch.setattr(operation, "ROWS", 7)


@pytest.mark.parametrize("rows", [1, 7, 8, 30])
def test_equals_the_layers(rows):
    tensors = _inputs(rows)
    out, want = operation.mlp(*tensors), _eager(*tensors)
    torch.testing.assert_close(out, want, rtol=1e-12, atol=1e-12)
    with torch.no_grad():
        assert torch.equal(operation.mlp(*tensors), out)
    upstream = torch.randn_like(out).t().contiguous().t()  # not contiguous
    for got, exact in zip(
        torch.autograd.grad(out, tensors, upstream), torch.autograd.grad(want, tensors, upstream), strict=True
    ):
        torch.testing.assert_close(got, exact, rtol=1e-11, atol=1e-11)


def test_gradcheck():
    assert torch.autograd.gradcheck(operation.mlp, _inputs(9))


@pytest.mark.parametrize("wanted", range(5))
def test_one_gradient_alone(wanted):
    tensors = [x.detach().requires_grad_(i == wanted) for i, x in enumerate(_inputs(10))]
    operation.mlp(*tensors).sum().backward()
    want = torch.autograd.grad(_eager(*tensors).sum(), tensors[wanted])[0]
    torch.testing.assert_close(tensors[wanted].grad, want, rtol=1e-11, atol=1e-11)
    assert [x.grad is not None for x in tensors] == [i == wanted for i in range(5)]


def test_float32_errs_no_more_than_the_layers():
    tensors = _inputs(50, torch.float32, 48, 192, 48)
    exact = _eager(*(x.double() for x in tensors))
    error, eager = ((f(*tensors) - exact).abs().max() for f in (operation.mlp, _eager))
    assert error <= 2 * eager + 1e-6


def test_other_dtypes_take_the_layers():
    tensors = _inputs(10, torch.bfloat16)
    assert torch.equal(operation.mlp(*tensors), _eager(*tensors))
    tensors = _inputs(10, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        assert operation.mlp(*tensors).dtype == torch.bfloat16
