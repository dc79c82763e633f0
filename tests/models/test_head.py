"""The head and the wrapper against the plain transcription."""

from __future__ import annotations

import pytest
import torch

from dino_fast.models import DINOHead, MultiCropWrapper, VisionTransformer
from tests import original

SIZES = {"nlayers": 3, "hidden_dim": 32, "bottleneck_dim": 8}


@pytest.mark.parametrize("use_bn", [False, True])
@pytest.mark.parametrize("norm_last_layer", [False, True])
def test_equal_seeds_give_the_originals_weights_outputs_and_gradients(use_bn, norm_last_layer):
    heads = []
    for cls in (DINOHead, original.DINOHead):
        torch.manual_seed(3)
        heads.append(cls(12, 40, use_bn=use_bn, norm_last_layer=norm_last_layer, **SIZES))
    ours, theirs = heads
    assert set(ours.state_dict()) == set(theirs.state_dict())
    for name, value in theirs.state_dict().items():
        assert torch.equal(ours.state_dict()[name], value), name
    x = torch.randn(7, 12)
    weight = torch.randn(7, 40)
    for head in heads:
        with torch.no_grad():
            head.last_layer.weight_g.copy_(torch.linspace(0.5, 2, 40)[:, None])
        (head(x) * weight).sum().backward()
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-6, atol=1e-6)
    given = dict(theirs.named_parameters())
    for name, parameter in ours.named_parameters():
        assert parameter.requires_grad == given[name].requires_grad, name
        if parameter.requires_grad:
            torch.testing.assert_close(parameter.grad, given[name].grad, rtol=1e-5, atol=1e-6)


def test_the_arguments_are_the_originals_in_their_order():
    ours, theirs = (cls(12, 40, True, False, 2, 32, 8) for cls in (DINOHead, original.DINOHead))
    assert {n: p.shape for n, p in ours.state_dict().items()} == {n: p.shape for n, p in theirs.state_dict().items()}
    assert ours.last_layer.weight_g.requires_grad


def test_names_and_count():
    head = DINOHead(384, 65536)
    assert sum(p.numel() for p in head.parameters()) == 22_352_128
    assert {"mlp.0.weight", "mlp.4.bias", "last_layer.weight_g", "last_layer.weight_v"} < set(head.state_dict())
    assert head.last_layer.weight_g.shape == (65536, 1) and not head.last_layer.weight_g.requires_grad
    with_bn = DINOHead(8, 4, use_bn=True, **SIZES).state_dict()
    assert {"mlp.0.weight", "mlp.1.running_mean", "mlp.3.weight", "mlp.4.weight", "mlp.6.weight"} < set(with_bn)
    assert "mlp.weight" in DINOHead(8, 4, nlayers=1).state_dict()


def test_bottleneck_and_last_layer_are_the_head():
    head = DINOHead(12, 40, **SIZES)
    x = torch.randn(5, 12)
    z = head.bottleneck(x)
    torch.testing.assert_close(z.norm(dim=1), torch.ones(5))
    assert torch.equal(head.last_layer(z), head(x))
    v = head.last_layer.weight_v
    torch.testing.assert_close(head.last_layer.weight, v / v.norm(dim=1, keepdim=True))


def test_a_predictor_is_the_students_alone():
    torch.manual_seed(5)
    plain = DINOHead(12, 40, **SIZES)
    torch.manual_seed(5)
    student, teacher = DINOHead(12, 40, predictor=True, **SIZES), DINOHead(12, 40, predictor=True, **SIZES)
    assert student.state_dict().keys() - plain.state_dict().keys() == {
        f"predictor.{i}.{kind}" for i in (0, 2) for kind in ("weight", "bias")
    }
    teacher.load_state_dict(student.state_dict())
    teacher.predicts = False
    x = torch.randn(5, 12)
    unit = torch.nn.functional.normalize
    torch.testing.assert_close(student.bottleneck(x), unit(student.predictor(student.mlp(x)), dim=1))
    torch.testing.assert_close(teacher.bottleneck(x), unit(student.mlp(x), dim=1))
    assert "predictor.1.running_mean" in DINOHead(8, 4, use_bn=True, predictor=True, **SIZES).state_dict()


def test_a_frozen_last_layer_costs_no_gradient():
    head = DINOHead(12, 40, **SIZES)
    head.last_layer.weight_v.requires_grad_(False)
    assert not head.last_layer.weight.requires_grad
    head(torch.randn(5, 12)).sum().backward()
    assert head.last_layer.weight_v.grad is None and head.mlp[0].weight.grad is not None


def test_wrapper_keeps_the_order_of_crops():
    backbone = VisionTransformer(16, 8, embed_dim=16, depth=1, num_heads=2)
    wrapper = MultiCropWrapper(backbone, DINOHead(16, 10, **SIZES))
    large, small = torch.randn(4, 3, 16, 16), torch.randn(6, 3, 8, 8)
    got = wrapper([large, small])
    want = original.MultiCropWrapper(backbone, wrapper.head)([*large.split(2), *small.split(2)])
    assert got.shape == (10, 10)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)
    assert {name.split(".")[0] for name in wrapper.state_dict()} == {"backbone", "head"}
