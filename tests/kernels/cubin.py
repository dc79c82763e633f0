"""What a compiled kernel needs of a multiprocessor, read from its cubin by the cuobjdump that comes with Triton.

Triton's own metadata has the shared memory; registers and spills it learns from a driver that loads the kernel, which
needs a GPU. The package cuxray runs the same cuobjdump, downloaded at first use.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from pathlib import Path

import triton


def resources(cubin: bytes) -> dict[str, int]:
    """Registers and stack bytes of a thread."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    registers, stack = re.search(r"REG:(\d+)", text), re.search(r"STACK:(\d+)", text)
    assert registers and stack, text
    return {"registers": int(registers[1]), "stack": int(stack[1])}
