"""The programs of docs/embed.md, as they stand there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import dino_fast
from dino_fast.cli import main as cli

PAGE = (Path(__file__).parents[1] / "docs" / "embed.md").read_text(encoding="utf-8")


def test_the_features_of_the_demo_are_clustered_and_searched(tmp_path: Path, monkeypatch, capsys) -> None:
    pytest.importorskip("sklearn")
    monkeypatch.chdir(tmp_path)
    dino_fast.train(data="demo", out="runs/photos", max_steps=2, knn_every=0, device="cpu", batch_size=64)
    command = next(line.strip() for line in PAGE.splitlines() if line.strip().startswith("dino-fast embed"))
    words = command.replace("--data photos/", "--data demo").split()[1:]
    assert cli.main([*words, "--device", "cpu"]) == 0
    program = next(text for text in re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL) if "KMeans" in text)
    capsys.readouterr()
    names: dict = {}
    exec(compile(program, "docs/embed.md", "exec"), names)
    output = capsys.readouterr().out.splitlines()
    assert len(output) == 11 and "is most like" in output[-1]
    assert len(names["features"]) == 6000 and names["neighbor"][0, 0] == 0 and names["distance"][0, 0] < 1e-6
