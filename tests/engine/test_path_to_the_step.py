"""How many files lie between the command and the optimizer step: what a reader opens to follow one step."""

from __future__ import annotations

import sys
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

import dino_fast
from dino_fast.cli import main as cli
from dino_fast.optim import AdamWEMA

PACKAGE = Path(dino_fast.__file__).parent


def _file(frame: FrameType) -> str:
    """A frame's file below engine/ or cli/, or nothing."""
    path = Path(frame.f_code.co_filename)
    if not path.is_relative_to(PACKAGE):
        return ""
    relative = path.relative_to(PACKAGE)
    return str(relative) if relative.parts[0] in ("engine", "cli") else ""


def test_six_files_from_the_command_to_the_optimizer_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stacks: list[list[str]] = []  # files of the frames above each optimizer step, outermost first
    steps: list[set[str]] = []  # files that a step enters before its optimizer step
    entered: set[str] = set()
    step = AdamWEMA.step

    def trace(frame: FrameType, event: str, _: Any) -> None:
        if event == "call":
            if frame.f_code.co_name == "train_step":
                entered.clear()
            entered.add(_file(frame))

    def recorded(*given: Any, **options: Any) -> Any:
        names, frame = [], sys._getframe(1)
        while frame is not None:
            names.append(_file(frame))
            frame = frame.f_back  # type: ignore[assignment]
        stacks.append([name for name in dict.fromkeys(reversed(names)) if name])
        steps.append(entered - {""})
        return step(*given, **options)

    monkeypatch.setattr(AdamWEMA, "step", recorded)
    words = ["train", "--out", str(tmp_path / "run"), "--max-steps", "2", "--knn-every", "0", "--device", "cpu"]
    sys.setprofile(trace)
    try:
        assert cli.main(words) == 0
    finally:
        sys.setprofile(None)
    assert len(stacks) == 2
    for names, inside in zip(stacks, steps, strict=True):
        assert names == ["cli/main.py", "cli/train.py", "engine/trainer.py", "engine/train_step.py"]
        assert len({*names, *inside}) <= 6, sorted({*names, *inside})
        assert {"engine/train_step.py", "engine/train_state.py"} <= inside
