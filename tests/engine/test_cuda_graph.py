"""The recorded step without a GPU: a tape of the operations plays a recording, on the memory where it was made."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from dino_fast.engine.build import build_graph
from dino_fast.engine.cuda_graph import WARM_UP, StepGraph
from dino_fast.engine.schedules import Schedules
from dino_fast.engine.train_state import TrainState
from dino_fast.engine.train_step import train_step
from dino_fast.errors import UserError
from dino_fast.ops import multi_tensor
from dino_fast.ops.multi_tensor import cuda as multi_tensor_cuda
from tests.engine.test_train_step import PER_EPOCH, _batch, _config, _leaves, _train_state
from tests.ops.test_multi_tensor_on_host import HostKernels
from tests.ops.test_multi_tensor_on_host import kernels as kernels
from tests.ops.test_multi_tensor_on_host import library as library

EPOCH = 8  # steps: long enough to record in each
LAUNCHES = ("cuda_multi_tensor_norms", "cuda_multi_tensor_adamw_ema", "cuda_multi_tensor_ema_update", "cuda_upload")


# Operators whose kernels' launches are recorded one by one.
RECORDED = [getattr(torch.ops.dino_fast, name).default for name in ("ema_update", "adamw_ema", "grad_norms")]


class Tape(TorchDispatchMode):
    """A recorded graph: every operation with its tensors and numbers, and every launch of the optimizer's kernels.

    Playing it does the same to the same memory, so what the host would have decided anew is as it was recorded. Unlike
    a capture, recording computes; kernels are not launched meanwhile.
    """

    def __init__(self, kernels: HostKernels) -> None:
        super().__init__()
        self.kernels = kernels
        self.calls: list[Callable[[], None]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if func not in RECORDED:  # of these the kernels are
            self.calls.append(partial(self._again, func, args, kwargs, out))
        return out

    @staticmethod
    def _again(func: Any, args: Any, kwargs: Any, out: Any) -> None:
        new = func(*args, **kwargs)
        for old, made in zip(_tensors(out), _tensors(new), strict=True):
            if old.untyped_storage().data_ptr() != made.untyped_storage().data_ptr():
                old.copy_(made)

    def record(self, work: Callable[[], Any]) -> Any:
        launches = {name: getattr(self.kernels, name) for name in LAUNCHES}
        for name, launch in launches.items():
            setattr(self.kernels, name, lambda *given, launch=launch: self.calls.append(partial(launch, *given)))
        self.kernels.capturing = True
        try:
            with self:
                return work()
        finally:
            self.kernels.capturing = False
            for name in LAUNCHES:
                delattr(self.kernels, name)

    @torch.no_grad()
    def play(self) -> None:
        for call in self.calls:
            call()


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    return [x for item in value for x in _tensors(item)] if isinstance(value, tuple | list) else []


def _with_tapes(train_state: TrainState, kernels: HostKernels) -> tuple[list[Tape], list[Callable[[], Any]]]:
    """Gives a state a graph whose recordings are tapes; returns those, and the work that ran on its own stream."""
    tapes: list[Tape] = []
    ran: list[Callable[[], Any]] = []

    def record(work: Callable[[], Any]) -> Callable[[], Any]:
        tape = Tape(kernels)
        kept = [train_state.loss.center.clone(), train_state.skip_step.clone()]
        numbers = tape.record(work)
        train_state.loss.center.copy_(kept[0])  # a capture computes nothing
        train_state.skip_step.copy_(kept[1])
        tapes.append(tape)

        def replay() -> Any:
            tape.play()
            return numbers

        return replay

    def alone(work: Callable[[], Any]) -> Any:
        ran.append(work)
        return work()

    train_state.graph = StepGraph(train_state.optimizer, train_state.device, record=record, run_on_side_stream=alone)  # type: ignore[arg-type]
    return tapes, ran


@pytest.fixture
def on_host(kernels: HostKernels, monkeypatch: pytest.MonkeyPatch) -> HostKernels:
    """AdamWEMA through the CUDA kernels' bodies on the host; all else through PyTorch's operations, of fixed shapes."""
    monkeypatch.setenv("DINO_FAST_BACKEND", "reference")
    monkeypatch.setattr("dino_fast.models.vit.without_dropped", lambda samples: samples)
    for table, name in (("_ADAMW_EMA", "adamw_ema"), ("_GRAD_NORMS", "grad_norms"), ("_EMA_UPDATE", "ema_update")):
        monkeypatch.setitem(getattr(multi_tensor, table), "reference", getattr(multi_tensor_cuda, name))
    return kernels


CASES: list[dict[str, Any]] = [
    {},
    {"drop_path_rate": 0.4, "grad_accum_steps": 2, "norm_last_layer": False, "loss_impl": "fused"},
    {"teacher_update": "previous-epoch", "checkpoint_activations": "selective", "clip_grad": 0.0, "local_crops": 0},
]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("given", CASES)
def test_replayed_steps_equal_plain_ones_bit_for_bit(
    given: dict[str, Any], precision: str, on_host: HostKernels
) -> None:
    config = _config(**{"loss_impl": "logits", "freeze_last_layer": 2.0, **given})
    plain, graphed = _train_state(config, precision), _train_state(config, precision)
    tapes, ran = _with_tapes(graphed, on_host)
    schedules = Schedules(config, EPOCH)
    hyperparams = [schedules.values_at(step) for step in range(3 * EPOCH)]
    assert [(r.frozen, r.teacher_temp) for r in hyperparams[::EPOCH]] == [(True, 0.04), (True, 0.07), (False, 0.07)]
    for step, rate in enumerate(hyperparams):
        batch = _batch(step, config)
        expected, found = (dict(train_step(run, batch, rate, step)) for run in (plain, graphed))
        assert found == expected, step
    a, b = _leaves(graphed.state_dict()), _leaves(plain.state_dict())
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in b)
    assert len(tapes) == 3 and len(ran) == 3 * WARM_UP


def test_a_replayed_step_that_is_not_finite_changes_nothing(on_host: HostKernels) -> None:
    config = _config(loss_impl="logits", on_nonfinite="skip")
    train_state = _train_state(config)
    tapes, _ = _with_tapes(train_state, on_host)
    hyperparams = Schedules(config, PER_EPOCH).values_at(9)
    for step in range(WARM_UP + 1):
        train_step(train_state, _batch(step, config), hyperparams, step)
    assert len(tapes) == 1
    before = copy.deepcopy(_leaves(train_state.state_dict()))
    batch = _batch(7, config)
    batch.local_crops[0, 0, 0, 0, 0] = torch.nan
    assert not train_step(train_state, batch, hyperparams, 7).finite
    after = _leaves(train_state.state_dict())
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert train_step(train_state, _batch(8, config), hyperparams, 8).finite
    after = _leaves(train_state.state_dict())
    assert not torch.equal(after["/student/backbone.cls_token"], before["/student/backbone.cls_token"])


def _untaped(monkeypatch: pytest.MonkeyPatch, **given: Any) -> tuple[TrainState, list[str]]:
    """A train_state whose graph notes what it does and computes every step."""
    train_state, events = _train_state(_config(**given)), list[str]()

    def record(work: Callable[[], Any]) -> Callable[[], Any]:
        assert all(p.grad is None for p in train_state.student.parameters())  # or their memory were outside
        events.append("record")

        def replay() -> Any:
            events.append("replay")
            train_state.optimizer.zero_grad()  # a replay overwrites gradients
            return work()

        return replay

    def alone(work: Callable[[], Any]) -> Any:
        events.append("alone")
        return work()

    train_state.graph = StepGraph(train_state.optimizer, train_state.device, record=record, run_on_side_stream=alone)  # type: ignore[arg-type]
    monkeypatch.setattr(train_state.optimizer, "write_hyperparameters", lambda momentum: events.append("write"))
    return train_state, events


def test_what_changes_a_recording(monkeypatch: pytest.MonkeyPatch) -> None:
    train_state, events = _untaped(monkeypatch)
    config, schedules = train_state.config, Schedules(train_state.config, PER_EPOCH)

    def run(steps: int, at: int, images: int = 8) -> list[str]:
        events.clear()
        for step in range(steps):
            batch = _batch(step, config)
            batch.global_crops, batch.local_crops = batch.global_crops[:, :images], batch.local_crops[:, :images]
            train_step(train_state, batch, schedules.values_at(at), step)
        return list(events)

    first = [*["alone"] * WARM_UP, "record", "write", "replay", "write", "replay"]
    assert run(WARM_UP + 2, at=1) == first
    assert run(2, at=1) == ["write", "replay"] * 2
    assert run(WARM_UP + 2, at=6) == first  # another temperature, and the last layer moves
    assert run(1, at=12) == ["write", "replay"]  # other hyperparams alone
    assert run(WARM_UP + 2, at=12, images=6) == first
    assert train_state.graph is not None
    train_state.graph.reset()
    assert all(p.grad is None for p in train_state.student.parameters())
    assert run(1, at=12, images=6) == ["alone"]


@pytest.mark.parametrize("demanded", [False, True])
def test_a_step_that_cannot_be_recorded_goes_on_without(monkeypatch: pytest.MonkeyPatch, demanded: bool) -> None:
    expected = _train_state(_config())
    train_state, said = _train_state(_config()), list[str]()

    def record(work: Callable[[], Any]) -> Any:
        raise RuntimeError("operation not permitted when stream is capturing\nmore about it")

    graph = StepGraph(
        train_state.optimizer,
        train_state.device,
        required=demanded,
        record=record,
        run_on_side_stream=lambda work: work(),
    )  # type: ignore[arg-type]
    graph.say = said.append
    train_state.graph = graph
    hyperparams = Schedules(train_state.config, PER_EPOCH).values_at(9)
    for step in range(WARM_UP + 3):
        if demanded and step == WARM_UP:
            with pytest.raises(UserError, match="not permitted when stream is capturing; use off"):
                train_step(train_state, _batch(step, train_state.config), hyperparams, step)
            return
        found, wanted = (
            train_step(run, _batch(step, run.config), hyperparams, step) for run in (train_state, expected)
        )
        assert dict(found) == dict(wanted)
    assert len(said) == 1 and "runs kernel by kernel" in said[0]
    assert all(p.grad is None for p in train_state.student.parameters())


def test_where_a_step_cannot_be_recorded() -> None:
    assert _train_state(_config()).graph is None
    with pytest.raises(UserError, match="--cuda-graph on: a CUDA graph needs a GPU, and the run trains on cpu"):
        _train_state(_config(cuda_graph="on"))
    train_state = _train_state(_config(optimizer="sgd"))
    train_state.device = torch.device("cuda")
    train_state.config = _config(optimizer="sgd", cuda_graph="on")
    with pytest.raises(UserError, match="--optimizer sgd does not read its hyperparameters on the GPU"):
        build_graph(train_state)
    train_state = _train_state(_config(), "fp16")
    train_state.device = torch.device("cuda")
    assert build_graph(train_state) is None
