"""What nvcc makes of the CUDA kernels: registers, spills and shared memory, held to a committed table.

`python -m tests.ops.test_multi_tensor_cuda_build` writes the table anew for the nvcc at hand."""

from __future__ import annotations

import pytest

from . import ptxas

OPERATION = "multi_tensor"
# As __launch_bounds__ in multi_tensor.cu: threads a block, and blocks that a multiprocessor must hold.
BLOCKS = {"ema": 6, "fill_chunks": 1, "norms": 4, "prepare": 1, "update": 3, "upload": 1}
THREADS = 256


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    if ptxas.nvcc() is None:
        pytest.skip("no nvcc: put CUDA's bin folder on the PATH or set CUDA_HOME")
    return ptxas.compile_all(OPERATION, tmp_path_factory.mktemp("cubin"))


def test_every_kernel_is_in_the_report(compiled):
    assert {"sm_80", "sm_90"} <= set(compiled)
    for kernels in compiled.values():
        assert sorted(kernels) == sorted(BLOCKS)
        assert all(figures["registers"] > 0 for figures in kernels.values())
        assert kernels["norms"]["shared_bytes"] >= THREADS * 8  # a double a thread: the report was understood


def test_nothing_spills_and_limits_hold(compiled):
    ptxas.assert_nothing_spills(compiled, THREADS, BLOCKS)


def test_no_more_registers_than_in_the_table(compiled):
    known = ptxas.known_figures(OPERATION)
    if known is None:
        pytest.skip(f"the table has nothing of nvcc {ptxas.release()}; spills and limits were checked")
    ptxas.assert_no_more_than_known(OPERATION, compiled, known)


def test_the_report_of_a_spilling_kernel_is_understood():
    report = (
        "ptxas info    : Compiling entry function '_ZN1219multi_tensor_updateENS_4PlanE' for 'sm_90'\n"
        "ptxas info    : Function properties for _ZN1219multi_tensor_updateENS_4PlanE\n"
        "    152 bytes stack frame, 620 bytes spill stores, 2056 bytes spill loads\n"
        "ptxas info    : Used 64 registers, used 1 barriers, 152 bytes cumulative stack size, 2056 bytes smem\n"
    )
    expected = {"registers": 64, "spill_bytes": 2676, "stack_bytes": 152, "shared_bytes": 2056}
    assert ptxas.parse(report, OPERATION) == {"update": expected}


if __name__ == "__main__":
    ptxas.write_table(OPERATION)
