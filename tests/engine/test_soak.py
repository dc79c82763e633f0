from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
def test_five_rounds_of_breaking_and_continuing(tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "tests.engine.soak",
        "--rounds",
        "5",
        "--seed",
        "3",
        "--log",
        str(tmp_path / "log"),
    ]
    result = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, result.stdout + result.stderr
    lines = (tmp_path / "log").read_text().splitlines()
    assert (
        sum("equal to the undisturbed run" in line and "round" in line for line in lines) == 5 and "passed" in lines[-1]
    )
