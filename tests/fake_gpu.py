"""A GPU that is not there, for what the host decides: tensors of no memory on `cuda:N`, and a chip of any kind."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import torch
from torch._subclasses import fake_tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from dino_fast import backends, gpu

# By compute capability, bytes of shared memory that a block may have and multiprocessors: T4, A100, RTX 3090, RTX 4090,
# H100 SXM, B200, RTX 5090. (CUDA C++ Programming Guide, table of technical specifications.)
CHIPS = {
    (7, 5): (65536, 40),
    (8, 0): (166912, 108),
    (8, 6): (101376, 82),
    (8, 9): (101376, 128),
    (9, 0): (232448, 132),
    (10, 0): (232448, 148),
    (12, 0): (101376, 170),
}


class FakeDevice:
    """Stands for torch.cuda.device; `current` is the index of the current GPU."""

    current = 0

    def __init__(self, device: torch.device) -> None:
        self.index = torch.device(device).index

    def __enter__(self) -> None:
        self.before, FakeDevice.current = FakeDevice.current, FakeDevice.current if self.index is None else self.index

    def __exit__(self, *error: object) -> None:
        FakeDevice.current = self.before


def _getitem(tensor: FakeTensor, index: object) -> torch.Tensor:
    """tensor[index] of numbers, slices and None through operators: the original makes the tensor's GPU current first,
    whether there is one or not."""
    dim = 0
    for part in index if isinstance(index, tuple) else (index,):
        if part is None:
            tensor, dim = tensor.unsqueeze(dim), dim + 1
        elif isinstance(part, int):
            tensor = tensor.select(dim, part)
        else:
            assert isinstance(part, slice)
            tensor, dim = torch.ops.aten.slice(tensor, dim, part.start, part.stop, part.step or 1), dim + 1
    return tensor


@contextlib.contextmanager
def fake_gpu(capability: tuple[int, int] = (9, 0), driver: tuple[int, int] | None = (13, 0)) -> Iterator[None]:
    """Within it torch reports two GPUs of this kind, and tensors made on them are fake."""
    shared, multiprocessors = CHIPS[capability]
    properties = SimpleNamespace(
        major=capability[0],
        minor=capability[1],
        shared_memory_per_block_optin=shared,
        multi_processor_count=multiprocessors,
    )
    mode = FakeTensorMode()
    patches = {
        "is_available": lambda: True,
        "device_count": lambda: 2,
        "current_device": lambda: FakeDevice.current,
        "get_device_name": lambda device=None: "no such GPU",
        "get_device_capability": lambda device=None: capability,
        "get_device_properties": lambda device=None: properties,
        "is_bf16_supported": lambda including_emulation=True: including_emulation or capability >= (8, 0),
        "is_current_stream_capturing": lambda: False,
        "device": FakeDevice,
    }
    caches = [gpu._chip, *(f for f in vars(backends).values() if hasattr(f, "cache_clear"))]
    with pytest.MonkeyPatch.context() as patch:
        for name, value in patches.items():
            patch.setattr(torch.cuda, name, value)
        patch.setattr(gpu, "driver_version", lambda: driver)
        # torch 2.11 makes a real tensor on the GPU before its first fake one, so that a backward pass finds a context.
        patch.setattr(fake_tensor, "init_gpu_context", lambda device: None, raising=False)
        patch.setattr(FakeTensor, "__getitem__", _getitem, raising=False)
        patch.setattr(FakeTensor, "contiguous", lambda tensor: torch.ops.aten.contiguous(tensor), raising=False)
        for cached in caches:
            cached.cache_clear()
        try:
            with mode:
                yield
        finally:
            for cached in caches:
                cached.cache_clear()
