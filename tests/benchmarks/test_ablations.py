"""The page of the ablations says what its result file says, and its commands are ones that the program takes."""

from __future__ import annotations

import argparse
import json

import pytest

from dino_fast.benchmarks import ablations
from dino_fast.engine.config import add_arguments, from_arguments

RESULT = json.loads(ablations.RESULT.read_text())


def test_the_page_is_made_from_the_results():
    assert ablations.main(["--check"]) == 0
    text = ablations.DOCUMENT.read_text()
    changed = json.loads(ablations.RESULT.read_text())
    changed["ablations"]["copy"]["knn"][-1][1] = 0.9
    assert ablations.fill(text, changed) != text
    for group in ablations.DRAWN:
        assert f"ablations-{group}.png" in text and (ablations.DOCUMENT.parent / f"ablations-{group}.png").exists()


@pytest.mark.parametrize("name", ablations.RUNS)
def test_every_command_is_taken(name):
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    config = from_arguments(parser.parse_args(RESULT["ablations"][name]["command"].split()[2:]))
    assert ablations.command(name) == RESULT["ablations"][name]["command"]
    kinds = {"previous-epoch", "previous-step", "copy"}
    kind = name.removesuffix("-long")
    assert config.teacher_update == (kind if kind in kinds else "ema")
    assert config.epochs == (24 if name.endswith("-long") else 8)
    assert config.centering == (name not in ("no-centering", "neither"))
    assert (config.teacher_temp == config.student_temp) == (name in ("no-sharpening", "neither"))


def test_what_the_page_claims():
    runs = RESULT["ablations"]

    def last(name, key):
        return sum(runs[name][key][-5:]) / 5

    accuracy = {name: run["knn"][-1][1] for name, run in runs.items()}
    start = runs["ema"]["knn"][0][1]
    assert max(accuracy["copy"], accuracy["previous-step"]) < start - 0.02
    assert min(accuracy["ema"], accuracy["previous-epoch"]) > start + 0.02
    longer = accuracy["ema-long"], accuracy["previous-epoch-long"]
    assert min(longer) > accuracy["ema"] + 0.02 and abs(longer[0] - longer[1]) < 0.02  # "end level"
    assert max(last("copy", "feature_spread"), last("previous-step", "feature_spread")) < 0.1
    assert last("no-centering", "teacher_entropy") < 0.01 < 6 < last("no-sharpening", "teacher_entropy")
    assert max(last(name, "kl") for name in ("no-centering", "no-sharpening", "neither")) < 0.01 < 1 < last("ema", "kl")


def test_pictures_are_drawn(tmp_path):
    paths = ablations.draw(RESULT, tmp_path)
    assert [path.name for path in paths] == ["ablations-teachers.png", "ablations-targets.png"]
    assert all(path.stat().st_size > 20_000 for path in paths)
