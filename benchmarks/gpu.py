"""`python -m benchmarks.gpu --part tests|kernels|crops|engine|cifar|all`: everything that a GPU has to show.

Each part ends within eight minutes and leaves one JSON file under benchmarks/results/, named by device, torch, part and
date, with rows of {operation, shape, dtype, contender, ms, peak_bytes, error, floor_share, ratio}. The file is written
after every row; its `complete` is true at the end. Every contender is checked before it is timed; a peer that is not
installed is recorded as absent, a comparison that the time did not reach and a function that this checkout lacks with a
note that says so. Parts run in processes of their own.

    tests    the tests marked `gpu`
    kernels  losses, optimizer step, teacher's average and packed attention beside their baselines and peers
    crops    `gpu_rows` of bench_multi_crop.py
    engine   `gpu_rows` of bench_engine.py
    cifar    `cifar_rows` of bench_engine.py

`--dry-run` goes through the same code on the CPU with tiny shapes, to test this file; its times mean nothing and are
written only where `--out` says.
"""

from __future__ import annotations

import argparse
import datetime
import importlib
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch

from . import harness, report
from .harness import Comparison, Row

LIMIT = 480.0  # seconds of a part
RESERVE = 45.0  # left for the last comparison's checks and compilations
FUNCTIONS = {
    "crops": (("bench_multi_crop", "gpu_rows"),),
    "engine": (("bench_engine", "gpu_rows"),),
    "cifar": (("bench_engine", "cifar_rows"),),
}
PARTS = ("tests", "kernels", *FUNCTIONS)
ROOT = Path(__file__).resolve().parents[1]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__.splitlines()[0])
    parser.add_argument("--part", required=True, choices=[*PARTS, "all"])
    parser.add_argument("--out", type=Path, metavar="DIR", help="where the JSON files go (default: benchmarks/results)")
    parser.add_argument("--dry-run", action="store_true", help="tiny shapes on the CPU: tests the harness, not speed")
    args = parser.parse_args(arguments)
    if not args.dry_run and not torch.cuda.is_available():
        print(
            "error: no CUDA device: torch.cuda.is_available() is False here. Run this on a machine with an NVIDIA GPU "
            "and a torch built for CUDA; `--dry-run --out DIR` tries the harness on the CPU.",
            file=sys.stderr,
        )
        return 2
    if args.dry_run and args.out is None:
        print("error: --dry-run writes nothing beside real results; say where with --out DIR.", file=sys.stderr)
        return 2
    if args.part == "all":
        return max(_in_a_process(part, args) for part in PARTS)
    return run_part(args.part, args.out or report.results_directory(), dry=args.dry_run)


def _in_a_process(part: str, args: argparse.Namespace) -> int:
    """A part in a process of its own; one that hangs is ended after its time."""
    command = [sys.executable, "-m", __spec__.name, "--part", part, *["--dry-run"] * args.dry_run]
    command += ["--out", str(args.out)] if args.out else []
    try:
        return abs(subprocess.run(command, timeout=LIMIT + 60).returncode)
    except subprocess.TimeoutExpired:
        print(f"{part}: ended after {LIMIT + 60:.0f} s without a result", file=sys.stderr)
        return 1


def run_part(part: str, directory: Path, *, dry: bool) -> int:
    """Runs one part, writes its file; 1 where something of ours was wrong, failed or missing."""
    begin = time.monotonic()
    end = begin + LIMIT - RESERVE
    day = datetime.datetime.now(datetime.timezone.utc).date().isoformat()
    made: Iterable[Row]
    if part == "tests":
        made = tests(dry)
    elif part == "kernels":
        made = kernels(dry, end)
    else:
        made = (row for module, name in FUNCTIONS[part] for row in _rows_of(module, name, dry, end))
    rows: list[Row] = []
    for row in made:
        rows.append(row)
        # What is measured is kept, whatever becomes of the rest.
        write(part, rows, directory, dry=dry, seconds=time.monotonic() - begin, day=day, complete=False)
        print(f"{row.operation}  {row.shape}  {row.dtype}  " + "  ".join(report.cells(row.as_dict())), flush=True)
    path = write(part, rows, directory, dry=dry, seconds=time.monotonic() - begin, day=day, complete=True)
    print(f"wrote {path}", flush=True)
    bad = [row for row in rows if row.role == "ours" and row.note.startswith(("wrong", "failed", "missing"))]
    return 1 if bad else 0


def write(part: str, rows: list[Row], directory: Path, *, dry: bool, seconds: float, day: str, complete: bool) -> Path:
    """`<device>_torch-<version>_gpu-<part>_<date>.json`; a dry run's name says that it is one. `complete` is false in
    the file of a part that goes on, or was ended."""
    directory.mkdir(parents=True, exist_ok=True)
    device = "cpu" if dry else "cuda"
    result: dict[str, Any] = {
        **report.document(f"gpu {part}", rows, quick=dry, device=device),
        "part": part,
        "seconds": round(seconds, 1),
        "complete": complete,
        "torch_cuda": torch.version.cuda,
    }
    if not dry:
        capability = torch.cuda.get_device_capability()
        result |= {"capability": f"sm_{capability[0]}{capability[1]}", "tiles": _tile_setting()}
    parts = (result["device"], f"torch-{result['torch']}", f"gpu-{part}", day, *["dry-run"] * dry)
    name = "_".join(re.sub(r"[^A-Za-z0-9.+-]+", "-", text).strip("-").lower() for text in parts)
    path = directory / f"{name}.json"
    partial = path.with_suffix(".part")
    partial.write_text(json.dumps(result, indent=1) + "\n")
    return partial.replace(path)


def _tile_setting() -> str:
    return "measured" if os.environ.get("DINO_FAST_AUTOTUNE") == "1" else "the tables' first"


def tests(dry: bool) -> list[Row]:
    """The tests marked `gpu`; a dry run collects them only."""
    if not (ROOT / "tests").is_dir():
        note = "missing: the tests are in a checkout only; run this from one, installed with `pip install -e .`"
        return [Row("tests", "", "", "pytest -m gpu", note=note, role="ours")]
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider", "tests"]
    begin = time.perf_counter()
    try:
        done = subprocess.run(
            [*command, *["--collect-only"] * dry], cwd=ROOT, capture_output=True, text=True, timeout=LIMIT - 10
        )
        text, code = done.stdout, done.returncode
    except subprocess.TimeoutExpired as late:
        text, code = str(late.stdout or ""), -1
    row = Row("tests", "", "", "pytest -m gpu", role="ours")
    row.ms = 1e3 * (time.perf_counter() - begin)
    last = next((line for line in reversed(text.splitlines()) if line.strip()), "no output")
    failed = [line for line in text.splitlines() if line.startswith(("FAILED", "ERROR"))]
    row.note = last.strip("= ") if code == 0 else f"failed (exit code {code}): {last}; " + "; ".join(failed[:20])
    return [row]


def kernels(dry: bool, end: float) -> Iterator[Row]:
    """Comparisons until `end` (of time.monotonic), then a row that says what was not reached."""
    from .gpu_kernels import comparisons, with_rate

    sizes = (harness.COPY_BYTES, dict(harness.MATMUL_SIDE))
    if dry:
        harness.COPY_BYTES, harness.MATMUL_SIDE = 1 << 20, {"cpu": 64, "cuda": 64}
    try:
        yield from map(with_rate, _timed(comparisons(dry), end))
    finally:
        harness.COPY_BYTES, harness.MATMUL_SIDE = sizes


def _timed(makers: Iterable[tuple[str, Callable[[], Comparison]]], end: float) -> Iterator[Row]:
    for name, make in makers:
        if time.monotonic() > end:
            yield Row(name, "", "", "dino-fast", note=harness.NOT_REACHED, role="ours")
            continue
        try:
            yield from harness.compare(make(), allocator="")
        except Exception as error:  # one comparison that cannot be set up must not cost the others
            note = f"failed: {type(error).__name__}: {str(error).splitlines()[0][:200] if str(error) else ''}"
            yield Row(name, "", "", "dino-fast", note=note, role="ours")
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def _rows_of(module: str, name: str, dry: bool, end: float) -> Iterator[Row]:
    """The rows of a benchmark's function for GPUs, which watches `end` (of time.monotonic); where there is none, or it
    fails, a row that says so."""
    label = f"{module.removeprefix('bench_')}.{name}"
    try:
        found = getattr(importlib.import_module(f".{module}", __package__), name)
    except (ImportError, AttributeError) as error:
        yield Row(label, "", "", "dino-fast", note=f"missing: {error}", role="ours")
        return
    if dry:
        yield Row(label, "", "", "dino-fast", note="found; a dry run does not call it", role="ours")
        return
    try:
        yield from found(end=end)
    except Exception as error:
        yield Row(label, "", "", "dino-fast", note=f"failed: {type(error).__name__}: {error}"[:300], role="ours")


if __name__ == "__main__":
    sys.exit(main())
