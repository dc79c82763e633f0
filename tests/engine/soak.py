"""Breaks training runs at random moments and checks that they end as if nothing had happened, bit for bit.

    python -m tests.engine.soak --rounds 50 --log soak.log

A round is one run of one or two processes (weights cut over the two), broken one to three times and continued with
`--resume`. Before each continuation the newest whole checkpoint is read, and the run must go on from there; at the end
weights, optimizer, centre and every line of metrics.jsonl must be those of a run that nothing disturbed. Breaks:

    kill one      SIGKILL to one process at a random moment; the other one finds its neighbour gone
    kill all      SIGKILL to all
    kill in save  SIGKILL from within a save: after a random block, before a file's end, before or after the rename
    full disk     the file system of the checkpoints fills up during a save (a small tmpfs where mounting is allowed,
                  else an error in its place)
    truncated     kill all; then the newest checkpoint loses its end
    flipped       kill all; then one bit of the newest checkpoint is changed
    SIGTERM       to all, with 30 s to end

Processes are forked from this one, which has imported everything: a start takes milliseconds.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import faulthandler
import gc
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed.fsdp
import torch.distributed.tensor
import torch.utils.tensorboard
from PIL import Image

from dino_fast.cli import main as cli
from dino_fast.engine import checkpoint
from dino_fast.engine import trainer as loop
from dino_fast.engine.run_dir import read_metrics

STEPS = 40
SETTINGS: dict[str, Any] = {
    "arch": "vit_tiny", "embed_dim": 32, "depth": 2, "num_heads": 2, "patch_size": 4, "global_size": 16,
    "local_size": 8,
    "local_crops": 2, "out_dim": 64, "head_hidden_dim": 32, "head_bottleneck_dim": 16, "drop_path_rate": 0.2,
    "batch_size": 8, "epochs": 8, "warmup_epochs": 2, "lr": 0.02, "knn_every": 4, "device": "cpu", "save_every": 0.2,
    "workers": 0, "init": "xavier",
}  # fmt: skip
BREAKS = ("kill one", "kill all", "kill in save", "full disk", "truncated", "flipped", "SIGTERM")
EXACT = ("student", "teacher", "dino_loss", "optimizer", "scaler", "torch_rng", "best")
TIMED = (
    "images_per_second",
    "tokens_per_second",
    "tflops",
    "data_wait",
    "memory",
)  # of a line of metrics, what no two runs share
DISK = 3 << 20  # bytes of the small file system; a checkpoint has 0.2 MB


def main(words: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--log", type=Path, help="file that the lines go to as well")
    args = parser.parse_args(words)
    torch.set_num_threads(1)  # no thread may run when a process is forked
    draw = random.Random(args.seed)
    began, starts, kinds = time.monotonic(), 0, dict.fromkeys(BREAKS, 0)
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        work = Path(folder)
        disk = stack.enter_context(small_disk(work))
        say = Log(args.log)
        say(f"torch {torch.__version__}, {args.rounds} rounds, seed {args.seed}, runs of {STEPS} steps, full disk: "
            + ("a tmpfs of 3 MB" if disk else "an error in its place (mounting is not allowed here)"))  # fmt: skip
        images = make_images(work / "images")
        expected = {}
        for world in (1, 2):
            out = work / f"undisturbed-{world}"
            codes = finish(start(images, out, world, draw), work)
            assert codes == [0] * world, (work / "output").read_text()
            expected[world] = final(out)
        for number in range(1, args.rounds + 1):
            world = draw.choice((1, 2))
            breaks = [draw.choice(BREAKS) for _ in range(draw.randint(1, 3))]
            out = work / f"run-{number}"
            story = []
            for kind in breaks:
                at, saved = disturbed(kind, images, out, world, draw, disk, work)
                starts, kinds[kind] = starts + 1, kinds[kind] + 1
                story.append(f"{kind} at step {at}, continues at {saved}")
            codes = finish(start(images, out, world, draw), work)
            check_continued(work, saved)
            starts += 1
            assert codes == [0] * world, f"round {number} ({story}): {codes}\n{(work / 'output').read_text()}"
            problem = difference(final(out), expected[world])
            ended = f"{world} process{'es' if world > 1 else ''}; {'; '.join(story)}"
            result = problem or "equal to the undisturbed run"
            say(f"{time.monotonic() - began:5.0f} s, round {number}: {ended}; {result}")
            if problem:
                return 1
            shutil.rmtree(out, ignore_errors=True)
        counts = ", ".join(f"{kind} {count}" for kind, count in kinds.items())
        say(f"passed: {args.rounds} rounds, {starts} starts, {sum(kinds.values())} breaks ({counts}), "
            f"every run equal to the undisturbed one bit for bit, {time.monotonic() - began:.0f} s")  # fmt: skip
    return 0


class Log:
    def __init__(self, path: Path | None) -> None:
        self.file = open(path, "w", encoding="utf-8") if path else None  # noqa: SIM115

    def __call__(self, text: str) -> None:
        print(text, flush=True)
        if self.file:
            self.file.write(text + "\n")
            self.file.flush()


def make_images(root: Path) -> Path:
    """Two classes of 22 pictures: 40 to train on, 5 steps of 8 an epoch."""
    draw = np.random.default_rng(0)
    for name, low in (("dark", 0), ("light", 128)):
        (root / name).mkdir(parents=True)
        for i in range(22):
            pixels = draw.integers(low, low + 128, (20, 24, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(root / name / f"{i}.png")
    return root


@contextlib.contextmanager
def small_disk(work: Path) -> Iterator[Path | None]:
    """A file system that is soon full, where one may be mounted."""
    disk = work / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={DISK}", "none", str(disk)], capture_output=True
    ).returncode == 0 if shutil.which("mount") else False  # fmt: skip
    try:
        yield disk if mounted else None
    finally:
        if mounted:
            subprocess.run(["umount", str(disk)], check=True)


# ---- processes ----


def start(images: Path, out: Path, world: int, draw: random.Random, sabotage: Any = None) -> list[int]:
    """The processes of `dino-fast train --resume`; `sabotage()` is called in the first one before it begins."""
    settings = out.with_suffix(".yaml")
    settings.write_text(json.dumps({**SETTINGS, "data": str(images), "save_in_background": draw.random() < 0.5}))
    words = ["train", "--config", str(settings), "--out", str(out), "--resume", "--fsdp", "full"]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    variables = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(world)}
    (out.parent / "output").write_text("")
    pids = []
    for rank in range(world):
        pid = os.fork()
        if pid == 0:
            child(
                {**variables, "RANK": str(rank), "LOCAL_RANK": str(rank)},
                words,
                out.parent,
                sabotage if rank == 0 else None,
            )
        pids.append(pid)
    return pids


def child(variables: dict[str, str], words: list[str], work: Path, sabotage: Any) -> None:
    code = 70
    try:
        gc.freeze()
        os.environ.update(variables)
        descriptor = os.open(work / "output", os.O_WRONLY | os.O_APPEND)
        os.dup2(descriptor, 1)
        os.dup2(descriptor, 2)
        faulthandler.register(signal.SIGUSR1, all_threads=True)  # `finish` asks a process that hangs where it is
        sys.stdout, sys.stderr = (os.fdopen(os.dup(n), "w", buffering=1) for n in (1, 2))
        if sabotage:
            sabotage()
        code = cli.main(words)
        sys.stdout.flush()
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        os._exit(code)


def finish(pids: list[int], work: Path, seconds: float = 90) -> list[int]:
    """Exit codes, negative for signals. A process that outlives the others by `seconds` is an error."""
    codes: dict[int, int] = {}
    end = time.monotonic() + seconds
    while len(codes) < len(pids):
        for pid in pids:
            if pid not in codes:
                done, status = os.waitpid(pid, os.WNOHANG)
                if done:
                    codes[pid] = os.waitstatus_to_exitcode(status)
        if time.monotonic() > end:
            for pid in set(pids) - codes.keys():
                os.kill(pid, signal.SIGUSR1)
                time.sleep(1)
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)
            raise AssertionError(f"still running after {seconds} s:\n{(work / 'output').read_text()}")
        time.sleep(0.002)
    return [codes[pid] for pid in pids]


def kill(pids: list[int], number: int = signal.SIGKILL) -> None:
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)


# ---- breaks ----


def disturbed(
    kind: str, images: Path, out: Path, world: int, draw: random.Random, disk: Path | None, work: Path
) -> tuple[int, int]:
    """Starts or continues the run and breaks it. Returns the steps it had done, and where it will go on."""
    before = steps_of(out)
    sabotage = None
    if kind == "kill in save":
        sabotage = killer(
            draw.randint(1, 4), draw.choice(("_write_block", "_write_json", "_put", "_prune")), draw.randint(0, 40)
        )
    if kind == "full disk":
        if disk is None:
            sabotage = no_space(draw.randint(1, 4), draw.randint(0, 40))
        else:
            move_to(disk, out)
    pids = start(images, out, world, draw, sabotage)
    target = before + draw.randint(1, max(1, STEPS - before - 5))
    if kind == "full disk" and disk is not None:
        watch(out, target, pids)
        ballast = disk / "ballast"
        with contextlib.suppress(OSError), open(ballast, "wb", buffering=0) as file:
            while True:
                file.write(b"\0" * 4096)
        codes = finish(pids, work)
        ballast.unlink()
        move_back(out)
        text = (work / "output").read_text()
        assert codes[0] in (0, 2) and (codes[0] == 0 or "no space for the checkpoint" in text), text
    elif kind == "kill in save" or (kind == "full disk" and disk is None):
        finish(pids, work)
    elif kind == "SIGTERM":
        watch(out, target, pids)
        kill(pids, signal.SIGTERM)
        codes = finish(pids, work, seconds=30)
        assert set(codes) <= {0, 143}, (codes, (work / "output").read_text())
        assert codes[0] == 0 or newest(out) == steps_of(out), "a step was lost"
    else:
        watch(out, target, pids)
        time.sleep(draw.random() * 0.02)
        kill([draw.choice(pids)] if kind == "kill one" else pids)
        finish(pids, work)
        if kind in ("truncated", "flipped"):
            damage(out, kind, draw)
    return steps_of(out), newest(out)


def watch(out: Path, step: int, pids: list[int]) -> None:
    """Returns once the run has done `step` steps, or ended."""
    while steps_of(out) < step:
        # WNOWAIT: `finish` will ask for the exit code again
        if any(os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None for pid in pids):
            return
        time.sleep(0.001)


def steps_of(out: Path) -> int:
    try:
        return (out / "metrics.jsonl").read_bytes().count(b"\n")
    except FileNotFoundError:
        return 0


def newest(out: Path) -> int:
    """The step of the newest whole checkpoint."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        loaded = checkpoint.load(out / "checkpoints")
    return 0 if loaded is None else loaded[0]


def check_continued(work: Path, step: int) -> None:
    """The run that has just ended went on from `step`: nothing more than what followed the last save was lost."""
    text = (work / "output").read_text()
    expected = f"continuing at step {step} of" if step else "starting over"
    if step == STEPS:
        expected = "is finished"
    assert expected in text or (step == 0 and "continuing" not in text), f"expected '{expected}' in:\n{text}"


def killer(save: int, function: str, calls: int) -> Any:
    """Kills the process in its `save`-th save, at the `calls`-th call of one of the functions that write it."""

    def sabotage() -> None:
        plain, plain_save, count = getattr(checkpoint, function), checkpoint.save, [0, 0]

        def counted_save(*given: Any, **named: Any) -> Any:
            count[0], count[1] = count[0] + 1, 0
            return plain_save(*given, **named)

        def counted(*given: Any) -> Any:
            count[1] += 1
            if count[0] == save and count[1] > (calls if function == "_write_block" else 0):
                os.kill(os.getpid(), signal.SIGKILL)
            return plain(*given)

        checkpoint.save = counted_save
        setattr(checkpoint, function, counted)

    return sabotage


def no_space(save: int, calls: int) -> Any:
    """As `killer`, with the error that a full disk gives."""

    def sabotage() -> None:
        plain, plain_save, count = checkpoint._write_block, checkpoint.save, [0, 0]

        def counted_save(*given: Any, **named: Any) -> Any:
            count[0], count[1] = count[0] + 1, 0
            return plain_save(*given, **named)

        def counted(*given: Any) -> Any:
            count[1] += 1
            if count[0] == save and count[1] > calls:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return plain(*given)

        checkpoint.save, checkpoint._write_block = counted_save, counted

    return sabotage


def move_to(disk: Path, out: Path) -> None:
    """Puts the run's checkpoints on the small disk."""
    out.mkdir(parents=True, exist_ok=True)
    place, real = out / "checkpoints", disk / "checkpoints"
    shutil.rmtree(real, ignore_errors=True)
    if place.exists():
        shutil.copytree(place, real)
        shutil.rmtree(place)
    else:
        real.mkdir()
    place.symlink_to(real)


def move_back(out: Path) -> None:
    place = out / "checkpoints"
    real = place.resolve()
    place.unlink()
    shutil.copytree(real, place)
    shutil.rmtree(real)


def damage(out: Path, kind: str, draw: random.Random) -> None:
    folders = sorted((out / "checkpoints").glob("step-*"))
    if not folders:
        return
    file = folders[-1] / draw.choice((checkpoint.TENSORS, checkpoint.STATE))
    size = file.stat().st_size
    # The best checkpoint shares the file: it is the one whose loss nothing here could mend, and not what is tested.
    content = bytearray(file.read_bytes())
    file.unlink()
    if kind == "truncated":
        file.write_bytes(content[: draw.randrange(size)])
    else:
        content[draw.randrange(size)] ^= 1 << draw.randrange(8)
        file.write_bytes(content)


# ---- results ----


def final(out: Path) -> dict[str, Any]:
    step, state = checkpoint.load(out / "checkpoints") or (0, {})
    rows = [{k: v for k, v in row.items() if k not in TIMED} for row in read_metrics(out)]
    return {"step": step, "rows": rows, **{name: state.get(name) for name in EXACT}}


def difference(found: Any, expected: Any, where: str = "run") -> str:
    """Where two results differ, or nothing."""
    if isinstance(expected, torch.Tensor):
        return "" if torch.equal(found, expected) else f"{where} differs"
    if isinstance(expected, dict):
        if found.keys() != expected.keys():
            return f"{where} has {sorted(set(found) ^ set(expected))} in one run alone"
        return next((x for key in expected if (x := difference(found[key], expected[key], f"{where}/{key}"))), "")
    if isinstance(expected, list):
        if len(found) != len(expected):
            return f"{where} has {len(found)} entries, not {len(expected)}"
        return next((x for i in range(len(found)) if (x := difference(found[i], expected[i], f"{where}/{i}"))), "")
    return "" if found == expected else f"{where} is {found!r}, not {expected!r}"


if __name__ == "__main__":
    assert loop.train  # imported before anything is forked
    sys.exit(main())
