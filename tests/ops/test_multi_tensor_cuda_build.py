"""What nvcc makes of the CUDA kernels: registers, spills and shared memory, held to a committed table.

`python -m tests.ops.test_multi_tensor_cuda_build` writes the table anew for the nvcc at hand."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TABLE = ROOT / "benchmarks/results/ptxas_multi_tensor.json"
ARCHITECTURES = ("sm_80", "sm_90", "sm_100")
KERNELS = ("ema", "fill_chunks", "norms", "prepare", "update", "upload")
# As __launch_bounds__ in multi_tensor.cu: threads a block, and blocks that a multiprocessor must hold.
BLOCKS = {"ema": 6, "fill_chunks": 1, "norms": 4, "prepare": 1, "update": 3, "upload": 1}
THREADS = 256
REGISTERS_OF_MULTIPROCESSOR = 65536
STATIC_SHARED_LIMIT = 48 * 1024


def nvcc() -> str | None:
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    return shutil.which("nvcc") or shutil.which(f"{home}/bin/nvcc")


def release() -> str:
    text = subprocess.run([str(nvcc()), "--version"], check=True, capture_output=True, text=True).stdout
    return re.search(r"release ([0-9.]+)", text)[1]  # type: ignore[index]


def architectures() -> list[str]:
    listed = subprocess.run([str(nvcc()), "--list-gpu-code"], check=True, capture_output=True, text=True).stdout.split()
    return [arch for arch in ARCHITECTURES if arch in listed]


def compile_for(arch: str, folder: Path) -> dict[str, dict[str, int]]:
    source, target = ROOT / "csrc/cuda/multi_tensor.cu", folder / f"{arch}.cubin"
    # The flags of csrc/CMakeLists.txt.
    command = [str(nvcc()), "-std=c++17", "-O3", "-lineinfo", "-cubin", f"-arch={arch}", "-Xptxas", "-v"]
    done = subprocess.run(
        [*command, f"-I{ROOT / 'csrc'}", str(source), "-o", str(target)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return parse(done.stderr)


def parse(report: str) -> dict[str, dict[str, int]]:
    """{kernel: {registers, spill_bytes, stack_bytes, shared_bytes}} of ptxas -v's text."""
    found: dict[str, dict[str, int]] = {}
    for part in report.split("Compiling entry function '")[1:]:
        name = re.search(r"multi_tensor_(" + "|".join(KERNELS) + r")E", part.split("'")[0])[1]  # type: ignore[index]
        number = lambda pattern, part=part: sum(map(int, re.findall(pattern, part)))  # noqa: E731
        found[name] = {
            "registers": number(r"Used (\d+) registers"),
            "spill_bytes": number(r"(\d+) bytes spill"),
            "stack_bytes": number(r"(\d+) bytes stack frame"),
            "shared_bytes": number(r"(\d+) bytes smem"),
        }
    return found


def compile_all(folder: Path) -> dict[str, dict[str, dict[str, int]]]:
    names = architectures()
    with ThreadPoolExecutor() as pool:
        return dict(zip(names, pool.map(lambda arch: compile_for(arch, folder), names), strict=True))


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    if nvcc() is None:
        pytest.skip("no nvcc: put CUDA's bin folder on the PATH or set CUDA_HOME")
    return compile_all(tmp_path_factory.mktemp("cubin"))


def test_every_kernel_is_in_the_report(compiled):
    assert {"sm_80", "sm_90"} <= set(compiled)
    for kernels in compiled.values():
        assert sorted(kernels) == sorted(KERNELS)
        assert all(figures["registers"] > 0 for figures in kernels.values())
        assert kernels["norms"]["shared_bytes"] >= THREADS * 8  # a double a thread: the report was understood


def test_nothing_spills_and_limits_hold(compiled):
    for arch, kernels in compiled.items():
        for name, figures in kernels.items():
            assert figures["spill_bytes"] == 0 and figures["stack_bytes"] == 0, (arch, name, figures)
            assert figures["shared_bytes"] <= STATIC_SHARED_LIMIT, (arch, name, figures)
            # Registers are given to a warp in units of 8 a thread.
            given = -(-figures["registers"] // 8) * 8
            assert given * THREADS * BLOCKS[name] <= REGISTERS_OF_MULTIPROCESSOR, (arch, name, figures)


def test_no_more_registers_than_in_the_table(compiled):
    table = json.loads(TABLE.read_text())
    known = table.get(release())
    if known is None:
        pytest.skip(f"the table has nvcc {', '.join(table)}, not {release()}; spills and limits were checked")
    for arch, kernels in compiled.items():
        for name, figures in kernels.items():
            for what in ("registers", "shared_bytes"):
                assert figures[what] <= known[arch][name][what], (
                    f"{name} on {arch} has {figures[what]} {what}, the table {known[arch][name][what]}; if meant, "
                    f"write the table anew: python -m tests.ops.test_multi_tensor_cuda_build"
                )


def test_the_report_of_a_spilling_kernel_is_understood():
    report = (
        "ptxas info    : Compiling entry function '_ZN1219multi_tensor_updateENS_4PlanE' for 'sm_90'\n"
        "ptxas info    : Function properties for _ZN1219multi_tensor_updateENS_4PlanE\n"
        "    152 bytes stack frame, 620 bytes spill stores, 2056 bytes spill loads\n"
        "ptxas info    : Used 64 registers, used 1 barriers, 152 bytes cumulative stack size, 2056 bytes smem\n"
    )
    expected = {"registers": 64, "spill_bytes": 2676, "stack_bytes": 152, "shared_bytes": 2056}
    assert parse(report) == {"update": expected}


if __name__ == "__main__":
    import tempfile

    table = json.loads(TABLE.read_text()) if TABLE.exists() else {}
    with tempfile.TemporaryDirectory() as folder:
        table[release()] = compile_all(Path(folder))
    TABLE.parent.mkdir(parents=True, exist_ok=True)
    TABLE.write_text(json.dumps(table, indent=1, sort_keys=True) + "\n")
    sys.stdout.write(TABLE.read_text())
