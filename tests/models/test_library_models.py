"""Models of timm and torchvision: the original's ResNet-50 file, and runs, opened, judged and exported."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.models import resnet50

from dino_fast.cli.main import main
from dino_fast.engine import checkpoint, train
from dino_fast.engine.config import build_config
from dino_fast.errors import UserError
from dino_fast.eval import knn, linear
from dino_fast.eval.common.backbone import open_backbone
from dino_fast.models import build_backbone
from dino_fast.models.weights import read as files
from dino_fast.models.weights.export import export

timm = pytest.importorskip("timm")


@pytest.fixture(scope="module")
def released(tmp_path_factory):
    """A ResNet-50 as the original's file has it, without classifier, and with one as torchvision's has it."""
    folder = tmp_path_factory.mktemp("resnet")
    torch.manual_seed(0)
    model = resnet50().eval()
    torch.save(model.state_dict(), folder / "resnet50.pth")
    model.fc = torch.nn.Identity()
    torch.save(model.state_dict(), folder / "dino_resnet50_pretrain.pth")
    return folder, model


@pytest.fixture(scope="module")
def colours(tmp_path_factory):
    root = tmp_path_factory.mktemp("colours")
    random = np.random.default_rng(0)
    for name, colour in (("blue", (9, 9, 200)), ("red", (200, 9, 9))):
        (root / name).mkdir()
        for i in range(6):
            pixels = np.clip(np.array(colour) + random.integers(-9, 9, (40, 40, 3)), 0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(root / name / f"{i}.png")
    return root


@torch.no_grad()
def test_the_originals_resnet_loads_and_is_judged(released, colours):
    folder, model = released
    for name in ("dino_resnet50_pretrain.pth", "resnet50.pth"):
        backbone = files.load_backbone(folder / name).eval()
        x = torch.randn(1, 3, 64, 64)
        assert torch.equal(backbone(x), model(x)) and backbone.embed_dim == 2048
    path = folder / "dino_resnet50_pretrain.pth"
    found = knn.evaluate(path, colours, colours, k=3, image_size=32, device="cpu")
    assert found["top1"] == 1 and found["feature"] == "pooled features [2048]"
    result, _ = linear.evaluate(path, colours, colours, image_size=32, device="cpu", epochs=2)
    assert result["feature"] == "pooled features [2048]"
    with pytest.raises(UserError, match=r"torchvision/resnet50, another library.*knn, linear or retrieval"):
        open_backbone(path)
    state = model.state_dict()
    state["layer1.0.conv4.weight"] = state.pop("layer1.0.conv1.weight")
    torch.save(state, folder / "odd.pth")
    with pytest.raises(UserError, match=r"missing: layer1\.0\.conv1\.weight; did you mean"):
        files.load_backbone(folder / "odd.pth")


@pytest.mark.parametrize(
    "arch,given", [("timm/xcit_nano_12_p16_224", {}), ("torchvision/resnet18", {"optimizer": "sgd"})]
)
def test_a_run_of_another_librarys_model(arch, given, colours, tmp_path):
    sizes = {"global_size": 32, "local_size": 32, "local_crops": 1, "out_dim": 32, "head_hidden_dim": 16}
    options = {"head_bottleneck_dim": 8, "batch_size": 4, "epochs": 1, "knn_every": 0, "device": "cpu", "head_bn": True}
    options |= {"data": str(colours), "out": str(tmp_path / "run"), "arch": arch, "drop_path_rate": 0.0, "max_steps": 2}
    run = train(build_config({**sizes, **options, **given}))
    from_run, exported = files.load_backbone(run), files.load_backbone(run / "export" / "teacher.safetensors")
    state = checkpoint.load(run / "checkpoints")[1]["teacher"]
    for backbone in (from_run, exported):
        assert all(torch.equal(t, state[f"backbone.{name}"]) for name, t in backbone.state_dict().items())
    assert knn.evaluate(run, colours, colours, k=3, device="cpu")["image_size"] == [32, 32]
    with pytest.warns(UserWarning, match="its head; the center"):
        train(build_config({**sizes, **options, **given, "out": str(tmp_path / "next"), "init_from": str(run)}))


@pytest.mark.parametrize(
    "arch,options",
    [
        ("timm/vit_tiny_patch16_224", {"img_size": 32, "in_chans": 1}),
        ("timm/resnet10t", {"in_chans": 3}),
        ("torchvision/resnet18", {"img_size": 64}),
    ],
)
@torch.no_grad()
def test_they_are_exported_to_every_format_that_has_them(arch, options, tmp_path, capsys):
    torch.manual_seed(0)
    model = build_backbone(arch, **options).eval()
    x = torch.randn(2, model.in_chans, *model.img_size)
    wanted, facts = model(x), {"mean": [0.4] * 3, "std": [0.2] * 3}
    saved = tmp_path / "b.safetensors"
    for format, out in (("safetensors", saved), ("torch-hub", tmp_path / "hub")):
        export(model, out, format, **facts)
        opened = open_backbone(out, device="cpu", tokens=False)
        assert torch.equal(opened.backbone(x), wanted) and opened.mean == (0.4,) * 3
        assert opened.backbone.arch == arch
    # The command reads the file again, as it reads a run.
    assert main(["export", "--checkpoint", str(saved), "--out", str(tmp_path / "b.pt2")]) == 0
    program = torch.export.load(tmp_path / "b.pt2").module()
    for images in (x, torch.randn(3, *x.shape[1:])):
        torch.testing.assert_close(program(images), model(images), rtol=1e-5, atol=1e-5)
    if arch.startswith("timm"):
        export(model, tmp_path / "timm", "timm", **facts)
        again = timm.create_model(f"local-dir:{tmp_path / 'timm'}", pretrained=True).eval()
        assert torch.equal(again(x), wanted)
        assert list(again.pretrained_cfg["mean"]) == facts["mean"]
    else:
        with pytest.raises(UserError, match=f"timm has no layout for {arch}; use safetensors"):
            export(model, tmp_path / "timm", "timm", **facts)
    capsys.readouterr()
    assert main(["export", "--checkpoint", str(saved), "--out", str(tmp_path / "t"), "--format", "transformers"]) == 2
    assert f"transformers has no layout for {arch}; use safetensors" in capsys.readouterr().err


def test_a_model_that_cannot_be_traced_is_said_so(tmp_path):
    class Odd(torch.nn.Module):
        arch, img_size, in_chans = "timm/odd", (8, 8), 3

        def forward(self, x):
            return x.mean() if x.sum().item() > 0 else x.std()

    with pytest.raises(UserError, match=r"timm/odd cannot be traced by torch.export .*--format safetensors"):
        export(Odd(), tmp_path / "b.pt2")
    assert not list(tmp_path.iterdir())
