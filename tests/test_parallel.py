"""The threads of the native code, through an operation that uses them."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import dino_fast.optim

RUN = """
import os, time, torch
from dino_fast.optim import ema_update
torch.set_num_threads(4)
teacher, student = [torch.zeros(1 << 20)], [torch.ones(1 << 20)]
"""


@pytest.mark.parametrize("used_before", ["ema_update(teacher, student, 0.0)", "torch.randn(1 << 22).sum()"])
def test_survives_a_fork(used_before):
    """A data-loader worker is a fork of a process whose workers, ours or PyTorch's, the child does not have.

    The child compares with NumPy: PyTorch's own OpenMP threads, which the parent has used, hang after a fork.
    """
    code = RUN + (
        "import dino_fast._C\n"
        f"{used_before}\n"
        "teacher[0].zero_()\n"
        "child = os.fork()\n"
        "if child == 0:\n"
        "    ema_update(teacher, student, 0.5)\n"
        "    os._exit(0 if (teacher[0].numpy() == 0.5).all() else 1)\n"
        "assert os.waitpid(child, 0)[1] == 0\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=300)


def test_waits_without_spinning():
    """Idle threads use no processor time."""
    code = RUN + (
        "ema_update(teacher, student, 0.5)\n"
        "time.sleep(0.5)\n"
        "before = time.process_time(); time.sleep(1.0)\n"
        "assert time.process_time() - before < 0.1, time.process_time() - before\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=300, env=os.environ | {"OMP_NUM_THREADS": "1"})


def test_takes_no_more_threads_than_torch():
    before = len(os.listdir("/proc/self/task"))
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        dino_fast.optim.ema_update([torch.zeros(1 << 20)], [torch.ones(1 << 20)], 0.5)
        time.sleep(0.05)
        assert len(os.listdir("/proc/self/task")) <= before
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("workers", ["openmp", "pool"])
def test_exceptions_and_nested_calls(tmp_path, workers):
    """In C++, where a task can throw and call again what it likes: the caller gets the exception, the next call works,
    and a nested call neither waits for its own thread nor starts others."""
    compiler = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++")
    if compiler is None:
        pytest.skip("no C++ compiler")
    here, program = Path(__file__).parent, tmp_path / workers
    csrc = here.parent / "csrc"
    openmp = ["-fopenmp", "-Wl,--no-as-needed", "-lgomp"] if workers == "openmp" else []
    sources = [here / "parallel_on_host.cpp", csrc / "cpu" / "parallel.cpp"]
    command = [compiler, "-std=c++17", "-O1", "-Wall", "-Wextra", "-Werror", "-I", csrc, *sources, "-o", program]
    subprocess.run([*map(str, command), *openmp, "-pthread", "-ldl"], check=True, timeout=300)
    done = subprocess.run([str(program)], timeout=120)
    assert done.returncode == 0, f"parallel_on_host.cpp:{done.returncode}"


@pytest.mark.parametrize("threads", [1, 2])
def test_memory_that_runs_out_in_a_task_is_a_memory_error(threads):
    """And the threads work afterwards. The long sequences need 73 MB of scratch each, where some 30 are left."""
    code = (
        "import resource, torch\n"
        f"torch.set_num_threads({threads})\n"
        "from dino_fast.attention import packed_attention\n"
        "from dino_fast.optim import ema_update\n"
        "def attend(tokens, backend='native'):\n"
        "    ends = torch.tensor([0, tokens, 2 * tokens], dtype=torch.int32)\n"
        "    return packed_attention(torch.ones(2 * tokens, 3, 1, 64, dtype=torch.bfloat16), ends, tokens,\n"
        "                            backend=backend)\n"
        "small = attend(100)\n"
        "used = int(open('/proc/self/statm').read().split()[0]) * resource.getpagesize()\n"
        "resource.setrlimit(resource.RLIMIT_AS, (used + (90 << 20), -1))\n"
        "try:\n"
        "    attend(60000)\n"
        "except MemoryError:\n"
        "    pass\n"
        "else:\n"
        "    raise SystemExit('there was memory enough: this test tests nothing')\n"
        "resource.setrlimit(resource.RLIMIT_AS, (-1, -1))\n"
        "assert torch.equal(attend(100), small)\n"
        "teacher = [torch.zeros(1 << 20)]\n"
        "ema_update(teacher, [torch.ones(1 << 20)], 0.5)\n"
        "assert (teacher[0] == 0.5).all()\n"
    )
    environment = os.environ | {"MALLOC_ARENA_MAX": "1"}  # another arena for a thread would reserve 64 MB for itself
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300, env=environment)
    assert done.returncode == 0, done.stderr
