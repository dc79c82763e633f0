"""Numbers of a training step: copied from its device without stalling it, and saved when the loss is not finite."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch
from torch import Tensor

from dino_fast.data import Batch
from dino_fast.engine.parallelize import full_state_dict
from dino_fast.engine.schedules import StepHyperparams
from dino_fast.engine.train_state import TrainState


class StepMetrics(Mapping[str, float]):
    """A step's metrics by name. The device-to-host copy starts now; reading a value blocks only on that copy.

    `numbers` are scalars on one device. `kl` is added: `loss` minus `teacher_entropy`, nats.
    """

    def __init__(self, numbers: Mapping[str, Tensor]) -> None:
        self._names = list(numbers)
        self._wait = start_copy(torch.stack([x.detach().float() for x in numbers.values()]))
        self._values: dict[str, float] = {}

    @property
    def finite(self) -> bool:
        """Whether the loss is finite; if not, the step has changed nothing."""
        return math.isfinite(self["loss"])

    def __getitem__(self, name: str) -> float:
        if not self._values:
            self._values = dict(zip(self._names, self._wait(), strict=True))
            self._values["kl"] = self._values["loss"] - self._values["teacher_entropy"]
        return self._values[name]

    def __iter__(self) -> Iterator[str]:
        return iter([*self._names, "kl"])

    def __len__(self) -> int:
        return len(self._names) + 1


def start_copy(values: Tensor) -> Callable[[], list[float]]:
    """Starts copying `values` to the host; the returned function blocks only on that copy and gives the numbers."""
    host = values.to("cpu", non_blocking=True)  # from a GPU, into pinned memory
    if not values.is_cuda:
        return host.tolist
    copied = torch.cuda.Event()
    copied.record()

    def numbers() -> list[float]:
        copied.synchronize()
        return cast("list[float]", host.tolist())

    return numbers


@dataclass
class PendingStep:
    """A step that was started and whose metrics have not been read yet."""

    step: int  # number of updates before it
    batch: Batch
    hyperparams: StepHyperparams
    metrics: StepMetrics
    measured: dict[str, float]  # images per second, share of data waiting, and k-NN accuracy if it was due


def dump_nonfinite(pending: PendingStep, state: TrainState, folder: Path) -> Path:
    """Saves the crops, image indices and student weights of a step with a non-finite loss, for a post-mortem.

    With several processes each saves its own crops, and all must call this. Returns the safetensors file.
    """
    from safetensors.torch import save_file

    rank = f"-process-{state.context.rank}" if state.context.rank else ""
    path = folder / f"nonfinite-step-{pending.step:08d}{rank}.safetensors"
    batch = pending.batch
    inputs = {"global_crops": batch.global_crops, "local_crops": batch.local_crops, "index": batch.index}
    weights = full_state_dict(state.student.state_dict(), keep=True)
    tensors = inputs | {f"student/{name}": value for name, value in weights.items()}
    save_file({name: value.detach().cpu().contiguous() for name, value in tensors.items()}, path)
    return path
