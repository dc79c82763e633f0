"""A run with workers ends, saved where there is something to save, whatever happens to its data: never does it hang."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

ENDS_WITHIN = 60  # seconds, on a busy machine; a few on a quiet one
RECIPE: dict[str, object] = {
    "arch": "vit_tiny", "patch-size": 4, "embed-dim": 32, "depth": 1, "num-heads": 1, "global-size": 16,
    "local-size": 8, "local-crops": 2, "out-dim": 32, "head-hidden-dim": 32, "head-bottleneck-dim": 16,
    "batch-size": 8, "epochs": 1000, "warmup-epochs": 0, "knn-every": 0, "device": "cpu", "workers": 2,
}  # fmt: skip


def write_images(folder: Path, count: int = 60) -> Path:
    folder.mkdir(exist_ok=True)
    random = np.random.default_rng(0)
    for i in range(count):
        Image.fromarray(random.integers(0, 256, (20, 24, 3), dtype=np.uint8)).save(folder / f"{i:03d}.png")
    return folder


def start(folder: Path, *words: str, program: str = "", shell: str = "exec") -> subprocess.Popen[str]:
    """`dino-fast train` with two workers in a process group of its own; `program` runs first in its interpreter,
    `shell` is what the shell does with it."""
    recipe = [f"--{name}={value}" for name, value in RECIPE.items()]
    arguments = ["train", "--data", str(folder / "data"), "--out", str(folder / "run"), *recipe]
    code = f"import sys\n{program}\nfrom dino_fast.cli.main import main\nsys.exit(main(sys.argv[1:]))"
    return subprocess.Popen(
        ["bash", "-c", f'{shell} "$@"', "bash", sys.executable, "-c", code, *arguments, *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def end_of(run: subprocess.Popen[str]) -> tuple[int, str]:
    """The exit status and all output. Fails where the run goes on, and where it leaves a process."""
    try:
        text, _ = run.communicate(timeout=ENDS_WITHIN)
    except subprocess.TimeoutExpired:
        os.killpg(run.pid, signal.SIGKILL)
        pytest.fail(f"still running after {ENDS_WITHIN} s: {run.communicate()[0][-2000:]}")
    with pytest.raises(ProcessLookupError):
        os.killpg(run.pid, 0)
    return run.returncode, text


def wait_for_steps(run: subprocess.Popen[str], folder: Path, steps: int = 3) -> None:
    metrics, end = folder / "run" / "metrics.jsonl", time.monotonic() + ENDS_WITHIN
    while not metrics.is_file() or metrics.read_text().count("\n") < steps:
        assert run.poll() is None, run.communicate()[0]
        assert time.monotonic() < end, "no step was made"
        time.sleep(0.05)


def saved(folder: Path) -> bool:
    return any((folder / "run" / "checkpoints").glob("step-*"))


def test_too_many_unreadable_images(tmp_path: Path) -> None:
    for i in range(20):
        (write_images(tmp_path / "data") / f"bad{i}.png").write_text("no image")
    code, text = end_of(start(tmp_path))
    assert code == 2 and "cannot be read, more than the 5.0% accepted" in text and "Traceback" not in text


def test_images_that_vanish(tmp_path: Path) -> None:
    write_images(tmp_path / "data")
    run = start(tmp_path, "--max-corrupt", "1")
    wait_for_steps(run, tmp_path)
    (tmp_path / "data").rename(tmp_path / "gone")
    code, text = end_of(run)
    assert code == 2 and "is the disk still there?" in text and "Saved at step" in text and saved(tmp_path)


def test_a_mistake_in_a_step(tmp_path: Path) -> None:
    """An exception that nobody foresaw keeps its traceback, and with it the frames of the loop."""
    write_images(tmp_path / "data")
    program = "\n".join(
        [
            "from dino_fast.engine import trainer",
            "def fail(state, batch, hyperparams, step):",
            "    raise ZeroDivisionError('a mistake')",
            "trainer.train_step = fail",
        ]
    )
    code, text = end_of(start(tmp_path, program=program))
    assert code == 1 and "ZeroDivisionError: a mistake" in text


def test_a_batch_that_cannot_be_sent(tmp_path: Path) -> None:
    """A failure in the thread that hands a worker's batches over, of which plain multiprocessing tells nobody."""
    write_images(tmp_path / "data")
    program = "\n".join(
        [
            "from dino_fast.data.batch import Batch",
            "def __getstate__(self):",
            "    if self.epoch == 0 and self.batch == 5:",
            "        raise OSError(24, 'Too many open files')",
            "    return self.__dict__",
            "Batch.__getstate__ = __getstate__",
        ]
    )
    code, text = end_of(start(tmp_path, program=program))
    assert code == 2 and "open files are allowed, and the data-loading workers ran out" in text
    assert "--workers (0 loads in the training process)" in text and "Saved at step 5" in text and saved(tmp_path)


@pytest.mark.parametrize("limit", [32, 64])
def test_few_open_files(tmp_path: Path, limit: int) -> None:
    write_images(tmp_path / "data")
    code, text = end_of(start(tmp_path, "--max-steps", "10", shell=f"ulimit -n {limit}; exec"))
    lacking = f"{limit} open files are allowed, and 2 workers take up to" in text and "ulimit -n" in text
    assert (code == 2 and lacking) or (code == 0 and limit == 64), text
    assert "Traceback" not in text


def _mount_refused() -> str:
    if not shutil.which("unshare"):
        return "needs unshare"
    command = ["unshare", "-m", "mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", "/dev/shm"]
    return subprocess.run(command, capture_output=True, text=True).stderr


@pytest.mark.parametrize("size", ["1", "300"])
def test_little_shared_memory(tmp_path: Path, size: str) -> None:
    """Too little for any batch, and for those that the workers are ahead."""
    if reason := _mount_refused():
        pytest.skip(f"only who may mount can make /dev/shm smaller: {reason}")
    write_images(tmp_path / "data")
    mount = f"mount -t tmpfs -o size={size}k tmpfs /dev/shm;"
    run = start(tmp_path, shell=f"exec unshare -m bash -c '{mount} exec \"$@\"' bash")
    code, text = end_of(run)
    assert code == 2 and "ran out of shared memory (/dev/shm holds 0 MB)" in text, text
    assert "--workers (0 loads in the training process)" in text and "Traceback" not in text


@pytest.mark.parametrize("send", [os.killpg, os.kill], ids=["group", "process"])
def test_sigterm_saves(tmp_path: Path, send: Callable[[int, int], None]) -> None:
    """A scheduler sends it to all processes of a job: that it ends the workers too is no failure of the data."""
    write_images(tmp_path / "data")
    run = start(tmp_path)
    wait_for_steps(run, tmp_path)
    send(run.pid, signal.SIGTERM)
    code, text = end_of(run)
    assert code == 143 and "interrupted at step" in text and "--resume" in text and saved(tmp_path)
    assert "worker died" not in text and "Traceback" not in text
