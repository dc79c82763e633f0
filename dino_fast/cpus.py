"""The processors of this process: how many it may use, and how its threads wait on them."""

from __future__ import annotations

import ctypes
import math
import os
import threading
from pathlib import Path

# Turns for which an OpenMP thread spins between operations before it sleeps. libgomp's own 300,000 suit a machine of
# one's own; two demo runs at once on two cores then wait for each other's spinning. Images/s, alone and each of two:
# 300,000: 1055, 72; 10,000: 1062, 136; 4,000: 1128, 428; 2,000: 874, 524; asleep at once: 558, 315 (Intel Xeon).
# Alone and beside one busy program: 300,000: 893, 22; 4,000: 620, 240; 100: 506, 371 (AMD EPYC, Zen 4).
SPIN = "4000"
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

    libgomp reads GOMP_SPINCOUNT when it is loaded, which is when torch is imported. Where that has happened before
    (`import torch` in the user's script), a team of threads that has nothing to do brings libgomp to the same: with
    more threads than processors it lets all of them spin for 100 turns only.
    """
    if "OMP_WAIT_POLICY" in os.environ or "GOMP_SPINCOUNT" in os.environ:
        return
    os.environ["GOMP_SPINCOUNT"] = SPIN  # also for processes that this one starts
    for path in _loaded_libgomp():
        _outnumber_processors(path)


def _loaded_libgomp() -> set[str]:
    """Paths of the copies of libgomp in this process."""
    try:
        lines = Path("/proc/self/maps").read_text().splitlines()
    except OSError:
        return set()
    paths = (line.split(maxsplit=5)[-1] for line in lines)
    return {path for path in paths if Path(path).name.startswith("libgomp")}


def _outnumber_processors(path: str) -> None:
    """Starts a team of libgomp's threads that stays idle, just large enough that all teams outnumber the processors."""
    try:
        gomp = ctypes.CDLL(path)
        nothing = ctypes.cast(ctypes.CDLL(None).free, ctypes.c_void_p)  # free(NULL), what each of them does once
        size = len(os.sched_getaffinity(0)) - gomp.omp_get_max_threads() + 2
    except (OSError, AttributeError):  # another OpenMP under that name
        return
    if gomp.omp_get_max_threads() == 1 or size < 2:  # nobody waits, or they outnumber the processors already
        return
    started = threading.Event()

    def keep_team() -> None:  # a team lives as long as the thread that it belongs to
        gomp.GOMP_parallel(nothing, None, ctypes.c_uint(size), ctypes.c_uint(0))
        started.set()
        threading.Event().wait()

    threading.Thread(target=keep_team, name="idle OpenMP team", daemon=True).start()
    started.wait()
