"""SGD and LARS against plain transcriptions: clipping, overflow, checkpoints, and whole runs of the engine."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from dino_fast.engine.schedules import Schedules
from dino_fast.engine.train_step import train_step
from dino_fast.optim import LARSEMA, SGDEMA, build_optimizer
from tests import original
from tests.engine.test_train_step import PER_EPOCH, _assert_near, _batch, _config, _original, _run, _train_state


@pytest.mark.parametrize("name,lr", [("sgd", 0.1), ("lars", 3.0)])
def test_losses_equal_the_published_algorithms(name: str, lr: float) -> None:
    config = _config(optimizer=name, lr=lr * 32, weight_decay=1e-3, weight_decay_end=1e-2, clip_grad=0.05)
    ours = _train_state(config)
    theirs = _original(ours, config)
    schedule = original.cosine_scheduler
    theirs.weight_decay = schedule(1e-3, 1e-2, config.epochs, PER_EPOCH)
    theirs.optimizer_class = name
    theirs.__post_init__()
    before = {name: value.clone() for name, value in ours.student.state_dict().items()}
    losses = []
    for step in range(20):
        batch = _batch(step, config)
        losses.append(train_step(ours, batch, Schedules(config, PER_EPOCH).values_at(step), step)["loss"])
        expected = theirs.step([*batch.global_crops, *batch.local_crops], step, step // PER_EPOCH)
        assert losses[-1] == pytest.approx(expected, rel=1e-5), step
    _assert_near(ours.teacher.state_dict(), theirs.teacher.state_dict())
    after = ours.student.state_dict()
    assert max((after[name] - value).abs().max().item() for name, value in before.items()) > 1e-2  # it did train


def _pair(name: str, **options: Any) -> tuple[SGDEMA | LARSEMA, list[torch.Tensor], list[torch.Tensor]]:
    torch.manual_seed(0)
    params = [torch.nn.Parameter(torch.randn(4, 3)), torch.nn.Parameter(torch.randn(3))]
    teacher = [torch.zeros(4, 3), torch.zeros(3)]
    groups = [{"params": [p], "teacher_params": [t]} for p, t in zip(params, teacher, strict=True)]
    optimizer = build_optimizer(name, groups, lr=0.1, weight_decay=0.0, clip_grad=options.get("clip", 0.0))
    assert isinstance(optimizer, SGDEMA | LARSEMA)
    return optimizer, list(params), teacher


@pytest.mark.parametrize("name", ["sgd", "lars"])
def test_an_overflow_moves_the_teacher_alone(name: str) -> None:
    optimizer, params, teacher = _pair(name)
    for p in params:
        p.grad = torch.full_like(p, float("inf"))
    before = copy.deepcopy(params)
    optimizer.found_inf, optimizer.grad_scale = torch.ones(()), torch.full((), 2.0)
    optimizer.step(momentum=0.5)
    for p, old, t in zip(params, before, teacher, strict=True):
        assert torch.equal(p, old) and torch.equal(t, 0.5 * old)
    assert not any(state["momentum_buffer"].any() for state in optimizer.state.values())


@pytest.mark.parametrize("name", ["sgd", "lars"])
def test_a_skipped_step_changes_nothing(name: str) -> None:
    optimizer, params, teacher = _pair(name)
    for skip in (False, True):
        for p in params:
            p.grad = torch.full_like(p, float("nan") if skip else 1.0)
        before = copy.deepcopy([params, teacher, [state["momentum_buffer"] for state in optimizer.state.values()]])
        optimizer.step(momentum=0.5, skip=torch.tensor(skip))
    after = [params, teacher, [state["momentum_buffer"] for state in optimizer.state.values()]]
    for old, new in zip(before, after, strict=True):
        assert len(old) == 2 and all(map(torch.equal, old, new))


@pytest.mark.parametrize("name", ["sgd", "lars"])
def test_a_step_without_a_momentum_says_that_the_teacher_stays(name: str) -> None:
    optimizer, params, teacher = _pair(name)
    before = copy.deepcopy(teacher)
    for p in params:
        p.grad = torch.ones_like(p)
    with pytest.warns(UserWarning, match=r"the teacher stays.*EMA\.step\(momentum=0\.996\)") as told:
        optimizer.step()
        optimizer.step()
    assert len(told) == 1 and all(map(torch.equal, teacher, before))


@pytest.mark.parametrize("name", ["sgd", "lars"])
def test_copies_and_further_groups_keep_their_teachers(name: str) -> None:
    optimizer, params, teacher = _pair(name)
    params.append(torch.nn.Parameter(torch.ones(2)))
    teacher.append(torch.zeros(2))
    optimizer.add_param_group({"params": params[2:], "teacher_params": teacher[2:]})
    assert not any("teacher_params" in group for group in optimizer.param_groups)
    other = copy.deepcopy(optimizer)
    optimizer.step(momentum=0.5)
    other.step(momentum=0.5)
    for p, t, theirs in zip(params, teacher, other.teacher, strict=True):
        assert torch.equal(t, 0.5 * p) and torch.equal(theirs, t) and theirs is not t


@pytest.mark.parametrize("name", ["sgd", "lars"])
def test_scaled_gradients_are_unscaled_and_clipped(name: str) -> None:
    plain, expected, _ = _pair(name, clip=0.5)
    scaled, params, _ = _pair(name, clip=0.5)
    for p, q in zip(expected, params, strict=True):
        p.grad = torch.full_like(p, 3.0)
        q.grad = torch.full_like(q, 3.0 * 64)
    scaled.found_inf, scaled.grad_scale = torch.zeros(()), torch.full((), 64.0)
    plain.step(momentum=0.5)
    scaled.step(momentum=0.5)
    for p, q in zip(expected, params, strict=True):
        torch.testing.assert_close(p, q)
        assert p.grad is not None and p.grad.norm().item() == pytest.approx(0.5, rel=1e-4)


@pytest.mark.parametrize("name", ["sgd", "lars"])
def test_a_restored_run_goes_on_exactly(name: str) -> None:
    config = _config(optimizer=name, drop_path_rate=0.2)
    whole = _train_state(config)
    _run(whole, range(3))
    state = copy.deepcopy(whole.state_dict())
    assert not any("teacher_params" in group for group in state["optimizer"]["param_groups"])
    rest = _run(whole, range(3, 6))
    again = _train_state(_config(optimizer=name, drop_path_rate=0.2, seed=0))
    again.load_state_dict(state, "here")
    assert _run(again, range(3, 6)) == rest
