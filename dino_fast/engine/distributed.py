"""The processes of a run: which one this is, and what they exchange on the CPU.

`torchrun` and Slurm's `srun` tell a process its rank in environment variables. Whatever depends on a clock, a signal or
the disk is decided by all processes together: ranks that took different branches would deadlock in a collective.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor

from dino_fast.errors import UserError

T = TypeVar("T")
WAIT = timedelta(minutes=30)  # one process may read a large data set's index while the others are waiting


@dataclass(frozen=True)
class DistContext:
    """This process's rank, and collectives: all processes call a method at the same point; with one it does nothing."""

    rank: int = 0
    world: int = 1
    local: int = 0  # rank on this machine
    local_world: int = 1
    control: Any = None  # gloo process group for CPU tensors: never waits for a GPU

    @property
    def first(self) -> bool:
        """Whether this is rank 0, which writes files and prints."""
        return self.rank == 0

    def all_reduce_max(self, *numbers: int) -> list[int]:
        """Element-wise maximum over the processes."""
        if self.world == 1:
            return list(numbers)
        vector = torch.tensor(numbers, dtype=torch.int64, device="cpu")
        dist.all_reduce(vector, dist.ReduceOp.MAX, group=self.control)
        return cast("list[int]", vector.tolist())

    def run_on_rank0(self, make: Callable[[], T]) -> T:
        """Calls `make` on rank 0 and returns its result on all; a UserError there is raised on all."""
        if self.world == 1:
            return make()
        result: list[Any] = [None, None]  # value, error message
        if self.first:
            try:
                result[0] = make()
            except UserError as error:
                result[1] = str(error)
        dist.broadcast_object_list(result, src=0, group=self.control)
        if result[1] is not None:
            raise UserError(result[1])
        return cast(T, result[0])

    def all_gather_rows(self, own: Tensor) -> Tensor:
        """Concatenates rows [n, ...] of all ranks, in rank order, on the CPU; n may differ."""
        if self.world == 1:
            return own
        counts = [torch.zeros(1, dtype=torch.int64, device="cpu") for _ in range(self.world)]
        dist.all_gather(counts, torch.tensor([len(own)], dtype=torch.int64, device="cpu"), group=self.control)
        longest = max(int(count) for count in counts)
        padded = torch.zeros(longest, *own.shape[1:], dtype=own.dtype, device="cpu")
        padded[: len(own)] = own.cpu()
        parts = [torch.empty_like(padded) for _ in counts]
        dist.all_gather(parts, padded, group=self.control)
        return torch.cat([part[: int(count)] for part, count in zip(parts, counts, strict=True)])

    def start_mean(self, tensor: Tensor) -> Callable[[], Tensor]:
        """Starts an all-reduce of the mean over the ranks; the returned function waits for it and returns the mean."""
        if self.world == 1:
            return lambda: tensor
        total = tensor.clone()
        work = dist.all_reduce(total, async_op=True)

        def finished() -> Tensor:
            work.wait()  # NCCL: the stream waits, not the host
            return total / self.world

        return finished


SINGLE_PROCESS = DistContext()


@contextlib.contextmanager
def init_distributed(kind: str) -> Iterator[DistContext]:
    """Joins the processes that torchrun or srun started, for devices of `kind` ("cuda" or "cpu").

    An existing process group is used and left in place. Raises UserError if there are more processes than GPUs.
    """
    rank, world, local, local_world = read_environment(os.environ)
    if dist.is_available() and dist.is_initialized():
        rank, world = dist.get_rank(), dist.get_world_size()
    if world == 1:
        yield SINGLE_PROCESS
        return
    made = not dist.is_initialized()
    if kind == "cuda":
        if local >= torch.cuda.device_count():
            raise UserError(
                f"this machine runs {local_world} processes and has {torch.cuda.device_count()} GPUs; start one a GPU"
            )
        torch.cuda.set_device(local)
    if made:
        backend = "cpu:gloo,cuda:nccl" if kind == "cuda" else "gloo"
        dist.init_process_group(backend, store=rendezvous_store(rank, world), rank=rank, world_size=world, timeout=WAIT)
    control = dist.new_group(backend="gloo", timeout=WAIT) if kind == "cuda" else dist.group.WORLD
    try:
        yield DistContext(rank, world, local, local_world, control)
    finally:
        if made:
            dist.destroy_process_group()


def rendezvous_store(rank: int, world: int) -> Any:
    """The rendezvous' key-value store (`torch.distributed.Store`), with keys of this attempt alone.

    torchrun keeps one store over restarts, with addresses of processes that have died, so each attempt prefixes its
    keys.
    """
    from torch.distributed.rendezvous import rendezvous

    store, _, _ = next(rendezvous("env://", rank, world, timeout=WAIT))
    return dist.PrefixStore(f"attempt-{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)


def read_environment(environment: Mapping[str, str]) -> tuple[int, int, int, int]:
    """(rank, world size, local rank, local world size) from torchrun's variables, or else Slurm's.

    With Slurm, MASTER_ADDR and MASTER_PORT are set for PyTorch if they are not. Only variables of a step (srun) count:
    in a batch script without srun the job's task count says nothing about this process.
    """
    if "RANK" in environment and "WORLD_SIZE" in environment:
        names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
        values = [environment.get(name, default) for name, default in zip(names, "0101", strict=True)]
    elif int(environment.get("SLURM_STEP_NUM_TASKS", "1")) > 1:
        here = re.match(r"\d+", environment.get("SLURM_STEP_TASKS_PER_NODE", "1"))
        values = [environment[name] for name in ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID")]
        values.append(here[0] if here else "1")
        os.environ.setdefault("MASTER_ADDR", first_host(environment["SLURM_STEP_NODELIST"]))
        # The same for all processes of a job, and seldom for two jobs of one machine.
        os.environ.setdefault("MASTER_PORT", str(20000 + int(environment.get("SLURM_JOB_ID", "0")) % 20000))
    else:
        return 0, 1, 0, 1
    rank, world, local, local_world = map(int, values)
    return rank, world, local, local_world


def first_host(nodes: str) -> str:
    """The first of Slurm's list of machines: `gpu[03-05,9],other` -> `gpu03`."""
    match = re.match(r"([^,\[]+)(?:\[([^\],-]+))?", nodes)
    if match is None:
        raise UserError(f"SLURM_STEP_NODELIST is {nodes!r}, which names no machine; set MASTER_ADDR yourself")
    return match[1] + (match[2] or "")


# ---- a nested state from rank 0 to all ----


def broadcast_state(context: DistContext, value: Any) -> Any:
    """Broadcasts rank 0's nested dict, list or tuple: its structure as one object, then its tensors one by one."""
    if context.world == 1:
        return value
    tensors: list[Tensor] = []
    outline = context.run_on_rank0(lambda: _outline(value, tensors))
    return _fill(outline, iter(tensors), context)


@dataclass(frozen=True)
class _Placeholder:
    shape: tuple[int, ...]
    dtype: torch.dtype


def _outline(value: Any, tensors: list[Tensor]) -> Any:
    """`value` with a placeholder for each tensor; the tensors are appended to `tensors`."""
    if isinstance(value, Tensor):
        tensors.append(value)
        return _Placeholder(tuple(value.shape), value.dtype)
    if isinstance(value, dict):
        return {key: _outline(item, tensors) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_outline(item, tensors) for item in value)
    return value


def _fill(outline: Any, tensors: Iterator[Tensor], context: DistContext) -> Any:
    """The inverse of `_outline` on all ranks: rank 0 broadcasts its tensors, the others receive them."""
    if isinstance(outline, _Placeholder):
        if context.first:
            tensor = next(tensors).contiguous()
        else:
            tensor = torch.empty(outline.shape, dtype=outline.dtype, device="cpu")
        dist.broadcast(tensor, src=0, group=context.control)
        return tensor
    if isinstance(outline, dict):
        return {key: _fill(item, tensors, context) for key, item in outline.items()}
    if isinstance(outline, list | tuple):
        return type(outline)(_fill(item, tensors, context) for item in outline)
    return outline
