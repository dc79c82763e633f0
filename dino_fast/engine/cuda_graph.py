"""The whole step as one CUDA graph: recorded once, then replayed by a single call, without a launch for each kernel.

A recording holds addresses and numbers as they were. So crops and drawn depths are copied into buffers of its own;
learning rate, weight decay and the teacher's momentum lie in the optimizer's tables on the device and are written there
before each replay; and where anything else changes (the last layer thaws, the teacher's temperature of another epoch,
a batch of another size) the step is recorded anew. The first steps after such a change run kernel by kernel, on a
stream of their own as PyTorch asks for: they choose kernels and make tables. Every step is one of training.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from dino_fast.backends import BackendError, choose
from dino_fast.engine.schedules import Rates
from dino_fast.errors import UserError
from dino_fast.gpu import capture_graph
from dino_fast.models import VisionTransformer
from dino_fast.optim import AdamWEMA

if TYPE_CHECKING:
    from dino_fast.engine.train_state import Learner

WARM_UP = 3  # steps before a recording
Parts = list[tuple[Tensor, Tensor]]
Numbers = dict[str, Tensor]
Compute = Callable[[Parts, list[Tensor | None], Rates], Numbers]


def graph_for(run: Learner) -> StepGraph | None:
    """The graph of a learner's steps, None where there is none. Raises UserError where it was asked for in vain."""
    reason = why_not(run)
    if run.config.cuda_graph == "on" and reason:
        raise UserError(f"--cuda-graph on: {reason}; use --cuda-graph auto or off")
    if run.config.cuda_graph == "off" or reason:
        return None
    assert isinstance(run.optimizer, AdamWEMA)
    return StepGraph(run.optimizer, run.device, demanded=run.config.cuda_graph == "on")


def why_not(run: Learner) -> str | None:
    """Why a step cannot be recorded, or None."""
    if run.device.type != "cuda":
        return f"a CUDA graph needs a GPU, and the run trains on {run.device}"
    if run.ranks.world > 1:
        return "with several processes gradients are exchanged within the step"
    if not isinstance(run.optimizer, AdamWEMA):
        return f"--optimizer {run.config.optimizer} does not read its rates on the GPU"
    if run.autocast is not None:
        return "under autocast (fp16, or bf16 with batch norm) the step is not the same each time"
    if not isinstance(run.student.backbone, VisionTransformer):
        return f"what --arch {run.config.arch} computes is not known to be the same at each step"
    try:
        backend = choose("multi_tensor", next(run.student.parameters()).detach())
    except BackendError as error:
        return str(error)
    return None if backend == "cuda" else f"the {backend} optimizer does not read its rates on the GPU"


class StepGraph:
    """Calls `compute`, in the place of whoever calls this, with the same result.

    `demanded`: a recording that fails raises UserError; otherwise it is told to `say`, and steps run without. `record`
    turns work into a function that replays it, and `alone` runs work on a stream of its own; tests have others.
    """

    def __init__(
        self,
        optimizer: AdamWEMA,
        device: torch.device,
        *,
        demanded: bool = False,
        record: Callable[[Callable[[], Numbers]], Callable[[], Numbers]] | None = None,
        alone: Callable[[Callable[[], Numbers]], Numbers] | None = None,
    ) -> None:
        self.optimizer, self.demanded = optimizer, demanded
        cuda = _Cuda(device) if record is None or alone is None else None
        self.record = record or cuda.record  # type: ignore[union-attr]
        self.alone = alone or cuda.alone  # type: ignore[union-attr]
        self.say: Callable[[str], None] = print
        self.failed = ""  # why
        self._key: Any = None
        self._warm = 0
        self._replay: Callable[[], Numbers] | None = None
        self._parts: Parts = []
        self._kept: list[Tensor | None] = []
        self._rates: Rates | None = None

    def __call__(self, compute: Compute, parts: Parts, kept: list[Tensor | None], rates: Rates) -> Numbers:
        """The numbers of a step; of a replayed one they are overwritten by the next."""
        if self.failed:
            self._parts, self._kept = [], []
            return self._by_kernels(lambda: compute(parts, kept, rates))
        self._take_in(parts, kept, rates)
        work = lambda: compute(self._parts, self._kept, self._present())  # noqa: E731
        if self._replay is None and self._warm < WARM_UP:
            self._warm += 1
            return self.alone(lambda: self._by_kernels(work))
        if self._replay is None and not self._recorded(work):
            return self._by_kernels(work)
        assert self._replay is not None
        self.optimizer.write_hyperparameters(momentum=rates.momentum)
        return self._replay()

    def forget(self) -> None:
        """Drops the recording and its memory; the next steps make another."""
        if self._replay is not None:
            self._replay = None
            self.optimizer.zero_grad()  # gradients lie in the recording's memory
        self._key, self._warm = None, 0

    def _take_in(self, parts: Parts, kept: list[Tensor | None], rates: Rates) -> None:
        """Copies what comes anew at each step to where a recording reads it."""
        inputs = [*(x for part in parts for x in part), *kept]
        shapes = [None if x is None else tuple(x.shape) for x in inputs]
        key = (rates.frozen, rates.teacher_temp, shapes)
        if key != self._key:
            self.forget()
            self._key = key
            self._parts = [(torch.empty_like(large), torch.empty_like(small)) for large, small in parts]
            self._kept = [None if x is None else torch.empty_like(x) for x in kept]
        self._rates = rates
        for (large, small), (new_large, new_small) in zip(self._parts, parts, strict=True):
            large.copy_(new_large, non_blocking=True)
            small.copy_(new_small, non_blocking=True)
        for buffer, drawn in zip(self._kept, kept, strict=True):
            if buffer is not None and drawn is not None:
                buffer.copy_(drawn, non_blocking=True)

    def _present(self) -> Rates:
        assert self._rates is not None
        return self._rates

    def _by_kernels(self, work: Callable[[], Numbers]) -> Numbers:
        numbers = work()
        self.optimizer.zero_grad()
        return numbers

    def _recorded(self, work: Callable[[], Numbers]) -> bool:
        """Whether the step could be recorded. Gradients are None before it, so that their memory is the recording's,
        and stay afterwards, since the optimizer's tables are those of parameters with gradients."""
        try:
            self._replay = self.record(work)
        except RuntimeError as error:
            self.optimizer.zero_grad()
            reason = str(error).partition("\n")[0]
            if self.demanded:
                raise UserError(f"--cuda-graph on: the step cannot be recorded: {reason}; use off") from error
            self.failed = reason
            self.say(f"note: the step cannot be recorded as a CUDA graph ({reason}); it runs kernel by kernel")
            return False
        return True


class _Cuda:
    """Recording on a GPU."""

    def __init__(self, device: torch.device) -> None:
        self.side = torch.cuda.Stream(device)

    def alone(self, work: Callable[[], Numbers]) -> Numbers:
        current = torch.cuda.current_stream(self.side.device)
        self.side.wait_stream(current)
        with torch.cuda.stream(self.side):
            numbers = work()
        current.wait_stream(self.side)
        return numbers

    def record(self, work: Callable[[], Numbers]) -> Callable[[], Numbers]:
        with torch.autograd.set_multithreading_enabled(False):
            return capture_graph(work, self.side)
