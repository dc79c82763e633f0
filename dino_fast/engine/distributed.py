"""Many processes: who they are, how the networks are spread over them, and what they tell each other.

`torchrun` and Slurm's `srun` say in the environment which process this is. Gradients are averaged in one of three ways:

    none    DistributedDataParallel: every process holds everything, gradients are all-reduced in the backward pass
    grads   FSDP2: weights, gradients and moments are cut by rows; weights are gathered for the step and kept for it
    full    FSDP2: weights are gathered block by block, and again for the backward pass

Under the last two the teacher is cut just as the student is, so its moving average needs no communication, and each
process keeps its own rows of the prototypes for good: `dino_fast.ops.linear_dino_loss.sharded` merges what they find.
What is decided from a clock, a signal or the disk is agreed on by all processes, or they would wait for each other.
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
from torch import Tensor, nn

from dino_fast.errors import UserError
from dino_fast.models import DINOHead, MultiCropWrapper

T = TypeVar("T")
WAIT = timedelta(minutes=30)  # for a process that reads a large data set's index while the others are done


@dataclass(frozen=True)
class Ranks:
    """This process among all. Its methods are called by all of them at the same point, and do nothing for one."""

    rank: int = 0
    world: int = 1
    local: int = 0  # among those of this machine
    local_world: int = 1
    control: Any = None  # a gloo group: what it carries waits for no GPU

    @property
    def first(self) -> bool:
        """Whether this process writes files and speaks."""
        return self.rank == 0

    def agree(self, *numbers: int) -> list[int]:
        """The largest that any process gave, of each."""
        if self.world == 1:
            return list(numbers)
        vector = torch.tensor(numbers, dtype=torch.int64, device="cpu")
        dist.all_reduce(vector, dist.ReduceOp.MAX, group=self.control)
        return cast("list[int]", vector.tolist())

    def from_first(self, make: Callable[[], T]) -> T:
        """What `make` returns in the first process; where it raises UserError there, all raise it."""
        if self.world == 1:
            return make()
        told: list[Any] = [None, None]
        if self.first:
            try:
                told[0] = make()
            except UserError as error:
                told[1] = str(error)
        dist.broadcast_object_list(told, src=0, group=self.control)
        if told[1] is not None:
            raise UserError(told[1])
        return cast(T, told[0])

    def rows(self, own: Tensor) -> Tensor:
        """The rows [n, ...] of all processes, in their order, on the CPU; n may differ."""
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
        """Begins to average a tensor over the processes; the function returned waits for the result."""
        if self.world == 1:
            return lambda: tensor
        total = tensor.clone()
        work = dist.all_reduce(total, async_op=True)

        def finished() -> Tensor:
            work.wait()  # of NCCL: the stream waits, not the host
            return total / self.world

        return finished


ALONE = Ranks()


@contextlib.contextmanager
def joined(kind: str) -> Iterator[Ranks]:
    """This process among those that were started together, for devices of `kind` (cuda or cpu).

    A process group that is there already is used, and left.
    """
    rank, world, local, local_world = place(os.environ)
    if dist.is_available() and dist.is_initialized():
        rank, world = dist.get_rank(), dist.get_world_size()
    if world == 1:
        yield ALONE
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
        dist.init_process_group(backend, store=meeting_place(rank, world), rank=rank, world_size=world, timeout=WAIT)
    control = dist.new_group(backend="gloo", timeout=WAIT) if kind == "cuda" else dist.group.WORLD
    try:
        yield Ranks(rank, world, local, local_world, control)
    finally:
        if made:
            dist.destroy_process_group()


def meeting_place(rank: int, world: int) -> dist.Store:
    """Where processes find each other. torchrun keeps it over its restarts, in which the addresses of processes that
    are gone would be found: each attempt has names of its own."""
    from torch.distributed.rendezvous import rendezvous

    store, _, _ = next(rendezvous("env://", rank, world, timeout=WAIT))
    return dist.PrefixStore(f"attempt-{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)


def place(environment: Mapping[str, str]) -> tuple[int, int, int, int]:
    """(rank, world, rank on this machine, processes on this machine) from torchrun's variables, or from Slurm's.

    Slurm's are turned into torchrun's, which PyTorch reads. Only a step that srun started has tasks of its own: in a
    batch script without srun the job's count says nothing about this process.
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
    found = re.match(r"([^,\[]+)(?:\[([^\],-]+))?", nodes)
    if found is None:
        raise UserError(f"SLURM_STEP_NODELIST is {nodes!r}, which names no machine; set MASTER_ADDR yourself")
    return found[1] + (found[2] or "")


# ---- spreading the networks ----


class Called(nn.Module):
    """Runs any function of the student as its forward pass: what DistributedDataParallel wraps."""

    def __init__(self, student: nn.Module) -> None:
        super().__init__()
        self.student = student

    def forward(self, function: Callable[..., Any], *arguments: Any) -> Any:
        return function(*arguments)


def directly(function: Callable[..., Any], *arguments: Any) -> Any:
    """Calls `function` where nothing has to be told of a forward pass."""
    return function(*arguments)


def replicate(student: nn.Module) -> nn.Module:
    """The student under DistributedDataParallel, to be called with one of its functions and that one's arguments.

    It covers the parameters that want a gradient now: make it anew when that changes.
    """
    from torch.nn.parallel import DistributedDataParallel

    # Weights are equal already: functions of the seed, or read from one checkpoint.
    return DistributedDataParallel(Called(student), gradient_as_bucket_view=True, init_sync=False)


def shard(network: MultiCropWrapper, mesh: Any, *, keep: bool, dtype: torch.dtype | None) -> None:
    """Cuts a network's weights over the mesh: each block, the rest of the backbone, the head, the prototypes.

    With `keep` the gathered weights stay from the forward to the backward pass; `dtype` is what they are gathered in.
    """
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
    for part in (*getattr(network.backbone, "blocks", ()), network.backbone, *_before_prototypes(network)):
        fully_shard(part, mesh=mesh, reshard_after_forward=not keep, mp_policy=policy)
    cut_rows(cast(nn.Module, network.head.last_layer), mesh)


def _before_prototypes(network: MultiCropWrapper) -> list[nn.Module]:
    """The head's parts that are called one by one: the MLP, and the predictor where there is one."""
    head = cast(DINOHead, network.head)
    return [head.mlp] if head.predictor is None else [head.mlp, head.predictor]


def cut_rows(layer: nn.Module, mesh: Any) -> None:
    """Each process keeps its rows of the layer's parameters."""
    from torch.distributed.tensor import Shard, distribute_tensor

    for name, parameter in list(layer.named_parameters()):
        rows = distribute_tensor(parameter.detach(), mesh, [Shard(0)], src_data_rank=None)
        setattr(layer, name, nn.Parameter(rows, requires_grad=parameter.requires_grad))


def reduce_gradients(student: MultiCropWrapper, through: Any, now: bool) -> contextlib.AbstractContextManager[Any]:
    """Around a forward pass: whether its backward pass ends in gradients averaged over the processes (`now`), or adds
    to this process's own."""
    for part in (student.backbone, *_before_prototypes(student)):
        if hasattr(part, "set_requires_gradient_sync"):
            cast(Any, part).set_requires_gradient_sync(now)
    if not now and hasattr(through, "no_sync"):
        return cast("contextlib.AbstractContextManager[Any]", through.no_sync())
    return contextlib.nullcontext()


# ---- whole tensors, for checkpoints and evaluation ----


def local(tensor: Tensor) -> Tensor:
    """This process's rows of a tensor that is cut; any other tensor itself. Differentiable."""
    return cast(Any, tensor).to_local() if hasattr(tensor, "to_local") else tensor


def gathered(value: Any, keep: bool) -> Any:
    """The nested `value` with a whole copy of every tensor on the CPU; None where not `keep`. All processes call it."""
    if isinstance(value, dict):
        found = {key: gathered(item, keep) for key, item in value.items()}
        return found if keep else None
    if isinstance(value, list | tuple):
        entries = [gathered(item, keep) for item in value]
        return type(value)(entries) if keep else None
    if isinstance(value, Tensor):
        whole = cast(Any, value).full_tensor() if hasattr(value, "full_tensor") else value
        return whole.detach().to("cpu", copy=True) if keep else None
    return value if keep else None


def told(ranks: Ranks, value: Any) -> Any:
    """The nested `value` of the first process, in all: its outline as one object, then tensor by tensor."""
    if ranks.world == 1:
        return value
    tensors: list[Tensor] = []
    outline = ranks.from_first(lambda: _outline(value, tensors))
    return _filled(outline, iter(tensors), ranks)


def placed(whole: Tensor, like: Tensor) -> Tensor:
    """The tensor cut as `like` is."""
    if not hasattr(like, "device_mesh"):
        return whole
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(whole.to(like.device), like.device_mesh, like.placements, src_data_rank=None)  # type: ignore[attr-defined]


@dataclass(frozen=True)
class _Blank:
    shape: tuple[int, ...]
    dtype: torch.dtype


def _outline(value: Any, tensors: list[Tensor]) -> Any:
    if isinstance(value, Tensor):
        tensors.append(value)
        return _Blank(tuple(value.shape), value.dtype)
    if isinstance(value, dict):
        return {key: _outline(item, tensors) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_outline(item, tensors) for item in value)
    return value


def _filled(outline: Any, tensors: Iterator[Tensor], ranks: Ranks) -> Any:
    if isinstance(outline, _Blank):
        tensor = (
            next(tensors).contiguous() if ranks.first else torch.empty(outline.shape, dtype=outline.dtype, device="cpu")
        )
        dist.broadcast(tensor, src=0, group=ranks.control)
        return tensor
    if isinstance(outline, dict):
        return {key: _filled(item, tensors, ranks) for key, item in outline.items()}
    if isinstance(outline, list | tuple):
        return type(outline)(_filled(item, tensors, ranks) for item in outline)
    return outline
