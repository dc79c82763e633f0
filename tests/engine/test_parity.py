"""The engine's losses are those of the published algorithm, and the transcription of it is what it says."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch import Tensor

from dino_fast.benchmarks import original
from dino_fast.engine.build import build_train_state
from dino_fast.engine.config import Config
from dino_fast.engine.schedules import Schedules
from dino_fast.engine.train_step import train_step

EPOCHS, STEPS_PER_EPOCH, BATCH, LOCAL = 5, 4, 8, 3


@dataclass
class Batch:
    global_crops: Tensor
    local_crops: Tensor


def config(**changes) -> Config:
    # Every schedule moves within the 20 steps, clipping bites, and the freeze ends: see the second test.
    settings = dict(
        data="none", global_size=32, local_size=16, local_crops=LOCAL, arch="vit_tiny", patch_size=4, embed_dim=64,
        depth=2, num_heads=2, drop_path_rate=0.0, out_dim=512, head_hidden_dim=128, head_bottleneck_dim=32,
        warmup_teacher_temp=0.04, teacher_temp=0.07, warmup_teacher_temp_epochs=3, batch_size=BATCH, epochs=EPOCHS,
        lr=0.032, warmup_epochs=1.0, weight_decay=0.04, weight_decay_end=4.0, momentum_teacher=0.9, clip_grad=0.05,
        freeze_last_layer=1.0, seed=3,
    )  # fmt: skip
    return Config(**(settings | changes))


def published(settings: Config, weights: dict[str, Tensor]) -> original.Trainer:
    def network() -> original.MultiCropWrapper:
        backbone = original.ViT(32, settings.patch_size, 3, settings.embed_dim, settings.depth, settings.num_heads)
        head = original.DINOHead(
            settings.embed_dim,
            settings.out_dim,
            norm_last_layer=settings.norm_last_layer,
            hidden_dim=settings.head_hidden_dim,
            bottleneck_dim=settings.head_bottleneck_dim,
        )
        return original.MultiCropWrapper(backbone, head)

    student, teacher = network(), network()
    student.load_state_dict(weights)
    loss = original.DINOLoss(settings.out_dim, 2 + LOCAL, 0.04, 0.07, 3, EPOCHS)
    return original.Trainer(
        student,
        teacher,
        loss,
        lr=original.cosine_scheduler(settings.lr * BATCH / 256, settings.min_lr, EPOCHS, STEPS_PER_EPOCH, 1),
        weight_decay=original.cosine_scheduler(
            settings.weight_decay, settings.weight_decay_end, EPOCHS, STEPS_PER_EPOCH
        ),
        momentum=original.cosine_scheduler(settings.momentum_teacher, 1.0, EPOCHS, STEPS_PER_EPOCH),
        clip_grad=settings.clip_grad,
        freeze_last_layer=1,
    )


@pytest.mark.parametrize("norm_last_layer", [True, False])
def test_twenty_steps_equal_the_published_algorithm(norm_last_layer):
    settings = config(norm_last_layer=norm_last_layer)
    run = build_train_state(settings, 3, torch.device("cpu"), "fp32")
    yardstick = published(settings, run.student.state_dict())
    schedules = Schedules(settings, STEPS_PER_EPOCH)
    generator = torch.Generator().manual_seed(0)
    ours, theirs = [], []
    for step in range(EPOCHS * STEPS_PER_EPOCH):
        large = torch.randn(2, BATCH, 3, 32, 32, generator=generator)
        small = torch.randn(LOCAL, BATCH, 3, 16, 16, generator=generator)
        ours.append(train_step(run, Batch(large, small), schedules.values_at(step), step)["loss"])
        theirs.append(yardstick.step([*large, *small], step, step // STEPS_PER_EPOCH))

    np.testing.assert_allclose(ours, theirs, rtol=1e-5)
    assert len(ours) == 20 and np.ptp(theirs) > 0.05  # the run went somewhere
    torch.testing.assert_close(run.loss.center, yardstick.loss.center, rtol=1e-4, atol=1e-6)
    for side in ("student", "teacher"):
        expected = getattr(yardstick, side).state_dict()
        for name, value in getattr(run, side).state_dict().items():
            if name.endswith("attn.qkv.bias"):
                continue  # the keys' part has a gradient of exactly 0, so Adam walks along its rounding errors
            torch.testing.assert_close(value, expected[name], rtol=1e-3, atol=1e-4, msg=f"{side} {name}")


@pytest.mark.parametrize(
    "change",
    [
        {"clip_grad": 0.0},
        {"freeze_last_layer": 0.0},
        {"weight_decay_end": 0.04},
        {"momentum_teacher": 0.99},
        {"teacher_temp": 0.05},
        {"warmup_epochs": 0.0},
    ],
    ids=lambda change: next(iter(change)),
)
def test_parity_notices_every_part(change):
    """The comparison above would fail if the engine left this part out: the losses move by far more than 1e-5."""
    generator = torch.Generator().manual_seed(0)
    batches = []
    for _ in range(20):
        large = torch.randn(2, BATCH, 3, 32, 32, generator=generator)
        batches.append(Batch(large, torch.randn(LOCAL, BATCH, 3, 16, 16, generator=generator)))
    losses = []
    for settings in (config(), config(**change)):
        run, schedules = (
            build_train_state(settings, 3, torch.device("cpu"), "fp32"),
            Schedules(settings, STEPS_PER_EPOCH),
        )
        losses.append([train_step(run, batch, schedules.values_at(i), i)["loss"] for i, batch in enumerate(batches)])
    assert max(abs(a / b - 1) for a, b in zip(*losses, strict=True)) > 1e-4
