"""The step on tensors that only say that they lie on a GPU: nothing asks for a value, no copy is waited for.

The backward pass needs a GPU's threads and is left out; `test_train_step_on_gpu.py` has all of it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from dino_fast.engine import train_step as step_module
from dino_fast.engine.build import build_train_state
from dino_fast.engine.schedules import Schedules
from dino_fast.engine.train_state import TrainState
from dino_fast.engine.train_step import train_step
from dino_fast.models import packing
from tests.engine.test_train_step import PER_EPOCH, _batch, _config


class Copies(TorchDispatchMode):
    """Counts copies between host and device that the host waits for."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.ops.aten._to_copy.default and kwargs.get("device") is not None:
            self.count += torch.device(kwargs["device"]).type != args[0].device.type and not kwargs.get("non_blocking")
        if func is torch.ops.aten.copy_.default:
            self.count += args[0].device.type != args[1].device.type and not (len(args) > 2 and args[2])
        return func(*args, **kwargs)


class Numbers(list[float]):
    def tolist(self) -> list[float]:
        return list(self)


@pytest.fixture
def no_values(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What building a network needs that asks for values, and what needs a GPU, replaced."""
    monkeypatch.setattr(torch, "linspace", lambda a, b, n, **given: Numbers([a] * n))
    monkeypatch.setattr(torch.nn.init, "trunc_normal_", lambda tensor, *given, **options: tensor)
    monkeypatch.setattr(torch.nn.Module, "to", lambda module, *given, **options: module)
    monkeypatch.setattr(torch.Tensor, "backward", lambda tensor: None)
    monkeypatch.setattr(step_module, "StepMetrics", dict)
    packing._pack.cache_clear()
    yield
    packing._pack.cache_clear()  # of tensors without memory


def _with_gradients(train_state: TrainState) -> TrainState:
    for p in train_state.student.parameters():
        p.grad = torch.zeros_like(p) if p.requires_grad else None
    return train_state


@pytest.mark.parametrize(
    "given",
    [{}, {"loss_impl": "fused"}, {"optimizer": "sgd"}, {"teacher_update": "previous-step", "grad_accum_steps": 2}],
)
def test_nothing_waits_for_a_gpu(given: dict[str, Any], no_values: None) -> None:
    # Without local crops: the matrices that interpolate positions are kept on a real GPU alone.
    config = _config(center_init="first_batch", local_crops=0, **given)
    hyperparams = Schedules(config, PER_EPOCH).values_at(7)
    with FakeTensorMode(allow_non_fake_inputs=True), Copies() as copies:
        device = torch.device("cuda")
        with device:
            train_state = build_train_state(config, 3, device, "fp32")
        batch = _batch(0, config)
        batch.global_crops, batch.local_crops = batch.global_crops.to(device), batch.local_crops.to(device)
        with pytest.raises(DataDependentOutputException):
            torch.ones((), device=device).item()
        train_step(_with_gradients(train_state), batch, hyperparams, 0)
        assert copies.count > 0  # those of the batch, at least
        before = copies.count
        found = train_step(_with_gradients(train_state), batch, hyperparams, 1)
        assert copies.count == before
    assert {x.device.type for x in found.values()} == {"cuda"}
