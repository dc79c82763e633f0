"""The CUDA kernels of multi_tensor on a GPU, against the reference on the same device."""

from __future__ import annotations

import pytest
import torch

from dino_fast.backends import cuda_unavailable_reason
from dino_fast.ops import multi_tensor
from dino_fast.optim import AdamWEMA

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(cuda_unavailable_reason() is not None, reason=str(cuda_unavailable_reason())),
]

SHAPES = ((1,), (3, 5), (0,), (384, 384), (1027,), (8193,), (2, 8192))
FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def modules(seed: int = 0):
    torch.manual_seed(seed)
    params = [torch.nn.Parameter(torch.randn(s, device="cuda")) for s in SHAPES]
    return params, [p.detach().clone() for p in params]


def optimizers(seed: int = 0, **options):
    """The same optimizer twice, over equal weights and gradients."""
    made = []
    for _ in range(2):
        params, teacher = modules(seed)
        for p in params[:-1]:  # the last has no gradient
            p.grad = torch.randn_like(p)
        made.append((params, teacher, AdamWEMA(params, teacher, **options)))
    return made


@pytest.mark.parametrize("options", [{}, {"clip_grad": 0.5}, {"clip_grad": 0.5, "clip_mode": "global"}])
@pytest.mark.parametrize("overflow", [None, 0.0, 1.0])
def test_steps_equal_the_reference_and_wait_for_nothing(monkeypatch, options, overflow):
    results = []
    for backend, (params, teacher, optimizer) in zip(("cuda", "reference"), optimizers(**options), strict=True):
        monkeypatch.setenv("DINO_FAST_BACKEND", f"multi_tensor={backend}")
        optimizer.step(momentum=0.9)
        if overflow is not None:
            optimizer.grad_scale = torch.tensor(8.0, device="cuda")
            optimizer.found_inf = torch.tensor(overflow, device="cuda")
        torch.cuda.set_sync_debug_mode("error" if backend == "cuda" else "default")
        try:
            optimizer.step(momentum=0.7)
            optimizer.step(momentum=0.8)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        results.append([*params, *teacher])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("student_dtype", FLOATS)
@pytest.mark.parametrize("teacher_dtype", FLOATS)
def test_ema_equals_the_reference(student_dtype, teacher_dtype):
    student = [torch.randn(s, device="cuda").to(student_dtype) for s in SHAPES]
    teacher = [torch.randn(s, device="cuda").to(teacher_dtype) for s in SHAPES]
    expected = [t.clone() for t in teacher]
    multi_tensor.ema_update_reference(expected, student, 0.9)
    torch.ops.dino_fast.ema_update(teacher, student, 0.9, [], backend="cuda")
    rtol = {torch.float32: 1e-6, torch.bfloat16: 2**-8, torch.float16: 2**-11}[teacher_dtype]
    for ours, theirs in zip(teacher, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=rtol, atol=1e-6)


def test_norms_are_right_and_the_same_bits_every_time():
    grads = [torch.randn(s, device="cuda") for s in (*SHAPES, (4096, 1025))]
    norms = torch.ops.dino_fast.grad_norms(grads, backend="cuda")
    exact = multi_tensor.grad_norms_reference([g.double() for g in grads])
    torch.testing.assert_close(norms.double(), exact, rtol=1e-6, atol=0)
    assert all(torch.equal(norms, torch.ops.dino_fast.grad_norms(grads, backend="cuda")) for _ in range(20))


def test_a_graph_sees_new_hyper_parameters(monkeypatch):
    monkeypatch.setenv("DINO_FAST_BACKEND", "multi_tensor=cuda")
    (params, teacher, captured), (eager_params, eager_teacher, eager) = optimizers(clip_grad=0.5)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        captured.step(momentum=0.9)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured.step(momentum=0.5)
    eager.step(momentum=0.9)
    for lr, momentum in ((0.1, 0.2), (0.01, 0.6)):
        for optimizer in (captured, eager):
            optimizer.param_groups[0]["lr"] = lr
        captured.write_hyperparameters(momentum=momentum)
        graph.replay()
        eager.step(momentum=momentum)
    for ours, theirs in zip([*params, *teacher], [*eager_params, *eager_teacher], strict=True):
        assert torch.equal(ours, theirs)
