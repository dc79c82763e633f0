"""The backbone against the plain transcription and timm."""

from __future__ import annotations

import copy
import math
from fractions import Fraction

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from dino_fast.errors import UserError
from dino_fast.models import VisionTransformer, build_backbone, set_drop_path_seed, vit_small
from dino_fast.models.packing import KeptSamples, add_to_kept, computed_count, pack, take, without_dropped
from dino_fast.models.vit import uniform
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
    # Indices and a mask, of 4, 7 and 1 images, at rates 0.25 and 0.5.
    assert len(kept) == 2 * 2 * ((3 + 6 + 1) + (2 + 4 + 1))
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


def share_kept(rate, n, draws, seed=0):
    """How often each of n crops was kept, [n]; every draw must add the branch, scaled, to whole crops or not at all."""
    model = VisionTransformer(**{**SMALL, "depth": 1})
    model.blocks[0].drop_path.rate = rate
    set_drop_path_seed(model, seed, 0)
    packing = pack([(n, 2)], torch.device("cpu"))
    images, x, kept = [torch.empty(n, 3, 32, 32)], torch.zeros(2 * n, 4), torch.zeros(n)
    for _ in range(draws // 2):
        for branch in model._kept_samples(packing, images, None)[0]:
            rows = take(torch.ones_like(x), packing, branch)
            out = add_to_kept(x, rows, packing, branch).view(n, 8)
            assert torch.equal(out, out[:, :1].expand(-1, 8))
            assert all(v == 0 or v == pytest.approx(1 / (1 - rate)) for v in out[:, 0].tolist())
            kept += out[:, 0] > 0
    return kept / draws


@pytest.mark.parametrize("rate", [0.05, 0.1, 0.25, 0.3, 0.9])
@pytest.mark.parametrize("n", [1, 2, 4, 64])
def test_the_expected_share_is_dropped_of_any_number_of_images(n, rate):
    draws = 1000
    share = share_kept(rate, n, draws)
    # Five standard deviations: of a crop, which is kept or not, and of the mean over crops, which are drawn apart, or
    # in the place of one another.
    bound = 5 * math.sqrt(rate * (1 - rate) / draws)
    assert bound < rate  # never dropping any would fail
    assert (share - (1 - rate)).abs().max() < bound
    assert abs(share.mean() - (1 - rate)) < bound / math.sqrt(n)


@pytest.mark.parametrize("rate", [0.2, 0.25, 0.3, 0.5, 0.75, 0.9, 0.99])
@pytest.mark.parametrize("n", [1, 2, 3, 4, 7, 10, 64])
def test_the_share_of_gathered_crops_is_exact(n, rate):
    """m of n are computed, m - 1 kept, the last with probability f: a crop with ((m - 1) + f) / n."""
    count = computed_count(n, rate)
    last = n * (1 - rate) - (count - 1)
    assert 1 <= count <= n and 0 < last <= 1 + 1e-8
    assert count == math.ceil(n * (1 - Fraction(str(rate))))
    assert (count - 1 + last) / n == pytest.approx(1 - rate, rel=1e-12)


def test_gathered_crops_are_a_fixed_number_and_ascend():
    layer = VisionTransformer(**{**SMALL, "drop_path_rate": 0.25}).blocks[-1].drop_path
    counts, computed = [30, 5, 1], [23, 4, 1]
    lasts = []
    for _ in range(400):
        *crops, mask = layer.draw(counts, np.arange(36)).split([*computed, sum(computed)])
        for n, indices, part in zip(counts, crops, mask.split(computed), strict=True):
            assert (indices.diff() > 0).all() and indices[0] >= 0 and indices[-1] < n
            assert len(part) - 1 <= part.sum() <= len(part)
        lasts.append([part.prod() for part in mask.split(computed)])
    share = torch.tensor(lasts).double().mean(dim=0)
    assert (share - torch.tensor([0.5, 0.75, 0.75])).abs().max() < 0.125  # five standard deviations, of 400 draws


def test_a_draw_is_a_function_of_the_number_of_the_image():
    """Below the rate from which crops are gathered: two parts of a batch draw what the whole draws."""
    model = VisionTransformer(**{**SMALL, "drop_path_rate": 0.19})

    def masks(numbers):
        set_drop_path_seed(model, 5, 6)
        return model.stochastic_depth([torch.empty(len(numbers), 3, 8, 8)], np.array(numbers)).view(4, -1)

    whole = masks(range(200))
    assert torch.equal(torch.cat((masks(range(77)), masks(range(77, 200))), dim=1), whole)
    assert torch.equal(masks([7, 3, 150]), whole[:, [7, 3, 150]])
    assert len(whole.unique(dim=0)) == 4  # another draw for each branch and block
    with pytest.raises(UserError, match="3 numbers for 2 images"):
        model.stochastic_depth([torch.empty(2, 3, 8, 8)], np.arange(3))


def test_blocks_differ_where_nobody_sets_a_seed():
    model = VisionTransformer(**SMALL)
    for block in model.blocks:
        block.drop_path.rate = 0.1
    drawn = model.stochastic_depth([torch.empty(500, 3, 8, 8)]).view(6, -1)
    assert len(drawn.unique(dim=0)) == 6


def test_uniform_numbers_are_those_of_splitmix64():
    # The reference implementation's first outputs from the seed 1234567 (Vigna, splitmix64.c; Rosetta Code).
    first = [6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431, 16408922859458223821]
    assert uniform(1234567, np.arange(5)).tolist() == [(n >> 11) / 2**53 for n in first]


@pytest.mark.parametrize("rate", [0.15, 0.6])
@pytest.mark.parametrize("counts", [(1, 1), (2, 9), (12, 40)])
def test_a_branch_without_the_dropped_crops_equals_the_masked_one(rate, counts, monkeypatch):
    """What a CPU computes and what a GPU does: outputs and gradients."""
    model, _ = packed_and_apart()
    for block in model.blocks:
        block.drop_path.rate = rate
    images = [
        torch.randn(n, 3, *size, dtype=torch.float64) for n, size in zip(counts, ((32, 32), (16, 16)), strict=True)
    ]
    dropped = 0
    for step in range(5):
        results = []
        for form in (without_dropped, lambda kept: kept):
            monkeypatch.setattr("dino_fast.models.vit.without_dropped", form)
            set_drop_path_seed(model, 0, step)
            model.zero_grad()
            out = model(images)
            out.square().sum().backward()
            results.append([out.detach(), *(p.grad.clone() for p in model.parameters())])
        torch.testing.assert_close(*results, rtol=1e-9, atol=1e-9)
        set_drop_path_seed(model, 0, step)
        monkeypatch.setattr("dino_fast.models.vit.without_dropped", without_dropped)
        _, packing = model._tokens(images)
        branches = [branch for pair in model._kept_samples(packing, images, None) for branch in pair]
        dropped += sum(sum(counts) - sum(n for n, _ in branch.packing.groups) for branch in branches)
    assert dropped or counts == (1, 1)  # not computed


@pytest.mark.parametrize("rows", ["all", "all kept", "gathered", "gathered and kept"])
def test_adding_to_the_kept_crops_has_pytorch_s_gradients_and_keeps_no_branch(rows):
    packing = pack([(4, 2), (3, 3)], torch.device("cpu"))
    kept = KeptSamples(None, torch.tensor([1, 0, 1, 1, 0, 1, 1]), packing, 1.25)
    if "gathered" in rows:
        inner = pack([(3, 2), (2, 3)], torch.device("cpu"))
        crops = (torch.tensor([0, 1, 3]), torch.tensor([0, 2]))
        kept = KeptSamples(crops, torch.tensor([1, 0, 1, 1, 1]), inner, 1.25)
    kept = kept._replace(mask=None) if rows.endswith("kept") else kept
    tokens = sum(n * length for n, length in kept.packing.groups)
    x, branch = (torch.randn(n, 5, dtype=torch.float64, requires_grad=True) for n in (17, tokens))
    assert torch.autograd.gradcheck(lambda x, branch: add_to_kept(x, branch, packing, kept), (x, branch))
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        add_to_kept(x, branch, packing, kept)
    assert not any(t.is_floating_point() for t in saved)
    compiled = torch.compile(lambda x, branch: add_to_kept(x, branch, packing, kept), backend="aot_eager")
    torch.testing.assert_close(compiled(x, branch), add_to_kept(x, branch, packing, kept), rtol=1e-14, atol=1e-14)


def test_the_scale_is_not_rounded_to_bfloat16():
    packing = pack([(8, 16)], torch.device("cpu"))
    kept = KeptSamples(None, torch.ones(8, dtype=torch.int64), packing, 1 / 0.9)
    x = torch.zeros(128, 256, dtype=torch.bfloat16, requires_grad=True)
    branch = (1 + torch.rand(128, 256)).bfloat16().requires_grad_()
    grad = (1 + torch.rand(128, 256)).bfloat16()
    out = add_to_kept(x, branch, packing, kept)
    (given,) = torch.autograd.grad(out, branch, grad)
    assert given.dtype == torch.bfloat16
    # Rounding to nearest errs to both sides; a scale rounded to 1.109375 would err by -1.6e-3.
    for value, exact in ((out, branch), (given, grad)):
        assert abs((value.double().mean() * 0.9 / exact.double().mean()).item() - 1) < 2e-4


def test_small_rates_match_the_original_s_arithmetic():
    """The same mask gives the original's residual, x + branch / (1 - rate) * mask, to the last block."""
    ours, _ = pair(drop_path_rate=0.15)
    ours = ours.double()
    x = torch.randn(6, 3, 32, 32, dtype=torch.float64)
    drawn = ours.stochastic_depth([x])
    masks = iter(drawn.view(4, 6).double())
    tokens, packing = ours._tokens([x])
    for block in ours.blocks:
        for branch in (lambda t, b=block: b.attention_branch(t, packing, False), block.mlp_branch):
            rate = block.drop_path.rate
            mask = next(masks).repeat_interleave(17)[:, None] / (1 - rate) if rate else 1.0
            tokens = tokens + branch(tokens) * mask
    torch.testing.assert_close(ours(x, drawn), ours.norm(packing.first(tokens)), rtol=1e-10, atol=1e-10)


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
