"""One of several processes that `test_distributed.py` starts: python -m tests.engine.ranks_worker TASK FILE, with
torchrun's variables. What a task finds is saved to FILE by the first process."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor

from dino_fast.engine import trainer as loop
from dino_fast.engine.build import build_train_state
from dino_fast.engine.config import Config, build_config
from dino_fast.engine.distributed import DistContext, broadcast_state, init_distributed
from dino_fast.engine.parallelize import full_state_dict
from dino_fast.engine.schedules import Schedules
from dino_fast.engine.train_state import TrainState
from dino_fast.engine.train_step import train_step
from dino_fast.ops.linear_dino_loss.sharded import linear_dino_loss_ranks

PER_EPOCH, STEPS, BATCH = 5, 20, 12
TINY: dict[str, Any] = {
    "data": "x", "arch": "vit_tiny", "embed_dim": 32, "depth": 2, "num_heads": 2, "patch_size": 4, "global_size": 16,
    "local_size": 8, "local_crops": 3, "out_dim": 97, "head_hidden_dim": 48, "head_bottleneck_dim": 24,
    "drop_path_rate": 0.19, "batch_size": BATCH, "epochs": 4, "warmup_epochs": 1, "lr": 0.01, "init": "xavier",
    "warmup_teacher_temp_epochs": 2, "teacher_temp": 0.07, "momentum": 0.9, "clip_grad": 0.1,
    "center_init": "first_batch", "device": "cpu",
}  # fmt: skip
# Uneven rows (97 prototypes, 48 and 32 features over 2 processes), the freeze's end, clipping, accumulation, predictor.
CASES: list[dict[str, Any]] = [
    {},
    {"grad_accum_steps": 3, "norm_last_layer": False, "freeze_last_layer": 2.0, "predictor": "mlp"},
    {"out_dim": 1, "clip_grad": 0.0, "local_crops": 0},  # one of two processes has no prototype
]


@dataclass
class Crops:
    global_crops: Tensor
    local_crops: Tensor


def batch(step: int, config: Config, rank: int, world: int) -> Crops:
    """This process's part of a global batch that is the same for any number of processes."""
    generator = torch.Generator().manual_seed(100 + step)
    n, large, small = config.batch_size, config.global_size, config.local_size
    whole = (
        torch.randn(2, n, 3, large, large, generator=generator),
        torch.randn(config.local_crops, n, 3, small, small, generator=generator),
    )
    return Crops(*(x.chunk(world, dim=1)[rank].contiguous() for x in whole))


def trained(config: Config, context: DistContext, steps: int = STEPS) -> dict[str, Any]:
    """The losses of some steps, and the state after them."""
    train_state = build_train_state(config, 3, torch.device("cpu"), "fp32", context)
    schedules = Schedules(config, PER_EPOCH)
    rows = [
        dict(train_step(train_state, batch(s, config, context.rank, context.world), schedules.values_at(s), s))
        for s in range(steps)
    ]
    return {"rows": rows, "state": full_state_dict(train_state.state_dict(), keep=True)}


def train(context: DistContext) -> Any:
    """Every case under every way of sharding."""
    return {
        (case, shard): trained(build_config({**TINY, **given, "fsdp": shard}), context)
        for case, given in enumerate(CASES)
        for shard in ("none", "grads", "full")
    }


def loss_case(K: int, seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)

    def rows(*shape: int) -> Tensor:
        return torch.nn.functional.normalize(torch.randn(*shape, generator=generator), dim=-1)

    return {
        "student": rows(5, 6, 16), "teacher": rows(2, 6, 16),
        "student_weight": 2 * torch.randn(K, 16, generator=generator),
        "teacher_weight": 2 * torch.randn(K, 16, generator=generator),
        "student_gain": 1 + torch.rand(K, generator=generator), "teacher_gain": torch.ones(K),
        "center": torch.randn(K, generator=generator),
    }  # fmt: skip


LOSSES = [(K, backend) for K in (1, 2, 3, 257) for backend in ("native", "reference")]


def loss(context: DistContext) -> Any:
    """Loss, entropy and gradients of cut prototypes, gathered again."""
    found = {}
    for K, backend in LOSSES:
        tensors = loss_case(K)
        mine = {}
        for name, tensor in tensors.items():
            by_image = name in ("student", "teacher")
            parts = tensor.chunk(context.world, dim=1) if by_image else tensor.tensor_split(_cuts(K, context.world))
            mine[name] = parts[context.rank].contiguous()
        leaves = [mine[name].requires_grad_() for name in ("student", "student_weight", "student_gain")]
        result = linear_dino_loss_ranks(**mine, student_temp=0.1, teacher_temp=0.04, backend=backend)
        (3 * result.loss).backward()
        grad_rows, grad_weight, grad_gain = (x.grad for x in leaves)
        rows = context.all_gather_rows(grad_rows.transpose(0, 1)).transpose(0, 1)
        found[K, backend] = (
            result.loss.detach(), result.teacher_entropy, rows,
            *map(context.all_gather_rows, (grad_weight, grad_gain)),
        )  # fmt: skip
    return found


def _cuts(K: int, world: int) -> list[int]:
    rows = -(-K // world)
    return [min(K, rows * i) for i in range(1, world)]


def nonfinite(context: DistContext) -> Any:
    """One process's crops are bad: all see it, and nothing changes."""
    found = {}
    for shard in ("none", "full"):
        config = build_config({**TINY, "fsdp": shard})
        train_state = build_train_state(config, 3, torch.device("cpu"), "fp32", context)
        before = full_state_dict(train_state.state_dict(), keep=True)
        crops = batch(0, config, context.rank, context.world)
        if context.rank == context.world - 1:
            crops.global_crops[0, 0, 0, 0, 0] = torch.nan
        assert not train_step(train_state, crops, Schedules(config, PER_EPOCH).values_at(7), 7).finite
        found[shard] = before, full_state_dict(train_state.state_dict(), keep=True)
    return found


def messages(context: DistContext) -> Any:
    """What the processes tell each other."""
    rows = torch.full((context.rank + 1, 2), float(context.rank))
    mean = context.start_mean(torch.tensor([float(context.rank)]))()
    value = {"a": [torch.arange(3), 7], "b": {"c": torch.ones(2, dtype=torch.bfloat16)}} if context.first else None
    told = broadcast_state(context, value)
    assert torch.equal(told["a"][0], torch.arange(3)) and told["a"][1] == 7 and told["b"]["c"].dtype == torch.bfloat16
    return (
        context.all_reduce_max(context.rank, -context.rank),
        context.all_gather_rows(rows),
        mean,
        context.run_on_rank0(lambda: context.rank),
    )


def mixed(context: DistContext) -> Any:
    """Losses in 16 bits, and the scaler's factor, which an overflow in any process halves in all."""
    found = {}
    for precision in ("fp16", "bf16"):
        for shard, kept in (("none", "none"), ("full", "none"), ("full", "selective")):
            config = build_config({**TINY, "drop_path_rate": 0.0, "fsdp": shard, "checkpoint_activations": kept})
            train_state = build_train_state(config, 3, torch.device("cpu"), precision, context)
            schedules = Schedules(config, PER_EPOCH)
            steps = range(6)
            crops = [batch(s, config, context.rank, context.world) for s in steps]
            losses = [train_step(train_state, crops[s], schedules.values_at(s), s)["loss"] for s in steps]
            found[precision, shard, kept] = losses, train_state.scaler.get_scale()
    return found


LATE: dict[str, Any] = {
    "data": "demo", "channels": 3, "arch": "vit_tiny", "embed_dim": 32, "depth": 2, "num_heads": 2, "patch_size": 7,
    "global_size": 28, "local_size": 14, "local_crops": 2, "out_dim": 64, "head_hidden_dim": 32,
    "head_bottleneck_dim": 16, "drop_path_rate": 0.0, "batch_size": 12, "epochs": 2, "warmup_epochs": 0.01,
    "freeze_last_layer": 0.0, "knn_every": 0, "max_steps": 6, "on_nonfinite": "skip", "device": "cpu", "workers": 0,
}  # fmt: skip


def run_with_bad_steps(out: Path, context: DistContext, **given: Any) -> Path:
    """A whole run; in two steps in a row the last process's crops are bad."""
    step = loop.train_step

    def sometimes(train_state: TrainState, crops: Any, hyperparams: Any, number: int) -> Any:
        if number in (2, 3) and context.rank == context.world - 1:
            crops.global_crops[0, 0, 0, 0, 0] = torch.nan
        return step(train_state, crops, hyperparams, number)

    with mock.patch.object(loop, "train_step", sometimes):
        return loop.train(build_config({**LATE, **given, "out": str(out)}))


def late(context: DistContext) -> Any:
    """Runs whose numbers are read a step late, as on GPUs: the processes wait for each other at the same points."""
    folder = Path(sys.argv[2]).parent
    with mock.patch.object(loop, "defers_metrics", lambda device: True):
        return {
            shard: str(run_with_bad_steps(folder / f"late-{shard}", context, fsdp=shard)) for shard in ("none", "full")
        }


TASKS: dict[str, Callable[[DistContext], Any]] = {
    "train": train,
    "loss": loss,
    "nonfinite": nonfinite,
    "messages": messages,
    "mixed": mixed,
    "late": late,
}

if __name__ == "__main__":
    torch.set_num_threads(1)
    with init_distributed("cpu") as context:
        found = {task: TASKS[task](context) for task in sys.argv[1].split(",")}
        if context.first:
            torch.save(found, sys.argv[2])
        dist.barrier()
