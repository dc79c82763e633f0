"""Whole training runs: `dino-fast train` against a plain transcription of the published training script.

On a CPU, CIFAR-10: a ViT of width 192 with 6 blocks, patches of 4, 2 + 8 crops of 32 and 16 pixels, batches of 64, the
last layer never frozen (freezing would spare ours its gradient). Each contender is a process of its own with the
allocator that its users have; contenders take turns, a round is a fresh start of each. Timed from the end of step 3 to
the end of the last: crops, steps, logging. The transcription gets its images decoded in memory, and as many loader
workers as suit it best. A run counts as right where the mean of its first losses is the transcription's to ERROR_LIMIT:
crops and weights are drawn differently. Memory is the process's peak, imports and all.

`gpu_rows` times the step on crops that lie on the GPU, and looks for the largest batch; `cifar_rows` trains for seven
minutes and measures k-NN. See `benchmarks.gpu`.
"""

from __future__ import annotations

import json
import math
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from dino_fast.backends import recorded_choices

from .harness import Row, described, no_such_row, set_times
from .load import Load

WARM = 3  # steps that are not timed
ERROR_LIMIT = 0.02
CHECKED_STEPS = 5
FIRST_STEP = "first step of the demo"


@dataclass(frozen=True)
class Size:
    """A run on CIFAR-10."""

    prototypes: int = 65536
    batch: int = 64
    steps: int = 12
    images: int = 4096  # of the data set, in memory of the transcription
    width: int = 192
    depth: int = 6
    heads: int = 3
    head_hidden: int = 2048

    def __str__(self) -> str:
        return f"B{self.batch} V10 K{self.prototypes} ViT-{self.width}x{self.depth}/4 at 32+16 px"


# ---- a process of its own ----


def cifar(part: str = "train") -> Path | None:
    """The parquet file, where there is one: $DINO_FAST_TEST_DATA, or shared/data beside the checkout."""
    folder = os.environ.get("DINO_FAST_TEST_DATA") or Path(__file__).resolve().parents[2] / "shared" / "data"
    path = Path(folder) / f"cifar10-{part}.parquet"
    return path if path.exists() else None


def ours(size: Size, data: str, options: list[str]) -> list[tuple[float, float]]:
    """`dino-fast train`, the command itself; each step's loss and the time at which it was logged."""
    from dino_fast.cli import main as cli
    from dino_fast.engine.run_dir import RunDir

    seen: list[tuple[float, float]] = []
    log = RunDir.log

    def timed(run: RunDir, row: dict[str, Any]) -> None:
        log(run, row)
        seen.append((float(row["loss"]), time.perf_counter()))

    RunDir.log = timed  # type: ignore[method-assign]
    with tempfile.TemporaryDirectory() as folder:
        given = {
            "data": data, "out": f"{folder}/run", "arch": "vit_tiny", "embed-dim": size.width, "depth": size.depth,
            "num-heads": size.heads, "patch-size": 4, "global-size": 32, "local-size": 16, "out-dim": size.prototypes,
            "head-hidden-dim": size.head_hidden, "batch-size": size.batch, "max-steps": size.steps, "knn-every": 0,
            "freeze-last-layer": 0, "device": "cpu",
        }  # fmt: skip
        arguments = [text for name, value in given.items() for text in (f"--{name}", str(value))]
        if cli.main(["train", *arguments, *options]):
            raise RuntimeError("dino-fast train failed")
    return seen


def published(size: Size, data: str, options: list[str]) -> list[tuple[float, float]]:
    """The transcription with `options[0]` loader workers."""
    import io

    import numpy as np
    import pyarrow.parquet as parquet
    from PIL import Image

    from dino_fast.benchmarks.original.script import Settings, run

    column = parquet.read_table(data).column(0).slice(0, size.images).to_pylist()
    arrays = [np.asarray(Image.open(io.BytesIO(x["bytes"])).convert("RGB")) for x in column]
    settings = Settings(
        out_dim=size.prototypes, batch_size=size.batch, width=size.width, depth=size.depth, heads=size.heads,
        workers=int(options[0]), head_hidden=size.head_hidden,
    )  # fmt: skip
    steps = run(arrays, settings)
    return [next(steps) for _ in range(size.steps)]


CONTENDERS: dict[str, Callable[[Size, str, list[str]], list[tuple[float, float]]]] = {"ours": ours, "plain": published}


@dataclass
class Measured:
    """One run: milliseconds a step after the first ones, bytes at the peak, the first losses, which backends ran."""

    ms: float
    peak: int
    losses: list[float]
    backend: str = ""


def in_a_process(contender: str, size: Size, data: str, options: list[str]) -> Measured:
    command = [sys.executable, "-m", "dino_fast.benchmarks.bench_engine", contender, json.dumps(asdict(size)), data]
    done = subprocess.run([*command, *options], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{contender}: {done.stderr.strip().splitlines()[-1]}")
    return Measured(**json.loads(done.stdout.splitlines()[-1]))


def answer(contender: str, size: Size, data: str, options: list[str]) -> None:
    """What a process of `in_a_process` does."""
    with recorded_choices() as choices:
        steps = CONTENDERS[contender](size, data, options)
    first = min(WARM, len(steps) - 2)
    ms = 1e3 * (steps[-1][1] - steps[first][1]) / (len(steps) - 1 - first)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10
    losses = [loss for loss, _ in steps[:CHECKED_STEPS]]
    print(json.dumps(asdict(Measured(ms, peak, losses, described(choices)))))


# ---- rows ----


def cpu_rows(sizes: list[Size], *, rounds: int = 3, data: str | None = None) -> list[Row]:
    """Runs of each size, contenders in turns; the baseline is the transcription with its faster number of workers."""
    found = data or cifar()
    contenders = [
        ("dino-fast", "ours", []),
        ("published script", "plain", ["0"]),
        ("published script, 2 workers", "plain", ["2"]),
        ("dino-fast, bf16", "ours", ["--precision", "bf16"]),
    ]
    rows = []
    for size in sizes:
        if found is None:
            note = "absent: no cifar10-train.parquet (DINO_FAST_TEST_DATA names the folder)"
            rows += [Row("engine", str(size), "float32", name, note=note) for name, *_ in contenders]
            continue
        runs: dict[str, list[Measured]] = {name: [] for name, *_ in contenders}
        load = Load()
        for turn in range(rounds):
            shift = turn % len(contenders)
            for name, kind, options in contenders[shift:] + contenders[:shift]:
                runs[name].append(in_a_process(kind, size, str(found), options))
        rows += rows_of(size, runs, load.others())
    return rows


def rows_of(size: Size, runs: dict[str, list[Measured]], others: float | None = None) -> list[Row]:
    """`runs` has each contender's measurements, a round each; `others` is what `load` saw of other programs."""
    limit = ERROR_LIMIT if size.batch * size.prototypes > 1 << 16 else 10 * ERROR_LIMIT  # few images, few prototypes
    mine, expected = runs["dino-fast"], runs["published script"][0].losses
    rows = []
    for name, measured in runs.items():
        row = Row("engine", str(size), "bfloat16" if "bf16" in name else "float32", name)
        want = statistics.mean(expected)
        row.error = abs(statistics.mean(measured[0].losses) - want) / want
        row.allocator = "default" if "published" in name else "keeps freed memory"
        row.role = "ours" if name == "dino-fast" else "baseline" if name == "published script" else ""
        if row.error <= limit:
            row.peak_bytes = max(m.peak for m in measured)
            row.backend = measured[0].backend
            row.note = f"{1e3 * size.batch / statistics.median(m.ms for m in measured):.1f} images/s"
            set_times(row, [m.ms for m in measured], [m.ms for m in mine], others)
        else:
            row.note = f"wrong: first losses differ by {row.error:.2e}, at most {limit:.2e} is right"
        rows.append(row)
    return rows


def first_step(rounds: int = 3) -> Iterator[Row]:
    """`import dino_fast` and the first step of the demo, from a shell: seconds until its line is in metrics.jsonl."""
    seconds = []
    for _ in range(rounds):
        with tempfile.TemporaryDirectory() as folder:
            command = [
                sys.executable,
                "-m",
                "dino_fast",
                "train",
                "--max-steps",
                "1",
                "--out",
                f"{folder}/run",
            ]
            began = time.perf_counter()
            process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            lines = Path(folder) / "run" / "metrics.jsonl"
            while not (lines.exists() and lines.stat().st_size) and process.poll() is None:
                time.sleep(0.02)
            seconds.append(time.perf_counter() - began)
            if process.wait():
                raise RuntimeError("dino-fast train failed")
    note = "includes the k-NN accuracy of the untrained weights"
    yield Row("engine", FIRST_STEP, "float32", "dino-fast", ms=1e3 * statistics.median(seconds), note=note)


def run(quick: bool = False, only: str = "") -> list[Row]:
    """Times whole runs on CIFAR-10, and the first step of the demo; `only` leaves out what has another name."""
    rounds = 1 if quick else 3
    sizes = [Size(), Size(prototypes=4096)]
    if quick:
        sizes = [Size(prototypes=512, batch=8, steps=6, images=64, depth=2, head_hidden=64)]
    chosen = [size for size in sizes if only in f"engine, {size}"]
    with_first = only in FIRST_STEP
    if not chosen and not with_first:
        raise no_such_row(only, [*map(str, sizes), FIRST_STEP])
    return [*cpu_rows(chosen, rounds=rounds), *(first_step(rounds) if with_first else ())]


def gpu_rows(*, quick: bool = False, device: str = "cuda", end: float = math.inf) -> Iterator[Row]:
    """Training steps on a GPU, until `end` of time.monotonic; see `engine_on_gpu`."""
    from .engine_on_gpu import rows

    return rows(quick=quick, device=device, end=end)


def cifar_rows(
    *, quick: bool = False, device: str = "cuda", seconds: float = 420.0, end: float = math.inf
) -> Iterator[Row]:
    """k-NN accuracy over a run of `seconds` on CIFAR-10; see `engine_on_gpu`."""
    from .engine_on_gpu import accuracy_rows

    return accuracy_rows(quick=quick, device=device, seconds=seconds, end=end)


if __name__ == "__main__":
    _, kind, text, source, *more = sys.argv
    answer(kind, replace(Size(), **json.loads(text)), source, more)
