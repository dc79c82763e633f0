"""`python -m benchmarks.gpu` where there is no GPU: what it says, and its own code on tiny shapes on the CPU."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
import types

import torch

from dino_fast.benchmarks import gpu, gpu_kernels, harness
from dino_fast.benchmarks.harness import Row


def result(folder):
    (path,) = folder.glob("*.json")
    assert path.name.endswith("_dry-run.json")
    found = json.loads(path.read_text())
    assert found["quick"] and found["seconds"] < gpu.LIMIT
    return found


def test_without_a_gpu_it_says_so(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu.main(["--part", "kernels", "--out", str(tmp_path)]) == 2
    assert "no CUDA device" in capsys.readouterr().err and not [*tmp_path.iterdir()]
    assert gpu.main(["--part", "kernels", "--dry-run"]) == 2
    assert "--out" in capsys.readouterr().err


def test_every_kernel_beside_its_baseline(tmp_path, capsys):
    before = harness.COPY_BYTES
    assert gpu.main(["--part", "kernels", "--dry-run", "--out", str(tmp_path)]) == 0
    assert before == harness.COPY_BYTES
    rows = [Row(**row) for row in result(tmp_path)["rows"]]
    operations = {row.operation for row in rows}
    assert operations == {
        "dino_loss", "linear_dino_loss", "linear_ibot_loss", "multi_tensor step", "multi_tensor ema_update",
        "packed_attention",
    }  # fmt: skip
    for operation in operations:
        some = [row for row in rows if row.operation == operation]
        for role in ("ours", "baseline"):
            timed = [row for row in some if row.role == role]
            assert timed and all(row.ms and row.ratio and row.floor_share and row.error < 1e-5 for row in timed)
        assert any(row.contender == "floor" for row in some)
    assert any("executes its operations" in row.note for row in rows if row.operation.startswith("linear"))


def test_the_tests_are_collected(tmp_path):
    assert gpu.main(["--part", "tests", "--dry-run", "--out", str(tmp_path)]) == 0
    (row,) = result(tmp_path)["rows"]
    assert "tests collected" in row["note"] and int(row["note"].split("/")[0]) > 50


def test_a_function_that_is_not_there_is_a_row_that_says_so(monkeypatch, tmp_path):
    monkeypatch.setitem(
        gpu.FUNCTIONS, "crops", (("bench_dino_loss", "no_such_function"), ("bench_nothing", "gpu_rows"))
    )
    assert gpu.main(["--part", "crops", "--dry-run", "--out", str(tmp_path)]) == 1
    notes = [row["note"] for row in result(tmp_path)["rows"]]
    assert len(notes) == 2 and all(note.startswith("missing: ") for note in notes)


def test_rows_of_a_part_are_those_of_its_functions(monkeypatch):
    def broken(end):
        yield Row("crops", "s", "float32", "dino-fast", ms=2.0)
        raise ValueError("nothing to time")

    one = [Row("crops", "s", "float32", "dino-fast", ms=1.0)]
    module = types.SimpleNamespace(gpu_rows=lambda end: one, broken=broken)
    monkeypatch.setattr(gpu.importlib, "import_module", lambda name, package: module)
    assert [row.ms for row in gpu._rows_of("bench_x", "gpu_rows", dry=False, end=0.0)] == [1.0]
    before, row = gpu._rows_of("bench_x", "broken", dry=False, end=0.0)
    assert before.ms == 2.0 and row.note == "failed: ValueError: nothing to time" and row.role == "ours"


def test_what_is_measured_is_written_before_the_next_is(monkeypatch, tmp_path):
    """A part that is ended, or that ends the process, leaves the rows that it had."""
    seen = []

    def rows(end):
        for i in range(3):
            if i:
                found = result(tmp_path)
                seen.append(([row["ms"] for row in found["rows"]], found["complete"]))
            yield Row("crops", "s", "float32", "dino-fast", ms=float(i))

    monkeypatch.setattr(gpu, "_rows_of", lambda module, name, dry, end: rows(end))
    assert gpu.main(["--part", "crops", "--dry-run", "--out", str(tmp_path)]) == 0
    assert seen == [([0.0], False), ([0.0, 1.0], False)]
    found = result(tmp_path)
    assert found["complete"] and len(found["rows"]) == 3 and len([*tmp_path.iterdir()]) == 1


def test_every_test_that_needs_a_gpu_is_marked():
    """`--part tests` runs what has the mark: a test that is skipped for want of a GPU and lacks it would never run."""
    root = gpu.ROOT / "tests"
    need = {
        str(file.relative_to(gpu.ROOT))
        for file in root.rglob("test_*.py")
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "pytest.mark.skipif"
        if any(word in ast.unparse(node) for word in ("cuda_unavailable_reason", "is_available", "missing is not None"))
    }
    assert {"tests/ops/test_multi_crop_cuda.py", "tests/data/test_gpu_crops.py"} <= need
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--collect-only", "-m", "gpu"]
    text = subprocess.run([*command, *sorted(need)], cwd=gpu.ROOT, capture_output=True, text=True).stdout
    marked = [line for line in text.split() if "::" in line]
    assert {line.split("::")[0] for line in marked} == need
    assert any("nvjpeg_differs" in line for line in marked)


def test_what_the_time_does_not_reach_is_named_and_what_cannot_be_set_up_costs_the_others_nothing():
    def broken():
        raise RuntimeError("no memory")

    rows = list(gpu._timed([("first", broken), ("second", broken)], end=float("inf")))
    assert [row.note for row in rows] == ["failed: RuntimeError: no memory"] * 2
    (row,) = gpu._timed([("late", broken)], end=0.0)
    assert row.operation == "late" and row.note.startswith("missing: the part's time was over")


def test_all_parts_run_in_processes_of_their_own(monkeypatch, tmp_path):
    commands = []

    def run(command, timeout):
        commands.append(command)
        return types.SimpleNamespace(returncode=len(commands) == 2)

    monkeypatch.setattr(gpu.subprocess, "run", run)
    assert gpu.main(["--part", "all", "--dry-run", "--out", str(tmp_path)]) == 1
    assert [command[command.index("--part") + 1] for command in commands] == list(gpu.PARTS)


def test_full_sizes_are_those_of_the_bars():
    names = [name for name, _ in gpu_kernels.comparisons()]
    assert (
        names.count("dino_loss") == 3 and names.count("linear_dino_loss") == 2 and names.count("linear_ibot_loss") == 1
    )
    assert names.count("multi_tensor step") == 4 and names.count("packed_attention") == 2 + len(gpu_kernels.LENGTHS)
