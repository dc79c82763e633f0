"""What a run costs: parameters, floating-point operations of an image, memory, bytes on the wire.

Only what must be computed counts. For a vision transformer of width C on n tokens, a product of [a, b] and [b, c] being
2 a b c operations:

    block         24 n C^2 + 4 n^2 C        (queries, keys, values 6, output 2, MLP 16; attention)
    last block    4 n C^2 + 20 C^2 + 4 n C  (keys and values of all tokens; the rest of the class token alone)
    patches       2 (n - 1) p^2 channels C
    head          2 (C h + (layers - 2) h^2 + h D) a row; prototypes 2 K D a row; a predictor 4 D h a row

The student's pass costs three times the forward one (twice for the patches, whose pixels want no gradient), the
teacher's once, for the two global crops. Branches that stochastic depth drops need not be computed. Nothing that is
computed again for want of memory counts.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from dino_fast.backends import native_unavailable_reason
from dino_fast.engine.build import (
    build_configured_backbone,
    build_model,
    build_train_state,
    make_loader,
    open_data,
    resolve_device,
    resolve_precision,
)
from dino_fast.engine.config import Config, validate
from dino_fast.engine.distributed import read_environment
from dino_fast.engine.progress import clock
from dino_fast.engine.schedules import Schedules
from dino_fast.engine.train_step import Crops, train_step
from dino_fast.errors import UserError

MLP_RATIO = 4
# Floating-point operations that the trial steps may take: some seconds of two CPU cores at 50 GFLOP/s.
CPU_BUDGET = 1e12
# Dense tensor-core products with float32 accumulation, FLOP/s as the makers publish them, by part of the device's name.
PEAKS_16_BIT = {
    "B200": 2250e12, "H200": 989e12, "H100 PCIe": 756e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12, "L4": 121e12,
    "A10G": 70e12, "RTX 4090": 165e12, "RTX 3090": 71e12, "V100": 125e12, "T4": 65e12,
}  # fmt: skip


@dataclass(frozen=True)
class Sizes:
    """A run's shapes."""

    width: int
    depth: int
    patch: int
    channels: int
    global_tokens: int
    local_tokens: int
    crops: int

    @property
    def tokens(self) -> int:
        """Tokens of an image, over all crops of student and teacher."""
        return self.student_tokens + 2 * self.global_tokens

    @property
    def student_tokens(self) -> int:
        """Tokens of an image, over all crops of the student."""
        return 2 * self.global_tokens + (self.crops - 2) * self.local_tokens


def sizes_of(config: Config, channels: int) -> Sizes | None:
    """None for a backbone that is not one of ours."""
    from dino_fast.models import ARCHITECTURES

    if config.arch not in ARCHITECTURES:
        return None
    width, depth, _ = ARCHITECTURES[config.arch]
    large, small = (1 + (side // config.patch_size) ** 2 for side in (config.global_size, config.local_size))
    width, depth = config.embed_dim or width, config.depth or depth
    return Sizes(width, depth, config.patch_size, channels, large, small, 2 + config.local_crops)


def flops_per_image(config: Config, channels: int) -> float | None:
    """Floating-point operations that a training step needs for each of its images; None where they cannot be told."""
    sizes = sizes_of(config, channels)
    V, K, D, h = 2 + config.local_crops, config.out_dim, config.head_bottleneck_dim, config.head_hidden_dim
    counted = _counted(config, channels) if sizes is None else (*_vision_transformer(config, sizes), sizes.width)
    if counted is None:
        return None
    student, teacher, width = counted
    layers = config.head_layers
    head = 2.0 * (width * D if layers == 1 else width * h + (layers - 2) * h * h + h * D)
    predictor = 4.0 * D * h if config.predictor == "mlp" else 0.0
    return student + teacher + (3 * V + 2) * (head + 2.0 * K * D) + 3 * V * predictor


def _vision_transformer(config: Config, sizes: Sizes) -> tuple[float, float]:
    """(student's forward and backward, teacher's forward)."""
    rates = [config.drop_path_rate * i / max(1, sizes.depth - 1) for i in range(sizes.depth)]
    student = 2 * forward_flops(sizes, sizes.global_tokens, rates)
    if config.local_crops:
        student += config.local_crops * forward_flops(sizes, sizes.local_tokens, rates)
    crops = [sizes.global_tokens] * 2 + [sizes.local_tokens] * config.local_crops
    patches = sum(2.0 * (n - 1) * sizes.patch**2 * sizes.channels * sizes.width for n in crops)
    return 3 * student - patches, 2 * forward_flops(sizes, sizes.global_tokens, [0.0] * sizes.depth)


def forward_flops(sizes: Sizes, tokens: int, rates: list[float]) -> float:
    """Of the backbone, for one crop."""
    C, n = sizes.width, tokens
    per_token = (8 + 4 * MLP_RATIO) * C * C  # queries, keys, values and output 4 C^2, the MLP 2 ratio C^2, twice each
    block = n * per_token + 4.0 * n * n * C
    last = n * 4.0 * C * C + (per_token - 4 * C * C) + 4.0 * n * C
    blocks = [block] * (len(rates) - 1) + [last]
    kept = sum(cost * (1 - rate) for cost, rate in zip(blocks, rates, strict=True))
    return kept + 2.0 * (n - 1) * sizes.patch**2 * sizes.channels * C


def _counted(config: Config, channels: int) -> tuple[float, float, int] | None:
    """FLOPs of any other backbone (forward and backward, forward alone), as PyTorch counts them on meta tensors.

    The third number is its width. None for a backbone that cannot run on meta tensors.
    """
    from torch.utils.flop_counter import FlopCounterMode

    with torch.device("meta"):
        backbone = build_configured_backbone(config, channels, 0.0).eval()
    found = []
    for side in (config.global_size, config.local_size):
        try:
            with FlopCounterMode(display=False) as counter, torch.no_grad():
                backbone(torch.empty(1, channels, side, side, dtype=torch.float32, device="meta"))
        except (RuntimeError, NotImplementedError):
            return None
        found.append(float(counter.get_total_flops()))
    return 3 * (2 * found[0] + config.local_crops * found[1]), 2 * found[0], backbone.embed_dim


def parameters(config: Config, channels: int) -> tuple[int, int]:
    """(of the backbone, of the head) of one network."""
    with torch.device("meta"):
        model = build_model(config, channels, 0.0)
    return sum(p.numel() for p in model.backbone.parameters()), sum(p.numel() for p in model.head.parameters())


def memory_parts(config: Config, channels: int, precision: str, world: int, device: str) -> dict[str, float]:
    """Bytes in each process, estimated: weights and moments exactly, what the backward pass keeps roughly.

    A block keeps 16 C numbers a token (the inputs of both norms and of four products, queries, keys and values, and
    the MLP's hidden layer twice), 10 C under selective checkpointing, 6 C in float32 on a CPU, where norms and the MLP
    are always made again, 1 C under full; the kernels' own buffers and what the allocator cannot use again are not in
    it.
    """
    wide = 4 if precision == "fp32" else 2
    count = sum(parameters(config, channels))
    cut = 1 if config.fsdp == "none" else world
    images = config.batch_size / world / config.grad_accum_steps
    copies = precision == "bf16" and world == 1  # of both networks' weights, and gradients in bfloat16
    pixels = 2 * config.global_size**2 + config.local_crops * config.local_size**2
    parts = {
        "weights of student and teacher, gradients, moments": (22.0 if copies else 20.0) * count / cut,
        "crops": 4.0 * channels * pixels * config.batch_size / world,
    }
    sizes = sizes_of(config, channels)
    kept = {"none": 16.0, "selective": 10.0, "full": 1.0}[config.checkpoint_activations]
    if device == "cpu" and precision == "fp32":
        kept = min(kept, 6.0)
    if config.loss_impl == "logits":
        parts["logits"] = images * (4 + config.local_crops) * config.out_dim * wide
    if sizes is not None:
        parts["what the blocks keep for the backward pass"] = (
            images * sizes.student_tokens * sizes.depth * kept * sizes.width * wide
        )
    return parts


def wire_bytes(config: Config, channels: int, world: int) -> float:
    """Bytes that a process sends in a step; see docs/scaling.md for the formulas."""
    if world == 1:
        return 0.0
    backbone, head = parameters(config, channels)
    prototypes = config.out_dim * (config.head_bottleneck_dim + 1)
    rest, share = backbone + head - prototypes, (world - 1) / world
    V, D, images = 2 + config.local_crops, config.head_bottleneck_dim, config.batch_size / world
    wide = 4 if config.precision in ("auto", "fp32") else 2
    if config.fsdp == "none":
        return 2 * share * 4.0 * (backbone + head)
    gathers = 2 if config.fsdp == "grads" else 3  # student and teacher, and the student again
    rows = (world - 1) * images * D * ((V + 2) * wide + V * 4.0)
    return share * (gathers * wide + 4.0) * rest + rows


def peak_flops(device: torch.device, precision: str) -> float | None:
    """Of the device's matrix units in 16 bit; None where it is not known, or the run is in float32."""
    if precision == "fp32" or device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for part, peak in PEAKS_16_BIT.items() if all(word in name for word in part.split())), None)


# ---- `dino-fast train --dry-run` ----


def dry_run_report(config: Config, environment: dict[str, str]) -> str:
    """Parameter counts, memory, operations of an image, steps, and the expected time, as text.

    Raises UserError for whatever the run itself would refuse.
    """
    validate(config)
    device = resolve_device(config.device)
    precision = resolve_precision(config.precision, device)
    world = read_environment(environment)[1]
    if config.keep_freed_memory and native_unavailable_reason() is None:  # as in the run: it is timed below
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
    rows += [("note", note) for note in (*schedules.notes(), data.note) if note]
    return "\n".join(f"{name:<12} {text}" for name, text in rows)


def expected_time(
    config: Config, channels: int, device: torch.device, precision: str, flops: float | None, steps: int, world: int
) -> str:
    """From trial steps on noise here, a straight line through two numbers of images."""
    images = config.batch_size // world
    largest = images
    if device.type == "cpu" and flops is not None:
        largest = min(images, int(CPU_BUDGET / (4.5 * flops)))  # three steps of it and three of half of it
    tried = [largest // 2, largest] if largest >= 4 and flops is not None else [1]
    seconds = [trial(config, channels, device, precision, n) for n in tried]
    step = seconds[-1] / tried[-1] * images
    if len(tried) == 2:
        slope = max((seconds[1] - seconds[0]) / (tried[1] - tried[0]), seconds[1] / tried[1] / 10)
        step = seconds[1] + slope * (images - tried[1])
    rate = images * (flops or 0.0) / step
    peak = peak_flops(device, precision)
    share = f", {rate / peak:.0%} of the matrix units' peak" if peak else ""
    left_out = "data loading, evaluation, checkpoints" + (" and the network" if world > 1 else "")
    sizes = f"{tried[0]} and {tried[1]} images" if len(tried) == 2 else "1 image"
    return (
        f"{clock(step * steps)} for {steps:,} steps of {step * 1e3:.0f} ms ({config.batch_size / step:.0f} images/s, "
        f"{rate / 1e12:.3g} TFLOP/s{share}), from trial steps of {sizes} "
        f"on this {device.type}; without {left_out}"
    )


@dataclass
class _Noise:
    """Crops of no image."""

    global_crops: Tensor
    local_crops: Tensor


def trial(config: Config, channels: int, device: torch.device, precision: str, images: int) -> float:
    """Seconds of a step on `images` images, the least of two after one to warm up."""
    small = replace(config, batch_size=images, grad_accum_steps=1, fsdp="none", cuda_graph="off")
    state = build_train_state(small, channels, device, precision)
    large, local = config.global_size, config.local_size
    crops: Crops = _Noise(
        torch.randn(2, images, channels, large, large, dtype=torch.float32, device="cpu"),
        torch.randn(config.local_crops, images, channels, local, local, dtype=torch.float32, device="cpu"),
    )
    schedules = Schedules(small, 10)
    hyperparams = replace(schedules.values_at(schedules.steps - 1), frozen=False)
    best = float("inf")
    for step in range(3):
        began = time.perf_counter()
        train_step(state, crops, hyperparams, step)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        if step:
            best = min(best, time.perf_counter() - began)
    return best
