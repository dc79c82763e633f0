"""A CUDA-graph capture that fails leaves everything as it was before: a stand-in for torch's graphs shows it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from dino_fast import gpu
from dino_fast.engine.cuda_graph import _Cuda

POOL = (0, 7)


class Cuda:
    """What a capture changes in torch: the current stream, the pool that memory comes from, the random numbers."""

    def __init__(self, patch: pytest.MonkeyPatch, *, exit_raises: bool, ended: bool = False) -> None:
        self.exit_raises, self.ended = exit_raises, ended
        self.current, self.main, self.side = "main", "main", SimpleNamespace(device="cuda:0", device_index=0)
        self.allocating: list[tuple[int, int]] = []
        self.pools: list[tuple[int, int]] = []
        self.random = "usable"
        self.replays = 0
        for name, value in {
            "current_stream": lambda device: self.current,
            "set_stream": lambda stream: setattr(self, "current", stream),
            "CUDAGraph": lambda: self.graph,
            "graph_pool_handle": lambda: POOL,
            "graph": self.capture,
            "default_generators": [self],
        }.items():
            patch.setattr(torch.cuda, name, value, raising=False)
        patch.setattr(torch._C, "_cuda_endAllocateToPool", self.end_allocate, raising=False)
        patch.setattr(torch._C, "_cuda_releasePool", lambda device, pool: self.pools.remove(pool), raising=False)
        self.graph = SimpleNamespace(reset=self.reset, pool=self.pool, replay=self.replay)

    # torch.cuda.graph
    def capture(self, graph: Any, pool: Any, stream: Any, capture_error_mode: str) -> Cuda:
        assert graph is self.graph and pool == POOL and capture_error_mode == "thread_local"
        return self

    def __enter__(self) -> None:
        self.current, self.random = "side", "captured"
        self.allocating.append(POOL)
        self.pools.append(POOL)

    def __exit__(self, *error: object) -> None:
        if self.exit_raises and not self.ended:
            raise RuntimeError("operation failed due to a previous error during capture")
        self.allocating.remove(POOL)
        self.random, self.ended = "usable", True
        if self.exit_raises:
            raise RuntimeError("the graph cannot be instantiated")
        self.current = self.main

    # torch.cuda.CUDAGraph
    def pool(self) -> tuple[int, int]:
        if not self.ended:
            raise RuntimeError("Called CUDAGraph::pool() without a preceding successful capture.")
        return POOL

    def reset(self) -> None:
        if self.ended:
            self.pools.remove(POOL)

    def replay(self) -> None:
        self.replays += 1

    # the allocator and the generator
    def end_allocate(self, device: int, pool: tuple[int, int]) -> None:
        if pool not in self.allocating:
            raise RuntimeError("endAllocatePool: not currently recording to mempool_id")
        self.allocating.remove(pool)

    def clone_state(self) -> str:
        return "usable"

    def graphsafe_set_state(self, state: str) -> None:
        self.random = state


def waits_for_the_host() -> None:
    raise RuntimeError("operation not permitted when stream is capturing")


@pytest.mark.parametrize("ended", [False, True])
@pytest.mark.parametrize("work, message", [(waits_for_the_host, "not permitted"), (lambda: 1, None)])
def test_a_capture_that_fails_is_undone(monkeypatch: pytest.MonkeyPatch, work, message, ended: bool) -> None:
    cuda = Cuda(monkeypatch, exit_raises=True, ended=ended)
    message = message or ("cannot be instantiated" if ended else "previous error during capture")
    with pytest.raises(RuntimeError, match=message):
        gpu.capture_graph(work, cuda.side)
    assert cuda.current == "main" and cuda.random == "usable"
    assert cuda.allocating == [] and cuda.pools == []


def test_an_error_whose_capture_ends_well_is_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = Cuda(monkeypatch, exit_raises=False)
    with pytest.raises(RuntimeError, match="not permitted when stream is capturing"):
        gpu.capture_graph(waits_for_the_host, cuda.side)
    assert cuda.current == "main" and cuda.allocating == [] and cuda.pools == []


def test_a_capture_replays(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = Cuda(monkeypatch, exit_raises=False)
    replay = gpu.capture_graph(lambda: "numbers", cuda.side)
    assert cuda.replays == 0 and replay() == replay() == "numbers" and cuda.replays == 2
    assert cuda.current == "main" and cuda.pools == [POOL]


def test_a_step_that_cannot_be_recorded_is_undone(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = Cuda(monkeypatch, exit_raises=True)
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: cuda.side)
    with pytest.raises(RuntimeError, match="not permitted when stream is capturing"):
        _Cuda(torch.device("cuda:0")).record(waits_for_the_host)  # type: ignore[arg-type]
    assert cuda.current == "main" and cuda.allocating == [] and cuda.pools == []
