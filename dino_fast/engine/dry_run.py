"""`dino-fast train --dry-run`: what a run will cost, before it begins. Nothing is written."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from dino_fast.backends import native_missing
from dino_fast.engine.build import choose_device, choose_precision, make_loader, open_data
from dino_fast.engine.config import Config, validate
from dino_fast.engine.distributed import place
from dino_fast.engine.estimate import flops_per_image, memory_parts, parameters, peak_flops, sizes_of, wire_bytes
from dino_fast.engine.monitor import clock
from dino_fast.engine.schedules import Schedules
from dino_fast.engine.train_step import Crops, build_learner, train_step
from dino_fast.errors import UserError

# Floating-point operations that the trial steps may take: some seconds of two CPU cores at 50 GFLOP/s.
CPU_BUDGET = 1e12


def report(config: Config, environment: dict[str, str]) -> str:
    """Parameter counts, memory, operations of an image, steps, and the expected time, as text.

    Raises UserError for whatever the run itself would refuse.
    """
    validate(config)
    device = choose_device(config.device)
    precision = choose_precision(config.precision, device)
    world = place(environment)[1]
    if config.keep_freed_memory and native_missing() is None:  # as in the run: it is timed below
        from dino_fast import _C

        _C.keep_freed_memory()
    data = open_data(config)
    loader = make_loader(config, data.train, device)
    if config.batch_size % world:
        raise UserError(f"--batch-size {config.batch_size} does not divide among {world} processes")
    channels = data.train.channels
    schedules = Schedules(config, loader.batches_per_epoch)
    steps = min(schedules.steps, config.max_steps or schedules.steps)
    backbone, head = parameters(config, channels)
    flops = flops_per_image(config, channels)
    sizes = sizes_of(config, channels)
    prototypes = config.out_dim * config.head_bottleneck_dim
    tokens = f"{sizes.tokens:,} tokens (student {sizes.student_tokens:,})" if sizes else ""
    work = f"{flops / 1e9:.3g} GFLOP" if flops else "operations unknown"
    rows = [
        ("backbone", f"{config.arch}/{config.patch_size}, {backbone / 1e6:.2f} M parameters"),
        ("head", f"{head / 1e6:.2f} M parameters, of which prototypes {prototypes / 1e6:.2f} M"),
        ("data", f"{len(data.train):,} images of {config.data}, {loader.batches_per_epoch:,} steps an epoch"),
        ("steps", f"{steps:,} of {config.batch_size} images" + (f", in {world} processes" if world > 1 else "")),
        ("an image", ", ".join(filter(None, (work, tokens)))),
        ("the run", f"{(flops or 0) * steps * config.batch_size:.3g} FLOP"),
    ]
    parts = memory_parts(config, channels, precision, world, device.type)
    rows.append(("memory", f"{sum(parts.values()) / 1e9:.2f} GB in each process, estimated:"))
    rows += [("", f"  {size / 1e9:.2f} GB {name}") for name, size in parts.items()]
    if world > 1:
        rows.append(
            ("on the wire", f"{wire_bytes(config, channels, world) / 1e6:.1f} MB sent by each process in a step")
        )
    rows.append(("time", expected_time(config, channels, device, precision, flops, steps, world)))
    rows += [("note", note) for note in (*schedules.notes(), data.why) if note]
    return "\n".join(f"{name:<12} {text}" for name, text in rows)


def expected_time(
    config: Config, channels: int, device: torch.device, precision: str, flops: float | None, steps: int, world: int
) -> str:
    """From trial steps on noise here, a straight line through two numbers of images."""
    images = config.batch_size // world
    largest = images
    if device.type == "cpu" and flops is not None:
        largest = min(images, int(CPU_BUDGET / (4.5 * flops)))  # three steps of it and three of half of it
    tried = [largest // 2, largest]
    if largest < 4 or flops is None:
        return "not tried here: a trial step would take long itself"
    seconds = [trial(config, channels, device, precision, n) for n in tried]
    slope = max((seconds[1] - seconds[0]) / (tried[1] - tried[0]), seconds[1] / tried[1] / 10)
    step = seconds[1] + slope * (images - tried[1])
    rate = images * flops / step
    peak = peak_flops(device, precision)
    share = f", {rate / peak:.0%} of the matrix units' peak" if peak else ""
    left_out = "data loading, evaluation, checkpoints" + (" and the network" if world > 1 else "")
    return (
        f"{clock(step * steps)} for {steps:,} steps of {step * 1e3:.0f} ms ({config.batch_size / step:.0f} images/s, "
        f"{rate / 1e12:.3g} TFLOP/s{share}), from trial steps of {tried[0]} and {tried[1]} images on this "
        f"{device.type}; without {left_out}"
    )


@dataclass
class Noise:
    """Crops of no image."""

    global_crops: Tensor
    local_crops: Tensor


def trial(config: Config, channels: int, device: torch.device, precision: str, images: int) -> float:
    """Seconds of a step on `images` images, the least of two after one to warm up."""
    small = replace(config, batch_size=images, accumulate=1, shard="none", cuda_graph="off")
    learner = build_learner(small, channels, device, precision)
    large, local = config.global_size, config.local_size
    crops: Crops = Noise(
        torch.randn(2, images, channels, large, large, dtype=torch.float32, device="cpu"),
        torch.randn(config.local_crops, images, channels, local, local, dtype=torch.float32, device="cpu"),
    )
    schedules = Schedules(small, 10)
    rates = replace(schedules.at(schedules.steps - 1), frozen=False)
    best = float("inf")
    for step in range(3):
        began = time.perf_counter()
        train_step(learner, crops, rates, step)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        if step:
            best = min(best, time.perf_counter() - began)
    return best
