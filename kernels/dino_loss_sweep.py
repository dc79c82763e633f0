"""DINO's cross-entropy with its gradient from one pass over memory: kernels/dino_loss.py's formulas in one launch.

The logits of an image are read from device memory once and its gradient is written once, (2V + 2) e B K bytes: between
the two the image's rows must be summed up over all K, and until then its logits stay in L2.

All programs are on the chip at once (a cooperative launch). Worker (g, s) has BLOCK_K columns, slice s, of the images
g, g + G, g + 2 G, ... For its n-th image it reads the tile and leaves its maxima and sums; then it takes up the image
of BEHIND steps ago, whose sums are merged by then, reads that tile again, from L2, and writes the gradient.
Merger g waits for all slices of an image, merges them and raises the image's flag. So nobody waits for long, nobody
waits for what comes later, and the order of every sum is fixed by the shapes: the same bits every time. A wait that has
an end no matter what (WAITS polls) makes the loss and the gradient NaN instead of stopping the machine.

An image's V rows are taken in two blocks of powers of two, 8 + 2 for 2+8 crops, so that no lane has rows in vain.
The maximum is taken away before anything is scaled. `bytes_moved` counts what the kernel loads and stores.
"""

from __future__ import annotations

import os

import torch
import triton
import triton.language as tl
from torch import Tensor

from dino_fast.gpu import chip
from dino_fast.kernels.launch import launch_kernel

LOG2_E = 1.4426950408889634
BLOCK_K = 512
WARPS = 8
REGISTERS = 128  # a thread's, at most: two programs a multiprocessor
BEHIND = tl.constexpr(2)
WAITS = tl.constexpr(1 << 22)


@triton.jit
def _wait(address, value):
    """Whether the number there reached `value` (it does, unless another program died)."""
    seen = tl.atomic_add(address, 0, sem="acquire", scope="gpu")
    polls = 0
    while (seen < value) & (polls < WAITS):
        seen = tl.atomic_add(address, 0, sem="acquire", scope="gpu")
        polls += 1
    return seen >= value


@triton.jit
def _signal(address):
    """One more; whoever waits for it sees all that this program has stored."""
    tl.debug_barrier()
    return tl.atomic_add(address, 1, sem="acq_rel", scope="gpu")


@triton.jit
def _load(base, k, mask, WHOLE: tl.constexpr, OTHER: tl.constexpr):
    if WHOLE:
        return tl.load(base + k).to(tl.float32)
    return tl.load(base + k, mask, OTHER).to(tl.float32)


@triton.jit
def _load_rows(base, row, stride, V, k, mask, WHOLE: tl.constexpr):
    at = base + row.to(tl.int64)[:, None] * stride + k[None, :]
    if WHOLE:
        return tl.load(at, (row < V)[:, None], 0.0)
    return tl.load(at, (row < V)[:, None] & mask[None, :], 0.0)


@triton.jit
def _sum_up(s, row, V, mask, p0, p1, log2_scale, part, WHOLE: tl.constexpr):
    """Leaves maximum, sum of exponentials and pair products of rows [ROWS, BLOCK_K] at `part` [4, V]."""
    s = s.to(tl.float32)
    m = tl.max(s if WHOLE else tl.where(mask[None, :], s, float("-inf")), 1)
    u = s - m[:, None]
    e = tl.exp2(u * log2_scale)
    if not WHOLE:
        e = tl.where(mask[None, :], e, 0.0)
    there = row < V
    tl.store(part + row, m, there)
    tl.store(part + V + row, tl.sum(e, 1), there)
    tl.store(part + 2 * V + row, tl.sum(u * p0[None, :], 1), there)
    tl.store(part + 3 * V + row, tl.sum(u * p1[None, :], 1), there)


@triton.jit
def _write(
    student, grad, row, student_v, grad_v, V, k, mask, maxima, sums, stride, q0, q1, log2_scale, factor,
    WHOLE: tl.constexpr,
):  # fmt: skip
    """The gradient of rows [ROWS, BLOCK_K]; q0 and q1 are the teacher's probabilities times `factor`."""
    there = row < V
    s = _load_rows(student, row, student_v, V, k, mask, WHOLE).to(tl.float32)
    m = tl.load(maxima + row * stride, there, 0.0, cache_modifier=".cg")
    l = tl.load(sums + row * stride, there, 1.0, cache_modifier=".cg")
    share = tl.where(row < 2, factor, 2.0 * factor) / l
    takes0, takes1 = tl.where(row == 0, 0.0, 1.0), tl.where(row == 1, 0.0, 1.0)
    value = share[:, None] * tl.exp2((s - m[:, None]) * log2_scale)
    value -= takes0[:, None] * q0[None, :] + takes1[:, None] * q1[None, :]
    at = grad + row.to(tl.int64)[:, None] * grad_v + k[None, :]
    tl.store(at, value.to(grad.dtype.element_ty), there[:, None] if WHOLE else there[:, None] & mask[None, :])


@triton.jit
def _merge(
    b, parts, maxima, sums, image_loss, image_entropy, arrived, merged, B, V, slices, log2_student, log2_teacher,
    SLICES: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Image b: all its slices at once. `parts` [B, slices, 4 V + 6]."""
    here = _wait(arrived + b, slices)
    j = tl.arange(0, SLICES)
    mask = j < slices
    row = tl.arange(0, ROWS)
    tile = mask[:, None] & (row < V)[None, :]
    base = parts + (b * slices + j).to(tl.int64) * (4 * V + 6)
    m_j = tl.load(base[:, None] + row[None, :], tile, float("-inf"), cache_modifier=".cg")
    m_j = tl.where((row < V)[None, :], m_j, 0.0)
    m = tl.max(m_j, 0)
    down = tl.where(tile, m_j - m[None, :], 0.0)
    l_j = tl.load(base[:, None] + V + row[None, :], tile, 0.0, cache_modifier=".cg")
    l = tl.sum(l_j * tl.exp2(down * log2_student), 0)
    pairs = tl.zeros([ROWS], tl.float32)
    entropy = 0.0
    for u in tl.static_range(2):
        own = base + 4 * V + 3 * u
        t_j = tl.load(own, mask, float("-inf"), cache_modifier=".cg")
        t = tl.max(t_j, 0)
        below = tl.where(mask, t_j - t, 0.0)
        scale = tl.where(mask, tl.exp2(below * log2_teacher), 0.0)
        n_j = tl.load(own + 1, mask, 0.0, cache_modifier=".cg")
        n = tl.sum(n_j * scale, 0)
        d_j = tl.load(base[:, None] + (2 + u) * V + row[None, :], tile, 0.0, cache_modifier=".cg")
        d = tl.sum((d_j + n_j[:, None] * down) * scale[:, None], 0) * (log2_student / 1.4426950408889634)
        pairs += tl.where(row == u, 0.0, tl.log(l) - d / n)
        e_j = tl.load(own + 2, mask, 0.0, cache_modifier=".cg")
        e = tl.sum((e_j + n_j * below) * scale, 0) * (log2_teacher / 1.4426950408889634)
        entropy += tl.log(n) - e / n
        tl.store(maxima + u * B + b, t)
        tl.store(sums + u * B + b, n)
    missing = tl.where(here, 0.0, float("nan"))
    tl.store(maxima + (2 + row) * B + b, m + missing, row < V)
    tl.store(sums + (2 + row) * B + b, l, row < V)
    tl.store(image_loss + b, tl.sum(tl.where(row < V, pairs, 0.0), 0) + missing)
    tl.store(image_entropy + b, entropy)
    _signal(merged + b)


@triton.jit
def _sweep(
    student, teacher, center, grad, parts, maxima, sums, image_loss, image_entropy, teacher_sums, counters,
    loss, entropy, mean,
    student_v, student_b, teacher_t, teacher_b, grad_v, grad_b, B, V, K, slices, groups, log2_student, log2_teacher,
    factor, loss_scale, entropy_scale, mean_scale,
    BLOCK_K: tl.constexpr, MANY: tl.constexpr, REST: tl.constexpr, SLICES: tl.constexpr, ROWS: tl.constexpr,
    WHOLE: tl.constexpr, AHEAD: tl.constexpr, STATISTICS: tl.constexpr, GRADIENT: tl.constexpr,
):  # fmt: skip
    """Programs [0, groups * slices) are workers (group, slice), the last `groups` merge. `counters`: slices that came
    [B], images merged [B], mergers that ended [1], groups that ended [slices]; all 0 at the start."""
    program = tl.program_id(0)
    workers = groups * slices
    arrived, merged, ended = counters, counters + B, counters + 2 * B
    if program >= workers:
        if STATISTICS:
            for b in range(program - workers, B, groups):
                _merge(
                    b, parts, maxima, sums, image_loss, image_entropy, arrived, merged, B, V, slices, log2_student,
                    log2_teacher, SLICES, ROWS,
                )  # fmt: skip
            if _signal(ended) == groups - 1:
                total, total_entropy = 0.0, 0.0
                for first in range(0, B, BLOCK_K):
                    i = first + tl.arange(0, BLOCK_K)
                    total += tl.sum(tl.load(image_loss + i, i < B, 0.0, cache_modifier=".cg"), 0)
                    total_entropy += tl.sum(tl.load(image_entropy + i, i < B, 0.0, cache_modifier=".cg"), 0)
                tl.store(loss, total * loss_scale)
                tl.store(entropy, total_entropy * entropy_scale)
    else:
        group, slice = program // slices, program % slices
        k = slice * BLOCK_K + tl.arange(0, BLOCK_K)
        mask = k < K
        c = _load(center, k, mask, WHOLE, 0.0)
        many = tl.arange(0, MANY)
        rest = MANY + tl.arange(0, REST)
        column_sum = tl.zeros([BLOCK_K], tl.float32)
        images = tl.cdiv(B - group, groups)
        for n in range(0, images + BEHIND):
            if STATISTICS and AHEAD:
                # On their way while the gradient of an earlier image is made; at the end, the last image's once more.
                b = group + tl.minimum(n, images - 1) * groups
                rows = student + b.to(tl.int64) * student_b
                s_many = _load_rows(rows, many, student_v, V, k, mask, WHOLE)
                s_rest = _load_rows(rows, rest, student_v, V, k, mask, WHOLE)
            if GRADIENT and n >= BEHIND:
                before = group + (n - BEHIND) * groups
                wide = before.to(tl.int64)
                here = _wait(merged + before, 1)
                own = tl.where(here, factor, float("nan"))
                t0 = _load(teacher + wide * teacher_b, k, mask, WHOLE, 0.0)
                t1 = _load(teacher + wide * teacher_b + teacher_t, k, mask, WHOLE, 0.0)
                m0 = tl.load(maxima + before, cache_modifier=".cg")
                m1 = tl.load(maxima + B + before, cache_modifier=".cg")
                l0 = tl.load(sums + before, cache_modifier=".cg")
                l1 = tl.load(sums + B + before, cache_modifier=".cg")
                q0 = tl.exp2((t0 - c - m0) * log2_teacher) * (own / l0)
                q1 = tl.exp2((t1 - c - m1) * log2_teacher) * (own / l1)
                old_rows = student + wide * student_b
                out = grad + wide * grad_b
                row_maxima, row_sums = maxima + 2 * B + before, sums + 2 * B + before
                _write(
                    old_rows, out, many, student_v, grad_v, V, k, mask, row_maxima, row_sums, B, q0, q1, log2_student,
                    own, WHOLE,
                )  # fmt: skip
                _write(
                    old_rows, out, rest, student_v, grad_v, V, k, mask, row_maxima, row_sums, B, q0, q1, log2_student,
                    own, WHOLE,
                )  # fmt: skip
            if STATISTICS and n < images:
                b = group + n * groups
                t_rows = teacher + b.to(tl.int64) * teacher_b
                if not AHEAD:
                    s_many = _load_rows(student + b.to(tl.int64) * student_b, many, student_v, V, k, mask, WHOLE)
                    s_rest = _load_rows(student + b.to(tl.int64) * student_b, rest, student_v, V, k, mask, WHOLE)
                part = parts + (b * slices + slice).to(tl.int64) * (4 * V + 6)
                t0 = _load(t_rows, k, mask, WHOLE, float("-inf"))
                t1 = _load(t_rows + teacher_t, k, mask, WHOLE, float("-inf"))
                column_sum += (t0 + t1) if WHOLE else tl.where(mask, t0 + t1, 0.0)
                z0, z1 = t0 - c, t1 - c
                m0, m1 = tl.max(z0, 0), tl.max(z1, 0)
                y0, y1 = z0 - m0, z1 - m1
                p0, p1 = tl.exp2(y0 * log2_teacher), tl.exp2(y1 * log2_teacher)
                tl.store(part + 4 * V + 0, m0)
                tl.store(part + 4 * V + 1, tl.sum(p0, 0))
                tl.store(part + 4 * V + 2, tl.sum(p0 * (y0 if WHOLE else tl.where(mask, y0, 0.0)), 0))
                tl.store(part + 4 * V + 3, m1)
                tl.store(part + 4 * V + 4, tl.sum(p1, 0))
                tl.store(part + 4 * V + 5, tl.sum(p1 * (y1 if WHOLE else tl.where(mask, y1, 0.0)), 0))
                _sum_up(s_many, many, V, mask, p0, p1, log2_student, part, WHOLE)
                _sum_up(s_rest, rest, V, mask, p0, p1, log2_student, part, WHOLE)
                _signal(arrived + b)
        if STATISTICS:
            tl.store(teacher_sums + group * K + k, column_sum, mask)
            # The last group of a slice adds the groups up, in their order whoever is last.
            if _signal(ended + 1 + slice) == groups - 1:
                total = tl.zeros([BLOCK_K], tl.float32)
                for g in range(0, groups):
                    total += tl.load(teacher_sums + g * K + k, mask, 0.0, cache_modifier=".cg")
                tl.store(mean + k, total * mean_scale, mask)


@triton.jit
def _scale(values, upstream, count, BLOCK: tl.constexpr):
    factor = tl.load(upstream).to(tl.float32)
    if factor != 1.0:
        block = tl.program_id(0).to(tl.int64)
        for n in range(0, tl.cdiv(count, BLOCK * tl.num_programs(0))):
            i = (block + n * tl.num_programs(0)) * BLOCK + tl.arange(0, BLOCK)
            value = tl.load(values + i, i < count, 0.0).to(tl.float32) * factor
            tl.store(values + i, value.to(values.dtype.element_ty), i < count)


def scale(values: Tensor, upstream: Tensor) -> None:
    """values *= upstream, a scalar on the device; nothing is read or written where it is 1. `values` contiguous."""
    launch_kernel(_scale, (resident(values.device),), values, upstream, values.numel(), BLOCK=4096, num_warps=8)


def programs(K: int, B: int, resident: int) -> tuple[int, int]:
    """Slices of K and groups of images for so many programs at once; 0 groups where they do not suffice."""
    slices = triton.cdiv(K, BLOCK_K)
    return slices, min(B, resident // (slices + 1))


def resident(device: torch.device) -> int:
    """Programs that a chip holds at once."""
    return 2 * chip(device).multiprocessors


def unsupported_reason(student: Tensor) -> str | None:
    """Why this kernel does not take logits [V, B, K], or None."""
    V, B, K = student.shape
    if chip(student.device).capability < (9, 0) and student.dtype == torch.float32:
        return "float32 logits would spill on this chip"
    if V > 16:
        return f"it takes at most 16 crops, not {V}"
    if programs(K, B, resident(student.device))[1] == 0:
        return f"K = {K} is more columns than the chip holds at once"
    return None


def sweep(
    student: Tensor, teacher: Tensor, center: Tensor, student_temp: float, teacher_temp: float,
    row_statistics: Tensor, grad: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """The loss and the mean entropy (float32 scalars) and the mean of the teacher's raw logits (float32 [K]); fills
    `row_statistics` float32 [2, 2 + V, B] and `grad` [V, B, K] (which may be `student`) for an upstream gradient of 1.

    `student` and `teacher`: any float dtype, last dimension contiguous; `center` float32 [K].
    """
    V, B, K = student.shape
    slices, groups = programs(K, B, resident(student.device))

    def empty(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.float32, device=student.device)

    parts, images, teacher_sums, mean, scalars = (
        empty(B, slices, 4 * V + 6), empty(2, B), empty(groups, K), empty(K), empty(2)
    )  # fmt: skip
    counters = torch.zeros(2 * B + 1 + slices, dtype=torch.int32, device=student.device)
    constants = launch_constants(V, K, slices, student.element_size())
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"  # there programs run one by one, so nobody may wait
    for halves in ((True, False), (False, True)) if interpreted else ((True, True),):
        launch_kernel(
            _sweep, (groups * slices + groups,),
            student, teacher, center, grad, parts, row_statistics[0], row_statistics[1], images[0], images[1],
            teacher_sums, counters, scalars[0], scalars[1], mean,
            student.stride(0), student.stride(1), teacher.stride(0), teacher.stride(1), grad.stride(0), grad.stride(1),
            B, V, K, slices, groups, LOG2_E / student_temp, LOG2_E / teacher_temp,
            1.0 / (student_temp * B * (2 * V - 2)), 1.0 / (B * (2 * V - 2)), 0.5 / B, 0.5 / B,
            STATISTICS=halves[0], GRADIENT=halves[1], **constants, num_warps=WARPS, maxnreg=REGISTERS,
            launch_cooperative_grid=True,
        )  # fmt: skip
    return scalars[0], scalars[1], mean


def launch_constants(V: int, K: int, slices: int, element_size: int) -> dict[str, int | bool]:
    """What the kernel is compiled for."""
    many = 1 << (V.bit_length() - 1)
    many = many // 2 if many == V and V > 1 else many  # the second block must have a row
    return {
        "BLOCK_K": BLOCK_K,
        "MANY": many,
        "REST": triton.next_power_of_2(V - many),
        "SLICES": triton.next_power_of_2(slices),
        "ROWS": triton.next_power_of_2(V),
        "WHOLE": K % BLOCK_K == 0,
        "AHEAD": element_size == 2,  # float32 would spill
    }


def bytes_moved(V: int, B: int, K: int, element_size: int, groups: int) -> dict[str, int]:
    """Bytes of logits and gradient between the kernel and device memory, and those that it asks L2 for, where in 16
    bits each group reads its last image's student rows in vain; the sums that programs exchange are the small rest."""
    unit = element_size * K
    again = BEHIND.value * V * groups if element_size == 2 else 0
    return {"device memory": (2 * V + 2) * B * unit, "L2": ((3 * V + 4) * B + again) * unit}
