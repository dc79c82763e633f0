"""A trace of a few steps, of the CPU and of the GPU."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

WARMUP, STEPS = 5, 5  # the first steps choose kernels and make buffers


@contextlib.contextmanager
def profiled(wanted: bool, folder: Path, rank: int, say: Callable[[str], None]) -> Iterator[Callable[[], None]]:
    """The function given is called after each step; where `wanted`, steps 6 to 10 of this process are traced."""
    if not wanted:
        yield lambda: None
        return
    from torch.profiler import ProfilerActivity, profile, schedule

    file = folder / (f"trace-process-{rank}.json" if rank else "trace.json")

    def write(trace: profile) -> None:
        trace.export_chrome_trace(str(file))
        say(f"{STEPS} steps are traced in {file}; open it in chrome://tracing or ui.perfetto.dev")

    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if torch.cuda.is_available() else [])]
    plan = schedule(wait=WARMUP - 1, warmup=1, active=STEPS, repeat=1)
    with profile(activities=activities, schedule=plan, on_trace_ready=write) as trace:
        yield trace.step
