"""Backbones of timm and torchvision by name."""

from __future__ import annotations

import pytest
import torch

from dino_fast.errors import UserError
from dino_fast.models import DINOHead, MultiCropWrapper, build_backbone
from tests import original

SIZES = {"hidden_dim": 8, "bottleneck_dim": 4}


@pytest.mark.parametrize(
    "arch,width,options",
    [
        ("torchvision/resnet18", 512, {}),
        ("torchvision/convnext_tiny", 768, {}),
        ("torchvision/googlenet", 1024, {}),
        ("timm/resnet10t", 512, {"in_chans": 1}),
        ("timm/vit_tiny_patch16_224", 192, {"img_size": 64}),
        ("timm/mobilenetv3_small_050", 1024, {"in_chans": 5}),
    ],
)
def test_features_of_every_size_have_the_width_that_is_named(arch, width, options):
    if arch.startswith("timm"):
        pytest.importorskip("timm")
    model = build_backbone(
        arch, patch_size=16, drop_path_rate=0.1, **{"img_size": 224, "in_chans": 3, **options}
    ).eval()
    assert model.embed_dim == width
    for size in (64, 96):
        assert model(torch.randn(2, options.get("in_chans", 3), size, size)).shape == (2, width)


def test_names_stay_the_librarys():
    from torchvision.models import resnet50

    ours, theirs = build_backbone("torchvision/resnet50"), resnet50()
    assert set(theirs.state_dict()) - set(ours.state_dict()) == {"fc.weight", "fc.bias"}
    assert ours.embed_dim == 2048


def test_another_backbone_runs_once_per_resolution():
    backbone = build_backbone("torchvision/resnet18").eval()
    calls = []
    backbone.register_forward_hook(lambda module, given, out: calls.append(tuple(given[0].shape)))
    wrapper = MultiCropWrapper(backbone, DINOHead(512, 10, **SIZES))
    large, small = torch.randn(4, 3, 64, 64), torch.randn(6, 3, 32, 32)
    got = wrapper([large, small])
    assert calls == [(4, 3, 64, 64), (6, 3, 32, 32)]
    want = original.MultiCropWrapper(backbone, wrapper.head)([*large.split(2), *small.split(2)])
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-6)
    assert "backbone.conv1.weight" in wrapper.state_dict()


@pytest.mark.parametrize(
    "arch,options,message",
    [
        ("torchvision/resnet5", {}, "did you mean 'resnet50'"),
        ("torchvision/resnet50", {"in_chans": 1}, "three channels"),
        ("torchvision/resnet50", {"depth": 3}, "leave out depth"),
        ("torchvision/squeezenet1_0", {}, "no linear classifier"),
        ("torchvision/vit_b_16", {}, "one size alone"),
        ("timm/resnet5", {}, "timm has no model 'resnet5'"),
        ("tim/resnet50", {}, "timm/NAME"),
    ],
)
def test_bad_names_and_options(arch, options, message):
    if arch.startswith("timm"):
        pytest.importorskip("timm")
    with pytest.raises(UserError, match=message):
        build_backbone(arch, **options)
