"""DINO's cross-entropy over all crop pairs, on logits, in Triton.

For a student row v with logits s and a teacher row u of the same image with z = t - c,

    loss = 1/(B N) sum over images and pairs u != v of  log l(v) - d(u, v) / l(u)
    x = (s - max s) / tau_s,   y = (z - max z) / tau_t,   l = sum_k e^x or e^y,   d(u, v) = sum_k e^y x,
    dloss/ds = (w(v) e^x / l(v) - sum_{u != v} e^y / l(u)) / (tau_s B N),   w(v) = the number of its pairs.

The maximum is taken away before anything is scaled, multiplied or stored, so large logits lose no bits.

Passes over memory, for V student and T = 2 teacher rows an image and e bytes a logit:
  `statistics`  reads every logit once; the pair products d are kept beside the running maxima and rescaled with them.
                Each program takes all rows of one image and a slice of K, so the teacher's tiles are read once for all
                V crops; slices meet in `_merge`, in a fixed order. (V + T) e B K bytes.
  `gradient`    reads every logit once more, writes the gradient (over the student's logits where the caller allows) and
                the mean of the teacher's logits, which it has at hand for all images of a column. (2V + T) e B K bytes.
  `mean`        the same mean alone, where no gradient is wanted yet. T e B K bytes.
`bytes_moved` states the same for the benchmarks and the test that holds it to the loads and stores below.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from dino_fast.gpu import chip
from dino_fast.kernels.launch import launch_kernel

# A tile of 16 rows by 512 columns in float32 is 32 registers a thread at 8 warps; `_statistics` holds three of them
# (4 warps would spill on sm_90).
BLOCK_K = 512
WARPS = 8
# Programs that a multiprocessor is given, at least, whatever the number of images.
WAVES = 2


@triton.jit
def _statistics(
    student, teacher, center, row_stats, pair_stats, teacher_stats,
    student_v, student_b, teacher_t, teacher_b, V, K, slice_k, inverse_student_temp, inverse_teacher_temp,
    ROWS: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Program (b, i): all rows of image b, columns [i * slice_k, (i + 1) * slice_k)."""
    b = tl.program_id(0).to(tl.int64)
    i = tl.program_id(1)
    rows = tl.arange(0, ROWS)
    row_mask = rows < V
    first = student + b * student_b + rows.to(tl.int64) * student_v
    m = tl.full([ROWS], float("-inf"), tl.float32)
    l = tl.zeros([ROWS], tl.float32)
    d0 = tl.zeros([ROWS], tl.float32)
    d1 = tl.zeros([ROWS], tl.float32)
    m0, l0, e0 = float("-inf"), 0.0, 0.0  # teacher row 0: maximum, sum, sum of e^(y - m) (y - m)
    m1, l1, e1 = float("-inf"), 0.0, 0.0
    end = tl.minimum((i + 1) * slice_k, K)
    for start in range(i * slice_k, end, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        mask = k < end
        c = tl.load(center + k, mask, 0.0).to(tl.float32)
        t0 = tl.load(teacher + b * teacher_b + k, mask, float("-inf")).to(tl.float32)
        t1 = tl.load(teacher + teacher_t + b * teacher_b + k, mask, float("-inf")).to(tl.float32)
        # A row beyond V repeats nothing: it is zeros, and is never stored.
        s = tl.load(first[:, None] + k[None, :], row_mask[:, None] & mask[None, :], float("-inf")).to(tl.float32)
        s = tl.where(row_mask[:, None], s, 0.0)
        z0, z1 = t0 - c, t1 - c
        new_m = tl.maximum(m, tl.max(s, 1))
        new_m0 = tl.maximum(m0, tl.max(z0, 0))
        new_m1 = tl.maximum(m1, tl.max(z1, 0))
        x = (s - new_m[:, None]) * inverse_student_temp
        y0 = (z0 - new_m0) * inverse_teacher_temp
        y1 = (z1 - new_m1) * inverse_teacher_temp
        p0, p1 = tl.exp(y0), tl.exp(y1)
        # A maximum is -inf before the first tile; the sum that its shift multiplies is 0 then.
        shift = tl.where(l > 0.0, (m - new_m) * inverse_student_temp, 0.0)
        shift0 = tl.where(l0 > 0.0, (m0 - new_m0) * inverse_teacher_temp, 0.0)
        shift1 = tl.where(l1 > 0.0, (m1 - new_m1) * inverse_teacher_temp, 0.0)
        scale0, scale1 = tl.exp(shift0), tl.exp(shift1)
        known = tl.where(mask[None, :], x, 0.0)  # beyond K, 0 * -inf would be NaN
        d0 = scale0 * (d0 + l0 * shift) + tl.sum(p0[None, :] * known, 1)
        d1 = scale1 * (d1 + l1 * shift) + tl.sum(p1[None, :] * known, 1)
        e0 = scale0 * (e0 + l0 * shift0) + tl.sum(p0 * tl.where(mask, y0, 0.0), 0)
        e1 = scale1 * (e1 + l1 * shift1) + tl.sum(p1 * tl.where(mask, y1, 0.0), 0)
        l = l * tl.exp(shift) + tl.sum(tl.exp(x), 1)
        l0 = l0 * scale0 + tl.sum(p0, 0)
        l1 = l1 * scale1 + tl.sum(p1, 0)
        m, m0, m1 = new_m, new_m0, new_m1
    part = b * tl.num_programs(1) + i
    tl.store(row_stats + (part * 2 + 0) * V + rows, m, row_mask)
    tl.store(row_stats + (part * 2 + 1) * V + rows, l, row_mask)
    tl.store(pair_stats + (part * 2 + 0) * V + rows, d0, row_mask)
    tl.store(pair_stats + (part * 2 + 1) * V + rows, d1, row_mask)
    tl.store(teacher_stats + part * 6 + 0, m0)
    tl.store(teacher_stats + part * 6 + 1, l0)
    tl.store(teacher_stats + part * 6 + 2, e0)
    tl.store(teacher_stats + part * 6 + 3, m1)
    tl.store(teacher_stats + part * 6 + 4, l1)
    tl.store(teacher_stats + part * 6 + 5, e1)


@triton.jit
def _merge(
    row_stats, pair_stats, teacher_stats, maxima, sums, image_loss, image_entropy, B, V, slices,
    inverse_student_temp, inverse_teacher_temp, ROWS: tl.constexpr,
):  # fmt: skip
    """Program b: the slices of image b, one after the other, with the same rescaling as between tiles."""
    b = tl.program_id(0)
    rows = tl.arange(0, ROWS)
    row_mask = rows < V
    m = tl.full([ROWS], float("-inf"), tl.float32)
    l = tl.zeros([ROWS], tl.float32)
    d0 = tl.zeros([ROWS], tl.float32)
    d1 = tl.zeros([ROWS], tl.float32)
    m0, l0, e0 = float("-inf"), 0.0, 0.0
    m1, l1, e1 = float("-inf"), 0.0, 0.0
    for i in range(slices):
        part = b * slices + i
        pm = tl.load(row_stats + (part * 2 + 0) * V + rows, row_mask, 0.0)
        pl = tl.load(row_stats + (part * 2 + 1) * V + rows, row_mask, 1.0)
        pd0 = tl.load(pair_stats + (part * 2 + 0) * V + rows, row_mask, 0.0)
        pd1 = tl.load(pair_stats + (part * 2 + 1) * V + rows, row_mask, 0.0)
        pm0 = tl.load(teacher_stats + part * 6 + 0)
        pl0 = tl.load(teacher_stats + part * 6 + 1)
        pe0 = tl.load(teacher_stats + part * 6 + 2)
        pm1 = tl.load(teacher_stats + part * 6 + 3)
        pl1 = tl.load(teacher_stats + part * 6 + 4)
        pe1 = tl.load(teacher_stats + part * 6 + 5)
        new_m, new_m0, new_m1 = tl.maximum(m, pm), tl.maximum(m0, pm0), tl.maximum(m1, pm1)
        old = tl.where(l > 0.0, (m - new_m) * inverse_student_temp, 0.0)
        old0 = tl.where(l0 > 0.0, (m0 - new_m0) * inverse_teacher_temp, 0.0)
        old1 = tl.where(l1 > 0.0, (m1 - new_m1) * inverse_teacher_temp, 0.0)
        new = (pm - new_m) * inverse_student_temp
        new0 = (pm0 - new_m0) * inverse_teacher_temp
        new1 = (pm1 - new_m1) * inverse_teacher_temp
        d0 = tl.exp(old0) * (d0 + l0 * old) + tl.exp(new0) * (pd0 + pl0 * new)
        d1 = tl.exp(old1) * (d1 + l1 * old) + tl.exp(new1) * (pd1 + pl1 * new)
        e0 = tl.exp(old0) * (e0 + l0 * old0) + tl.exp(new0) * (pe0 + pl0 * new0)
        e1 = tl.exp(old1) * (e1 + l1 * old1) + tl.exp(new1) * (pe1 + pl1 * new1)
        l = l * tl.exp(old) + pl * tl.exp(new)
        l0 = l0 * tl.exp(old0) + pl0 * tl.exp(new0)
        l1 = l1 * tl.exp(old1) + pl1 * tl.exp(new1)
        m, m0, m1 = new_m, new_m0, new_m1
    log_l = tl.log(l)
    pairs = tl.where(rows != 0, log_l - d0 / l0, 0.0) + tl.where(rows != 1, log_l - d1 / l1, 0.0)
    tl.store(maxima + (2 + rows) * B + b, m, row_mask)
    tl.store(sums + (2 + rows) * B + b, l, row_mask)
    tl.store(maxima + b, m0)
    tl.store(maxima + B + b, m1)
    tl.store(sums + b, l0)
    tl.store(sums + B + b, l1)
    tl.store(image_loss + b, tl.sum(tl.where(row_mask, pairs, 0.0), 0))
    tl.store(image_entropy + b, (tl.log(l0) - e0 / l0) + (tl.log(l1) - e1 / l1))


@triton.jit
def _gradient(
    student, teacher, center, maxima, sums, upstream, grad, teacher_sums,
    student_v, student_b, teacher_t, teacher_b, grad_v, grad_b, B, V, K, images, inverse_student_temp,
    inverse_teacher_temp, factor,
    ROWS: tl.constexpr, BLOCK_K: tl.constexpr, WRITE_GRADIENT: tl.constexpr,
):  # fmt: skip
    """Program (j, g): columns [j * BLOCK_K, (j + 1) * BLOCK_K) of images [g * images, (g + 1) * images)."""
    k = tl.program_id(0) * BLOCK_K + tl.arange(0, BLOCK_K)
    mask = k < K
    g = tl.program_id(1)
    rows = tl.arange(0, ROWS)
    row_mask = rows < V
    tile = row_mask[:, None] & mask[None, :]
    weight = tl.where(rows < 2, 1.0, 2.0)
    c = tl.load(center + k, mask, 0.0).to(tl.float32)
    total = tl.zeros([BLOCK_K], tl.float32)
    if WRITE_GRADIENT:
        factor = factor * tl.load(upstream).to(tl.float32)
    wide_first = (g * images).to(tl.int64)  # offsets of whole images pass 2^31
    for b in range(g * images, tl.minimum((g + 1) * images, B)):
        wide_b = wide_first + (b - g * images)
        t0 = tl.load(teacher + wide_b * teacher_b + k, mask, 0.0).to(tl.float32)
        t1 = tl.load(teacher + teacher_t + wide_b * teacher_b + k, mask, 0.0).to(tl.float32)
        total += t0 + t1
        if WRITE_GRADIENT:
            wide_rows = rows.to(tl.int64)
            at = student + wide_b * student_b + wide_rows[:, None] * student_v + k[None, :]
            s = tl.load(at, tile, 0.0).to(tl.float32)
            m = tl.load(maxima + (2 + rows) * B + b, row_mask, 0.0)
            share = weight / tl.load(sums + (2 + rows) * B + b, row_mask, 1.0)
            p0 = tl.exp((t0 - c - tl.load(maxima + b)) * inverse_teacher_temp) / tl.load(sums + b)
            p1 = tl.exp((t1 - c - tl.load(maxima + B + b)) * inverse_teacher_temp) / tl.load(sums + B + b)
            q = tl.where((rows != 0)[:, None], p0[None, :], 0.0) + tl.where((rows != 1)[:, None], p1[None, :], 0.0)
            value = (share[:, None] * tl.exp((s - m[:, None]) * inverse_student_temp) - q) * factor
            out = grad + wide_b * grad_b + wide_rows[:, None] * grad_v + k[None, :]
            tl.store(out, value.to(grad.dtype.element_ty), tile)
    tl.store(teacher_sums + g.to(tl.int64) * K + k, total, mask)


def statistics(
    student: Tensor, teacher: Tensor, center: Tensor, student_temp: float, teacher_temp: float, row_statistics: Tensor
) -> tuple[Tensor, Tensor]:
    """The loss and the mean entropy of the targets, float32 scalars; fills `row_statistics` for `gradient`.

    `student` [V, B, K] and `teacher` [2, B, K]: any float dtype, last dimension contiguous; `center` [K];
    `row_statistics` float32 [2, 2 + V, B], contiguous: each row's maximum and sum of exponentials, the teacher's first.
    """
    V, B, K = student.shape
    blocks = triton.cdiv(K, BLOCK_K)
    slices = max(1, min(blocks, triton.cdiv(WAVES * chip(student.device).multiprocessors, B)))
    slice_k = triton.cdiv(blocks, slices) * BLOCK_K
    slices = triton.cdiv(K, slice_k)

    def empty(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.float32, device=student.device)

    row_stats, pair_stats, teacher_stats = empty(B, slices, 2, V), empty(B, slices, 2, V), empty(B, slices, 6)
    rows = triton.next_power_of_2(V)
    launch_kernel(
        _statistics, (B, slices),
        student, teacher, center, row_stats, pair_stats, teacher_stats,
        student.stride(0), student.stride(1), teacher.stride(0), teacher.stride(1), V, K, slice_k,
        1.0 / student_temp, 1.0 / teacher_temp, ROWS=rows, BLOCK_K=BLOCK_K, num_warps=WARPS,
    )  # fmt: skip
    image_loss, image_entropy = empty(B), empty(B)
    launch_kernel(
        _merge, (B,),
        row_stats, pair_stats, teacher_stats, row_statistics[0], row_statistics[1], image_loss, image_entropy,
        B, V, slices, 1.0 / student_temp, 1.0 / teacher_temp, ROWS=rows, num_warps=1,
    )  # fmt: skip
    return image_loss.sum() / (B * (2 * V - 2)), image_entropy.sum() / (2 * B)


def gradient(
    student: Tensor, teacher: Tensor, center: Tensor, row_statistics: Tensor, upstream: Tensor, grad: Tensor,
    student_temp: float, teacher_temp: float,
) -> Tensor:  # fmt: skip
    """Writes the student's gradient into `grad` [V, B, K] (or `student` itself); returns the mean of the teacher's raw
    logits, float32 [K]. `upstream` is the loss's gradient, a scalar that is read on the device."""
    return _columns(student, teacher, center, row_statistics, upstream, grad, student_temp, teacher_temp)


def mean(student: Tensor, teacher: Tensor, center: Tensor, row_statistics: Tensor) -> Tensor:
    """The mean of the teacher's raw logits over its 2 B rows, float32 [K]."""
    return _columns(student, teacher, center, row_statistics, row_statistics, None, 1.0, 1.0)


def _columns(
    student: Tensor, teacher: Tensor, center: Tensor, row_statistics: Tensor, upstream: Tensor, grad: Tensor | None,
    student_temp: float, teacher_temp: float,
) -> Tensor:  # fmt: skip
    V, B, K = student.shape
    # Columns alone fill half the chip at K = 65536; images are split too, and their sums are added in order.
    blocks = triton.cdiv(K, BLOCK_K)
    groups = max(1, min(B, triton.cdiv(WAVES * chip(student.device).multiprocessors, blocks)))
    images = triton.cdiv(B, groups)
    groups = triton.cdiv(B, images)
    sums = torch.empty((groups, K), dtype=torch.float32, device=student.device)
    out = student if grad is None else grad
    launch_kernel(
        _gradient, (blocks, groups),
        student, teacher, center, row_statistics[0], row_statistics[1], upstream, out, sums,
        student.stride(0), student.stride(1), teacher.stride(0), teacher.stride(1), out.stride(0), out.stride(1),
        B, V, K, images, 1.0 / student_temp, 1.0 / teacher_temp, 1.0 / (student_temp * B * (2 * V - 2)),
        ROWS=triton.next_power_of_2(V), BLOCK_K=BLOCK_K, WRITE_GRADIENT=grad is not None,
        num_warps=WARPS,
    )  # fmt: skip
    return sums.sum(0) / (2 * B)


def bytes_moved(V: int, B: int, K: int, element_size: int) -> dict[str, int]:
    """Bytes of logits that each pass reads and writes; the statistics they exchange are thousands of times less."""
    unit = element_size * B * K
    return {"statistics": (V + 2) * unit, "gradient": (2 * V + 2) * unit, "mean": 2 * unit}
