"""Every program under examples/ runs, and those that replace other code give its numbers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from examples import original_loop
from tests import original

hugging_face = pytest.importorskip("examples.hugging_face")
lightly_loss = pytest.importorskip("examples.lightly_loss")
lightning_module = pytest.importorskip("examples.lightning_module")


def test_the_loop_gives_the_losses_of_the_original():
    steps = 14  # past the first epoch: frozen last layer and lower temperature, then neither
    found = original_loop.main(["--steps", str(steps)])

    torch.manual_seed(0)
    per_epoch, epochs = original_loop.PER_EPOCH, original_loop.EPOCHS
    run = original.Trainer(
        original_loop.network(0.1),
        original_loop.network(),
        original.DINOLoss(original_loop.OUT_DIM, 2 + original_loop.LOCAL, 0.04, 0.07, 1, epochs),
        lr=original.cosine_scheduler(0.002, 1e-6, epochs, per_epoch, 1),
        weight_decay=original.cosine_scheduler(0.04, 0.4, epochs, per_epoch),
        momentum=original.cosine_scheduler(0.9, 1.0, epochs, per_epoch),
    )
    expected = [run.step(crops, i, i // per_epoch) for i, crops in enumerate(original_loop.demo_crops(steps))]
    assert found == pytest.approx(expected, rel=1e-5)
    assert max(abs(loss - expected[0]) for loss in expected) > 0.01  # it trained


@pytest.mark.parametrize("views", [2, 5])
def test_the_adapter_is_lightlys_loss(views: int):
    from lightly.loss import DINOLoss

    ours, theirs = (kind(96, 0.03, 0.07, 3) for kind in (lightly_loss.FusedDINOLoss, DINOLoss))
    generator = torch.Generator().manual_seed(views)
    # Epochs within and past the warm-up, a temperature given, and neither.
    for how in ({"epoch": 0}, {"epoch": 2}, {"epoch": 9}, {"teacher_temp": 0.05}, {}):
        teacher = [torch.randn(6, 96, generator=generator) for _ in range(2)]
        students = [torch.randn(6, 96, generator=generator) for _ in range(views)]
        (loss, gradient), (expected, exact) = (_differentiated(f, teacher, students, how) for f in (ours, theirs))
        torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0)
        torch.testing.assert_close(gradient, exact, rtol=1e-5, atol=1e-5 * float(exact.abs().max()))
        torch.testing.assert_close(ours.center, theirs.center, rtol=1e-5, atol=1e-7)
    theirs.load_state_dict(ours.state_dict())


def _differentiated(loss, teacher: list[Tensor], students: list[Tensor], how: dict) -> tuple[Tensor, Tensor]:
    leaves = [x.clone().requires_grad_() for x in students]
    value = loss(teacher, leaves, **how)
    return value.detach(), torch.stack(torch.autograd.grad(value, leaves))


@pytest.mark.filterwarnings("ignore:.*weight_norm.*deprecated:FutureWarning")  # lightly's head
def test_the_lightly_pipeline_trains():
    losses = lightly_loss.main(["--steps", "6"])
    assert len(losses) == 6 and all(0 < loss < 7 for loss in losses)  # ln 512 = 6.24
    assert losses[0] != losses[-1]


def test_the_lightning_module_trains():
    module = lightning_module.main(["--steps", "30"])
    assert module.global_step == 30
    metrics = module.trainer.callback_metrics
    assert metrics["loss"] == pytest.approx(float(metrics["teacher_entropy"] + metrics["kl"]), rel=1e-5)
    pairs = list(zip(module.student.parameters(), module.teacher.parameters(), strict=True))
    apart = [float((p - t).detach().norm() / p.detach().norm()) for p, t in pairs if p.requires_grad and p.ndim > 1]
    assert min(apart) > 0 and max(apart) < 1  # the teacher follows, behind


def test_what_goes_to_the_hub_gives_the_features(tmp_path: Path):
    import transformers

    from dino_fast.eval.common.backbone import open_backbone

    folder = hugging_face.main(["--out", str(tmp_path), "--steps", "3", "--images", "200"])
    assert {file.name for file in folder.iterdir()} == {
        "README.md", "config.json", "model.safetensors", "preprocessor_config.json",
    }  # fmt: skip
    assert (folder / "README.md").read_text().startswith("---\nlibrary_name: transformers\n")
    assert json.loads((folder / "preprocessor_config.json").read_text())["image_mean"] == [0.286]
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == [0, 1, 2]

    images = torch.randn(3, 1, 28, 28, generator=torch.Generator().manual_seed(0))
    model = transformers.AutoModel.from_pretrained(folder, add_pooling_layer=False).eval()
    with torch.no_grad():
        found = model(images).last_hidden_state[:, 0]
        expected = open_backbone(tmp_path / "run", "teacher", "cpu").backbone(images)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
