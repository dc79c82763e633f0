from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from dino_fast.cli import main as cli
from dino_fast.report import compare as runs


def make(path: Path, lr: float, knn: list[float], finished: bool = True) -> Path:
    path.mkdir(parents=True)
    (path / "config.yaml").write_text(
        yaml.safe_dump({"arch": "vit_small", "patch_size": 16, "data": "x/photos", "lr": lr})
    )
    lines = [
        {"step": i, "epoch": 0, "loss": 9.0 - i, "teacher_entropy": 5.0, "knn": value, "images_per_second": 100.0 + i}
        for i, value in enumerate(knn)
    ]
    (path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (path / "export").mkdir()
    if finished:
        (path / "export" / "teacher.safetensors").write_bytes(b"x")
    return path


def test_runs_are_listed_compared_and_drawn(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make(tmp_path / "runs" / "a", 0.1, [0.2, 0.6, 0.5])
    make(tmp_path / "runs" / "b", 0.3, [0.3], finished=False)
    assert cli.main(["runs", str(tmp_path / "runs"), "--plot", str(tmp_path / "curves.png")]) == 0
    shown = capsys.readouterr().out
    assert "60.0%" in shown and "50.0%" in shown and "not finished" in shown
    assert "lr: 0.1, 0.3" in shown and "patch_size:" not in shown
    assert (tmp_path / "curves.png").read_bytes()[:4] == b"\x89PNG"
    assert cli.main(["runs", str(tmp_path / "runs" / "a"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {
        "run": str(tmp_path / "runs" / "a"), "finished": True, "steps": 3, "epoch": 0, "loss": 7.0,
        "teacher_entropy": 5.0, "knn": 0.5, "best_knn": 0.6, "images_per_second": 101.0,
    }  # fmt: skip


def test_a_folder_without_runs_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["runs", str(tmp_path)]) == 2
    assert "a run has a config.yaml" in capsys.readouterr().err
    assert cli.main(["runs", str(tmp_path / "absent")]) == 2
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "config.yaml").write_text("{")
    assert cli.main(["runs", str(tmp_path)]) == 2
    (tmp_path / "a" / "config.yaml").write_text("arch: vit_small")
    assert [run.steps for run in runs.find([tmp_path])] == [0]
