"""The native backend of linear_dino_loss: matrix products by torch.mm, and what lies between them in C++.

The prototypes are taken a tile of columns at a time: rows x tile -> logits, in one kept buffer; the epilogue turns them
into weights in place; weights x tile -> what the rows read, or weights^T x rows -> dW. Teacher and student rows are
stacked, teacher first, as both read the student's prototypes: one product serves them. Weight norm is a factor for each
column of logits, and one for each weight before it multiplies the tile, so float32 weights are used where they lie.

Extra memory, in floats: BUFFER for the logits, three times (T + V) B D for rows, values and reads, and for weights that
must be converted twice tile * D: about 9 MiB at B = 64, V = 10, D = 256 in float32.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

# floats, 6 MiB: 768 rows by 2048 columns. On two cores 1024 columns take an eighth longer, 4096 no less than 3072.
BUFFER = 6 << 18
ROWS = 1024


def forward(student, student_weight, student_gain, teacher, teacher_weight, teacher_gain, center, student_temp,
            teacher_temp, differentiable):  # fmt: skip
    """Row statistics [2, T + V, B], reads [V, B, D] (or None) and [T, B, D], mean teacher logits [K]."""
    (V, B, D), T, K = student.shape, teacher.shape[0], student_weight.shape[0]
    rows, split = _stacked(teacher, student), T * B
    teacher_mean_row = rows[:split].mean(0)
    tiles = _Tiles(rows, split, center, (teacher_temp, student_temp), K)
    statistics = torch.stack([torch.full((T + V, B), float("-inf")), torch.zeros(T + V, B)])
    readers = len(rows) if differentiable else split
    read = torch.zeros(readers, D)
    mean = torch.empty(K)
    student_layer, teacher_layer = (
        _Layer(student_weight, student_gain, tiles),
        _Layer(teacher_weight, teacher_gain, tiles),
    )
    for first in range(0, K, tiles.columns):
        w, w_teacher = student_layer.tile(first), teacher_layer.tile(first)
        part = mean[first : first + tiles.columns]
        torch.mv(w_teacher[0], teacher_mean_row, out=part)
        if w_teacher[1] is not None:
            part *= w_teacher[1]
        for start, stop, weights in tiles.attend(first, w_teacher, w, statistics.flatten(1), read):
            if start < readers:
                into = read[start:stop]
                torch.addmm(into, weights[: readers - start], w[0], out=into)
    read /= statistics[1].flatten()[:readers, None]
    student_read = read[split:].view(V, B, D) if differentiable else None
    return statistics, (student_read, read[:split].view(T, B, D)), mean


def weight_gradient(student, student_weight, student_gain, teacher, teacher_weight, teacher_gain, center,
                    row_statistics, factors, values, student_temp, teacher_temp):  # fmt: skip
    """The gradients by weight and gain: see the operator."""
    T, B, (K, D) = teacher.shape[0], teacher.shape[1], student_weight.shape
    rows, split = _stacked(teacher, student), T * B
    values = torch.cat([values.flatten(0, 1), rows[split:]])
    tiles = _Tiles(rows, split, center, (teacher_temp, student_temp), K)
    maxima, sums = row_statistics.flatten(1)
    factors = torch.cat([-1 / sums[:split], factors.flatten()])
    gradient = torch.empty((K, D), dtype=student_weight.dtype)
    buffer = None if gradient.dtype == torch.float32 else torch.empty(tiles.columns, D)
    by_gain = torch.empty(0 if student_gain is None else K)
    student_layer, teacher_layer = (
        _Layer(student_weight, student_gain, tiles),
        _Layer(teacher_weight, teacher_gain, tiles),
    )
    for first in range(0, K, tiles.columns):
        w, w_teacher = student_layer.tile(first), teacher_layer.tile(first)
        columns = slice(first, first + tiles.columns)
        out = gradient[columns] if buffer is None else buffer[: len(w[0])]
        for start, stop, weights in tiles.weigh(first, w_teacher, w, maxima, factors):
            if start == 0:
                torch.mm(weights.t(), values[:stop], out=out)
            else:
                torch.addmm(out, weights.t(), values[start:stop], out=out)
        student_layer.project(first, w[0], out, by_gain)
        if buffer is not None:
            gradient[columns] = out
    return gradient, by_gain.to(student_weight.dtype if student_gain is None else student_gain.dtype)


def _stacked(teacher: Tensor, student: Tensor) -> Tensor:
    """[T, B, D] and [V, B, D] -> [(T + V) * B, D], float32."""
    return torch.cat([x.detach().to(torch.float32).flatten(0, 1) for x in (teacher, student)])


class _Tiles:
    """Tiles of logits of the stacked rows, the first `split` of which are the teacher's."""

    def __init__(self, rows: Tensor, split: int, center: Tensor, temps: tuple[float, float], K: int) -> None:
        from dino_fast import _C

        self.native: Any = _C
        self.rows, self.split, self.temps = rows, split, temps
        self.center = center.detach().to(torch.float32).contiguous()
        height = min(ROWS, len(rows))
        self.columns = min(K, max(64, BUFFER // height // 64 * 64))
        self.buffer = torch.empty(height * self.columns)

    def attend(self, first, teacher, student, statistics, read) -> Iterator[tuple[int, int, Tensor]]:
        """(start, stop, e^((logits - max) / temp) times the student's scale), with the rows' running statistics."""
        maxima, sums = statistics
        for start, stop, tile in self._chunks(len(student[0])):
            for a, b, description in self._logits(first, start, stop, tile, teacher, student):
                into = read[a:b] if a < len(read) else None
                addresses = [_address(x) for x in (student[1], maxima[a:b], sums[a:b], into)]
                self.native.linear_dino_loss_attend(description, *addresses, read.shape[1], torch.get_num_threads())
            yield start, stop, tile

    def weigh(self, first, teacher, student, maxima, factors) -> Iterator[tuple[int, int, Tensor]]:
        """(start, stop, factor e^((logits - max) / temp))."""
        for start, stop, tile in self._chunks(len(student[0])):
            for a, b, description in self._logits(first, start, stop, tile, teacher, student):
                addresses = [_address(x) for x in (maxima[a:b], factors[a:b])]
                self.native.linear_dino_loss_weigh(description, *addresses, torch.get_num_threads())
            yield start, stop, tile

    def _chunks(self, width: int) -> Iterator[tuple[int, int, Tensor]]:
        for start in range(0, len(self.rows), ROWS):
            stop = min(start + ROWS, len(self.rows))
            yield start, stop, self.buffer[: (stop - start) * width].view(stop - start, width)

    def _logits(self, first, start, stop, tile, teacher, student) -> Iterator[tuple[int, int, tuple]]:
        """The teacher's and the student's part of the tile: rows x weight^T, not yet scaled, and their descriptions."""
        for a, b, (weight, scale), temp, center in (
            (start, min(stop, self.split), teacher, self.temps[0], self.center[first:]),
            (max(start, self.split), stop, student, self.temps[1], None),
        ):
            if a < b:
                part = tile[a - start : b - start]
                torch.mm(self.rows[a:b], weight.t(), out=part)
                yield a, b, (part.data_ptr(), _address(scale), _address(center), *part.shape, 1.0 / temp)


class _Layer:
    """A last layer's weight [K, D], and its gain [K] where it is weight-normed."""

    def __init__(self, weight: Tensor, gain: Tensor | None, tiles: _Tiles) -> None:
        self.native, self.columns, self.weight = tiles.native, tiles.columns, weight.detach()
        as_it_is = weight.dtype == torch.float32 and weight.is_contiguous()
        self.buffer = None if as_it_is else torch.empty(self.columns, weight.shape[1])
        self.gain = None if gain is None else gain.detach().to(torch.float32).contiguous()
        self.scale = None if gain is None else torch.empty(self.columns)

    def tile(self, first: int) -> tuple[Tensor, Tensor | None]:
        """Rows [first, first + columns) of the weight, float32, and what to multiply each with: gain over length."""
        rows = self.weight[first : first + self.columns]
        if self.buffer is not None:
            rows = self.buffer[: len(rows)].copy_(rows)
        if self.gain is None or self.scale is None:
            return rows, None
        scale = self.scale[: len(rows)]
        addresses = (rows.data_ptr(), self.gain[first:].data_ptr(), scale.data_ptr())
        self.native.linear_dino_loss_scale(*addresses, *rows.shape, torch.get_num_threads())
        return rows, scale

    def project(self, first: int, rows: Tensor, gradient: Tensor, by_gain: Tensor) -> None:
        """The gradient by the effective tile becomes that by the weight's `rows`, and `by_gain` gets the gain's."""
        if self.gain is not None:
            gains = (self.gain[first:].data_ptr(), by_gain[first:].data_ptr())
            arguments = (gradient.data_ptr(), rows.data_ptr(), *gains, *rows.shape)
            self.native.linear_dino_loss_project(*arguments, torch.get_num_threads())


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()
