"""The whole step as one CUDA graph: recorded once, then replayed by a single call instead of a launch for each kernel.

A recording holds addresses and host-side numbers as they were. Crops and keep indices are therefore copied into static
buffers; learning rate, weight decay and the teacher's momentum live in the optimizer's tables on the device and are
written there before each replay. If anything else changes (the last layer is unfrozen, a new epoch's teacher
temperature, another batch size) the step is recorded again. The first steps after such a change run eagerly, on a side
stream as PyTorch requires: they choose kernels and build tables. Every one of these steps trains.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from dino_fast.engine.schedules import StepHyperparams
from dino_fast.errors import UserError
from dino_fast.gpu import capture_graph
from dino_fast.optim import AdamWEMA

WARM_UP = 3  # eager steps before a recording
MicroBatches = list[tuple[Tensor, Tensor]]  # (global crops [2 b, C, H, W], local crops [n b, C, h, w]) each
Numbers = dict[str, Tensor]  # scalars on the device
Compute = Callable[[MicroBatches, list[Tensor | None], StepHyperparams], Numbers]


class StepGraph:
    """Runs `compute` eagerly or replays its recording, with the same result.

    With `required` a failed recording raises UserError; without, it is reported through `say` and steps run eagerly.
    `record` turns work into a function that replays it; `run_on_side_stream` runs work on a side stream. Tests replace
    both.
    """

    def __init__(
        self,
        optimizer: AdamWEMA,
        device: torch.device,
        *,
        required: bool = False,
        record: Callable[[Callable[[], Numbers]], Callable[[], Numbers]] | None = None,
        run_on_side_stream: Callable[[Callable[[], Numbers]], Numbers] | None = None,
    ) -> None:
        self.optimizer, self.required = optimizer, required
        cuda = _Cuda(device) if record is None or run_on_side_stream is None else None
        self.record = record or cuda.record  # type: ignore[union-attr]
        self.run_on_side_stream = run_on_side_stream or cuda.run_on_side_stream  # type: ignore[union-attr]
        self.say: Callable[[str], None] = print
        self.failed = ""  # reason of a failed recording
        self._key: Any = None
        self._warm = 0
        self._replay: Callable[[], Numbers] | None = None
        self._micro_batches: MicroBatches = []
        self._keep_indices: list[Tensor | None] = []
        self._hyperparams: StepHyperparams | None = None

    def __call__(
        self,
        compute: Compute,
        micro_batches: MicroBatches,
        keep_indices: list[Tensor | None],
        hyperparams: StepHyperparams,
    ) -> Numbers:
        """The numbers of one step; the next replay overwrites them."""
        if self.failed:
            self._micro_batches, self._keep_indices = [], []
            return self._eager(lambda: compute(micro_batches, keep_indices, hyperparams))
        self._copy_inputs(micro_batches, keep_indices, hyperparams)
        work = lambda: compute(self._micro_batches, self._keep_indices, self._current())  # noqa: E731
        if self._replay is None and self._warm < WARM_UP:
            self._warm += 1
            return self.run_on_side_stream(lambda: self._eager(work))
        if self._replay is None and not self._try_record(work):
            return self._eager(work)
        assert self._replay is not None
        self.optimizer.write_hyperparameters(momentum=hyperparams.momentum)
        return self._replay()

    def reset(self) -> None:
        """Drops the recording and its memory; the next steps make a new one."""
        if self._replay is not None:
            self._replay = None
            self.optimizer.zero_grad()  # gradients lie in the recording's memory
        self._key, self._warm = None, 0

    def _copy_inputs(
        self, micro_batches: MicroBatches, keep_indices: list[Tensor | None], hyperparams: StepHyperparams
    ) -> None:
        """Copies the step's inputs into the static buffers, which are made anew (with a new recording) on a change."""
        inputs = [*(x for crops in micro_batches for x in crops), *keep_indices]
        shapes = [None if x is None else tuple(x.shape) for x in inputs]
        key = (hyperparams.frozen, hyperparams.teacher_temp, shapes)
        if key != self._key:
            self.reset()
            self._key = key
            self._micro_batches = [(torch.empty_like(g), torch.empty_like(local)) for g, local in micro_batches]
            self._keep_indices = [None if x is None else torch.empty_like(x) for x in keep_indices]
        self._hyperparams = hyperparams
        for buffers, crops in zip(self._micro_batches, micro_batches, strict=True):
            for buffer, new in zip(buffers, crops, strict=True):
                buffer.copy_(new, non_blocking=True)
        for index_buffer, index in zip(self._keep_indices, keep_indices, strict=True):
            if index_buffer is not None and index is not None:
                index_buffer.copy_(index, non_blocking=True)

    def _current(self) -> StepHyperparams:
        assert self._hyperparams is not None
        return self._hyperparams

    def _eager(self, work: Callable[[], Numbers]) -> Numbers:
        numbers = work()
        self.optimizer.zero_grad()
        return numbers

    def _try_record(self, work: Callable[[], Numbers]) -> bool:
        """Records the step; False if that failed.

        Gradients are None before it, so that they are allocated in the recording's memory, and stay allocated: the
        optimizer's tables list the parameters that have a gradient.
        """
        try:
            self._replay = self.record(work)
        except RuntimeError as error:
            self.optimizer.zero_grad()
            reason = str(error).partition("\n")[0]
            if self.required:
                raise UserError(f"--cuda-graph on: the step cannot be recorded: {reason}; use off") from error
            self.failed = reason
            self.say(f"note: the step cannot be recorded as a CUDA graph ({reason}); it runs kernel by kernel")
            return False
        return True


class _Cuda:
    """Recording and a side stream on a GPU."""

    def __init__(self, device: torch.device) -> None:
        self.side = torch.cuda.Stream(device)

    def run_on_side_stream(self, work: Callable[[], Numbers]) -> Numbers:
        current = torch.cuda.current_stream(self.side.device)
        self.side.wait_stream(current)
        with torch.cuda.stream(self.side):
            numbers = work()
        current.wait_stream(self.side)
        return numbers

    def record(self, work: Callable[[], Numbers]) -> Callable[[], Numbers]:
        with torch.autograd.set_multithreading_enabled(False):
            return capture_graph(work, self.side)
