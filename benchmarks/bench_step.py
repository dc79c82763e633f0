"""One whole training step at K = 65536: crops in memory -> loss, gradients, AdamW, teacher, centre.

The model is a ViT of width 192 with 6 blocks and 3 heads, patches of 4 on global crops of 32 pixels and local ones of
16 (a small image set's proportions: 65 and 17 tokens), the head 2048-2048-256-65536; 2 + 8 crops of 16 images. Ours is
the engine's `train_step`; the baseline is the plain transcription of the published iteration, once with the allocator
that ours has and once, in a process of its own, with the allocator's default, which is what its users have. The last
layer is past its freeze, as in all epochs but the first. Data loading is not part of it.

Further rows time the parts of the engine's step, data and all, and say which option to change (`step_parts`): of this
size on the demo's images, on a GPU of a ViT-S/16, or of the configuration of a run (`--config runs/.../config.yaml`),
which is then all that is measured.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dino_fast.benchmarks import original

from .harness import Comparison, Contender, Row, peak_cpu, run_all

LR, WEIGHT_DECAY, MOMENTUM, CLIP, TEACHER_TEMP = 1e-4, 0.04, 0.996, 3.0, 0.04
CHECKED_STEPS = 3
ERROR_LIMIT = 1e-5  # the parity bar of the engine, relative, over the first losses from equal weights


@dataclass(frozen=True)
class Size:
    """What a step works on."""

    images: int = 16
    prototypes: int = 65536
    local_crops: int = 8
    depth: int = 6
    width: int = 192
    heads: int = 3

    def __str__(self) -> str:
        return f"B{self.images} V{2 + self.local_crops} K{self.prototypes} ViT-{self.width}x{self.depth}/4 at 32+16 px"


@dataclass
class Batch:
    """Seeded noise in the shape of crops."""

    global_crops: Tensor  # [2, B, 3, 32, 32]
    local_crops: Tensor  # [n, B, 3, 16, 16]

    @classmethod
    def of(cls, size: Size) -> Batch:
        generator = torch.Generator().manual_seed(1)
        global_crops = torch.randn(2, size.images, 3, 32, 32, generator=generator)
        return cls(global_crops, torch.randn(size.local_crops, size.images, 3, 16, 16, generator=generator))

    def crops(self, dtype: torch.dtype = torch.float32) -> list[Tensor]:
        return [*self.global_crops.to(dtype), *self.local_crops.to(dtype)]


def plain_model(size: Size) -> original.MultiCropWrapper:
    backbone = original.ViT(32, 4, 3, size.width, size.depth, size.heads)
    return original.MultiCropWrapper(backbone, original.DINOHead(size.width, size.prototypes))


def plain_step(size: Size, dtype: torch.dtype = torch.float32) -> Callable[[], float]:
    """The published iteration from seed 0; each call is a step and returns its loss."""
    torch.manual_seed(0)
    student = plain_model(size).to(dtype)
    with torch.no_grad():
        teacher = plain_model(size).to(dtype)
    loss = original.DINOLoss(size.prototypes, 2 + size.local_crops, TEACHER_TEMP, TEACHER_TEMP, 0, 1).to(dtype)
    run = original.Trainer(student, teacher, loss, [LR], [WEIGHT_DECAY], [MOMENTUM], CLIP, freeze_last_layer=0)
    crops = Batch.of(size).crops(dtype)
    return lambda: run.step(crops, 0, 0)


def our_step(size: Size) -> Callable[[], float]:
    """The engine's step from the same weights."""
    from dino_fast.engine.build import build_train_state
    from dino_fast.engine.config import Config
    from dino_fast.engine.schedules import StepHyperparams
    from dino_fast.engine.train_step import train_step

    config = Config(
        global_size=32, local_size=16, local_crops=size.local_crops, arch="vit_tiny", patch_size=4,
        embed_dim=size.width, depth=size.depth, num_heads=size.heads, drop_path_rate=0.0, out_dim=size.prototypes,
        batch_size=size.images, clip_grad=CLIP, freeze_last_layer=0.0, teacher_temp=TEACHER_TEMP,
        warmup_teacher_temp=TEACHER_TEMP,
    )  # fmt: skip
    run = build_train_state(config, 3, torch.device("cpu"), "fp32")
    torch.manual_seed(0)
    weights = plain_model(size).state_dict()
    run.student.load_state_dict(weights)
    run.teacher.load_state_dict(weights)
    hyperparams = StepHyperparams(
        lr=LR, weight_decay=WEIGHT_DECAY, momentum=MOMENTUM, teacher_temp=TEACHER_TEMP, frozen=False
    )
    batch = Batch.of(size)
    return lambda: train_step(run, batch, hyperparams, 1)["loss"]


def first_losses(make: Callable[..., Callable[[], float]], *args: Any) -> Tensor:
    step = make(*args)
    return torch.tensor([step() for _ in range(CHECKED_STEPS)], dtype=torch.float64)


class OtherProcess:
    """The plain step in a process whose allocator is left as it is: mallopt cannot be taken back."""

    def __init__(self, size: Size) -> None:
        self.size = size
        self.process: subprocess.Popen[str] | None = None

    def ask(self, question: str) -> Any:
        if self.process is None:
            command = [sys.executable, "-m", "dino_fast.benchmarks.bench_step", json.dumps(vars(self.size))]
            self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert self.process.stdin and self.process.stdout
        self.process.stdin.write(question + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())

    def close(self) -> None:
        if self.process is not None:
            self.process.communicate()
            self.process = None


def answer(size: Size) -> None:
    """The other process: `check`, `step` or `peak` on a line each, an answer in JSON on a line each."""
    step: Callable[[], float] | None = None
    for line in sys.stdin:
        if line.strip() == "check":
            result: Any = first_losses(plain_step, size).tolist()
        else:
            step = step or plain_step(size)
            result = peak_cpu(step) if line.strip() == "peak" else step()
        print(json.dumps(result), flush=True)


def comparisons(quick: bool = False) -> Iterator[Comparison]:
    size = Size(images=4, prototypes=8192, depth=2) if quick else Size()
    ours, plain, other = _kept(our_step, size), _kept(plain_step, size), OtherProcess(size)
    yield Comparison(
        operation="step",
        shape=str(size),
        dtype="float32",
        reference=lambda: first_losses(plain_step, size, torch.float64),
        error_limit=ERROR_LIMIT,
        seconds=45.0,
        contenders=[
            Contender("dino-fast", ours, ours=True, check=lambda: first_losses(our_step, size)),
            Contender("published", plain, baseline=True, check=lambda: first_losses(plain_step, size)),
            Contender(
                "published, default allocator",
                lambda: other.ask("step"),
                check=lambda: torch.tensor(other.ask("check"), dtype=torch.float64),
                peak=lambda: other.ask("peak"),
                allocator="default",
            ),
        ],
    )
    other.close()


def _kept(make: Callable[[Size], Callable[[], float]], size: Size) -> Callable[[], float]:
    """A step whose model is built at the first call and kept."""
    built: list[Callable[[], float]] = []

    def call() -> float:
        if not built:
            built.append(make(size))
        return built[0]()

    return call


def run(quick: bool = False, config: Path | None = None) -> list[Row]:
    """Times whole training steps and their parts; with `config` the parts of that run's step alone."""
    from . import step_parts

    seconds = 2.0 if quick else 20.0
    if config is not None:
        from dino_fast.engine.config import load_config

        return step_parts.parts(load_config(config), seconds=seconds)
    return [*run_all(comparisons(quick), quick=quick), *step_parts.parts(step_parts.default(quick), seconds=seconds)]


def test_speed(benchmark: Any, contender: Contender) -> None:
    benchmark(contender)


if __name__ == "__main__":
    answer(Size(**json.loads(sys.argv[1])))
