"""The Triton kernels of linear_dino_loss under the interpreter, on CPU tensors. Run by test_linear_dino_loss.py, in
a process of its own, because TRITON_INTERPRET must be set before Triton is imported. float32: a product of bfloat16
tiles is wrong there."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dino_fast.backends import BackendError
from dino_fast.kernels import linear_dino_loss as kernels
from dino_fast.ops.linear_dino_loss import linear_dino_loss, linear_dino_loss_reference

TEMPS = {"student_temp": 0.1, "teacher_temp": 0.04}
NAMES = ("loss", "teacher mean", "student", "weight", "gain")


def problem(V, T, B, K, D, *, gain=True, scale=1.0, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def drawn(*shape):
        return torch.randn(*shape, generator=generator)

    rows = [torch.nn.functional.normalize(drawn(n, B, D), dim=-1) * scale for n in (V, T)]
    weight = drawn(K, D) / (1 if gain else math.sqrt(D))
    pairs = torch.ones(T, V)
    if V > 1:
        pairs.fill_diagonal_(0)
    gains = {"student_gain": 1 + 0.1 * drawn(K), "teacher_gain": torch.ones(K)} if gain else {}
    row_weights = (0.5 + torch.rand(B, generator=generator)) / (B * max(1.0, pairs.sum().item()))
    teacher_weight = weight + 0.1 * drawn(K, D)
    return (rows[0], weight, rows[1], teacher_weight, drawn(K) * 0.1 * scale, pairs, row_weights), gains


def results(function, tensors, gains, upstream=1.0, dtype=torch.float32, **options):
    tensors = [x.detach().to(dtype) for x in tensors]
    gains = {name: x.detach().to(dtype) for name, x in gains.items()}
    leaves = [tensors[0], tensors[1], *([gains["student_gain"]] if gains else [])]
    for leaf in leaves:
        leaf.requires_grad_()
    loss, mean = function(*tensors, **gains, **TEMPS, **options)
    return [loss.detach(), mean, *torch.autograd.grad(loss * upstream, leaves)]


def assert_as_good_as_eager(*draws, upstream=1.0):
    """Twice eager's largest error over the draws, plus 1e-6 (1 + |reference|) at a row weight and temperature of 1."""
    ours, eager, slack = {}, {}, {}
    for tensors, gains in draws:
        exact = results(linear_dino_loss_reference, tensors, gains, upstream, torch.float64)
        unit = abs(0.1 / (tensors[6].mean().item() * upstream))
        for errors, found in (
            (ours, results(linear_dino_loss, tensors, gains, upstream, backend="triton")),
            (eager, results(linear_dino_loss_reference, tensors, gains, upstream)),
        ):
            for i, (a, c) in enumerate(zip(found, exact, strict=True)):
                scale = unit if i > 1 else 1.0
                assert a.isfinite().all(), NAMES[i]
                errors[i] = max(errors.get(i, 0.0), ((a.double() - c).abs() * scale).max().item())
                slack[i] = max(slack.get(i, 0.0), (1e-6 * (1 + c.abs() * scale)).max().item())
    for i, error in ours.items():
        assert error <= 2 * eager[i] + slack[i], f"{NAMES[i]}: {error:.3e}, eager {eager[i]:.3e}"


@pytest.fixture(autouse=True)
def poisoned():
    """What a kernel forgets to write is NaN."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory and torch.empty(64).isnan().all()
    assert torch.ones(1).new_empty(64).isnan().all()
    yield
    torch.use_deterministic_algorithms(before)


@pytest.mark.parametrize("gain", [False, True])
@pytest.mark.parametrize(
    "shape", [(2, 2, 1, 1, 16), (3, 2, 2, 7, 48), (10, 2, 3, 205, 32), (1, 1, 70, 129, 16), (16, 3, 1, 65, 200)]
)
def test_shapes(shape, gain):
    assert_as_good_as_eager(problem(*shape, gain=gain))


@settings(max_examples=8, deadline=None)
@given(
    V=st.integers(1, 10),
    T=st.integers(1, 2),
    B=st.integers(1, 4),
    K=st.integers(1, 250),
    D=st.integers(1, 70),
    gain=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_any_shape(V, T, B, K, D, gain, seed):
    assert_as_good_as_eager(problem(V, T, B, K, D, gain=gain, seed=seed))


@pytest.mark.parametrize("upstream", [0.37, -2.0, 4096.0])
def test_upstream_gradient(upstream):
    assert_as_good_as_eager(problem(4, 2, 3, 200, 32), upstream=upstream)


def test_logits_of_ten_thousand():
    assert_as_good_as_eager(*(problem(4, 2, 2, 150, 32, scale=1e4, seed=seed) for seed in range(6)))


def test_slices_do_not_change_the_result(monkeypatch):
    draw = problem(10, 2, 4, 200, 32)
    expected = results(linear_dino_loss, *draw, backend="triton")
    monkeypatch.setattr(kernels, "programs", lambda device: 1)
    for a, b in zip(expected, results(linear_dino_loss, *draw, backend="triton"), strict=True):
        assert torch.allclose(a, b, rtol=1e-5, atol=1e-7)


def test_same_inputs_same_bits():
    draw = problem(4, 2, 3, 300, 32)
    first, second = (results(linear_dino_loss, *draw, backend="triton") for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("where", range(4))
def test_not_finite_in_not_finite_out(bad, where):
    tensors, gains = problem(3, 2, 2, 50, 16, gain=False)
    tensors[where].flatten()[7] = bad
    found = results(linear_dino_loss, tensors, gains, backend="triton")
    assert not found[0].isfinite() and not found[2].isfinite().all() and not found[3].isfinite().all()


def test_strides_and_offsets():
    (z, w, zt, wt, *rest), gains = problem(4, 2, 3, 130, 32)
    expected = results(linear_dino_loss, (z, w, zt, wt, *rest), gains, backend="triton")
    wide = torch.full((130, 40), 1e4)
    wide[:, 3:35] = w
    tensors = (z.transpose(0, 1).contiguous().transpose(0, 1), wide[:, 3:35], zt, wt.T.contiguous().T, *rest)
    for a, b in zip(expected, results(linear_dino_loss, tensors, gains, backend="triton"), strict=True):
        assert torch.equal(a, b)


def test_loss_alone():
    tensors, gains = problem(4, 2, 3, 200, 32)
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
    monkeypatch.setattr(kernels, "programs", lambda device: 1)
    K, D = 64, 256
    tensors, gains = problem(V, T, B, K, D)
    student, weight, teacher, teacher_weight, center = tensors[:5]
    layers = kernels.Layer(weight, gains["student_gain"]), kernels.Layer(teacher_weight, gains["teacher_gain"])
    assert all(layer.scale is not None for layer in layers)  # a pass of its own, made before what is counted
    arguments = student, layers[0], teacher, layers[1], center
    attend, weigh = (
        kernels.tiles(table, torch.float32, torch.float32, D)[0]
        for table in (kernels.ATTEND_TILES, kernels.WEIGH_TILES)
    )
    for tile, name in ((attend, "attend"), (weigh, "weigh")):
        counted.update(flops=0, bytes=0)
        if name == "attend":
            statistics, *_ = kernels.attend(*arguments, 0.1, 0.04, wanted=True)
            merged = 8 * (V + T) * B * D  # the second stage: one slice is read, and written
        else:
            kernels.weight_gradient(*arguments, statistics, torch.ones(V, B), torch.ones(T, V, B), 0.1, 0.04)
            merged = 0
        assert counted["flops"] == kernels.flops(tile, V, T, B, K, D, torch.float32)[name]
        expected = kernels.bytes_moved(tile, V, T, B, K, D, 4, 1)[name]
        assert expected <= counted["bytes"] - merged <= 1.1 * expected


def assert_rejected(reason, *, dtype=torch.float32, shape=(2, 2, 1, 40, 32)):
    tensors, gains = problem(*shape)
    tensors = (*(x.to(dtype) for x in tensors[:4]), *tensors[4:])
    with pytest.raises(BackendError, match=reason):
        linear_dino_loss(*tensors, **gains, **TEMPS, backend="triton")


def test_says_what_it_does_not_take(monkeypatch):
    assert_rejected(r"not torch\.float64", dtype=torch.float64)
    assert_rejected("float32 rows of at most 256 elements, not 257", shape=(2, 2, 1, 3, 257))
    assert_rejected("bfloat16 rows of at most 512 elements, not 513", dtype=torch.bfloat16, shape=(2, 2, 1, 3, 513))
    assert_rejected("at most 16 crops of an image, not 17", shape=(17, 2, 1, 3, 16))
    monkeypatch.delenv("TRITON_INTERPRET")
    assert_rejected("runs on CUDA")


def test_wide_float32_rows_take_another_backend():
    """Chosen by itself, the operation runs all the same."""
    tensors, gains = problem(2, 2, 1, 40, 300)
    found = linear_dino_loss(*tensors, **gains, **TEMPS)
    exact = linear_dino_loss_reference(*(x.double() for x in tensors), **gains, **TEMPS)
    assert found.loss.item() == pytest.approx(exact.loss.item(), rel=2e-6)
