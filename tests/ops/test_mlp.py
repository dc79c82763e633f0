"""The MLP that takes some rows at a time, against PyTorch's layers."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from dino_fast.ops.linear import mlp as operation
from dino_fast.ops.linear.matmul import Norm


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


def _with_norm(x, weight1, bias1, weight2, bias2, gain, shift):
    return operation.mlp(x, weight1, bias1, weight2, bias2, Norm(gain, shift, 1e-3))


@pytest.mark.parametrize("rows", [1, 7, 30])
def test_of_a_layer_norm(rows):
    tensors = [*_inputs(rows), *(torch.randn(6, dtype=torch.float64, requires_grad=True) for _ in range(2))]
    out, want = _with_norm(*tensors), _eager(F.layer_norm(tensors[0], (6,), *tensors[5:], 1e-3), *tensors[1:5])
    torch.testing.assert_close(out, want, rtol=1e-12, atol=1e-12)
    with torch.no_grad():
        assert torch.equal(_with_norm(*tensors), out)
    upstream = torch.randn_like(out)
    for got, exact in zip(
        torch.autograd.grad(out, tensors, upstream), torch.autograd.grad(want, tensors, upstream), strict=True
    ):
        torch.testing.assert_close(got, exact, rtol=1e-10, atol=1e-10)
    assert torch.autograd.gradcheck(_with_norm, tensors)


@pytest.mark.parametrize("wanted", range(7))
def test_one_gradient_alone_of_a_layer_norm(wanted):
    tensors = [x.detach() for x in [*_inputs(10), torch.rand(6).double(), torch.rand(6).double()]]
    tensors[wanted].requires_grad_()
    _with_norm(*tensors).sum().backward()
    want = torch.autograd.grad(
        _eager(F.layer_norm(tensors[0], (6,), *tensors[5:], 1e-3), *tensors[1:5]).sum(), tensors[wanted]
    )
    torch.testing.assert_close(tensors[wanted].grad, want[0], rtol=1e-10, atol=1e-10)


def test_float32_errs_no_more_than_the_layers():
    tensors = _inputs(50, torch.float32, 48, 192, 48)
    exact = _eager(*(x.double() for x in tensors))
    error, eager = ((f(*tensors) - exact).abs().max() for f in (operation.mlp, _eager))
    assert error <= 2 * eager + 1e-6


def test_other_dtypes_take_the_layers():
    tensors = _inputs(10, torch.bfloat16)
    assert torch.equal(operation.mlp(*tensors), _eager(*tensors))
    norm = torch.rand(6).bfloat16(), torch.rand(6).bfloat16()
    assert torch.equal(_with_norm(*tensors, *norm), _eager(F.layer_norm(tensors[0], (6,), *norm, 1e-3), *tensors[1:]))
    tensors = _inputs(10, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        assert operation.mlp(*tensors).dtype == torch.bfloat16
