"""What the kernels' own host code compiles and launches fits chips of each kind."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")


@pytest.mark.parametrize("arch", [80, 86, 120])
def test_launches_fit_the_chip(arch: int) -> None:
    script = Path(__file__).with_name("recorded_launches.py")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, str(script)], env=environment | {"ARCH": str(arch)}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout)
    assert found["launches"] == 6
    assert found["uses"].keys() == {"_statistics", "_merge", "_gradient", "_forward", "_backward", "_backward_of_keys"}
    for name, uses in found["uses"].items():
        for use in uses:
            assert use["shared"] <= found["limit"], (name, use)
