"""The Triton kernels of packed_attention where there is no GPU: interpreted, and compiled for real chips.

The number of heads and of sequences are run-time numbers to these kernels, so ViT-S, B and L (heads of 64) share a
compile. The table holds every tile that may be taken; the tests repeat those taken for heads of 64 in bf16.
`python -m tests.kernels.test_packed_attention` rewrites the table for the installed Triton.
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

triton = pytest.importorskip("triton")

from tests.kernels.cubin import resources  # noqa: E402

TABLE = Path(__file__).parents[2] / "benchmarks" / "results" / "triton_packed_attention.json"
SHARED_MEMORY = {80: 163 << 10, 90: 227 << 10, 100: 227 << 10}  # bytes a block may use
ELEMENT_SIZE = {"bf16": 2, "fp16": 2, "fp32": 4}
# Longest sequence, and what has it: a crop of 64 pixels in patches of 16, one of 96, one of 224, and one of 518 pixels
# in patches of 14 (all longer than 256 share its tiles).
LENGTHS = (17, 37, 197, 1370)
WIDTHS = {"bf16": (32, 64, 128), "fp16": (64,), "fp32": (32, 64, 128)}  # of a head


class Case(NamedTuple):
    """One compile: a kernel of kernels/packed_attention.py, its constants, warps and stages."""

    kernel: str
    way: str
    dtype: str
    d: int
    arch: int
    constants: dict[str, Any]
    tile: Any
    first: bool  # of the tiles that may be taken

    @property
    def name(self) -> str:
        _, rows, keys, warps, stages = self.tile
        short = self.constants["SHORT"]
        size = f"{short}" if self.way == "short" else f"{short}, {rows}x{keys or rows}"
        return (
            f"{self.kernel[1:]}, {self.way} {size}, {warps} warps, {stages} stages, "
            f"d={self.d}, {self.dtype}, sm_{self.arch}"
        )

    @property
    def repeated(self) -> bool:
        """Whether the tests compile it too."""
        return self.first and self.dtype == "bf16" and self.d == 64 and self.constants["SHORT"] == 64


def test_under_the_interpreter():
    file = Path(__file__).with_name("interpreted_packed_attention.py")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(file)]
    result = subprocess.run(command, env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-4000:]
    assert int(re.search(r"(\d+) passed", result.stdout).group(1)) >= 25


def test_no_spills_and_within_the_chips_limits_in_the_table():
    for version, uses in json.loads(TABLE.read_text()).items():
        for name, use in uses.items():
            check_limits(f"{name}, Triton {version}", int(name.rsplit("sm_", 1)[1]), use)


def test_shared_memory_of_whole_sequences_is_what_the_choice_of_tiles_counts_with():
    """Chips of compute capability 8.6, 8.9 and 12.0 have 99 KiB: what needs more is not taken there."""
    from dino_fast.kernels import packed_attention as kernels

    for uses in json.loads(TABLE.read_text()).values():
        for name, use in uses.items():
            d = int(re.search(r"d=(\d+)", name)[1])
            limit = kernels.WHOLE_SHARED_MEMORY[d] if ", whole " in name else 99 << 10
            assert use["shared"] <= limit, name


def test_compiles_are_those_of_the_table():
    recorded = json.loads(TABLE.read_text()).get(triton.__version__)
    if recorded is not None:
        assert recorded.keys() == {case.name for case in cases()}, "the table is of other kernels: write it again"
    repeated = [case for case in cases() if case.repeated]
    assert len(repeated) == 5 * len(SHARED_MEMORY)  # three ways forward, two backward
    grown = {}
    for case in repeated:
        use = compile_one(case)
        check_limits(case.name, case.arch, use)
        if recorded is not None and use["registers"] > recorded[case.name]["registers"]:
            grown[case.name] = use
    assert not grown, f"more registers than recorded: {grown}"


def check_limits(name: str, arch: int, use: dict[str, int]) -> None:
    assert use["stack"] == 0, f"{name} spills: {use}"
    assert use["shared"] <= SHARED_MEMORY[arch], f"{name}: {use}"


def cases() -> Iterator[Case]:
    """Both kernels for each dtype, width, way and chip, and each tile that may be taken."""
    from dino_fast.kernels import packed_attention as kernels

    seen = set()
    for arch in SHARED_MEMORY:
        for dtype, widths in WIDTHS.items():
            for d in widths:
                for longest in LENGTHS:
                    for kernel in ("_forward", "_backward"):
                        backward = kernel == "_backward"
                        way, found = kernels.tiles(longest, d, ELEMENT_SIZE[dtype], backward=backward)
                        for i, tile in enumerate(found):
                            crops = kernels.CROPS if way == "short" else 1
                            constants = kernels.constants(way, tile, d, crops, backward=backward)
                            case = Case(kernel, way, dtype, d, arch, constants, tile, i == 0)
                            if case.name not in seen:
                                seen.add(case.name)
                                yield case


def compile_one(case: Case) -> dict[str, int]:
    """Registers a thread, bytes of stack, and bytes of shared memory."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from dino_fast.kernels import packed_attention as kernels

    kernel = getattr(kernels, case.kernel)
    kinds = {"maxima": "*fp32", "sums": "*fp32", "ends": "*i32", "scale": "fp32"}
    counts = {"tokens", "n", "H", "blocks"}
    signature = {}
    for name in kernel.arg_names:
        if name in case.constants:
            signature[name] = "constexpr"
        elif name in counts or name.startswith("stride_") or name in ("grad_token", "grad_head"):
            signature[name] = "i32"
        else:
            signature[name] = kinds.get(name, f"*{case.dtype}")
    # Addresses and strides of multiples of 16, as torch's allocations and these widths have.
    aligned = {
        (i,): [["tt.divisibility", 16]]
        for i, name in enumerate(kernel.arg_names)
        if signature[name].startswith("*") or (signature[name] == "i32" and name not in counts)
    }
    source = ASTSource(fn=kernel, signature=signature, constexprs=case.constants, attrs=aligned)
    options = {"num_warps": case.tile.warps, "num_stages": case.tile.stages}
    binary = triton.compile(source, target=GPUTarget("cuda", case.arch, 32), options=options)
    return {**resources(binary.asm["cubin"]), "shared": binary.metadata.shared}


if __name__ == "__main__":
    table = json.loads(TABLE.read_text()) if TABLE.exists() else {}
    uses = table[triton.__version__] = {}
    for case in cases():
        uses[case.name] = compile_one(case)
        print(case.name, uses[case.name], flush=True)
    TABLE.write_text(json.dumps(table, indent=1) + "\n")
    spills = {name: use for name, use in uses.items() if use["stack"]}
    print(f"{len(uses)} compiles with Triton {triton.__version__}; spills: {spills or 'none'}")
