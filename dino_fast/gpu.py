"""The GPU at hand: limits of its chip and driver, and the device guard around every kernel launch."""

from __future__ import annotations

import contextlib
import ctypes
import functools
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")


class Chip(NamedTuple):
    """Limits of one GPU: compute capability, bytes of shared memory a block may have, number of multiprocessors."""

    capability: tuple[int, int]
    shared_memory: int
    multiprocessors: int


# The chip that kernels are specialized for where the tensors are on the CPU, under Triton's interpreter: an H100 SXM.
INTERPRETED = Chip((9, 0), 232448, 132)
OLDEST = (8, 0)  # compute capability: Triton supports no older one, and the CUDA kernels are compiled for no older one


def chip(device: torch.device) -> Chip:
    """The limits of `device`; a CUDA device without an index is the current one."""
    if device.type != "cuda":
        return INTERPRETED
    return _chip(torch.cuda.current_device() if device.index is None else device.index)


@functools.cache
def _chip(index: int) -> Chip:
    properties = torch.cuda.get_device_properties(index)
    shared_memory: int = properties.shared_memory_per_block_optin  # type: ignore[attr-defined]
    return Chip((properties.major, properties.minor), shared_memory, properties.multi_processor_count)


def usual_dtype(device: torch.device) -> torch.dtype:
    """The dtype that a run computes in on this device: 16 bits on a GPU, float32 on a CPU."""
    if device.type != "cuda":
        return torch.float32
    return torch.float16 if too_old(device) else torch.bfloat16


def too_old(device: torch.device) -> str | None:
    """Why the kernels of this package cannot run on a GPU of this compute capability, or None. None for a CPU."""
    if device.type != "cuda" or (capability := chip(device).capability) >= OLDEST:
        return None
    return "it needs a GPU of compute capability {}.{} or newer, this one has {}.{}".format(*OLDEST, *capability)


def driver_too_old(compiled_for: str | None) -> str | None:
    """Why the driver cannot load programs of CUDA version `compiled_for` ("12.9"), or None.

    A driver runs programs compiled for any minor version of its own CUDA major version, and of older ones.
    """
    version = driver_version()
    if not compiled_for or version is None or version[0] >= int(compiled_for.split(".")[0]):
        return None
    return (
        f"kernels are compiled for CUDA {compiled_for}, the driver runs CUDA {version[0]}.{version[1]} at most; "
        "update the driver"
    )


@functools.cache
def driver_version() -> tuple[int, int] | None:
    """The newest CUDA version that the driver supports, or None where there is no driver."""
    version = ctypes.c_int()
    try:
        failed = ctypes.CDLL("libcuda.so.1").cuDriverGetVersion(ctypes.byref(version))
    except (OSError, AttributeError):
        return None
    return None if failed else (version.value // 1000, version.value % 1000 // 10)


def on_device(device: torch.device) -> AbstractContextManager[None]:
    """Makes a GPU the current one; does nothing for a CPU.

    Otherwise a kernel is launched on the GPU that happens to be current, where its tensors' addresses mean nothing.
    """
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


def one_device(tensors: Iterable[Tensor]) -> torch.device:
    """The device of all these tensors. Raises ValueError where they are on several."""
    devices = {tensor.device for tensor in tensors}
    if len(devices) != 1:
        raise ValueError(
            f"the inputs of one kernel are on {' and '.join(sorted(map(str, devices)))}; move them to one device"
        )
    return devices.pop()


# Failed captures. The allocator of pinned memory goes on asking such a graph whether a stream is being captured for it,
# and PyTorch has no call to end that, so the objects stay.
_failed: list[torch.cuda.CUDAGraph] = []


def capture_graph(work: Callable[[], T], stream: torch.cuda.Stream) -> Callable[[], T]:
    """Captures the kernels that `work` launches on `stream` as a CUDA graph.

    Returns a function that replays them and returns the result of `work`.

    A capture that fails raises the error of `work`, or else that of the capture, and leaves the process able to go on
    without it: `torch.cuda.graph` alone would leave its stream current, random numbers refused, and the memory
    allocator in a capture, in which memory used by two streams is never freed.
    """
    before = torch.cuda.current_stream(stream.device)
    graph, pool = torch.cuda.CUDAGraph(), torch.cuda.graph_pool_handle()
    failure: BaseException | None = None
    try:
        # Threads that load data and write checkpoints go on meanwhile: their work is no part of the graph.
        with torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
            try:
                result = work()
            except BaseException as error:
                failure = error
                raise
    except BaseException as error:
        torch.cuda.set_stream(before)
        _abandon(graph, pool, stream.device_index)
        raise (failure or error) from None

    def replay() -> T:
        graph.replay()
        return result

    return replay


def _abandon(graph: torch.cuda.CUDAGraph, pool: tuple[int, int], device: int) -> None:
    """Ends a failed capture where PyTorch's own end of it did not: pool, allocator and random numbers."""
    try:
        graph.pool()
        ended = True
    except RuntimeError:  # raised until the capture has ended
        ended = False
    graph.reset()
    if ended:
        return
    _failed.append(graph)
    for end in (torch._C._cuda_endAllocateToPool, torch._C._cuda_releasePool):
        with contextlib.suppress(RuntimeError):
            end(device, pool)
    generator = torch.cuda.default_generators[device]
    generator.graphsafe_set_state(generator.clone_state())
