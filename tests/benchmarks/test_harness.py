from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from dino_fast.benchmarks import command, harness, report, tables
from dino_fast.benchmarks.harness import Comparison, Contender, compare, peak_cpu, peer, relative_error
from dino_fast.errors import UserError


def softmax_comparison(**options) -> Comparison:
    x = torch.randn(64, 512, generator=torch.Generator().manual_seed(0))
    contenders = [
        Contender("dino-fast", lambda: x.softmax(-1), ours=True),
        Contender("eager", lambda: x.exp() / x.exp().sum(-1, keepdim=True), baseline=True),
        Contender("ten", lambda: [x.softmax(-1) for _ in range(10)].pop()),
        Contender("wrong", lambda: x.softmax(-1) * 1.001),
        Contender("not finite", lambda: x.softmax(-1) * float("nan")),
        Contender("broken", lambda: x.no_such_method()),
        peer("missing", "no_such_package_at_all", lambda module: lambda: None),
    ]
    exact = x.double().softmax(-1)
    return Comparison("softmax", "64x512", "float32", contenders, lambda: exact, seconds=0.1, **options)


def test_right_contenders_are_timed_and_wrong_ones_refused(monkeypatch):
    monkeypatch.setattr("dino_fast.benchmarks.harness.COPY_BYTES", 1 << 20)
    monkeypatch.setattr(harness, "AGREE", float("inf"))  # this is not about a steady machine
    monkeypatch.setattr(harness.Load, "others", lambda self: 0.0)
    rows = {row.contender: row for row in compare(softmax_comparison(floor_bytes=2 * 64 * 512 * 4))}
    assert rows["dino-fast"].ratio == 1.0
    assert rows["ten"].ratio > 3
    assert rows["dino-fast"].error < 1e-6
    assert rows["floor"].ms > 0 and rows["dino-fast"].floor_share == rows["floor"].ms / rows["dino-fast"].ms
    for name, reason in (("wrong", "wrong"), ("not finite", "wrong"), ("broken", "failed"), ("missing", "absent")):
        assert rows[name].note.startswith(reason)
        assert rows[name].ms is None and rows[name].ratio is None


def test_relative_error():
    assert relative_error([torch.tensor([1.0, 2.0])], [torch.tensor([1.0, 2.5])]) == pytest.approx(0.2)
    assert relative_error([torch.tensor([float("inf")])], [torch.tensor([1.0])]) == float("inf")
    nan = relative_error([torch.tensor([float("nan")]), torch.ones(1)], [torch.ones(1), torch.ones(1)])
    assert nan != nan
    with pytest.raises(ValueError, match="shape"):
        relative_error([torch.ones(2)], [torch.ones(3)])


@pytest.mark.parametrize("size", [1 << 20, 24 << 20])
def test_peak_counts_what_a_call_allocates(size):
    # two tensors at once; the least of a few, since a first call and other threads touch pages of their own
    found = [peak_cpu(lambda: torch.ones(size // 4) + 1) for _ in range(5)]
    if None in found:
        pytest.skip("this kernel does not let a process reset its high-water mark")
    grown = min(found)
    assert abs(grown - 2 * size) < 256 << 10  # some pages stay with the allocator, others are touched besides


def test_report_and_tables(tmp_path, capsys):
    rows = compare(softmax_comparison())
    result = report.document("softmax", rows)
    path, picture = report.write(result, tmp_path)
    assert json.loads(path.read_text())["rows"][0]["contender"] == "dino-fast"
    assert picture.stat().st_size > 1000
    report.show(result)
    assert "wrong: error" in capsys.readouterr().out.replace("\n", " ")

    text = "a\n<!-- table: softmax -->\nold\n<!-- end -->\nb\n<!-- table: summary -->\n<!-- end -->\n"
    filled = tables.fill(text, tmp_path)
    assert "old" not in filled and "| ten |" in filled and "eager" in filled.split("table: summary")[1]
    assert tables.fill(filled, tmp_path) == filled
    assert tables.fill("<!-- table: other -->\nx\n<!-- end -->", tmp_path) == "<!-- table: other -->\n<!-- end -->"


def test_unknown_operation_names_the_nearest(monkeypatch):
    monkeypatch.setattr(command, "operations", lambda: ["dino_loss", "step"])
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    with pytest.raises(UserError, match=r"'stepp'.*'step'"):
        command.run(parser.parse_args(["stepp"]))


def test_a_gpu_sleeps_for_as_long_as_the_host_queues():
    """A call that takes the host 2 ms to launch is timed behind a sleep of more than that."""
    cycles = 2e6  # a millisecond at 2 GHz
    assert harness.queue_cycles(0.0) == cycles and harness.queue_cycles(2.0) >= 4 * cycles
    assert harness.queue_cycles(1e6) == 200 * cycles


# ---- no noise as speed ----


def timed(times: list[float], ours: list[float], others: float | None = 0.0) -> harness.Row:
    row = harness.Row("op", "s", "float32", "eager")
    harness.set_times(row, times, ours, others)
    return row


def test_a_ratio_whose_rounds_agree():
    row = timed([30.0, 31.0, 29.0, 30.0, 32.0, 30.0], [10.0] * 6)
    assert row.ratio == 3.0 and row.note == "" and 0 < row.spread < 0.1
    assert row.halves == [3.0, 3.0]


def test_a_ratio_whose_rounds_disagree_is_refused_with_both_figures():
    row = timed([600.0] * 5 + [250.0] * 5, [10.0] * 10)
    assert row.ratio is None and row.note.startswith("unsteady: 60x and 25x")
    assert report.cells(row.as_dict())[3] == "unsteady"


def test_no_table_has_a_ratio_that_its_times_deny():
    """8.475 ms = 1.00x beside 0.9486 ms = 1.37x: the median of the rounds' ratios and the medians' ratio disagree."""
    theirs, ours = [0.9, 0.95, 50.0, 0.95, 0.9, 50.0, 0.95], [0.7, 9.0, 30.0, 8.5, 0.65, 36.0, 8.5]
    row = timed(theirs, ours)
    assert row.ratio is None and "by medians" in row.note


def test_a_loaded_machine_is_named_and_gives_no_ratio():
    row = timed([600.0] * 6, [10.0] * 6, others=1.4)
    assert row.ratio is None and "other programs took 1.4 of its processors; measured 60x" in row.note
    assert "is loaded" in report.loaded([row.as_dict()]) and not report.loaded([timed([1.0], [1.0]).as_dict()])


def test_other_programs_are_seen_and_ones_own_work_is_not():
    if harness.Load().others() is None:
        pytest.skip("this kernel does not tell how busy its processors are")
    before = torch.get_num_threads()
    busy = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        torch.set_num_threads(len(os.sched_getaffinity(0)))
        load = harness.Load()
        time.sleep(1.0)
        assert load.others() > 0.3  # a whole one, where it need not share it
        shown = load._start
        load._start = (shown[0], shown[1], shown[2] - 1e6)  # as if all of it had been ours
        assert load.others() == 0.0
    finally:
        busy.kill()
        busy.wait()
        torch.set_num_threads(before)


def test_what_ran_of_ours_is_named():
    from dino_fast.benchmarks import bench_matmul
    from dino_fast.ops.linear.matmul import _unavailable_reason

    row = compare(harness_quick(bench_matmul))[0]
    assert row.backend == ("PyTorch" if _unavailable_reason() else "amx")
    shown = report.cells({**row.as_dict(), "backend": "PyTorch"})[0]
    assert shown == "dino-fast (PyTorch itself)"
    assert harness.described({"a": {"native"}, "b": {"reference", "amx"}}) == "a: native, b: amx and PyTorch"


def harness_quick(module) -> Comparison:
    (comparison,) = module.comparisons(quick=True)
    comparison.seconds = 0.01
    return comparison


def test_quick_files_lie_apart_from_results(monkeypatch, tmp_path):
    assert report.results_directory(quick=True) != report.results_directory()
    (tmp_path / "benchmarks").mkdir()
    (tmp_path / "pyproject.toml").touch()
    monkeypatch.setattr(report, "__file__", str(tmp_path / "benchmarks" / "report.py"))
    monkeypatch.setattr(
        harness, "compare", lambda comparison, allocator: [harness.Row("matmul", "s", "f", "x", ms=1.0)]
    )
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    assert command.run(parser.parse_args(["matmul", "--quick"])) == 0
    assert not (tmp_path / "benchmarks" / "results").exists()
    assert [path.suffix for path in sorted((tmp_path / "benchmarks" / "quick").iterdir())] == [".json", ".png"]
    ignored = (Path(__file__).resolve().parents[2] / ".gitignore").read_text().splitlines()
    assert "/benchmarks/quick/" in ignored


def test_one_comparison_is_measured_and_the_others_stay(monkeypatch, tmp_path, capsys):
    names = ["64 of them", "65 of them"]
    made = iter([1.0, 2.0, 3.0])
    measured = []

    def compare_one(comparison, allocator):
        measured.append(comparison.shape)
        return [harness.Row("matmul", comparison.shape, "float32", "dino-fast", ms=next(made), role="ours")]

    from dino_fast.benchmarks import bench_matmul

    monkeypatch.setattr(harness, "compare", compare_one)
    monkeypatch.setattr(
        bench_matmul, "comparisons", lambda quick: (Comparison("matmul", n, "float32", []) for n in names)
    )
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    for more in ([], ["--only", "65 of"]):
        assert command.run(parser.parse_args(["matmul", "--out", str(tmp_path), *more])) == 0
    assert measured == [*names, "65 of them"]
    (path,) = tmp_path.glob("*.json")
    assert [row["ms"] for row in json.loads(path.read_text())["rows"]] == [1.0, 3.0]
    with pytest.raises(UserError, match=r"'66'.*64 of them"):
        command.run(parser.parse_args(["matmul", "--only", "66"]))
    with pytest.raises(UserError, match="one benchmark"):
        command.run(parser.parse_args(["--only", "66"]))


def test_tables_for_a_pipe_are_not_cut(capsys):
    row = harness.Row("op", "a shape of a good many words, as they are", "float32", "x" * 90, ms=1.0, role="ours")
    report.show(report.document("op", [row]))
    assert "x" * 90 in capsys.readouterr().out


def test_bars_begin_at_zero_on_a_linear_axis(monkeypatch, tmp_path):
    import matplotlib.axes

    seen = []
    set_title = matplotlib.axes.Axes.set_title
    monkeypatch.setattr(
        matplotlib.axes.Axes, "set_title", lambda ax, *a, **k: (seen.append(ax), set_title(ax, *a, **k))[1]
    )
    rows = [harness.Row("op", "s", "float32", name, ms=ms, ratio=ms) for name, ms in (("a", 1.0), ("b", 30.0))]
    report.draw(report.document("op", rows), tmp_path / "x.png")
    (ax,) = seen
    assert ax.get_xscale() == "linear" and ax.get_xlim()[0] == 0


def test_a_column_for_each_machine(tmp_path):
    for device, amx, ms in (("Intel(R) Xeon(R) Processor", True, 2.0), ("AMD EPYC", False, 3.0)):
        ours = harness.Row("dino_loss", "B16 V10 K65536, in place", "float32", "dino-fast", ms, ratio=1.0, role="ours")
        base = harness.Row("dino_loss", ours.shape, "float32", "original, eager", 10 * ms, ratio=10.0, role="baseline")
        ours.backend = "native"
        result = report.document("dino_loss", [ours, base]) | {"device": device, "amx": amx}
        report.write(result, tmp_path)
    text = "".join(f"<!-- table: {name} -->\n<!-- end -->\n" for name in ("headlines", "summary", "dino_loss"))
    headlines, summary, both = tables.fill(text, tmp_path).split("<!-- end -->\n")[:3]
    assert "| | Intel Xeon (AMX) | AMD EPYC |" in headlines
    assert "| 2 ms; 10.00x original, eager | 3 ms; 10.00x original, eager |" in headlines
    assert "| 2 ms (native); 10.00x original, eager | 3 ms (native);" in summary
    assert "(AMD EPYC, " in both and "(Intel(R) Xeon(R) Processor, " in both
    assert "AMD EPYC: " in headlines and "torch " in headlines


def test_the_documents_are_what_the_files_say(monkeypatch):
    assert len(tables.HEADLINES) <= 6
    monkeypatch.setattr(sys, "argv", ["tables", "--check"])
    assert tables.main() == 0
    readme = (tables.ROOT / "README.md").read_text()
    block = next(match[0] for match in tables.BLOCK.finditer(readme) if match[2] == "headlines")
    assert len([line for line in block.splitlines() if line.startswith("| ")]) <= 1 + 6
