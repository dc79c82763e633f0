"""The kernels for 16-bit rows under the interpreter, on CPU tensors. Run by test_linear_dino_loss.py, in a process of
its own, because TRITON_INTERPRET must be set before Triton is imported. In float32, which shows that they compute the
function, and in float16, whose rounding the interpreter has (a product of bfloat16 tiles is wrong there)."""

from __future__ import annotations

import math

import pytest
import torch
import triton
import triton.language as tl
from hypothesis import given, settings
from hypothesis import strategies as st

from dino_fast.kernels import linear_dino_loss as kernels
from dino_fast.kernels import linear_dino_loss_half as half
from dino_fast.ops.linear_dino_loss import linear_dino_loss, linear_dino_loss_reference

from .interpreted_linear_dino_loss import TEMPS, assert_as_good_as_eager, poisoned, problem, results

__all__ = ["poisoned"]  # the fixture fills what is not written with NaN, here too


@pytest.fixture(autouse=True)
def taken(monkeypatch):
    """The kernels for 16 bits, whatever the type."""
    monkeypatch.setattr(half, "takes", lambda *tensors: True)


@pytest.mark.parametrize("gain", [False, True])
@pytest.mark.parametrize(
    "shape", [(2, 2, 1, 1, 130), (3, 2, 2, 7, 256), (10, 2, 3, 205, 256), (1, 1, 70, 129, 200), (5, 3, 2, 65, 256)]
)
def test_shapes(shape, gain):
    assert_as_good_as_eager(problem(*shape, gain=gain))


@settings(max_examples=4, deadline=None)
@given(
    V=st.integers(1, 10), T=st.integers(1, 2), B=st.integers(1, 7), K=st.integers(1, 150), D=st.integers(129, 256),
    gain=st.booleans(), seed=st.integers(0, 1000),
)  # fmt: skip
def test_any_shape(V, T, B, K, D, gain, seed):
    assert_as_good_as_eager(problem(V, T, B, K, D, gain=gain, seed=seed))


def test_upstream_gradient():
    assert_as_good_as_eager(problem(4, 2, 3, 200, 256), upstream=-2.5)


@pytest.mark.parametrize("shape", [(10, 2, 3, 300, 256), (1, 1, 40, 300, 200)])
@pytest.mark.parametrize("gain", [False, True])
def test_float16(shape, gain):
    """At most twice the error of the layer and loss in float16, plus the bound's own allowance."""
    assert_as_good_as_float16(*problem(*shape, gain=gain))


@pytest.mark.parametrize("large_tiles", [True, False])
@pytest.mark.parametrize("shape", [(10, 2, 3, 300, 256), (1, 1, 40, 300, 200)])
def test_float16_of_a_gain_far_above_the_length(shape, large_tiles, monkeypatch):
    """e gain / |v| 4096 is beyond float16 from a ratio of 16 on, which one prototype in ten passes here."""
    monkeypatch.setattr(half, "takes", lambda *tensors: large_tiles)
    tensors, gains = problem(*shape)
    D, gains["student_gain"] = shape[-1], gains["student_gain"].abs()
    gains["student_gain"][::10] *= 40.0
    weights = [x / math.sqrt(D) for x in (tensors[1], tensors[3])]  # of a length near 1
    assert_as_good_as_float16((tensors[0], weights[0], tensors[2], weights[1], *tensors[4:]), gains)


def assert_as_good_as_float16(tensors, gains):
    rounded = [*(x.half() for x in tensors[:4]), *tensors[4:]]

    def run(function, dtype, **options):
        leaves = [x.to(dtype).requires_grad_() for x in rounded[:2]]
        wide = torch.promote_types(dtype, torch.float32)
        fixed = [x.to(dtype) for x in rounded[2:4]] + [x.to(wide) for x in rounded[4:]]
        some = {name: x.to(wide) for name, x in gains.items()}
        loss, _ = function(*leaves, *fixed, **some, **TEMPS, **options)
        return [loss.detach(), *torch.autograd.grad(loss * 4096, leaves)]

    def eager(student, weight, teacher, teacher_weight, center, pairs, row_weights, *, student_temp, teacher_temp, **g):
        x = (student @ kernels_weight(weight, g.get("student_gain")).T).float() / student_temp
        with torch.no_grad():
            t = (teacher @ kernels_weight(teacher_weight, g.get("teacher_gain")).T).float()
            q = torch.softmax((t - center) / teacher_temp, -1)
        terms = -torch.einsum("ubk,vbk->uvb", q, torch.log_softmax(x, -1))
        return torch.einsum("uvb,uv,b->", terms, pairs, row_weights), None

    def kernels_weight(weight, gain):
        return weight if gain is None else torch._weight_norm(weight, gain[:, None].to(weight.dtype), 0)

    exact = run(linear_dino_loss_reference, torch.float64)
    theirs = run(eager, torch.float16)
    for mine, eagers, truth in zip(run(linear_dino_loss, torch.float16, backend="triton"), theirs, exact, strict=True):
        limit = 2 * (eagers.double() - truth).abs().max() + 1e-6 * (1 + truth.abs().max())
        assert (mine.double() - truth).abs().max() <= limit


@triton.jit
def _rounded_to_bfloat16(x, like):
    """To the nearest bfloat16, ties to even, as the chip rounds; in float32, in which the interpreter multiplies."""
    bits = x.to(tl.uint32, bitcast=True)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000).to(tl.float32, bitcast=True)


@pytest.mark.parametrize("gain", [True, False])
def test_bfloat16_loss(gain, monkeypatch):
    """The loss of weights rounded to bfloat16, its other factors exact, at most twice as far off as float32's."""
    monkeypatch.setattr(half, "_round", _rounded_to_bfloat16)
    worst = 0.0
    for seed in range(6):
        tensors, gains = problem(4, 2, 3, 300, 256, gain=gain, seed=seed)
        tensors = [*(x.bfloat16().float() for x in tensors[:4]), *tensors[4:]]
        ours = results(linear_dino_loss, tensors, gains, backend="triton")[0]
        eager = results(linear_dino_loss_reference, tensors, gains)[0]
        exact = results(linear_dino_loss_reference, tensors, gains, dtype=torch.float64)[0]
        limit = 2 * (eager.double() - exact).abs() + 1e-6 * (1 + exact.abs())
        worst = max(worst, float((ours.double() - exact).abs() / limit))
    assert worst <= 1.0


def test_a_prototype_of_gain_zero_reads_nothing_and_keeps_its_weight():
    tensors, gains = problem(4, 2, 2, 90, 256)
    gains["student_gain"][5] = 0.0
    assert_as_good_as_eager((tensors, gains))


def test_slices_do_not_change_the_result(monkeypatch):
    draw = problem(10, 2, 4, 200, 256)
    expected = results(linear_dino_loss, *draw, backend="triton")
    monkeypatch.setattr(half, "programs", lambda device: 1)
    for a, b in zip(expected, results(linear_dino_loss, *draw, backend="triton"), strict=True):
        assert torch.allclose(a, b, rtol=1e-5, atol=1e-7)


def test_same_inputs_same_bits():
    draw = problem(4, 2, 3, 300, 256)
    first, second = (results(linear_dino_loss, *draw, backend="triton") for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("where", range(4))
def test_not_finite_in_not_finite_out(bad, where):
    tensors, gains = problem(3, 2, 16, 50, 130, gain=False)  # rows of either sign where it is infinite
    tensors[where].flatten()[7] = bad
    found = results(linear_dino_loss, tensors, gains, backend="triton")
    assert not found[0].isfinite() and not found[2].isfinite().all() and not found[3].isfinite().all()


def test_loss_alone():
    tensors, gains = problem(4, 2, 3, 200, 256)
    loss, mean = linear_dino_loss(*tensors, **gains, **TEMPS, backend="triton")
    exact = linear_dino_loss_reference(*(x.double() for x in tensors), **gains, **TEMPS)
    assert loss.item() == pytest.approx(exact.loss.item(), rel=2e-6)
    assert torch.allclose(mean.double(), exact.teacher_mean, atol=1e-6)


@pytest.mark.parametrize(("V", "T", "B"), [(10, 2, 7), (1, 1, 70)])
def test_operations_and_bytes_are_those_of_the_formulas(V, T, B, monkeypatch):
    """Counted where the interpreter multiplies, loads and stores; statistics, gains and centre are the small rest."""
    from triton.runtime import interpreter

    builder, counted = interpreter.InterpreterBuilder, {"flops": 0, "bytes": 0}
    dot, load, store = builder.create_dot, builder.create_masked_load, builder.create_masked_store

    def counting_dot(self, a, b, *rest):
        counted["flops"] += 2 * a.data.shape[0] * a.data.shape[1] * b.data.shape[1]
        return dot(self, a, b, *rest)

    def counting_load(self, pointers, mask, *rest):
        result = load(self, pointers, mask, *rest)
        counted["bytes"] += int(mask.data.sum()) * result.data.itemsize
        return result

    def counting_store(self, pointers, value, mask, *rest):
        counted["bytes"] += int(mask.data.sum()) * value.data.itemsize
        return store(self, pointers, value, mask, *rest)

    monkeypatch.setattr(builder, "create_dot", counting_dot)
    monkeypatch.setattr(builder, "create_masked_load", counting_load)
    monkeypatch.setattr(builder, "create_masked_store", counting_store)
    monkeypatch.setattr(half, "programs", lambda device: 1)
    K, D = 128, 256
    tensors, gains = problem(V, T, B, K, D)
    student, weight, teacher, teacher_weight, center = tensors[:5]
    layers = kernels.Layer(weight, gains["student_gain"]), kernels.Layer(teacher_weight, gains["teacher_gain"])
    assert layers[0].scale is not None and layers[1].scale is not None
    arguments = student, layers[0], teacher, layers[1], center
    tile, weigh = half.ATTEND_TILES[9, 0][0], (half.ALIGNED_TILES if V == T == 1 else half.WEIGH_TILES)[9, 0][0]
    flops, moved = half.flops(tile, weigh, V, T, B, K), half.bytes_moved(tile, weigh, V, T, B, K, D, 4, 1)
    counted.update(flops=0, bytes=0)
    statistics, *_ = kernels.attend(*arguments, 0.1, 0.04, wanted=True)
    assert counted["flops"] == flops["attend"]
    merged = 8 * (V + T) * B * D  # the second stage: one slice is read, and written
    assert moved["attend"] <= counted["bytes"] - merged <= 1.05 * moved["attend"]
    counted.update(flops=0, bytes=0)
    kernels.weight_gradient(*arguments, statistics, torch.ones(V, B), torch.ones(T, V, B), 0.1, 0.04)
    assert counted["flops"] == flops["weigh"]
    assert moved["weigh"] <= counted["bytes"] <= 1.05 * moved["weigh"]
