"""Operation dino_loss: the reference against the definition, every backend against float64."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dino_fast import _C
from dino_fast.backends import BackendError
from dino_fast.ops.dino_loss import dino_loss, dino_loss_reference

TEMPS = {"student_temp": 0.1, "teacher_temp": 0.04}
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# (V, B, K), and what each is there for
SHAPES = {
    "smallest": (2, 1, 1),
    "no local crops, one image": (2, 1, 3),
    "below a vector": (3, 2, 7),
    "whole vectors": (10, 3, 256),
    "a tail after whole tiles": (4, 2, 2051),
    "the usual K": (10, 2, 65536),
    "the largest K in use": (2, 1, 262144),
}


def logits(V, B, K, dtype=torch.float32, scale=1.0, seed=0):
    generator = torch.Generator().manual_seed(seed)
    student = (torch.randn(V, B, K, generator=generator) * scale).to(dtype)
    teacher = (torch.randn(2, B, K, generator=generator) * scale).to(dtype)
    return student, teacher, torch.randn(K, generator=generator) * 0.1 * scale


def as_the_original(student, teacher, center, *, student_temp, teacher_temp):
    """The loss as the original writes it, in float32 for half logits too; the targets' entropy from the same values."""
    targets = torch.softmax((teacher.float() - center) / teacher_temp, dim=-1)
    total, pairs = 0, 0
    for u, q in enumerate(targets):
        for v, s in enumerate(student.float() / student_temp):
            if u != v:
                total = total + torch.sum(-q * torch.log_softmax(s, dim=-1), dim=-1).mean()
                pairs += 1
    entropy = -(targets * targets.clamp_min(torch.finfo(targets.dtype).tiny).log()).sum(-1).mean()
    return total / pairs, teacher.float().mean((0, 1)), entropy


def gradient_of(loss, student, upstream=None):
    return torch.autograd.grad(loss, student, upstream)[0]


def assert_accurate(*draws, upstream=1.0, temps=TEMPS, **options):
    """The largest error over the draws, (student, teacher, center) each, against float64 is at most twice eager's, plus
    1e-6 (1 + |reference|).

    The gradient is compared times B (2 V - 2) / upstream, so that its own size is of order 1 and the bound has teeth.
    """
    ours, eager, bounds = ({} for _ in range(3))
    for student, teacher, center in draws:
        student = student.detach().requires_grad_()
        up = torch.tensor(upstream)
        unit = student.shape[1] * (2 * student.shape[0] - 2) / upstream
        exact = dino_loss_reference(student.detach().double(), teacher.double(), center.double(), **temps)
        exact = (*exact, exact_gradient(student, teacher, center, temps) * upstream)
        for errors, function in (
            (ours, lambda *x: dino_loss(*x, **temps, **options)),
            (eager, lambda *x: as_the_original(*x, **temps)),
        ):
            result = function(student, teacher, center)
            result = (*result, gradient_of(result[0], student, up))
            for name, a, c in zip(("loss", "teacher mean", "entropy", "gradient"), result, exact, strict=True):
                scale = unit if name == "gradient" else 1.0
                error = (a.detach().double() - c).abs() * scale
                tolerance = 1e-6 * (1 + c.abs() * abs(scale))
                assert a.isfinite().all(), name
                errors[name] = max(errors.get(name, 0.0), error.max().item())
                bounds[name] = max(bounds.get(name, 0.0), tolerance.max().item())
    for name, error in ours.items():
        bound = 2 * eager[name] + bounds[name]
        assert error <= bound, f"{name}: off by {error:.3e}; eager by {eager[name]:.3e}, the bound is {bound:.3e}"


def exact_gradient(student, teacher, center, temps):
    student = student.detach().double().requires_grad_()
    return gradient_of(dino_loss_reference(student, teacher.double(), center.double(), **temps).loss, student)


# --- the reference --------------------------------------------------------------------------------------------------


def test_reference_is_the_mean_over_pairs_by_hand():
    student = torch.tensor([[[0.0, 0.2]], [[0.1, 0.0]], [[0.3, 0.3]]], dtype=torch.float64)
    teacher = torch.tensor([[[0.0, 0.04]], [[0.08, 0.0]]], dtype=torch.float64)
    center = torch.tensor([0.0, 0.02], dtype=torch.float64)

    def sigmoid(x):
        return 1 / (1 + math.exp(-x))

    p = [sigmoid(0.5), sigmoid(-2.5)]  # the teacher's probability of the second prototype
    s = [sigmoid(2.0), sigmoid(-1.0), sigmoid(0.0)]  # the student's
    pairs = [(0, 1), (0, 2), (1, 0), (1, 2)]
    expected = sum(-p[u] * math.log(s[v]) - (1 - p[u]) * math.log(1 - s[v]) for u, v in pairs) / 4
    result = dino_loss_reference(student, teacher, center, **TEMPS)
    assert result.loss.item() == pytest.approx(expected, rel=1e-12)
    assert result.teacher_entropy.item() == pytest.approx(
        sum(-q * math.log(q) - (1 - q) * math.log(1 - q) for q in p) / 2, rel=1e-12
    )
    assert torch.equal(result.teacher_mean, torch.tensor([0.04, 0.02], dtype=torch.float64))


def test_reference_gradcheck():
    student, teacher, center = (x.double() for x in logits(4, 2, 5, scale=0.1))
    student.requires_grad_()
    assert torch.autograd.gradcheck(lambda s: dino_loss_reference(s, teacher, center, **TEMPS).loss, student)
    assert torch.autograd.gradgradcheck(lambda s: dino_loss_reference(s, teacher, center, **TEMPS).loss, student)


def test_operator_gradcheck_in_float64():
    student, teacher, center = (x.double() for x in logits(3, 2, 4, scale=0.1))
    student.requires_grad_()
    assert torch.autograd.gradcheck(lambda s: dino_loss(s, teacher, center, **TEMPS).loss * 3.0, student)


# --- accuracy -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_native_is_as_accurate_as_eager(shape, dtype, isa, poisoned):
    assert_accurate(logits(*shape, dtype), backend="native")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("upstream", [0.37, -2.0, 4096.0])
def test_upstream_gradient(upstream, dtype, isa):
    assert_accurate(logits(4, 3, 500, dtype), upstream=upstream, backend="native")


@pytest.mark.parametrize("scale", [1e-3, 10.0])
def test_flat_and_peaked_logits(scale, isa):
    assert_accurate(logits(5, 2, 1000, scale=scale), backend="native")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_logits_of_ten_thousand(dtype, isa):
    draws = []
    for seed in range(6):  # a single draw may round luckily
        student, teacher, center = logits(4, 2, 300, seed=seed)
        student, teacher = student.sign() * 1e4 + student, teacher.sign() * 1e4 + teacher
        draws.append((student.to(dtype), teacher.to(dtype), center))
    assert_accurate(*draws, backend="native")


def test_student_and_teacher_of_different_dtypes(isa):
    student, teacher, center = logits(4, 2, 300)
    expected = dino_loss_reference(student, teacher.bfloat16().double(), center, **TEMPS).loss
    assert dino_loss(student, teacher.bfloat16(), center, **TEMPS, backend="native").loss.item() == pytest.approx(
        expected.item(), rel=2e-6
    )


@settings(max_examples=40, deadline=None)
@given(
    V=st.integers(2, 12),
    B=st.integers(1, 5),
    K=st.integers(1, 3000),
    dtype=st.sampled_from(DTYPES),
    isa=st.sampled_from(_C.supported_isas()),
    student_temp=st.floats(0.05, 1.0),
    teacher_temp=st.floats(0.02, 0.2),
    seed=st.integers(0, 1000),
)
def test_any_shape(V, B, K, dtype, isa, student_temp, teacher_temp, seed):
    before = _C.isa()
    _C.set_isa(isa)
    try:
        temps = {"student_temp": student_temp, "teacher_temp": teacher_temp}
        assert_accurate(logits(V, B, K, dtype, seed=seed), temps=temps, backend="native")
    finally:
        _C.set_isa(before)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_strides_and_offsets(dtype, isa):
    student, teacher, center = logits(4, 3, 130, dtype)
    wide = torch.full((3, 4, 137), 1e4, dtype=dtype)
    wide[:, :, 5:135] = student.transpose(0, 1)
    image_major = wide[:, :, 5:135].transpose(0, 1)  # image-major, offset, with gaps
    columns = teacher.transpose(0, 2).contiguous().transpose(0, 2)  # the last size is not contiguous
    expected = dino_loss(student.requires_grad_(), teacher, center, **TEMPS)
    found = dino_loss(image_major.requires_grad_(), columns, center.repeat(2)[:130], **TEMPS)
    assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))
    assert torch.equal(gradient_of(expected.loss, student), gradient_of(found.loss, image_major))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("where", ["student", "teacher"])
@pytest.mark.parametrize("K", [5, 3000])
def test_not_finite_in_not_finite_out(bad, where, K, isa):
    student, teacher, center = logits(3, 2, K)
    (student if where == "student" else teacher)[1, 1, K // 2] = bad
    student.requires_grad_()
    result = dino_loss(student, teacher, center, **TEMPS, backend="native")
    gradient = gradient_of(result.loss, student)
    assert not result.teacher_mean.isfinite().all() or where == "student"
    if where == "teacher" and bad == -math.inf:  # a probability of 0: nothing is wrong with the loss
        assert torch.allclose(result.loss, dino_loss_reference(student, teacher, center, **TEMPS).loss)
    else:
        assert not result.loss.isfinite()
        assert bad == -math.inf or not gradient.isfinite().all()


# --- the same bits --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_same_bits_again_and_with_any_number_of_threads(dtype, isa):
    student, teacher, center = logits(10, 3, 20000, dtype)
    student.requires_grad_()
    threads, results = torch.get_num_threads(), []
    try:
        for n in (1, 2, 2, 5):
            torch.set_num_threads(n)
            result = dino_loss(student, teacher, center, **TEMPS, backend="native")
            results.append((*result, gradient_of(result.loss, student)))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


# --- autograd -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_graph_can_be_run_twice_and_used_twice(dtype):
    student, teacher, center = logits(4, 2, 100, dtype)
    student.requires_grad_()
    hidden = student * 1
    loss = dino_loss(hidden, teacher, center, **TEMPS).loss
    first = torch.autograd.grad(loss, hidden, retain_graph=True)[0]
    kept = first.clone()
    second = torch.autograd.grad(loss * 2, hidden, retain_graph=True)[0]
    assert torch.equal(first, kept)
    assert torch.allclose(second.float(), 2 * kept.float(), rtol=1e-3, atol=1e-7)
    (loss + loss).backward()
    assert torch.allclose(student.grad.float(), 2 * kept.float(), rtol=1e-3, atol=1e-7)
    assert torch.equal(first, kept)


def test_upstream_of_one_returns_the_written_gradient():
    student, teacher, center = logits(4, 2, 100)
    loss = dino_loss(student.requires_grad_(), teacher, center, **TEMPS).loss
    first = torch.autograd.grad(loss, student, retain_graph=True)[0]
    second = torch.autograd.grad(loss, student)[0]
    assert first.data_ptr() == second.data_ptr()


def test_float16_gradient_survives_a_loss_scale():
    """Its values are among float16's smallest numbers until the loss is scaled."""
    student, teacher, center = logits(2, 24, 65536, torch.float16, scale=0.01)
    student.requires_grad_()
    loss = dino_loss(student, teacher, center, **TEMPS).loss
    scaled = torch.autograd.grad(loss, student, torch.tensor(65536.0))[0]
    exact = exact_gradient(student, teacher, center, TEMPS) * 65536
    written_too_early = (exact / 65536).half().double() * 65536
    assert (written_too_early - exact).norm() > 0.01 * exact.norm()
    assert (scaled - exact).norm() < 1e-3 * exact.norm()


def test_no_gradient_where_none_is_wanted():
    student, teacher, center = logits(3, 2, 50)
    assert not dino_loss(student, teacher, center, **TEMPS).loss.requires_grad
    with torch.no_grad():
        result = dino_loss(student.requires_grad_(), teacher, center, **TEMPS)
    assert not result.loss.requires_grad
    result = dino_loss(student, teacher.requires_grad_(), center.requires_grad_(), **TEMPS)
    assert not result.teacher_mean.requires_grad and not result.teacher_entropy.requires_grad
    result.loss.backward()
    assert teacher.grad is None and center.grad is None and student.grad is not None


def test_second_derivatives_are_refused():
    student, teacher, center = logits(3, 2, 50)
    loss = dino_loss(student.requires_grad_(), teacher, center, **TEMPS).loss
    (gradient,) = torch.autograd.grad(loss, student, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        gradient.square().sum().backward()


# --- the gradient in place of the logits ------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
@pytest.mark.parametrize("shape", [(2, 1, 1), (10, 3, 256), (4, 2, 2051), (10, 2, 65536)])
def test_in_place_gives_the_same_bits(shape, dtype, isa):
    student, teacher, center = logits(*shape, dtype)
    student.requires_grad_()
    elsewhere = dino_loss(student, teacher, center, **TEMPS, backend="native")
    expected = gradient_of(elsewhere.loss, student)
    overwritten = student.detach().clone().requires_grad_()
    result = dino_loss(overwritten, teacher, center, **TEMPS, inplace=True, backend="native")
    gradient = gradient_of(result.loss, overwritten)
    assert gradient.data_ptr() == overwritten.data_ptr()
    assert torch.equal(gradient, expected)
    assert all(torch.equal(a, b) for a, b in zip(result, elsewhere, strict=True))


def test_in_place_below_a_linear_layer():
    _, teacher, center = logits(5, 3, 300)
    x, weight = torch.randn(15, 8, requires_grad=True), torch.randn(300, 8, requires_grad=True)

    def gradients(inplace, upstream):
        student = torch.nn.functional.linear(x, weight).unflatten(0, (5, 3))
        loss = dino_loss(student, teacher, center, **TEMPS, inplace=inplace).loss
        return torch.autograd.grad(loss * upstream, (x, weight))

    for upstream in (1.0, 0.3):
        for ours, expected in zip(gradients(True, upstream), gradients(False, upstream), strict=True):
            assert torch.equal(ours, expected)


def test_in_place_is_refused_by_an_operation_that_kept_the_logits():
    _, teacher, center = logits(4, 2, 30)
    student = torch.randn(4, 2, 30, requires_grad=True).exp()  # its backward multiplies by its result
    loss = dino_loss(student, teacher, center, **TEMPS, inplace=True, backend="native").loss
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_in_place_leaves_the_logits_where_it_cannot_or_need_not():
    for dtype, wanted, transposed in (
        (torch.float16, True, False),
        (torch.float32, False, False),
        (torch.float32, True, True),
    ):
        student, teacher, center = logits(4, 2, 30, dtype)
        if transposed:
            student = student.transpose(0, 1).contiguous().transpose(0, 1)
        before = student.clone()
        student.requires_grad_(wanted)
        loss = dino_loss(student, teacher, center, **TEMPS, inplace=True).loss
        if wanted:
            loss.backward()
        assert torch.equal(student.detach(), before)


@pytest.mark.parametrize("what", ["the same crops", "a part", "the centre"])
def test_in_place_is_refused_where_it_would_overwrite_its_inputs(what):
    student, teacher, center = logits(5, 2, 30)
    student = student.clone()
    if what == "the same crops":
        teacher = student[:2]
    elif what == "a part":
        teacher = student.view(-1)[30 * 3 :][: 2 * 2 * 30].view(2, 2, 30)
    else:
        center = student[0, 0]
    before, expected = student.clone(), dino_loss(student, teacher, center, **TEMPS).loss
    student.requires_grad_()
    with pytest.raises(ValueError, match="share memory with the student's logits; give a copy"):
        dino_loss(student, teacher, center, **TEMPS, inplace=True)
    assert torch.equal(student, before)
    assert torch.equal(dino_loss(student, teacher, center, **TEMPS).loss, expected)
    with torch.no_grad():  # nothing is overwritten
        assert torch.equal(dino_loss(student, teacher, center, **TEMPS, inplace=True).loss, expected)


def test_in_place_beside_the_teacher_in_one_buffer():
    student, teacher, center = logits(5, 2, 30)
    both = torch.cat([teacher, student])
    expected = dino_loss(student.requires_grad_(), teacher, center, **TEMPS)
    found = dino_loss(both[2:].requires_grad_(), both[:2], center, **TEMPS, inplace=True)
    assert torch.equal(found.loss, expected.loss) and torch.equal(both[:2], teacher)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("upstream", [1.0, 1 / 3, 0.1, 0.7, 0.25, 65536.0])
def test_the_gradient_is_rounded_once_whatever_the_upstream_gradient(upstream, compiled, dtype):
    """As with gradients accumulated over 3 or 10 micro-batches; a second rounding makes the error 1.5 times eager's."""
    student, teacher, center = logits(10, 4, 1000, dtype)
    exact = exact_gradient(student, teacher, center, TEMPS) * upstream
    student.requires_grad_()
    functions = [
        lambda s: dino_loss(s, teacher, center, **TEMPS).loss * upstream,
        lambda s: dino_loss_reference(s, teacher, center, **TEMPS).loss * upstream,
    ]
    if compiled:
        functions[0] = torch.compile(functions[0], fullgraph=True, backend="aot_eager")
    ours, eager = ((gradient_of(f(student), student).double() - exact).norm().item() for f in functions)
    assert ours <= 1.01 * eager


@pytest.mark.parametrize("dtype", (*DTYPES, torch.float64), ids=str)
@pytest.mark.parametrize("differentiable", [False, True])
def test_opcheck(dtype, differentiable):
    student, teacher, center = logits(3, 2, 33, dtype)
    student.requires_grad_(differentiable)
    torch.library.opcheck(torch.ops.dino_fast.dino_loss, (student, teacher, center, 0.1, 0.04, differentiable))
    rows = torch.ops.dino_fast.dino_loss(student, teacher, center, 0.1, 0.04, False)[4].detach()
    arguments = (student.detach(), teacher, center, rows, torch.tensor(2.0, dtype=rows.dtype), 0.1, 0.04)
    torch.library.opcheck(torch.ops.dino_fast.dino_loss_gradient, arguments)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_compiles_without_a_break(dtype):
    student, teacher, center = logits(4, 2, 300, dtype)

    def step(weight, student):
        result = dino_loss(student * weight, teacher, center, **TEMPS)
        return result.loss * 3 + 0 * result.teacher_entropy

    gradients = []
    for function in (step, torch.compile(step, fullgraph=True)):
        weight = torch.ones((), dtype=dtype, requires_grad=True)
        leaf = student.clone().requires_grad_()
        function(weight, leaf).backward()
        gradients.append(leaf.grad)
    assert torch.allclose(gradients[0].float(), gradients[1].float(), rtol=1e-2, atol=1e-6)
    assert gradients[0].abs().max() > 0


# --- errors ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("student", "teacher", "center", "message"),
    [
        ((3, 2, 5), (2, 2, 6), (5,), r"same number of prototypes K.*\[3, 2, 5\].*\[2, 2, 6\]"),
        ((3, 2, 5), (2, 2, 5), (4,), "same number of prototypes K"),
        ((3, 2, 5), (2, 3, 5), (5,), "same number of images"),
        ((3, 2, 5), (3, 2, 5), (5,), "its first size is 2; got"),
        ((1, 2, 5), (2, 2, 5), (5,), "at least the two global crops"),
        ((6, 5), (4, 5), (5,), r"student logits are \[crops, images, K\]"),
        ((3, 2, 5), (2, 2, 5), (1, 5), r"the centre \[K\]"),
        ((3, 0, 5), (2, 0, 5), (5,), "nothing to average"),
        ((3, 2, 0), (2, 2, 0), (0,), "nothing to average"),
    ],
)
def test_shapes_that_disagree(student, teacher, center, message):
    with pytest.raises(ValueError, match=message):
        dino_loss(torch.zeros(student), torch.zeros(teacher), torch.zeros(center), **TEMPS)


def test_other_bad_arguments():
    student, teacher, center = logits(3, 2, 5)
    with pytest.raises(ValueError, match=r"teacher's dtype is torch.int64; accepted are float32, bfloat16"):
        dino_loss(student, teacher.long(), center, **TEMPS)
    with pytest.raises(ValueError, match="teacher is on meta but the student on cpu"):
        dino_loss(student, teacher.to("meta"), center, **TEMPS)
    with pytest.raises(ValueError, match="temperatures must be positive"):
        dino_loss(student, teacher, center, student_temp=0.1, teacher_temp=0.0)
    with pytest.raises(BackendError, match=r"not torch\.float64"):
        dino_loss(student.double(), teacher.double(), center.double(), **TEMPS, backend="native")


def test_environment_chooses_the_backend(monkeypatch):
    monkeypatch.setenv("DINO_FAST_BACKEND", "dino_loss=nothing")
    with pytest.raises(BackendError, match="no backend 'nothing'"):
        dino_loss(*logits(3, 2, 5), **TEMPS)
    monkeypatch.setenv("DINO_FAST_BACKEND", "reference")
    expected = dino_loss_reference(*logits(3, 2, 5), **TEMPS)
    assert torch.equal(dino_loss(*logits(3, 2, 5), **TEMPS).loss, expected.loss)
