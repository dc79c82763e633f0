"""Operation packed_attention: the reference against PyTorch's attention, every backend against float64."""

from __future__ import annotations

import functools

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from dino_fast.attention import packed_attention
from dino_fast.backends import BackendError
from dino_fast.ops.packed_attention import packed_attention_reference
from dino_fast.ops.packed_attention.by_length import by_length

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
BACKENDS = ("native", "sdpa", "reference")
LENGTHS = {
    "one sequence": [37],
    "one token each": [1, 1, 1],
    "equal": [37] * 4,
    "two groups side by side": [197, 197, *[37] * 8],
    "lengths that alternate": [5, 3, 5, 3, 9, 3],
    "empty ones between": [0, 4, 0, 0, 4, 0],
    "nothing at all": [],
}


def packed(lengths, H=2, d=32, dtype=torch.float32, seed=0, scale=1.0):
    generator = torch.Generator().manual_seed(seed)
    qkv = (scale * torch.randn(sum(lengths), 3, H, d, generator=generator)).to(dtype)
    upstream = torch.randn(sum(lengths), H, d, generator=generator).to(dtype)
    return qkv, ends(lengths), upstream


def ends(lengths):
    return torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)


def run(attention, qkv, cu_seqlens, upstream):
    """(output, gradient w.r.t. qkv) of attention(qkv, cu_seqlens)."""
    leaf = qkv.detach().clone().requires_grad_()
    out = attention(leaf, cu_seqlens)
    return out.detach(), torch.autograd.grad(out, leaf, upstream)[0]


def formula(q, k, v):
    return (q @ k.mT * q.shape[-1] ** -0.5).softmax(-1) @ v


# What eager PyTorch is for each backend. At large scores PyTorch's fused attention is several times less accurate than
# the formula in steps, which the kernels of our own are held to.
EAGER = {"native": formula, "sdpa": F.scaled_dot_product_attention, "reference": formula}


def eager(attention, qkv, cu_seqlens):
    """Attention of each sequence on its own, in qkv's own dtype."""
    outputs = []
    for sequence in qkv.tensor_split(cu_seqlens[1:-1].tolist()):
        q, k, v = sequence.permute(1, 2, 0, 3)[:, None]  # [1, H, L, d] each
        outputs.append(attention(q, k, v)[0].transpose(0, 1))
    return torch.cat(outputs)


def ours(backend, longest=1 << 20):
    return lambda qkv, cu_seqlens: packed_attention(qkv, cu_seqlens, longest, backend=backend)


def assert_accurate(backend, *draws):
    """Errors of the output and the gradient against float64, the largest over the draws, since one draw's may
    be small by luck: at most twice eager's plus 1e-6 (1 + |reference|), and for our kernels `rounding`."""
    for found, limit in errors(backend, *draws):
        assert found <= limit


def errors(backend, *draws):
    """(error, its limit) of the output and of the gradient."""
    found, limits = torch.zeros(2), torch.zeros(2)
    for qkv, cu_seqlens, upstream in draws:
        mine = run(ours(backend), qkv, cu_seqlens, upstream)
        if qkv.numel() == 0:
            assert mine[0].shape == upstream.shape
            continue
        exact = run(packed_attention_reference, qkv.double(), cu_seqlens, upstream.double())
        plain = run(functools.partial(eager, EAGER[backend]), qkv, cu_seqlens, upstream)
        for i, truth in enumerate(exact):
            found[i] = torch.maximum(found[i], (mine[i] - truth).abs().max())
            limit = 2 * (plain[i] - truth).abs().max() + 1e-6 * (1 + truth.abs().max())
            if backend == "native":
                limit += rounding(qkv, cu_seqlens, upstream)[i]
            limits[i] = torch.maximum(limits[i], limit)
    return zip(found, limits, strict=True)


def rounding(qkv, cu_seqlens, upstream):
    """How far the largest element of (output, gradient) may be off where few rows are compared with eager's luck.

    A sum of d float32 products is off by about sqrt(d) u sum |products|, u = 2^-24 (Higham & Mary 2019, SIAM J. Sci.
    Comput. 41, A2815). Scores that are off by e move the output by sum_j P_j e_j |v_j - out|. The scores' gradient is
    P (dP - D), dP = g V^T: eager takes D = sum_j P_j dP_j, so that where one P_j is nearly 1 the rounding of dP_j
    cancels; our kernels, as FlashAttention's, take D = g . out, rounded on its own. Carried on to q and k.
    """
    largest = torch.zeros(2, dtype=torch.float64)
    parts = (x.tensor_split(cu_seqlens[1:-1].tolist()) for x in (qkv.double(), upstream.double()))
    for sequence, g in zip(*parts, strict=True):
        if not len(sequence):
            continue
        q, k, v = sequence.permute(1, 2, 0, 3)  # [H, L, d] each
        g, d = g.transpose(0, 1), q.shape[-1]
        u = d**0.5 * 2**-24
        p = (q @ k.mT * d**-0.5).softmax(-1)
        out = p @ v
        off = p * u * (q.abs() @ k.abs().mT) * d**-0.5
        for row in range(len(sequence)):
            moved = off[:, None, row] @ (v - out[:, row, None]).abs()
            largest[0] = torch.maximum(largest[0], moved.max())
        off = p * u * (g.abs() @ v.abs().mT + (g * out).abs().sum(-1, keepdim=True))
        for of_input in (off @ k.abs(), off.mT @ q.abs()):
            largest[1] = torch.maximum(largest[1], of_input.max() * d**-0.5)
    return largest


# --- the reference --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
def test_reference_is_attention_of_each_sequence(lengths):
    qkv, cu_seqlens, _ = packed(lengths, dtype=torch.float64)
    out = packed_attention_reference(qkv, cu_seqlens)
    assert out.shape == (sum(lengths), 2, 32)
    for sequence, result in zip(qkv.split(lengths), out.split(lengths), strict=True):
        q, k, v = sequence.permute(1, 2, 0, 3)
        torch.testing.assert_close(result, F.scaled_dot_product_attention(q, k, v).transpose(0, 1))


def test_gradcheck():
    qkv, cu_seqlens, _ = packed([3, 1, 0, 3, 2], H=2, d=4, dtype=torch.float64)
    qkv.requires_grad_()
    assert torch.autograd.gradcheck(lambda x: packed_attention_reference(x, cu_seqlens), qkv)
    for backend in ("sdpa", "reference"):  # what takes float64
        assert torch.autograd.gradcheck(lambda x, name=backend: packed_attention(x, cu_seqlens, 3, backend=name), qkv)


# --- every backend --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
@pytest.mark.usefixtures("poisoned")
def test_is_as_good_as_eager(lengths, dtype, backend):
    assert_accurate(backend, *(packed(lengths, dtype=dtype, seed=seed) for seed in range(3)))


@settings(max_examples=30, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 70), min_size=1, max_size=6), H=st.integers(1, 3),
    d=st.sampled_from([8, 32, 48, 64, 80, 128]), dtype=st.sampled_from(DTYPES), seed=st.integers(0, 9),
    scale=st.sampled_from([1.0, 4.0]),
)  # fmt: skip
def test_drawn_lengths(lengths, H, d, dtype, seed, scale):
    for backend in BACKENDS:
        assert_accurate(backend, *(packed(lengths, H, d, dtype, 4 * seed + i, scale) for i in range(4)))


@pytest.mark.parametrize("backend", ["native", "sdpa"])
def test_a_long_sequence(backend):
    assert_accurate(backend, packed([1370, 16], d=64))


@pytest.mark.parametrize("d", [3, 16, 40])
@pytest.mark.usefixtures("isa")
def test_every_instruction_set(d):
    assert_accurate("native", *(packed([1, 15, 16, 17, 49, 100], 2, d, seed=seed) for seed in range(3)))


def test_any_number_of_threads_gives_the_same_bits():
    arguments = packed([65, 17, 17, 130, 2], H=3, d=48)
    results, before = [], torch.get_num_threads()
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            results.append(run(ours("native"), *arguments))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("lengths", [[9, 9, 9], [9, 4, 9]], ids=["adjacent", "apart"])
@pytest.mark.parametrize("backend", ["native", "sdpa"])
def test_strided_offset_and_transposed_inputs(lengths, backend):
    qkv, cu_seqlens, upstream = packed(lengths)
    wide = torch.full((sum(lengths) + 5, 3, 2, 50), float("nan"))
    wide[3:-2, :, :, 7:39] = qkv
    heads_first = qkv.permute(2, 1, 0, 3).contiguous().permute(2, 1, 0, 3)
    apart = qkv.mT.contiguous().mT  # the elements of a row do not lie side by side
    grad_apart = upstream.mT.contiguous().mT
    expected = run(ours("reference"), qkv, cu_seqlens, upstream)
    for same in (wide[3:-2, :, :, 7:39], heads_first, apart):
        for result, plain in zip(run_as_is(backend, same, cu_seqlens, grad_apart), expected, strict=True):
            torch.testing.assert_close(result, plain)


def run_as_is(backend, qkv, cu_seqlens, upstream):
    leaf = qkv.detach().requires_grad_()
    out = packed_attention(leaf, cu_seqlens, 64, backend=backend)
    return out.detach(), torch.autograd.grad(out, leaf, upstream)[0]


def test_neighbours_of_one_length_are_views_and_others_are_gathered():
    groups = {group.L: group for group in by_length(ends([5, 5, 3, 7, 0, 3]))}
    assert {L: group.n for L, group in groups.items()} == {5: 2, 3: 2, 7: 1}
    assert groups[5].rows is None and groups[7].rows is None
    assert groups[3].rows.tolist() == [10, 11, 12, 20, 21, 22]
    buffer = torch.arange(23.0)
    assert groups[5].read(buffer).data_ptr() == buffer.data_ptr()


def test_one_call_for_each_length(monkeypatch):
    """Ten sequences of two lengths are two calls of PyTorch's attention, forward and backward."""
    calls = []

    class Count(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            calls.append(function._schema.name.removeprefix("aten::"))
            return function(*args, **(kwargs or {}))

    from dino_fast.ops import packed_attention as operation

    qkv, cu_seqlens, upstream = packed([5, 3] * 5)
    with Count():
        out, statistics = operation.FORWARD["sdpa"](qkv, cu_seqlens, 5)
        operation.BACKWARD["sdpa"](upstream, qkv, cu_seqlens, out, statistics, 5)
    assert calls.count("_scaled_dot_product_flash_attention_for_cpu") == 2
    assert calls.count("_scaled_dot_product_flash_attention_for_cpu_backward") == 2


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("part", [0, 1, 2], ids=["q", "k", "v"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("lengths", [[5, 5, 5], [5, 4, 5]], ids=["adjacent", "apart"])
def test_what_is_not_finite_stays_in_its_sequence_and_shows(lengths, bad, part, backend):
    qkv, cu_seqlens, upstream = packed(lengths)
    clean = run(ours(backend), qkv, cu_seqlens, upstream)
    first, end = cu_seqlens[1], cu_seqlens[2]
    qkv[first + 2, part, 1, 3] = bad
    for result, before in zip(run(ours(backend), qkv, cu_seqlens, upstream), clean, strict=True):
        assert torch.equal(result[:first], before[:first]) and torch.equal(result[end:], before[end:])
        assert not result[first:end].isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_same_bits_twice(dtype):
    arguments = packed([197, 37, 37, 197, 37], H=3, d=64, dtype=dtype)
    first, second = run(ours("auto"), *arguments), run(ours("auto"), *arguments)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_gradients_accumulate_and_no_grad_records_nothing():
    qkv, cu_seqlens, upstream = packed([6, 4])
    leaf = qkv.clone().requires_grad_()
    for _ in range(2):
        packed_attention(leaf, cu_seqlens, 6).backward(upstream)
    torch.testing.assert_close(leaf.grad, 2 * run(ours("auto"), qkv, cu_seqlens, upstream)[1])
    with torch.no_grad():
        assert not packed_attention(leaf, cu_seqlens, 6).requires_grad


def test_autocast_takes_float32_as_pytorchs_attention_does():
    qkv, cu_seqlens, upstream = packed([6, 4])
    leaf = qkv.clone().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        out = packed_attention(leaf, cu_seqlens, 6)
    assert out.dtype == torch.bfloat16
    assert torch.equal(out, packed_attention(qkv.bfloat16(), cu_seqlens, 6))
    out.backward(upstream.bfloat16())
    assert leaf.grad.dtype == torch.float32 and leaf.grad.abs().max() > 0


# --- with PyTorch's own machinery -----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("lengths", [[5, 5], [5, 3, 5]], ids=["adjacent", "apart"])
def test_opcheck(lengths, dtype):
    qkv, cu_seqlens, upstream = packed(lengths, dtype=dtype)
    torch.library.opcheck(
        torch.ops.dino_fast.packed_attention_forward, (qkv.clone().requires_grad_(), cu_seqlens, 5, "auto")
    )
    out, statistics = torch.ops.dino_fast.packed_attention_forward(qkv, cu_seqlens, 5, "auto")
    arguments = (upstream, qkv, cu_seqlens, out, statistics, 5, "auto")
    torch.library.opcheck(torch.ops.dino_fast.packed_attention_backward, arguments)


def test_compiles_without_a_break():
    qkv, cu_seqlens, upstream = packed([7, 7, 5])

    def step(x, weight):
        return packed_attention((x * weight).view(-1, 3, 2, 32), cu_seqlens, 7) * 2

    results = []
    for function in (step, torch.compile(step, fullgraph=True)):
        weight = torch.full((), 1.5, requires_grad=True)
        out = function(qkv.flatten(1), weight)
        out.backward(upstream)
        results.append((out.detach(), weight.grad))
    for plain, compiled in zip(*results, strict=True):
        torch.testing.assert_close(plain, compiled)


def test_second_derivatives_are_refused():
    qkv, cu_seqlens, upstream = packed([4, 3])
    leaf = qkv.requires_grad_()
    (gradient,) = torch.autograd.grad(packed_attention(leaf, cu_seqlens, 4), leaf, upstream, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        gradient.sum().backward()


# --- errors ---------------------------------------------------------------------------------------------------------


def int32(*values):
    return torch.tensor(values, dtype=torch.int32)


@pytest.mark.parametrize(
    ("qkv", "cu_seqlens", "longest", "message"),
    [
        (torch.zeros(7, 96), int32(0, 7), 7, r"got \[7, 96\].*view\(tokens, 3, H, d\)"),
        (torch.zeros(7, 2, 1, 8), int32(0, 7), 7, r"qkv is \[tokens, 3,"),
        (torch.zeros(7, 3, 0, 8), int32(0, 7), 7, "at least one head"),
        (torch.zeros(7, 3, 1, 8, dtype=torch.int64), int32(0, 7), 7, "int64; accepted are float32"),
        (torch.zeros(7, 3, 1, 8), torch.tensor([0, 7]), 7, r"\.to\(torch\.int32\)"),
        (torch.zeros(7, 3, 1, 8), int32(0, 7)[None], 7, r"cu_seqlens is \[n \+ 1\]"),
        (torch.zeros(7, 3, 1, 8), int32(), 7, r"cu_seqlens is \[n \+ 1\]"),
        (torch.zeros(7, 3, 1, 8), int32(0, 6), 7, r"number of tokens, 7; got \[0, 6\]"),
        (torch.zeros(7, 3, 1, 8), int32(1, 7), 7, "begins with 0"),
        (torch.zeros(7, 3, 1, 8), int32(0, 5, 3, 7), 7, "never falls"),
        (torch.zeros(7, 3, 1, 8), int32(0, 7), 6, "longest sequence has 7 tokens, max_seqlen is 6"),
        (torch.zeros(7, 3, 1, 8), int32(0, 7), -1, "got -1"),
    ],
)
def test_what_does_not_fit_is_said(qkv, cu_seqlens, longest, message):
    with pytest.raises(ValueError, match=message):
        packed_attention(qkv, cu_seqlens, longest)


def test_another_device_and_an_unknown_backend_are_said():
    with pytest.raises(ValueError, match="cu_seqlens is on cpu but qkv on meta"):
        packed_attention(torch.zeros(7, 3, 1, 8, device="meta"), int32(0, 7), 7)
    with pytest.raises(BackendError, match=r"it has.*native, sdpa, reference"):
        packed_attention(torch.zeros(7, 3, 1, 8), int32(0, 7), 7, backend="vulkan")


def test_flop_counter_mode_sees_the_operation() -> None:
    """Two products of L x L x d a head forward, five backward, of each sequence alone; 2 operations each."""
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.utils.flop_counter import FlopCounterMode

    ends, H, d = torch.tensor([0, 5, 12], dtype=torch.int32), 2, 8
    qkv = torch.randn(12, 3, H, d, requires_grad=True)
    with FlopCounterMode(display=False) as counter:
        out = packed_attention(qkv, ends, 7)
        assert counter.get_total_flops() == 2 * 2 * (5**2 + 7**2) * H * d
        out.sum().backward()
    assert counter.get_total_flops() == 7 * 2 * (5**2 + 7**2) * H * d
    with FakeTensorMode(allow_non_fake_inputs=True) as fake, FlopCounterMode(display=False) as counter:
        packed_attention(fake.from_tensor(qkv.detach()), fake.from_tensor(ends), 7)
    assert counter.get_total_flops() == 2 * 2 * 12 * 7 * H * d
