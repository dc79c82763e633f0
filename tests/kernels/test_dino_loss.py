"""The Triton kernels of dino_loss where there is no GPU: run by Triton's interpreter, and compiled for real chips.

`python -m tests.kernels.test_dino_loss` rewrites the table of registers for the installed Triton.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

triton = pytest.importorskip("triton")

from tests.kernels.cubin import resources  # noqa: E402

TABLE = Path(__file__).parents[2] / "benchmarks" / "results" / "triton_dino_loss.json"
SHARED_MEMORY = {80: 163 << 10, 90: 227 << 10, 100: 227 << 10}  # bytes a block may use
SHAPES = {"2+8 crops": 16, "2 crops": 2}  # rows of a tile: the next power of two


def test_under_the_interpreter():
    file = Path(__file__).with_name("interpreted_dino_loss.py")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(file)]
    result = subprocess.run(command, env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-4000:]
    assert int(re.search(r"(\d+) passed", result.stdout).group(1)) >= 20


@pytest.fixture(scope="module")
def compiled():
    return compile_all()


def test_no_spills_and_within_the_chips_limits(compiled):
    for name, use in compiled.items():
        arch = int(name.rsplit("sm_", 1)[1])
        assert use["stack"] == 0, f"{name} spills: {use}"
        assert use["registers"] <= 255, name
        assert use["shared"] <= SHARED_MEMORY[arch], name


def test_registers_are_those_of_the_table(compiled):
    table = json.loads(TABLE.read_text())
    if triton.__version__ not in table:
        pytest.skip(f"the table holds Triton {', '.join(table)}; this is {triton.__version__}. Spills were checked")
    recorded = table[triton.__version__]
    assert recorded.keys() == compiled.keys()
    grown = {name: use for name, use in compiled.items() if use["registers"] > recorded[name]["registers"]}
    assert not grown, f"more registers than recorded: {grown}"


def compile_all() -> dict[str, dict[str, int]]:
    """Registers, stack and shared memory of every kernel, for bf16 and float32 logits and each chip."""
    from dino_fast.kernels import dino_loss as kernels

    found = {}
    for arch in SHARED_MEMORY:
        for dtype in ("bf16", "fp32"):
            for shape, rows in SHAPES.items():
                tile = {"ROWS": rows, "BLOCK_K": kernels.BLOCK_K}
                for name, kernel, constants, warps in (
                    ("statistics", kernels._statistics, tile, kernels.WARPS),
                    ("merge", kernels._merge, {"ROWS": rows}, 1),
                    ("gradient", kernels._gradient, tile | {"WRITE_GRADIENT": True}, kernels.WARPS),
                    ("mean", kernels._gradient, tile | {"WRITE_GRADIENT": False}, kernels.WARPS),
                ):
                    label = f"{name}, {shape}, {dtype}, sm_{arch}"
                    found[label] = compile_one(kernel, dtype, constants, {"num_warps": warps}, arch)
    return found


def compile_one(kernel, dtype: str, constants: dict, options: dict, arch: int) -> dict[str, int]:
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kinds = {"student": f"*{dtype}", "teacher": f"*{dtype}", "grad": f"*{dtype}"}
    numbers = {"inverse_student_temp", "inverse_teacher_temp", "factor", "log2_student", "log2_teacher"}
    integers = {"student_v", "student_b", "teacher_t", "teacher_b", "grad_v", "grad_b", "B", "V", "K", "images"}
    integers |= {"slices", "slice_k"}
    signature = {}
    for name in kernel.arg_names:
        if name in constants:
            signature[name] = "constexpr"
        elif name in numbers:
            signature[name] = "fp32"
        else:
            signature[name] = "i32" if name in integers else kinds.get(name, "*fp32")
    # Addresses and row strides of multiples of 16, as torch's allocations have: this is what vectorises the accesses.
    aligned = {
        (i,): [["tt.divisibility", 16]]
        for i, name in enumerate(kernel.arg_names)
        if signature[name].startswith("*") or name in integers - {"B", "V", "images", "slices"}
    }
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=aligned)
    binary = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    return {**resources(binary.asm["cubin"]), "shared": binary.metadata.shared}


if __name__ == "__main__":
    table = json.loads(TABLE.read_text()) if TABLE.exists() else {}
    table[triton.__version__] = compile_all()
    TABLE.write_text(json.dumps(table, indent=1) + "\n")
    print(TABLE.read_text())
