"""`dino_loss`, forward and backward on logits, beside the loss as the original writes it and the einsum of later codes.

Before each call the student's logits are written anew, as the head's product does in a training step. The first shape
is measured twice: with a gradient in memory of its own, as a drop-in must, and with it in place of the logits, as the
engine's step does; the others cannot do that.

Floor: reading the logits once and writing the student's gradient once, (2V + 2) e B K bytes for e bytes a logit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from dino_fast.benchmarks.original.loss import DINOLoss as OriginalLoss
from dino_fast.benchmarks.original.loss import einsum_dino_loss
from dino_fast.loss import dino_loss
from dino_fast.ops.dino_loss import dino_loss_reference

from .harness import Comparison, Contender, Row, peer, run_all

TEMPS = {"student_temp": 0.1, "teacher_temp": 0.04}
# (B, V, K), dtype. The first is the shape that the bars are set for; the others: no local crops, half precision, wide.
CASES = (
    ((16, 10, 65536), torch.float32),
    ((16, 10, 65536), torch.bfloat16),
    ((32, 10, 4096), torch.float32),
    ((32, 2, 65536), torch.float32),
)
QUICK = (((4, 10, 4096), torch.float32),)


def comparisons(quick: bool = False) -> Iterator[Comparison]:
    cases = QUICK if quick else CASES
    yield comparison(*cases[0], inplace=True)
    for case in cases:
        yield comparison(*case)


def comparison(
    sizes: tuple[int, int, int],
    dtype: torch.dtype,
    inplace: bool = False,
    device: str = "cpu",
    compiler: Callable = torch.compile,
) -> Comparison:
    """Contenders at B, V, K; `compiler` makes those that are compiled."""
    B, V, K = sizes
    generator = torch.Generator().manual_seed(0)
    # cosines of a trained head spread over a few tenths
    student = (0.3 * torch.randn(V, B, K, generator=generator)).to(device, dtype).requires_grad_()
    teacher = (0.3 * torch.randn(2, B, K, generator=generator)).to(device, dtype)
    center = (0.05 * torch.randn(K, generator=generator)).to(device)
    drawn = student.detach().clone()

    def write_logits() -> None:
        student.data.copy_(drawn)

    def forward_backward(loss: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Callable[[], tuple[Tensor, Tensor]]:
        def call() -> tuple[Tensor, Tensor]:
            value = loss(student, teacher, center)
            return value, torch.autograd.grad(value, student)[0]

        return call

    module = OriginalLoss(K, V, 0.04, 0.04, 0, 1).to(device)

    def original(s: Tensor, t: Tensor, c: Tensor) -> Tensor:
        module.center = c[None]
        return module(s.flatten(0, 1), t.flatten(0, 1), 0)

    def einsum(s: Tensor, t: Tensor, c: Tensor) -> Tensor:
        return einsum_dino_loss(s.float(), t.float(), c, **TEMPS)

    def ours(s: Tensor, t: Tensor, c: Tensor) -> Tensor:
        return dino_loss(s, t, c, inplace=inplace, **TEMPS)

    def contender(name: str, loss: Callable[[Tensor, Tensor, Tensor], Tensor], **options: bool) -> Contender:
        return Contender(name, forward_backward(loss), prepare=write_logits, **options)

    def make_lightly(lightly: Any) -> Callable[[], tuple[Tensor, Tensor]]:
        peer_loss = lightly.DINOLoss(output_dim=K, warmup_teacher_temp=0.04, teacher_temp=0.04).to(device)

        def lightly_loss(s: Tensor, t: Tensor, c: Tensor) -> Tensor:
            getattr(peer_loss.center, "value", peer_loss.center).data = c.view(1, 1, K)
            return peer_loss(list(t.unbind(0)), list(s.unbind(0)), epoch=0)

        return forward_backward(lightly_loss)

    def exact() -> tuple[Tensor, Tensor]:
        leaf = student.detach().double().requires_grad_()
        value = dino_loss_reference(leaf, teacher.double(), center.double(), **TEMPS).loss
        return value.detach(), torch.autograd.grad(value, leaf)[0]

    return Comparison(
        operation="dino_loss",
        shape=f"B{B} V{V} K{K}" + ", in place" * inplace,
        dtype=str(dtype).removeprefix("torch."),
        device=device,
        reference=exact,
        floor_bytes=(2 * V + 2) * student.element_size() * B * K,
        output_bytes=student.nbytes,  # the gradient, which every contender must write
        contenders=[
            contender("dino-fast", ours, ours=True),
            contender("original, eager", original, baseline=True),
            contender("einsum, eager", einsum),
            contender("original, torch.compile", compiler(original)),
            contender("einsum, torch.compile", compiler(einsum)),
            peer("lightly", "lightly.loss", make_lightly, prepare=write_logits),
        ],
    )


def run(quick: bool = False) -> list[Row]:
    return run_all(comparisons(quick), quick=quick)


def test_speed(benchmark, contender):
    benchmark(contender)
