"""Attention within packed sequences of different lengths, in Triton.

For row i of a sequence, one head of width d, with t = q k^T (unscaled) and c = 1 / sqrt(d),

    m(i) = max_j t(i, j),   l(i) = sum_j e^{c (t(i, j) - m(i))},   out(i) = sum_j e^{c (t(i, j) - m(i))} v_j / l(i)
    p(i, j) = e^{c (t(i, j) - m(i))} / l(i),   delta(i) = do_i . out_i,   ds = p (do v^T - delta)
    dv_j = sum_i p(i, j) do_i,   dk_j = c sum_i ds(i, j) q_i,   dq_i = c sum_j ds(i, j) k_j

The maximum and the sum are kept apart: their one logarithm, rounded, would be the largest error at large scores.

The backward makes the scores again, in tiles of another shape, so that they differ from the forward's by about
eps |t| and e^(c (t - m)) by c eps |t| of itself. It therefore takes m from the forward (any m does) but sums l anew,
over the very scores that its own probabilities are made of: each row of p adds up to 1 at any size of the scores.

Passes over memory: q, k and v are read where the projection wrote them, [tokens, 3, H, d], and nothing is transposed.
A program looks up its sequence's length and takes one of these ways, of which a launch holds those that its longest
sequence needs:
  short   (up to SHORT tokens) the whole sequence is one tile. Forward: nothing is rescaled. Backward: the scores are
          made once, all three gradients come from them, and everything is read once. Where all sequences are short, a
          program takes CROPS of them, one after the other.
  whole   (forward, up to KEYS tokens) keys and values of the sequence stay on chip, rows of queries pass by, nothing is
          rescaled, everything is read once.
  tiles   a program has ROWS rows of the sequence. Forward: keys pass by under a running maximum. Backward: two kernels
          over the sequence, first with the rows as queries, for their dq, l and delta, then with the rows as keys, for
          their dk and dv. Both make the scores, by the same product of the same tiles, so to the same bits.
Every output is written once by one program and nothing is added between programs: no atomics, the same bits every time.

float32 products are made of three in TF32, which keeps nearly all of float32's bits. `flops` and `bytes_moved`
count the kernels' operations and bytes; a test holds them to the interpreter's products, loads and stores.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from dino_fast.gpu import INTERPRETED, chip
from dino_fast.kernels.autotune import pick
from dino_fast.kernels.launch import launch_kernel

LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def _rows(base, first, length, stride, BLOCK: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr):
    """Addresses and mask of rows [first, first + BLOCK) of a sequence that begins at `base`, [BLOCK, D]."""
    i = first + tl.arange(0, BLOCK)
    column = tl.arange(0, D)
    mask = (i < length)[:, None]
    if WIDTH < D:
        mask = mask & (column < WIDTH)[None, :]
    return base + i[:, None] * stride + column[None, :], mask


@triton.jit
def _load(base, first, length, stride, BLOCK: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr):
    at, mask = _rows(base, first, length, stride, BLOCK, D, WIDTH)
    return tl.load(at, mask, 0.0)


@triton.jit
def _store(base, value, first, length, stride, BLOCK: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr):
    at, mask = _rows(base, first, length, stride, BLOCK, D, WIDTH)
    tl.store(at, value.to(base.dtype.element_ty), mask)


@triton.jit
def _attend(q, k, v, length, log2_scale, KEYS: tl.constexpr):
    """m, l and out of rows whose keys are all here."""
    t = tl.dot(q, tl.trans(k), input_precision="tf32x3")
    t = tl.where((tl.arange(0, KEYS) < length)[None, :], t, float("-inf"))
    m = tl.max(t, 1)
    p = tl.exp2((t - m[:, None]) * log2_scale)
    l = tl.sum(p, 1)
    return m, l, tl.dot(p.to(v.dtype), v, input_precision="tf32x3") / l[:, None]


@triton.jit
def _attend_by_tiles(
    q, base, stride_part, stride_token, length, log2_scale,
    ROWS: tl.constexpr, KEYS: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """m, l and out of rows, KEYS keys at a time."""
    m = tl.full([ROWS], float("-inf"), tl.float32)
    l = tl.zeros([ROWS], tl.float32)
    value = tl.zeros([ROWS, D], tl.float32)
    for j in range(0, length, KEYS):
        k = _load(base + stride_part, j, length, stride_token, KEYS, D, WIDTH)
        t = tl.dot(q, tl.trans(k), input_precision="tf32x3")
        t = tl.where((j + tl.arange(0, KEYS) < length)[None, :], t, float("-inf"))
        new_m = tl.maximum(m, tl.max(t, 1))
        p = tl.exp2((t - new_m[:, None]) * log2_scale)
        # The first maximum is -inf; the sum that its scale multiplies is 0 then.
        old = tl.where(l > 0.0, tl.exp2((m - new_m) * log2_scale), 0.0)
        l = l * old + tl.sum(p, 1)
        v = _load(base + 2 * stride_part, j, length, stride_token, KEYS, D, WIDTH)
        value = value * old[:, None] + tl.dot(p.to(v.dtype), v, input_precision="tf32x3")
        m = new_m
    return m, l, value / l[:, None]


@triton.jit
def _forward(
    qkv, out, maxima, sums, ends, stride_token, stride_part, stride_head, tokens, n, H, blocks, scale,
    WIDTH: tl.constexpr, D: tl.constexpr, SHORT: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr,
    WAY: tl.constexpr, CROPS: tl.constexpr,
):  # fmt: skip
    """Program (g * blocks + i, h): head h of CROPS sequences; of one in tiles, rows [i * ROWS, (i + 1) * ROWS)."""
    i = tl.program_id(0) % blocks
    group = tl.program_id(0) // blocks
    h = tl.program_id(1).to(tl.int64)
    log2_scale = scale * LOG2_E
    for crop in range(CROPS):
        s = tl.minimum(group * CROPS + crop, n)
        start = tl.load(ends + s).to(tl.int64)
        length = (tl.load(ends + tl.minimum(s + 1, n)) - start).to(tl.int32)
        base = qkv + start * stride_token + h * stride_head
        to = out + (start * H + h) * WIDTH
        row_maxima = maxima + h * tokens + start
        row_sums = sums + h * tokens + start
        if length <= SHORT:
            if (i == 0) & (length > 0):
                q = _load(base, 0, length, stride_token, SHORT, D, WIDTH)
                k = _load(base + stride_part, 0, length, stride_token, SHORT, D, WIDTH)
                v = _load(base + 2 * stride_part, 0, length, stride_token, SHORT, D, WIDTH)
                m, l, value = _attend(q, k, v, length, log2_scale, SHORT)
                _store(to, value, 0, length, H * WIDTH, SHORT, D, WIDTH)
                row = tl.arange(0, SHORT)
                tl.store(row_maxima + row, m, row < length)
                tl.store(row_sums + row, l, row < length)
        elif WAY == "whole":
            k_all = _load(base + stride_part, 0, length, stride_token, KEYS, D, WIDTH)
            v_all = _load(base + 2 * stride_part, 0, length, stride_token, KEYS, D, WIDTH)
            for first in range(0, length, ROWS):
                q_rows = _load(base, first, length, stride_token, ROWS, D, WIDTH)
                m_rows, l_rows, value_rows = _attend(q_rows, k_all, v_all, length, log2_scale, KEYS)
                _store(to, value_rows, first, length, H * WIDTH, ROWS, D, WIDTH)
                here = first + tl.arange(0, ROWS)
                tl.store(row_maxima + here, m_rows, here < length)
                tl.store(row_sums + here, l_rows, here < length)
        elif WAY == "tiles":
            begin = i * ROWS
            if begin < length:
                q_tile = _load(base, begin, length, stride_token, ROWS, D, WIDTH)
                m_tile, l_tile, value_tile = _attend_by_tiles(
                    q_tile, base, stride_part, stride_token, length, log2_scale, ROWS, KEYS, D, WIDTH
                )
                _store(to, value_tile, begin, length, H * WIDTH, ROWS, D, WIDTH)
                mine = begin + tl.arange(0, ROWS)
                tl.store(row_maxima + mine, m_tile, mine < length)
                tl.store(row_sums + mine, l_tile, mine < length)


@triton.jit
def _backward_short(
    base, grad_base, out_base, row_maxima, result, length, stride_token, stride_part, grad_token, H, scale,
    SHORT: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """All gradients of a sequence that is one tile."""
    row = tl.arange(0, SHORT)
    inside = row < length
    q = _load(base, 0, length, stride_token, SHORT, D, WIDTH)
    k = _load(base + stride_part, 0, length, stride_token, SHORT, D, WIDTH)
    m = tl.load(row_maxima + row, inside, 0.0)
    t = tl.dot(q, tl.trans(k), input_precision="tf32x3")  # [queries, keys]
    e = tl.where(inside[:, None] & inside[None, :], tl.exp2((t - m[:, None]) * (scale * LOG2_E)), 0.0)
    p = e / tl.where(inside, tl.sum(e, 1), 1.0)[:, None]
    do = _load(grad_base, 0, length, grad_token, SHORT, D, WIDTH)
    dv = tl.dot(tl.trans(p.to(do.dtype)), do, input_precision="tf32x3")
    _store(result + 2 * H * WIDTH, dv, 0, length, 3 * H * WIDTH, SHORT, D, WIDTH)
    o = _load(out_base, 0, length, H * WIDTH, SHORT, D, WIDTH)
    delta = tl.sum(do.to(tl.float32) * o.to(tl.float32), 1)
    v = _load(base + 2 * stride_part, 0, length, stride_token, SHORT, D, WIDTH)
    ds = p * (tl.dot(do, tl.trans(v), input_precision="tf32x3") - delta[:, None])
    ds = ds.to(q.dtype)
    dk = tl.dot(tl.trans(ds), q, input_precision="tf32x3") * scale
    _store(result + H * WIDTH, dk, 0, length, 3 * H * WIDTH, SHORT, D, WIDTH)
    dq = tl.dot(ds, k, input_precision="tf32x3") * scale
    _store(result, dq, 0, length, 3 * H * WIDTH, SHORT, D, WIDTH)


@triton.jit
def _scores(k, q, m, keys_inside, queries_inside, scale):
    """e^(c (t - m)) [keys, queries] of a tile, to the same bits in both kernels of the backward."""
    t = tl.dot(k, tl.trans(q), input_precision="tf32x3")
    e = tl.exp2((t - m[None, :]) * (scale * LOG2_E))
    return tl.where(keys_inside[:, None] & queries_inside[None, :], e, 0.0)


@triton.jit
def _backward_of_queries(
    base, grad_base, out_base, row_maxima, row_sums, new_sums, deltas, result, first, length, stride_token,
    stride_part, grad_token, H, scale, ROWS: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """dq, l and delta of ROWS rows, over all keys."""
    mine = first + tl.arange(0, ROWS)
    inside = mine < length
    q = _load(base, first, length, stride_token, ROWS, D, WIDTH)
    do = _load(grad_base, first, length, grad_token, ROWS, D, WIDTH)
    o = _load(out_base, first, length, H * WIDTH, ROWS, D, WIDTH)
    delta = tl.sum(do.to(tl.float32) * o.to(tl.float32), 1)
    m = tl.load(row_maxima + mine, inside, 0.0)
    l = tl.load(row_sums + mine, inside, 1.0)
    total = tl.zeros([ROWS], tl.float32)  # of the probabilities with the forward's l: nearly 1
    dq = tl.zeros([ROWS, D], tl.float32)
    for j in range(0, length, ROWS):
        k = _load(base + stride_part, j, length, stride_token, ROWS, D, WIDTH)
        v = _load(base + 2 * stride_part, j, length, stride_token, ROWS, D, WIDTH)
        p = _scores(k, q, m, j + tl.arange(0, ROWS) < length, inside, scale) / l[None, :]
        total += tl.sum(p, 0)
        ds = p * (tl.dot(v, tl.trans(do), input_precision="tf32x3") - delta[None, :])
        dq += tl.dot(tl.trans(ds.to(k.dtype)), k, input_precision="tf32x3")
    tl.store(new_sums + mine, l * total, inside)
    tl.store(deltas + mine, delta, inside)
    dq = dq * (scale / tl.where(inside, total, 1.0))[:, None]
    _store(result, dq, first, length, 3 * H * WIDTH, ROWS, D, WIDTH)


@triton.jit
def _backward(
    grad, qkv, out, maxima, sums, new_sums, deltas, ends, grad_qkv, stride_token, stride_part, stride_head, grad_token,
    grad_head, tokens, n, H, blocks, scale,
    WIDTH: tl.constexpr, D: tl.constexpr, SHORT: tl.constexpr, ROWS: tl.constexpr, WAY: tl.constexpr,
    CROPS: tl.constexpr,
):  # fmt: skip
    """Program (g * blocks + i, h): head h of CROPS sequences; of one in tiles, rows [i * ROWS, (i + 1) * ROWS)."""
    i = tl.program_id(0) % blocks
    group = tl.program_id(0) // blocks
    h = tl.program_id(1).to(tl.int64)
    for crop in range(CROPS):
        s = tl.minimum(group * CROPS + crop, n)
        start = tl.load(ends + s).to(tl.int64)
        length = (tl.load(ends + tl.minimum(s + 1, n)) - start).to(tl.int32)
        base = qkv + start * stride_token + h * stride_head
        grad_base = grad + start * grad_token + h * grad_head
        out_base = out + (start * H + h) * WIDTH
        row = h * tokens + start
        result = grad_qkv + (start * 3 * H + h) * WIDTH
        if length <= SHORT:
            if (i == 0) & (length > 0):
                _backward_short(
                    base, grad_base, out_base, maxima + row, result, length, stride_token, stride_part, grad_token, H,
                    scale, SHORT, D, WIDTH,
                )  # fmt: skip
        elif WAY == "tiles":
            first = i * ROWS
            if first < length:
                _backward_of_queries(
                    base, grad_base, out_base, maxima + row, sums + row, new_sums + row, deltas + row, result, first,
                    length, stride_token, stride_part, grad_token, H, scale, ROWS, D, WIDTH,
                )  # fmt: skip


@triton.jit
def _backward_of_keys(
    grad, qkv, maxima, sums, deltas, ends, grad_qkv, stride_token, stride_part, stride_head, grad_token, grad_head,
    tokens, H, blocks, scale,
    WIDTH: tl.constexpr, D: tl.constexpr, SHORT: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Program (s * blocks + i, h): dk and dv of rows [i * ROWS, (i + 1) * ROWS) of head h of sequence s, over all
    queries, where it is in tiles."""
    s = tl.program_id(0) // blocks
    h = tl.program_id(1).to(tl.int64)
    start = tl.load(ends + s).to(tl.int64)
    length = (tl.load(ends + s + 1) - start).to(tl.int32)
    first = (tl.program_id(0) % blocks) * ROWS
    if (length > SHORT) & (first < length):
        base = qkv + start * stride_token + h * stride_head
        grad_base = grad + start * grad_token + h * grad_head
        row = h * tokens + start
        result = grad_qkv + (start * 3 * H + h) * WIDTH
        inside = first + tl.arange(0, ROWS) < length
        k = _load(base + stride_part, first, length, stride_token, ROWS, D, WIDTH)
        v = _load(base + 2 * stride_part, first, length, stride_token, ROWS, D, WIDTH)
        dk = tl.zeros([ROWS, D], tl.float32)
        dv = tl.zeros([ROWS, D], tl.float32)
        for j in range(0, length, ROWS):
            i = j + tl.arange(0, ROWS)
            q = _load(base, j, length, stride_token, ROWS, D, WIDTH)
            do = _load(grad_base, j, length, grad_token, ROWS, D, WIDTH)
            m = tl.load(maxima + row + i, i < length, 0.0)
            l = tl.load(sums + row + i, i < length, 1.0)
            delta = tl.load(deltas + row + i, i < length, 0.0)
            p = _scores(k, q, m, inside, i < length, scale) / l[None, :]
            dv += tl.dot(p.to(do.dtype), do, input_precision="tf32x3")
            ds = p * (tl.dot(v, tl.trans(do), input_precision="tf32x3") - delta[None, :])
            dk += tl.dot(ds.to(q.dtype), q, input_precision="tf32x3")
        _store(result + H * WIDTH, dk * scale, first, length, 3 * H * WIDTH, ROWS, D, WIDTH)
        _store(result + 2 * H * WIDTH, dv, first, length, 3 * H * WIDTH, ROWS, D, WIDTH)


class Tile(NamedTuple):
    """Tokens of a short sequence; rows and, forward, keys of a tile for longer ones; warps and stages of loads."""

    short: int
    rows: int = 0
    keys: int = 0
    warps: int = 4
    stages: int = 2


WIDEST = 128  # elements of a head
WHOLE = 256  # tokens of a sequence whose keys and values stay on chip in 16 bits
# Bytes of shared memory that "whole" takes at most, by the width; all else fits every chip from sm_80 on.
WHOLE_SHARED_MEMORY = {32: 41984, 64: 86016, 128: 147456}
CROPS = 4  # short sequences of a program, where there are programs enough all the same
ENOUGH_PROGRAMS = 4  # for each multiprocessor

# By the bytes of an element, the width and the way: first the tile that is taken, then others that DINO_FAST_AUTOTUNE=1
# measures too. All compile for sm_80, sm_90 and sm_100 without spills (tests/kernels/test_packed_attention.py); larger
# ones do not. None is measured on a chip yet.
FORWARD_TILES = {
    (2, 32, "short"): (Tile(64),),
    (2, 64, "short"): (Tile(64), Tile(64, warps=8)),
    (2, 128, "short"): (Tile(64, warps=8), Tile(64)),
    (2, 32, "whole"): (Tile(64, 16, WHOLE, 4),),
    (2, 64, "whole"): (Tile(64, 32, WHOLE, 8), Tile(64, 16, WHOLE, 4)),
    (2, 128, "whole"): (Tile(64, 32, WHOLE, 8, 1),),
    (2, 32, "tiles"): (Tile(64, 64, 64),),
    (2, 64, "tiles"): (Tile(64, 64, 64), Tile(64, 64, 64, 8)),
    (2, 128, "tiles"): (Tile(64, 64, 64, 8),),
    (4, 32, "short"): (Tile(64, warps=8),),
    (4, 64, "short"): (Tile(32, warps=8),),
    (4, 128, "short"): (Tile(16, warps=8),),
    (4, 32, "tiles"): (Tile(32, 32, 64, 8),),
    (4, 64, "tiles"): (Tile(32, 32, 64, 8),),
    (4, 128, "tiles"): (Tile(16, 32, 32, 8),),
}
BACKWARD_TILES = {
    (2, 32, "short"): (Tile(64),),
    (2, 64, "short"): (Tile(64), Tile(64, warps=8)),
    (2, 128, "short"): (Tile(64, warps=8),),
    (2, 32, "tiles"): (Tile(64, 64),),
    (2, 64, "tiles"): (Tile(64, 64, warps=8), Tile(64, 32)),
    (2, 128, "tiles"): (Tile(64, 32, warps=8),),
    (4, 32, "short"): (Tile(32, warps=8),),
    (4, 64, "short"): (Tile(32, warps=8),),
    (4, 128, "short"): (Tile(16, warps=8),),
    (4, 32, "tiles"): (Tile(16, 16, warps=8),),
    (4, 64, "tiles"): (Tile(32, 32, warps=8),),
    (4, 128, "tiles"): (Tile(16, 16, warps=8),),
}


def width(d: int) -> int:
    """Of a tile for a head of d elements."""
    return max(16, triton.next_power_of_2(d))


def tiles(
    max_seqlen: int,
    d: int,
    element_size: int,
    *,
    backward: bool = False,
    shared_memory: int = INTERPRETED.shared_memory,
) -> tuple[str, tuple[Tile, ...]]:
    """The way of the longest sequence and the tiles for it, on a chip of so many bytes of shared memory a block."""
    table = BACKWARD_TILES if backward else FORWARD_TILES
    kind = element_size, max(32, width(d))
    if max_seqlen <= table[(*kind, "short")][0].short:
        # A tile as short as the sequences
        short = max(16, triton.next_power_of_2(max_seqlen))
        return "short", tuple(tile._replace(short=min(tile.short, short)) for tile in table[(*kind, "short")])
    if max_seqlen <= WHOLE and (*kind, "whole") in table and WHOLE_SHARED_MEMORY[kind[1]] <= shared_memory:
        keys = triton.next_power_of_2(max_seqlen)
        return "whole", tuple(tile._replace(keys=keys) for tile in table[(*kind, "whole")])
    return "tiles", table[(*kind, "tiles")]


def constants(way: str, tile: Tile, d: int, crops: int, *, backward: bool = False) -> dict:
    """A kernel's compile-time constants."""
    constant = {"WIDTH": d, "D": width(d), "SHORT": tile.short, "ROWS": tile.rows, "WAY": way, "CROPS": crops}
    return constant if backward else constant | {"KEYS": tile.keys}


def grid(
    way: str, tile: Tile, n: int, H: int, max_seqlen: int, multiprocessors: int = INTERPRETED.multiprocessors
) -> tuple[int, int, int]:
    """Groups of sequences, blocks of rows in each, sequences of a group."""
    if way == "short":
        crops = CROPS if n * H >= CROPS * ENOUGH_PROGRAMS * multiprocessors else 1
        return triton.cdiv(n, crops), 1, crops
    return n, triton.cdiv(max_seqlen, tile.rows) if way == "tiles" else 1, 1


def forward(qkv: Tensor, ends: Tensor, max_seqlen: int, out: Tensor, maxima: Tensor, sums: Tensor) -> None:
    """Fills `out` [tokens, H, d], contiguous, and float32 `maxima` and `sums` [H, tokens] from qkv [tokens, 3, H, d]
    with a contiguous last dimension; `ends` int32 [n + 1]."""
    tokens, _, H, d = qkv.shape
    n = ends.shape[0] - 1
    if tokens == 0 or n == 0 or max_seqlen == 0:
        return
    limits = chip(qkv.device)
    way, candidates = tiles(max_seqlen, d, qkv.element_size(), shared_memory=limits.shared_memory)

    def launch(tile: Tile) -> None:
        groups, blocks, crops = grid(way, tile, n, H, max_seqlen, limits.multiprocessors)
        launch_kernel(
            _forward, (groups * blocks, H),
            qkv, out, maxima, sums, ends, *qkv.stride()[:3], tokens, n, H, blocks, d**-0.5,
            **constants(way, tile, d, crops), num_warps=tile.warps, num_stages=tile.stages,
        )  # fmt: skip

    launch(pick(("forward", qkv.dtype, qkv.device, max_seqlen, H, d), candidates, qkv.device, launch))


def backward(
    grad: Tensor, qkv: Tensor, ends: Tensor, max_seqlen: int, out: Tensor, maxima: Tensor, sums: Tensor,
    grad_qkv: Tensor,
) -> None:  # fmt: skip
    """Fills `grad_qkv` [tokens, 3, H, d], contiguous, from `grad` [tokens, H, d] and the outputs of `forward`."""
    tokens, _, H, d = qkv.shape
    n = ends.shape[0] - 1
    if tokens == 0 or n == 0 or max_seqlen == 0:
        return
    limits = chip(qkv.device)
    way, candidates = tiles(max_seqlen, d, qkv.element_size(), backward=True, shared_memory=limits.shared_memory)
    # Of rows in tiles, from the first kernel to the second.
    shape = (2, *sums.shape) if way == "tiles" else (2, 1)
    new_sums, deltas = torch.empty(shape, dtype=torch.float32, device=qkv.device)

    def launch(tile: Tile) -> None:
        groups, blocks, crops = grid(way, tile, n, H, max_seqlen, limits.multiprocessors)
        made_for = constants(way, tile, d, crops, backward=True)
        strides, options = (*qkv.stride()[:3], *grad.stride()[:2]), {"num_warps": tile.warps, "num_stages": tile.stages}
        launch_kernel(
            _backward, (groups * blocks, H),
            grad, qkv, out, maxima, sums, new_sums, deltas, ends, grad_qkv, *strides, tokens, n, H, blocks, d**-0.5,
            **made_for, **options,
        )  # fmt: skip
        if way == "tiles":
            made_for = {name: made_for[name] for name in ("WIDTH", "D", "SHORT", "ROWS")}
            launch_kernel(
                _backward_of_keys, (n * blocks, H),
                grad, qkv, maxima, new_sums, deltas, ends, grad_qkv, *strides, tokens, H, blocks, d**-0.5, **made_for,
                **options,
            )  # fmt: skip

    launch(pick(("backward", qkv.dtype, qkv.device, max_seqlen, H, d), candidates, qkv.device, launch))


def flops(lengths: list[int], H: int, d: int, element_size: int) -> dict[str, int]:
    """Floating-point operations of the kernels' products, padding included, with the tiles taken first. Without padding
    these are 4 H d L^2 a sequence forward, and 10 backward where it is short, else 14."""
    longest = max(lengths)
    (way, (tile, *_)), (_, (behind, *_)) = (tiles(longest, d, element_size, backward=b) for b in (False, True))
    forward = backward = 0
    for L in filter(None, lengths):
        if tile.short >= L:
            forward += 2 * tile.short**2
        else:
            columns = tile.keys if way == "whole" else triton.cdiv(L, tile.keys) * tile.keys
            forward += 2 * triton.cdiv(L, tile.rows) * tile.rows * columns
        if behind.short >= L:
            backward += 5 * behind.short**2
        else:
            backward += 7 * (triton.cdiv(L, behind.rows) * behind.rows) ** 2
    return {"forward": 2 * forward * H * width(d), "backward": 2 * backward * H * width(d)}


def bytes_moved(lengths: list[int], H: int, d: int, element_size: int) -> dict[str, int]:
    """Bytes of q, k, v, the output, the row statistics and the gradients that the kernels load and store, wherever they
    come from, with the tiles taken first; the ends of the sequences are the small rest."""
    longest = max(lengths)
    (way, (tile, *_)), (_, (behind, *_)) = (tiles(longest, d, element_size, backward=b) for b in (False, True))
    row, statistics = H * d * element_size, 2 * 4 * H
    forward = backward = 0
    for L in filter(None, lengths):
        blocks = 1 if way == "whole" or tile.short >= L else triton.cdiv(L, tile.rows)
        forward += L * ((2 + 2 * blocks) * row + statistics)
        if behind.short >= L:
            backward += L * (8 * row + statistics // 2)
        else:
            blocks = triton.cdiv(L, behind.rows)
            backward += L * ((8 + 4 * blocks) * row + 2 * statistics + blocks * 3 * statistics // 2)
    return {"forward": forward, "backward": backward}
