"""One of several processes that `test_ranks.py` starts: python -m tests.engine.ranks_worker TASK FILE, with torchrun's
variables. What a task finds is saved to FILE by the first process."""

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

from dino_fast.engine import distributed as many
from dino_fast.engine import job
from dino_fast.engine import trainer as loop
from dino_fast.engine.config import Config, build_config
from dino_fast.engine.distributed import Ranks
from dino_fast.engine.schedules import Schedules
from dino_fast.engine.train_step import Learner, build_learner, learner_state, train_step
from dino_fast.ops.linear_dino_loss.sharded import linear_dino_loss_ranks

PER_EPOCH, STEPS, BATCH = 5, 20, 12
TINY: dict[str, Any] = {
    "data": "x", "arch": "vit_tiny", "embed_dim": 32, "depth": 2, "heads": 2, "patch_size": 4, "global_size": 16,
    "local_size": 8, "local_crops": 3, "out_dim": 97, "head_hidden_dim": 48, "head_bottleneck_dim": 24,
    "drop_path_rate": 0.0, "batch_size": BATCH, "epochs": 4, "warmup_epochs": 1, "lr": 0.01, "init": "xavier",
    "warmup_teacher_temp_epochs": 2, "teacher_temp": 0.07, "momentum": 0.9, "clip_grad": 0.1,
    "center_init": "first_batch", "device": "cpu",
}  # fmt: skip
# Uneven rows (97 prototypes, 48 and 32 features over 2 processes), the freeze's end, clipping, accumulation, predictor.
CASES: list[dict[str, Any]] = [
    {},
    {"accumulate": 3, "norm_last_layer": False, "freeze_last_layer": 2.0, "predictor": "mlp"},
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


def trained(config: Config, ranks: Ranks, steps: int = STEPS) -> dict[str, Any]:
    """The losses of some steps, and the state after them."""
    learner = build_learner(config, 3, torch.device("cpu"), "fp32", ranks)
    schedules = Schedules(config, PER_EPOCH)
    rows = [
        dict(train_step(learner, batch(s, config, ranks.rank, ranks.world), schedules.at(s), s)) for s in range(steps)
    ]
    return {"rows": rows, "state": many.gathered(learner_state(learner), keep=True)}


def train(ranks: Ranks) -> Any:
    """Every case under every way of sharding."""
    return {
        (case, shard): trained(build_config({**TINY, **given, "shard": shard}), ranks)
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


def loss(ranks: Ranks) -> Any:
    """Loss, entropy and gradients of cut prototypes, gathered again."""
    found = {}
    for K, backend in LOSSES:
        tensors = loss_case(K)
        mine = {}
        for name, tensor in tensors.items():
            by_image = name in ("student", "teacher")
            parts = tensor.chunk(ranks.world, dim=1) if by_image else tensor.tensor_split(_cuts(K, ranks.world))
            mine[name] = parts[ranks.rank].contiguous()
        leaves = [mine[name].requires_grad_() for name in ("student", "student_weight", "student_gain")]
        result = linear_dino_loss_ranks(**mine, student_temp=0.1, teacher_temp=0.04, backend=backend)
        (3 * result.loss).backward()
        by_rows, by_weight, by_gain = (x.grad for x in leaves)
        rows = ranks.rows(by_rows.transpose(0, 1)).transpose(0, 1)
        found[K, backend] = (
            result.loss.detach(), result.teacher_entropy, rows, ranks.rows(by_weight), ranks.rows(by_gain)
        )  # fmt: skip
    return found


def _cuts(K: int, world: int) -> list[int]:
    rows = -(-K // world)
    return [min(K, rows * i) for i in range(1, world)]


def nonfinite(ranks: Ranks) -> Any:
    """One process's crops are bad: all see it, and nothing changes."""
    found = {}
    for shard in ("none", "full"):
        config = build_config({**TINY, "shard": shard})
        learner = build_learner(config, 3, torch.device("cpu"), "fp32", ranks)
        before = many.gathered(learner_state(learner), keep=True)
        crops = batch(0, config, ranks.rank, ranks.world)
        if ranks.rank == ranks.world - 1:
            crops.global_crops[0, 0, 0, 0, 0] = torch.nan
        assert not train_step(learner, crops, Schedules(config, PER_EPOCH).at(7), 7).finite
        found[shard] = before, many.gathered(learner_state(learner), keep=True)
    return found


def messages(ranks: Ranks) -> Any:
    """What the processes tell each other."""
    rows = torch.full((ranks.rank + 1, 2), float(ranks.rank))
    mean = ranks.start_mean(torch.tensor([float(ranks.rank)]))()
    value = {"a": [torch.arange(3), 7], "b": {"c": torch.ones(2, dtype=torch.bfloat16)}} if ranks.first else None
    told = many.told(ranks, value)
    assert torch.equal(told["a"][0], torch.arange(3)) and told["a"][1] == 7 and told["b"]["c"].dtype == torch.bfloat16
    return ranks.agree(ranks.rank, -ranks.rank), ranks.rows(rows), mean, ranks.from_first(lambda: ranks.rank)


def mixed(ranks: Ranks) -> Any:
    """Losses in 16 bits, and the scaler's factor, which an overflow in any process halves in all."""
    found = {}
    for precision in ("fp16", "bf16"):
        for shard, kept in (("none", "none"), ("full", "none"), ("full", "selective")):
            config = build_config({**TINY, "shard": shard, "checkpoint_activations": kept})
            learner = build_learner(config, 3, torch.device("cpu"), precision, ranks)
            schedules = Schedules(config, PER_EPOCH)
            steps = range(6)
            crops = [batch(s, config, ranks.rank, ranks.world) for s in steps]
            losses = [train_step(learner, crops[s], schedules.at(s), s)["loss"] for s in steps]
            found[precision, shard, kept] = losses, learner.scaler.get_scale()
    return found


LATE: dict[str, Any] = {
    "data": "demo", "channels": 3, "arch": "vit_tiny", "embed_dim": 32, "depth": 2, "heads": 2, "patch_size": 7,
    "global_size": 28, "local_size": 14, "local_crops": 2, "out_dim": 64, "head_hidden_dim": 32,
    "head_bottleneck_dim": 16, "drop_path_rate": 0.0, "batch_size": 12, "epochs": 2, "warmup_epochs": 0.01,
    "freeze_last_layer": 0.0, "knn_every": 0, "max_steps": 6, "on_nonfinite": "skip", "device": "cpu", "workers": 0,
}  # fmt: skip


def run_with_bad_steps(out: Path, ranks: Ranks, **given: Any) -> Path:
    """A whole run; in two steps in a row the last process's crops are bad."""
    step = loop.train_step

    def sometimes(learner: Learner, crops: Any, rates: Any, number: int) -> Any:
        if number in (2, 3) and ranks.rank == ranks.world - 1:
            crops.global_crops[0, 0, 0, 0, 0] = torch.nan
        return step(learner, crops, rates, number)

    with mock.patch.object(loop, "train_step", sometimes):
        return loop.train(build_config({**LATE, **given, "out": str(out)}))


def late(ranks: Ranks) -> Any:
    """Runs whose numbers are read a step late, as on GPUs: the processes wait for each other at the same points."""
    folder = Path(sys.argv[2]).parent
    with mock.patch.object(job, "reads_late", lambda device: True):
        return {
            shard: str(run_with_bad_steps(folder / f"late-{shard}", ranks, shard=shard)) for shard in ("none", "full")
        }


TASKS: dict[str, Callable[[Ranks], Any]] = {
    "train": train,
    "loss": loss,
    "nonfinite": nonfinite,
    "messages": messages,
    "mixed": mixed,
    "late": late,
}

if __name__ == "__main__":
    torch.set_num_threads(1)
    with many.joined("cpu") as ranks:
        found = {task: TASKS[task](ranks) for task in sys.argv[1].split(",")}
        if ranks.first:
            torch.save(found, sys.argv[2])
        dist.barrier()
