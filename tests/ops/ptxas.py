"""What nvcc makes of a CUDA file: registers, spills and shared memory of its kernels."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).parents[2]
ARCHITECTURES = ("sm_80", "sm_90", "sm_100")
REGISTERS_OF_MULTIPROCESSOR = 65536
STATIC_SHARED_LIMIT = 48 * 1024
Kernels = dict[str, dict[str, int]]


def nvcc() -> str | None:
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    return shutil.which("nvcc") or shutil.which(f"{home}/bin/nvcc")


def release() -> str:
    text = subprocess.run([str(nvcc()), "--version"], check=True, capture_output=True, text=True).stdout
    return re.search(r"release ([0-9.]+)", text)[1]  # type: ignore[index]


def architectures() -> list[str]:
    listed = subprocess.run([str(nvcc()), "--list-gpu-code"], check=True, capture_output=True, text=True).stdout.split()
    return [arch for arch in ARCHITECTURES if arch in listed]


def run_nvcc(operation: str, target: Path, *flags: str) -> str:
    """Compiles csrc/cuda/<operation>.cu with the flags of csrc/CMakeLists.txt and these; returns what nvcc says."""
    command = [str(nvcc()), "-std=c++17", "-O3", "-lineinfo", *flags, f"-I{ROOT / 'csrc'}"]
    command += [str(ROOT / f"csrc/cuda/{operation}.cu"), "-o", str(target)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stderr


def parse(report: str, operation: str) -> Kernels:
    """{kernel: {registers, spill_bytes, stack_bytes, shared_bytes}} of ptxas -v's text."""
    found: Kernels = {}
    for part in report.split("Compiling entry function '")[1:]:
        name = re.search(rf"{operation}_([a-z_]+)E", part.split("'")[0])[1]  # type: ignore[index]
        number = lambda pattern, part=part: sum(map(int, re.findall(pattern, part)))  # noqa: E731
        found[name] = {
            "registers": number(r"Used (\d+) registers"),
            "spill_bytes": number(r"(\d+) bytes spill"),
            "stack_bytes": number(r"(\d+) bytes stack frame"),
            "shared_bytes": number(r"(\d+) bytes smem"),
        }
    return found


def compile_all(operation: str, folder: Path, flags: Sequence[str] = ()) -> dict[str, Kernels]:
    """The figures for each architecture that the nvcc at hand knows."""

    def one(arch: str) -> Kernels:
        said = run_nvcc(operation, folder / f"{arch}.cubin", *flags, "-cubin", f"-arch={arch}", "-Xptxas", "-v")
        return parse(said, operation)

    names = architectures()
    with ThreadPoolExecutor() as pool:
        return dict(zip(names, pool.map(one, names), strict=True))


def assert_nothing_spills(compiled: dict[str, Kernels], threads: int, blocks: dict[str, int]) -> None:
    """No spills, no stack, and registers for as many blocks a multiprocessor as `blocks` says."""
    for arch, kernels in compiled.items():
        for name, figures in kernels.items():
            assert figures["spill_bytes"] == 0 and figures["stack_bytes"] == 0, (arch, name, figures)
            assert figures["shared_bytes"] <= STATIC_SHARED_LIMIT, (arch, name, figures)
            # Registers are given to a warp in units of 8 a thread.
            given = -(-figures["registers"] // 8) * 8
            assert given * threads * blocks[name] <= REGISTERS_OF_MULTIPROCESSOR, (arch, name, figures)


def table_of(operation: str) -> Path:
    return ROOT / f"benchmarks/results/ptxas_{operation}.json"


def known_figures(operation: str) -> dict[str, Kernels] | None:
    """The committed table's part for this release of nvcc."""
    return json.loads(table_of(operation).read_text()).get(release())


def assert_no_more_than_known(operation: str, compiled: dict[str, Kernels], known: dict[str, Kernels]) -> None:
    for arch, kernels in compiled.items():
        for name, figures in kernels.items():
            for what in ("registers", "shared_bytes"):
                assert figures[what] <= known[arch][name][what], (
                    f"{name} on {arch} has {figures[what]} {what}, the table {known[arch][name][what]}; if meant, "
                    f"write the table anew: python -m tests.ops.test_{operation}_cuda_build"
                )


def write_table(operation: str, flags: Sequence[str] = ()) -> None:
    """Writes the table anew for the nvcc at hand."""
    path = table_of(operation)
    table = json.loads(path.read_text()) if path.exists() else {}
    with tempfile.TemporaryDirectory() as folder:
        table[release()] = compile_all(operation, Path(folder), flags)
    path.write_text(json.dumps(table, indent=1, sort_keys=True) + "\n")
    sys.stdout.write(path.read_text())
