"""The numbers of a step, which stay on its device until somebody asks: a GPU works on while they travel."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from typing import cast

import torch
from torch import Tensor


class Found(Mapping[str, float]):
    """What a step found, by name. The copy to the host begins at once; the first number asked for waits for it alone.

    Beside the `numbers`, scalars on one device, there is `kl`, the difference of `loss` and `teacher_entropy`.
    """

    def __init__(self, numbers: Mapping[str, Tensor]) -> None:
        self._names = list(numbers)
        self._wait = read_later(torch.stack([x.detach().float() for x in numbers.values()]))
        self._read: dict[str, float] = {}

    @property
    def finite(self) -> bool:
        """Whether the loss is; where it is not, the step has changed nothing."""
        return math.isfinite(self["loss"])

    def __getitem__(self, name: str) -> float:
        if not self._read:
            self._read = dict(zip(self._names, self._wait(), strict=True))
            self._read["kl"] = self._read["loss"] - self._read["teacher_entropy"]
        return self._read[name]

    def __iter__(self) -> Iterator[str]:
        return iter([*self._names, "kl"])

    def __len__(self) -> int:
        return len(self._names) + 1


def read_later(values: Tensor) -> Callable[[], list[float]]:
    """Starts copying `values` to the host; the function returned waits for that copy alone and gives the numbers."""
    host = values.to("cpu", non_blocking=True)  # into pinned memory, from a GPU
    if not values.is_cuda:
        return host.tolist
    copied = torch.cuda.Event()
    copied.record()

    def numbers() -> list[float]:
        copied.synchronize()
        return cast("list[float]", host.tolist())

    return numbers
