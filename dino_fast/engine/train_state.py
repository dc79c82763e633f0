"""The state of a training: student, teacher, loss with its center, optimizer; and what a checkpoint stores of it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from dino_fast.dtensor import is_sharded
from dino_fast.engine.config import Config
from dino_fast.engine.cuda_graph import StepGraph
from dino_fast.engine.distributed import SINGLE_PROCESS, DistContext
from dino_fast.engine.parallelize import shard_like, sync_gradients
from dino_fast.errors import UserError
from dino_fast.loss import DINOLoss
from dino_fast.models import MultiCropWrapper, WeightNormLinear
from dino_fast.optim import AdamWEMA, Optimizer


def call_direct(function: Callable[..., Any], *arguments: Any) -> Any:
    """Direct call, for a student that DDP does not wrap."""
    return function(*arguments)


@dataclass
class TrainState:
    """Everything that a training step reads and changes."""

    config: Config
    device: torch.device
    autocast: torch.dtype | None  # bfloat16 or float16; None computes in the weights' own format
    student: MultiCropWrapper
    teacher: MultiCropWrapper
    loss: DINOLoss  # holds the center, float32 [1, K] on `device`
    optimizer: Optimizer
    scaler: torch.amp.GradScaler
    skip_step: Tensor  # bool scalar on `device`: the last step's loss was not finite, so the step changed nothing
    context: DistContext = SINGLE_PROCESS
    forward_fn: Callable[..., Any] = call_direct  # calls a function of the student; DDP must see each forward pass
    bf16_models: tuple[MultiCropWrapper, MultiCropWrapper] | None = None  # bfloat16 copies of student and teacher
    graph: StepGraph | None = None  # records the step and replays it, on a GPU
    on_phase: Callable[[str], None] = lambda phase: None  # called with a phase's name when it begins, for benchmarks

    @property
    def forward_models(self) -> tuple[MultiCropWrapper, MultiCropWrapper]:
        """Student and teacher of the forward pass: the bfloat16 copies if there are any."""
        return self.bf16_models or (self.student, self.teacher)

    @property
    def is_sharded(self) -> bool:
        """Whether each process holds only some of the prototypes."""
        return self.context.world > 1 and is_sharded(cast(WeightNormLinear, self.teacher.head.last_layer).weight_v)

    @property
    def prototypes(self) -> slice:
        """Indices of the prototypes that this process holds; all of them if the last layer is not sharded."""
        K = self.config.out_dim
        if not self.is_sharded:
            return slice(0, K)
        rows = -(-K // self.context.world)
        return slice(min(K, self.context.rank * rows), min(K, self.context.rank * rows + rows))

    def sync_gradients(self, now: bool) -> contextlib.AbstractContextManager[Any]:
        """Context of a forward pass whose backward pass averages gradients over the processes where `now` is true.

        Else gradients accumulate in this process alone.
        """
        if self.context.world == 1:
            return contextlib.nullcontext()
        return sync_gradients(self.student, self.forward_fn, now)

    def state_dict(self) -> dict[str, Any]:
        """Nested dict of what a checkpoint stores. Under FSDP it holds DTensors; `full_state_dict` gathers them."""
        center = self.loss.state_dict()
        if self.is_sharded:
            center = {"center": self.context.all_gather_rows(self.loss.center[0, self.prototypes])[None]}
        return {
            "student": self.student.state_dict(),
            "teacher": self.teacher.state_dict(),
            "dino_loss": center,
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "torch_rng": torch.get_rng_state(),
        }

    def load_state_dict(self, saved: dict[str, Any], source: str) -> None:
        """The inverse of `state_dict`, from whole tensors. Raises UserError for a checkpoint of another model."""
        for name, module in (("student", self.student), ("teacher", self.teacher), ("dino_loss", self.loss)):
            try:
                module.load_state_dict(_shard_all(saved[name], module.state_dict()))
            except (RuntimeError, ValueError, KeyError) as error:
                raise UserError(
                    f"the checkpoint in {source} is of another model than this configuration describes ({error}). "
                    "Resume with the settings of that run (leave them out), or start a new run with another --out"
                ) from error
        if self.graph is not None:
            self.graph.reset()
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        moments = {
            index: _shard_all(entries, {name: parameters[index] for name, x in entries.items() if x.ndim})
            for index, entries in saved["optimizer"]["state"].items()
        }
        if isinstance(self.optimizer, AdamWEMA):
            self.optimizer.refresh_copies()
        self.optimizer.load_state_dict({**saved["optimizer"], "state": moments})
        self.scaler.load_state_dict(saved["scaler"])
        torch.set_rng_state(saved["torch_rng"])


def _shard_all(tensors: dict[str, Tensor], like: dict[str, Tensor]) -> dict[str, Tensor]:
    """Each tensor sharded as the one of its name in `like` is."""
    return {name: shard_like(x, like[name]) if name in like else x for name, x in tensors.items()}
