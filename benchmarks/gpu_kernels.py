"""What `benchmarks.gpu --part kernels` compares, in bf16 with B = 64, V = 10, D = 256 as the bars are set.

dino_loss          forward and backward on logits, K = 65536, in memory of its own and in place; float32 too
linear_dino_loss   the head's last layer and the loss, K = 65536 and 262144
linear_ibot_loss   3,760 patch rows, K = 131072
multi_tensor       AdamW, teacher and bf16 copies of ViT-S and ViT-L with heads, without and with the clip on both
                   sides; the teacher's average alone
packed_attention   2 x 197 + 8 x 37 tokens of 64 images, 6 and 12 heads; then one length at a time, from which the
                   table of dino_fast/ops/packed_attention/__init__.py is filled
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from dino_fast.optim import AdamWEMA

from . import bench_dino_loss, bench_linear_dino_loss, bench_multi_tensor, bench_packed_attention
from .bench_multi_tensor import LIMIT, LR, MOMENTUM, WEIGHT_DECAY, groups, vit_with_head
from .harness import Comparison, Row

SECONDS = 8.0  # of rounds for each comparison
LENGTHS = (17, 37, 65, 128, 197, 257, 785, 1370)  # tokens of a sequence
# Operations over those of the floor, which stores the logits: 8 for a student's row and 4 for a teacher's, as the bars
# count them. The kernels for 16 bits execute 8 and 10 (8 of iBOT's), which is not to their credit here.
EXECUTED = {"linear_dino_loss": (8 * 10 + 4 * 2) / (6 * 10 + 2 * 2), "linear_ibot_loss": (8 + 4) / (6 + 2)}
TOKENS = 44_160  # of a batch of one length: those of 64 images' 2 x 197 + 8 x 37


def comparisons(dry: bool = False) -> Iterator[tuple[str, Callable[[], Comparison]]]:
    """(name, what makes the comparison) of each; a dry run's are tiny and on the CPU."""
    device, half = ("cpu", torch.float32) if dry else ("cuda", torch.bfloat16)
    compiler: Callable[[Any], Any] = (lambda function: function) if dry else torch.compile
    for name, make in (
        *losses(device, half, compiler, dry),
        *optimizers(device, dry),
        *attentions(device, half, dry),
    ):
        yield name, functools.partial(_boxed, make, 0.1 if dry else SECONDS)


def _boxed(make: Callable[[], Comparison], seconds: float) -> Comparison:
    comparison = make()
    comparison.seconds = seconds
    return comparison


def with_rate(row: Row) -> Row:
    """Ours with its arithmetic rate in the note, where the bars name one."""
    if row.role == "ours" and row.floor_share and row.operation in EXECUTED:
        share = row.floor_share * EXECUTED[row.operation]
        rate = f"executes its operations at {100 * share:.0f} % of the rate of the matrix product"
        row.note = f"{row.note}; {rate}" if row.note else rate
    return row


def losses(device: str, half: torch.dtype, compiler: Callable, dry: bool) -> Iterator[tuple[str, Callable]]:
    options = {"device": device, "compiler": compiler}
    sizes = (2, 4, 300) if dry else (64, 10, 65536)
    yield "dino_loss", functools.partial(bench_dino_loss.comparison, sizes, half, **options)
    yield "dino_loss", functools.partial(bench_dino_loss.comparison, sizes, half, inplace=True, **options)
    if not dry:
        yield "dino_loss", functools.partial(bench_dino_loss.comparison, (16, 10, 65536), torch.float32, **options)
    for K in (300,) if dry else (65536, 262144):
        V, B = (4, 2) if dry else (10, 64)
        yield "linear_dino_loss", functools.partial(bench_linear_dino_loss.comparison, V, B, K, half, **options)
    rows, K = (7, 300) if dry else (3760, 131072)
    yield "linear_ibot_loss", functools.partial(bench_linear_dino_loss.ibot_comparison, rows, K, half, **options)


# --- AdamW, the teacher's average, and the bf16 copies that a bf16 network computes with ------------------------------


def _copies(tensors: nn.ParameterList) -> list[Tensor]:
    return [t.detach().to(torch.bfloat16) for t in tensors]


def ours(clip: bool, student: nn.ParameterList, teacher: nn.ParameterList) -> Callable[[], None]:
    order = [p for group in groups(student) for p in group["params"]]
    teachers = [p for group in groups(teacher) for p in group["params"]]
    optimizer = AdamWEMA(
        groups(student), groups(teacher), LR, weight_decay=WEIGHT_DECAY, clip_grad=LIMIT if clip else 0.0,
        clip_mode="global", bf16_params=_copies(order), bf16_teacher=_copies(teachers),
    )  # fmt: skip
    return lambda: optimizer.step(momentum=MOMENTUM)


def plain(clip: bool, student: nn.ParameterList, teacher: nn.ParameterList) -> Callable[[], None]:
    """torch's own multi-tensor calls: clip, fused AdamW, lerp, casts."""
    optimizer = torch.optim.AdamW(groups(student), LR, weight_decay=WEIGHT_DECAY, fused=True)
    params, teachers = list(student), list(teacher)
    copies, teacher_copies = _copies(student), _copies(teacher)

    def step() -> None:
        if clip:
            nn.utils.clip_grad_norm_(params, LIMIT, foreach=True)
        optimizer.step()
        with torch.no_grad():
            torch._foreach_lerp_(teachers, params, 1 - MOMENTUM)
            torch._foreach_copy_(copies, params)
            torch._foreach_copy_(teacher_copies, teachers)

    return step


def optimizers(device: str, dry: bool) -> Iterator[tuple[str, Callable]]:
    shapes = {"ViT-S": vit_with_head(), "ViT-L": vit_with_head(1024, 24)}
    if dry:
        shapes = {"tiny": [(3, 5), (7,), (64, 33)]}
    for name, tensors in shapes.items():
        for clip in (False, True):
            yield "multi_tensor step", functools.partial(_step, name, tensors, clip, device)
    name, tensors = next(iter(shapes.items()))
    yield "multi_tensor ema_update", functools.partial(_ema, name, tensors, device)


def _step(name: str, shapes: list[tuple[int, ...]], clip: bool, device: str) -> Comparison:
    n = sum(torch.Size(s).numel() for s in shapes)
    contender = functools.partial(bench_multi_tensor.contender, shapes=shapes, device=device)
    plain_name = "AdamW(fused), _foreach_lerp_, _foreach_copy_"
    return Comparison(
        operation="multi_tensor step",
        shape=f"{name} with head, {n / 1e6:.1f} M, bf16 copies, {'clip' if clip else 'no clip'}",
        dtype="float32",
        device=device,
        # Gradients are below the limit: clipping them changes nothing.
        reference=lambda: bench_multi_tensor.in_float64(bench_multi_tensor.original, shapes, device),
        floor_bytes=(44 if clip else 40) * n,
        contenders=[
            contender("dino-fast", functools.partial(ours, clip), ours=True),
            contender(
                f"clip_grad_norm_(foreach), {plain_name}" if clip else plain_name,
                functools.partial(plain, clip),
                baseline=True,
            ),
        ],
    )


def _ema(name: str, shapes: list[tuple[int, ...]], device: str) -> Comparison:
    n = sum(torch.Size(s).numel() for s in shapes)
    contender = functools.partial(bench_multi_tensor.contender, shapes=shapes, device=device)
    return Comparison(
        operation="multi_tensor ema_update",
        shape=f"{name} with head, {n / 1e6:.1f} M",
        dtype="float32",
        device=device,
        reference=lambda: bench_multi_tensor.in_float64(bench_multi_tensor.ema_loop, shapes, device),
        floor_bytes=12 * n,
        contenders=[
            contender("dino-fast", bench_multi_tensor.ema_fused, ours=True),
            contender("_foreach_lerp_", bench_multi_tensor.ema_foreach, baseline=True),
        ],
    )


def attentions(device: str, half: torch.dtype, dry: bool) -> Iterator[tuple[str, Callable]]:
    make = bench_packed_attention.comparison
    for heads in (2,) if dry else (6, 12):
        crops = (9, 9, 5) if dry else tuple(bench_packed_attention.CROPS)
        images = 2 if dry else 64
        yield "packed_attention", functools.partial(make, images, heads, True, half, device, crops)
    for L in (9,) if dry else LENGTHS:
        yield "packed_attention", functools.partial(make, 2 if dry else TOKENS // L, 6, True, half, device, (L,))
