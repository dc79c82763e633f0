"""Numbers that are read a step late, as on a GPU: nothing but the time at which they are known may differ."""

from __future__ import annotations

import math
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from dino_fast.engine import checkpoint, train
from dino_fast.engine import trainer as loop
from dino_fast.engine.metrics import StepMetrics
from dino_fast.engine.run_dir import read_metrics
from dino_fast.engine.signals import Interrupted
from dino_fast.engine.train_state import TrainState
from dino_fast.errors import UserError
from tests.engine.test_trainer import _assert_equal, _config
from tests.engine.test_trainer import images as images  # the fixture

STEPS = 13  # two epochs and a half
SAME = ("step", "epoch", "loss", "kl", "teacher_entropy", "feature_spread", "grad_norm", "lr", "knn", "skipped")


@pytest.fixture
def late(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop, "defers_metrics", lambda device: True)


@pytest.fixture(scope="module")
def at_once(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "at-once"
    return train(_config(images, out, max_steps=STEPS, knn_every=1))


def _assert_same(out: Path, other: Path) -> None:
    """The same lines and the same weights, moments and centre, bit for bit."""
    rows = [[{name: row.get(name) for name in SAME} for row in read_metrics(path)] for path in (out, other)]
    assert rows[0] == rows[1]
    (step, state), (other_step, expected) = (checkpoint.load(path / "checkpoints") for path in (out, other))
    assert step == other_step
    _assert_equal(state, expected)


def test_a_step_is_read_when_the_next_is_begun(
    images: Path, tmp_path: Path, at_once: Path, late: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[str] = []
    step, read, write = loop.train_step, StepMetrics.__getitem__, TrainState.state_dict

    def begun(*given: Any) -> StepMetrics:
        events.append(f"begin {given[-1]}")
        found = step(*given)
        found.number = given[-1]  # type: ignore[attr-defined]
        return found

    def asked(found: StepMetrics, name: str) -> float:
        if not found._values:
            events.append(f"read {found.number}")  # type: ignore[attr-defined]
        return read(found, name)

    def saved(*given: Any) -> Any:
        events.append("save")
        return write(*given)

    monkeypatch.setattr(loop, "train_step", begun)
    monkeypatch.setattr(StepMetrics, "__getitem__", asked)
    monkeypatch.setattr(TrainState, "state_dict", saved)
    out = train(_config(images, tmp_path / "run", max_steps=STEPS, knn_every=1))
    plain = [event for event in events if event != "save"]
    assert plain[:5] == ["begin 0", "begin 1", "read 0", "begin 2", "read 1"]
    assert sorted(plain) == sorted([f"{word} {i}" for i in range(STEPS) for word in ("begin", "read")])
    saves = [i for i, event in enumerate(events) if event == "save"]
    assert saves
    for i in saves:  # no checkpoint holds a step that nobody has looked at
        words = [event.split()[0] for event in events[:i]]
        assert words.count("begin") == words.count("read")
    _assert_same(out, at_once)


def test_a_signal_saves_what_was_read(
    images: Path, tmp_path: Path, at_once: Path, late: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = loop.train_step

    def interrupted(*given: Any) -> StepMetrics:
        if given[-1] == 7:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(*given)

    monkeypatch.setattr(loop, "train_step", interrupted)
    with pytest.raises(Interrupted):
        train(_config(images, tmp_path / "run", max_steps=STEPS, knn_every=1))
    assert len(read_metrics(tmp_path / "run")) == 8
    assert (tmp_path / "run" / "checkpoints" / "step-00000008").exists()
    monkeypatch.setattr(loop, "train_step", step)
    out = train(_config(images, tmp_path / "run", max_steps=STEPS, knn_every=1, resume=True))
    _assert_same(out, at_once)


def _spoil(monkeypatch: pytest.MonkeyPatch, bad: set[int]) -> None:
    step = loop.train_step

    def sometimes(train_state: Any, batch: Any, hyperparams: Any, number: int) -> StepMetrics:
        if number in bad:
            batch.global_crops[0, 0, 0, 0, 0] = math.nan
        return step(train_state, batch, hyperparams, number)

    monkeypatch.setattr(loop, "train_step", sometimes)


def test_a_bad_step_stops_with_its_own_evidence(
    images: Path, tmp_path: Path, late: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = train(_config(images, tmp_path / "good", max_steps=3, knn_every=0))
    _spoil(monkeypatch, {3})
    with pytest.raises(UserError, match="the loss of step 3 is nan"):
        train(_config(images, tmp_path / "bad", max_steps=STEPS, knn_every=0))
    saved = load_file(tmp_path / "bad" / "nonfinite-step-00000003.safetensors")
    assert saved["global_crops"].isnan().sum() == 1
    _, state = checkpoint.load(expected / "checkpoints") or pytest.fail("no checkpoint")
    for name, value in state["student"].items():  # step 4 was begun by then and moved nothing
        assert torch.equal(saved[f"student/{name}"], value), name
    assert [row["step"] for row in read_metrics(tmp_path / "bad")] == [0, 1, 2]
    assert not list((tmp_path / "bad" / "checkpoints").iterdir())


def test_a_bad_step_before_a_save_is_in_no_checkpoint(
    images: Path, tmp_path: Path, late: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    _spoil(monkeypatch, {4})  # an epoch has 5 steps
    with pytest.raises(UserError, match="the loss of step 4 is nan"):
        train(_config(images, tmp_path / "run", max_steps=STEPS, knn_every=0, save_every=1))
    assert not list((tmp_path / "run" / "checkpoints").iterdir())


def test_bad_steps_are_passed_over_just_as_at_once(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: dict[str, Any] = {"on_nonfinite": "skip", "nonfinite_limit": 3, "max_steps": STEPS, "knn_every": 0}
    bad = {3, 4, 9}
    _spoil(monkeypatch, bad)
    first = train(_config(images, tmp_path / "at-once", **given))
    monkeypatch.setattr(loop, "defers_metrics", lambda device: True)
    second = train(_config(images, tmp_path / "late", **given))
    assert [row["step"] for row in read_metrics(second) if row.get("skipped")] == sorted(bad)
    assert len(list(second.glob("nonfinite*"))) == 2
    _assert_same(second, first)
    bad.update(range(5, STEPS))
    with pytest.raises(UserError, match="3 losses in a row are not finite; the loss of step 5 is nan"):
        train(_config(images, tmp_path / "other", **given))
