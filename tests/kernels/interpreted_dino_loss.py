"""The Triton kernels of dino_loss under Triton's interpreter, on CPU tensors. Run by test_dino_loss.py, in a process
of its own, because TRITON_INTERPRET must be set before Triton is imported."""

from __future__ import annotations

import os

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dino_fast.kernels import dino_loss as kernels
from dino_fast.ops import dino_loss as operation
from dino_fast.ops.dino_loss import dino_loss, dino_loss_reference

TEMPS = {"student_temp": 0.1, "teacher_temp": 0.04}
BACKEND = "triton"


def logits(V: int, B: int, K: int, scale: float = 1.0, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    student = torch.randn(V, B, K, generator=generator) * scale
    teacher = torch.randn(2, B, K, generator=generator) * scale
    return student, teacher, torch.randn(K, generator=generator) * 0.1


def errors(result, upstream, inputs):
    """(largest error of a value, of the gradient) of (DinoLoss, gradient) against float64."""
    student, teacher, center = (x.double() for x in inputs)
    student.requires_grad_()
    exact = dino_loss_reference(student, teacher, center, **TEMPS)
    (exact.loss * upstream).backward()
    values, gradient = result
    found = [(a - b).abs().max().item() for a, b in zip(values, exact, strict=True)]
    return found, (gradient - student.grad).abs().max().item(), exact, student.grad


def run(inputs, upstream=1.0, backend=None):
    student = inputs[0].clone().requires_grad_()
    result = dino_loss(student, *inputs[1:], **TEMPS, backend=backend or BACKEND)
    (result.loss * upstream).backward()
    return tuple(x.detach() for x in result), student.grad


def assert_as_good_as_eager(inputs, upstream=1.0):
    values, gradient, exact, exact_gradient = errors(run(inputs, upstream), upstream, inputs)
    eager_values, eager_gradient, *_ = errors(run(inputs, upstream, "reference"), upstream, inputs)
    for ours, eager, reference in zip(values, eager_values, exact, strict=True):
        assert ours <= 2 * eager + 1e-6 * (1 + reference.abs().max().item())
    assert gradient <= 2 * eager_gradient + 1e-6 * (1 + exact_gradient.abs().max().item())


@pytest.fixture(autouse=True)
def poisoned_memory(monkeypatch):
    """What a kernel forgets to write is NaN."""
    empty = torch.empty

    def poisoned(*args, **kwargs):
        tensor = empty(*args, **kwargs)
        return tensor.fill_(float("nan")) if tensor.is_floating_point() else tensor

    monkeypatch.setattr(torch, "empty", poisoned)
    new_empty = torch.Tensor.new_empty

    def poisoned_new(tensor, *args, **kwargs):
        tensor = new_empty(tensor, *args, **kwargs)
        return tensor.fill_(float("nan")) if tensor.is_floating_point() else tensor

    monkeypatch.setattr(torch.Tensor, "new_empty", poisoned_new)


def test_interpreted():
    assert os.environ["TRITON_INTERPRET"] == "1"


@pytest.mark.parametrize(
    ("V", "B", "K"),
    [
        (2, 1, 1),  # nothing but one global pair and one prototype
        (2, 3, 511),  # no local crops, one short tile
        (10, 2, 513),  # one element past a tile
        (3, 140, 5),  # more images than programs are wanted
        (12, 1, 4096),  # one image in several slices
    ],
)
def test_is_as_good_as_eager(V, B, K):
    assert_as_good_as_eager(logits(V, B, K))


@pytest.mark.parametrize("scale", [1e2, 1e4])
def test_large_logits(scale):
    assert_as_good_as_eager(logits(4, 2, 1100, scale))


@settings(max_examples=15, deadline=None)
@given(
    V=st.integers(2, 12), B=st.integers(1, 5), K=st.integers(1, 1500), seed=st.integers(0, 9),
    upstream=st.sampled_from([1.0, 0.0, -2.5]),
)  # fmt: skip
def test_drawn_shapes(V, B, K, seed, upstream):
    assert_as_good_as_eager(logits(V, B, K, seed=seed), upstream)


def test_same_bits_twice():
    first, second = run(logits(10, 3, 1700)), run(logits(10, 3, 1700))
    assert torch.equal(first[1], second[1])
    assert all(torch.equal(a, b) for a, b in zip(first[0], second[0], strict=True))


def test_rows_apart_and_offset():
    student, teacher, center = logits(4, 3, 600)
    wide = torch.full((3, 4, 1000), float("nan"))
    wide[:, :, 100:700] = student.transpose(0, 1)
    result = run((wide[:, :, 100:700].transpose(0, 1), teacher, center))
    plain = run((student, teacher, center))
    assert torch.equal(result[0][0], plain[0][0])
    assert torch.equal(result[1], plain[1])


def test_gradient_over_the_logits():
    student, teacher, center = logits(5, 2, 700)
    row_statistics = torch.full((2, 7, 2), float("nan"))
    kernels.statistics(student, teacher, center, 0.1, 0.04, row_statistics)
    expected = torch.empty_like(student)
    kernels.gradient(student, teacher, center, row_statistics, torch.ones(()), expected, 0.1, 0.04)
    kernels.gradient(student, teacher, center, row_statistics, torch.ones(()), student, 0.1, 0.04)
    assert torch.equal(student, expected)


def test_gradient_in_place_of_the_logits():
    student, teacher, center = logits(5, 2, 700)
    expected = run((student, teacher, center))[1]
    leaf = student.clone().requires_grad_()
    given = leaf.clone()
    loss = dino_loss(given, teacher, center, **TEMPS, inplace=True, backend=BACKEND).loss
    (gradient,) = torch.autograd.grad(loss, leaf)
    assert torch.equal(gradient, expected) and torch.equal(given, expected)


def test_float16_waits_for_the_loss_scale():
    """An element's gradient is about 1e-8 here: below float16's smallest number, unless scaled as it is written."""
    inputs = [x.half() for x in logits(4, 8, 3000)]
    gradient = run(inputs, upstream=65536.0)[1]
    exact = run([x.float() for x in inputs], upstream=65536.0)[1]
    assert (gradient.float() - exact).abs().max() <= 2**-10 * exact.abs().max()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("where", ["student", "teacher"])
def test_what_is_not_finite_shows(bad, where):
    student, teacher, center = logits(3, 2, 1200)
    (student if where == "student" else teacher)[1, 0, 700] = bad
    loss = dino_loss(student, teacher, center, **TEMPS, backend=BACKEND).loss
    reference = dino_loss_reference(student, teacher, center, **TEMPS).loss
    # -inf in the teacher is a prototype without probability: finite in the formula, and then the same number.
    assert not loss.isfinite() or (loss - reference).abs() < 1e-5


def test_row_statistics_are_the_native_kernels():
    student, teacher, center = logits(6, 3, 1300)
    ours, theirs = (
        operation._run(student, teacher, center, 0.1, 0.04, True, name)[4] for name in (BACKEND, "reference")
    )
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=0)


def test_bytes_are_what_the_kernels_load_and_store(monkeypatch):
    """Counts the logits that loads and stores touch, in the interpreter's own memory calls."""
    from triton.runtime import interpreter

    V, B, K = 3, 2, 1030
    student, teacher, center = logits(V, B, K)
    grad, row_statistics = torch.empty_like(student), torch.empty(2, 2 + V, B)
    spans = [(x.data_ptr(), x.data_ptr() + x.numel() * 4) for x in (student, teacher, grad)]
    counted = 0

    def count(pointers, mask):
        nonlocal counted
        for low, high in spans:
            counted += int(((pointers.data >= low) & (pointers.data < high) & mask.data).sum()) * 4

    builder = type(interpreter.interpreter_builder)
    original_load, original_store = builder.create_masked_load, builder.create_masked_store

    def counting_load(self, pointers, mask, *rest):
        count(pointers, mask)
        return original_load(self, pointers, mask, *rest)

    def counting_store(self, pointers, value, mask, *rest):
        count(pointers, mask)
        return original_store(self, pointers, value, mask, *rest)

    monkeypatch.setattr(builder, "create_masked_load", counting_load)
    monkeypatch.setattr(builder, "create_masked_store", counting_store)
    expected = kernels.bytes_moved(V, B, K, 4)
    kernels.statistics(student, teacher, center, 0.1, 0.04, row_statistics)
    assert counted == expected["statistics"]
    counted = 0
    kernels.gradient(student, teacher, center, row_statistics, torch.ones(()), grad, 0.1, 0.04)
    assert counted == expected["gradient"]
    counted = 0
    kernels.mean(student, teacher, center, row_statistics)
    assert counted == expected["mean"]
