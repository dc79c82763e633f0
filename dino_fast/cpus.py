"""The processors of this process: how many it may use, and how its threads wait on them."""

from __future__ import annotations

import math
import os
from pathlib import Path

# Turns for which an OpenMP thread spins between operations before it sleeps. libgomp's own 300,000 suit a machine of
# one's own; two demo runs at once on two cores then wait for each other's spinning. Images/s, alone and each of two:
# 300,000: 1055, 72; 10,000: 1062, 136; 4,000: 1128, 428; 2,000: 874, 524; asleep at once: 558, 315.
_SPIN = "4000"
_CGROUP = Path("/sys/fs/cgroup")


def usable_cpus() -> int:
    """Number of processors that this process may use, at least 1.

    Those that the affinity mask allows (taskset, Slurm), and no more than the container's quota of processor time,
    rounded up (`docker run --cpus`; cgroup v2's cpu.max, v1's cfs_quota_us).
    """
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


def shorten_spinning() -> None:
    """Lets idle OpenMP threads sleep soon, unless the environment says how they wait.

    libgomp reads the setting when torch is imported; later it changes nothing.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", _SPIN)
