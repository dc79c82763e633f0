"""Three implementations of the last layer and the loss, against the definition."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dino_fast.engine.train_step import last_layer_loss, select_loss_impl
from dino_fast.models import WeightNormLinear
from dino_fast.ops.dino_loss import dino_loss_reference
from dino_fast.ops.linear_dino_loss import chunked

TEMPS = {"student_temp": 0.1, "teacher_temp": 0.04}


def _inputs(V: int = 4, B: int = 7, D: int = 12, K: int = 50) -> tuple[list[Tensor], list[WeightNormLinear]]:
    torch.manual_seed(0)
    layers = [WeightNormLinear(D, K) for _ in range(2)]
    for layer in layers:
        layer.weight_g.data.uniform_(0.5, 2.0)
    rows = [F.normalize(torch.randn(n, B, D), dim=-1) for n in (V, 2)]
    return [rows[0].requires_grad_(), rows[1], torch.randn(K) / 10], layers


def _exact(rows: list[Tensor], layers: list[WeightNormLinear]) -> tuple[list[Tensor], list[Tensor]]:
    student, targets, center = (x.detach().double() for x in rows)
    student.requires_grad_()
    v, g = (x.detach().double().requires_grad_() for x in (layers[0].weight_v, layers[0].weight_g))
    weight = torch._weight_norm(v, g, 0)
    result = dino_loss_reference(student @ weight.T, targets @ layers[1].weight.double().T, center, **TEMPS)
    return [result.loss, result.teacher_entropy], list(torch.autograd.grad(result.loss * 3, (student, v, g)))


@pytest.mark.parametrize("impl", ["auto", "fused", "chunked", "logits"])
@pytest.mark.parametrize("images", [1, 7])
def test_loss_entropy_and_gradients_are_those_of_the_definition(impl, images, monkeypatch):
    monkeypatch.setattr(chunked, "CHUNK", 3 * 4 * 50)  # three images at a time, and one left over
    rows, layers = _inputs(B=images)
    values, gradients = _exact(rows, layers)
    loss, entropy = last_layer_loss(rows[0], layers[0], rows[1], layers[1], rows[2], impl=impl, **TEMPS)
    assert not entropy.requires_grad
    for got, want in zip((loss, entropy), values, strict=True):
        assert got.dtype == torch.float32
        torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-6)
    (loss * 3).backward()
    for got, want in zip((rows[0], layers[0].weight_v, layers[0].weight_g), gradients, strict=True):
        torch.testing.assert_close(got.grad.double(), want, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("impl", ["fused", "chunked", "logits"])
def test_a_frozen_layer_gets_no_gradient(impl):
    rows, layers = _inputs()
    layers[0].requires_grad_(False)
    loss, _ = last_layer_loss(rows[0], layers[0], rows[1], layers[1], rows[2], impl=impl, **TEMPS)
    loss.backward()
    assert rows[0].grad is not None and layers[0].weight_v.grad is None
    with torch.no_grad():
        again, _ = last_layer_loss(rows[0], layers[0], rows[1], layers[1], rows[2], impl=impl, **TEMPS)
    torch.testing.assert_close(again, loss.detach(), rtol=1e-6, atol=1e-6)


def test_the_choice():
    rows, weight = torch.zeros(2, 1, 4), torch.zeros(5, 4)
    assert select_loss_impl("auto", rows, weight) == "chunked"
    assert select_loss_impl("logits", rows, weight) == "logits"
    assert select_loss_impl("fused", rows, weight) == "fused"
    assert select_loss_impl("auto", rows, weight, torch.float16) == "logits"
