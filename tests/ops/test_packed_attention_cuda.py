"""packed_attention through other people's GPU kernels: the calls, on tensors without memory, and what runs on a GPU."""

from __future__ import annotations

import functools
import itertools
import sys
import types

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from dino_fast import backends, gpu
from dino_fast.attention import packed_attention
from dino_fast.backends import OPERATIONS, choose
from dino_fast.ops import packed_attention as operation
from dino_fast.ops.packed_attention import by_length as lengths_of
from dino_fast.ops.packed_attention import cuda as peers
from dino_fast.ops.packed_attention import packed_attention_reference

on_a_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


def packed(lengths, H=2, d=32, dtype=torch.float32, device="cpu"):
    generator = torch.Generator().manual_seed(0)
    qkv = torch.randn(sum(lengths), 3, H, d, generator=generator).to(device, dtype)
    upstream = torch.randn(sum(lengths), H, d, generator=generator).to(device, dtype)
    return qkv, torch.tensor([0, *lengths]).cumsum(0).to(device, torch.int32), upstream


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_varlen_is_called_as_pytorch_declares_it(dtype):
    with FakeTensorMode():
        qkv, grad = (torch.empty(100, *shape, 6, 64, dtype=dtype, device="cuda") for shape in ((3,), ()))
        cu_seqlens = torch.empty(4, dtype=torch.int32, device="cuda")
        out, statistics = peers.varlen(qkv, cu_seqlens, 37)
        assert out.shape == grad.shape and statistics.shape == (2, 6, 100) and statistics.dtype == torch.float32
        gradient = peers.varlen_backward(grad, qkv, cu_seqlens, out, statistics, 37)
        assert gradient.shape == qkv.shape and gradient.dtype == dtype


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_sdpa_is_called_as_pytorch_declares_it(dtype, monkeypatch):
    monkeypatch.setattr(gpu, "chip", lambda device: gpu.INTERPRETED)
    with FakeTensorMode():
        q, k, v = torch.empty(5, 37, 3, 6, 64, dtype=dtype, device="cuda").permute(2, 0, 3, 1, 4).unbind(0)
        out, logsumexp = peers.sdpa(q, k, v)
        assert out.shape == q.shape and logsumexp.shape == (5, 6, 37) and logsumexp.dtype == torch.float32
        gradients = peers.sdpa_backward(torch.empty_like(out), q, k, v, out, logsumexp)
        assert [g.shape for g in gradients] == [q.shape] * 3


def test_xformers_is_called_with_one_packed_row(monkeypatch):
    """Its two functions in terms of the definition: forward gives [1, H, tokens] logarithms."""
    lengths = [5, 3, 5]
    qkv, cu_seqlens, upstream = packed(lengths)

    def parts(x):
        return [part.transpose(0, 1)[None] for part in x[0].split(lengths)]  # [1, H, L, d] each

    def forward(q, k, v, attn_bias):
        results = [lengths_of.math(*some) for some in zip(parts(q), parts(k), parts(v), strict=True)]
        out = torch.cat([out[0].transpose(0, 1) for out, _ in results])
        return out[None], torch.cat([logsumexp for _, logsumexp in results], -1)

    def backward(grad, out, lse, q, k, v, attn_bias):
        rows = zip(parts(grad), parts(q), parts(k), parts(v), parts(out), lse.split(lengths, -1), strict=True)
        found = [lengths_of.math_backward(*row) for row in rows]
        return tuple(torch.cat([g[0].transpose(0, 1) for g in column])[None] for column in zip(*found, strict=True))

    mask = types.SimpleNamespace(
        BlockDiagonalMask=types.SimpleNamespace(from_seqlens=lambda got: got == lengths or 1 / 0)
    )
    fmha = types.SimpleNamespace(
        memory_efficient_attention_forward_requires_grad=forward, memory_efficient_attention_backward=backward,
        attn_bias=mask,
    )  # fmt: skip
    ops = types.ModuleType("xformers.ops")
    ops.fmha = fmha
    package = types.ModuleType("xformers")
    package.ops = ops
    monkeypatch.setitem(sys.modules, "xformers", package)
    monkeypatch.setitem(sys.modules, "xformers.ops", ops)
    out, statistics = peers.xformers(qkv, cu_seqlens, 5)
    expected, expected_statistics = operation.FORWARD["reference"](qkv, cu_seqlens, 5)
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(statistics, expected_statistics)
    gradient = peers.xformers_backward(upstream, qkv, cu_seqlens, out, statistics, 5)
    expected = operation.BACKWARD["reference"](upstream, qkv, cu_seqlens, out, statistics, 5)
    torch.testing.assert_close(gradient, expected)


def test_what_they_do_not_take_is_said():
    with FakeTensorMode():
        single = torch.empty(10, 3, 1, 32, device="cuda")
        assert "float32" in peers.varlen_unsupported_reason(single)
        odd = torch.empty(10, 3, 1, 36, device="cuda", dtype=torch.float16)
        assert "multiple of 8" in peers.varlen_unsupported_reason(odd)
        assert "multiple of 8" in peers.sdpa_unsupported_reason(odd)
        assert "float64" in peers.sdpa_unsupported_reason(single.double())
    assert "runs on CUDA" in peers.varlen_unsupported_reason(torch.empty(0))


def test_the_longest_sequence_decides_on_a_gpu(monkeypatch):
    """Without a measurement the kernel here up to 1370 tokens; with one, what it says for this GPU."""
    with FakeTensorMode():
        qkv = torch.empty(10, 3, 1, 32, device="cuda", dtype=torch.float16)
        assert [operation._fastest(qkv, n) for n in (1, 1370, 1371, 10**6)] == ["triton", "triton", "varlen", "varlen"]
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "some GPU")
        assert "guess" in operation._explain()
        monkeypatch.setitem(operation.MEASURED, "some GPU", ((64, "varlen"), (1 << 31, "triton")))
        assert [operation._fastest(qkv, n) for n in (64, 65)] == ["varlen", "triton"]
        assert operation._explain() == (
            "on a GPU, by the longest sequence: varlen up to 64 tokens, then triton (measured on some GPU)"
        )
        # What is fastest cannot always run: float32 goes on to the next.
        monkeypatch.setattr(gpu, "chip", lambda device: gpu.INTERPRETED)
        chosen = {dtype: choose("packed_attention", qkv.to(dtype), 37) for dtype in (torch.float16, torch.float64)}
        assert chosen == {torch.float16: "varlen", torch.float64: "reference"}
    backends.triton_unavailable_reason.cache_clear()  # it was asked with a GPU
    assert operation._fastest(torch.empty(0), 37) is None  # on a CPU the order of registration


LENGTHS = ([37] * 9, [17, 0, 5], [197, 197, 37, 37], [257, 16], [1370, 37])


@pytest.mark.gpu
@on_a_gpu
@pytest.mark.parametrize("backend", ["triton", "varlen", "xformers", "sdpa", "reference"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_is_as_good_as_eager_on_a_gpu(dtype, backend):
    if reason := _cannot(backend, torch.empty(1, 3, 1, 64, dtype=dtype, device="cuda"), 37):
        pytest.skip(reason)

    def run(attention, x, up):
        leaf = x.detach().requires_grad_()
        out = attention(leaf)
        return out.detach(), torch.autograd.grad(out, leaf, up)[0]

    def in_steps(x, lengths):
        outputs = []
        for sequence in x.split(lengths):
            q, k, v = sequence.permute(1, 2, 0, 3)
            outputs.append(((q @ k.mT * q.shape[-1] ** -0.5).softmax(-1) @ v).transpose(0, 1))
        return torch.cat(outputs)

    for lengths, d in itertools.product(LENGTHS, (32, 64, 128)):
        qkv, ends, upstream = packed(lengths, d=d, dtype=dtype, device="cuda")
        longest = max(lengths)
        attention = functools.partial(packed_attention, cu_seqlens=ends, max_seqlen=longest, backend=backend)
        ours, again = (run(attention, qkv, upstream) for _ in range(2))
        assert backend != "triton" or all(torch.equal(a, b) for a, b in zip(ours, again, strict=True))
        eager = run(functools.partial(in_steps, lengths=lengths), qkv, upstream)
        exact = run(functools.partial(packed_attention_reference, cu_seqlens=ends), qkv.double(), upstream.double())
        for mine, theirs, truth in zip(ours, eager, exact, strict=True):
            limit = 2 * (theirs - truth).abs().max() + 1e-6 * (1 + truth.abs().max())
            assert (mine - truth).abs().max() <= limit, (lengths, d)


def _cannot(backend, qkv, longest):
    (found,) = (b for b in OPERATIONS["packed_attention"] if b.name == backend)
    return found.unavailable_reason() or found.unsupported_reason(qkv, longest)


@pytest.mark.gpu
@on_a_gpu
def test_waits_for_nothing_and_can_be_captured():
    qkv, cu_seqlens, upstream = packed([197, 37, 37], d=64, dtype=torch.bfloat16, device="cuda")
    leaf = qkv.requires_grad_()

    def step():
        out = packed_attention(leaf, cu_seqlens, 197, backend="triton")
        return out, torch.autograd.grad(out, leaf, upstream)[0]

    expected = step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(captured, expected, strict=True))
