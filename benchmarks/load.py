"""How much of the processors other programs took while something was measured."""

from __future__ import annotations

import os
import time
from pathlib import Path

LIMIT = 0.15  # of a processor: what a machine does by itself (interrupts, the timer, a shell) stays below


class Load:
    """Starts to watch when it is made; `others()` is what other programs took since then.

    Every processor that this process may run on is counted as busy by the kernel (/proc/stat), whoever keeps it so, the
    hypervisor's other guests included ("steal"). What this process and the children it waited for used is subtracted.
    """

    def __init__(self) -> None:
        self._cpus = os.sched_getaffinity(0)
        self._start = time.perf_counter(), self._busy(), _own()

    def others(self) -> float | None:
        """Processors' worth of time that others took beyond those that were left over, or None where it is not told.

        With as many threads as processors everything that others do counts.
        """
        import torch

        began, busy, own = self._start
        wall, now = time.perf_counter() - began, self._busy()
        if busy is None or now is None or wall <= 0:
            return None
        taken = (now - busy) / os.sysconf("SC_CLK_TCK") - (_own() - own)
        free = max(0, len(self._cpus) - torch.get_num_threads())
        return max(0.0, taken / wall - free)

    def _busy(self) -> float | None:
        """Clock ticks for which the processors were not idle since the machine started."""
        try:
            lines = Path("/proc/stat").read_text().splitlines()
        except OSError:
            return None
        names = {f"cpu{i}" for i in self._cpus}
        busy = 0
        for name, *ticks in (line.split() for line in lines if line):
            if name in names:
                user, nice, system, _idle, _iowait, irq, softirq, steal = map(int, ticks[:8])
                busy += user + nice + system + irq + softirq + steal
        return busy


def _own() -> float:
    """Seconds of processor time of this process and of the children that it waited for."""
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system
