"""Every function of the compiled module by itself, on random sizes: arguments that do not fit are a ValueError and
change nothing, arguments that fit write nothing beside their buffers.

A new function needs a case here: `test_every_function_has_a_case` fails without one. Buffers lie between guard zones.
With DINO_FAST_FUZZ_GUARD=0 they end where their memory does, so that AddressSanitizer sees reads too
(test_native_sanitized.py); DINO_FAST_FUZZ_ROUNDS asks for more rounds.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch

from dino_fast import _C as compiled

native: Any = compiled
GUARD = int(os.environ.get("DINO_FAST_FUZZ_GUARD", 192))
ROUNDS = int(os.environ.get("DINO_FAST_FUZZ_ROUNDS", 12))
FLOATS = (torch.float32, torch.bfloat16, torch.float16)  # by their codes
SIZES = (-1, 1 << 62)
ADDRESSES = (0, -64)
CODES = (-1, 3)
THREADS = (0, -1, 1 << 20)


class Memory:
    """Buffers between guard zones; those of one call."""

    def __init__(self, rng: np.random.Generator) -> None:
        self.rng = rng
        self.buffers: list[tuple[torch.Tensor, int, int]] = []
        self.before: list[torch.Tensor] = []

    def new(self, *shape: int, dtype: torch.dtype = torch.float32, values: Any = None) -> int:
        """The address of a buffer of random (or these) values; every alignment that the dtype allows comes up."""
        count = int(np.prod(shape, dtype=np.int64))
        if values is None:
            values = torch.from_numpy(self.rng.standard_normal(count))
        given = torch.as_tensor(values).to(dtype).reshape(-1).contiguous()
        given = given.view(torch.uint8) if len(given) else torch.empty(0, dtype=torch.uint8, device="cpu")
        first = GUARD and GUARD + int(self.rng.integers(16)) * dtype.itemsize
        whole = torch.full((first + len(given) + GUARD,), 0xA5, dtype=torch.uint8, device="cpu")
        whole[first : first + len(given)] = given
        self.buffers.append((whole, first, first + len(given)))
        return whole.data_ptr() + first if count else 0

    def snapshot(self) -> None:
        self.before = [whole.clone() for whole, _, _ in self.buffers]

    def assert_unchanged(self) -> None:
        for (whole, _, _), before in zip(self.buffers, self.before, strict=True):
            assert torch.equal(whole, before)

    def assert_guards_unchanged(self) -> None:
        for (whole, first, last), before in zip(self.buffers, self.before, strict=True):
            assert torch.equal(whole[:first], before[:first]) and torch.equal(whole[last:], before[last:])


class Call(NamedTuple):
    arguments: tuple
    wrong: list[tuple]  # arguments, each to be refused
    function: Callable | None = None  # of another name than the case, or with something around it
    runs: bool = True  # False: needs a GPU, only the refusals are tried


def put(arguments: tuple, path: tuple[int, ...], value: Any) -> tuple:
    """The arguments with another value at `path`, which leads through nested tuples."""
    i, *rest = path
    inner = put(arguments[i], tuple(rest), value) if rest else value
    return (*arguments[:i], inner, *arguments[i + 1 :])


def wrongs(arguments: tuple, *groups: tuple[list, tuple]) -> list[tuple]:
    """Each group's values at each of its paths (a number stands for a path of one), one at a time."""
    return [
        put(arguments, (path,) if isinstance(path, int) else path, value)
        for paths, values in groups
        for path in paths
        for value in values
    ]


def plain(rng: np.random.Generator, memory: Memory) -> Call:
    return Call((), [])


def set_isa(rng: np.random.Generator, memory: Memory) -> Call:
    return Call((native.isa(),), [("sse9",), ("",)])


# --- dino_loss ------------------------------------------------------------------------------------------------------


def dino_loss_problem(rng: np.random.Generator, memory: Memory) -> tuple[tuple, torch.dtype]:
    V, B = int(rng.integers(1, 6)), int(rng.integers(1, 5))
    K = int(rng.integers(1, 70) if rng.random() < 0.7 else rng.integers(1000, 2100))
    logits = []
    for crops in (V, 2):
        code = int(rng.integers(3))
        row = K + int(rng.integers(3))
        crop = B * row + int(rng.integers(3))
        address = memory.new((crops - 1) * crop + (B - 1) * row + K, dtype=FLOATS[code])
        logits.append((address, code, crop, row))
    weights = rng.random(2 * V).tolist()
    temps = (float(rng.uniform(0.05, 1)), float(rng.uniform(0.05, 1)))
    problem = (*logits, memory.new(K), weights, (V, B, K), temps, int(rng.integers(1, 4)))
    return problem, FLOATS[logits[0][1]]


def wrong_problems(arguments: tuple) -> list[tuple]:
    (V, B, K), weights = arguments[4], arguments[3]
    return [
        *wrongs(
            arguments,
            ([(0, 0), (1, 0), 2], ADDRESSES),
            ([(0, 1), (1, 1)], CODES),
            ([(0, 2), (0, 3), (1, 2), (1, 3)], (-1,)),
            ([(4, 0), (4, 1), (4, 2)], (0, *SIZES)),
            ([(5, 0), (5, 1)], (0.0, -0.1, float("nan"))),
            ([6], THREADS),
            ([3], (weights[1:], [*weights, 1.0], [])),
        ),
        put(arguments, (4,), (V + 1, B, K)),
    ]


def dino_loss_forward(rng: np.random.Generator, memory: Memory) -> Call:
    problem, dtype = dino_loss_problem(rng, memory)
    V, B, K = problem[4]
    student, code, *_ = problem[0]
    loss, mean, entropy, statistics = (memory.new(n) for n in (1, K, 1, 2 * (2 + V) * B))
    place = rng.integers(3)
    if place == 0:  # in the student's place
        problem = ((student, code, B * K, K), *problem[1:])
    gradient = (student, memory.new(V * B * K, dtype=dtype), 0)[place]
    arguments = (*problem, loss, mean, entropy, statistics, gradient)
    wrong = wrong_problems(arguments) + wrongs(
        arguments,
        ([7, 8, 9, 10], ADDRESSES),
        ([7, 8, 9, 10], (problem[1][0],)),
        ([11], (problem[1][0], problem[2], statistics, student + dtype.itemsize)),
        ([8], (statistics,)),
    )
    return Call(arguments, wrong)


def dino_loss_gradient(rng: np.random.Generator, memory: Memory) -> Call:
    problem, dtype = dino_loss_problem(rng, memory)
    V, B, K = problem[4]
    statistics = memory.new(values=rng.uniform(1, 9, 2 * (2 + V) * B))
    arguments = (*problem, statistics, 1.5, memory.new(V * B * K, dtype=dtype))
    return Call(
        arguments, wrong_problems(arguments) + wrongs(arguments, ([7, 9], ADDRESSES), ([9], (statistics, problem[2])))
    )


# --- linear_dino_loss -----------------------------------------------------------------------------------------------


def tile(rng: np.random.Generator, memory: Memory) -> tuple:
    T, V, images, columns = (int(rng.integers(1, n)) for n in (5, 6, 7, 70))
    logits = memory.new((T + V) * images * columns)
    return logits, memory.new(columns), T, V, images, columns, 25.0, 10.0


def wrong_tiles(arguments: tuple) -> list[tuple]:
    return wrongs(
        arguments,
        ([(0, 0), (0, 1)], ADDRESSES),
        ([(0, 2), (0, 3), (0, 4), (0, 5)], (0, *SIZES)),
        ([(0, 6), (0, 7)], (0.0, -1.0, float("nan"))),
        ([(0, 1)], (arguments[0][0],)),
        ([-1 % len(arguments)], THREADS),
    )


def linear_dino_loss_attend(rng: np.random.Generator, memory: Memory) -> Call:
    tile_args = tile(rng, memory)
    _, _, T, V, images, *_ = tile_args
    rows, width = (T + V) * images, int(rng.integers(1, 20))
    first = rng.random() < 0.5
    maxima = memory.new(rows, values=np.full(rows, -np.inf) if first else rng.standard_normal(rows))
    sums = memory.new(rows, dtype=torch.float64, values=np.zeros(rows) if first else rng.uniform(1, 9, rows))
    pairs = memory.new(T * V * images, dtype=torch.float64)
    readers = int(rng.choice([0, rows]))
    read = memory.new(rows * width) if readers and rng.random() < 0.7 else 0
    arguments = (tile_args, maxima, sums, pairs, read, readers, width, int(rng.integers(1, 4)))
    wrong = wrong_tiles(arguments) + wrongs(
        arguments,
        ([1, 2, 3], (*ADDRESSES, tile_args[0], tile_args[1])),
        ([4], (-64, tile_args[0])) if read else ([], ()),
        ([5], (*SIZES, rows - 1 or 2, rows + 1)),
        ([6], SIZES if read else (-1,)),
    )
    return Call(arguments, wrong)


def linear_dino_loss_weigh(rng: np.random.Generator, memory: Memory) -> Call:
    tile_args = tile(rng, memory)
    _, _, T, V, images, *_ = tile_args
    maxima = memory.new((T + V) * images) if rng.random() < 0.5 else 0
    arguments = (tile_args, maxima, memory.new(V * images), memory.new(T * V * images), int(rng.integers(1, 4)))
    wrong = wrongs(arguments, ([2, 3], (*ADDRESSES, tile_args[0])), ([1], (-64, tile_args[0])))
    return Call(arguments, wrong_tiles(arguments) + wrong)


def linear_dino_loss_normalize(rng: np.random.Generator, memory: Memory) -> Call:
    n, width = (int(x) for x in rng.integers(1, 40, 2))
    weight, gain = memory.new(n * width), memory.new(n)
    effective = weight if rng.random() < 0.5 else memory.new(n * width)
    arguments = (weight, gain, effective, n, width, int(rng.integers(1, 4)))
    wrong = wrongs(arguments, ([0, 1, 2], ADDRESSES), ([3, 4], SIZES), ([5], THREADS), ([1], (effective,)))
    return Call(arguments, wrong + ([put(arguments, (2,), weight + 4)] if n * width > 1 else []))


def linear_dino_loss_project(rng: np.random.Generator, memory: Memory) -> Call:
    n, width = (int(x) for x in rng.integers(1, 40, 2))
    gradient, weight, gain, grad_gain = (memory.new(count) for count in (n * width, n * width, n, n))
    arguments = (gradient, weight, gain, grad_gain, n, width, int(rng.integers(1, 4)))
    wrong = wrongs(
        arguments,
        ([0, 1, 2, 3], ADDRESSES),
        ([4, 5], SIZES),
        ([6], THREADS),
        ([1, 2, 3], (gradient,)),
        ([0, 2], (grad_gain,)),
    )
    return Call(arguments, wrong)


# --- matmul and packed_attention ------------------------------------------------------------------------------------


def matmul(rng: np.random.Generator, memory: Memory) -> Call:
    M, K, N = (int(x) for x in rng.integers(2, 90, 3))
    matrices = []
    for rows, columns in ((M, K), (K, N)):
        gap = int(rng.integers(3))
        if rng.random() < 0.5:
            matrices.append((memory.new((rows - 1) * (columns + gap) + columns), rows, columns, columns + gap, 1))
        else:
            matrices.append((memory.new((columns - 1) * (rows + gap) + rows), rows, columns, 1, rows + gap))
    out_row = N + int(rng.integers(3))
    out = memory.new((M - 1) * out_row + N)
    bias = memory.new(N) if rng.random() < 0.5 else 0
    add = bool(rng.random() < 0.5) and not bias
    arguments = (*matrices, bias, add, out, out_row, int(rng.integers(1, 4)))
    wrong = wrongs(
        arguments,
        ([(0, 0), (1, 0), 4], ADDRESSES),
        ([(0, 1), (0, 2), (1, 1), (1, 2)], (0, *SIZES)),
        ([(0, 3), (0, 4), (1, 3), (1, 4)], (-1,)),
        *[([i], ((*matrices[i][:3], 2, 2),)) for i in (0, 1)],
        ([(0, 2), (1, 1)], (K + 1,)),
        ([5], (N - 1, 0, *SIZES)),
        ([6], THREADS),
        ([4], (matrices[0][0], matrices[1][0])),
        ([2], (out, -64)),
        *([([3], (True,))] if bias else []),
    )
    return Call(arguments, wrong, _matmul_or_without_the_unit)


def _matmul_or_without_the_unit(*arguments: Any) -> None:
    if native.matmul_unavailable_reason() is None:
        native.matmul(*arguments)
        return
    with pytest.raises(RuntimeError, match="matmul: "):
        native.matmul(*arguments)


def attention(rng: np.random.Generator, memory: Memory) -> tuple[tuple, torch.dtype]:
    lengths = rng.integers(0, 60, int(rng.integers(1, 5)))
    lengths[0] += 1
    tokens, heads, width, code = int(lengths.sum()), *(int(rng.integers(1, n)) for n in (4, 40)), int(rng.integers(3))
    head = width + int(rng.integers(3))
    part = heads * head + int(rng.integers(3))
    token = 3 * part + int(rng.integers(3))
    qkv = memory.new((tokens - 1) * token + 2 * part + (heads - 1) * head + width, dtype=FLOATS[code])
    ends = memory.new(dtype=torch.int32, values=np.concatenate([[0], lengths.cumsum()]))
    return (qkv, token, part, head, ends, len(lengths), tokens, heads, width, code), FLOATS[code]


def wrong_attentions(memory: Memory, arguments: tuple) -> list[tuple]:
    _, _, _, _, _, count, tokens, *_ = arguments[0]
    backwards, beyond, late = ([0, *[tokens] * count] for _ in range(3))
    backwards[1:1] = [tokens + 1]
    beyond[-1] = tokens + 1
    late[0] = 1
    changed = [memory.new(dtype=torch.int32, values=ends[: count + 1]) for ends in (beyond, late)]
    fall = (memory.new(dtype=torch.int32, values=backwards), count + 1)
    wrong = wrongs(
        arguments,
        ([(0, 0), (0, 4), 1, 2], ADDRESSES),
        ([(0, 1), (0, 2), (0, 3)], (-1,)),
        ([(0, 5)], SIZES),
        ([(0, 6)], (tokens - 1, tokens + 1, *SIZES)),
        ([(0, 7), (0, 8)], (0, *SIZES)),
        ([(0, 9)], CODES),
        ([3], THREADS),
        ([(0, 4)], changed),
    )
    return [*wrong, put(put(arguments, (0, 4), fall[0]), (0, 5), fall[1])]


def packed_attention_forward(rng: np.random.Generator, memory: Memory) -> Call:
    sequences, dtype = attention(rng, memory)
    tokens, heads, width = sequences[6:9]
    out, logsumexp = memory.new(tokens * heads * width, dtype=dtype), memory.new(tokens * heads)
    arguments = (sequences, out, logsumexp, int(rng.integers(1, 4)))
    wrong = wrongs(arguments, ([1, 2], (sequences[0], sequences[4])), ([1], (logsumexp,)))
    return Call(arguments, wrong + wrong_attentions(memory, arguments))


def packed_attention_backward(rng: np.random.Generator, memory: Memory) -> Call:
    sequences, dtype = attention(rng, memory)
    n = int(np.prod(sequences[6:9]))
    grad_out, gradient = memory.new(n, dtype=dtype), memory.new(3 * n, dtype=dtype)
    arguments = (sequences, grad_out, gradient, int(rng.integers(1, 4)))
    wrong = wrongs(arguments, ([2], (sequences[0], sequences[4], grad_out)))
    return Call(arguments, wrong + wrong_attentions(memory, arguments))


# --- multi_tensor ---------------------------------------------------------------------------------------------------


def edited(table: np.ndarray, *edits: tuple[tuple[int, int], int | float]) -> np.ndarray:
    result = table.copy()
    for at, value in edits:
        result[at] = value
    return result


def wrong_tables(arguments: tuple, i: int, rows: tuple[int, int]) -> list[tuple]:
    """Tables of another size, dtype or layout at position i. rows: of the table, and where their number is given."""
    table, (n, at) = arguments[i], rows
    apart = np.repeat(table, 2, axis=-1)[..., ::2]
    other = np.int64 if table.dtype.kind == "f" else np.float64
    return [
        *(put(arguments, (i,), x) for x in (table[:-1], table.astype(other), apart, table.astype(np.int32))),
        *(put(arguments, (at,), x) for x in (-1, n - 1, n + 1, 1 << 62)),
    ]


def lengths(rng: np.random.Generator, n: int) -> list[int]:
    """Some tensors without elements, the first with two or more, some of several tasks."""
    kinds = rng.choice(3, n, p=[0.2, 0.7, 0.1])
    sizes = [(0, int(rng.integers(1, 200)), int(rng.integers(15000, 40000)))[kind] for kind in kinds]
    return [max(sizes[0], 2), *sizes[1:]]


def multi_tensor_ema_update(rng: np.random.Generator, memory: Memory) -> Call:
    n = int(rng.integers(2, 6))
    sizes, codes, with_copy = lengths(rng, n), rng.integers(3, size=(2, n)), rng.random(n) < 0.5
    columns = [[memory.new(size, dtype=FLOATS[code]) for size, code in zip(sizes, c, strict=True)] for c in codes]
    copies = [memory.new(s, dtype=torch.bfloat16) if c else 0 for s, c in zip(sizes, with_copy, strict=True)]
    table = np.array([sizes, *columns, copies, *codes], dtype=np.int64)
    arguments = (n, table, 0.99, int(rng.integers(1, 4)))
    edits = [((0, 0), x) for x in SIZES] + [((row, 0), x) for row in (1, 2) for x in ADDRESSES]
    edits += [((row, 0), x) for row in (4, 5) for x in CODES]
    edits += [((3, 0), table[1, 0]), ((3, 0), table[2, 0]), ((2, 0), table[1, 0] + 2)]
    wrong = [put(arguments, (1,), edited(table, edit)) for edit in edits]
    if sizes[1]:
        wrong.append(put(arguments, (1,), edited(table, ((1, 1), table[1, 0]))))
    return Call(arguments, wrong + wrongs(arguments, ([3], THREADS)) + wrong_tables(arguments, 1, (n, 0)))


def multi_tensor_grad_norms(rng: np.random.Generator, memory: Memory) -> Call:
    n = int(rng.integers(2, 6))
    sizes, codes = lengths(rng, n), rng.integers(3, size=n)
    columns = [memory.new(size, dtype=FLOATS[code]) for size, code in zip(sizes, codes, strict=True)]
    table = np.array([sizes, columns, codes], dtype=np.int64)
    arguments = (n, table, memory.new(n), int(rng.integers(1, 4)))
    edits = [((0, 0), x) for x in SIZES] + [((1, 0), x) for x in ADDRESSES] + [((2, 0), x) for x in CODES]
    wrong = [put(arguments, (1,), edited(table, edit)) for edit in edits]
    wrong += wrongs(arguments, ([2], (*ADDRESSES, columns[0])), ([3], THREADS))
    return Call(arguments, wrong + wrong_tables(arguments, 1, (n, 0)))


def multi_tensor_adamw_ema(rng: np.random.Generator, memory: Memory) -> Call:
    n = int(rng.integers(2, 6))
    sizes, codes = lengths(rng, n), rng.integers(3, size=n)
    kinds = [torch.float32, None, torch.float32, torch.float32, torch.float32, torch.bfloat16, torch.bfloat16]
    table = np.zeros((10, n), dtype=np.int64)
    table[0], table[9] = sizes, codes
    for i, size in enumerate(sizes):
        for row, kind in enumerate(kinds, start=1):
            if row < 5 or rng.random() < 0.7:
                table[row, i] = memory.new(size, dtype=kind or FLOATS[codes[i]])
        table[8, i] = memory.new(1, values=[3.0])
    rates = rng.uniform(0, 0.1, (2, n))
    multipliers = memory.new(n) if rng.random() < 0.5 else 0
    arguments = (
        n,
        table,
        rates,
        multipliers,
        0.9,
        0.999,
        1e-8,
        0.99,
        bool(rng.random() < 0.3),
        int(rng.integers(1, 4)),
    )
    edits = [((0, 0), x) for x in SIZES] + [((row, 0), x) for row in (1, 2, 3, 4, 8) for x in ADDRESSES]
    edits += [((9, 0), x) for x in CODES] + [((row, 0), table[1, 0]) for row in (2, 3, 4, 6, 8)]
    edits += [((8, 1), table[8, 0]), ((5, 0), table[1, 0] + 2), ((5, 0), table[3, 0])]
    wrong = [put(arguments, (1,), edited(table, edit)) for edit in edits] + wrongs(
        arguments, ([3], (-64, table[1, 0])), ([9], THREADS)
    )
    wrong += wrong_tables(arguments, 1, (n, 0)) + wrong_tables(arguments, 2, (n, 0))
    return Call(arguments, wrong)


# --- multi_crop -----------------------------------------------------------------------------------------------------


def crops(rng: np.random.Generator, memory: Memory) -> tuple[tuple, list[tuple]]:
    """(n, table, numbers, channels, bfloat16, may go down first, mean, std), and the same with faults."""
    n, channels, half = int(rng.integers(1, 4)), int(rng.choice([1, 3, 3, 4])), bool(rng.random() < 0.5)
    table, numbers = np.zeros((n, 18), dtype=np.int64), np.zeros((n, 5), dtype=np.float32)
    for i in range(n):
        height, width = rng.integers(1, 80, 2)
        box = rng.integers(1, height + 1), rng.integers(1, width + 1)
        corner = rng.integers(0, height - box[0] + 1), rng.integers(0, width - box[1] + 1)
        size = rng.integers(1, 40, 2)
        image = memory.new(dtype=torch.uint8, values=rng.integers(0, 256, channels * height * width))
        crop = memory.new(channels, *size, dtype=torch.bfloat16 if half else torch.float32)
        order = np.where(rng.random(4) < 0.7, rng.permutation(4), -1)
        table[i] = [image, height, width, *corner, *box, *size, crop, *rng.integers(0, 2, 4), *order]
        numbers[i] = [*rng.uniform(0, 2, 3), rng.uniform(-0.5, 0.5), rng.uniform(0, 3)]
    table[0, 14:18] = 0, 1, 2, 3
    table[0, 12] = 1
    mean, std = memory.new(channels), memory.new(values=rng.uniform(0.1, 1, channels))
    arguments = (n, table, numbers, channels, half, bool(rng.random() < 0.5), mean, std)
    edits: list[tuple[int, int]] = [(at, x) for at in (0, 9) for x in ADDRESSES]
    edits += [(at, x) for at in (1, 2, 5, 6, 7, 8) for x in (0, *SIZES)] + [(at, x) for at in (3, 4) for x in SIZES]
    edits += [(3 + d, int(table[0, 1 + d] - table[0, 5 + d] + 1)) for d in (0, 1)]
    edits += [(5 + d, int(table[0, 1 + d] - table[0, 3 + d] + 1)) for d in (0, 1)]
    edits += [(14, -2), (17, 4), (14, 1 << 40), (9, int(table[0, 0])), (0, int(table[0, 9]))]
    wrong = [put(arguments, (1,), edited(table, ((0, at), x))) for at, x in edits]
    worse = [(at, x) for at in range(5) for x in (np.nan, np.inf, -np.inf, 1e6)] + [(4, -1.0)]
    wrong += [put(arguments, (2,), edited(numbers, ((0, at), x))) for at, x in worse]
    wrong += wrongs(arguments, ([3], (0, -1, 17)), ([6, 7], (*ADDRESSES, int(table[0, 9]))))
    wrong += wrong_tables(arguments, 1, (n, 0)) + wrong_tables(arguments, 2, (n, 0))
    return arguments, wrong


def multi_crop(rng: np.random.Generator, memory: Memory) -> Call:
    arguments, wrong = crops(rng, memory)
    call = (*arguments, int(rng.integers(1, 4)))
    return Call(call, [(*x, 1) for x in wrong] + wrongs(call, ([8], THREADS)))


def multi_crop_planes(rng: np.random.Generator, memory: Memory) -> Call:
    n = int(rng.integers(1, 200))
    image, planes = (memory.new(3 * n, dtype=torch.uint8, values=rng.integers(0, 256, 3 * n)) for _ in range(2))
    arguments = (image, planes, n)
    wrong = wrongs(arguments, ([0, 1], ADDRESSES), ([2], SIZES), ([1], (image, image + 3 * n - 1)))
    return Call(arguments, wrong)


# --- CUDA: what can be called without a GPU -------------------------------------------------------------------------


def cuda_multi_crop_table(rng: np.random.Generator, memory: Memory) -> Call:
    return Call(*crops(rng, memory))


def written_crop_table(rng: np.random.Generator, memory: Memory) -> Call:
    table = native.cuda_multi_crop_table(*crops(rng, memory)[0])
    return Call(
        (memory.new(table.table_bytes, dtype=torch.uint8, values=[0] * table.table_bytes),), [(0,)], table.write
    )


def cuda_multi_crop(rng: np.random.Generator, memory: Memory) -> Call:
    table = native.cuda_multi_crop_table(*crops(rng, memory)[0])
    return Call((table, 1 << 20, 0), [(table, 0, 0)], runs=False)


def cuda_multi_tensor_offsets(rng: np.random.Generator, memory: Memory) -> Call:
    return Call((3, 7), [(0, 7)])


def cuda_upload(rng: np.random.Generator, memory: Memory) -> Call:
    return Call(
        (1 << 20, bytes(8), 0), [(0, bytes(8), 0), (1 << 20, bytes(7), 0), ((1 << 20) + 4, bytes(8), 0)], runs=False
    )


def launch(*more: int) -> Callable[[np.random.Generator, Memory], Call]:
    def case(rng: np.random.Generator, memory: Memory) -> Call:
        arguments = (1 << 20, 3, 7, *more, 0)
        return Call(arguments, wrongs(arguments, ([0], (0, (1 << 20) + 8)), ([1], (0,))), runs=False)

    return case


CASES: dict[str, Callable[[np.random.Generator, Memory], Call]] = {
    "isa": plain,
    "supported_isas": plain,
    "set_isa": set_isa,
    "keep_freed_memory": plain,
    "matmul_unavailable_reason": plain,
    "dino_loss_forward": dino_loss_forward,
    "dino_loss_gradient": dino_loss_gradient,
    "linear_dino_loss_attend": linear_dino_loss_attend,
    "linear_dino_loss_weigh": linear_dino_loss_weigh,
    "linear_dino_loss_normalize": linear_dino_loss_normalize,
    "linear_dino_loss_project": linear_dino_loss_project,
    "matmul": matmul,
    "packed_attention_forward": packed_attention_forward,
    "packed_attention_backward": packed_attention_backward,
    "multi_tensor_ema_update": multi_tensor_ema_update,
    "multi_tensor_grad_norms": multi_tensor_grad_norms,
    "multi_tensor_adamw_ema": multi_tensor_adamw_ema,
    "multi_crop": multi_crop,
    "multi_crop_planes": multi_crop_planes,
    "CudaMultiCropTable": written_crop_table,
    "cuda_multi_crop": cuda_multi_crop,
    "cuda_multi_crop_table": cuda_multi_crop_table,
    "cuda_multi_tensor_adamw_ema": launch(0, 0),
    "cuda_multi_tensor_ema_update": launch(0),
    "cuda_multi_tensor_fill_chunks": launch(),
    "cuda_multi_tensor_norms": launch(1 << 20),
    "cuda_multi_tensor_offsets": cuda_multi_tensor_offsets,
    "cuda_upload": cuda_upload,
}
FUNCTIONS = sorted(name for name in dir(native) if not name.startswith("__") and callable(getattr(native, name)))


def test_every_function_has_a_case() -> None:
    assert set(FUNCTIONS) <= CASES.keys(), "write a case for each new function of csrc/bindings.cpp"


@pytest.fixture
def any_isa() -> Iterator[None]:
    before = native.isa()
    yield
    native.set_isa(before)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_arguments_are_checked_and_memory_beside_them_stays(name: str, any_isa: None) -> None:
    for seed in range(ROUNDS):
        rng = np.random.default_rng([seed, FUNCTIONS.index(name)])
        native.set_isa(str(rng.choice(native.supported_isas())))
        memory = Memory(rng)
        call = CASES[name](rng, memory)
        function = call.function or getattr(native, name)
        memory.snapshot()
        for arguments in call.wrong:
            with pytest.raises(ValueError, match=f"^{name}.*: |instruction set"):
                function(*arguments)
                pytest.fail(f"seed {seed}: accepted {arguments}, where {call.arguments} is right")
        memory.assert_unchanged()
        if call.runs:
            function(*call.arguments)
            memory.assert_guards_unchanged()


def test_the_message_says_what_was_given_and_what_is_accepted() -> None:
    x = torch.zeros(8, dtype=torch.float32, device="cpu")
    with pytest.raises(ValueError, match="multi_crop_planes: the planes is written and shares memory with the image"):
        native.multi_crop_planes(x.data_ptr(), x.data_ptr(), 4)
    with pytest.raises(ValueError, match="linear_dino_loss_normalize: threads must be 1 to 4096; got 0"):
        native.linear_dino_loss_normalize(x.data_ptr(), x.data_ptr(), x.data_ptr(), 1, 1, 0)
