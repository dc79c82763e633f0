"""The native backend of linear_dino_loss: matrix products by `matmul`, and what lies between them in C++.

The prototypes are taken a tile of columns at a time: rows x tile -> logits, in one kept buffer; the epilogue turns them
into weights in place; weights x tile -> what the rows read, or weights^T x student rows -> dW. All rows of an image are
in one tile, the teacher's first: their products are summed there, both read the student's prototypes through one
product, and dW needs the student's rows alone. Float32 weights without weight norm are used where they lie; others go
through a tile of their own, which both networks share where one chunk of rows is all there is.

Extra memory, in floats: BUFFER for the logits, six times (T + V) B D for rows and reads (partly float64), and tile * D
for weights: about 11 MiB at B = 64, V = 10, D = 256, and what PyTorch's
products keep for themselves.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dino_fast.ops.linear.matmul import matmul

# floats, 4.5 MiB: 768 rows by 1536 columns. On two cores 1024 columns take an eighth longer, 2048 no less.
BUFFER = 9 << 17
ROWS = 1024
PIECE = 128  # columns of a product of few rows
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def unsupported_reason(*tensors: Tensor) -> str | None:
    """Why this backend cannot take these tensors, or None."""
    for tensor in tensors:
        if tensor.device.type != "cpu":
            return f"it runs on the CPU, the inputs are on {tensor.device}"
        if tensor.dtype not in DTYPES:
            return f"it takes float32, bfloat16 and float16, not {tensor.dtype}"
    return None


def forward(student, student_weight, student_gain, teacher, teacher_weight, teacher_gain, center, pair_weights,
            student_temp, teacher_temp, differentiable):  # fmt: skip
    """Row statistics [2, T + V, B], pair products [T, V, B], read differences [V, B, D] (or None) and mean teacher
    logits [K]: see the operator. Without pair weights the reads [T + V, B, D] instead of their differences."""
    T, V, K = len(teacher), len(student), len(student_weight)
    tiles = _Tiles(student, teacher, center, student_temp, teacher_temp, K)
    chunks = [_Chunk(images, *_stacked(teacher[:, images], student[:, images])) for images in tiles.chunks]
    layers = tiles.layers((teacher_weight, teacher_gain), (student_weight, student_gain))
    one_tile = tiles.columns == K and pair_weights is not None
    for chunk in chunks:
        chunk.start(T, V, reads=differentiable and not one_tile)
    teacher_mean_row = teacher.detach().to(torch.float32).mean(dim=(0, 1))
    mean = torch.empty(K, dtype=torch.float32, device="cpu")
    for first in range(0, K, tiles.columns):
        columns = slice(first, first + tiles.columns)
        torch.mv(layers[0].tile(first), teacher_mean_row, out=mean[columns])
        for chunk in chunks:
            tile, description = tiles.logits(first, chunk, *layers)
            state = [_address(x) for x in (chunk.maxima, chunk.sums, chunk.pairs, chunk.read)]
            readers, width = (len(tile) if differentiable else 0), student.shape[2]
            tiles.native.linear_dino_loss_attend(description, *state, readers, width, torch.get_num_threads())
            if chunk.read is not None:
                matmul(tile, layers[1].tile(first), out=chunk.read, add=True)
            elif differentiable:
                # All sums are known before anything is read: the difference is taken before the product, not after.
                factors, pair_factors = (x.to(torch.float32).contiguous() for x in chunk.shares(pair_weights))
                pair_addresses = _address(factors), _address(pair_factors)
                tiles.native.linear_dino_loss_weigh(description, 0, *pair_addresses, torch.get_num_threads())
                difference = _product_in_pieces(tile[chunk.split :], layers[1].tile(first))
                chunk.difference = difference.unflatten(0, (V, -1))
    del tiles, layers, tile  # the buffers, before the float64 of what follows
    statistics, pairs, differences = zip(*(chunk.result(pair_weights) for chunk in chunks), strict=True)
    difference = torch.cat(differences, dim=1) if differentiable else None
    return torch.cat(statistics, dim=2), torch.cat(pairs, dim=2), difference, mean


def weight_gradient(student, student_weight, student_gain, teacher, teacher_weight, teacher_gain, center,
                    row_statistics, factors, pair_factors, student_temp, teacher_temp):  # fmt: skip
    """The gradients w.r.t. weight and gain: see the operator."""
    K, D = student_weight.shape
    tiles = _Tiles(student, teacher, center, student_temp, teacher_temp, K)
    layers = tiles.layers((teacher_weight, teacher_gain), (student_weight, student_gain))
    gradient = torch.empty((K, D), dtype=student_weight.dtype, device="cpu")
    buffer = (
        None if gradient.dtype == torch.float32 else torch.empty(tiles.columns, D, dtype=torch.float32, device="cpu")
    )
    grad_gain = torch.empty(0 if student_gain is None else K, dtype=torch.float32, device="cpu")
    chunks = []
    for images in tiles.chunks:
        chunk = _Chunk(images, *_stacked(teacher[:, images], student[:, images]))
        row_terms = [x[..., images].contiguous() for x in (row_statistics[0], factors, pair_factors)]
        chunks.append((chunk, row_terms, chunk.rows[chunk.split :]))
    for first in range(0, K, tiles.columns):
        columns = slice(first, first + tiles.columns)
        out = gradient[columns] if buffer is None else buffer[: len(gradient[columns])]
        for i, (chunk, row_terms, values) in enumerate(chunks):
            tile, description = tiles.logits(first, chunk, *layers)
            tiles.native.linear_dino_loss_weigh(description, *map(_address, row_terms), torch.get_num_threads())
            weights = tile[chunk.split :].t()
            matmul(weights, values, out=out, add=i > 0)
        layers[1].project(first, out, grad_gain)
        if buffer is not None:
            gradient[columns] = out
    return gradient, grad_gain.to(student_weight.dtype if student_gain is None else student_gain.dtype)


def _product_in_pieces(weights: Tensor, rows: Tensor) -> Tensor:
    """weights [n, K] @ rows [K, D], float64 from float32 pieces: for few rows a product is one long sum of terms that
    cancel, and its error would be many times the result's."""
    total = torch.zeros(len(weights), rows.shape[1], dtype=torch.float64, device="cpu")
    for first in range(0, len(rows), PIECE):
        total += torch.mm(weights[:, first : first + PIECE], rows[first : first + PIECE])
    return total


def _stacked(teacher: Tensor, student: Tensor) -> tuple[Tensor, int]:
    """[T, B, D] and [V, B, D] -> [(T + V) * B, D] in float32, and T * B."""
    rows = torch.cat([x.detach().to(torch.float32).flatten(0, 1) for x in (teacher, student)])
    return rows, teacher.shape[0] * teacher.shape[1]


class _Chunk:
    """Some images, their rows [(T + V) * images, D], the first `split` of which are the teacher's, and their state."""

    maxima: Tensor  # [(T + V) * images]
    sums: Tensor  # the same, float64
    pairs: Tensor  # [T, V, images], float64
    read: Tensor | None = None  # [(T + V) * images, D]
    difference: Tensor | None = None  # [V, images, D]

    def __init__(self, images: slice, rows: Tensor, split: int) -> None:
        self.images, self.rows, self.split = images, rows, split

    def start(self, T: int, V: int, reads: bool) -> None:
        n, D = self.rows.shape
        self.maxima = torch.full((n,), float("-inf"), dtype=torch.float32, device="cpu")
        self.sums = torch.zeros(n, dtype=torch.float64, device="cpu")
        self.pairs = torch.zeros(T, V, n // (T + V), dtype=torch.float64, device="cpu")
        if reads:
            self.read = torch.zeros(n, D, dtype=torch.float32, device="cpu")

    def shares(self, pair_weights: Tensor) -> tuple[Tensor, Tensor]:
        """What a student's e^(logit - maximum) is multiplied by [V, images], and its teachers' [T, V, images]."""
        T, _, n = self.pairs.shape
        sums, weights = self.sums.view(-1, n), pair_weights.double()
        return weights.sum(0)[:, None] / sums[T:], weights[..., None] / sums[:T, None]

    def result(self, pair_weights: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
        """Row statistics [2, T + V, images], pair products [T, V, images], read differences [V, images, D]."""
        T, _, n = self.pairs.shape
        sums = self.sums.view(-1, n)
        if self.read is not None and pair_weights is None:
            self.difference = self.read.view(-1, n, self.read.shape[1]) / sums[..., None]
        elif self.read is not None and pair_weights is not None:
            student_share, teacher_share = self.shares(pair_weights)
            teacher, student = self.read.view(-1, n, self.read.shape[1]).double().split([T, len(sums) - T])
            self.difference = student.mul_(student_share[..., None])
            for share, read in zip(teacher_share, teacher, strict=True):
                self.difference.addcmul_(share[..., None], read, value=-1)
        statistics = torch.stack([self.maxima.view(-1, n), sums.to(torch.float32)])
        return statistics, self.pairs / sums[:T, None], self.difference


class _Tiles:
    """Tiles of logits: a chunk of images by some columns."""

    def __init__(
        self, student: Tensor, teacher: Tensor, center: Tensor, student_temp: float, teacher_temp: float, K: int
    ) -> None:
        from dino_fast import _C

        self.native: Any = _C
        self.T, (self.V, B, _) = teacher.shape[0], student.shape
        crops = self.T + self.V
        images = min(B, max(1, ROWS // crops))
        self.chunks = [slice(i, min(i + images, B)) for i in range(0, B, images)]
        self.temps = teacher_temp, student_temp
        self.center = center.detach().to(torch.float32).contiguous()
        self.columns = min(K, max(64, BUFFER // (images * crops) // 64 * 64))
        self.buffer = torch.empty(images * crops * self.columns, dtype=torch.float32, device="cpu")

    def layers(self, *networks: tuple[Tensor, Tensor | None]) -> list[_Layer]:
        """The teacher's and the student's (weight, gain), with one buffer where no tile of either is used twice."""
        buffer, layers = None, []
        for weight, gain in networks:
            in_place = gain is None and weight.dtype == torch.float32 and weight.is_contiguous()
            if not in_place and (buffer is None or len(self.chunks) > 1):
                buffer = _Buffer(torch.empty(self.columns, weight.shape[1], dtype=torch.float32, device="cpu"))
            layers.append(_Layer(weight, gain, self, None if in_place else buffer))
        return layers

    def logits(self, first: int, chunk: _Chunk, teacher: _Layer, student: _Layer) -> tuple[Tensor, tuple]:
        """rows x weights^T of columns from `first` on, and the tile's description."""
        n, width = len(chunk.rows), min(self.columns, len(student.weight) - first)
        tile = self.buffer[: n * width].view(n, width)
        matmul(chunk.rows[: chunk.split], teacher.tile(first).t(), out=tile[: chunk.split])
        matmul(chunk.rows[chunk.split :], student.tile(first).t(), out=tile[chunk.split :])
        images = n // (self.T + self.V)
        addresses = tile.data_ptr(), self.center[first:].data_ptr()
        return tile, (*addresses, self.T, self.V, images, width, *(1.0 / temp for temp in self.temps))


class _Buffer:
    """Memory [columns, D] for a tile of effective weights, and which one it holds."""

    def __init__(self, memory: Tensor) -> None:
        self.memory = memory
        self.holds: tuple[_Layer, int] | None = None


class _Layer:
    """A last layer's weight [K, D], and its gain [K] where it is weight-normed."""

    def __init__(self, weight: Tensor, gain: Tensor | None, tiles: _Tiles, buffer: _Buffer | None) -> None:
        self.native, self.columns, self.weight, self.buffer = tiles.native, tiles.columns, weight.detach(), buffer
        self.gain = None if gain is None else gain.detach().to(torch.float32).contiguous()

    def tile(self, first: int) -> Tensor:
        """Rows [first, first + columns) of the effective weight, float32; another layer may overwrite them."""
        if self.buffer is None:
            return self.weight[first : first + self.columns]
        rows = self.buffer.memory[: len(self.weight[first : first + self.columns])]
        if self.buffer.holds == (self, first):
            return rows
        self.buffer.holds = (self, first)
        raw = self._raw(first, rows)
        if self.gain is not None:
            addresses = (raw.data_ptr(), self.gain[first:].data_ptr(), rows.data_ptr())
            self.native.linear_dino_loss_normalize(*addresses, *rows.shape, torch.get_num_threads())
        return rows

    def project(self, first: int, gradient: Tensor, grad_gain: Tensor) -> None:
        """The gradient w.r.t. the effective tile becomes that w.r.t. the weight, and `grad_gain` gets the gain's."""
        if self.gain is None or self.buffer is None:
            return
        raw = self._raw(first, self.buffer.memory[: len(gradient)])
        self.buffer.holds = None
        gains = (self.gain[first:].data_ptr(), grad_gain[first:].data_ptr())
        arguments = (gradient.data_ptr(), raw.data_ptr(), *gains, *raw.shape)
        self.native.linear_dino_loss_project(*arguments, torch.get_num_threads())

    def _raw(self, first: int, spare: Tensor) -> Tensor:
        """The tile as it was given, in float32: copied into `spare` where it is not."""
        rows = self.weight[first : first + self.columns]
        return rows if rows.dtype == torch.float32 and rows.is_contiguous() else spare.copy_(rows)


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()
