"""What DINO's successors add: Sinkhorn-Knopp centering, KoLeo, Gram anchoring, iBOT's patch loss.

Sinkhorn: the time from the rows of the teacher's last layer to targets' centers (ours) or targets (the published form,
which stores the logits [N, K] and a matrix Q of their size); results are compared as targets of the first 512
prototypes. Its floor are the products of one iteration. KoLeo and Gram with the gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from dino_fast.loss import gram_loss, koleo_loss, sinkhorn_center
from dino_fast.ops.gram_loss import gram_loss_reference
from dino_fast.ops.sinkhorn_center import sinkhorn_center_reference

from .bench_linear_dino_loss import ibot_comparison
from .harness import Comparison, Contender, Row, run_all

TEMP, ITERATIONS, D = 0.05, 3, 256
SHOWN = 512  # prototypes whose targets are compared


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float32, device="cpu")


def comparisons(quick: bool = False) -> Iterator[Comparison]:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    yield sinkhorn(*((16, 4096) if quick else (128, 65536)), device)
    yield gram(*((2, 200, 64) if quick else (4, 1024, 384)), device)
    yield koleo(*((64, 128) if quick else (512, 384)), device)
    yield ibot_comparison(*((200, 4096) if quick else (3760, 131072)), torch.float32, device)


def published_sinkhorn(logits: Tensor) -> Tensor:
    """Targets [N, K]: sinkhorn_knopp_teacher of DINOv2 (loss/dino_clstoken_loss.py, Apache-2.0), one process."""
    Q = torch.exp(logits / TEMP).t()
    B, K = Q.shape[1], Q.shape[0]
    Q /= torch.sum(Q)
    for _ in range(ITERATIONS):
        Q /= torch.sum(Q, dim=1, keepdim=True)
        Q /= K
        Q /= torch.sum(Q, dim=0, keepdim=True)
        Q /= B
    Q *= B
    return Q.t()


def sinkhorn(N: int, K: int, device: str, compiler: Callable = torch.compile) -> Comparison:
    """`sinkhorn_center` beside the published form, from the inputs of the last layer."""
    rows, weight = normalize(drawn(N, D), dim=1).to(device), normalize(drawn(K, D, seed=1), dim=1).to(device)
    compiled = compiler(published_sinkhorn)

    def targets(center: Tensor, rows: Tensor, weight: Tensor) -> Tensor:
        logits = (rows @ weight[:SHOWN].T - center[:SHOWN]) / TEMP
        return torch.softmax(logits, dim=1)

    def of_targets(targets: Tensor) -> Tensor:
        return targets[:, :SHOWN] / targets[:, :SHOWN].sum(dim=1, keepdim=True)

    @torch.no_grad()
    def reference() -> Tensor:
        wide = rows.double(), weight.double()
        return targets(sinkhorn_center_reference(*wide, teacher_temp=TEMP), *wide)

    @torch.no_grad()
    def ours() -> Tensor:
        return targets(sinkhorn_center(rows, weight, teacher_temp=TEMP), rows, weight)

    @torch.no_grad()
    def eager() -> Tensor:
        return of_targets(published_sinkhorn(rows @ weight.T))

    @torch.no_grad()
    def compiled_form() -> Tensor:
        return of_targets(compiled(rows @ weight.T))

    return Comparison(
        operation="sinkhorn_center",
        shape=f"N{N} K{K} D{D}",
        dtype="float32",
        device=device,
        reference=reference,
        floor_flops=2 * N * K * D,
        output_bytes=4 * K,
        contenders=[
            Contender("dino-fast", ours, ours=True),
            Contender("DINOv2, eager", eager, baseline=True),
            Contender("DINOv2, torch.compile", compiled_form),
        ],
    )


def gram(B: int, P: int, width: int, device: str, compiler: Callable = torch.compile) -> Comparison:
    """`gram_loss` and its gradient beside the definition, with the patches by patches similarities."""
    anchor = drawn(B, P, width).to(device)
    student = (anchor + 0.5 * drawn(B, P, width, seed=1).to(device)).requires_grad_()

    def called(loss: Callable[[Tensor, Tensor], Tensor], dtype: torch.dtype = torch.float32) -> Callable:
        def call() -> list[Tensor]:
            x = student.detach().to(dtype).requires_grad_()
            value = loss(x, anchor.to(dtype))
            return [value.detach(), *torch.autograd.grad(value, x)]

        return call

    return Comparison(
        operation="gram_loss",
        shape=f"B{B} P{P} D{width}",
        dtype="float32",
        device=device,
        reference=called(gram_loss_reference, torch.float64),
        floor_flops=10 * B * P * width * min(P, width),
        output_bytes=student.nbytes,
        contenders=[
            Contender("dino-fast", called(gram_loss), ours=True),
            Contender("definition, eager", called(gram_loss_reference), baseline=True),
            Contender("definition, torch.compile", called(compiler(gram_loss_reference))),
        ],
    )


def published_koleo(features: Tensor) -> Tensor:
    """DINOv2's loss/koleo_loss.py (Apache-2.0)."""
    x = normalize(features, eps=1e-8, p=2, dim=-1)
    dots = torch.mm(x, x.t())
    dots.view(-1)[:: (x.shape[0] + 1)].fill_(-1)
    distances = nn.PairwiseDistance(2, eps=1e-8)(x, x[torch.max(dots, dim=1)[1]])
    return -torch.log(distances + 1e-8).mean()


def koleo(N: int, width: int, device: str) -> Comparison:
    """`koleo_loss` and its gradient beside the published form; both are plain PyTorch."""
    features = drawn(N, width).to(device)

    def called(loss: Callable[[Tensor], Tensor], dtype: torch.dtype = torch.float32) -> Callable:
        def call() -> list[Tensor]:
            x = features.to(dtype).detach().requires_grad_()
            value = loss(x)
            return [value.detach(), *torch.autograd.grad(value, x)]

        return call

    return Comparison(
        operation="koleo_loss",
        shape=f"N{N} D{width}",
        dtype="float32",
        device=device,
        reference=called(koleo_loss, torch.float64),
        floor_flops=2 * N * N * width,
        output_bytes=features.nbytes,
        contenders=[
            Contender("dino-fast", called(koleo_loss), ours=True),
            Contender("DINOv2, eager", called(published_koleo), baseline=True),
        ],
    )


def run(quick: bool = False) -> list[Row]:
    return run_all(comparisons(quick), quick=quick)


def test_speed(benchmark, contender: Contender) -> None:
    benchmark(contender)
