"""matmul and linear against float64; the tile unit's kernels where this machine has one."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from dino_fast.backends import OPERATIONS, Backend, BackendError, choose
from dino_fast.ops.linear import matmul as module
from dino_fast.ops.linear.matmul import Norm, linear, matmul

amx = pytest.mark.skipif(
    module._unavailable_reason() is not None, reason=f"the backend amx: {module._unavailable_reason()}"
)


def _matrix(rows, columns, transposed, seed):
    generator = torch.Generator().manual_seed(seed)
    if transposed:
        return torch.randn(columns, rows, generator=generator).t()
    return torch.randn(rows, columns, generator=generator)


def _native(a, b, bias=None, add=False, out=None):
    """The kernel itself, for sizes that would be PyTorch's."""
    out = torch.full((a.shape[0], b.shape[1]), float("nan")) if out is None else out
    module._amx(a, b, bias, add, out)
    return out


def _error(result, a, b, rest=0):
    """Largest error, as a share of sum_k |a||b|, what rounding is proportional to."""
    want = a.double() @ b.double() + rest
    return ((result - want).abs() / (a.double().abs() @ b.double().abs() + 1e-30)).max().item()


# With K up to a few thousand, float32 sums of products are off by some 2^-24 of the sum of magnitudes.
LIMIT = 2.0**-22

SHAPES = [
    (1, 1, 1),
    (33, 40, 50),
    (16, 32, 16),
    (100, 300, 64),
    (64, 64, 700),
    (257, 129, 31),
    (900, 200, 1000),  # the smaller side in two slices
    (1500, 96, 40),
    (40, 96, 1500),
    (70, 5000, 90),  # K in slices
    (800, 4100, 300),  # in chunks, too
    (300, 4100, 800),
    (5, 70000, 3),
    (1100, 4500, 900),  # fewer slices, for their size
]


@amx
@pytest.mark.parametrize("transposed_b", [False, True])
@pytest.mark.parametrize("transposed_a", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_products(shape, transposed_a, transposed_b):
    M, K, N = shape
    a, b = _matrix(M, K, transposed_a, 0), _matrix(K, N, transposed_b, 1)
    bias = torch.randn(N)
    assert _error(_native(a, b), a, b) < LIMIT
    assert _error(_native(a, b, bias), a, b, bias.double()) < LIMIT + 2.0**-23
    before = torch.randn(M, N)
    assert _error(_native(a, b, add=True, out=before.clone()), a, b, before.double()) < LIMIT + 2.0**-23


@amx
@settings(max_examples=40, deadline=None)
@given(st.integers(1, 90), st.integers(1, 200), st.integers(1, 90), st.booleans(), st.booleans(), st.integers(0, 99))
def test_products_of_any_shape(M, K, N, transposed_a, transposed_b, seed):
    a, b = _matrix(M, K, transposed_a, seed), _matrix(K, N, transposed_b, seed + 1)
    assert _error(_native(a, b), a, b) < LIMIT


@amx
@pytest.mark.parametrize("n", [31, 64, 5000])
def test_every_bit_of_a_number_takes_part(n):
    """By the unit matrix nothing may be lost: all 24 bits of each number, in all three parts."""
    a = torch.randn(50, n) * 10.0 ** torch.randint(-20, 20, (50, n))
    assert torch.equal(_native(a, torch.eye(n)), a)
    assert torch.equal(_native(torch.eye(n), a.t()), a.t())


@amx
def test_as_exact_as_torch():
    for M, K, N in [(256, 192, 768), (256, 4096, 256), (640, 2048, 300)]:
        a, b = torch.randn(M, K), torch.randn(K, N)
        want = a.double() @ b.double()
        ours, theirs = ((x - want).square().mean().sqrt().item() for x in (_native(a, b), a @ b))
        assert ours < 1.5 * theirs


@amx
@pytest.mark.parametrize("shape", [(900, 200, 1000), (800, 4100, 300), (4096, 192, 192)])
def test_threads_change_nothing(shape):
    M, K, N = shape
    threads = torch.get_num_threads()
    for transposed in (False, True):
        a, b = _matrix(M, K, transposed, 3), _matrix(K, N, not transposed, 4)
        try:
            results = []
            for count in (1, 2, 3, 7):
                torch.set_num_threads(count)
                results.append(_native(a, b))
        finally:
            torch.set_num_threads(threads)
        assert all(torch.equal(result, results[0]) for result in results)


@amx
def test_parts_of_larger_matrices():
    whole = torch.full((300, 400), 7.0)
    out = whole[10:210, 50:350]
    a, b = torch.randn(250, 140)[20:220, 30:130], torch.randn(128, 350)[4:104, 20:320]
    assert _error(_native(a, b, out=out), a, b) < LIMIT
    assert (
        (whole[:10] == 7).all()
        and (whole[210:] == 7).all()
        and (whole[:, :50] == 7).all()
        and (whole[:, 350:] == 7).all()
    )


@amx
def test_what_is_not_finite_stays_so_and_stays_in_its_row():
    a, b = torch.randn(100, 64), torch.randn(64, 80)
    a[3, 5], a[40, 60] = float("nan"), float("inf")
    result = _native(a, b)
    bad = ~result.isfinite()
    assert bad[3].all() and bad[40].all() and bad.any(1).sum() == 2


def test_out_that_does_not_fit_is_refused_by_every_backend():
    a, b, base = torch.ones(4, 5), torch.ones(5, 6), torch.zeros(100)
    for out in (
        torch.zeros(4, 5),
        torch.zeros(24),
        torch.zeros(0),  # which torch.mm would resize
        torch.zeros(4, 6, dtype=torch.float64),
        torch.zeros(4, 6, device="meta"),
        base[:6].expand(4, 6),
        base.as_strided((4, 6), (5, 1)),
        base.as_strided((4, 6), (1, 3)),
    ):
        with pytest.raises(ValueError, match=r"matmul: .*out"):
            matmul(a, b, out=out)
    for out in (base.as_strided((4, 6), (8, 1)), base.as_strided((4, 6), (2, 9)), base.as_strided((1, 6), (0, 1))):
        torch.testing.assert_close(matmul(a[: len(out)], b, out=out), torch.full((len(out), 6), 5.0))


def test_out_that_is_an_operand_too_is_refused():
    base = torch.randn(12, 6)
    for a, b, bias, out in (
        (base[:6], base[6:], None, base[:6]),
        (base[:6], base[6:], None, base[3:9]),
        (torch.ones(6, 6), base[6:], None, base[5:11]),
        (torch.ones(6, 6), torch.ones(6, 6), base[3], base[:6]),
    ):
        with pytest.raises(ValueError, match="matmul: out shares memory with"):
            matmul(a, b, bias, out=out)
    torch.testing.assert_close(matmul(base[:4], torch.ones(6, 6), out=base[4:8]), base[:4] @ torch.ones(6, 6))


def test_add_needs_something_to_add_to_and_takes_no_bias():
    a = torch.ones(4, 4)
    with pytest.raises(ValueError, match="give out"):
        matmul(a, a, add=True)
    with pytest.raises(ValueError, match="no bias"):
        matmul(a, a, a[0], out=torch.zeros(4, 4), add=True)


def test_choice():
    big, small = torch.empty(4096, 192), torch.empty(8, 192)
    weight = torch.empty(192, 768)
    assert choose("matmul", small, weight) == "reference"
    assert choose("matmul", big.double(), weight.double()) == "reference"
    assert choose("matmul", big, weight) == ("reference" if module._unavailable_reason() else "amx")
    with pytest.raises(BackendError, match="too little" if module._unavailable_reason() is None else "AMX"):
        choose("matmul", small, weight, backend="amx")


def test_a_machine_without_the_unit_says_so(monkeypatch):
    reason = "this processor has no AMX"
    backends = tuple(
        Backend(b.name, (lambda: reason) if b.name == "amx" else b.unavailable_reason, b.unsupported_reason)
        for b in OPERATIONS["matmul"]
    )
    monkeypatch.setitem(OPERATIONS, "matmul", backends)
    a, b, bias = torch.randn(4096, 192), torch.randn(192, 768), torch.randn(768)
    assert choose("matmul", a, b) == "reference"
    assert torch.equal(matmul(a, b, bias), torch.addmm(bias, a, b))
    out = torch.ones(4096, 768)
    assert torch.equal(matmul(a, b, out=out, add=True), torch.addmm(torch.ones(4096, 768), a, b))
    with pytest.raises(BackendError, match=reason):
        choose("matmul", a, b, backend="amx")


@pytest.mark.parametrize("shape", [(4096, 192, 768), (10, 12, 14)])
def test_linear_and_its_gradients(shape):
    rows, width, out = shape
    x, weight, bias = torch.randn(rows, width), torch.randn(out, width), torch.randn(out)
    upstream = torch.randn(rows, out)
    mine = [t.clone().requires_grad_() for t in (x, weight, bias)]
    exact = [t.double().requires_grad_() for t in (x, weight, bias)]
    result = linear(*mine)
    result.backward(upstream)
    want = F.linear(*exact)
    want.backward(upstream.double())
    for ours, theirs in zip([result, *(t.grad for t in mine)], [want, *(t.grad for t in exact)], strict=True):
        torch.testing.assert_close(ours.double(), theirs, rtol=1e-5, atol=1e-5 * theirs.abs().max().item())
    assert mine[1].grad.is_contiguous()


@pytest.mark.parametrize("wanted", [(True, False, False), (False, True, False), (False, False, True)])
def test_linear_makes_the_gradients_that_are_wanted(wanted):
    tensors = [torch.randn(4096, 192), torch.randn(768, 192), torch.randn(768)]
    for t, w in zip(tensors, wanted, strict=True):
        t.requires_grad_(w)
    linear(*tensors).sum().backward()
    assert [t.grad is not None for t in tensors] == list(wanted)


def test_linear_of_more_axes_and_without_bias():
    x, weight = torch.randn(16, 300, 192), torch.randn(768, 192)
    torch.testing.assert_close(linear(x, weight), F.linear(x, weight), rtol=1e-4, atol=1e-4)
    assert linear(x[0, 0], weight).shape == (768,)


def test_linear_under_autocast_compile_and_functional_transforms():
    x, weight, bias = torch.randn(4096, 192), torch.randn(768, 192), torch.randn(768)
    with torch.autocast("cpu", torch.bfloat16):
        assert linear(x, weight, bias).dtype == torch.bfloat16
    compiled = torch.compile(linear, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x, weight, bias), F.linear(x, weight, bias))
    grad_sum = torch.func.grad(lambda w: linear(x, w, bias).sum())(weight)
    torch.testing.assert_close(grad_sum, x.sum(0).expand(768, -1), rtol=1e-4, atol=1e-3)


def linear_after_norm(x, weight, bias, gain, shift):
    return linear(x, weight, bias, Norm(gain, shift, 1e-3))


@pytest.mark.parametrize("shape", [(4096, 192, 768), (10, 12, 14)])
def test_linear_of_a_layer_norm(shape):
    rows, width, out = shape
    shapes = ((rows, width), (out, width), (out,), (width,), (width,))
    mine = [torch.randn(s, requires_grad=True) for s in shapes]
    exact = [t.detach().double().requires_grad_() for t in mine]
    result, want = linear_after_norm(*mine), F.linear(F.layer_norm(exact[0], (width,), *exact[3:], 1e-3), *exact[1:3])
    with torch.no_grad():
        assert torch.equal(linear_after_norm(*mine), result)
    upstream = torch.randn(rows, out)
    found = torch.autograd.grad(result, mine, upstream)
    for ours, theirs in zip(found, torch.autograd.grad(want, exact, upstream.double()), strict=True):
        torch.testing.assert_close(ours.double(), theirs, rtol=1e-5, atol=1e-5 * theirs.abs().max().item())
    small = [t.detach()[:9].requires_grad_() if t.ndim == 2 and len(t) == rows else t for t in exact]
    if rows < 100:
        assert torch.autograd.gradcheck(linear_after_norm, small)


@pytest.mark.parametrize("wanted", range(5))
def test_one_gradient_alone_of_a_layer_norm(wanted):
    tensors = [torch.randn(s, dtype=torch.float64) for s in ((10, 12), (14, 12), (14,), (12,), (12,))]
    tensors[wanted].requires_grad_()
    linear_after_norm(*tensors).sum().backward()
    want = F.linear(F.layer_norm(tensors[0], (12,), *tensors[3:], 1e-3), *tensors[1:3])
    torch.testing.assert_close(tensors[wanted].grad, torch.autograd.grad(want.sum(), tensors[wanted])[0])


def test_the_rows_of_a_layer_norm_are_not_kept():
    kept = []
    tensors = [torch.randn(s, requires_grad=True) for s in ((10, 12), (14, 12), (14,), (12,), (12,))]
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        linear_after_norm(*tensors)
    known = {t.data_ptr() for t in tensors}
    assert kept and all(t.data_ptr() in known for t in kept)


def test_linear_of_a_layer_norm_elsewhere():
    x, weight, bias, gain, shift = (torch.randn(s) for s in ((2, 5, 12), (14, 12), (14,), (12,), (12,)))
    want = F.linear(F.layer_norm(x, (12,), gain, shift, 1e-3), weight, bias)
    torch.testing.assert_close(linear_after_norm(x.requires_grad_(), weight, bias, gain, shift), want)
    compiled = torch.compile(linear_after_norm, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x[0], weight, bias, gain, shift), want[0])
    with torch.autocast("cpu", torch.bfloat16):
        assert linear_after_norm(x[0], weight, bias, gain, shift).dtype == torch.bfloat16
