"""The backbone of DINOv2 under its official names, against timm's and transformers' models of it."""

from __future__ import annotations

import re

import pytest
import torch
from safetensors.torch import save_file

from dino_fast.errors import UserError
from dino_fast.eval.common.backbone import class_attention
from dino_fast.models import DINOv2, build_backbone
from dino_fast.models.weights import read as files
from dino_fast.models.weights.key_mapping import to_transformers

transformers = pytest.importorskip("transformers")

SMALL = {"img_size": 56, "embed_dim": 64, "depth": 3, "num_heads": 2}
KINDS = {
    "plain": {},
    "registers": {"registers": 4},
    "gated": {"swiglu": True},
    "gated with registers": {"swiglu": True, "registers": 4},
}


def official(registers=0, swiglu=False, embed_dim=384, depth=12, tokens=37 * 37) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a released file."""
    shapes: dict[str, tuple[int, ...]] = {
        "cls_token": (1, 1, embed_dim),
        "pos_embed": (1, 1 + tokens, embed_dim),
        "mask_token": (1, embed_dim),
        "patch_embed.proj.weight": (embed_dim, 3, 14, 14),
        "patch_embed.proj.bias": (embed_dim,),
        "norm.weight": (embed_dim,),
        "norm.bias": (embed_dim,),
    }
    if registers:
        shapes["register_tokens"] = (1, registers, embed_dim)
    hidden = -(-embed_dim * 8 // 3 // 8) * 8
    mlp = {"w12": (2 * hidden, embed_dim), "w3": (embed_dim, hidden)}
    mlp = mlp if swiglu else {"fc1": (4 * embed_dim, embed_dim), "fc2": (embed_dim, 4 * embed_dim)}
    linear = {"attn.qkv": (3 * embed_dim, embed_dim), "attn.proj": (embed_dim, embed_dim)}
    linear |= {f"mlp.{name}": shape for name, shape in mlp.items()}
    for i in range(depth):
        for name, shape in linear.items():
            shapes |= {f"blocks.{i}.{name}.weight": shape, f"blocks.{i}.{name}.bias": shape[:1]}
        for name in ("norm1.weight", "norm1.bias", "norm2.weight", "norm2.bias", "ls1.gamma", "ls2.gamma"):
            shapes[f"blocks.{i}.{name}"] = (embed_dim,)
    return shapes


def randomised(model):
    """Every weight drawn anew, so that no scale is small and no two channels are alike."""
    torch.manual_seed(1)
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.2 if p.ndim > 1 else 0.5)
    return model.eval()


def same(got, want):
    assert set(got) == set(want)
    assert all(torch.equal(got[name], want[name]) for name in want)


@pytest.mark.parametrize("name", ["dinov2_vits14", "dinov2_vits14_reg"])
def test_a_released_file_loads_strictly(tmp_path, name):
    registers = 4 if name.endswith("_reg") else 0
    torch.manual_seed(0)
    state = {key: torch.randn(shape) for key, shape in official(registers).items()}
    torch.save(state, tmp_path / f"{name}4_pretrain.pth")
    backbone = files.load_backbone(tmp_path / f"{name}4_pretrain.pth", arch=name, patch_size=14)
    assert isinstance(backbone, DINOv2) and backbone.registers == registers
    assert (backbone.img_size, backbone.num_heads, backbone.embed_dim) == ((518, 518), 6, 384)
    same(backbone.state_dict(), state)
    assert {key: tuple(t.shape) for key, t in build_backbone(name).state_dict().items()} == official(registers)


def test_the_giants_shapes():
    with torch.device("meta"):
        giant = build_backbone("dinov2_vitg14_reg")
    assert {key: tuple(t.shape) for key, t in giant.state_dict().items()} == official(4, True, 1536, 40)
    assert giant.num_heads == 24


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_comes_back_bit_for_bit(tmp_path, kind):
    model = randomised(DINOv2(**SMALL, **KINDS[kind]))
    for suffix in (".pth", ".safetensors"):
        path = files.export_backbone(model, tmp_path / f"b{suffix}")
        again = files.load_backbone(path, num_heads=2).eval()
        same(again.state_dict(), model.state_dict())
        x = torch.randn(2, 3, 28, 70)
        assert torch.equal(again(x), model(x))


def test_a_training_checkpoint_with_chunked_blocks(tmp_path):
    model = randomised(DINOv2(**SMALL))
    chunked = {
        re.sub(r"blocks\.(\d)", lambda m: f"blocks.{int(m[1]) // 2}.{m[1]}", n): t
        for n, t in model.state_dict().items()
    }
    renamed = {f"backbone.{name}": tensor for name, tensor in chunked.items()}
    head = {"dino_head.mlp.0.weight": torch.ones(2, 2), "ibot_head.mlp.0.weight": torch.ones(2, 2)}
    torch.save({"teacher": {**renamed, **head}}, tmp_path / "teacher_checkpoint.pth")
    same(files.load_backbone(tmp_path / "teacher_checkpoint.pth", num_heads=2).state_dict(), model.state_dict())
    assert "head.mlp.0.weight" in files.read_state(tmp_path / "teacher_checkpoint.pth")


@pytest.mark.parametrize("kind", KINDS)
def test_features_equal_transformers(kind, tmp_path):
    options = {"hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 2, "image_size": 56, "patch_size": 14}
    options |= {"use_swiglu_ffn": "swiglu" in KINDS[kind], "layer_norm_eps": 1e-6}
    registers = "registers" in KINDS[kind]
    stem = "Dinov2WithRegisters" if registers else "Dinov2"
    options |= {"num_register_tokens": 4} if registers else {}
    theirs = getattr(transformers, f"{stem}Model")(getattr(transformers, f"{stem}Config")(**options)).eval()
    model = randomised(DINOv2(**SMALL, **KINDS[kind]))
    theirs.config.save_pretrained(tmp_path)
    save_file(to_transformers(model.state_dict(), True), tmp_path / "model.safetensors", metadata={"format": "pt"})
    theirs = type(theirs).from_pretrained(tmp_path).eval()
    for size in ((56, 56), (70, 42)):
        x = torch.randn(2, 3, *size)
        with torch.no_grad():
            found, expected = model.forward_features(x), theirs(x).last_hidden_state
        if registers:
            expected = torch.cat((expected[:, :1], expected[:, 5:]), dim=1)
        # They interpolate to the exact size; the weights without registers expect 0.1 patches more.
        if size == (56, 56) or registers:
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(model(x), found[:, 0])


def test_attention_leaves_registers_out():
    model = randomised(DINOv2(**SMALL, registers=4))
    x = torch.randn(2, 3, 56, 28)
    rows = class_attention(model, x)
    assert rows.shape == (2, 2, 8)
    torch.testing.assert_close(rows, model.get_last_selfattention(x)[:, :, 0, 5:], rtol=1e-4, atol=1e-6)
    layers = model.get_intermediate_layers(x, 2)
    assert [tuple(layer.shape) for layer in layers] == [(2, 9, 64)] * 2
    torch.testing.assert_close(layers[-1], model.forward_features(x))


def test_names_that_are_near():
    with pytest.raises(UserError, match=r"did you mean 'dinov2_vits14'"):
        build_backbone("dinov2_vit_s14")


def test_the_class_token_starts_near_zero_as_dinov2s():
    torch.manual_seed(0)
    token = DINOv2(28, 14, embed_dim=64, depth=1, num_heads=1).cls_token
    assert 0 < token.detach().std() < 3e-6
