"""Runs that start from other weights: which weights they get, what is told, and what is refused."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import pytest
import torch

from dino_fast.engine import checkpoint, train
from dino_fast.engine.train_state import TrainState
from dino_fast.errors import UserError
from dino_fast.models import DINOv2, VisionTransformer
from dino_fast.models.weights.export import export
from dino_fast.models.weights.read import export_backbone, load_backbone
from tests import original
from tests.engine.test_train_step import _config, _run, _train_state, _weights
from tests.engine.test_trainer import _config as run_config
from tests.engine.test_trainer import images  # noqa: F401
from tests.models.test_dinov2 import randomised, same

timm = pytest.importorskip("timm")


def started(source: Path | str, **given: Any) -> TrainState:
    return _train_state(_config(init_from=str(source), seed=5, **given))


@pytest.fixture
def trained() -> TrainState:
    train_state = _train_state(_config())
    _run(train_state, range(4))
    return train_state


@pytest.fixture
def ours(trained: TrainState, tmp_path: Path) -> Path:
    state = {**trained.state_dict(), "config": {"arch": "vit_tiny"}, "num_heads": 2}
    checkpoint.save(tmp_path / "run" / "checkpoints", 4, state)
    return tmp_path / "run"


@pytest.mark.parametrize("norm_last_layer", [True, False])
def test_prototypes_are_brought_to_length_1_where_they_must_keep_it(
    trained: TrainState, tmp_path: Path, norm_last_layer: bool
) -> None:
    lengths = torch.linspace(0.977, 1.015, trained.config.out_dim)[:, None]
    with torch.no_grad():
        for network in (trained.student, trained.teacher):
            network.head.last_layer.weight_g.copy_(lengths)
    state = {**trained.state_dict(), "config": {"arch": "vit_tiny"}, "num_heads": 2}
    checkpoint.save(tmp_path / "run" / "checkpoints", 4, state)
    with pytest.warns(UserWarning, match="starting from") as caught:
        state = started(tmp_path / "run", norm_last_layer=norm_last_layer, freeze_last_layer=0.0)
    message = "prototypes of length 0.977 to 1.015 brought to 1"
    assert (message in str(caught[0].message)) == norm_last_layer
    expected = torch.ones_like(lengths) if norm_last_layer else lengths
    for network in (state.student, state.teacher):
        assert torch.equal(network.head.last_layer.weight_g, expected)
    _run(state, range(3))
    gains = [network.head.last_layer.weight_g for network in (state.student, state.teacher)]
    assert all(torch.equal(gain, expected) == norm_last_layer for gain in gains)


@pytest.fixture
def published(trained: TrainState, tmp_path: Path) -> Path:
    """The same networks as the original saves them; prototypes as a newer torch names them."""
    newer = {"weight_g": "parametrizations.weight.original0", "weight_v": "parametrizations.weight.original1"}
    student = {f"module.{name}": tensor for name, tensor in trained.student.state_dict().items()}
    for old, new in newer.items():
        student[f"module.head.last_layer.{new}"] = student.pop(f"module.head.last_layer.{old}")
    content = {
        "student": student,
        "teacher": trained.teacher.state_dict(),
        "epoch": 3,
        "args": argparse.Namespace(arch="vit_tiny"),
        "dino_loss": trained.loss.state_dict(),
    }
    torch.save(content, tmp_path / "checkpoint.pth")
    return tmp_path / "checkpoint.pth"


@pytest.mark.parametrize("kind", ["ours", "published"])
def test_a_full_checkpoint_gives_both_networks_heads_and_centre(
    kind: str, trained: TrainState, request: pytest.FixtureRequest
) -> None:
    source = request.getfixturevalue(kind)
    with pytest.warns(
        UserWarning, match=r"student's backbone, its head; the teacher's backbone, its head; the center$"
    ):
        train_state = started(source)
    same(train_state.student.state_dict(), trained.student.state_dict())
    same(train_state.teacher.state_dict(), trained.teacher.state_dict())
    assert torch.equal(train_state.loss.center, trained.loss.center) and train_state.loss.center.any()
    assert not train_state.optimizer.state_dict()["state"]
    with pytest.warns(UserWarning, match="the heads are new$"):
        train_state = started(source, init_head=False)
    same(train_state.teacher.backbone.state_dict(), trained.teacher.backbone.state_dict())
    same(train_state.student.head.state_dict(), _train_state(_config(seed=5)).student.head.state_dict())
    assert not train_state.loss.center.any()


def test_a_predictor_that_only_one_side_has(published: Path, trained: TrainState, tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match=r"its head \(the predictor is new\); the teacher's"):
        train_state = started(published, predictor="mlp")
    found = train_state.student.head.state_dict()
    same({name: found[name] for name in trained.student.head.state_dict()}, trained.student.head.state_dict())
    networks = {name: getattr(train_state, name).state_dict() for name in ("student", "teacher")}
    torch.save(networks, tmp_path / "with.pth")
    with pytest.warns(UserWarning, match=r"its head \(without its predictor\); the teacher's"):
        plain = started(tmp_path / "with.pth")
    same(plain.teacher.state_dict(), trained.teacher.state_dict())
    with pytest.warns(UserWarning, match="its head; the teacher's"):
        again = started(tmp_path / "with.pth", predictor="mlp")
    same(again.student.state_dict(), networks["student"])


def test_it_goes_on_as_the_original_would(published: Path) -> None:
    """The losses of a run from the checkpoint are those of the plain transcription from the same weights."""
    from dino_fast.engine.schedules import Schedules
    from tests.engine.test_train_step import PER_EPOCH, _batch, _original, train_step

    with pytest.warns(UserWarning):
        ours = started(published)
    theirs = _original(ours, ours.config)
    theirs.teacher.load_state_dict(ours.teacher.state_dict())
    theirs.loss.center.copy_(ours.loss.center)
    assert isinstance(theirs, original.Trainer)
    for step in range(6):
        batch = _batch(50 + step, ours.config)
        loss = train_step(ours, batch, Schedules(ours.config, PER_EPOCH).values_at(step), step)["loss"]
        expected = theirs.step([*batch.global_crops, *batch.local_crops], step, step // PER_EPOCH)
        assert loss == pytest.approx(expected, rel=1e-5), step


@pytest.mark.parametrize("format", ["safetensors", "timm", "transformers", "torch-hub"])
def test_a_backbone_of_any_layout_starts_both(format: str, trained: TrainState, tmp_path: Path) -> None:
    backbone = trained.teacher.backbone
    assert isinstance(backbone, VisionTransformer)
    path, _ = export(backbone, tmp_path / ("b.safetensors" if format == "safetensors" else "b"), format)
    with pytest.warns(UserWarning, match="the heads are new; student and teacher start alike$"):
        train_state = started(path)
    same(train_state.student.backbone.state_dict(), backbone.state_dict())
    same(train_state.teacher.backbone.state_dict(), backbone.state_dict())
    same(train_state.teacher.head.state_dict(), train_state.student.head.state_dict())
    _run(train_state, range(2))


def test_positions_of_another_size_are_interpolated(tmp_path: Path) -> None:
    backbone = randomised(VisionTransformer(32, 4, embed_dim=32, depth=2, num_heads=2))
    path = export_backbone(backbone, tmp_path / "b.safetensors")
    with pytest.warns(UserWarning, match="interpolated from 8x8 to 4x4 patches"):
        train_state = started(path)
    x = torch.randn(2, 3, 16, 16)
    torch.testing.assert_close(train_state.student.backbone.eval()(x), backbone(x))


def test_dinov2s_weights_train_on(tmp_path: Path) -> None:
    """From the released names: registers, scales, patches of 14; the mask token is kept as it is."""
    torch.manual_seed(0)
    release = DINOv2(56, 14, embed_dim=384, depth=12, num_heads=6, registers=4)
    torch.save(release.state_dict(), tmp_path / "dinov2_vits14_reg4_pretrain.pth")
    given = {"arch": "dinov2_vits14_reg", "patch_size": 14, "global_size": 28, "local_size": 14, "init": "published"}
    config = {**given, "embed_dim": None, "depth": None, "num_heads": None, "batch_size": 2, "lr": 0.5}
    with pytest.warns(UserWarning, match="from 4x4 to 2x2"):
        train_state = started(tmp_path / "dinov2_vits14_reg4_pretrain.pth", **config)
    before = _weights(train_state.student)
    assert torch.equal(before["backbone.register_tokens"], release.register_tokens)
    _run(train_state, range(6, 8))
    moved = {name for name, value in _weights(train_state.student).items() if not torch.equal(value, before[name])}
    assert {"backbone.register_tokens", "backbone.blocks.0.ls1.gamma", "backbone.pos_embed"} <= moved
    assert "backbone.mask_token" not in moved
    state = {**train_state.state_dict(), "config": {"arch": "dinov2_vits14_reg"}, "num_heads": 6}
    checkpoint.save(tmp_path / "run" / "checkpoints", 2, state)
    same(load_backbone(tmp_path / "run").state_dict(), train_state.teacher.backbone.state_dict())


def test_models_of_timm(monkeypatch: pytest.MonkeyPatch) -> None:
    create = timm.create_model
    sizes = {"img_size": 16, "patch_size": 4, "embed_dim": 32, "depth": 2, "num_heads": 2}
    monkeypatch.setattr(timm, "create_model", lambda name, pretrained, **kw: create(name, **{**kw, **sizes}))
    with pytest.warns(UserWarning, match="starting from timm:vit_tiny_patch16_224.*start alike"):
        train_state = started("timm:vit_tiny_patch16_224")
    same(train_state.student.backbone.state_dict(), train_state.teacher.backbone.state_dict())


def test_what_does_not_fit(published: Path, tmp_path: Path) -> None:
    for given, message in (
        (
            {"out_dim": 64},
            r"(?s)last_layer.weight_v: given \[96, 24\], expected \[64, 24\].*--no-init-head.*--out-dim is 96",
        ),
        ({"depth": 3}, r"(?s)missing: blocks.2.norm1.weight.*--arch vit_small --embed-dim 32 --depth 2 --patch-size 4"),
        ({"patch_size": 8}, r"(?s)patch_embed.proj.weight: given \[32, 3, 4, 4\].*--patch-size 4"),
        ({"head_bn": True}, r"(?s)missing: mlp.1.running_mean.*--no-init-head"),
    ):
        with pytest.raises(UserError, match=message):
            started(published, **given)
    torch.save({"conv1.weight": torch.zeros(2), "fc.weight": torch.zeros(2, 2)}, tmp_path / "resnet.pth")
    with pytest.raises(UserError, match=r"unexpected: conv1\.weight"):
        started(tmp_path / "resnet.pth")
    with pytest.raises(UserError, match="does not exist"):
        started(tmp_path / "none")


@pytest.mark.filterwarnings("ignore:starting from")
def test_a_resumed_run_needs_the_file_no_more(published: Path, images: Path, tmp_path: Path) -> None:  # noqa: F811
    given = {"out_dim": 96, "head_hidden_dim": 48, "head_bottleneck_dim": 24, "knn_every": 0}
    out = tmp_path / "out"
    train(run_config(images, out, init_from=str(published), max_steps=3, epochs=2, **given))
    published.unlink()
    path = train(run_config(images, out, init_from=str(published), max_steps=6, epochs=2, resume=True, **given))
    assert (path / "checkpoints" / "step-00000006").exists()
    for folder in (out / "checkpoints").glob("step-*"):
        (folder / "tensors.safetensors").unlink()
    again = run_config(images, out, init_from=str(published), max_steps=8, epochs=2, resume=True, **given)
    with pytest.raises(UserError, match=r"there is no whole checkpoint in .* nothing was changed"):
        train(again)
