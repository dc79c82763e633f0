"""What nvcc makes of multi_crop's kernels: registers and spills, held to a committed table; no step fused to another.

`python -m tests.ops.test_multi_crop_cuda_build` writes the table anew for the nvcc at hand."""

from __future__ import annotations

import re

import pytest

from . import ptxas

OPERATION = "multi_crop"
FLAGS = ("--fmad=false",)
# As __launch_bounds__ in multi_crop.cu: threads a block, and blocks that a multiprocessor must hold.
BLOCKS = {"weights": 1, "first": 3, "second": 3, "colour": 4, "blur_rows": 5, "blur_columns": 5}
THREADS = 256
BLUR_BYTES = 2 * 8192


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    if ptxas.nvcc() is None:
        pytest.skip("no nvcc: put CUDA's bin folder on the PATH or set CUDA_HOME")
    return ptxas.compile_all(OPERATION, tmp_path_factory.mktemp("cubin"), FLAGS)


def test_every_kernel_is_in_the_report(compiled):
    assert {"sm_80", "sm_90"} <= set(compiled)
    for kernels in compiled.values():
        assert sorted(kernels) == sorted(BLOCKS)
        assert all(figures["registers"] > 0 for figures in kernels.values())
        assert all((figures["shared_bytes"] >= BLUR_BYTES) == ("blur" in name) for name, figures in kernels.items())


def test_nothing_spills_and_limits_hold(compiled):
    ptxas.assert_nothing_spills(compiled, THREADS, BLOCKS)


def test_no_more_registers_than_in_the_table(compiled):
    known = ptxas.known_figures(OPERATION)
    if known is None:
        pytest.skip(f"the table has nothing of nvcc {ptxas.release()}; spills and limits were checked")
    ptxas.assert_no_more_than_known(OPERATION, compiled, known)


@pytest.mark.skipif(ptxas.nvcc() is None, reason="no nvcc")
def test_every_step_rounds_as_on_the_cpu(tmp_path):
    """In the kernels as built: no fused multiply-add, no flushed denormal, no approximate division or root, and every
    sum and product marked as to be rounded by itself, which forbids the assembler to fuse it."""
    built = (ptxas.ROOT / "csrc/CMakeLists.txt").read_text()
    assert re.search(r"cuda/multi_crop\.cu PROPERTIES COMPILE_OPTIONS --fmad=false", built)

    def operations(*flags: str) -> set[str]:
        ptxas.run_nvcc(OPERATION, tmp_path / "a.ptx", *flags, "-ptx", "-arch=sm_90")
        text = (tmp_path / "a.ptx").read_text()
        return set(re.findall(r"\b((?:add|sub|mul|fma|mad|div|sqrt|rcp|ex2)[a-z.0-9]*\.f(?:32|64))\b", text))

    exact = {f"{name}.rn.f{bits}" for name in ("add", "sub", "mul", "div", "rcp", "sqrt") for bits in (32, 64)}
    found = operations(*FLAGS)
    assert {"div.rn.f32", "sqrt.rn.f64", "mul.rn.f64"} <= found <= exact
    assert any(name.startswith("fma") for name in operations())  # this test sees what the flag prevents


if __name__ == "__main__":
    ptxas.write_table(OPERATION, FLAGS)
