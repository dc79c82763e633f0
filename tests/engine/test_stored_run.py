"""A run that an earlier version wrote is loaded and continued; `stored_runs/*/README.md` says how it was made."""

from __future__ import annotations

import hashlib
import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from dino_fast.cli import main as cli
from dino_fast.engine import checkpoint, trainer
from dino_fast.engine.config import Config, load_config
from dino_fast.engine.run_dir import read_metrics

STORED = Path(__file__).parent / "stored_runs" / "before_renames"
EXPECTED: dict[str, Any] = json.loads((STORED / "expected.json").read_text())
# Three steps of a small network in float32: half of its digits are more than rounding reaches, and far less than a
# wrong moment, seed, schedule or center changes.
BOUND = math.sqrt(torch.finfo(torch.float32).eps)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return Path(shutil.copytree(STORED, tmp_path / "run"))


def _resume(run: Path) -> list[dict[str, Any]]:
    """Continues to step 6; the metrics of steps 3, 4 and 5."""
    words = ["train", "--resume", "--out", str(run), "--data", str(STORED / "images.npy"), "--max-steps", "6"]
    assert cli.main(words) == 0
    rows = read_metrics(run)
    assert [row["step"] for row in rows] == list(range(6))
    assert rows[:3] == read_metrics(STORED)
    return rows[3:]


def _this_machine() -> dict[str, str]:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    cpu = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
    return {"cpu": cpu, "torch": torch.__version__}


def _digest(tensor: Tensor) -> str:
    return hashlib.sha256(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()).hexdigest()


def test_its_old_settings_have_their_present_names() -> None:
    config = load_config(STORED / "config.yaml")
    assert config == Config(
        data="images.npy", mean=(0.5,), std=(0.25,), max_corrupt=0.1,
        global_size=8, local_size=4, local_crops=2, local_scale=(0.1, 0.4), jitter=(0.4, 0.4, 0.0, 0.0), gray_p=0.0,
        arch="vit_tiny", patch_size=4, embed_dim=16, depth=1, num_heads=2, out_dim=24, head_hidden_dim=16,
        head_bottleneck_dim=8, init="xavier", batch_size=4, grad_accum_steps=2, epochs=4, max_steps=3, lr=0.05,
        warmup_epochs=1.0, momentum_teacher=0.9, hold_out=0.1, device="cpu", loss_impl="chunked", seed=7,
    )  # fmt: skip


def test_all_that_it_holds_is_loaded_bit_for_bit(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The state that is loaded is saved again, tensor for tensor, before any step."""
    saved: dict[str, Any] = {}

    def stop(self: trainer.Trainer) -> None:
        saved.update(self.state.state_dict(), step=self.step)
        raise KeyboardInterrupt

    monkeypatch.setattr(trainer.Trainer, "fit", stop)
    config = trainer.replace(
        load_config(run / "config.yaml"), data=str(STORED / "images.npy"), out=str(run), resume=True, max_steps=6
    )
    with pytest.raises(KeyboardInterrupt):
        trainer.train(config)
    assert saved["step"] == 3
    checkpoint.save(run / "again", 3, saved)
    name = "step-00000003/tensors.safetensors"
    stored, again = load_file(STORED / "checkpoints" / name), load_file(run / "again" / name)
    assert {key: _digest(x) for key, x in again.items()} == {key: _digest(x) for key, x in stored.items()}


@pytest.mark.parametrize("backend", ["reference", "auto"])
def test_it_goes_on_with_the_same_numbers(backend: str, run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if backend != "auto":
        monkeypatch.setenv("DINO_FAST_BACKEND", backend)
    for row, expected in zip(_resume(run), EXPECTED["metrics"], strict=True):
        assert {name: row[name] for name in expected} == pytest.approx(expected, rel=BOUND)


@pytest.mark.skipif(_this_machine() != EXPECTED["made_on"], reason="other processors and versions of torch round anew")
def test_it_goes_on_bit_for_bit_where_it_was_made(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DINO_FAST_BACKEND", "reference")
    for row, expected in zip(_resume(run), EXPECTED["metrics"], strict=True):
        assert {name: row[name] for name in expected} == expected
    tensors = load_file(run / "checkpoints" / "step-00000006" / "tensors.safetensors")
    assert {name: _digest(tensor) for name, tensor in tensors.items()} == EXPECTED["sha256"]


def test_its_best_checkpoint_is_replaced(run: Path) -> None:
    """Earlier versions made `best` a folder."""
    shutil.copytree(run / "checkpoints" / "step-00000003", run / "checkpoints" / "best")
    _resume(run)
    checkpoint.mark_best(run / "checkpoints", 6)
    assert checkpoint.read(run / "checkpoints" / "best")[0] == 6
