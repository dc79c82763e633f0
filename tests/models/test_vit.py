"""The backbone against the plain transcription and timm."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F

from dino_fast.errors import UserError
from dino_fast.models import VisionTransformer, build_backbone, set_drop_path_seed, vit_small
from dino_fast.models.packing import Kept, add_to_kept, pack, take
from tests import original

SMALL = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 3, "num_heads": 3}


def pair(**options):
    models = []
    for cls in (VisionTransformer, original.ViT):
        torch.manual_seed(0)
        models.append(cls(**{**SMALL, **options}))
    return models


def same_gradients(ours, theirs):
    given = dict(theirs.named_parameters())
    for name, parameter in ours.named_parameters():
        assert parameter.grad is not None, name
        torch.testing.assert_close(parameter.grad, given[name].grad, rtol=1e-9, atol=1e-9, msg=lambda m, n=name: n + m)


@pytest.mark.parametrize("size", [(32, 32), (16, 16), (24, 48), (64, 32), (8, 8)])
def test_equal_seeds_give_the_originals_weights_outputs_and_gradients(size):
    ours, theirs = pair()
    assert list(ours.state_dict()) and set(ours.state_dict()) == set(theirs.state_dict())
    for name, value in theirs.state_dict().items():
        assert torch.equal(ours.state_dict()[name], value), name
    x = torch.randn(4, 3, *size)
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-5, atol=1e-5)
    ours, theirs = ours.double(), theirs.double()  # float64 tells a wrong formula from rounding
    x, weight = x.double(), torch.randn(4, 48, dtype=torch.float64)
    (ours(x) * weight).sum().backward()
    (theirs(x) * weight).sum().backward()
    same_gradients(ours, theirs)


def packed_and_apart(rate=0.0, **options):
    """A backbone on three sizes at once, and the same one size by size."""
    torch.manual_seed(0)
    model = VisionTransformer(**{**SMALL, "drop_path_rate": rate, **options}).double()
    images = [torch.randn(n, 3, *size, dtype=torch.float64) for n, size in ((4, (32, 32)), (7, (16, 16)), (1, (8, 24)))]
    return model, images


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("qkv_bias", [True, False])
def test_all_sizes_at_once_equal_one_after_the_other(train, qkv_bias):
    model, images = packed_and_apart(qkv_bias=qkv_bias)
    model.train(train)
    weight = torch.randn(12, 48, dtype=torch.float64)
    together = model(images)
    (together * weight).sum().backward()
    gradients = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    apart = torch.cat([model(x) for x in images])
    (apart * weight).sum().backward()
    torch.testing.assert_close(together, apart, rtol=1e-12, atol=1e-12)
    for (name, p), gradient in zip(model.named_parameters(), gradients, strict=True):
        torch.testing.assert_close(gradient, p.grad, rtol=1e-10, atol=1e-10, msg=lambda m, n=name: n + m)
    # The class token of a last block that made all tokens.
    full = torch.cat([model.forward_features(x)[:, 0] for x in images])
    torch.testing.assert_close(full, apart, rtol=1e-12, atol=1e-12)


def test_packed_float32_is_as_near_as_the_original():
    ours, theirs = pair()
    images = [torch.randn(6, 3, 32, 32), torch.randn(9, 3, 16, 16)]
    exact = copy.deepcopy(ours).double()([x.double() for x in images])
    error = (ours(images) - exact).abs().max()
    eager = (torch.cat([theirs(x) for x in images]) - exact).abs().max()
    assert error <= 2 * eager + 1e-6


def test_a_kept_draw_is_the_one_that_is_used():
    model, images = packed_and_apart(rate=0.5)
    set_drop_path_seed(model, 3, 4)
    kept = model.stochastic_depth(images)
    assert len(kept) == 2 * ((3 + 5 + 1) + (2 + 4 + 1))  # of 4, 7 and 1 images, at rates 0.25 and 0.5
    given = model(images, kept)
    set_drop_path_seed(model, 3, 4)
    assert torch.equal(given, model(images))
    assert not torch.equal(given, model(images))  # the next draw
    assert model.eval().stochastic_depth(images) is None


def test_images_may_be_differentiated():
    model, images = packed_and_apart()
    x = images[0].requires_grad_()
    model(x).sum().backward()
    theirs = original.ViT(**SMALL).double()
    theirs.load_state_dict(model.state_dict())
    again = x.detach().requires_grad_()
    theirs(again).sum().backward()
    torch.testing.assert_close(x.grad, again.grad, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    "grid,target", [((14, 14), (6, 6)), ((14, 14), (14, 9)), ((4, 4), (7, 3)), ((28, 28), (60, 33))]
)
def test_position_embedding_equals_interpolation(grid, target):
    model = VisionTransformer(img_size=(grid[0] * 4, grid[1] * 4), patch_size=4, embed_dim=24, depth=1, num_heads=2)
    table = model.pos_embed[:, 1:].reshape(1, *grid, 24).permute(0, 3, 1, 2)
    scale = tuple((t + 0.1) / g for t, g in zip(target, grid, strict=True))
    want = F.interpolate(table, scale_factor=scale, mode="bicubic").permute(0, 2, 3, 1).reshape(1, -1, 24)
    torch.testing.assert_close(model.position_embedding(*target)[:, 1:], want, rtol=1e-5, atol=1e-6)


def test_position_embedding_follows_writes_through_data():
    model = VisionTransformer(**SMALL).eval()
    with torch.no_grad():
        before = model.position_embedding(2, 2)
        model.pos_embed.data.mul_(2)  # as an exponential moving average may write
        torch.testing.assert_close(model.position_embedding(2, 2), 2 * before)


def test_parameter_counts():
    assert sum(p.numel() for p in vit_small().parameters()) == 21_665_664


@pytest.mark.parametrize("patch", [2, 4, 7, 8, 14, 16])
def test_patches_channels_and_non_square_images(patch):
    model = VisionTransformer((2 * patch, 3 * patch), patch, in_chans=1, embed_dim=16, depth=1, num_heads=2)
    assert model.pos_embed.shape == (1, 7, 16)
    assert model(torch.randn(2, 1, 2 * patch, 3 * patch)).shape == (2, 16)
    assert model.forward_features(torch.randn(2, 1, 3 * patch, patch)).shape == (2, 4, 16)


def test_features_attention_and_intermediate_layers():
    ours, theirs = pair()
    x = torch.randn(2, 3, 32, 16)
    tokens = ours.forward_features(x)
    torch.testing.assert_close(tokens[:, 0], ours(x))
    layers = ours.get_intermediate_layers(x, 2)
    assert len(layers) == 2 and torch.equal(layers[1], tokens) and not torch.equal(layers[0], tokens)
    attention = ours.get_last_selfattention(x)
    assert attention.shape == (2, 3, 9, 9)
    seen = []
    theirs.blocks[-1].attn.register_forward_hook(lambda module, given, out: seen.append((given[0], out)))
    theirs(x)
    inside, out = seen[0]
    v = theirs.blocks[-1].attn.qkv(inside).reshape(2, 9, 3, 3, 16).permute(2, 0, 3, 1, 4)[2]
    again = theirs.blocks[-1].attn.proj((attention @ v).transpose(1, 2).reshape(2, 9, 48))
    torch.testing.assert_close(again, out, rtol=1e-4, atol=1e-5)
    with pytest.raises(UserError, match="1 to 3"):
        ours.get_intermediate_layers(x, 4)


def test_stochastic_depth_is_a_function_of_seed_step_and_block():
    model = VisionTransformer(**{**SMALL, "drop_path_rate": 0.5})
    assert [block.drop_path.rate for block in model.blocks] == [0.0, 0.25, 0.5]
    x = torch.randn(16, 3, 32, 32)

    def run(seed, step, module=model):
        set_drop_path_seed(module, seed, step)
        return module(x)

    first = run(1, 2)
    torch.rand(3)  # the global generator plays no part
    assert torch.equal(first, run(1, 2)) and torch.equal(first, run(1, 2, copy.deepcopy(model)))
    assert not torch.equal(first, run(1, 3)) and not torch.equal(first, run(2, 2))
    model.eval()
    assert torch.equal(run(1, 2), run(3, 4))
    plain = VisionTransformer(**SMALL)
    plain.load_state_dict(model.state_dict())
    assert torch.equal(plain(x), model(x))


def test_stochastic_depth_leaves_out_a_fixed_number_and_keeps_the_mean():
    layer = VisionTransformer(**{**SMALL, "drop_path_rate": 0.25}).blocks[-1].drop_path
    packing = pack([(40, 2), (7, 3), (1, 1)], torch.device("cpu"))
    counts = [30, 5, 1]
    x = torch.zeros(102, 4, requires_grad=True)
    seen = torch.zeros(102, 4)
    for _ in range(400):
        crops = tuple(layer.draw([n for n, _ in packing.groups]))
        assert [len(indices) for indices in crops] == counts
        kept = Kept(crops, pack([(30, 2), (5, 3), (1, 1)], torch.device("cpu")))
        assert take(x, packing, kept).shape == (30 * 2 + 5 * 3 + 1, 4)
        branch = torch.ones(30 * 2 + 5 * 3 + 1, 4, requires_grad=True)
        out = add_to_kept(x, branch, packing, kept)
        assert packing.first(out)[:40, 0].count_nonzero() == 30
        assert torch.equal(out[80:101:3], out[82:101:3])  # all tokens of a crop alike
        seen += out.detach() / 400
        out.sum().backward()
        torch.testing.assert_close(branch.grad.sum(), out.sum().detach())
    torch.testing.assert_close(seen[:80].mean(), torch.ones(()))
    torch.testing.assert_close(seen[80:101].mean(), torch.ones(()))
    assert (seen - 1).abs().max() < 0.2


def test_adding_to_the_kept_crops_has_pytorch_s_gradients_and_keeps_no_branch():
    packing, inner = (pack(groups, torch.device("cpu")) for groups in (((4, 2), (3, 3)), ((3, 2), (2, 3))))
    kept = Kept((torch.tensor([0, 1, 3]), torch.tensor([0, 2])), inner)
    x, branch = (torch.randn(n, 5, dtype=torch.float64, requires_grad=True) for n in (17, 12))
    assert torch.autograd.gradcheck(lambda x, branch: add_to_kept(x, branch, packing, kept), (x, branch))
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        add_to_kept(x, branch, packing, kept)
    assert saved and not any(t.is_floating_point() for t in saved)
    compiled = torch.compile(lambda x, branch: add_to_kept(x, branch, packing, kept), backend="aot_eager")
    assert torch.equal(compiled(x, branch), add_to_kept(x, branch, packing, kept))


def test_bf16_autocast_is_near_float32():
    ours, _ = pair(drop_path_rate=0.1)
    x = torch.randn(2, 3, 24, 24)
    set_drop_path_seed(ours, 0, 0)
    want = ours(x)
    set_drop_path_seed(ours, 0, 0)
    with torch.autocast("cpu", torch.bfloat16):
        got = ours(x)
    assert 0 < (got.float() - want).abs().max() < 0.1


def test_timm_gives_the_same_output_from_the_same_names():
    timm = pytest.importorskip("timm")
    ours = vit_small().eval()
    theirs = timm.create_model("vit_small_patch16_224", num_classes=0).eval()
    theirs.load_state_dict(ours.state_dict(), strict=True)
    x = torch.randn(2, 3, 224, 224)
    with torch.no_grad():
        torch.testing.assert_close(ours(x), theirs(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "call,message",
    [
        (lambda: VisionTransformer(**SMALL)(torch.zeros(1, 3, 30, 32)), "30x32 .*multiples of 8, for example 32x32"),
        (lambda: VisionTransformer(**SMALL)(torch.zeros(1, 1, 32, 32)), "in_chans"),
        (lambda: VisionTransformer(**{**SMALL, "img_size": 20}), "20x20"),
        (lambda: VisionTransformer(**{**SMALL, "num_heads": 5}), "multiple of num_heads 5"),
        (lambda: VisionTransformer(**{**SMALL, "drop_path_rate": 1.0}), "drop_path_rate"),
        (lambda: build_backbone("vit_smal"), "did you mean 'vit_small'"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(UserError, match=message):
        call()


def test_the_originals_arguments_build_a_backbone():
    assert vit_small(patch_size=16, img_size=[32], num_classes=0, depth=1).img_size == (32, 32)
    with pytest.raises(UserError, match="no classifier"):
        vit_small(num_classes=1000)
