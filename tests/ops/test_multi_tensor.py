"""Native kernels of multi_tensor against the reference in float64, on every instruction set of this machine."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dino_fast.backends import BackendError, native_unavailable_reason
from dino_fast.ops import multi_tensor as mt

if reason := native_unavailable_reason():
    pytest.skip(reason, allow_module_level=True)


DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SHAPES = [(), (0,), (1,), (3, 0, 2), (7,), (16,), (33,), (5, 31), (16384,), (16385,), (3, 16384), (70001,)]


def draw(shapes, dtype=torch.float32, seed=0, scale=1.0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [(torch.randn(s, generator=generator) * scale).to(dtype) for s in shapes]


def clones(tensors: list[Tensor]) -> list[Tensor]:
    return [t.clone() for t in tensors]


def assert_as_accurate_as_eager(got: list[Tensor], eager: list[Tensor], exact: list[Tensor]) -> None:
    for g, e, x in zip(got, eager, exact, strict=True):
        error, allowed = (g.double() - x).abs(), 2 * (e.double() - x).abs() + 1e-6 * (1 + x.abs())
        if g.dtype != torch.float32:  # the last rounding may fall either side of a tie
            allowed = allowed + torch.finfo(g.dtype).eps * x.abs()
        assert bool((error <= allowed).all()), f"off by {(error - allowed).max()} on {tuple(g.shape)}"


# ---- ema_update ----


@pytest.mark.parametrize("momentum", [0.0, 0.25, 0.5, 0.996, 1.0])
@pytest.mark.parametrize("teacher_dtype,student_dtype", list(itertools.product(DTYPES, DTYPES)))
def test_ema_accuracy(isa, teacher_dtype, student_dtype, momentum):
    teacher, student = draw(SHAPES, teacher_dtype, 1), draw(SHAPES, student_dtype, 2)
    copies = [torch.full_like(t, math.nan, dtype=torch.bfloat16) for t in teacher]
    eager = [
        (t.float() * momentum + p.float() * (1 - momentum)).to(t.dtype) for t, p in zip(teacher, student, strict=True)
    ]
    exact = [t.double() for t in teacher]
    mt.ema_update_reference(exact, [p.double() for p in student], momentum)
    torch.ops.dino_fast.ema_update(teacher, student, momentum, copies, "native")
    assert_as_accurate_as_eager(teacher, eager, exact)
    if teacher_dtype == torch.float32:
        assert all(torch.equal(c, t.bfloat16()) for c, t in zip(copies, teacher, strict=True))


def test_ema_ends_are_exact(isa):
    for momentum in (0.0, 1.0):
        teacher, student = draw(SHAPES, seed=1, scale=1e8), draw(SHAPES, seed=2)
        wanted = clones(student if momentum == 0.0 else teacher)
        torch.ops.dino_fast.ema_update(teacher, student, momentum, [], "native")
        assert all(torch.equal(a, b) for a, b in zip(teacher, wanted, strict=True))


def test_ema_of_an_equal_teacher_does_not_drift(isa):
    student = draw([(1001,)], seed=3)
    teacher = clones(student)
    for k in range(200):
        torch.ops.dino_fast.ema_update(teacher, student, 0.99 + 4e-5 * k, [], "native")
    assert torch.equal(teacher[0], student[0])


@settings(max_examples=40, deadline=None)
@given(
    st.lists(
        st.tuples(st.lists(st.integers(0, 70), max_size=3), st.sampled_from(DTYPES), st.sampled_from(DTYPES)),
        min_size=1,
        max_size=12,
    ),
    st.floats(0, 1),
    st.integers(1, 4),
)
def test_ema_drawn_lists(rows, momentum, threads):
    teacher = [draw([s], dtype, i)[0] for i, (s, dtype, _) in enumerate(rows)]
    student = [draw([s], dtype, 99 + i)[0] for i, (s, _, dtype) in enumerate(rows)]
    eager = clones(teacher)
    mt.ema_update_reference(eager, student, momentum)
    exact = [t.double() for t in teacher]
    mt.ema_update_reference(exact, [p.double() for p in student], momentum)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        torch.ops.dino_fast.ema_update(teacher, student, momentum, [], "native")
    finally:
        torch.set_num_threads(before)
    assert_as_accurate_as_eager(teacher, eager, exact)


@pytest.mark.parametrize("layout", ["transposed", "channels_last", "strided", "offset", "mixed"])
def test_ema_memory_layouts(layout):
    def lay(t: Tensor, which: str) -> Tensor:
        if which == "transposed":
            return t.transpose(0, 2).contiguous().transpose(0, 2)
        if which == "channels_last":
            return t.contiguous(memory_format=torch.channels_last)
        if which == "strided":
            return t.repeat_interleave(2, dim=1)[:, ::2]
        wide = torch.full((t.numel() + 3,), math.nan)
        wide[3:] = t.reshape(-1)
        return wide[3:].view(t.shape)

    shapes = [(2, 3, 5, 7), (4, 1, 9, 2)]
    teacher, student = draw(shapes, seed=1), draw(shapes, seed=2)
    wanted = [torch.lerp(t, p, 0.1) for t, p in zip(teacher, student, strict=True)]
    laid = [lay(t, "strided" if layout == "mixed" else layout) for t in teacher]
    strides = [t.stride() for t in laid]
    students = [lay(p, "transposed" if layout == "mixed" else layout) for p in student]
    torch.ops.dino_fast.ema_update(laid, students, 0.9, [], "native")
    assert [t.stride() for t in laid] == strides
    for got, want in zip(laid, wanted, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)


def test_ema_keeps_non_finite_numbers(isa):
    for bad in (math.nan, math.inf, -math.inf):
        for where in (0, 15, 40):
            for momentum in (0.25, 0.996):
                teacher, student = draw([(41,)], seed=1), draw([(41,)], seed=2)
                student[0][where] = bad
                copies = [torch.zeros(41, dtype=torch.bfloat16)]
                torch.ops.dino_fast.ema_update(teacher, student, momentum, copies, "native")
                finite = torch.arange(41) != where
                assert torch.equal(teacher[0].isfinite(), finite) and torch.equal(copies[0].isfinite(), finite)


def test_ema_of_float64_runs_on_the_reference_in_float64():
    teacher, student = [torch.zeros(3, dtype=torch.float64)], [torch.full((3,), 1.0 + 2**-40, dtype=torch.float64)]
    torch.ops.dino_fast.ema_update(teacher, student, 0.0, [])
    assert torch.equal(teacher[0], student[0])
    with pytest.raises(BackendError, match="float64"):
        torch.ops.dino_fast.ema_update(teacher, student, 0.5, [], "native")


def test_ema_errors():
    ema = torch.ops.dino_fast.ema_update
    with pytest.raises(ValueError, match="teacher has 1 tensors but student has 2"):
        ema(draw([(3,)]), draw([(3,), (3,)]), 0.5, [])
    with pytest.raises(ValueError, match=r"teacher\[1\] has shape \(4,\) but student\[1\] \(5,\)"):
        ema(draw([(3,), (4,)]), draw([(3,), (5,)]), 0.5, [])
    with pytest.raises(TypeError, match=r"torch.int64"):
        ema([torch.zeros(3)], [torch.zeros(3, dtype=torch.int64)], 0.5, [])
    for momentum in (-0.1, 1.1, math.nan):
        with pytest.raises(ValueError, match=r"\[0, 1\]"):
            ema(draw([(3,)]), draw([(3,)]), momentum, [])
    with pytest.raises(ValueError, match="one device; got cpu, meta"):
        ema(draw([(3,)]), [torch.zeros(3, device="meta")], 0.5, [])
    with pytest.raises(ValueError, match="must be bfloat16"):
        ema(draw([(3,)]), draw([(3,)]), 0.5, draw([(3,)]))


# ---- grad_norms ----


@pytest.mark.parametrize("dtype", DTYPES)
def test_norms_accuracy(isa, dtype):
    grads = draw(SHAPES, dtype, 4, scale=0.01)
    eager = torch.stack([torch.linalg.vector_norm(g.float()) for g in grads])
    exact = torch.stack([torch.linalg.vector_norm(g.double()) for g in grads])
    got = torch.ops.dino_fast.grad_norms(grads, "native")
    assert_as_accurate_as_eager([got], [eager], [exact])


def test_norms_do_not_depend_on_threads(isa):
    grads, before = draw([(100003,), (7,), (300, 300)], seed=5), torch.get_num_threads()
    norms = []
    for threads in (1, 2, 5, 2):
        torch.set_num_threads(threads)
        norms.append(torch.ops.dino_fast.grad_norms(grads, "native"))
    torch.set_num_threads(before)
    assert all(torch.equal(n, norms[0]) for n in norms)


def test_norms_of_non_finite_gradients(isa):
    for bad in (math.nan, math.inf):
        grads = draw([(41,), (41,), (20000,)], seed=1)
        grads[0][40] = bad
        grads[2][19999] = bad
        finite = torch.ops.dino_fast.grad_norms(grads, "native").isfinite()
        assert finite.tolist() == [False, True, False]


# ---- adamw_ema ----


def make_state(shapes, grad_dtype=torch.float32, seed=0):
    params, teachers = draw(shapes, seed=seed), draw(shapes, seed=seed + 1)
    m1 = draw(shapes, seed=seed + 2, scale=0.1)
    m2 = [t.square() for t in draw(shapes, seed=seed + 3, scale=0.1)]
    steps = [torch.tensor(float(i % 7)) for i in range(len(shapes))]
    return params, draw(shapes, grad_dtype, seed + 4), m1, m2, steps, teachers


def poisoned(tensors: list[Tensor]) -> list[Tensor]:
    return [torch.full_like(t, math.nan, dtype=torch.bfloat16) for t in tensors]


OPTIONS = dict(beta1=0.9, beta2=0.999, eps=1e-8, momentum=0.99)


def rates(n: int) -> dict[str, list[float]]:
    return {"lrs": [1e-2 / (i + 1) for i in range(n)], "weight_decays": [0.1 * (i % 3) for i in range(n)]}


@pytest.mark.parametrize("grad_dtype", DTYPES)
@pytest.mark.parametrize("scaled", [False, True])
def test_adamw_accuracy(isa, grad_dtype, scaled):
    state = make_state(SHAPES, grad_dtype)
    n = len(SHAPES)
    multipliers = torch.rand(n, generator=torch.Generator().manual_seed(7)) if scaled else None
    native, eager = [clones(x) for x in state], [clones(x) for x in state]
    exact = [[t.double() for t in x] for x in state]
    copies = poisoned(native[0]), poisoned(native[0])
    torch.ops.dino_fast.adamw_ema(*native, *copies, multipliers, None, **rates(n), **OPTIONS, backend="native")
    mt.adamw_ema_reference(*eager, [], [], multipliers, None, **rates(n), **OPTIONS)
    mt.adamw_ema_reference(*exact, [], [], multipliers, None, **rates(n), **OPTIONS)
    for which in (0, 2, 3, 4, 5):
        assert_as_accurate_as_eager(native[which], eager[which], exact[which])
    assert all(torch.equal(c, p.bfloat16()) for c, p in zip(copies[0], native[0], strict=True))
    assert all(torch.equal(c, t.bfloat16()) for c, t in zip(copies[1], native[5], strict=True))


@settings(max_examples=30, deadline=None)
@given(st.lists(st.lists(st.integers(0, 60), max_size=3), min_size=1, max_size=10), st.booleans(), st.booleans())
def test_adamw_drawn_lists(shapes, with_teacher, with_copies):
    def run(function, state, **more):
        params, grads, m1, m2, steps, teachers = state
        copies = poisoned(params) if with_copies else []
        none = [torch.empty(0, dtype=torch.bfloat16)] * len(params)
        args = (params, grads, m1, m2, steps, teachers if with_teacher else [], copies, none if with_copies else [])
        function(*args, None, None, **rates(len(shapes)), **OPTIONS, **more)
        return [*params, *m1, *m2, *steps, *teachers], copies

    state = make_state(shapes)
    got, copies = run(torch.ops.dino_fast.adamw_ema, [clones(x) for x in state], backend="native")
    eager, _ = run(mt.adamw_ema_reference, [clones(x) for x in state])
    exact, _ = run(mt.adamw_ema_reference, [[t.double() for t in x] for x in state])
    assert_as_accurate_as_eager(got, eager, exact)
    assert all(torch.equal(c, p.bfloat16()) for c, p in zip(copies, got[: len(copies)], strict=True))


@pytest.mark.parametrize("backend", ["native", "reference"])
def test_overflow_keeps_everything_but_the_teacher(isa, backend):
    params, grads, m1, m2, steps, teachers = make_state(SHAPES)
    grads[3].fill_(math.inf)
    kept = [clones(x) for x in (params, m1, m2, steps)]
    wanted = clones(teachers)
    mt.ema_update_reference(wanted, params, OPTIONS["momentum"])
    copies = poisoned(params), poisoned(params)
    n, found = len(params), torch.tensor([1.0])
    torch.ops.dino_fast.adamw_ema(
        params, grads, m1, m2, steps, teachers, *copies, torch.zeros(n), found, **rates(n), **OPTIONS, backend=backend
    )
    for before, after in zip(kept, (params, m1, m2, steps), strict=True):
        assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    torch.testing.assert_close(teachers, wanted, rtol=1e-6, atol=1e-6)
    assert all(torch.equal(c, p.bfloat16()) for c, p in zip(copies[0], params, strict=True))
    assert all(torch.equal(c, t.bfloat16()) for c, t in zip(copies[1], teachers, strict=True))


@pytest.mark.parametrize("backend", ["native", "reference"])
def test_non_finite_gradients_reach_parameter_teacher_and_copies(isa, backend):
    for bad, multiplier in ((math.nan, 1.0), (math.inf, 0.0), (-math.inf, 1.0), (math.nan, 0.0)):
        params, grads, m1, m2, steps, teachers = make_state([(41,)])
        grads[0][40] = bad
        copies = poisoned(params), poisoned(params)
        torch.ops.dino_fast.adamw_ema(
            params, grads, m1, m2, steps, teachers, *copies, torch.tensor([multiplier]), None,
            **rates(1), **OPTIONS, backend=backend,
        )  # fmt: skip
        finite = torch.arange(41) != 40
        for t in (params[0], teachers[0], *copies[0], *copies[1]):
            assert torch.equal(t.isfinite(), finite)


def test_adamw_memory_layouts():
    params, grads, m1, m2, steps, teachers = make_state([(6, 4, 3, 3), (8, 5), (8, 5)])
    grads[2] = grads[2][0, 0].expand(8, 5)
    wanted = [clones(x) for x in (params, grads, m1, m2, steps, teachers)]
    mt.adamw_ema_reference(*wanted, [], [], None, None, **rates(3), **OPTIONS)
    params[0] = params[0].contiguous(memory_format=torch.channels_last)
    grads[1], m1[1] = grads[1].t().contiguous().t(), m1[1].t().contiguous().t()
    params[2] = params[2].repeat_interleave(2, dim=1)[:, ::2]
    torch.ops.dino_fast.adamw_ema(
        params, grads, m1, m2, steps, teachers, [], [], None, None, **rates(3), **OPTIONS, backend="native"
    )
    for which, got in ((0, params), (2, m1), (3, m2), (5, teachers)):
        torch.testing.assert_close(got, wanted[which], rtol=1e-6, atol=1e-6)


def test_same_bits_twice_and_with_any_number_of_threads(isa):
    before, results = torch.get_num_threads(), []
    for threads in (1, 2, 3, 2):
        torch.set_num_threads(threads)
        state = make_state(SHAPES)
        n = len(SHAPES)
        torch.ops.dino_fast.adamw_ema(*state, [], [], None, None, **rates(n), **OPTIONS, backend="native")
        results.append([t for x in state for t in x])
    torch.set_num_threads(before)
    assert all(torch.equal(a, b) for r in results[1:] for a, b in zip(results[0], r, strict=True))


def test_adamw_errors():
    def call(change):
        state = dict(
            zip(
                ("params", "grads", "exp_avgs", "exp_avg_sqs", "steps", "teachers"),
                make_state([(3,), (4,)]),
                strict=True,
            )
        )
        state |= {"param_copies": [], "teacher_copies": [], "multipliers": None, "found_inf": None, **rates(2)}
        torch.ops.dino_fast.adamw_ema(**(state | change), **OPTIONS)

    with pytest.raises(ValueError, match="params has 2 tensors but grads has 1"):
        call({"grads": draw([(3,)])})
    with pytest.raises(ValueError, match=r"teachers\[0\] \(4,\)"):
        call({"teachers": draw([(4,), (3,)])})
    with pytest.raises(TypeError, match="float32"):
        call({"exp_avgs": draw([(3,), (4,)], torch.bfloat16)})
    with pytest.raises(ValueError, match="float32 scalars"):
        call({"steps": [torch.tensor(1), torch.tensor(1)]})
    with pytest.raises(ValueError, match=r"multipliers must have shape \(2,\)"):
        call({"multipliers": torch.ones(3)})
    with pytest.raises(ValueError, match="multipliers must be on the parameters' device, cpu; they are on meta"):
        call({"multipliers": torch.ones(2, device="meta")})
    with pytest.raises(ValueError, match="2 lrs"):
        call({"lrs": [1.0]})
    with pytest.raises(ValueError, match=r"param_copies\[1\] must be bfloat16 of shape \(4,\)"):
        call({"param_copies": draw([(3,), (5,)], torch.bfloat16)})


# ---- PyTorch's machinery ----


@pytest.mark.parametrize("backend", ["native", "reference"])
def test_opcheck(backend):
    ops = torch.ops.dino_fast
    shapes = [(5,), (3, 4)]
    copies = draw(shapes, torch.bfloat16, 9)
    torch.library.opcheck(ops.ema_update.default, (draw(shapes), draw(shapes, seed=1), 0.9, copies, backend))
    momentum = torch.tensor(0.9, dtype=torch.float64)
    torch.library.opcheck(
        ops.ema_update_tensor_momentum.default, (draw(shapes), draw(shapes, seed=1), momentum, copies, backend)
    )
    torch.library.opcheck(ops.grad_norms.default, (draw(shapes), backend))
    params, grads, m1, m2, steps, teachers = make_state(shapes)
    args = (params, grads, m1, m2, steps, teachers, copies, draw(shapes, torch.bfloat16, 8), torch.ones(2), None)
    torch.library.opcheck(ops.adamw_ema.default, (*args, [1e-3] * 2, [0.1] * 2, 0.9, 0.999, 1e-8, 0.99, backend))


def test_mutation_is_seen_by_autograd():
    teacher, student = draw([(3,)]), draw([(3,)], seed=1)
    x = torch.ones(3, requires_grad=True)
    y = (x * teacher[0]).sum()
    torch.ops.dino_fast.ema_update(teacher, student, 0.5, [], "native")
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward()
