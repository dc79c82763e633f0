"""The passes of kernels/linear_dino_loss.py for rows and weights of 16 bits: tiles as large as the matrix units want.

With the names of that file, and all rows of a network one below the other, [N, D], whatever image they are of:

    _attend    E = sum_k e^y a_k W_k / l   of student rows (keys and values W) and teacher rows (keys W', values W)
    _weigh     dW_k = sum_r f(r) e^y(k) z(r) - sum_r' h(r') e^y'(k) Z(r'),   Z(u, b) h(u, b) = sum_v h(u, v, b) z(v, b)

so no tile needs both networks' logits and none is padded to whole images. Where a student row has one target row
(`ALIGNED`, iBOT) both are at hand, and f e^y - h e^y' is taken before the product, which saves one for the teacher.

The pair products come from the reads: d(u, v) = (z(v) . E(u) - m(v)) / tau. The teacher's E is a mean under weights in
two parts of 16 bits, e = p + rest, a product each: rounded once to bfloat16 they cost the loss some 1e-5 of itself. The
student's weights are rounded once, and divided by the sum of the rounded ones, so that a common error cancels: their
reads end in a gradient of 16 bits. (float32 has no such slack: there d is summed from the logits, in the other file.)

A program of `_attend` keeps ROWS rows and their reads on chip and walks over one slice of K; slices meet in the
other file's `_merge`. A program of `_weigh` keeps BLOCK_K prototypes and their gradient and walks over all rows. The
second product takes its left side from registers. On sm_90 all products are `wgmma`.

`flops` and `bytes_moved` count the kernels' operations and bytes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from dino_fast.gpu import chip
from dino_fast.kernels.autotune import pick, rounded
from dino_fast.kernels.launch import launch_kernel

CHUNK = tl.constexpr(32)  # rows of the projection


@triton.jit
def _tile(base, row, rows, D, stride, WIDTH: tl.constexpr, WHOLE: tl.constexpr):
    """Rows of a matrix [rows, D]; beyond its end the last one, which costs fewer registers than a mask and is given no
    weight. WHOLE where D is WIDTH."""
    d = tl.arange(0, WIDTH)
    at = base + tl.minimum(row, rows - 1)[:, None] * stride + d[None, :]
    if WHOLE:
        return tl.load(at)
    return tl.load(at, (d < D)[None, :], 0.0)


@triton.jit
def _store(base, value, row, row_mask, D, WIDTH: tl.constexpr, WHOLE: tl.constexpr):
    d = tl.arange(0, WIDTH)
    mask = row_mask[:, None] if WHOLE else row_mask[:, None] & (d < D)[None, :]
    tl.store(base + row[:, None] * D + d[None, :], value.to(base.dtype.element_ty), mask)


@triton.jit
def _round(x, like):
    """float32 x in the type of the other factor of a product."""
    return x.to(like.dtype)


@triton.jit
def _walk(
    z, keys, key_scale, values, value_scale, center, begin, end, D, keys_k, values_k, log2_scale,
    ROWS: tl.constexpr, BLOCK_K: tl.constexpr, WIDTH: tl.constexpr, WHOLE: tl.constexpr, KEYS_SCALED: tl.constexpr,
    VALUES_SCALED: tl.constexpr, TEACHER: tl.constexpr, READ: tl.constexpr, LIFT: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """m, l and the reads of the rows z, summed in units in which the weights' sum is l."""
    m = tl.full([ROWS], float("-inf"), tl.float32)
    l = tl.zeros([ROWS], tl.float32)
    rounded = tl.zeros([ROWS], tl.float32)
    read = tl.zeros([ROWS, WIDTH], tl.float32)
    for start in tl.range(begin, end, BLOCK_K, num_stages=STAGES):
        k = start + tl.arange(0, BLOCK_K)
        mask = k < end
        w = _tile(keys, k, end, D, keys_k, WIDTH, WHOLE)
        x = tl.dot(z, tl.trans(w), input_precision="tf32x3")  # [ROWS, BLOCK_K]
        if KEYS_SCALED:
            x = x * tl.load(key_scale + k, mask, 0.0)[None, :]
        if TEACHER:
            x = x - tl.load(center + k, mask, 0.0)[None, :]
        x = tl.where(mask[None, :], x, float("-inf"))
        new_m = tl.maximum(m, tl.max(x, 1))
        e = tl.exp2((x - new_m[:, None]) * log2_scale)
        old = tl.exp2((m - new_m) * log2_scale)
        l = l * old + tl.sum(e, 1)
        m = new_m
        if READ:
            if VALUES_SCALED:
                a = tl.load(value_scale + k, mask, 0.0)
                wide = e * (a * LIFT)[None, :]
            else:
                wide = e * LIFT
            p = _round(wide, w)
            if TEACHER:
                rest = _round(wide - p.to(tl.float32), w)
                w = _tile(values, k, end, D, values_k, WIDTH, WHOLE)
                read = tl.dot(p, w, read * old[:, None], input_precision="tf32x3")
                read = tl.dot(rest, w, read, input_precision="tf32x3")
            else:
                if VALUES_SCALED:
                    # The weight after rounding; where that is 0 (a prototype of gain 0) the one before it.
                    back = tl.where(a != 0.0, 1.0 / (a * LIFT), 0.0)
                    rounded = rounded * old + tl.sum(tl.where(p != 0.0, p.to(tl.float32) * back[None, :], e), 1)
                else:
                    rounded = rounded * old + tl.sum(p.to(tl.float32), 1) / LIFT
                read = tl.dot(p, w, read * old[:, None], input_precision="tf32x3")
    if TEACHER:
        return m, l, read / LIFT
    return m, l, read * (l / (rounded * LIFT))[:, None]


@triton.jit
def _attend(
    student, student_weight, student_scale, read_scale, teacher, teacher_weight, teacher_scale, center,
    part_max, part_sum, part_read,
    student_rows, teacher_rows, teacher_blocks, K, D, student_k, teacher_k, slice_k, log2_student, log2_teacher,
    ROWS: tl.constexpr, BLOCK_K: tl.constexpr, WIDTH: tl.constexpr, WHOLE: tl.constexpr, SCALED: tl.constexpr,
    TEACHER_SCALED: tl.constexpr, READ: tl.constexpr, LIFT: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Program (i, j): block i of the rows, the teacher's first, and prototypes [j * slice_k, (j + 1) * slice_k)."""
    i = tl.program_id(0)
    j = tl.program_id(1)
    begin = j * slice_k
    end = tl.minimum(begin + slice_k, K)
    all_rows = teacher_rows + student_rows
    if i < teacher_blocks:
        t_row = i * ROWS + tl.arange(0, ROWS)
        t_mask = t_row < teacher_rows
        z_t = _tile(teacher, t_row, teacher_rows, D, D, WIDTH, WHOLE)
        m_t, l_t, read_t = _walk(
            z_t, teacher_weight, teacher_scale, student_weight, read_scale, center, begin, end, D, teacher_k,
            student_k, log2_teacher, ROWS, BLOCK_K, WIDTH, WHOLE, TEACHER_SCALED, SCALED, True, True, LIFT, STAGES,
        )  # fmt: skip
        at = j * all_rows + t_row
        tl.store(part_max + at, m_t, t_mask)
        tl.store(part_sum + at, l_t, t_mask)
        _store(part_read, read_t, at, t_mask, D, WIDTH, WHOLE)
    else:
        s_row = (i - teacher_blocks) * ROWS + tl.arange(0, ROWS)
        s_mask = s_row < student_rows
        z = _tile(student, s_row, student_rows, D, D, WIDTH, WHOLE)
        m, l, read = _walk(
            z, student_weight, student_scale, student_weight, read_scale, center, begin, end, D, student_k,
            student_k, log2_student, ROWS, BLOCK_K, WIDTH, WHOLE, SCALED, SCALED, False, READ, LIFT, STAGES,
        )  # fmt: skip
        at = j * all_rows + teacher_rows + s_row
        tl.store(part_max + at, m, s_mask)
        tl.store(part_sum + at, l, s_mask)
        if READ:
            _store(part_read, read, at, s_mask, D, WIDTH, WHOLE)


@triton.jit
def _shares(x, a, c, row_max, factor, row, row_mask, log2_scale, IS_SCALED: tl.constexpr, TEACHER: tl.constexpr):
    """factor e^y of prototypes by rows, [BLOCK_K, ROWS], from the products x."""
    if IS_SCALED:
        x = x * a[:, None]
    if TEACHER:
        x = x - c[:, None]
    m = tl.load(row_max + row, row_mask, float("inf"))
    return tl.exp2((x - m[None, :]) * log2_scale) * tl.load(factor + row, row_mask, 0.0)[None, :]


@triton.jit
def _scale(w, gain, k, mask):
    """The factors of weight norm for the rows of w."""
    wide = w.to(tl.float32)
    return tl.load(gain + k, mask, 0.0) / tl.sqrt(tl.sum(wide * wide, 1))


@triton.jit
def _finish(
    part_max, part_sum, part_read, row_max, row_sum, row_read, rows, teachers, D, slices, log2_student, log2_teacher,
    SLICES: tl.constexpr, WIDTH: tl.constexpr, READ: tl.constexpr,
):  # fmt: skip
    """Program r: all slices of row r at once, scaled to the largest maximum. Without READ only teachers read."""
    r = tl.program_id(0)
    log2_scale = tl.where(r < teachers, log2_teacher, log2_student)
    j = tl.arange(0, SLICES)
    mask = j < slices
    at = j * rows + r
    part = tl.load(part_max + at, mask, float("-inf"))
    m = tl.max(part, 0)
    scale = tl.where(mask, tl.exp2((part - m) * log2_scale), 0.0)
    l = tl.sum(tl.load(part_sum + at, mask, 0.0) * scale, 0)
    tl.store(row_max + r, m)
    tl.store(row_sum + r, l)
    if READ or r < teachers:
        d = tl.arange(0, WIDTH)
        parts = tl.load(part_read + at[:, None] * D + d[None, :], mask[:, None] & (d < D)[None, :], 0.0)
        tl.store(row_read + r * D + d, tl.sum(parts * scale[:, None], 0) / l, d < D)


@triton.jit
def _weigh(
    student, student_weight, student_gain, student_max, factors,
    teacher, teacher_weight, teacher_gain, teacher_max, teacher_factors, sums, center, unit, grad, gain_grad,
    student_rows, teacher_rows, K, D, student_k, teacher_k, log2_student, log2_teacher,
    ROWS: tl.constexpr, BLOCK_K: tl.constexpr, WIDTH: tl.constexpr, WHOLE: tl.constexpr, SCALED: tl.constexpr,
    TEACHER_SCALED: tl.constexpr, ALIGNED: tl.constexpr, LIFT: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Program i: the gradient of prototypes [i * BLOCK_K, (i + 1) * BLOCK_K), from all rows of both networks."""
    k = tl.program_id(0) * BLOCK_K + tl.arange(0, BLOCK_K)
    mask = k < K
    acc = tl.zeros([BLOCK_K, WIDTH], tl.float32)
    w = _tile(student_weight, k, K, D, student_k, WIDTH, WHOLE)
    a = _scale(w, student_gain, k, mask) if SCALED else 1.0
    c = tl.load(center + k, mask, 0.0)
    if ALIGNED:
        w_t = _tile(teacher_weight, k, K, D, teacher_k, WIDTH, WHOLE)
        a_t = _scale(w_t, teacher_gain, k, mask) if TEACHER_SCALED else 1.0
    for first in tl.range(0, student_rows, ROWS, num_stages=STAGES):
        row = first + tl.arange(0, ROWS)
        row_mask = row < student_rows
        z = _tile(student, row, student_rows, D, D, WIDTH, WHOLE)
        x = tl.dot(w, tl.trans(z), input_precision="tf32x3")
        g = _shares(x, a, c, student_max, factors, row, row_mask, log2_student, SCALED, False)
        if ALIGNED:
            z_t = _tile(teacher, row, teacher_rows, D, D, WIDTH, WHOLE)
            y = tl.dot(w_t, tl.trans(z_t), input_precision="tf32x3")
            g -= _shares(y, a_t, c, teacher_max, teacher_factors, row, row_mask, log2_teacher, TEACHER_SCALED, True)
        acc = tl.dot((g * LIFT).to(z.dtype), z, acc, input_precision="tf32x3")
    if not ALIGNED:
        w_t = _tile(teacher_weight, k, K, D, teacher_k, WIDTH, WHOLE)
        a_t = _scale(w_t, teacher_gain, k, mask) if TEACHER_SCALED else 1.0
        for first in tl.range(0, teacher_rows, ROWS, num_stages=STAGES):
            row = first + tl.arange(0, ROWS)
            row_mask = row < teacher_rows
            z_t = _tile(teacher, row, teacher_rows, D, D, WIDTH, WHOLE)
            y = tl.dot(w_t, tl.trans(z_t), input_precision="tf32x3")
            g = _shares(y, a_t, c, teacher_max, teacher_factors, row, row_mask, log2_teacher, TEACHER_SCALED, True)
            both = _tile(sums, row, teacher_rows, D, D, WIDTH, WHOLE)
            acc = tl.dot((g * -LIFT).to(both.dtype), both, acc, input_precision="tf32x3")
    _store(grad, acc * (tl.load(unit) / LIFT), k, mask, D, WIDTH, WHOLE)
    if SCALED:
        # Weight norm's projection, CHUNK rows at a time from the gradient that this program just wrote: beside the
        # whole tile in registers it would spill. It is rounded in between, as PyTorch's is.
        tl.debug_barrier()
        for first in range(0, BLOCK_K, CHUNK):
            some = tl.program_id(0) * BLOCK_K + first + tl.arange(0, CHUNK)
            some_mask = some < K
            v = _tile(student_weight, some, K, D, student_k, WIDTH, WHOLE).to(tl.float32)
            g = _tile(grad, some, K, D, D, WIDTH, WHOLE).to(tl.float32)
            length = tl.sqrt(tl.sum(v * v, 1))
            along = tl.sum(g * v, 1) / length
            tl.store(gain_grad + some, along, some_mask)
            gain = tl.load(student_gain + some, some_mask, 0.0)
            g = (g - v * (along / length)[:, None]) * (gain / length)[:, None]
            _store(grad, g, some, some_mask, D, WIDTH, WHOLE)


class Tile(NamedTuple):
    """Rows, prototypes, stages of loads and warps."""

    rows: int
    prototypes: int
    stages: int
    warps: int


WIDTH = 256  # of the rows that these kernels take: from 129 elements on
LOG2_E = 1.4426950408889634
# By the chip: the tile that is taken, then others that DINO_FAST_AUTOTUNE=1 measures too. All compile without spills
# and fit the chip's shared memory (tests/kernels/test_linear_dino_loss.py), with Triton 3.6 the largest, from 3.7 on
# one less. None is measured on a chip yet.
LARGEST = (Tile(128, 64, 2, 8),) if tuple(map(int, triton.__version__.split(".")[:2])) < (3, 7) else ()
ATTEND_TILES = {
    (8, 0): (Tile(64, 64, 2, 8),),
    (9, 0): (*LARGEST, Tile(128, 32, 3, 8)),
    (10, 0): (Tile(128, 32, 2, 8),),
}
WEIGH_TILES = {
    (8, 0): (Tile(32, 64, 2, 8),),
    (9, 0): (Tile(64, 128, 2, 8), Tile(32, 128, 3, 8)),
    (10, 0): (Tile(64, 128, 2, 8), Tile(32, 128, 2, 8)),
}
ALIGNED_TILES = {(8, 0): (Tile(32, 64, 2, 8),), (9, 0): (Tile(32, 128, 2, 8),), (10, 0): (Tile(32, 128, 2, 8),)}


def takes(student: Tensor, *weights: Tensor) -> bool:
    """Whether these kernels have tiles for rows [V, B, D] and weights [K, D]: all of one 16-bit type."""
    D = student.shape[2]
    if student.device.type != "cuda" or student.dtype not in (torch.bfloat16, torch.float16):
        return False
    same = all(weight.dtype == student.dtype for weight in weights)
    # Lifted and masked at once, which is float16 of less than the full width, the largest tile would spill.
    fits = D == WIDTH or (student.dtype == torch.bfloat16 and WIDTH // 2 < D < WIDTH)
    return same and fits and chip(student.device).capability in ATTEND_TILES


def programs(device: torch.device) -> int:
    """Of `_attend`, of which one fills a multiprocessor: whole rounds of them."""
    return chip(device).multiprocessors


def constants(tile: Tile, D: int, dtype: torch.dtype, kernel: str) -> dict[str, Any]:
    """The compile-time constants of both kernels other than which optional inputs there are."""
    return {
        "ROWS": tile.rows,
        "BLOCK_K": tile.prototypes,
        "WIDTH": WIDTH,
        "WHOLE": D == WIDTH and kernel == "attend",  # with Triton 3.9 `_weigh` spills without the mask, not with it
        "LIFT": 4096.0 if dtype == torch.float16 else 1.0,
        "STAGES": tile.stages,
        "num_warps": tile.warps,
        "num_stages": tile.stages,
    }


def attend(
    student: Tensor, student_layer: Any, teacher: Tensor, teacher_layer: Any, center: Tensor,
    student_temp: float, teacher_temp: float, *, wanted: bool,
) -> tuple[Tensor, Tensor, Tensor | None]:  # fmt: skip
    """As `kernels.linear_dino_loss.attend`: statistics [2, T + V, B], d [T, V, B], reads [T + V, B, D] or None."""
    (V, B, D), T, K = student.shape, len(teacher), len(student_layer.weight)
    temps = LOG2_E / student_temp, LOG2_E / teacher_temp
    read_scale, largest = student_layer.read_scale(student.dtype)

    def empty(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.float32, device=student.device)

    def launch(tile: Tile) -> tuple[Tensor, Tensor]:
        teacher_blocks, blocks, slice_k, slices = split(tile, V, T, B, K, programs(student.device))
        part_max, part_sum = empty(slices, T + V, B), empty(slices, T + V, B)
        part_read = empty(slices, T + V, B, D)
        launch_kernel(
            _attend, (blocks, slices),
            student, student_layer.weight, _or(student_layer.scale, center), _or(read_scale, center),
            teacher, teacher_layer.weight, _or(teacher_layer.scale, center), center, part_max, part_sum, part_read,
            V * B, T * B, teacher_blocks, K, D, student_layer.weight.stride(0), teacher_layer.weight.stride(0),
            slice_k, *temps, SCALED=student_layer.scale is not None, TEACHER_SCALED=teacher_layer.scale is not None,
            READ=wanted, **constants(tile, D, student.dtype, "attend"),
        )  # fmt: skip
        statistics, read = empty(2, T + V, B), empty(T + V if wanted else T, B, D)
        launch_kernel(
            _finish, ((T + V) * B,),
            part_max, part_sum, part_read, statistics[0], statistics[1], read, (T + V) * B, T * B, D, slices, *temps,
            SLICES=triton.next_power_of_2(slices), WIDTH=WIDTH, READ=wanted, num_warps=4,
        )  # fmt: skip
        return statistics, read

    statistics, read = launch(_tile_of("attend", ATTEND_TILES, student, (T, K, wanted), launch))
    if largest is not None:
        read.mul_(largest)
    products = torch.einsum("vbd,ubd->uvb", student.double(), read[:T].double())
    pairs = ((products - statistics[0, T:].double()) / student_temp).float()
    return statistics, pairs, read if wanted else None


def split(tile: Tile, V: int, T: int, B: int, K: int, programs: int) -> tuple[int, int, int, int]:
    """Blocks of teacher rows, blocks of all rows, prototypes of a slice, slices."""
    teacher_blocks = triton.cdiv(T * B, tile.rows)
    blocks = teacher_blocks + triton.cdiv(V * B, tile.rows)
    columns = triton.cdiv(K, tile.prototypes)
    slice_k = triton.cdiv(columns, max(1, min(columns, programs // blocks))) * tile.prototypes
    return teacher_blocks, blocks, slice_k, triton.cdiv(K, slice_k)


def weight_gradient(
    student: Tensor, student_layer: Any, teacher: Tensor, teacher_layer: Any, center: Tensor,
    maxima: Tensor, factors: Tensor, pair_factors: Tensor, unit: Tensor, student_temp: float, teacher_temp: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The gradients w.r.t. the student's weight and gain (float32), from `maxima` [T + V, B], `factors` [V, B] and
    `pair_factors` [T, V, B], both divided by `unit`."""
    (V, B, D), T, K = student.shape, len(teacher), len(student_layer.weight)
    aligned = V == 1 and T == 1
    teacher_factors, sums = pair_factors[:, 0].contiguous(), student
    if not aligned:
        teacher_factors = pair_factors.abs().amax(1)  # [T, B]; a row of nothing but zeros has no weight
        shares = pair_factors / teacher_factors.clamp_min(1e-30)[:, None]
        sums = torch.einsum("uvb,vbd->ubd", shares, student.float()).to(student.dtype).contiguous()  # [T, B, D]
    scaled = student_layer.gain is not None

    def launch(tile: Tile) -> tuple[Tensor, Tensor]:
        grad = torch.empty((K, D), dtype=student_layer.weight.dtype, device=student.device)
        gain_grad = torch.empty(K if scaled else 1, dtype=torch.float32, device=student.device)
        launch_kernel(
            _weigh, (triton.cdiv(K, tile.prototypes),),
            student, student_layer.weight, _or(student_layer.gain, center), maxima[T:], factors,
            teacher, teacher_layer.weight, _or(teacher_layer.gain, center), maxima, teacher_factors, sums, center,
            unit, grad, gain_grad, V * B, T * B, K, D, student_layer.weight.stride(0), teacher_layer.weight.stride(0),
            LOG2_E / student_temp, LOG2_E / teacher_temp, SCALED=scaled, ALIGNED=aligned,
            TEACHER_SCALED=teacher_layer.gain is not None, **constants(tile, D, student.dtype, "weigh"),
        )  # fmt: skip
        return grad, gain_grad

    table = ALIGNED_TILES if aligned else WEIGH_TILES
    return launch(_tile_of("weigh", table, student, (T, K, aligned), launch))


def flops(tile: Tile, weigh: Tile, V: int, T: int, B: int, K: int) -> dict[str, int]:
    """Floating-point operations of the products with reads, padding included, for a tile of each kernel and K a
    multiple of their prototypes. Without padding 4 V + 6 T, and 4 (V + T) or 4 V + 2 T aligned, times B K D."""
    teacher_blocks, blocks, _, _ = split(tile, V, T, B, K, 1)
    student, teacher = (triton.cdiv(n * B, weigh.rows) * weigh.rows for n in (V, T))
    products = 4 * student + (2 if V == T == 1 else 4) * teacher
    return {"attend": (4 * blocks + 2 * teacher_blocks) * tile.rows * K * WIDTH, "weigh": products * K * WIDTH}


def bytes_moved(
    tile: Tile, weigh: Tile, V: int, T: int, B: int, K: int, D: int, element_size: int, slices: int
) -> dict[str, int]:
    """Bytes of weights, rows, reads and gradients that the kernels load and store, wherever they come from, for whole
    tiles; with weight norm in both layers. Rows are loaded once by each program."""
    teacher_blocks, blocks, _, _ = split(tile, V, T, B, K, 1)
    rows, programs = blocks * tile.rows * D, triton.cdiv(K, weigh.prototypes)
    student, teacher = (triton.cdiv(n * B, weigh.rows) * weigh.rows for n in (V, T))
    read = student + (1 if V == T == 1 else 2) * teacher
    return {
        "attend": ((blocks + teacher_blocks) * K * D + rows * slices) * element_size + 4 * slices * (V + T) * B * D,
        # both weights; for the projection the student's again and the gradient back; the gradient twice
        "weigh": (programs * read * D + 6 * K * D) * element_size,
    }


def _tile_of(kernel: str, table: dict, student: Tensor, sizes: tuple, launch: Callable) -> Tile:
    V, B, D = student.shape
    key = ("half", kernel, student.device, student.dtype, V, rounded(B), D, *sizes)
    return pick(key, table[chip(student.device).capability], student.device, launch)


def _or(tensor: Tensor | None, spare: Tensor) -> Tensor:
    return spare if tensor is None else tensor
