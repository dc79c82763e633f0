"""The public workflows: they name files that exist, and test what pyproject.toml promises."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[1]
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
PROJECT = (ROOT / "pyproject.toml").read_text()


def _read(file: Path) -> dict[str, Any]:
    return yaml.safe_load(file.read_text())


@pytest.mark.parametrize("file", WORKFLOWS, ids=lambda file: file.name)
def test_what_jobs_run_and_use_is_here(file: Path) -> None:
    jobs = _read(file)["jobs"]
    for job in jobs.values():
        assert set([job.get("needs", [])] if isinstance(job.get("needs"), str) else job.get("needs", [])) <= jobs.keys()
        steps = job.get("steps", [])
        for used in [job.get("uses", ""), *(step.get("uses", "") for step in steps)]:
            assert not used.startswith("./") or (ROOT / used).is_file(), used
        for command in (step["run"] for step in steps if "run" in step):
            script = command.split()[0]
            assert "/" not in script or os.access(ROOT / script, os.X_OK), f"{command}: no such program"
            for extra in re.findall(r"-e '\.\[(\w+)\]'", command):
                assert re.search(rf"^{extra} = \[", PROJECT, re.M), f"{command}: no extra '{extra}'"


def test_the_matrix_is_what_pyproject_promises() -> None:
    matrix = _read(ROOT / ".github" / "workflows" / "ci.yml")["jobs"]["test"]["strategy"]["matrix"]
    assert matrix["python"] == re.findall(r'"Programming Language :: Python :: (3\.\d+)"', PROJECT)
    lowest = {name: re.search(rf'"{name}>=([\d.]+)"', PROJECT)[1] for name in ("torch", "torchvision")}
    assert matrix["torch"] == [" ".join(f"{name}=={of}.*" for name, of in lowest.items()), "torch torchvision"]
    wheels = re.search(r"^build = \"(.*)\"", PROJECT, re.M)[1]
    assert wheels.split() == [f"cp{version.replace('.', '')}-*" for version in matrix["python"]]


def test_the_gate_tests_the_lowest_torch() -> None:
    gate = (ROOT / ".ci" / "run").read_text()
    for name in ("torch", "torchvision"):
        assert f'"{name}=={re.search(rf"{name}>=([0-9.]+)", PROJECT)[1]}.*"' in gate
    assert os.access(ROOT / ".ci" / "worlds", os.X_OK)


def test_issue_forms_ask_for_info() -> None:
    forms = {file.stem: _read(file) for file in (ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml")}
    assert forms.keys() == {"bug", "feature", "config"}
    for name in ("bug", "feature"):
        form = forms[name]
        assert form["name"] and form["description"]
        assert any(part.get("validations", {}).get("required") for part in form["body"])
        assert len({part["id"] for part in form["body"]}) == len(form["body"])
    assert any("dino-fast info" in part["attributes"]["label"] for part in forms["bug"]["body"])


def test_the_citation_is_of_this_version() -> None:
    citation = _read(ROOT / "CITATION.cff")
    assert {"cff-version", "message", "title", "authors", "license"} <= citation.keys()
    assert f'version = "{citation["version"]}"' in PROJECT and f'license = "{citation["license"]}"' in PROJECT
