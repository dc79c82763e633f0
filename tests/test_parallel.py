"""The threads of the native code, through an operation that uses them."""

from __future__ import annotations

import os
import subprocess
import sys
import time

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
