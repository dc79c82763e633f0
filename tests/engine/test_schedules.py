from __future__ import annotations

import numpy as np
import pytest

from dino_fast.engine.config import build_config
from dino_fast.engine.schedules import Schedules
from tests.original import DINOLoss, cosine_scheduler


def _schedules(steps_per_epoch: int, **given: object) -> Schedules:
    return Schedules(build_config({"data": "x", **given}), steps_per_epoch)


@pytest.mark.parametrize(("epochs", "per_epoch", "warmup"), [(20, 7, 10), (3, 5, 1), (4, 1, 0)])
def test_equal_to_the_published(epochs: int, per_epoch: int, warmup: int) -> None:
    ours = _schedules(per_epoch, epochs=epochs, warmup_epochs=warmup, batch_size=512)
    hyperparams = [ours.values_at(step) for step in range(epochs * per_epoch)]
    lr = cosine_scheduler(0.0005 * 512 / 256, 1e-6, epochs, per_epoch, warmup_epochs=warmup)
    np.testing.assert_allclose([rate.lr for rate in hyperparams], lr, rtol=1e-12)
    decay = cosine_scheduler(0.04, 0.4, epochs, per_epoch)
    np.testing.assert_allclose([rate.weight_decay for rate in hyperparams], decay, rtol=1e-12)
    momentum = cosine_scheduler(0.996, 1, epochs, per_epoch)
    np.testing.assert_allclose([rate.momentum for rate in hyperparams], momentum, rtol=1e-12)


def test_teacher_temperature_is_the_published_one_per_epoch() -> None:
    ours = _schedules(3, epochs=8, teacher_temp=0.07, warmup_teacher_temp_epochs=5)
    theirs = DINOLoss(4, 4, 0.04, 0.07, 5, 8).teacher_temp_schedule
    np.testing.assert_allclose(
        [ours.values_at(step).teacher_temp for step in range(24)], np.repeat(theirs, 3), rtol=1e-12
    )


def test_the_freeze_counts_parts_of_epochs() -> None:
    ours = _schedules(10, epochs=2, freeze_last_layer=0.5)
    assert [ours.values_at(step).frozen for step in range(20)] == [True] * 5 + [False] * 15


def test_a_long_warm_up_is_shortened_and_said_so() -> None:
    ours = _schedules(
        40, epochs=1, warmup_epochs=10, warmup_teacher_temp_epochs=30, teacher_temp=0.07, freeze_last_layer=0
    )
    assert ours.warmup_steps == 4
    assert max(ours.values_at(step).lr for step in range(40)) == pytest.approx(0.0005 * 64 / 256)
    assert ours.values_at(39).lr < ours.values_at(5).lr
    notes = " ".join(ours.notes())
    assert "warm-up of 10 epochs" in notes
    assert "warm-up of 30 epochs" in notes
    assert _schedules(40, epochs=20).notes() == []


def test_an_early_stop_leaves_the_schedules_and_is_said() -> None:
    stopped, whole = _schedules(10, epochs=20, max_steps=5), _schedules(10, epochs=20)
    assert [stopped.values_at(s) for s in range(5)] == [whole.values_at(s) for s in range(5)]
    assert "stops at step 5 of the 200" in stopped.notes()[0]
    assert "ends after 200 steps" in _schedules(10, epochs=20, max_steps=500).notes()[0]
