"""`packed_attention`, forward and backward, beside a loop over sequences and, on a GPU, PyTorch's own packed attention.

The sequences are those of one training step's crops: 2 of 197 tokens and 8 of 37 an image, side by side by length, and
the same image by image, where the equal ones do not lie side by side.

Floor: the products of forward and backward with the scores made twice, 14 L^2 H d operations a sequence of L tokens,
and the bytes of reading qkv twice, the output's gradient once, and writing output and gradient once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dino_fast.attention import packed_attention
from dino_fast.ops.packed_attention import packed_attention_reference

from .harness import Comparison, Contender, Row, peer, run_all

CROPS = [197] * 2 + [37] * 8  # tokens of one image's crops: 224 and 96 pixels in patches of 16, and the class token
# images, heads, whether the crops of one length lie side by side
CASES = ((4, 6, True), (4, 6, False), (4, 12, True))
QUICK = ((1, 6, True),)
WIDTH = 64  # of a head


def comparisons(quick: bool = False) -> Iterator[Comparison]:
    devices = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
    for device in devices:
        dtype = torch.float32 if device == "cpu" else torch.bfloat16
        for images, heads, sorted_by_length in QUICK if quick else CASES:
            scale = 1 if device == "cpu" or quick else 16  # 64 images fill a GPU
            yield comparison(images * scale, heads, sorted_by_length, dtype, device)


def comparison(
    images: int, H: int, sorted_by_length: bool, dtype: torch.dtype, device: str, crops: Sequence[int] = CROPS
) -> Comparison:
    """`images` times sequences of the lengths `crops`."""
    lengths = sorted([*crops] * images, reverse=True) if sorted_by_length else [*crops] * images
    tokens, longest = sum(lengths), max(lengths)
    generator = torch.Generator().manual_seed(0)
    qkv = torch.randn(tokens, 3, H, WIDTH, generator=generator).to(device, dtype).requires_grad_()
    upstream = torch.randn(tokens, H, WIDTH, generator=generator).to(device, dtype)
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).to(device, torch.int32)

    def forward_backward(attention: Callable[[Tensor], Tensor]) -> Callable[[], tuple[Tensor, Tensor]]:
        def call() -> tuple[Tensor, Tensor]:
            out = attention(qkv)
            return out, torch.autograd.grad(out, qkv, upstream)[0]

        return call

    def ours(x: Tensor) -> Tensor:
        return packed_attention(x, cu_seqlens, longest)

    def loop(x: Tensor) -> Tensor:
        outputs = []
        for sequence in x.split(lengths):
            q, k, v = sequence.permute(1, 2, 0, 3)[:, None]  # [1, H, L, d] each
            outputs.append(F.scaled_dot_product_attention(q, k, v)[0].transpose(0, 1))
        return torch.cat(outputs)

    def per_length(x: Tensor) -> Tensor:
        """One call per resolution under autograd, as models that keep their resolutions apart do."""
        outputs, start = [], 0
        for L in dict.fromkeys(lengths):
            n = lengths.count(L)
            q, k, v = x[start : start + n * L].view(n, L, 3, H, WIDTH).permute(2, 0, 3, 1, 4)
            outputs.append(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(n * L, H, WIDTH))
            start += n * L
        return torch.cat(outputs)

    def make_varlen(varlen: Any) -> Callable[[], tuple[Tensor, Tensor]]:
        def attention(x: Tensor) -> Tensor:
            q, k, v = x.unbind(1)
            return varlen.varlen_attn(q, k, v, cu_seqlens, cu_seqlens, longest, longest)

        return forward_backward(attention)

    def make_xformers(ops: Any) -> Callable[[], tuple[Tensor, Tensor]]:
        mask = ops.fmha.attn_bias.BlockDiagonalMask.from_seqlens(lengths)

        def attention(x: Tensor) -> Tensor:
            q, k, v = x[None].unbind(2)
            return ops.memory_efficient_attention(q, k, v, attn_bias=mask)[0]

        return forward_backward(attention)

    def exact() -> tuple[Tensor, Tensor]:
        leaf = qkv.detach().double().requires_grad_()
        out = packed_attention_reference(leaf, cu_seqlens)
        return out.detach(), torch.autograd.grad(out, leaf, upstream.double())[0]

    contenders = [
        Contender("dino-fast", forward_backward(ours), ours=True),
    ]
    grouped = sorted_by_length and device != "cpu"  # a GPU would wait for a loop's launches
    if not grouped:
        contenders.append(Contender("SDPA, loop over sequences", forward_backward(loop), baseline=True))
    if sorted_by_length:
        contenders.append(Contender("SDPA per length, autograd", forward_backward(per_length), baseline=grouped))
    if device != "cpu":
        contenders.append(peer("torch varlen", "torch.nn.attention.varlen", make_varlen))
        contenders.append(peer("xformers", "xformers.ops", make_xformers))
    described = "+".join(f"{[*crops].count(L)}x{L}" for L in dict.fromkeys(crops))
    order = "by length" if sorted_by_length else "by image"
    return Comparison(
        operation="packed_attention",
        shape=f"{images}x({described}) H{H} d{WIDTH} {order}" + ("" if device == "cpu" else " cuda"),
        dtype=str(dtype).removeprefix("torch."),
        reference=exact,
        floor_bytes=(2 * 3 + 1 + 1 + 3) * upstream.nbytes,
        floor_flops=sum(14 * L * L for L in lengths) * H * WIDTH,
        output_bytes=upstream.nbytes + qkv.nbytes,
        contenders=contenders,
        device=device,
    )


def run(quick: bool = False, only: str = "") -> list[Row]:
    return run_all(comparisons(quick), quick=quick, only=only)


def test_speed(benchmark, contender):
    benchmark(contender)
