"""The Triton kernels of packed_attention under the interpreter, on CPU tensors. Run by test_packed_attention.py, in a
process of its own, because TRITON_INTERPRET must be set before Triton is imported. float32 and float16: a bfloat16
product is wrong there."""

from __future__ import annotations

import os

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dino_fast.backends import BackendError, choose
from dino_fast.gpu import INTERPRETED
from dino_fast.kernels import packed_attention as kernels
from dino_fast.ops.packed_attention import packed_attention, packed_attention_reference


def packed(lengths, H=2, d=32, seed=0, scale=1.0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    qkv = (scale * torch.randn(sum(lengths), 3, H, d, generator=generator)).to(dtype)
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    return qkv, cu_seqlens, torch.randn(sum(lengths), H, d, generator=generator).to(dtype), max(lengths, default=0)


def differentiated(attention, qkv, upstream):
    """(output, gradient by qkv)"""
    leaf = qkv.detach().requires_grad_()
    out = attention(leaf)
    return out.detach(), torch.autograd.grad(out, leaf, upstream)[0]


def run(qkv, cu_seqlens, upstream, longest):
    return differentiated(lambda x: packed_attention(x, cu_seqlens, longest, backend="triton"), qkv, upstream)


def in_steps(qkv, cu_seqlens, upstream):
    """The formula, sequence by sequence, in qkv's own dtype."""

    def attention(x):
        outputs = []
        for sequence in x.tensor_split(cu_seqlens[1:-1].tolist()):
            q, k, v = sequence.permute(1, 2, 0, 3)  # [H, L, d] each
            outputs.append(((q @ k.mT * q.shape[-1] ** -0.5).softmax(-1) @ v).transpose(0, 1))
        return torch.cat(outputs)

    return differentiated(attention, qkv, upstream)


def rounding_of_scores(qkv, cu_seqlens):
    """How far an output moves where each score x = q . k / sqrt(d) is rounded: a product of d terms added up in some
    order is off by eps |x|, a probability by that share of itself, and sum p v by 2 eps max |x| sum p |v - out|."""
    eps, largest = torch.finfo(torch.float32).eps, 0.0
    for sequence in qkv.double().tensor_split(cu_seqlens[1:-1].tolist()):
        q, k, v = sequence.permute(1, 2, 0, 3)  # [H, L, d] each
        if k.shape[1] == 0:
            continue
        x = q @ k.mT * q.shape[-1] ** -0.5
        p = x.softmax(-1)
        apart = (v[:, None] - (p @ v)[:, :, None]).abs()  # [H, L, L, d]
        moved = 2 * eps * x.abs().amax(-1, keepdim=True) * (p[..., None] * apart).sum(2)
        largest = max(largest, moved.max().item())
    return largest


def assert_as_good_as_eager(*draws):
    """The largest errors over the draws against float64: at most twice eager's plus 1e-6 (1 + |reference|). An output
    may also be off by what the rounding of its scores makes: eager's own, where keys tie, is a matter of luck."""
    found, limits = torch.zeros(2), torch.zeros(2)
    for draw in draws:
        qkv, cu_seqlens, upstream, _ = draw
        exact = differentiated(lambda x: packed_attention_reference(x, cu_seqlens), qkv.double(), upstream.double())  # noqa: B023
        for i, (ours, eager, truth) in enumerate(zip(run(*draw), in_steps(*draw[:3]), exact, strict=True)):
            assert ours.isfinite().all()
            found[i] = torch.maximum(found[i], (ours - truth).abs().max())
            limits[i] = max(limits[i], 2 * (eager - truth).abs().max() + 1e-6 * (1 + truth.abs().max()))
        limits[0] = max(limits[0], rounding_of_scores(qkv, cu_seqlens))
    assert (found <= limits).all(), (found, limits)


@pytest.fixture(autouse=True)
def poisoned():
    """What a kernel forgets to write is NaN."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory and torch.empty(64).isnan().all()
    yield
    torch.use_deterministic_algorithms(before)


def test_interpreted():
    assert os.environ["TRITON_INTERPRET"] == "1"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize(
    ("lengths", "d"),
    [
        ([1], 32),
        ([37, 37, 37], 64),
        ([16, 0, 5, 0], 128),  # empty sequences
        ([197, 37], 64),  # the crops of a training step
        ([64], 32),  # exactly one tile
        ([65, 3], 32),  # one past it
        ([256], 32),  # the longest whose keys stay on chip in 16 bits
        ([257], 16),  # one past it
        ([37, 20], 48),  # a width that is no power of two
        ([70, 9], 8),  # less than a tile's least
    ],
)
def test_is_as_good_as_eager(lengths, d, dtype):
    assert_as_good_as_eager(
        *(packed(lengths, d=d, seed=seed, dtype=dtype) for seed in range(1 if max(lengths) > 128 else 2))
    )


@settings(max_examples=6, deadline=None)
@given(
    lengths=st.lists(st.one_of(st.integers(0, 40), st.integers(60, 75)), min_size=1, max_size=3), H=st.integers(1, 2),
    d=st.sampled_from([16, 32, 64, 80, 128]), dtype=st.sampled_from([torch.float32, torch.float16]),
    seed=st.integers(0, 9),
)  # fmt: skip
def test_drawn_lengths(lengths, H, d, dtype, seed):
    if sum(lengths):
        assert_as_good_as_eager(*(packed(lengths, H, d, 2 * seed + i, dtype=dtype) for i in range(2)))


def test_a_long_sequence():
    assert_as_good_as_eager(packed([1370, 16], H=1, d=32, dtype=torch.float16))


def test_more_short_sequences_than_one_program_takes(monkeypatch):
    monkeypatch.setattr(kernels, "ENOUGH_PROGRAMS", 1 / INTERPRETED.multiprocessors)
    assert kernels.grid("short", kernels.Tile(64), 11, 2, 37)[2] == kernels.CROPS
    assert_as_good_as_eager(packed([5, 37, 0, 9, 16, 1, 3, 2, 0, 4, 7]))


def test_whole_sequences_in_float32(monkeypatch):
    """The way of 16 bits, without their rounding."""
    tile = kernels.Tile(32, 32, kernels.WHOLE)
    monkeypatch.setitem(kernels.FORWARD_TILES, (4, 32, "whole"), (tile,))
    assert kernels.tiles(100, 32, 4)[0] == "whole"
    assert_as_good_as_eager(*(packed([100, 33], H=1, seed=seed) for seed in range(2)))


@pytest.mark.parametrize("lengths", [[40, 7], [80, 7]])
def test_large_scores(lengths):
    assert_as_good_as_eager(*(packed(lengths, scale=4.0, seed=seed) for seed in range(4)))


def test_scores_of_ten_thousand():
    """One key of a row's is far above the others: its probability is 1 and the others' 0, without overflow."""
    assert_as_good_as_eager(*(packed([40, 7, 66], H=1, scale=50.0, seed=seed) for seed in range(4)))


def test_same_bits_twice():
    first, second = run(*packed([40, 7, 70])), run(*packed([40, 7, 70]))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("part", [0, 1, 2], ids=["q", "k", "v"])
@pytest.mark.parametrize("lengths", [[9, 9, 9], [9, 90, 9]], ids=["short", "tiles"])
def test_what_is_not_finite_stays_in_its_sequence_and_shows(lengths, part, bad):
    qkv, cu_seqlens, *rest = packed(lengths)
    clean = run(qkv, cu_seqlens, *rest)
    first, end = cu_seqlens[1], cu_seqlens[2]
    qkv[first + 2, part, 1, 3] = bad
    for result, before in zip(run(qkv, cu_seqlens, *rest), clean, strict=True):
        assert torch.equal(result[:first], before[:first]) and torch.equal(result[end:], before[end:])
        assert not result[first:end].isfinite().all()


def test_strided_offset_and_transposed_inputs():
    lengths = [9, 40]
    qkv, cu_seqlens, upstream, longest = packed(lengths)
    expected = run(qkv, cu_seqlens, upstream, longest)
    wide = torch.full((sum(lengths) + 5, 3, 2, 50), float("nan"))
    wide[3:-2, :, :, 7:39] = qkv
    heads_first = qkv.permute(2, 1, 0, 3).contiguous().permute(2, 1, 0, 3)
    apart, grad_apart = qkv.mT.contiguous().mT, upstream.mT.contiguous().mT
    grad_heads_first = upstream.transpose(0, 1).contiguous().transpose(0, 1)
    for same in (wide[3:-2, :, :, 7:39], heads_first, apart):
        for grad in (upstream, grad_apart, grad_heads_first):
            for result, plain in zip(run(same, cu_seqlens, grad, longest), expected, strict=True):
                assert torch.equal(result, plain)


def test_nothing_at_all():
    out, gradient = run(*packed([]))
    assert out.shape == (0, 2, 32) and gradient.shape == (0, 3, 2, 32)


def test_a_longest_length_that_is_too_large_changes_nothing():
    qkv, cu_seqlens, upstream, _ = packed([40, 20])
    for result, plain in zip(run(qkv, cu_seqlens, upstream, 1000), run(qkv, cu_seqlens, upstream, 40), strict=True):
        torch.testing.assert_close(result, plain, rtol=1e-5, atol=1e-6)


def test_opcheck():
    qkv, cu_seqlens, upstream, longest = packed([5, 3, 5])
    arguments = (qkv.clone().requires_grad_(), cu_seqlens, longest, "triton")
    torch.library.opcheck(torch.ops.dino_fast.packed_attention_forward, arguments)
    out, statistics = torch.ops.dino_fast.packed_attention_forward(qkv, cu_seqlens, longest, "triton")
    arguments = (upstream, qkv, cu_seqlens, out, statistics, longest, "triton")
    torch.library.opcheck(torch.ops.dino_fast.packed_attention_backward, arguments)


def test_compiles_without_a_break():
    qkv, cu_seqlens, upstream, longest = packed([7, 7, 5])

    def step(x, weight):
        return packed_attention((x * weight).view(-1, 3, 2, 32), cu_seqlens, longest, backend="triton") * 2

    results = []
    for function in (step, torch.compile(step, fullgraph=True, backend="aot_eager")):
        weight = torch.full((), 1.5, requires_grad=True)
        out = function(qkv.flatten(1), weight)
        out.backward(upstream)
        results.append((out.detach(), weight.grad))
    for plain, compiled in zip(*results, strict=True):
        torch.testing.assert_close(plain, compiled)


def test_autocast_no_grad_and_gradients_that_accumulate():
    qkv, cu_seqlens, upstream, longest = packed([6, 4])
    with torch.autocast("cpu", torch.float16):
        out = packed_attention(qkv, cu_seqlens, longest, backend="triton")
    assert torch.equal(out, packed_attention(qkv.half(), cu_seqlens, longest, backend="triton"))
    leaf = qkv.clone().requires_grad_()
    with torch.no_grad():
        assert not packed_attention(leaf, cu_seqlens, longest, backend="triton").requires_grad
    for _ in range(2):
        packed_attention(leaf, cu_seqlens, longest, backend="triton").backward(upstream)
    assert torch.equal(leaf.grad, 2 * run(qkv, cu_seqlens, upstream, longest)[1])


def test_says_what_it_does_not_take(monkeypatch):
    for qkv, reason in (
        (torch.zeros(4, 3, 1, 32, dtype=torch.float64), r"not torch\.float64"),
        (torch.zeros(4, 3, 1, 129), "at most 128 elements, not 129"),
    ):
        with pytest.raises(BackendError, match=reason):
            packed_attention(qkv, torch.tensor([0, 4], dtype=torch.int32), 4, backend="triton")
    assert choose("packed_attention", torch.zeros(4, 3, 1, 32), 4) == "triton"
    monkeypatch.delenv("TRITON_INTERPRET")
    with pytest.raises(BackendError, match="runs on CUDA"):
        packed_attention(torch.zeros(4, 3, 1, 32), torch.tensor([0, 4], dtype=torch.int32), 4, backend="triton")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("lengths", [[37, 5], [197, 37, 0], [300, 37]])
def test_operations_and_bytes_are_those_of_the_formulas(lengths, dtype, monkeypatch):
    """Counted where the interpreter multiplies, loads and stores; the ends of the sequences are loaded elsewhere."""
    from triton.runtime import interpreter

    counted = {"flops": 0, "bytes": 0}
    builder = interpreter.InterpreterBuilder
    dot, load, store = builder.create_dot, builder.create_masked_load, builder.create_masked_store
    H, d = 2, 64
    qkv, cu_seqlens, upstream, longest = packed(lengths, H, d, dtype=dtype)

    def counting_dot(self, a, b, *rest):
        counted["flops"] += 2 * a.data.shape[0] * a.data.shape[1] * b.data.shape[1]
        return dot(self, a, b, *rest)

    def counting_load(self, pointers, mask, *rest):
        result = load(self, pointers, mask, *rest)
        if result.data.size > 1:  # not an end of a sequence
            counted["bytes"] += int(mask.data.sum()) * result.data.itemsize
        return result

    def counting_store(self, pointers, value, mask, *rest):
        counted["bytes"] += int(mask.data.sum()) * value.data.itemsize
        return store(self, pointers, value, mask, *rest)

    monkeypatch.setattr(builder, "create_dot", counting_dot)
    monkeypatch.setattr(builder, "create_masked_load", counting_load)
    monkeypatch.setattr(builder, "create_masked_store", counting_store)
    flops = kernels.flops(lengths, H, d, qkv.element_size())
    moved = kernels.bytes_moved(lengths, H, d, qkv.element_size())
    out, statistics = torch.ops.dino_fast.packed_attention_forward(qkv, cu_seqlens, longest, "triton")
    assert counted == {"flops": flops["forward"], "bytes": moved["forward"]}
    counted.update(flops=0, bytes=0)
    torch.ops.dino_fast.packed_attention_backward(upstream, qkv, cu_seqlens, out, statistics, longest, "triton")
    assert counted == {"flops": flops["backward"], "bytes": moved["backward"]}
