"""The parts of a training step, and which option to change for the largest of them.

A step of the engine on real crops, as a run makes it: `data` is the wait for the crops and their way to the device,
`teacher` and `student` the forward passes up to the last layer, `loss` that layer and the loss (where logits are made
some images at a time, with their gradients), `backward` the rest of the gradients, `optimizer` clipping, AdamW, the
moving average and the centre. On a GPU the times are those between events in its stream, and steps run kernel by kernel
(replayed from a CUDA graph they have no parts), so what the host could not launch in time counts where it was missing.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from .harness import Row

if TYPE_CHECKING:
    from dino_fast.data import TrainLoader
    from dino_fast.engine.config import Config

PARTS = ("data", "teacher", "student", "loss", "backward", "optimizer")
WARM, LEAST, MOST = 3, 5, 200  # steps: not timed, and timed


class Stopwatch:
    """Called with a part's name when it begins; `laps` has the milliseconds of each part, of the steps that ended."""

    def __init__(self, device: torch.device) -> None:
        self.cuda = device.type == "cuda"
        self.laps: list[dict[str, float]] = []
        self._marks: list[tuple[str, Any]] = []

    def __call__(self, part: str) -> None:
        if self.cuda:
            now: Any = torch.cuda.Event(enable_timing=True)
            now.record()
        else:
            now = time.perf_counter()
        self._marks.append((part, now))

    def end(self) -> None:
        """A step is over; waits for it on a GPU."""
        self("")
        if self.cuda:
            self._marks[-1][1].synchronize()
        lap = dict.fromkeys(PARTS, 0.0)
        for (part, begun), (_, over) in zip(self._marks, self._marks[1:], strict=False):
            lap[part] += begun.elapsed_time(over) if self.cuda else 1e3 * (over - begun)
        self.laps.append(lap)
        self._marks.clear()


def parts(config: Config, *, seconds: float = 10.0) -> list[Row]:
    """A row for each part of a step as `config` has it, and one of the whole, whose note says what to change."""
    from dino_fast.engine.build import build_train_state, make_loader, open_data, resolve_device, resolve_precision
    from dino_fast.engine.schedules import Schedules
    from dino_fast.engine.train_step import train_step

    device = resolve_device(config.device)
    precision = resolve_precision(config.precision, device)
    source = open_data(replace(config, knn_every=0.0)).train
    loader = make_loader(config, source, device)
    run = build_train_state(replace(config, cuda_graph="off"), source.channels, device, precision)
    schedules = Schedules(config, loader.batches_per_epoch)
    hyperparams = replace(schedules.values_at(schedules.steps // 2), frozen=False)
    run.on_phase = watch = Stopwatch(device)
    batches, began = _endless(loader), time.monotonic()
    for step in range(1, WARM + MOST + 1):
        watch("data")
        found = train_step(run, next(batches), hyperparams, step)
        watch.end()
        if step <= WARM:
            began = time.monotonic()
        elif step >= WARM + LEAST and time.monotonic() - began > seconds:
            break
    if not found.finite:
        raise RuntimeError(f"the loss of these steps is {found['loss']}")
    return rows_of(
        watch.laps[WARM:], config, device, {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}[precision]
    )


def _endless(loader: TrainLoader) -> Iterator[Any]:
    while True:
        yield from loader


def rows_of(laps: list[dict[str, float]], config: Config, device: torch.device, dtype: str) -> list[Row]:
    """Medians over the steps, and the advice."""
    shape = (
        f"parts, {config.arch}/{config.patch_size} B{config.batch_size} V{2 + config.local_crops} K{config.out_dim} "
        f"at {config.global_size}+{config.local_size} px on {device.type}"
    )
    medians = {part: statistics.median(lap[part] for lap in laps) for part in PARTS}
    whole = statistics.median(sum(lap.values()) for lap in laps)
    rows = [
        Row("step", shape, dtype, part, ms=ms, note=f"{ms / whole:.0%} of the step") for part, ms in medians.items()
    ]
    largest = max(medians, key=lambda part: medians[part])
    note = (
        f"{1e3 * config.batch_size / whole:.0f} images/s; the largest part is {largest} "
        f"({medians[largest] / whole:.0%}): {advice(largest, config, device)}"
    )
    return [*rows, Row("step", shape, dtype, "whole step", ms=whole, note=note)]


def advice(part: str, config: Config, device: torch.device) -> str:
    """One line: which option makes this part smaller, as the configuration stands."""
    gpu = device.type == "cuda"
    if part == "data":
        return _data_advice(config, gpu)
    if part == "loss":
        if config.loss_impl != "auto":
            return f"--loss-impl auto instead of {config.loss_impl}"
        return f"fewer prototypes: --out-dim {max(1024, config.out_dim // 4)} is plenty for a small data set"
    if part == "optimizer":
        return f"a larger batch spreads it over more images: --batch-size {2 * config.batch_size}"
    if part == "backward" and config.checkpoint_activations != "none":
        return "--checkpoint-activations none, if the memory allows it, computes no block twice"
    return _network_advice(part, config, gpu)


def _data_advice(config: Config, gpu: bool) -> str:
    if not gpu:
        fewer = f"--local-crops {max(0, config.local_crops - 2)}" if config.local_crops else "a smaller --global-size"
        return f"training and cropping share the cores here; {fewer}, or images stored smaller"
    if config.augment_on == "cpu":
        return "--augment-on gpu makes the crops there"
    if config.decode_on == "cpu":
        return "--decode-on gpu for JPEGs, more --workers, or images stored smaller"
    return "more --workers, a faster disk, or images stored smaller"


def _network_advice(part: str, config: Config, gpu: bool) -> str:
    if gpu and config.precision == "fp32":
        return "--precision bf16, or --tf32 to stay with float32 weights" if not config.tf32 else "--precision bf16"
    if gpu and not config.compile:
        return "--compile fuses what lies between the matrix products"
    if part == "teacher" or not config.local_crops:
        return f"a smaller --global-size than {config.global_size}, or a larger --patch-size than {config.patch_size}"
    if config.drop_path_rate == 0:
        return "--drop-path-rate 0.1 leaves blocks out for some of the crops, or fewer --local-crops"
    return f"fewer --local-crops than {config.local_crops}, or a larger --patch-size than {config.patch_size}"


def default(quick: bool) -> Config:
    """The size of `bench_step`, on the demo's images; on a GPU a ViT-S/16 as published."""
    from dino_fast.engine.config import Config

    if torch.cuda.is_available() and not quick:
        return Config(channels=3, device="cuda")
    small = {"batch_size": 4, "out_dim": 8192, "depth": 2} if quick else {"batch_size": 16, "depth": 6}
    given: dict[str, Any] = {"arch": "vit_tiny", "patch_size": 4, "global_size": 32, "local_size": 16, **small}
    return Config(channels=3, embed_dim=192, num_heads=3, drop_path_rate=0.0, **given)
