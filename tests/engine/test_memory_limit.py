from __future__ import annotations

from pathlib import Path

import pytest
import torch

from dino_fast.engine import estimate, train
from dino_fast.engine import trainer as loop
from dino_fast.engine.config import build_config
from dino_fast.engine.memory_limit import explained_out_of_memory, memory_limit
from dino_fast.errors import UserError


@pytest.mark.parametrize(
    ("name", "text", "limit"),
    [
        ("memory.max", "1000000", 1_000_000),
        ("memory.max", "max", 6000 * 1024),
        ("memory/memory.limit_in_bytes", "2000000", 2_000_000),
        ("memory/memory.limit_in_bytes", str(2**63 - 4096), 6000 * 1024),
    ],
)
def test_the_limit_is_the_least_of_machine_and_container(tmp_path: Path, name: str, text: str, limit: int) -> None:
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc/meminfo").write_text("MemTotal:  5000 kB\nMemFree:  1 kB\nSwapTotal:  1000 kB\n")
    file = tmp_path / "sys/fs/cgroup" / name
    file.parent.mkdir(parents=True)
    file.write_text(text)
    assert memory_limit(tmp_path) == limit


def test_a_run_that_cannot_fit_is_refused_before_it_starts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop, "memory_limit", lambda: 10_000_000)
    out = tmp_path / "run"
    with pytest.raises(UserError, match=r"allows 0\.0 GB.*--batch-size.*--grad-accum-steps"):
        train(build_config({"device": "cpu", "out": str(out)}))
    assert not out.exists()


@pytest.mark.parametrize(
    "error", [MemoryError(), torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("bad_alloc")]
)
def test_out_of_memory_says_what_to_change(error: Exception) -> None:
    with pytest.raises(UserError, match=r"out of memory.*--batch-size.*--grad-accum-steps"), explained_out_of_memory():
        raise error


def test_pytorchs_own_words_for_it_on_a_cpu_are_known() -> None:
    with pytest.raises(UserError, match="out of memory"), explained_out_of_memory():
        torch.empty(2**50, dtype=torch.uint8, device="cpu")


def test_other_errors_stay() -> None:
    with pytest.raises(RuntimeError, match="shapes"), explained_out_of_memory():
        raise RuntimeError("shapes differ")


def test_a_dry_run_of_a_large_network_estimates_its_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(estimate, "CPU_BUDGET", 1.0)  # no step of the demo is this small
    text = estimate.dry_run_report(build_config({"device": "cpu"}), {})
    assert "from trial steps of 1 image on this cpu" in text and "images/s" in text
