"""Rows against prototypes in Triton: the two attention-shaped passes of the loss without logits.

With student rows z(v, b), teacher rows z'(u, b), weights W and W' [K, D] whose row k is multiplied by a_k (weight norm:
gain over length; else 1), centre c and temperatures tau, tau', for a row of either network

    x(k) = a_k z . W_k  (teacher: a'_k z' . W'_k - c_k),   m = max_k x,   y(k) = (x(k) - m) / tau,   l = sum_k e^y
    _attend    E = sum_k e^y a_k W_k / l  of all rows, and d(u, v) = sum_k e^y'(k) y(k) / l' of the rows of one image
    _weigh     dW_k = sum_(v, b) g(k) z(v, b),   g(k) = f(v, b) e^y(k) - sum_u h(u, v, b) e^y'(k)

A program of `_attend` keeps all rows of some images and their accumulators on chip and walks over the prototypes of
one slice of K; slices meet in `_merge`, one after the other. A program of `_weigh` keeps BLOCK_K prototypes and their
gradient on chip and walks over all images; the tangent projection of weight norm is its epilogue. Which teacher rows
belong to which student rows is a small matrix product on chip, or nothing where there is one crop each (`ALIGNED`).
No atomics, no locks: the order of each sum is fixed by the shapes and the tables below.

`_weigh` makes the logits again, in tiles of another shape, so that they differ from the forward's by about eps |x| and
e^y by eps |x| / tau of itself; a row that one prototype has to itself would get a probability of 1 +- eps |x| / tau in
place of 1. Where |m| / tau is large (`LIMIT`), `_sums` therefore sums e^y anew over the very logits of `_weigh`, and
the probabilities of each row add up to 1 again. Rows of 16 bits need it least: their g is rounded to 8 or 11 bits.

Logits are float32 from the product on; only e^y and g are rounded to the rows' type for the second product (times 4096
for float16, whose smallest numbers they would fall below). float32 products, and those of pairs in any type, are made
of three in TF32, which keeps nearly all of float32's bits: one alone cuts 13 bits off each factor, always downwards,
and such a bias does not average out over the rows as rounding does.

Each weight is read once for each block of images, from L2 where it fits there; nothing of size rows times K is written.
`bytes_moved` and `flops` count the kernels' bytes and operations.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from dino_fast.gpu import chip
from dino_fast.kernels import linear_dino_loss_half as half
from dino_fast.kernels.autotune import pick, rounded
from dino_fast.kernels.launch import launch_kernel

COLUMNS = 32  # prototypes of a program of `_columns`
# The largest |m| / tau up to which the backward takes the forward's sums: weight norm with a gain of 1 stays below it.
LIMIT = 32.0


@triton.jit
def _columns(
    weight, gain, row, scale, mean, K, D, weight_k,
    BLOCK_K: tl.constexpr, WIDTH: tl.constexpr, SCALED: tl.constexpr, MEAN: tl.constexpr,
):  # fmt: skip
    """Per prototype: its gain over its length, and its logit with one float32 row."""
    k = tl.program_id(0) * BLOCK_K + tl.arange(0, BLOCK_K)
    d = tl.arange(0, WIDTH)
    mask = k < K
    d_mask = d < D
    w = tl.load(weight + k[:, None] * weight_k + d[None, :], mask[:, None] & d_mask[None, :], 0.0).to(tl.float32)
    if SCALED:
        a = tl.load(gain + k, mask, 0.0) / tl.sqrt(tl.sum(w * w, 1))
        tl.store(scale + k, a, mask)
    if MEAN:
        logit = tl.sum(w * tl.load(row + d, d_mask, 0.0)[None, :], 1)
        if SCALED:
            logit = logit * a
        tl.store(mean + k, logit, mask)


@triton.jit
def _logits(
    rows, row, row_mask, weight, k, k_mask, D, weight_k,
    BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr, WIDTH: tl.constexpr, CHUNK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """rows x weight^T [BLOCK_K, BLOCK_R], CHUNK of the width at a time: less of both on chip."""
    x = tl.zeros([BLOCK_K, BLOCK_R], tl.float32)
    for first in tl.range(0, WIDTH, CHUNK):
        d = first + tl.arange(0, CHUNK)
        d_mask = d < D
        z = tl.load(rows + row[None, :] * D + d[:, None], row_mask[None, :] & d_mask[:, None], 0.0)
        w = tl.load(weight + k[:, None] * weight_k + d[None, :], k_mask[:, None] & d_mask[None, :], 0.0).to(z.dtype)
        x = tl.dot(w, z, x, input_precision=PRECISION)
    return x


@triton.jit
def _attend(
    student, student_weight, student_scale, read_scale, teacher, teacher_weight, teacher_scale, center,
    part_max, part_sum, part_pair, part_read,
    V, T, B, images, K, D, student_k, teacher_k, slice_k, inverse_student_temp, inverse_teacher_temp,
    BLOCK_S: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr, WIDTH: tl.constexpr, CHUNK: tl.constexpr,
    SCALED: tl.constexpr, TEACHER_SCALED: tl.constexpr, READ: tl.constexpr, ALIGNED: tl.constexpr, LIFT: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Program (i, j): images [i * images, (i + 1) * images), prototypes [j * slice_k, (j + 1) * slice_k)."""
    i = tl.program_id(0)
    j = tl.program_id(1)
    s = tl.arange(0, BLOCK_S)
    t = tl.arange(0, BLOCK_T)
    s_image, t_image = s // V, t // T
    s_b, t_b = i * images + s_image, i * images + t_image
    s_mask = (s_image < images) & (s_b < B)
    t_mask = (t_image < images) & (t_b < B)
    s_row, t_row = (s % V) * B + s_b, (t % T) * B + t_b
    d = tl.arange(0, WIDTH)
    d_mask = d < D
    m = tl.full([BLOCK_S], float("-inf"), tl.float32)
    l = tl.zeros([BLOCK_S], tl.float32)
    m_t = tl.full([BLOCK_T], float("-inf"), tl.float32)
    l_t = tl.zeros([BLOCK_T], tl.float32)
    pair = tl.zeros([BLOCK_S] if ALIGNED else [BLOCK_T, BLOCK_S], tl.float32)
    read = tl.zeros([BLOCK_S, WIDTH], tl.float32)
    read_t = tl.zeros([BLOCK_T, WIDTH], tl.float32)
    end = tl.minimum((j + 1) * slice_k, K)
    for start in tl.range(j * slice_k, end, BLOCK_K, num_stages=1):
        k = start + tl.arange(0, BLOCK_K)
        mask = k < end
        y_t = _logits(
            teacher, t_row, t_mask, teacher_weight, k, mask, D, teacher_k, BLOCK_T, BLOCK_K, WIDTH, CHUNK, PRECISION
        )
        if TEACHER_SCALED:
            y_t = y_t * tl.load(teacher_scale + k, mask, 0.0)[:, None]
        y_t = tl.where(mask[:, None], y_t - tl.load(center + k, mask, 0.0)[:, None], float("-inf"))
        new_m_t = tl.maximum(m_t, tl.max(y_t, 0))
        shift_t = tl.where(l_t > 0.0, (m_t - new_m_t) * inverse_teacher_temp, 0.0)
        old_t = tl.exp(shift_t)
        e_t = tl.exp((y_t - new_m_t[None, :]) * inverse_teacher_temp)
        y = _logits(
            student, s_row, s_mask, student_weight, k, mask, D, student_k, BLOCK_S, BLOCK_K, WIDTH, CHUNK, PRECISION
        )
        if SCALED:
            y = y * tl.load(student_scale + k, mask, 0.0)[:, None]
        new_m = tl.maximum(m, tl.max(tl.where(mask[:, None], y, float("-inf")), 0))
        shift = tl.where(l > 0.0, (m - new_m) * inverse_student_temp, 0.0)
        old = tl.exp(shift)
        y = tl.where(mask[:, None], (y - new_m[None, :]) * inverse_student_temp, 0.0)
        e = tl.where(mask[:, None], tl.exp(y), 0.0)
        # Earlier weights of the teacher's now multiply logits further below the student's maximum.
        if ALIGNED:
            pair = old_t * (pair + l_t * shift) + tl.sum(e_t * y, 0)
        else:
            fresh = tl.dot(tl.trans(e_t), y, input_precision=PRECISION)
            pair = old_t[:, None] * (pair + l_t[:, None] * shift[None, :]) + fresh
        l = l * old + tl.sum(e, 0)
        l_t = l_t * old_t + tl.sum(e_t, 0)
        m = new_m
        m_t = new_m_t
        if READ:
            if SCALED:
                scale = tl.load(read_scale + k, mask, 0.0)[:, None]
                e = e * scale
                e_t = e_t * scale
            at = student_weight + k[:, None] * student_k + d[None, :]
            w = tl.load(at, mask[:, None] & d_mask[None, :], 0.0).to(student.dtype.element_ty)
            read = tl.dot(tl.trans((e * LIFT).to(w.dtype)), w, read * old[:, None], input_precision=PRECISION)
            read_t = tl.dot(tl.trans((e_t * LIFT).to(w.dtype)), w, read_t * old_t[:, None], input_precision=PRECISION)
    rows = (T + V) * B
    tl.store(part_max + j * rows + t_row, m_t, t_mask)
    tl.store(part_sum + j * rows + t_row, l_t, t_mask)
    tl.store(part_max + j * rows + T * B + s_row, m, s_mask)
    tl.store(part_sum + j * rows + T * B + s_row, l, s_mask)
    if ALIGNED:
        tl.store(part_pair + j * B + s_b, pair, s_mask)
    else:
        at = part_pair + ((j * T + (t % T)[:, None]) * V + (s % V)[None, :]) * B + s_b[None, :]
        tl.store(at, pair, t_mask[:, None] & s_mask[None, :] & (t_image[:, None] == s_image[None, :]))
    if READ:
        at = part_read + (j * rows + t_row)[:, None] * D + d[None, :]
        tl.store(at, read_t / LIFT, t_mask[:, None] & d_mask[None, :])
        at = part_read + (j * rows + T * B + s_row)[:, None] * D + d[None, :]
        tl.store(at, read / LIFT, s_mask[:, None] & d_mask[None, :])


@triton.jit
def _merge(
    part_max, part_sum, part_read, row_max, row_sum, row_read, rows, teachers, D, slices, inverse_student_temp,
    inverse_teacher_temp, WIDTH: tl.constexpr, READ: tl.constexpr,
):  # fmt: skip
    """Program r: the slices of row r, in order, scaled to the largest maximum of all."""
    r = tl.program_id(0)
    inverse_temp = tl.where(r < teachers, inverse_teacher_temp, inverse_student_temp)
    d = tl.arange(0, WIDTH)
    mask = d < D
    m = tl.load(part_max + r)
    for j in range(1, slices):
        m = tl.maximum(m, tl.load(part_max + j * rows + r))
    l = 0.0
    read = tl.zeros([WIDTH], tl.float32)
    for j in range(slices):
        scale = tl.exp((tl.load(part_max + j * rows + r) - m) * inverse_temp)
        l += tl.load(part_sum + j * rows + r) * scale
        if READ:
            read += tl.load(part_read + (j * rows + r) * D + d, mask, 0.0) * scale
    tl.store(row_max + r, m)
    tl.store(row_sum + r, l)
    if READ:
        tl.store(row_read + r * D + d, read / l, mask)


@triton.jit
def _weigh(
    student, student_weight, student_scale, student_max, factors,
    teacher, teacher_weight, teacher_scale, teacher_max, pair_factors, center, unit, grad, gain_grad,
    V, T, B, images, K, D, student_k, teacher_k, inverse_student_temp, inverse_teacher_temp,
    BLOCK_S: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr, WIDTH: tl.constexpr, CHUNK: tl.constexpr,
    SCALED: tl.constexpr, TEACHER_SCALED: tl.constexpr, ALIGNED: tl.constexpr, LIFT: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Program i: the gradient of prototypes [i * BLOCK_K, (i + 1) * BLOCK_K), from all rows of both networks."""
    k = tl.program_id(0) * BLOCK_K + tl.arange(0, BLOCK_K)
    d = tl.arange(0, WIDTH)
    mask = k < K
    d_mask = d < D
    s = tl.arange(0, BLOCK_S)
    t = tl.arange(0, BLOCK_T)
    s_image, t_image = s // V, t // T
    acc = tl.zeros([BLOCK_K, WIDTH], tl.float32)
    for first in tl.range(0, B, images, num_stages=1):
        s_b, t_b = first + s_image, first + t_image
        s_mask = (s_image < images) & (s_b < B)
        t_mask = (t_image < images) & (t_b < B)
        s_row, t_row = (s % V) * B + s_b, (t % T) * B + t_b
        x = _logits(
            teacher, t_row, t_mask, teacher_weight, k, mask, D, teacher_k, BLOCK_T, BLOCK_K, WIDTH, CHUNK, PRECISION
        )
        if TEACHER_SCALED:
            x = x * tl.load(teacher_scale + k, mask, 0.0)[:, None]
        x = x - tl.load(center + k, mask, 0.0)[:, None]
        m = tl.load(teacher_max + t_row, t_mask, float("inf"))
        e = tl.exp((x - m[None, :]) * inverse_teacher_temp)
        if ALIGNED:
            g = -e * tl.load(pair_factors + s_b, s_mask, 0.0)[None, :]
        else:
            at = pair_factors + ((t % T)[:, None] * V + (s % V)[None, :]) * B + s_b[None, :]
            own = t_mask[:, None] & s_mask[None, :] & (t_image[:, None] == s_image[None, :])
            g = tl.dot(e, -tl.load(at, own, 0.0), input_precision=PRECISION)
        x = _logits(
            student, s_row, s_mask, student_weight, k, mask, D, student_k, BLOCK_S, BLOCK_K, WIDTH, CHUNK, PRECISION
        )
        if SCALED:
            x = x * tl.load(student_scale + k, mask, 0.0)[:, None]
        m = tl.load(student_max + s_row, s_mask, float("inf"))
        f = tl.load(factors + s_row, s_mask, 0.0)
        g += tl.exp((x - m[None, :]) * inverse_student_temp) * f[None, :]
        z = tl.load(student + s_row[:, None] * D + d[None, :], s_mask[:, None] & d_mask[None, :], 0.0)
        acc = tl.dot((g * LIFT).to(z.dtype), z, acc, input_precision=PRECISION)
    acc = acc * (tl.load(unit) / LIFT)
    tile = mask[:, None] & d_mask[None, :]
    if SCALED:
        v = tl.load(student_weight + k[:, None] * student_k + d[None, :], tile, 0.0).to(tl.float32)
        length = tl.sqrt(tl.sum(v * v, 1))
        along = tl.sum(acc * v, 1) / length
        acc = (acc - v * (along / length)[:, None]) * tl.load(student_scale + k, mask, 0.0)[:, None]
        tl.store(gain_grad + k, along, mask)
    tl.store(grad + k[:, None] * D + d[None, :], acc.to(grad.dtype.element_ty), tile)


@triton.jit
def _sums(
    student, student_weight, student_scale, student_max, student_sum,
    teacher, teacher_weight, teacher_scale, teacher_max, teacher_sum, center, part_sum,
    V, T, B, images, K, D, student_k, teacher_k, slice_k, inverse_student_temp, inverse_teacher_temp, limit,
    BLOCK_S: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr, WIDTH: tl.constexpr, CHUNK: tl.constexpr,
    SCALED: tl.constexpr, TEACHER_SCALED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Program (i, j): the sums of e^y of the images of block i over slice j of K, from logits made as `_weigh` makes
    them. Where no |m| / tau of the block passes `limit` it makes none: slice 0 takes the sums of the forward."""
    i = tl.program_id(0)
    j = tl.program_id(1)
    s = tl.arange(0, BLOCK_S)
    t = tl.arange(0, BLOCK_T)
    s_image, t_image = s // V, t // T
    s_b, t_b = i * images + s_image, i * images + t_image
    s_mask = (s_image < images) & (s_b < B)
    t_mask = (t_image < images) & (t_b < B)
    s_row, t_row = (s % V) * B + s_b, (t % T) * B + t_b
    m = tl.load(student_max + s_row, s_mask, 0.0)
    m_t = tl.load(teacher_max + t_row, t_mask, 0.0)
    largest = tl.max(tl.abs(m) * inverse_student_temp, 0)
    largest = tl.maximum(largest, tl.max(tl.abs(m_t) * inverse_teacher_temp, 0))
    l = tl.load(student_sum + s_row, s_mask & (j == 0), 0.0)
    l_t = tl.load(teacher_sum + t_row, t_mask & (j == 0), 0.0)
    if largest > limit:
        l = tl.zeros([BLOCK_S], tl.float32)
        l_t = tl.zeros([BLOCK_T], tl.float32)
        for start in tl.range(j * slice_k, tl.minimum((j + 1) * slice_k, K), BLOCK_K, num_stages=1):
            k = start + tl.arange(0, BLOCK_K)
            mask = k < K
            x = _logits(
                teacher, t_row, t_mask, teacher_weight, k, mask, D, teacher_k, BLOCK_T, BLOCK_K, WIDTH, CHUNK, PRECISION
            )
            if TEACHER_SCALED:
                x = x * tl.load(teacher_scale + k, mask, 0.0)[:, None]
            x = x - tl.load(center + k, mask, 0.0)[:, None]
            l_t += tl.sum(tl.where(mask[:, None], tl.exp((x - m_t[None, :]) * inverse_teacher_temp), 0.0), 0)
            x = _logits(
                student, s_row, s_mask, student_weight, k, mask, D, student_k, BLOCK_S, BLOCK_K, WIDTH, CHUNK, PRECISION
            )
            if SCALED:
                x = x * tl.load(student_scale + k, mask, 0.0)[:, None]
            l += tl.sum(tl.where(mask[:, None], tl.exp((x - m[None, :]) * inverse_student_temp), 0.0), 0)
    rows = (T + V) * B
    tl.store(part_sum + j * rows + t_row, l_t, t_mask)
    tl.store(part_sum + j * rows + T * B + s_row, l, s_mask)


class Tile(NamedTuple):
    """BLOCK_S student rows, BLOCK_K prototypes, CHUNK of the width in the first products, and warps."""

    rows: int
    prototypes: int
    chunk: int
    warps: int


# By the bytes of an element of the rows and of the wider weight, and the width: first the tile that is taken, then
# others that DINO_FAST_AUTOTUNE=1 measures too; `_attend` with reads, without, and `_weigh`. All compile for sm_80,
# sm_90 and sm_100 without spills (tests/kernels/test_linear_dino_loss.py); no tile found does for wider float32 rows.
# None is measured on a chip yet.
ATTEND_TILES = {
    (2, 2, 256): (Tile(32, 64, 64, 8), Tile(32, 32, 64, 8), Tile(16, 64, 64, 8)),
    (2, 2, 512): (Tile(16, 32, 64, 8), Tile(16, 16, 64, 8)),
    (2, 4, 256): (Tile(32, 32, 64, 8), Tile(16, 64, 64, 8)),
    (2, 4, 512): (Tile(16, 32, 32, 8), Tile(16, 16, 64, 8)),
    (4, 2, 256): (Tile(16, 16, 32, 8),),
    (4, 4, 256): (Tile(32, 16, 32, 8), Tile(16, 16, 32, 8)),
}
LOSS_TILES = ATTEND_TILES | {(2, 2, 256): (Tile(32, 64, 32, 8), Tile(32, 32, 64, 8), Tile(16, 64, 64, 8))}
WEIGH_TILES = {
    (2, 2, 256): (Tile(64, 32, 64, 8), Tile(32, 32, 64, 8)),
    (2, 2, 512): (Tile(32, 32, 64, 8),),
    (2, 4, 256): (Tile(64, 32, 64, 8), Tile(32, 32, 64, 8)),
    (2, 4, 512): (Tile(32, 32, 64, 8),),
    (4, 2, 256): (Tile(16, 32, 32, 8),),
    (4, 4, 256): (Tile(16, 32, 32, 8),),
}


class Layer:
    """A last layer's weight [K, D], and float32 gain over length [K], or None where it is not weight-normed.

    With `row` [D], `logits` [K] are that row's, in float32 from the unrounded weight.
    """

    def __init__(self, weight: Tensor, gain: Tensor | None, row: Tensor | None = None) -> None:
        self.weight = weight if weight.stride(1) == 1 else weight.contiguous()
        self.gain = None if gain is None else gain.to(torch.float32).contiguous()
        self.logits = None if row is None else weight.new_empty(len(weight), dtype=torch.float32)
        self._scale: Tensor | None = None
        if row is not None:
            self._measure(row)

    @property
    def scale(self) -> Tensor | None:
        """The gains over the lengths: a pass over the weight, made when it is first wanted."""
        if self._scale is None and self.gain is not None:
            self._measure(None)
        return self._scale

    def read_scale(self, dtype: torch.dtype) -> tuple[Tensor | None, Tensor | None]:
        """The factors [K] of e^y before it is rounded to `dtype` for the second product, and the number by which the
        product is still to be multiplied. In float16 scales are divided by the largest: as they are, the lifted
        weights would overflow from 16 on."""
        if dtype != torch.float16 or self.scale is None:
            return self.scale, None
        largest = self.scale.abs().amax().clamp_min(1e-30)
        return self.scale / largest, largest

    def _measure(self, row: Tensor | None) -> None:
        K, D = self.weight.shape
        if self.gain is not None:
            self._scale = self.weight.new_empty(K, dtype=torch.float32)
        spare = self.weight  # an address for an argument that is not used
        launch_kernel(
            _columns, (triton.cdiv(K, COLUMNS),),
            self.weight, _or(self.gain, spare), _or(row, spare), _or(self._scale, spare), _or(self.logits, spare),
            K, D, self.weight.stride(0), BLOCK_K=COLUMNS, WIDTH=width(D), SCALED=self.gain is not None,
            MEAN=row is not None, num_warps=4,
        )  # fmt: skip


def width(D: int) -> int:
    return max(16, triton.next_power_of_2(D))


def tiles(table: dict, rows: torch.dtype, weights: torch.dtype, D: int) -> tuple[Tile, ...]:
    """Those of a table for rows and (the wider of both) weights of these types, and width D."""
    return table[rows.itemsize, weights.itemsize, max(256, width(D))]


def constants(tile: Tile, V: int, T: int, D: int, dtype: torch.dtype) -> tuple[int, dict]:
    """The images of a program, and the compile-time constants other than which optional inputs there are."""
    images = tile.rows // max(V, T)
    aligned = V == 1 and T == 1
    return images, {
        "BLOCK_S": tile.rows,
        "BLOCK_T": tile.rows if aligned else max(16, triton.next_power_of_2(images * T)),
        "BLOCK_K": tile.prototypes,
        "WIDTH": width(D),
        "CHUNK": min(tile.chunk, width(D)),
        "ALIGNED": aligned,
        "LIFT": 4096.0 if dtype == torch.float16 else 1.0,
        "PRECISION": "tf32x3",
        "num_warps": tile.warps,
        "num_stages": 2,
    }


def programs(device: torch.device) -> int:
    """Of `_attend`: about one for each multiprocessor. More would only enlarge the workspace."""
    return chip(device).multiprocessors


def attend(
    student: Tensor, student_layer: Layer, teacher: Tensor, teacher_layer: Layer, center: Tensor,
    student_temp: float, teacher_temp: float, *, wanted: bool,
) -> tuple[Tensor, Tensor, Tensor | None]:  # fmt: skip
    """Row statistics [2, T + V, B], pair products d [T, V, B] and, if wanted, the rows' reads [T + V, B, D].

    All float32. `student` [V, B, D] and `teacher` [T, B, D] of one dtype, contiguous; `center` float32 [K].
    """
    if half.takes(student, student_layer.weight, teacher_layer.weight):
        arguments = (student, student_layer, teacher, teacher_layer, center, student_temp, teacher_temp)
        return half.attend(*arguments, wanted=wanted)

    def launch(tile: Tile) -> tuple[Tensor, Tensor, Tensor | None]:
        return _attend_with(
            tile, student, student_layer, teacher, teacher_layer, center, student_temp, teacher_temp, wanted
        )

    name, table = ("attend", ATTEND_TILES) if wanted else ("loss", LOSS_TILES)
    return launch(_tile(name, table, student, (student_layer, teacher_layer), len(teacher), launch))


def _attend_with(tile, student, student_layer, teacher, teacher_layer, center, student_temp, teacher_temp, wanted):
    (V, B, D), T, K = student.shape, len(teacher), len(student_layer.weight)
    images, options = constants(tile, V, T, D, student.dtype)
    blocks, slices, slice_k = _split(tile, images, B, K, student.device)
    rows = (T + V) * B

    def empty(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.float32, device=student.device)

    part_max, part_sum, part_pair = empty(slices, T + V, B), empty(slices, T + V, B), empty(slices, T, V, B)
    part_read, read = (empty(*shape, rows, D) if wanted else part_max for shape in ((slices,), ()))
    read_scale, largest = student_layer.read_scale(student.dtype) if wanted else (None, None)
    launch_kernel(
        _attend, (blocks, slices),
        student, student_layer.weight, _or(student_layer.scale, center), _or(read_scale, center),
        teacher, teacher_layer.weight, _or(teacher_layer.scale, center), center,
        part_max, part_sum, part_pair, part_read,
        V, T, B, images, K, D, student_layer.weight.stride(0), teacher_layer.weight.stride(0), slice_k,
        1.0 / student_temp, 1.0 / teacher_temp, SCALED=student_layer.scale is not None,
        TEACHER_SCALED=teacher_layer.scale is not None, READ=wanted, **options,
    )  # fmt: skip
    statistics = empty(2, T + V, B)
    launch_kernel(
        _merge, (rows,),
        part_max, part_sum, part_read, statistics[0], statistics[1], read, rows, T * B, D, slices,
        1.0 / student_temp, 1.0 / teacher_temp, WIDTH=width(D), READ=wanted, num_warps=4,
    )  # fmt: skip
    if largest is not None:
        read.mul_(largest)
    below = part_max - statistics[0]  # [slices, T + V, B]: a slice's maximum, less that of all
    shift = (below[:, T:] / student_temp)[:, None]  # [slices, 1, V, B]
    sums = part_sum[:, :T, None]  # [slices, T, 1, B]
    pairs = ((part_pair + sums * shift) * (below[:, :T] / teacher_temp).exp()[:, :, None]).sum(0)
    return statistics, pairs / statistics[1, :T, None], read.view(T + V, B, D) if wanted else None


def weight_gradient(
    student: Tensor, student_layer: Layer, teacher: Tensor, teacher_layer: Layer, center: Tensor,
    row_statistics: Tensor, factors: Tensor, pair_factors: Tensor, student_temp: float, teacher_temp: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The gradients w.r.t. the student's weight and gain, float32, from `factors` [V, B], `pair_factors` [T, V, B]."""
    T = len(teacher)
    # The largest weight of a row leaves the loop and joins again in float32: the rounded weights are then of order 1.
    unit = (factors * row_statistics[1, T:]).abs().amax().clamp_min(1e-30)
    shares = (factors / unit).contiguous(), (pair_factors / unit).contiguous()
    row_statistics = row_statistics.contiguous()
    if half.takes(student, student_layer.weight, teacher_layer.weight):
        layers = (student, student_layer, teacher, teacher_layer, center)
        return half.weight_gradient(*layers, row_statistics[0], *shares, unit, student_temp, teacher_temp)

    def launch(tile: Tile) -> tuple[Tensor, Tensor]:
        return _weigh_with(
            tile, student, student_layer, teacher, teacher_layer, center, row_statistics, *shares, unit,
            student_temp, teacher_temp,
        )  # fmt: skip

    return launch(_tile("weigh", WEIGH_TILES, student, (student_layer, teacher_layer), T, launch))


def _weigh_with(tile, student, student_layer, teacher, teacher_layer, center, statistics, factors, pair_factors, unit,
                student_temp, teacher_temp):  # fmt: skip
    (V, B, D), T, K = student.shape, len(teacher), len(student_layer.weight)
    images, options = constants(tile, V, T, D, student.dtype)
    layers = student, student_layer, teacher, teacher_layer, center
    correction = statistics[1] / _sums_with(tile, *layers, statistics, student_temp, teacher_temp)  # [T + V, B]
    factors, pair_factors = factors * correction[T:], pair_factors * correction[:T, None]
    maxima = statistics[0]
    grad = torch.empty((K, D), dtype=student_layer.weight.dtype, device=student.device)
    scaled = student_layer.scale is not None
    gain_grad = torch.empty(K if scaled else 1, dtype=torch.float32, device=student.device)
    launch_kernel(
        _weigh, (triton.cdiv(K, tile.prototypes),),
        student, student_layer.weight, _or(student_layer.scale, center), maxima[T:], factors,
        teacher, teacher_layer.weight, _or(teacher_layer.scale, center), maxima, pair_factors, center, unit, grad,
        gain_grad, V, T, B, images, K, D, student_layer.weight.stride(0), teacher_layer.weight.stride(0),
        1.0 / student_temp, 1.0 / teacher_temp, SCALED=scaled, TEACHER_SCALED=teacher_layer.scale is not None,
        **options,
    )  # fmt: skip
    return grad, gain_grad


def _sums_with(tile, student, student_layer, teacher, teacher_layer, center, statistics, student_temp, teacher_temp):
    """Float32 [T + V, B]: the sums of e^y over the logits that `_weigh` makes with this tile."""
    (V, B, D), T, K = student.shape, len(teacher), len(student_layer.weight)
    images, options = constants(tile, V, T, D, student.dtype)
    options = {name: value for name, value in options.items() if name not in ("ALIGNED", "LIFT")}
    blocks, slices, slice_k = _split(tile, images, B, K, student.device)
    part_sum = torch.empty((slices, T + V, B), dtype=torch.float32, device=student.device)
    launch_kernel(
        _sums, (blocks, slices),
        student, student_layer.weight, _or(student_layer.scale, center), statistics[0, T:], statistics[1, T:],
        teacher, teacher_layer.weight, _or(teacher_layer.scale, center), statistics[0], statistics[1], center,
        part_sum, V, T, B, images, K, D, student_layer.weight.stride(0), teacher_layer.weight.stride(0), slice_k,
        1.0 / student_temp, 1.0 / teacher_temp, LIMIT, SCALED=student_layer.scale is not None,
        TEACHER_SCALED=teacher_layer.scale is not None, **options,
    )  # fmt: skip
    return part_sum.sum(0)


def _split(tile: Tile, images: int, B: int, K: int, device: torch.device) -> tuple[int, int, int]:
    """Blocks of images, slices of K, and the prototypes of a slice."""
    blocks, columns = triton.cdiv(B, images), triton.cdiv(K, tile.prototypes)
    slice_k = triton.cdiv(columns, max(1, min(columns, programs(device) // blocks))) * tile.prototypes
    return blocks, triton.cdiv(K, slice_k), slice_k


def flops(tile: Tile, V: int, T: int, B: int, K: int, D: int, dtype: torch.dtype) -> dict[str, int]:
    """Floating-point operations of the kernels' products, padding included; `_attend` with reads, K a multiple of its
    tile's prototypes. Without padding and pairing these are 4 (V + T) and 4 V + 2 T times B K D."""
    images, c = constants(tile, V, T, D, dtype)
    blocks, pairing = triton.cdiv(B, images), 0 if c["ALIGNED"] else 2 * c["BLOCK_S"] * c["BLOCK_T"]
    once = blocks * triton.cdiv(K, tile.prototypes) * tile.prototypes
    logits = 2 * (c["BLOCK_S"] + c["BLOCK_T"]) * c["WIDTH"]
    return {"attend": once * (2 * logits + pairing), "weigh": once * (logits + 2 * c["BLOCK_S"] * c["WIDTH"] + pairing)}


def bytes_moved(tile: Tile, V: int, T: int, B: int, K: int, D: int, element_size: int, slices: int) -> dict[str, int]:
    """Bytes of weights, rows and gradients that the kernels load and store, wherever they come from: most loads are met
    by L1 and L2. Both weights and rows of one dtype, weight norm in the student's layer, `_attend` with reads."""
    blocks, tiles = triton.cdiv(B, tile.rows // max(V, T)), triton.cdiv(K, tile.prototypes)
    rows = tiles * B * D * element_size
    weights = blocks * K * D * element_size
    return {
        "attend": 3 * weights + (V + T) * rows + 4 * slices * (V + T) * B * D,
        "weigh": 2 * weights + (2 * V + T) * rows + 2 * K * D * element_size,
    }


def _tile(kernel: str, table: dict, student: Tensor, layers: tuple[Layer, Layer], T: int, launch: Callable) -> Tile:
    weights = torch.promote_types(layers[0].weight.dtype, layers[1].weight.dtype)
    candidates = tiles(table, student.dtype, weights, student.shape[2])
    V, B, D = student.shape
    key = (kernel, student.device, student.dtype, weights, V, rounded(B), D, T, len(layers[0].weight))
    return pick(key, candidates, student.device, launch)


def _or(tensor: Tensor | None, spare: Tensor) -> Tensor:
    return spare if tensor is None else tensor
