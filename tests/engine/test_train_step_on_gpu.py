"""The engine's step on a GPU: it waits for nothing, and replayed from a CUDA graph it is the same."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from dino_fast.backends import cuda_unavailable_reason
from dino_fast.engine.build import build_train_state
from dino_fast.engine.cuda_graph import WARM_UP
from dino_fast.engine.schedules import Schedules
from dino_fast.engine.train_state import TrainState
from dino_fast.engine.train_step import train_step
from tests.engine.test_train_step import Crops, _batch, _config, _leaves

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(cuda_unavailable_reason() is not None, reason=str(cuda_unavailable_reason())),
]

EPOCH = 8
# Widths that all kernels take; the interpolation of positions is needed, since local crops have another grid.
GIVEN: dict[str, Any] = {"embed_dim": 64, "num_heads": 1, "head_bottleneck_dim": 64, "out_dim": 512, "global_size": 32}


def _on_gpu(precision: str, **given: Any) -> TrainState:
    return build_train_state(_config(**GIVEN, **given), 3, torch.device("cuda"), precision)


def _pinned(step: int, train_state: TrainState) -> Crops:
    batch = _batch(step, train_state.config)
    return Crops(batch.global_crops.pin_memory(), batch.local_crops.pin_memory())


def _losses(train_state: TrainState, steps: range) -> list[float]:
    schedules = Schedules(train_state.config, EPOCH)
    return [train_step(train_state, _pinned(s, train_state), schedules.values_at(s), s)["loss"] for s in steps]


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("graph", ["off", "auto"])
@pytest.mark.parametrize(
    "given", [{}, {"optimizer": "lars"}, {"checkpoint_activations": "selective"}, {"grad_accum_steps": 2}]
)
def test_a_step_waits_for_nothing(precision: str, graph: str, given: dict[str, Any]) -> None:
    train_state = _on_gpu(precision, cuda_graph=graph, drop_path_rate=0.3, **given)
    hyperparams = Schedules(train_state.config, EPOCH).values_at(20)
    batches = [_pinned(step, train_state) for step in range(WARM_UP + 4)]
    for step, batch in enumerate(batches):
        torch.cuda.set_sync_debug_mode("error" if step > WARM_UP else "default")
        try:
            found = train_step(train_state, batch, hyperparams, step)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert math.isfinite(found["loss"])


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize(
    "given", [{}, {"drop_path_rate": 0.4, "grad_accum_steps": 2}, {"teacher_update": "previous-step"}]
)
def test_replayed_steps_equal_plain_ones(precision: str, given: dict[str, Any]) -> None:
    plain, graphed = (_on_gpu(precision, cuda_graph=word, freeze_last_layer=2.0, **given) for word in ("off", "on"))
    assert plain.graph is None and graphed.graph is not None
    expected = _losses(plain, range(3 * EPOCH))
    assert _losses(graphed, range(3 * EPOCH)) == pytest.approx(expected, rel=2e-3 if precision == "bf16" else 1e-4)
    assert max(expected) - min(expected) > 0.01


def test_a_replayed_step_that_is_not_finite_changes_nothing() -> None:
    train_state = _on_gpu("bf16", cuda_graph="on", on_nonfinite="skip")
    _losses(train_state, range(2 * EPOCH))
    parts = {"student": train_state.student.state_dict(), "teacher": train_state.teacher.state_dict()}
    state = [
        *parts.items(),
        ("centre", train_state.loss.center),
        ("optimizer", train_state.optimizer.state_dict()["state"]),
    ]
    before = {name: x.clone() for name, x in _leaves(dict(state)).items()}
    batch = _pinned(0, train_state)
    batch.global_crops[0, 0, 0, 0, 0] = torch.nan
    assert not train_step(
        train_state, batch, Schedules(train_state.config, EPOCH).values_at(2 * EPOCH), 2 * EPOCH
    ).finite
    assert all(torch.equal(x, before[name]) for name, x in _leaves(dict(state)).items())


@pytest.mark.parametrize("graph", ["off", "on"])
def test_a_run_on_the_demo(graph: str, tmp_path: Path) -> None:
    from dino_fast.engine import train
    from dino_fast.engine.config import build_config
    from dino_fast.engine.run_dir import read_metrics

    given = {"data": "demo", "device": "cuda", "max_steps": 40, "knn_every": 0, "cuda_graph": graph}
    out = train(build_config({**given, "out": str(tmp_path / "run")}))
    rows = read_metrics(out)
    assert [row["step"] for row in rows] == list(range(40))
    assert all(math.isfinite(row["loss"]) and row["grad_norm"] > 0 for row in rows)
    assert "cannot be recorded" not in (out / "log.txt").read_text()
