"""The engine's rows on a GPU: the step against the transcription and the strongest plain PyTorch, and CIFAR-10.

Crops lie on the GPU; every call is one whole step: forward of both networks, loss, backward, clipping, AdamW, teacher,
centre. `floor_share` is the model FLOPs utilisation: useful floating-point operations (nothing that is computed again,
and of the last block what the class token needs) over time, against 989 TFLOP/s, the H100's dense bfloat16 rate.
"""

from __future__ import annotations

import functools
import json
import math
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dino_fast.benchmarks import original

from . import harness
from .harness import Row

PEAK_FLOPS = 989e12
WARM = 5  # steps before anything is measured: the fourth of ours records its graph
TEMPS = {"student_temp": 0.1, "teacher_temp": 0.04}


@dataclass(frozen=True)
class Model:
    """A backbone, its crops and its head."""

    arch: str = "vit_small"
    width: int = 384
    depth: int = 12
    heads: int = 6
    patch: int = 16
    global_size: int = 224
    local_size: int = 96
    local_crops: int = 8
    prototypes: int = 65536
    hidden: int = 2048

    def __str__(self) -> str:
        return f"{self.arch}/{self.patch} 2x{self.global_size}+{self.local_crops}x{self.local_size} K{self.prototypes}"

    def flops(self) -> float:
        """Useful floating-point operations of a step, an image."""
        C, tokens = self.width, [1 + (side // self.patch) ** 2 for side in (self.global_size, self.local_size)]

        def backbone(length: int) -> float:
            block = 24 * C * C * length + 4 * C * length * length
            last = 4 * C * C * length + 20 * C * C + 4 * C * length  # keys and values of all, the rest of one
            return (self.depth - 1) * block + last + 6 * self.patch**2 * C * length

        head = 2 * (C * self.hidden + self.hidden**2 + self.hidden * 256 + 256 * self.prototypes)
        global_flops, local_flops = (backbone(length) + head for length in tokens)
        return 3 * (2 * global_flops + self.local_crops * local_flops) + 2 * global_flops


MODELS = [Model(), Model("vit_base", 768, 12, 12), Model("vit_large", 1024, 24, 16)]
TINY = Model("vit_tiny", 32, 2, 2, 4, 16, 8, 2, 64, 16)
Step = Callable[[], Any]


def crops(model: Model, batch: int, device: str) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    global_crops = torch.randn(2, batch, 3, model.global_size, model.global_size, generator=generator)
    local_crops = torch.randn(model.local_crops, batch, 3, model.local_size, model.local_size, generator=generator)
    return global_crops.to(device), local_crops.to(device)


def our_step(model: Model, batch: int, device: str, **given: Any) -> Step:
    """The engine's `train_step` in bf16. By default it is replayed from a CUDA graph, recorded in its fourth call, and
    nothing waits for its loss, as in a run."""
    from dino_fast.engine.build import build_train_state
    from dino_fast.engine.config import Config
    from dino_fast.engine.schedules import StepHyperparams
    from dino_fast.engine.train_step import train_step
    from dino_fast.optim import AdamWEMA

    config = Config(
        global_size=model.global_size, local_size=model.local_size, local_crops=model.local_crops, arch=model.arch,
        patch_size=model.patch, embed_dim=model.width, depth=model.depth, num_heads=model.heads,
        out_dim=model.prototypes, head_hidden_dim=model.hidden, batch_size=batch, **{"drop_path_rate": 0.0, **given},
    )  # fmt: skip
    run = build_train_state(config, 3, torch.device(device), "bf16")
    weights = _plain(model, original.ViT).state_dict()
    run.student.load_state_dict(weights)
    run.teacher.load_state_dict(weights)
    if isinstance(run.optimizer, AdamWEMA):
        run.optimizer.refresh_copies()
    hyperparams = StepHyperparams(lr=1e-4, weight_decay=0.04, momentum=0.996, teacher_temp=0.04, frozen=False)

    @dataclass
    class Batch:
        global_crops: Tensor
        local_crops: Tensor

    inputs = Batch(*crops(model, batch, device))

    def step() -> Any:
        return train_step(run, inputs, hyperparams, 1)

    step.graph = run.graph  # type: ignore[attr-defined]
    return step


def published_step(model: Model, batch: int, device: str) -> Step:
    """The transcription under float16 autocast with a loss scaler, as the original runs it."""
    student, teacher = (_plain(model, original.ViT).to(device) for _ in range(2))
    loss_of = original.DINOLoss(model.prototypes, 2 + model.local_crops, 0.04, 0.04, 0, 1).to(device)
    run = original.Trainer(student, teacher, loss_of, [1e-4], [0.04], [0.996])
    scaler = torch.amp.GradScaler(device)
    views = [*(x for part in crops(model, batch, device) for x in part)]

    def step() -> float:
        with torch.autocast(device, torch.float16):
            with torch.no_grad():
                targets = teacher(views[:2])
            loss = loss_of(student(views), targets, 0)
        run.optimizer.zero_grad()
        scaler.scale(loss).backward()
        scaler.unscale_(run.optimizer)
        original.clip_gradients(student, 3.0)
        scaler.step(run.optimizer)
        scaler.update()
        original.ema(teacher, student, 0.996)
        return float(loss)

    return step


class SdpaAttention(nn.Module):
    """The transcription's attention through PyTorch's fused one."""

    def __init__(self, plain: nn.Module) -> None:
        super().__init__()
        self.qkv, self.proj, self.num_heads = plain.qkv, plain.proj, plain.num_heads

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(2, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


def strongest_step(model: Model, batch: int, device: str, compiled: bool = True) -> Step:
    """What one can write with PyTorch alone: bf16, its fused attention and AdamW, foreach, all else compiled."""
    student, teacher = (_plain(model, original.ViT).to(device) for _ in range(2))
    teacher.load_state_dict(student.state_dict())
    teacher.requires_grad_(False)
    for network in (student, teacher):
        for block in network.backbone.blocks:
            block.attn = SdpaAttention(block.attn)
    einsum_loss: Callable[..., Tensor] = original.einsum_dino_loss
    forwards: list[Callable[..., Tensor]] = [student, teacher]
    if compiled:
        forwards, einsum_loss = [torch.compile(f) for f in forwards], torch.compile(einsum_loss)
    groups = original.get_params_groups(student)
    optimizer = torch.optim.AdamW(groups, lr=1e-4, weight_decay=0.04, fused=True)
    params = [p for p in student.parameters() if p.requires_grad]
    pairs = list(zip(teacher.parameters(), student.parameters(), strict=True))
    center = torch.zeros(model.prototypes, device=device)
    views = [*(x for part in crops(model, batch, device) for x in part)]

    def step() -> Tensor:
        with torch.autocast(device, torch.bfloat16):
            with torch.no_grad():
                targets = forwards[1](views[:2]).unflatten(0, (2, -1))
            logits = forwards[0](views).unflatten(0, (len(views), -1))
        loss = einsum_loss(logits.float(), targets.float(), center, **TEMPS)
        loss.backward()
        grads = [p.grad for p in params if p.grad is not None]
        norms = torch._foreach_norm(grads)
        torch._foreach_mul_(grads, [(3.0 / (norm + 1e-6)).clamp(max=1.0) for norm in norms])
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            torch._foreach_lerp_([t for t, _ in pairs], [s.detach() for _, s in pairs], 0.004)
            center.lerp_(targets.float().mean(dim=(0, 1)), 0.1)
        return loss.detach()

    return step


def _plain(model: Model, backbone: Callable[..., Any]) -> Any:
    """The transcription's network, with the weights that ours starts with."""
    torch.manual_seed(0)
    sizes = (model.global_size, model.patch, 3, model.width, model.depth, model.heads)
    head = original.DINOHead(model.width, model.prototypes, hidden_dim=model.hidden)
    return original.MultiCropWrapper(backbone(*sizes), head)


# ---- measuring ----


def _wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def _peak(device: str) -> int | None:
    return torch.cuda.max_memory_allocated() if device == "cuda" else None


def timed(steps: dict[str, Step], device: str, rounds: int) -> dict[str, list[float]]:
    """Milliseconds of each contender's step, in turns; they are warm."""
    times: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(rounds):
        for name, step in steps.items():
            _wait(device)
            began = time.perf_counter()
            step()
            _wait(device)
            times[name].append(1e3 * (time.perf_counter() - began))
    return times


def largest_batch(make: Callable[[int], Step], start: int, limit: int = 1 << 14) -> int:
    """The largest multiple of `start` for which some steps fit, found by doubling and halving."""

    def fits(batch: int) -> bool:
        try:
            step = make(batch)
            for _ in range(WARM):
                step()
            return True
        except torch.OutOfMemoryError:
            return False
        finally:
            step = None  # type: ignore[assignment]
            torch.cuda.empty_cache()

    good = 0
    while good < limit and fits(2 * good or start):
        good = 2 * good or start
    stride = good // 2
    while good and stride >= start:
        if fits(good + stride):
            good += stride
        stride //= 2
    return good


def comparison(
    model: Model, batch: int, device: str, rounds: int, *, compiled: bool, contenders: str = "all"
) -> list[Row]:
    """Rows of one model and batch: ours and the two baselines; with `compiled`, ours beside what torch.compile makes of
    both."""
    makers: dict[str, Callable[[], Step]] = {"dino-fast": lambda: our_step(model, batch, device)}
    if compiled:
        makers["dino-fast, compiled"] = lambda: our_step(model, batch, device, compile=True)
        if contenders == "all":
            makers["strongest plain PyTorch, compiled"] = lambda: strongest_step(model, batch, device)
    else:
        if device == "cuda":
            makers["dino-fast, no CUDA graph"] = lambda: our_step(model, batch, device, cuda_graph="off")
        makers["dino-fast, stochastic depth 0.1"] = lambda: our_step(model, batch, device, drop_path_rate=0.1)
        makers["dino-fast, selective checkpoints"] = lambda: our_step(
            model, batch, device, checkpoint_activations="selective"
        )
    if contenders == "all" and not compiled:
        makers["strongest plain PyTorch"] = lambda: strongest_step(model, batch, device, compiled=False)
        if device == "cuda":  # float16 autocast with a scaler
            makers["published, fp16 autocast"] = lambda: published_step(model, batch, device)
    # A graph keeps its memory: of a model that is not compared with others, one contender at a time is there.
    groups = [makers] if contenders == "all" else [{name: make} for name, make in makers.items()]
    rows = {name: Row("engine", f"{model} B{batch}", "bfloat16", name) for name in makers}
    times: dict[str, list[float]] = {}
    for group in groups:
        times |= measured(group, rows, device, rounds)
    for name, values in times.items():
        row = rows[name]
        row.ms = statistics.median(values)
        row.note = f"{1e3 * batch / row.ms:.1f} images/s{row.note}"
        row.floor_share = batch * model.flops() / (row.ms * 1e-3) / PEAK_FLOPS
        row.role = "ours" if name == "dino-fast" else "baseline" if "published" in name else ""
        if "dino-fast" in times:
            pairs = zip(values, times["dino-fast"], strict=True)
            row.ratio = statistics.median(theirs / mine for theirs, mine in pairs)
    return list(rows.values())


def measured(
    makers: dict[str, Callable[[], Step]], rows: dict[str, Row], device: str, rounds: int
) -> dict[str, list[float]]:
    """Times of contenders that take turns; what goes wrong with one, and its memory, is noted in its row."""
    steps: dict[str, Step] = {}
    for name, make in makers.items():
        before = torch.cuda.memory_allocated() if device == "cuda" else 0
        try:
            steps[name] = make()
            if device == "cuda":
                torch.cuda.reset_peak_memory_stats()
            for _ in range(WARM):
                steps[name]()
            peak, graph = _peak(device), getattr(steps[name], "graph", None)
            rows[name].peak_bytes = None if peak is None else peak - before
            rows[name].note = f"; no CUDA graph: {graph.failed}" if graph is not None and graph.failed else ""
        except Exception as error:  # a compiler's are of any kind; one contender must not cost the others
            steps.pop(name, None)
            rows[name].note = f"failed: {type(error).__name__}: {(str(error).splitlines() or [''])[0][:200]}"
    times = timed(steps, device, rounds)
    steps.clear()
    if device == "cuda":
        torch.cuda.empty_cache()
    return times


def rows(*, quick: bool = False, device: str = "cuda", end: float = math.inf) -> Iterator[Row]:
    """The step of ViT-S, B and L and the largest batches of ViT-S; what compiles for minutes comes last. What `end` (of
    time.monotonic) does not reach, and what fails, is a row that says so."""
    for name, make in plan(quick, device):
        if time.monotonic() > end:
            yield Row("engine", name, "bfloat16", "dino-fast", note=harness.NOT_REACHED, role="ours")
            continue
        try:
            yield from make()
        except Exception as error:
            note = f"failed: {type(error).__name__}: {(str(error).splitlines() or [''])[0][:200]}"
            yield Row("engine", name, "bfloat16", "dino-fast", note=note, role="ours")
        if device == "cuda":
            torch.cuda.empty_cache()


def plan(quick: bool, device: str) -> Iterator[tuple[str, Callable[[], Iterable[Row]]]]:
    """The shape, and what measures it, of each comparison in turn."""
    if quick:
        yield str(TINY), lambda: comparison(TINY, 4, device, 2, compiled=False)
        return
    small = MODELS[0]
    yield f"{small} B64", lambda: comparison(small, 64, device, 20, compiled=False)
    for model in MODELS[1:]:
        yield f"{model} B64", functools.partial(comparison, model, 64, device, 10, compiled=False, contenders="ours")
    for name, make in {
        "dino-fast": lambda batch: our_step(small, batch, device),
        "dino-fast, selective checkpoints": lambda batch: our_step(
            small, batch, device, checkpoint_activations="selective"
        ),
        "published, fp16 autocast": lambda batch: published_step(small, batch, device),
    }.items():
        yield f"{small}, largest batch", functools.partial(largest_batch_rows, small, name, make, device)
    for model in MODELS:
        contenders = "all" if model is small else "ours"
        yield (
            f"{model} B64, compiled",
            functools.partial(comparison, model, 64, device, 10, compiled=True, contenders=contenders),
        )


def largest_batch_rows(model: Model, name: str, make: Callable[[int], Step], device: str) -> Iterator[Row]:
    """The largest batch of one contender, and the time of a step of it where it is ours."""
    batch = largest_batch(make, 64)
    yield Row("engine, largest batch", str(model), "bfloat16", name, note=f"{batch} images")
    if batch and name == "dino-fast":
        yield from comparison(model, batch, device, 5, compiled=False, contenders="ours")


# ---- CIFAR-10 ----

CIFAR = {
    "arch": "vit_tiny", "patch_size": 4, "global_size": 32, "local_size": 16, "local_crops": 8,
    "local_scale": (0.15, 0.4), "blur_p": (0.0, 0.0, 0.0), "mean": (0.4914, 0.4822, 0.4465),
    "std": (0.2470, 0.2435, 0.2616), "out_dim": 16384, "batch_size": 512, "lr": 0.0005, "drop_path_rate": 0.0,
    "freeze_last_layer": 1.0, "knn_images": 50_000, "teacher_temp": 0.05,
}  # fmt: skip
PROBE_STEPS = 60


def accuracy_rows(
    *, quick: bool = False, device: str = "cuda", seconds: float = 420.0, end: float = math.inf
) -> Iterator[Row]:
    """k-NN (k = 20, T = 0.07, the whole training set as bank) of the teacher over a run that takes `seconds`, or what
    is left until `end` (of time.monotonic).

    A short run measures the speed; the schedules are then laid over as many epochs as fit. `quick` trains a tiny model
    for two epochs on the demo.
    """
    from dino_fast.engine import train
    from dino_fast.engine.config import build_config
    from dino_fast.engine.run_dir import read_metrics

    from .bench_engine import cifar

    given: dict[str, Any] = {**CIFAR, "data": str(cifar() or ""), "device": device}
    shape = "ViT-Ti/4 at 32+16 px, CIFAR-10"
    if quick:
        given = {"data": "demo", "device": device, "knn_images": 200, "epochs": 1, "max_steps": 4, "knn_every": 1.0}
        shape = "demo"
    elif not given["data"]:
        note = "absent: no cifar10-train.parquet (DINO_FAST_TEST_DATA names the folder)"
        yield Row("cifar", shape, "bfloat16", "dino-fast", note=note)
        return
    with tempfile.TemporaryDirectory() as folder:
        if not quick:
            probe = {**given, "max_steps": PROBE_STEPS, "knn_every": 0.0, "out": f"{folder}/probe"}
            rates = [row["images_per_second"] for row in read_metrics(train(build_config(probe)))]
            rate = statistics.median(rates[PROBE_STEPS // 2 :])
            yield Row("cifar, speed", shape, "bfloat16", "dino-fast", note=f"{rate:,.0f} images/s")
            seconds = min(seconds, end - time.monotonic())
            epochs = max(4, int(seconds * rate / 50_000 * 0.93))
            given |= {"epochs": epochs, "warmup_epochs": max(1.0, epochs / 12), "knn_every": max(1.0, epochs // 10)}
        began = time.perf_counter()
        path: Path = train(build_config({**given, "out": f"{folder}/run"}))
        whole = time.perf_counter() - began
        curve = [(row["step"], row["knn"]) for row in read_metrics(path) if "knn" in row]
    note = json.dumps({"knn": curve[-1][1], "curve": curve, "epochs": given["epochs"]})
    yield Row("cifar", shape, "bfloat16", "dino-fast", ms=1e3 * whole, note=note, role="ours")
