"""The Triton kernels of linear_dino_loss where there is no GPU: interpreted, and compiled for real chips.

K is a run-time number to these kernels, so what is compiled here serves 65,536 and 262,144 alike. The table holds every
compile; the tests repeat the costliest of them. `python -m tests.kernels.test_linear_dino_loss` rewrites the table for
the installed Triton.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

triton = pytest.importorskip("triton")

from tests.kernels.cubin import resources  # noqa: E402

TABLE = Path(__file__).parents[2] / "benchmarks" / "results" / "triton_linear_dino_loss.json"
SHARED_MEMORY = {80: 163 << 10, 90: 227 << 10, 100: 227 << 10}  # bytes a block may use
# What is compiled: the types of rows and weights, and the widths that they are taken with.
DTYPES = {
    "bf16": ("bf16", "bf16", (256, 384)),
    "fp16": ("fp16", "fp16", (256, 384)),
    "fp32": ("fp32", "fp32", (256,)),
    "bf16 rows, fp32 weights": ("bf16", "fp32", (256, 384)),
    "fp32 rows, bf16 weights": ("fp32", "bf16", (256,)),
}
OF_TORCH = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
PROBLEMS = {"2+8 crops": (10, 2), "rows alone": (1, 1)}  # V, T: with a product that pairs rows, and without
FLOATS = {"inverse_temp", "inverse_student_temp", "inverse_teacher_temp", "log2_student", "log2_teacher"}
COUNTS = {"V", "T", "B", "images", "rows", "teachers", "slices", "student_rows", "teacher_rows", "teacher_blocks"}
STRIDES = {"K", "D", "student_k", "teacher_k", "weight_k", "slice_k"}
OF_ROWS = {"student", "teacher", "sums"}
OF_WEIGHTS = {"weight", "student_weight", "teacher_weight", "grad"}


class Case(NamedTuple):
    """One compile: a kernel of kernels/linear_dino_loss.py (where `half`, of linear_dino_loss_half.py), its constants,
    and what is said of it in the table."""

    kernel: str
    constants: dict[str, Any]
    problem: str
    dtype: str
    D: int
    arch: int
    first: bool = True  # of the tiles that may be taken
    half: bool = False

    @property
    def name(self) -> str:
        return f"{self.problem}, D={self.D}, {self.dtype}, sm_{self.arch}"

    @property
    def repeated(self) -> bool:
        """Whether the tests compile it too: the tiles taken for 2+8 crops in bf16 on all chips, others on one."""
        if "2+8 crops" in self.problem and (self.dtype, self.D) == ("bf16", 256):
            return self.first and (self.half or self.arch == 80)
        if self.half:
            return self.first and (self.dtype, self.D, self.arch) == ("bf16", 256, 90)
        if self.arch != 80 or not self.first or "without reads" in self.problem:
            return False
        return self.dtype == "bf16" or (self.dtype == "fp32" and "2+8 crops" in self.problem)


@pytest.mark.parametrize(("name", "least"), [("linear_dino_loss", 25), ("linear_dino_loss_half", 25)])
def test_under_the_interpreter(name, least):
    file = Path(__file__).with_name(f"interpreted_{name}.py")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(file)]
    result = subprocess.run(command, env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-4000:]
    assert int(re.search(r"(\d+) passed", result.stdout).group(1)) >= least


def test_no_spills_and_within_the_chips_limits_in_the_table():
    for version, uses in json.loads(TABLE.read_text()).items():
        for name, use in uses.items():
            check_limits(f"{name}, Triton {version}", int(name.rsplit("sm_", 1)[1]), use)


def test_compiles_are_those_of_the_table():
    table = json.loads(TABLE.read_text())
    recorded = table.get(triton.__version__)
    if recorded is not None:
        assert recorded.keys() == {case.name for case in cases()}, "the table is of other kernels: write it again"
    grown = {}
    for case in cases():
        if case.repeated:
            use = compile_one(case)
            check_limits(case.name, case.arch, use)
            if recorded is not None and use["registers"] > recorded[case.name]["registers"]:
                grown[case.name] = use
    assert not grown, f"more registers than recorded: {grown}"


def check_limits(name: str, arch: int, use: dict[str, int]) -> None:
    assert use["stack"] == 0, f"{name} spills: {use}"
    assert use["shared"] <= SHARED_MEMORY[arch], f"{name}: {use}"


def cases() -> Iterator[Case]:
    """Every kernel with weight norm, for each dtype, width and chip, and each tile that may be taken."""
    from dino_fast.kernels import linear_dino_loss as kernels

    for arch in SHARED_MEMORY:
        for dtype, (rows, weights, widths) in DTYPES.items():
            for D in widths:
                width = kernels.width(D)
                columns = {"BLOCK_K": kernels.COLUMNS, "WIDTH": width, "SCALED": True, "MEAN": True}
                yield Case("_columns", columns, "columns", dtype, D, arch)
                for reads, name in ((True, "merge"), (False, "merge without reads")):
                    yield Case("_merge", {"WIDTH": width, "READ": reads}, name, dtype, D, arch)
                for kernel, label, constants, first in _passes(rows, weights, D):
                    yield Case(kernel, constants, label, dtype, D, arch, first)
        for dtype, D in (("bf16", 256), ("bf16", 200), ("fp16", 256)):
            for kernel, label, constants, first in _half_passes(arch, OF_TORCH[dtype], D):
                yield Case(kernel, constants, label, dtype, D, arch, first, True)


def _passes(rows: str, weights: str, D: int) -> Iterator[tuple[str, str, dict[str, Any], bool]]:
    """(kernel, name, constants, whether it is the first tile) of the two passes, for both kinds of pairs."""
    from dino_fast.kernels import linear_dino_loss as kernels

    passes = (
        ("_attend", "attend", kernels.ATTEND_TILES, {"READ": True}),
        ("_attend", "attend without reads", kernels.LOSS_TILES, {"READ": False}),
        ("_weigh", "weigh", kernels.WEIGH_TILES, {}),
    )
    for problem, (V, T) in PROBLEMS.items():
        for kernel, label, table, options in passes:
            for i, tile in enumerate(kernels.tiles(table, OF_TORCH[rows], OF_TORCH[weights], D)):
                constants = kernels.constants(tile, V, T, D, OF_TORCH[rows])[1] | options
                constants |= {"SCALED": True, "TEACHER_SCALED": True}
                yield kernel, f"{label}, {problem}, {tile.rows}x{tile.prototypes}", constants, i == 0


def _half_passes(arch: int, dtype: torch.dtype, D: int) -> Iterator[tuple[str, str, dict[str, Any], bool]]:
    """The same of the kernels whose rows and weights are both of 16 bits."""
    from dino_fast.kernels import linear_dino_loss_half as half

    chip = divmod(arch, 10)
    scaled = {"SCALED": True, "TEACHER_SCALED": True}
    for reads in (True, False):
        for i, tile in enumerate(half.ATTEND_TILES[chip]):
            label = f"16-bit attend{'' if reads else ' without reads'}, {tile.rows}x{tile.prototypes}"
            yield "_attend", label, half.constants(tile, D, dtype, "attend") | scaled | {"READ": reads}, i == 0
        finish = {"SLICES": 32, "WIDTH": half.WIDTH, "READ": reads}
        yield "_finish", f"16-bit merge{'' if reads else ' without reads'}", finish, True
    for aligned, table, problem in ((False, half.WEIGH_TILES, "2+8 crops"), (True, half.ALIGNED_TILES, "rows alone")):
        for i, tile in enumerate(table[chip]):
            label = f"16-bit weigh, {problem}, {tile.rows}x{tile.prototypes}"
            yield "_weigh", label, half.constants(tile, D, dtype, "weigh") | scaled | {"ALIGNED": aligned}, i == 0


def compile_one(case: Case) -> dict[str, int]:
    """Registers a thread, bytes of stack, and bytes of shared memory."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from dino_fast.kernels import linear_dino_loss, linear_dino_loss_half

    kernels = linear_dino_loss_half if case.half else linear_dino_loss
    kernel, (rows, weights, _) = getattr(kernels, case.kernel), DTYPES[case.dtype]
    options = {name: case.constants.get(name, default) for name, default in (("num_warps", 4), ("num_stages", 3))}
    constants = {name: value for name, value in case.constants.items() if name in kernel.arg_names}
    signature = {}
    for name in kernel.arg_names:
        if name in constants:
            signature[name] = "constexpr"
        elif name in FLOATS:
            signature[name] = "fp32"
        elif name in COUNTS | STRIDES:
            signature[name] = "i32"
        else:
            signature[name] = f"*{rows}" if name in OF_ROWS else f"*{weights}" if name in OF_WEIGHTS else "*fp32"
    # Addresses and strides of multiples of 16, as torch's allocations and these widths have.
    aligned = {
        (i,): [["tt.divisibility", 16]]
        for i, name in enumerate(kernel.arg_names)
        if signature[name].startswith("*") or (name in STRIDES and signature[name] == "i32")
    }
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=aligned)
    binary = triton.compile(source, target=GPUTarget("cuda", case.arch, 32), options=options)
    use = {**resources(binary.asm["cubin"]), "shared": binary.metadata.shared}
    if case.half and case.arch == 90 and case.kernel != "_finish":
        # Hopper's own matrix instruction for every product, and none of the slower one
        ptx = binary.asm["ptx"]
        use |= {"wgmma": ptx.count("wgmma.mma_async"), "mma": ptx.count("mma.sync")}
        assert use["wgmma"] > 0 and use["mma"] == 0, f"{case.name}: {use}"
    return use


if __name__ == "__main__":
    table = json.loads(TABLE.read_text()) if TABLE.exists() else {}
    table[triton.__version__] = {case.name: compile_one(case) for case in cases()}
    TABLE.write_text(json.dumps(table, indent=1) + "\n")
    spills = {name: use for name, use in table[triton.__version__].items() if use["stack"]}
    print(f"{len(table[triton.__version__])} compiles with Triton {triton.__version__}; spills: {spills or 'none'}")
