"""`matmul`: the three products of a linear layer in training, y = x W^T + b, dx = dy W and dW = dy^T x, in float32.

The shapes are those of a CPU-sized run (64 images: 17,024 tokens of width 192, 640 crops in the head) and of ViT-S. The
floor is the float32 product that PyTorch makes at its fastest size; a share above 100 % is what the tile unit adds.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from dino_fast.ops.linear.matmul import matmul

from .harness import Comparison, Contender, Row, run_all

# rows, inputs, outputs
LAYERS = {
    "fc1": (17024, 192, 768),
    "qkv": (17024, 192, 576),
    "head": (640, 2048, 2048),
    "prototypes": (250, 256, 65536),
    "ViT-S fc1": (8192, 384, 1536),
}
QUICK = {"fc1": (512, 192, 768)}

Product = Callable[..., Tensor]


def comparisons(quick: bool = False) -> Iterator[Comparison]:
    for name, (rows, inputs, outputs) in (QUICK if quick else LAYERS).items():
        yield comparison(name, rows, inputs, outputs)


def comparison(name: str, rows: int, inputs: int, outputs: int) -> Comparison:
    generator = torch.Generator().manual_seed(0)
    x, weight, bias, upstream = (
        torch.randn(shape, generator=generator)
        for shape in ((rows, inputs), (outputs, inputs), (outputs,), (rows, outputs))
    )
    y, grad_x, grad_weight = torch.empty_like(upstream), torch.empty_like(x), torch.empty_like(weight)

    def ours() -> tuple[Tensor, ...]:
        return (
            matmul(x, weight.t(), bias, out=y),
            matmul(upstream, weight, out=grad_x),
            matmul(upstream.t(), x, out=grad_weight),
        )

    def theirs() -> tuple[Tensor, ...]:
        return (
            torch.addmm(bias, x, weight.t(), out=y),
            torch.mm(upstream, weight, out=grad_x),
            torch.mm(upstream.t(), x, out=grad_weight),
        )

    def exact() -> tuple[Tensor, ...]:
        x64, weight64, upstream64 = x.double(), weight.double(), upstream.double()
        return x64 @ weight64.t() + bias, upstream64 @ weight64, upstream64.t() @ x64

    return Comparison(
        operation="matmul",
        shape=f"{name}: {rows} rows, {inputs} -> {outputs}, with both gradients",
        dtype="float32",
        reference=exact,
        floor_flops=3 * 2 * rows * inputs * outputs,
        contenders=[
            Contender("dino-fast", ours, ours=True),
            Contender("torch, float32", theirs, baseline=True),
        ],
    )


def run(quick: bool = False) -> list[Row]:
    return run_all(comparisons(quick), quick=quick)


def test_speed(benchmark, contender):
    benchmark(contender)
