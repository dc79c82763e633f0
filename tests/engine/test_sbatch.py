"""examples/train.sbatch with stand-ins for Slurm's commands: a warning saves, requeues, and the next turn continues."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dino_fast.engine.run_dir import read_metrics

SCRIPT = Path(__file__).parents[2] / "examples" / "train.sbatch"


@pytest.fixture
def slurm(tmp_path: Path) -> dict[str, str]:
    """An environment with `srun`, `scontrol` and `dino-fast`; what they were called with is in calls.txt."""
    commands = {
        "srun": f'echo "$$" > {tmp_path}/pid; exec "$@"',
        "scontrol": f'echo "scontrol $*" >> {tmp_path}/calls.txt',
        "dino-fast": f'exec {sys.executable} -m dino_fast "$@"',
    }
    for name, body in commands.items():
        (tmp_path / "bin").mkdir(exist_ok=True)
        (tmp_path / "bin" / name).write_text(f"#!/bin/bash\n{body}\n")
        (tmp_path / "bin" / name).chmod(0o755)
    return {**os.environ, "PATH": f"{tmp_path}/bin:{os.environ['PATH']}", "SLURM_JOB_ID": "4711"}


def _start(slurm: dict[str, str], out: Path, steps: int) -> subprocess.Popen[str]:
    words = ["--data", "demo", "--preset", "demo", "--out", str(out), "--knn-every", "0", "--device", "cpu"]
    return subprocess.Popen(
        ["bash", str(SCRIPT), *words, "--max-steps", str(steps)],
        env=slurm, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM])
def test_a_warning_requeues_and_the_next_turn_continues(slurm: dict[str, str], tmp_path: Path, number: int) -> None:
    out, metrics = tmp_path / "run", tmp_path / "run" / "metrics.jsonl"
    first = _start(slurm, out, 100_000)
    while first.poll() is None and not (metrics.exists() and metrics.read_bytes().count(b"\n") > 3):
        time.sleep(0.01)
    assert first.poll() is None, first.communicate()[0]
    os.kill(int((tmp_path / "pid").read_text()), number)  # Slurm warns the step's processes, not the script
    printed, _ = first.communicate(timeout=300)
    assert first.returncode == 128 + number, printed
    assert "and saved" in printed
    assert (tmp_path / "calls.txt").read_text() == "scontrol requeue 4711\n"
    step = len(read_metrics(out))
    second = _start(slurm, out, step + 2)
    printed, _ = second.communicate(timeout=300)
    assert second.returncode == 0, printed
    assert f"continuing at step {step} of {step + 2}" in printed
    assert [row["step"] for row in read_metrics(out)] == list(range(step + 2))
    assert (tmp_path / "calls.txt").read_text() == "scontrol requeue 4711\n"  # a finished run is not put back


def test_a_mistake_is_not_requeued(slurm: dict[str, str], tmp_path: Path) -> None:
    done = subprocess.run(["bash", str(SCRIPT), "--no-such-option"], env=slurm, capture_output=True, text=True)
    assert done.returncode == 2 and "--no-such-option" in done.stderr
    assert not (tmp_path / "calls.txt").exists()
