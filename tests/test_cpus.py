"""The processors that a process may use."""

from __future__ import annotations

import functools
import os
import subprocess
import sys

import pytest
import torch

from dino_fast import cpus


@pytest.mark.parametrize(("limit", "expected"), [("max 100000", None), ("150000 100000", 1.5), ("50000 100000", 0.5)])
def test_the_quota_of_a_container(tmp_path, limit, expected):
    (tmp_path / "cpu.max").write_text(limit + "\n")
    assert cpus._quota(tmp_path) == expected


def test_the_quota_of_an_older_kernel(tmp_path):
    assert cpus._quota(tmp_path) is None
    (tmp_path / "cpu").mkdir()
    for name, value in (("quota", 300000), ("period", 100000)):
        (tmp_path / "cpu" / f"cpu.cfs_{name}_us").write_text(f"{value}\n")
    assert cpus._quota(tmp_path) == 3.0


def test_affinity_and_quota_limit(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(8)))
    monkeypatch.setattr(cpus, "_CGROUP", tmp_path)
    assert cpus.usable_cpus() == 8
    (tmp_path / "cpu.max").write_text("250000 100000\n")
    assert cpus.usable_cpus() == 3
    (tmp_path / "cpu.max").write_text("10000 100000\n")
    assert cpus.usable_cpus() == 1


# Milliseconds of processor time that the other threads take in 25 waits of 20 ms between parallel regions.
WAITING = """
import os, threading, time
import torch

def used():
    tasks = (task for task in os.listdir("/proc/self/task") if int(task) != threading.get_native_id())
    return sum(int(open(f"/proc/self/task/{task}/schedstat").read().split()[0]) for task in tasks)

x = torch.zeros(1 << 18)
x.add_(1)
time.sleep(0.1)
before = used()
for _ in range(25):
    x.add_(1)
    time.sleep(0.02)
print((used() - before) / 1e6)
"""
DOORS = {
    "a script": "from dino_fast import train",
    "a script that imports torch first": "import torch; from dino_fast.engine.build import resolve_device as door",
    "an evaluation": "from dino_fast.eval.common.backbone import pick_device as door",
    "the parts of a step": "from dino_fast.benchmarks.step_parts import parts; parts(TINY, seconds=0.1)",
}
TINY = """
from dino_fast.engine.config import Config
TINY = Config(
    global_size=16, local_size=8, local_crops=2, arch="vit_tiny", patch_size=4, embed_dim=32, depth=2, num_heads=2,
    out_dim=256, head_hidden_dim=64, head_bottleneck_dim=32, batch_size=8, device="cpu",
)
"""


@functools.cache
def _waiting(door: str) -> float:
    plain = {k: v for k, v in os.environ.items() if not k.startswith(("OMP_", "GOMP_"))}
    script = (TINY if "TINY" in door else "") + door + ("\ndoor('cpu')" if "door" in door else "") + WAITING
    done = subprocess.run([sys.executable, "-c", script], env=plain, capture_output=True, text=True, check=True)
    return float(done.stdout.split()[-1])


@pytest.mark.skipif(torch.get_num_threads() < 2, reason="one thread waits for nobody")
@pytest.mark.parametrize("door", DOORS.values(), ids=DOORS)
def test_idle_threads_sleep_soon_whoever_imported_torch(door):
    if not cpus._loaded_libgomp():
        pytest.skip("PyTorch's threads are not libgomp's here")
    assert _waiting(door) < _waiting("") / 5
