"""How many processors this process may use, which on a shared machine are fewer than there are."""

from __future__ import annotations

import math
import os
from pathlib import Path

_CGROUP = Path("/sys/fs/cgroup")


def usable_cpus() -> int:
    """At least 1: the processors that the affinity mask allows (taskset, Slurm), and no more than the container's quota
    of processor time, rounded up (`docker run --cpus`; cgroup v2's cpu.max, v1's cfs_quota_us)."""
    allowed = len(os.sched_getaffinity(0))
    quota = _quota(_CGROUP)
    return max(1, allowed if quota is None else min(allowed, math.ceil(quota)))


def _quota(cgroup: Path) -> float | None:
    """Processors' worth of time that the control group at this folder may use, or None without a limit."""
    try:
        quota, period = (cgroup / "cpu.max").read_text().split()
    except (OSError, ValueError):
        try:
            quota, period = (
                (cgroup / "cpu" / f"cpu.cfs_{name}_us").read_text().strip() for name in ("quota", "period")
            )
        except OSError:
            return None
    if quota in ("max", "-1"):
        return None
    return int(quota) / int(period)
