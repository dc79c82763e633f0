"""Files: the original's layout, ours, backbones alone, and what must be refused."""

from __future__ import annotations

import argparse
import json
import os
import warnings

import numpy as np
import pytest
import torch

from dino_fast.cli import export
from dino_fast.engine import checkpoint
from dino_fast.errors import UserError
from dino_fast.models import DINOHead, MultiCropWrapper, VisionTransformer, vit_tiny
from dino_fast.models.weights import read as files
from tests import original

SMALL = {"img_size": 32, "patch_size": 8, "embed_dim": 64, "depth": 2, "num_heads": 1}
HEAD = {"hidden_dim": 16, "bottleneck_dim": 8}


def network(seed, backbone=VisionTransformer, head=DINOHead, wrapper=MultiCropWrapper, **options):
    torch.manual_seed(seed)
    return wrapper(backbone(**{**SMALL, **options}), head(64, 20, **HEAD))


@pytest.fixture
def published(tmp_path):
    """A checkpoint as the original writes it, optimizer with numpy's floats and all."""
    student, teacher = (network(i, original.ViT, original.DINOHead, original.MultiCropWrapper) for i in (1, 2))
    optimizer = torch.optim.AdamW(student.parameters())
    student([torch.randn(2, 3, 32, 32)]).sum().backward()
    optimizer.step()
    optimizer.param_groups[0]["lr"] = np.float64(1e-4)
    content = {
        "student": {f"module.{name}": tensor for name, tensor in student.state_dict().items()},
        "teacher": teacher.state_dict(),
        "optimizer": optimizer.state_dict(),
        "epoch": 3,
        "args": argparse.Namespace(arch="vit_small", patch_size=8, lr=5e-4),
        "dino_loss": {"center": torch.zeros(1, 20)},
    }
    torch.save(content, tmp_path / "checkpoint.pth")
    return tmp_path / "checkpoint.pth", student, teacher


def same(got, want):
    assert set(got) == set(want)
    assert all(torch.equal(got[name], want[name]) for name in want)


def test_the_originals_checkpoint(published):
    path, student, teacher = published
    for which, theirs in (("student", student), ("teacher", teacher)):
        ours = network(0)
        files.load_weights(ours, files.read_state(path, which), path)
        same(ours.state_dict(), theirs.state_dict())
        backbone = files.load_backbone(path, which=which)
        x = torch.randn(2, 3, 32, 16)
        torch.testing.assert_close(backbone.eval()(x), theirs.eval().backbone(x), rtol=1e-5, atol=1e-5)


def test_a_teacher_with_batch_norm_carries_module_and_loads(tmp_path):
    ours = network(0)
    state = {f"module.{name}": tensor for name, tensor in ours.state_dict().items()}
    torch.save({"teacher": state}, tmp_path / "a.pth")
    same(files.read_state(tmp_path / "a.pth"), ours.state_dict())


@pytest.mark.parametrize(
    "teacher,student",
    [
        ("momentum_backbone.", "backbone."),  # solo-learn
        ("backbone.", "student_backbone."),  # lightly
        ("teacher_backbone.", "student_backbone."),
        ("teacher.backbone.", "student.backbone."),
        ("ssl_model.teacher.backbone.", "ssl_model.student.backbone."),
    ],
)
def test_other_libraries_teachers_and_students(tmp_path, teacher, student):
    net = VisionTransformer(**SMALL).state_dict()
    values = {teacher: 2.0, student: 1.0}
    state = {prefix + n: torch.full_like(t, value) for prefix, value in values.items() for n, t in net.items()}
    torch.save({"state_dict": state}, tmp_path / "a.ckpt")
    for which, value in (("teacher", 2.0), ("student", 1.0)):
        assert (files.load_backbone(tmp_path / "a.ckpt", which=which).cls_token == value).all()


def test_a_network_that_is_not_there_or_not_known_is_refused(tmp_path):
    net = VisionTransformer(**SMALL).state_dict()
    torch.save({"student.backbone." + n: t for n, t in net.items()}, tmp_path / "a.pth")
    with pytest.raises(UserError, match=r"holds no teacher: its names begin with 'student\.'; try --which student"):
        files.load_backbone(tmp_path / "a.pth", which="teacher")
    with pytest.warns(UserWarning, match=r"a\.pth holds no teacher; its student is loaded"):
        same(files.load_backbone(tmp_path / "a.pth").state_dict(), net)
    torch.save({prefix + n: t for prefix in ("one.", "two.") for n, t in net.items()}, tmp_path / "b.pth")
    with pytest.raises(UserError, match=r"holds 2 networks, 'one\.', 'two\.'"):
        files.load_backbone(tmp_path / "b.pth")


class Hostile:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_a_hostile_pickle_is_refused(tmp_path):
    torch.save({"teacher": {}, "args": Hostile(tmp_path / "ran")}, tmp_path / "bad.pth")
    with pytest.raises(UserError, match=r"refused.*could run code"):
        files.read_state(tmp_path / "bad.pth")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_a_backbone_alone_comes_back_with_its_sizes(tmp_path, suffix):
    model = VisionTransformer((16, 16), 4, in_chans=1, embed_dim=128, depth=2, num_heads=2, mlp_ratio=2.0)
    path = files.export_backbone(model, tmp_path / "new" / f"b{suffix}")
    again = files.load_backbone(path)
    same(again.state_dict(), model.state_dict())
    assert (again.img_size, again.num_heads, again.in_chans) == ((16, 16), 2, 1)
    assert [p.name for p in path.parent.iterdir()] == [path.name]
    (tmp_path / "plain").touch()
    assert path.stat().st_mode == (tmp_path / "plain").stat().st_mode  # readable by whom other files are


def test_what_shapes_do_not_tell_is_in_the_export(tmp_path):
    model = VisionTransformer((16, 24), 4, embed_dim=48, depth=1, num_heads=3)
    path = files.export_backbone(model, tmp_path / "b.safetensors", mean=[0.5] * 3)
    again = files.load_backbone(path)
    assert (again.img_size, again.num_heads, files.describe(path)["mean"]) == ((16, 24), 3, [0.5] * 3)
    bare = files.export_backbone(model, tmp_path / "b.pth")
    with pytest.raises(UserError, match="24 position embeddings, not a square"):
        files.load_backbone(bare)
    square = VisionTransformer(16, 4, embed_dim=48, depth=1, num_heads=3)
    bare = files.export_backbone(square, tmp_path / "s.pth")
    with pytest.raises(UserError, match="how many heads"):
        files.load_backbone(bare)
    assert files.load_backbone(bare, num_heads=3).num_heads == 3


@pytest.fixture
def run_directory(tmp_path):
    networks = {}
    for step in (1, 2):
        student, teacher = network(step), network(step + 10)
        networks[step] = teacher
        state = {
            "student": student.state_dict(),
            "teacher": teacher.state_dict(),
            "config": {"model": {"arch": "vit_tiny", "num_heads": 4}, "data": {"mean": (0.1, 0.2, 0.3)}},
        }
        checkpoint.save(tmp_path / "run" / "checkpoints", step, state)
    checkpoint.mark_best(tmp_path / "run" / "checkpoints", 1)
    return tmp_path / "run", networks


def test_our_runs(run_directory, tmp_path):
    run, networks = run_directory
    same(files.read_state(run), networks[2].state_dict())
    same(files.read_state(run / "checkpoints" / "best"), networks[1].state_dict())
    same(files.read_state(run / "checkpoints" / "step-00000001" / "tensors.safetensors"), networks[1].state_dict())
    assert files.describe(run)["mean"] == [0.1, 0.2, 0.3]
    assert files.load_backbone(run).num_heads == 4
    parser = argparse.ArgumentParser()
    export.add_arguments(parser)
    out = tmp_path / "out.safetensors"
    assert export.run(parser.parse_args(["--checkpoint", str(run), "--out", str(out)])) == 0
    same(files.read_state(out), networks[2].backbone.state_dict())


def test_a_truncated_checkpoint_of_ours(run_directory):
    run, networks = run_directory
    newest = run / "checkpoints" / "step-00000002"
    data = (newest / "tensors.safetensors").read_bytes()
    (run / "list.pth").write_text("no checkpoint at all")
    with pytest.raises(UserError, match=r"list\.pth cannot be read.*Accepted: a run") as told:
        files.read_state(run / "list.pth")
    assert "weights_only" not in str(told.value)
    (newest / "tensors.safetensors").write_bytes(data[:-100])
    with pytest.warns(UserWarning, match="step-00000002 is damaged"):
        same(files.read_state(run), networks[1].state_dict())
    with pytest.raises(UserError, match=r"damaged.*Given the run's directory, its newest whole"):
        files.read_state(newest)


def test_a_text_is_no_checkpoint(tmp_path):
    (tmp_path / "notes.txt").write_text("hello")
    with pytest.raises(UserError, match=r"notes\.txt cannot be read as a file of torch\.save\. Accepted: a run"):
        files.read_state(tmp_path / "notes.txt")


@pytest.mark.parametrize("share", [0.0, 0.3, 0.9])
def test_truncated_files(published, tmp_path, share):
    path = published[0]
    weights = files.export_backbone(network(0).backbone, tmp_path / "b.safetensors")
    for file in (path, weights):
        data = file.read_bytes()
        file.write_bytes(data[: int(len(data) * share)])
        with pytest.raises(UserError, match=r"cut off|not a whole"):
            files.read_state(file)


def test_a_full_disk_is_told_as_one(tmp_path, monkeypatch):
    def fail(*_, **__):
        raise RuntimeError("[enforce fail at inline_container.cc:671] . unexpected pos 64 vs 0")

    monkeypatch.setattr(torch, "save", fail)
    monkeypatch.setattr("shutil.disk_usage", lambda path: argparse.Namespace(free=0))
    with pytest.raises(UserError, match="its disk is full"):
        files.export_backbone(network(0).backbone, tmp_path / "b.pth")


def test_every_misfit_is_named():
    module = network(0).backbone
    state = dict(module.state_dict())
    state["norm.weigth"] = state.pop("norm.weight")
    state["pos_embed"] = state["pos_embed"][:, :5]
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    state["cls_token"] = state["cls_token"] + 1
    with pytest.raises(UserError) as caught:
        files.load_weights(module, state, "x.pth")
    text = str(caught.value)
    assert "x.pth" in text
    assert "missing: norm.weight; did you mean 'norm.weigth'?" in text
    assert "unexpected: norm.weigth" in text
    assert "shape: pos_embed: given [1, 5, 64], expected [1, 17, 64]" in text
    same(module.state_dict(), before)


def test_bad_requests(tmp_path, published):
    tiny = files.export_backbone(vit_tiny(16, img_size=32), tmp_path / "tiny.safetensors")
    assert files.load_backbone(tiny, arch="vit_tiny", patch_size=16).num_heads == 3
    torch.save({"student": {"fc.weight": torch.ones(2)}}, tmp_path / "other.pth")
    torch.save({"epoch": 3}, tmp_path / "none.pth")
    (tmp_path / "empty").mkdir()
    other = tmp_path / "other.pth"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for call, message in (
            (lambda: files.load_backbone(tiny, arch="vit_small"), "not a vit_small.*it is a vit_tiny"),
            (lambda: files.load_backbone(tiny, arch="vit_smal"), "did you mean 'vit_small'"),
            (lambda: files.load_backbone(tiny, patch_size=8), "patches of 16 pixels, 8"),
            (lambda: files.load_backbone(other, which="student"), "not a vision transformer.*fc.weight"),
            (lambda: files.read_state(other), "holds no teacher; it has student"),
            (lambda: files.read_state(other, "tutor"), "'teacher' or 'student'"),
            (lambda: files.read_state(tmp_path / "none.pth"), "not a tensor: epoch"),
            (lambda: files.read_state(tmp_path / "absent"), "does not exist"),
            (lambda: files.read_state(tmp_path / "empty"), "no complete checkpoint"),
            (lambda: files.export_backbone(vit_tiny(16, img_size=32), tmp_path / "x.onnx"), "must end in"),
            (lambda: files.export_backbone(network(0).backbone, tiny / "x.pth"), "tiny.safetensors is a file"),
        ):
            with pytest.raises(UserError, match=message):
                call()


def test_a_description_is_plain_json(tmp_path):
    from safetensors import safe_open

    path = files.export_backbone(network(0).backbone, tmp_path / "b.safetensors")
    with safe_open(path, framework="pt") as file:
        facts = json.loads(file.metadata()["dino_fast"])
    assert facts == {"patch_size": 8, "num_heads": 1, "img_size": [32, 32]}


def test_timm_loads_our_export(tmp_path):
    timm = pytest.importorskip("timm")
    model = vit_tiny(16).eval()
    path = files.export_backbone(model, tmp_path / "b.safetensors")
    theirs = timm.create_model("vit_tiny_patch16_224", num_classes=0, checkpoint_path=str(path)).eval()
    torch.save(timm.create_model("vit_tiny_patch16_224").state_dict(), tmp_path / "with_classifier.pth")
    assert files.load_backbone(tmp_path / "with_classifier.pth", arch="vit_tiny").num_heads == 3
    x = torch.randn(1, 3, 224, 224)
    with torch.no_grad():
        torch.testing.assert_close(model(x), theirs(x), rtol=1e-5, atol=1e-5)
