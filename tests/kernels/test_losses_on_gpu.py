"""The Triton kernels of dino_loss and linear_dino_loss on a GPU, against float64 on the same device."""

from __future__ import annotations

import pytest
import torch

from dino_fast.backends import triton_unavailable_reason
from dino_fast.ops.dino_loss import dino_loss, dino_loss_reference
from dino_fast.ops.linear_dino_loss import linear_dino_loss, linear_dino_loss_reference

missing = triton_unavailable_reason() or (None if torch.cuda.is_available() else "no CUDA device")
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(missing is not None, reason=str(missing))]

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
TEMPS = {"student_temp": 0.1, "teacher_temp": 0.04}


def drawn(*shape: int, seed: int, scale: float = 1.0) -> torch.Tensor:
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def assert_as_good_as_eager(ours, eager, exact) -> None:
    """At most twice eager's error against float64, plus 1e-6 (1 + |reference|)."""
    for mine, theirs, truth in zip(ours, eager, exact, strict=True):
        limit = 2 * (theirs.double() - truth).abs().max() + 1e-6 * (1 + truth.abs().max())
        assert (mine.double() - truth).abs().max() <= limit


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(2, 1, 1), (10, 3, 1000), (10, 16, 65536), (3, 2, 262144)], ids=str)
def test_dino_loss(shape, dtype):
    V, B, K = shape
    student, teacher = drawn(V, B, K, seed=0).to("cuda", dtype), drawn(2, B, K, seed=1).to("cuda", dtype)
    center = drawn(K, seed=2, scale=0.1).cuda()

    def run(function, dtype, **options):
        leaf = student.to(dtype).requires_grad_()
        wide = center.to(torch.promote_types(dtype, torch.float32))
        result = function(leaf, teacher.to(dtype), wide, **TEMPS, **options)
        return result.loss.detach(), torch.autograd.grad(result.loss, leaf)[0], result.teacher_mean

    ours, again = (run(dino_loss, dtype, backend="triton") for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(ours, again, strict=True))
    assert_as_good_as_eager(ours, run(dino_loss_reference, dtype), run(dino_loss_reference, torch.float64))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("gain", [False, True])
@pytest.mark.parametrize("shape", [(2, 2, 1, 7, 16), (10, 2, 8, 5000, 256), (1, 1, 300, 4097, 256)], ids=str)
def test_linear_dino_loss(shape, gain, dtype):
    V, T, B, K, D = shape
    rows = [torch.nn.functional.normalize(drawn(n, B, D, seed=n), dim=-1).to("cuda", dtype) for n in (V, T)]
    weights = [drawn(K, D, seed=20 + i, scale=1 if gain else D**-0.5).to("cuda", dtype) for i in range(2)]
    pairs = torch.ones(T, V) if V == 1 else torch.ones(T, V).fill_diagonal_(0)
    fixed = [drawn(K, seed=30, scale=0.1).cuda(), pairs.cuda(), torch.full((B,), 1 / (B * pairs.sum().item())).cuda()]

    def run(function, dtype, **options):
        wide = torch.promote_types(dtype, torch.float32)
        leaves = [x.to(dtype).requires_grad_() for x in (rows[0], weights[0])]
        gains = {n: torch.ones(K, device="cuda", dtype=wide) for n in ("student_gain", "teacher_gain") if gain}
        tensors = (*leaves, rows[1].to(dtype), weights[1].to(dtype), *(x.to(wide) for x in fixed))
        result = function(*tensors, **gains, **TEMPS, **options)
        return result.loss.detach(), *torch.autograd.grad(result.loss, leaves)

    ours, again = (run(linear_dino_loss, dtype, backend="triton") for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(ours, again, strict=True))
    exact = run(linear_dino_loss_reference, torch.float64)
    assert_as_good_as_eager(ours, run(linear_dino_loss_reference, dtype), exact)


def test_nothing_waits_for_the_gpu():
    student, teacher = drawn(10, 4, 4096, seed=0).cuda().requires_grad_(), drawn(2, 4, 4096, seed=1).cuda()
    center = torch.zeros(4096, device="cuda")
    rows, weight = drawn(10, 4, 256, seed=2).cuda().requires_grad_(), drawn(4096, 256, seed=3).cuda().requires_grad_()
    pairs, weights = torch.ones(2, 10, device="cuda"), torch.full((4,), 1 / 80, device="cuda")

    def step():
        dino_loss(student, teacher, center, **TEMPS, backend="triton").loss.backward()
        arguments = (rows, weight, rows[:2].detach(), weight.detach(), center, pairs, weights)
        linear_dino_loss(*arguments, **TEMPS, backend="triton").loss.backward()

    step()  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
