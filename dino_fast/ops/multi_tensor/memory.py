"""Memory layout for the flat kernels of multi_tensor: tensors that belong together in one order without gaps."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

# Element types as the kernels number them (csrc/cpu/multi_tensor.h, csrc/cuda/multi_tensor.h).
DTYPE_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


def flat_memory(
    lists: Sequence[Sequence[Tensor]], mutated: Sequence[bool]
) -> tuple[list[Sequence[Tensor]], list[tuple[Tensor, Tensor]]]:
    """The lists with each row (the i-th tensors of all lists) in one memory order without gaps, as flat kernels need.

    Rows that are so already stay; of others, the tensors that are not contiguous are replaced by contiguous copies.
    Returns the lists, and (original, copy) for the copies that must be written back.
    """
    columns: list[Sequence[Tensor]] = list(lists)
    written: list[tuple[Tensor, Tensor]] = []
    if all(t.is_contiguous() for column in columns for t in column):
        return columns, written
    columns = [list(column) for column in columns]
    for i in range(len(columns[0])):
        row = [column[i] for column in columns if column and column[i].numel()]
        if not row or (all(t.stride() == row[0].stride() for t in row) and _without_gaps(row[0])):
            continue
        for column, mutable in zip(columns, mutated, strict=True):
            if column and not column[i].is_contiguous():
                original, copy = column[i], column[i].contiguous()
                column[i] = copy  # type: ignore[index]
                if mutable:
                    written.append((original, copy))
    return columns, written


def _without_gaps(tensor: Tensor) -> bool:
    """Whether some order of its dimensions makes it contiguous."""
    order = sorted(range(tensor.dim()), key=lambda d: (tensor.stride(d), tensor.size(d)), reverse=True)
    return tensor.permute(order).is_contiguous()


def write_back(written: list[tuple[Tensor, Tensor]]) -> None:
    """Copies the contiguous copies that `flat_memory` made back into their originals."""
    for original, copy in written:
        original.copy_(copy)
