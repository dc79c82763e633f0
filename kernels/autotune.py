"""Which of a kernel's tiles is taken: the first of its table, or with DINO_FAST_AUTOTUNE=1 the fastest one measured."""

from __future__ import annotations

import os
from collections.abc import Callable, Hashable, Sequence
from typing import Any, TypeVar

import torch
import triton

from dino_fast.gpu import on_device

T = TypeVar("T")
_measured: dict[Hashable, Any] = {}  # the fastest choices, for this process


def rounded(rows: int) -> int:
    """A number of rows for the key of `pick`: the next power of 2, so that a number that changes with each batch is not
    measured anew each time."""
    return triton.next_power_of_2(rows)


def pick(key: Hashable, candidates: Sequence[T], device: torch.device, launch: Callable[[T], object]) -> T:
    """One of the candidates. Under DINO_FAST_AUTOTUNE=1 `launch` is timed with each of them on a GPU, once for each
    key; `launch` must be repeatable. While a CUDA graph is captured nothing can be timed: the first is taken, unless
    the key was measured before."""
    if os.environ.get("DINO_FAST_AUTOTUNE") != "1" or device.type != "cuda" or len(candidates) == 1:
        return candidates[0]
    if key not in _measured:
        with on_device(device):
            if torch.cuda.is_current_stream_capturing():
                return candidates[0]
            times = [triton.testing.do_bench(lambda c=c: launch(c)) for c in candidates]
        _measured[key] = candidates[times.index(min(times))]
    return _measured[key]
