"""One optimizer step with clipping and the teacher's EMA, and the EMA alone, over the tensors of a ViT with its head.

Bytes a parameter: AdamW reads gradient, parameter and two moments and writes three (28), the EMA reads and writes the
teacher (8; alone it also reads the parameter, 12), clipping reads the gradient once more (4). The harness's copy writes
memory that it did not read, which costs it a hidden read of every line; these in-place passes have no such reads, so
they can exceed the rate of the copy, and a share above 1 is no error. A probe that updates in place stands beside them.

Gradients are below the limit, so that clipping each and clipping all together give the same result. The original then
skips its multiplication, which favours it. AdamW's default on a CPU is the loop over parameters (not foreach).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from dino_fast.benchmarks.original import clip_gradients, ema
from dino_fast.optim import AdamWEMA, ema_update

from .harness import Comparison, Contender, Row, run_all

LIMIT, MOMENTUM, LR, WEIGHT_DECAY = 3.0, 0.996, 5e-4, 0.04

Step = Callable[[], None]
Maker = Callable[[nn.ParameterList, nn.ParameterList], Step]


def vit_with_head(width: int = 384, depth: int = 12, K: int = 65536) -> list[tuple[int, ...]]:
    """Shapes of a ViT/16's and DINOHead's parameters (the last layer's frozen gain left out)."""
    D = width
    block = [(D,), (D,), (3 * D, D), (3 * D,), (D, D), (D,), (D,), (D,), (4 * D, D), (4 * D,), (D, 4 * D), (D,)]
    head = [(2048, D), (2048,), (2048, 2048), (2048,), (256, 2048), (256,), (K, 256)]
    return [(1, 1, D), (1, 197, D), (D, 3, 16, 16), (D,), *block * depth, (D,), (D,), *head]


def modules(shapes: list[tuple[int, ...]], device: str = "cpu") -> tuple[nn.ParameterList, nn.ParameterList]:
    """Student with gradients, and another teacher; the same at every call."""
    generator = torch.Generator().manual_seed(0)

    def drawn(scale: float) -> list[Tensor]:
        return [torch.randn(s, generator=generator).mul_(scale).to(device) for s in shapes]

    student = nn.ParameterList(drawn(0.02))
    teacher = nn.ParameterList(nn.Parameter(t, requires_grad=False) for t in drawn(0.02))
    for p, grad in zip(student, drawn(1e-4), strict=True):
        p.grad = grad
    return student, teacher


def groups(params: nn.ParameterList) -> list[dict]:
    """Matrices with weight decay, vectors without, as DINO trains them."""
    matrices, vectors = [p for p in params if p.ndim > 1], [p for p in params if p.ndim <= 1]
    return [{"params": matrices}, {"params": vectors, "weight_decay": 0.0}]


def fused(student: nn.ParameterList, teacher: nn.ParameterList) -> Step:
    optimizer = AdamWEMA(groups(student), groups(teacher), LR, weight_decay=WEIGHT_DECAY, clip_grad=LIMIT)
    return lambda: optimizer.step(momentum=MOMENTUM)


def original(student: nn.ParameterList, teacher: nn.ParameterList) -> Step:
    optimizer = torch.optim.AdamW(groups(student), LR, weight_decay=WEIGHT_DECAY)

    def step() -> None:
        clip_gradients(student, LIMIT)
        optimizer.step()
        ema(teacher, student, MOMENTUM)

    return step


def multi_tensor_torch(student: nn.ParameterList, teacher: nn.ParameterList) -> Step:
    optimizer = torch.optim.AdamW(groups(student), LR, weight_decay=WEIGHT_DECAY, fused=True)
    params, teachers = list(student), list(teacher)

    def step() -> None:
        nn.utils.clip_grad_norm_(params, LIMIT, foreach=True)
        optimizer.step()
        with torch.no_grad():
            torch._foreach_lerp_(teachers, params, 1 - MOMENTUM)

    return step


def ema_fused(student: nn.ParameterList, teacher: nn.ParameterList) -> Step:
    params, teachers = list(student), list(teacher)
    return lambda: ema_update(teachers, params, MOMENTUM)


def ema_loop(student: nn.ParameterList, teacher: nn.ParameterList) -> Step:
    return lambda: ema(teacher, student, MOMENTUM)


def ema_foreach(student: nn.ParameterList, teacher: nn.ParameterList) -> Step:
    params, teachers = list(student), list(teacher)
    return torch.no_grad()(lambda: torch._foreach_lerp_(teachers, params, 1 - MOMENTUM))


def contender(name: str, make: Maker, shapes: list[tuple[int, ...]], device: str = "cpu", **options: bool) -> Contender:
    step = make(*modules(shapes, device))

    def check() -> list[Tensor]:
        student, teacher = modules(shapes, device)
        make(student, teacher)()
        return [t.detach() for t in (*student, *teacher)]

    return Contender(name, step, check=check, **options)


def in_float64(make: Maker, shapes: list[tuple[int, ...]], device: str = "cpu") -> list[Tensor]:
    student, teacher = modules(shapes, device)
    wide = nn.ParameterList(p.detach().double() for p in student)
    for p, q in zip(wide, student, strict=True):
        p.grad = q.grad.double()
    wide_teacher = nn.ParameterList(nn.Parameter(t.double(), requires_grad=False) for t in teacher)
    make(wide, wide_teacher)()
    return [t.detach() for t in (*wide, *wide_teacher)]


def comparisons(quick: bool = False) -> Iterator[Comparison]:
    shapes = vit_with_head(depth=2, K=4096) if quick else vit_with_head()
    n = sum(torch.Size(s).numel() for s in shapes)
    shape = f"{len(shapes)} tensors, {n / 1e6:.1f} M"
    flat, zero = torch.zeros(n), torch.zeros(1)
    yield Comparison(
        operation="multi_tensor step",
        shape=shape,
        dtype="float32",
        reference=lambda: in_float64(original, shapes),
        floor_bytes=40 * n,
        contenders=[
            contender("dino-fast", fused, shapes, ours=True),
            contender("original: clip loop, AdamW, EMA loop", original, shapes, baseline=True),
            contender("clip_grad_norm_(foreach), AdamW(fused), _foreach_lerp_", multi_tensor_torch, shapes),
        ],
    )
    yield Comparison(
        operation="multi_tensor ema_update",
        shape=shape,
        dtype="float32",
        reference=lambda: in_float64(ema_loop, shapes),
        floor_bytes=12 * n,
        contenders=[
            contender("dino-fast", ema_fused, shapes, ours=True),
            contender("original: EMA loop", ema_loop, shapes, baseline=True),
            contender("_foreach_lerp_", ema_foreach, shapes),
        ],
    )
    yield Comparison(
        operation="multi_tensor in-place probe",
        shape=f"{n / 1e6:.1f} M",
        dtype="float32",
        reference=lambda: [flat.double()],
        floor_bytes=8 * n,
        contenders=[Contender("torch add_ in place", lambda: flat.add_(zero))],
    )


def run(quick: bool = False, only: str = "") -> list[Row]:
    """Rows of all comparisons."""
    return run_all(comparisons(quick), quick=quick, only=only)


def test_speed(benchmark, contender):
    benchmark(contender)
