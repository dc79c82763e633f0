"""The benchmark of whole runs, at a size that takes seconds."""

from __future__ import annotations

import json

import pytest
import torch

from dino_fast.benchmarks import bench_engine, engine_on_gpu, harness
from dino_fast.benchmarks.bench_engine import Measured, Size, rows_of
from tests.original.script import Augmentation


@pytest.fixture(autouse=True)
def any_machine(monkeypatch):
    """What is tested here is not how steady the machine is."""
    monkeypatch.setattr(harness, "AGREE", float("inf"))
    monkeypatch.setattr(bench_engine.Load, "others", lambda self: 0.0)


def test_ratios_are_of_the_same_round_and_wrong_runs_get_none():
    right = [Measured(100.0, 5, [6.0]), Measured(200.0, 7, [6.0])]
    slow = [Measured(150.0, 20, [6.05]), Measured(320.0, 20, [6.05])]
    wrong = [Measured(10.0, 1, [3.0]), Measured(10.0, 1, [3.0])]
    runs = {"dino-fast": right, "published script": slow, "dino-fast, bf16": wrong}
    ours, theirs, bad = rows_of(Size(batch=15), runs)
    assert (ours.ms, ours.peak_bytes, ours.ratio, ours.note) == (150.0, 7, 1.0, "100.0 images/s")
    assert (theirs.ratio, theirs.role) == (pytest.approx(1.55), "baseline")
    assert bad.ratio is None and bad.ms is None and bad.note.startswith("wrong")


def test_a_quick_run_of_both():
    if bench_engine.cifar() is None:
        pytest.skip("no cifar10-train.parquet (DINO_FAST_TEST_DATA names the folder)")
    size = Size(prototypes=256, batch=16, steps=5, images=64, depth=1, head_hidden=32)
    for row in bench_engine.cpu_rows([size], rounds=1):
        assert not row.note.startswith("wrong"), row
        assert row.ms and row.peak_bytes and row.ratio and row.note.endswith("images/s")


def test_missing_data_is_said(monkeypatch):
    monkeypatch.setattr(bench_engine, "cifar", lambda: None)
    assert all(row.note.startswith("absent") for row in bench_engine.cpu_rows([Size()]))


def test_the_rows_of_a_gpu_at_a_tiny_size():
    rows = {row.contender: row for row in bench_engine.gpu_rows(quick=True, device="cpu")}
    assert {"dino-fast", "dino-fast, selective checkpoints", "strongest plain PyTorch"} <= rows.keys()
    for row in rows.values():
        assert row.ms and row.ratio and row.floor_share, row


def test_what_fails_or_comes_too_late_costs_the_other_rows_nothing(monkeypatch):
    def late(*args, **options):
        raise AssertionError("called after the end")

    monkeypatch.setattr(engine_on_gpu, "comparison", late)
    (row,) = engine_on_gpu.rows(quick=True, device="cpu", end=0.0)
    assert row.note == harness.NOT_REACHED and row.role == "ours"
    (row,) = engine_on_gpu.rows(quick=True, device="cpu")
    assert row.note == "failed: AssertionError: called after the end"


def test_a_contender_that_does_not_compile_is_noted(monkeypatch):
    class CompilationError(Exception):
        pass

    def broken(model, batch, device, compiled):
        raise CompilationError("no such instruction\nmore")

    monkeypatch.setattr(engine_on_gpu, "strongest_step", broken)
    rows = {row.contender: row for row in engine_on_gpu.comparison(engine_on_gpu.TINY, 4, "cpu", 1, compiled=False)}
    assert rows["strongest plain PyTorch"].note == "failed: CompilationError: no such instruction"
    assert rows["dino-fast"].ms and rows["dino-fast, stochastic depth 0.1"].ms


def test_cold_compilations_come_last():
    names = [name for name, _ in engine_on_gpu.plan(False, "cuda")]
    assert [name.endswith("compiled") for name in names] == sorted(name.endswith("compiled") for name in names)
    assert sum(name.endswith("compiled") for name in names) == 3


def test_the_baselines_do_the_same_steps():
    ours, theirs = (make(engine_on_gpu.TINY, 4, "cpu") for make in (engine_on_gpu.our_step, _uncompiled))
    for _ in range(3):
        assert ours()["loss"] == pytest.approx(float(theirs()), rel=0.02)  # bf16 either way


def _uncompiled(model, batch, device):
    return engine_on_gpu.strongest_step(model, batch, device, compiled=False)


def test_useful_flops():
    # ViT-S/16: 4.6 GFLOP for 197 tokens forward in the usual multiply-adds, so 9.2; the last block here is the token's.
    model = engine_on_gpu.MODELS[0]
    assert 60e9 < model.flops() < 110e9


def test_the_largest_batch(monkeypatch):
    def make(batch):
        if batch > 13 * 64:
            raise torch.OutOfMemoryError
        return lambda: None

    assert engine_on_gpu.largest_batch(make, 64) == 13 * 64
    assert engine_on_gpu.largest_batch(lambda batch: make(batch + 10**6), 64) == 0


def test_the_rows_of_cifar_on_the_demo():
    (row,) = bench_engine.cifar_rows(quick=True, device="cpu")
    told = json.loads(row.note)
    assert 0 <= told["knn"] <= 1 and told["curve"] and row.ms


def test_the_scripts_crops():
    from PIL import Image

    views = Augmentation(32, 16, 3)(Image.new("RGB", (40, 30), (200, 100, 50)))
    assert [tuple(view.shape) for view in views] == [(3, 32, 32)] * 2 + [(3, 16, 16)] * 3
    assert all(torch.isfinite(view).all() for view in views)
