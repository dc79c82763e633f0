"""The processors that a process may use."""

from __future__ import annotations

import os

import pytest

from dino_fast import cpus


@pytest.mark.parametrize(("limit", "expected"), [("max 100000", None), ("150000 100000", 1.5), ("50000 100000", 0.5)])
def test_the_quota_of_a_container(tmp_path, limit, expected):
    (tmp_path / "cpu.max").write_text(limit + "\n")
    assert cpus._quota(tmp_path) == expected


def test_the_quota_of_an_older_kernel(tmp_path):
    assert cpus._quota(tmp_path) is None
    (tmp_path / "cpu").mkdir()
    for name, value in (("quota", 300000), ("period", 100000)):
        (tmp_path / "cpu" / f"cpu.cfs_{name}_us").write_text(f"{value}\n")
    assert cpus._quota(tmp_path) == 3.0


def test_affinity_and_quota_limit(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(8)))
    monkeypatch.setattr(cpus, "_CGROUP", tmp_path)
    assert cpus.usable_cpus() == 8
    (tmp_path / "cpu.max").write_text("250000 100000\n")
    assert cpus.usable_cpus() == 3
    (tmp_path / "cpu.max").write_text("10000 100000\n")
    assert cpus.usable_cpus() == 1
