"""Every format: written, loaded by the library it is for, and read back; the same weights bit for bit."""

from __future__ import annotations

import argparse
import json

import pytest
import torch

from dino_fast.cli import export as command
from dino_fast.errors import UserError
from dino_fast.eval.common.backbone import open_backbone
from dino_fast.models import DINOv2, VisionTransformer
from dino_fast.models.weights import key_mapping as names
from dino_fast.models.weights import read as files
from dino_fast.models.weights.export import FORMATS, export
from tests.models.test_dinov2 import KINDS, SMALL, randomised, same

onnxruntime = pytest.importorskip("onnxruntime")
timm = pytest.importorskip("timm")
transformers = pytest.importorskip("transformers")

PLAIN = {"img_size": 32, "patch_size": 8, "embed_dim": 64, "depth": 2, "num_heads": 2}
MEAN, STD = [0.4, 0.5, 0.6], [0.1, 0.2, 0.3]


def models():
    yield "dino", randomised(VisionTransformer(**PLAIN))
    yield "oblong", randomised(VisionTransformer(**{**PLAIN, "img_size": (16, 32), "mlp_ratio": 2.0}))
    for name, options in KINDS.items():
        yield name, randomised(DINOv2(**SMALL, **options))


MODELS = dict(models())


def images(model, count=2):
    return torch.randn(count, model.in_chans, *model.img_size, generator=torch.Generator().manual_seed(3))


def close(found, expected):
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4 * float(expected.detach().abs().max()))


@pytest.mark.parametrize("format", ["safetensors", "timm", "torch-hub", "transformers"])
@pytest.mark.parametrize("name", MODELS)
def test_weights_come_back_bit_for_bit(tmp_path, name, format):
    model = MODELS[name]
    out = tmp_path / ("b.safetensors" if format == "safetensors" else "b")
    path, _ = export(model, out, format, mean=MEAN, std=STD)
    again = open_backbone(path, device="cpu")
    assert (list(again.mean), list(again.std)) == (MEAN, STD)
    assert (again.backbone.num_heads, again.backbone.img_size) == (model.num_heads, model.img_size)
    expected = dict(model.state_dict())
    if format == "timm":  # which has no mask token, and adds the class token's position where there are registers
        expected.pop("mask_token", None)
        if "register_tokens" in expected:
            expected["cls_token"] = expected["cls_token"] + expected["pos_embed"][:, :1]
            expected["pos_embed"] = torch.cat((torch.zeros(1, 1, 64), expected["pos_embed"][:, 1:]), dim=1)
    same(again.backbone.state_dict(), expected)
    x = images(model)
    if format == "timm" and "register_tokens" in expected:
        close(again.backbone(x), model(x))
    else:
        assert torch.equal(again.backbone(x), model(x))
    assert [p.name for p in tmp_path.iterdir()] == [out.name]  # nothing temporary is left


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_timm_loads_the_folder_as_it_is(tmp_path, name):
    model = MODELS[name]
    path, how = export(model, tmp_path / "b", "timm", mean=MEAN, std=STD)
    assert how == f"timm.create_model('local-dir:{path}', pretrained=True)"
    theirs = timm.create_model(f"local-dir:{path}", pretrained=True).eval()
    assert list(theirs.pretrained_cfg["mean"]) == MEAN
    same(theirs.state_dict(), names.to_timm(model.state_dict()))
    close(theirs(images(model)), model(images(model)))


@pytest.mark.parametrize("name", [name for name in MODELS if name != "oblong"])
@torch.no_grad()
def test_transformers_loads_the_folder_as_it_is(tmp_path, name):
    model = MODELS[name]
    path, _ = export(model, tmp_path / "b", "transformers", mean=MEAN, std=STD)
    more = {} if isinstance(model, DINOv2) else {"add_pooling_layer": False}
    theirs, told = transformers.AutoModel.from_pretrained(path, output_loading_info=True, **more)
    assert not told["missing_keys"] and not told["unexpected_keys"] and not told["mismatched_keys"]
    found = theirs.eval()(images(model)).last_hidden_state[:, 0]
    close(found, model(images(model)))
    theirs.save_pretrained(tmp_path / "theirs")  # and what they write themselves comes back
    same(files.load_backbone(tmp_path / "theirs").state_dict(), model.state_dict())
    processor = transformers.AutoImageProcessor.from_pretrained(path)
    assert list(processor.image_mean) == MEAN and dict(processor.size) == dict(
        zip(("height", "width"), model.img_size, strict=True)
    )


@torch.no_grad()
def test_torch_hub_loads_the_folder(tmp_path):
    model = MODELS["registers"]
    path, _ = export(model, tmp_path / "b", "torch-hub", mean=MEAN, std=STD)
    theirs = torch.hub.load(str(path), "backbone", source="local").eval()
    assert torch.equal(theirs(images(model)), model(images(model)))
    state = torch.load(path / "backbone.pth", weights_only=True)
    same(state, model.state_dict())


@pytest.mark.parametrize("name", ["dino", "gated with registers"])
@torch.no_grad()
def test_onnx_gives_the_features_for_any_number_of_images(tmp_path, name):
    model = MODELS[name]
    path, how = export(model, tmp_path / "b.onnx")
    assert "checked by onnxruntime: largest relative difference" in how
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    for count in (1, 5):
        found = session.run(["features"], {"images": images(model, count).numpy()})[0]
        close(torch.from_numpy(found), model(images(model, count)))
    assert [p.name for p in tmp_path.iterdir()] == ["b.onnx"]


@pytest.mark.parametrize("name", ["dino", "gated with registers"])
@torch.no_grad()
def test_torch_export_gives_the_features_for_any_number_of_images(tmp_path, name):
    model = MODELS[name].train()
    path, _ = export(model, tmp_path / "b.pt2")
    assert model.training
    model.eval()
    program = torch.export.load(path)
    state = {f"backbone.{name}": tensor for name, tensor in model.state_dict().items()}
    assert all(torch.equal(tensor, state[name]) for name, tensor in program.state_dict.items())
    assert {name for name in state if "mask_token" not in name} <= set(program.state_dict)
    for count in (1, 5):
        torch.testing.assert_close(program.module()(images(model, count)), model(images(model, count)))


def test_timms_own_files_load(tmp_path):
    """A state dict and a folder of a timm model, registers and gated MLP included."""
    for number, arch in enumerate(("vit_small_patch14_reg4_dinov2", "vit_giant_patch14_dinov2")):
        torch.manual_seed(number)
        sizes = {"img_size": 28, "embed_dim": 48, "depth": 2, "num_heads": 3, "num_classes": 0}
        theirs = randomised(timm.create_model(arch, **sizes))
        torch.save(theirs.state_dict(), tmp_path / f"{number}.pth")
        ours = files.load_backbone(tmp_path / f"{number}.pth", num_heads=3).eval()
        x = torch.randn(2, 3, 28, 28)
        close(ours(x), theirs(x))
        same(names.to_timm(ours.state_dict()), theirs.state_dict())


@pytest.mark.parametrize("arch", ["vit_small_patch14_reg4_dinov2", "vit_small_patch16_224"])
def test_timm_names(arch, monkeypatch):
    create = timm.create_model
    monkeypatch.setattr(timm, "create_model", lambda name, pretrained, **kw: create(name, depth=1, **kw))
    frozen = open_backbone(f"timm:{arch}", device="cpu")
    assert isinstance(frozen.backbone, DINOv2) is ("dinov2" in arch)
    assert frozen.backbone.num_heads == 6 and list(frozen.mean) == list(create(arch, depth=1).pretrained_cfg["mean"])


def test_names_of_torch_hub(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    model = randomised(VisionTransformer(224, 16, embed_dim=384, depth=12, num_heads=6))
    asked = []

    def fetch(url, path):
        asked.append(url)
        files.export_backbone(model, path)

    monkeypatch.setattr(torch.hub, "download_url_to_file", fetch)
    for _ in range(2):
        same(files.load_backbone("hub:dino_vits16").state_dict(), model.state_dict())
    assert asked == ["https://dl.fbaipublicfiles.com/dino/dino_deitsmall16_pretrain/dino_deitsmall16_pretrain.pth"]
    with pytest.raises(UserError, match="did you mean 'dino_vits16'"):
        open_backbone("hub:dino_vit16")

    def no_network(url, path):
        raise OSError("no route to host")

    monkeypatch.setattr(torch.hub, "download_url_to_file", no_network)
    with pytest.raises(
        UserError, match=r"no route to host\). Download https://.*dinov2_vitb14_reg4_pretrain.pth where"
    ):
        files.load_backbone("hub:dinov2_vitb14_reg")


def test_what_cannot_be_written(tmp_path, monkeypatch):
    model = MODELS["dino"]
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "a").touch()
    unscaled = DINOv2(**SMALL, layer_scale=None)
    for arguments, message in (
        ((model, tmp_path / "b.xyz"), "does not say the format.*safetensors"),
        ((model, tmp_path / "b", "tim"), "did you mean 'timm'"),
        ((model, tmp_path / "b.pth", "onnx"), "must end in .onnx"),
        ((model, tmp_path / "full", "timm"), "is not empty"),
        ((model, tmp_path / "full" / "a", "timm"), "is a file"),
        ((unscaled, tmp_path / "b", "transformers"), "LayerScale"),
        ((model, tmp_path / "full" / "a" / "b", "transformers"), "is a file, not a folder"),
    ):
        with pytest.raises(UserError, match=message):
            export(*arguments)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["full"]
    monkeypatch.setitem(__import__("sys").modules, "onnxscript", None)
    with pytest.raises(UserError, match="pip install onnx onnxscript"):
        export(model, tmp_path / "b.onnx")


def test_folders_that_are_damaged(tmp_path):
    path, _ = export(MODELS["dino"], tmp_path / "b", "transformers")
    (path / "config.json").write_text("{")
    with pytest.raises(UserError, match="cannot be read as JSON"):
        files.load_backbone(path)
    state = names.to_transformers(MODELS["dino"].state_dict(), False)
    state.pop("encoder.layer.0.attention.attention.key.weight")
    torch.save(state, tmp_path / "part.pth")
    with pytest.raises(UserError, match=r"missing: blocks.0.attn.qkv.weight"):
        files.load_backbone(tmp_path / "part.pth", num_heads=2)


def test_the_command(tmp_path, capsys):
    assert tuple(FORMATS) == command.FORMATS
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    weights = files.export_backbone(MODELS["dino"], tmp_path / "b.safetensors", mean=MEAN, std=STD)
    given = ["--checkpoint", str(weights), "--out", str(tmp_path / "hf"), "--format", "transformers"]
    assert command.run(parser.parse_args(given)) == 0
    assert "load it with: transformers.AutoModel.from_pretrained" in capsys.readouterr().out
    assert json.loads((tmp_path / "hf" / "preprocessor_config.json").read_text())["image_mean"] == MEAN
