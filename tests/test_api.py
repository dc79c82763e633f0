"""`dino_fast.train`, `load` and `embed`: what a program of one's own calls."""

from __future__ import annotations

import io
import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torch.utils.data import TensorDataset

import dino_fast
from dino_fast.cli import main as cli
from dino_fast.data import open_source
from dino_fast.errors import UserError
from dino_fast.eval.common.backbone import open_backbone

RNG = np.random.default_rng(0)
SMALL = {
    "arch": "vit_tiny", "embed_dim": 16, "depth": 2, "num_heads": 2, "patch_size": 8, "global_size": 16,
    "local_size": 8, "local_crops": 1, "out_dim": 32, "head_hidden_dim": 16, "head_bottleneck_dim": 8,
    "batch_size": 8, "epochs": 1, "warmup_epochs": 0, "knn_every": 0, "device": "cpu",
}  # fmt: skip
SIZELESS = {name: value for name, value in SMALL.items() if name not in ("arch", "embed_dim", "depth", "num_heads")}
IMAGES = RNG.integers(0, 256, (16, 20, 24, 3), dtype=np.uint8)


class Pooled(nn.Module):
    """A backbone of one's own: a convolution, the mean of its map."""

    def __init__(self, channels: int = 3) -> None:
        super().__init__()
        self.layer = nn.Conv2d(channels, 6, 4, stride=4)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.layer(images).relu().mean(dim=(2, 3))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("photos")
    for i, image in enumerate(IMAGES):
        (root / f"class{i % 2}").mkdir(exist_ok=True)
        Image.fromarray(image).save(root / f"class{i % 2}" / f"{i:02d}.png")
    return root


@pytest.fixture(scope="module")
def run(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dino_fast.Run:
    return dino_fast.train(data=folder, out=tmp_path_factory.mktemp("runs") / "a", mean=[0.5] * 3, **SMALL)


def test_a_run_has_a_path_metrics_and_a_backbone(run, folder: Path) -> None:
    assert Path(run) == run.path and str(run) == str(run.path) and (run.path / "config.yaml").exists()
    assert [row["step"] for row in run.metrics] == [0, 1] and all(row["loss"] > 0 for row in run.metrics)
    again = dino_fast.train(data=str(folder), out=run.path, resume=True, mean=[0.5] * 3, **SMALL)
    assert again.metrics == run.metrics
    backbone = run.load()
    assert backbone.size == (16, 16) and backbone.mean == (0.5,) * 3 and not backbone.training


def test_the_program_and_the_command_do_the_same(run, folder: Path, tmp_path: Path) -> None:
    words = [x for name, value in SMALL.items() for x in (f"--{name}", str(value))]
    out = tmp_path / "run"
    assert cli.main(["train", "--data", str(folder), "--out", str(out), "--mean", "0.5", "0.5", "0.5", *words]) == 0
    assert (out / "config.yaml").read_text() == (run.path / "config.yaml").read_text()
    assert torch.equal(dino_fast.load(out)(IMAGES), run.load()(IMAGES))


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"batch_size": 0}, ["--batch-size", "0"]),
        ({"data": "no/such/folder"}, ["--data", "no/such/folder"]),
        ({"preset": "big"}, ["--preset", "big"]),
        ({"arch": "vit_huge"}, ["--arch", "vit_huge"]),
        ({"patch_size": 3}, ["--patch-size", "3"]),
    ],
)
def test_errors_are_the_sentences_of_the_command(settings, words, capsys, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError) as error:
        dino_fast.train(**settings)
    assert cli.main(["train", *words]) == 2
    assert capsys.readouterr().err == f"dino-fast: {error.value}\n"
    assert not list(tmp_path.iterdir())


def test_names_that_are_no_settings_are_refused() -> None:
    with pytest.raises(UserError, match="there is no such setting; did you mean 'batch_size'"):
        dino_fast.train(batchsize=3)


def test_a_yaml_file_and_a_config_are_taken(folder: Path, tmp_path: Path, run) -> None:
    other = dino_fast.train(run.path / "config.yaml", out=tmp_path / "b", seed=3)
    assert other.metrics[0]["loss"] != run.metrics[0]["loss"]
    config = dino_fast.build_config({**SMALL, "data": str(folder), "out": str(tmp_path / "c")})
    assert isinstance(config, dino_fast.Config)
    assert dino_fast.train(config, mean=[0.5] * 3).metrics[0]["loss"] == run.metrics[0]["loss"]


@pytest.mark.parametrize("kind", ["array", "pair", "pil", "dataset", "paths"])
def test_data_is_any_object(kind: str, folder: Path, tmp_path: Path) -> None:
    data = {
        "array": IMAGES,
        "pair": (IMAGES / 255, [i % 2 for i in range(16)]),
        "pil": [Image.fromarray(image) for image in IMAGES],
        "dataset": TensorDataset(torch.from_numpy(IMAGES).permute(0, 3, 1, 2), torch.arange(16) % 2),
        "paths": sorted(folder.rglob("*.png")),
    }[kind]
    out = tmp_path / "run"
    settings = {**SMALL, "out": out, "knn_every": 1.0}
    run = dino_fast.train(data=data, max_steps=1, **settings)
    assert ("knn" in run.metrics[0]) == (kind in ("pair", "dataset"))
    with pytest.raises(UserError, match=r"were given from Python as an object.*train\(data=\.\.\., resume=True\)"):
        dino_fast.train(out=out, resume=True)
    assert len(dino_fast.train(data=data, resume=True, out=out, max_steps=2).metrics) == 2
    with pytest.raises(UserError, match="trains on other images"):
        dino_fast.train(data=IMAGES[::-1] // 2, resume=True, out=out, max_steps=2)


def test_a_backbone_of_ones_own(folder: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    module = Pooled()
    before = module.layer.weight.clone()
    run = dino_fast.train(data=folder, out=tmp_path / "run", arch=module, **SIZELESS)
    assert torch.equal(module.layer.weight, before)  # a copy is trained
    backbone = run.load()
    assert type(backbone.backbone) is Pooled and backbone(IMAGES).shape == (16, 6)
    assert not torch.equal(backbone.backbone.layer.weight, before)
    assert torch.equal(
        dino_fast.load(run.path / "export" / "teacher.safetensors", arch=Pooled())(IMAGES), backbone(IMAGES)
    )
    assert dino_fast.embed(folder, run).features.shape == (16, 6)
    program = f"import dino_fast; dino_fast.load({str(run.path)!r})"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert "custom/Pooled is a module of the program that trained it: give it again" in done.stderr


@pytest.mark.parametrize(
    ("module", "message"),
    [
        (Pooled(5), r"does not take images \[2, 3, 16, 16\] \(RuntimeError: .*5 channels"),
        (nn.Conv2d(3, 4, 3), r"gives \[2, 4, 14, 14\] .* expected features \[2, dim\]"),
        (nn.Flatten(), "has no parameters to train"),
    ],
)
def test_modules_that_are_no_backbones_are_refused(module, message, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message):
        dino_fast.train(data=IMAGES, out=tmp_path / "run", arch=module, **SIZELESS)
    assert not (tmp_path / "run").exists()
    with pytest.raises(UserError, match="leave out depth"):
        dino_fast.train(data=IMAGES, out=tmp_path / "run", arch=Pooled(), depth=3, **SIZELESS)


def test_a_loaded_backbone_takes_images_as_they_are(run, folder: Path) -> None:
    backbone = dino_fast.load(run)
    source = open_source(folder)
    order = [int(Path(source.name(i)).stem) for i in range(16)]
    expected = dino_fast.embed(folder, run).features[np.argsort(order)]
    pictures = [Image.fromarray(image) for image in IMAGES]
    encoded = io.BytesIO()
    pictures[0].save(encoded, "png")
    for images in (
        IMAGES, torch.from_numpy(IMAGES).permute(0, 3, 1, 2), (IMAGES / 255).astype(np.float32), pictures, list(IMAGES),
    ):  # fmt: skip
        features = backbone(images)
        assert features.dtype == torch.float32 and not features.requires_grad
        assert np.allclose(features, expected, atol=1e-6)
    for image in (pictures[0], IMAGES[0], folder / "class0" / "00.png", [str(folder / "class0" / "00.png")],
                  [encoded.getvalue()]):  # fmt: skip
        assert np.allclose(backbone(image), expected[:1], atol=1e-6)
    several = [Image.fromarray(IMAGES[0]).resize(size) for size in ((30, 50), (16, 16), (7, 9), (200, 10))]
    assert backbone(several).shape == (4, 16)
    gray = backbone(pictures[0].convert("L"))
    assert gray.shape == (1, 16) and torch.equal(gray, backbone(pictures[0].convert("L").convert("RGB")))
    frozen = open_backbone(run.path, device="cpu")
    tokens = frozen.backbone.get_intermediate_layers(frozen.normalize(torch.zeros(1, 3, 16, 16, dtype=torch.uint8)))[0]
    black = np.zeros((16, 16, 3), np.uint8)
    assert torch.allclose(backbone(black, features="patches"), tokens[:, 1:])
    assert torch.allclose(backbone(black, features="mean"), tokens[:, 1:].mean(dim=1))
    assert torch.allclose(backbone(black), tokens[:, 0], atol=1e-6)


@pytest.mark.parametrize(
    ("images", "message"),
    [
        ([], "no images"),
        ([IMAGES[0], None], "image 1: None is no image"),
        (torch.randn(2, 3, 16, 16), "image 0: .*before any normalization"),
        (["no/such.png"], "image 0: no/such.png: No such file"),
        (np.zeros((2, 2, 2, 2, 2), np.uint8), "shape"),
    ],
)
def test_what_is_no_image_is_refused_by_its_place(run, images, message) -> None:
    with pytest.raises(UserError, match=message):
        run.load()(images)


def test_features_that_are_not_there_are_refused(run) -> None:
    with pytest.raises(UserError, match="accepted: cls, mean, patches"):
        run.load()(IMAGES, features="patch")
    with pytest.raises(UserError, match="does not exist"):
        dino_fast.load("no/such/run")


# ---- the Hugging Face Hub, without a network ----


def test_a_folder_for_the_hub_gives_the_same_features(run, tmp_path: Path) -> None:
    pytest.importorskip("huggingface_hub")
    backbone = run.load()
    backbone.save_pretrained(tmp_path / "repo")
    assert {p.name for p in (tmp_path / "repo").iterdir()} == {"config.json", "model.safetensors", "README.md"}
    assert json.loads((tmp_path / "repo" / "config.json").read_text())["embed_dim"] == 16
    for loaded in (
        dino_fast.Backbone.from_pretrained(tmp_path / "repo"),
        dino_fast.load(tmp_path / "repo"),
        dino_fast.Backbone.from_pretrained(run.path, device="cpu"),
    ):
        assert torch.equal(loaded(IMAGES), backbone(IMAGES))


def test_export_writes_and_uploads_a_repository(run, tmp_path: Path, monkeypatch, capsys) -> None:
    hub = pytest.importorskip("huggingface_hub")
    store = tmp_path / "hub"
    store.mkdir()
    monkeypatch.setattr(hub.HfApi, "create_repo", lambda self, repo_id, **_: f"https://hub/{repo_id}")

    def upload(self, *, repo_id, folder_path, **_):
        shutil.copytree(folder_path, store / repo_id)

    def download(repo_id, name, **_):
        return str(store / repo_id / name)

    monkeypatch.setattr(hub.HfApi, "upload_folder", upload)
    monkeypatch.setattr(hub, "hf_hub_download", download)
    monkeypatch.chdir(tmp_path)
    words = ["export", "--checkpoint", str(run.path), "--format", "hub", "--push", "me/flowers"]
    assert cli.main(words) == 0
    assert "uploaded to https://hub/me/flowers" in capsys.readouterr().out
    assert torch.equal(dino_fast.Backbone.from_pretrained("me/flowers")(IMAGES), run.load()(IMAGES))
    assert cli.main([*words[:3], "--out", "x.safetensors", "--push", "me/x"]) == 2
    assert "add --format hub" in capsys.readouterr().err


def test_a_repository_that_cannot_be_had_is_a_sentence(monkeypatch) -> None:
    hub = pytest.importorskip("huggingface_hub")

    def refused(*_, **__):
        raise hub.errors.LocalEntryNotFoundError("no network here")

    monkeypatch.setattr(hub, "hf_hub_download", refused)
    with pytest.raises(UserError, match=r"me/none is no folder here.*no network here"):
        dino_fast.Backbone.from_pretrained("me/none")
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(UserError, match=r"pip install 'dino-fast\[hub\]'"):
        dino_fast.Backbone.from_pretrained("me/none")


def test_the_package_is_a_command_and_lists_its_door() -> None:
    done = subprocess.run([sys.executable, "-m", "dino_fast", "--version"], capture_output=True, text=True, check=True)
    assert dino_fast.__version__ in done.stdout
    assert {"train", "load", "embed", "Config", "build_config"} <= set(dir(dino_fast))
    with pytest.raises(AttributeError, match="no attribute 'trian'"):
        _ = dino_fast.trian
    reference = (Path(__file__).parents[1] / "docs" / "reference.md").read_text()
    for name in ("api.train", "api.load", "eval.embed.embed", "engine.config.Config", "engine.config.build_config"):
        assert f"::: dino_fast.{name}\n" in reference
