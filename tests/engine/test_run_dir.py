from __future__ import annotations

import errno
import fcntl
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

from dino_fast.engine import run_dir as run_module
from dino_fast.engine.run_dir import open_run, read_metrics
from dino_fast.errors import UserError

CONFIG = {"epochs": 2, "data": Path("/photos"), "scale": (0.4, 1.0), "model": {"arch": "vit_tiny"}, "lr": None}


def test_a_run_directory(tmp_path: Path) -> None:
    with open_run(tmp_path / "deep" / "r", CONFIG, resume=False) as run:
        run.log({"step": 0, "knn": 0.5})
        run.log_text("hello")
    assert run.path == tmp_path / "deep" / "r"
    assert run.checkpoints.is_dir() and run.export.is_dir()
    assert yaml.safe_load((run.path / "config.yaml").read_text()) == {
        "epochs": 2,
        "data": "/photos",
        "scale": [0.4, 1.0],
        "model": {"arch": "vit_tiny"},
        "lr": None,
    }
    assert (run.path / "log.txt").read_text().endswith("  hello\n")
    assert list(run.path.glob("events.out.*"))


def test_default_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Clock(run_module.datetime):
        @classmethod
        def now(cls, tz: object = None) -> Clock:
            return cls(2024, 3, 1, 9, 5, 7)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(run_module, "datetime", Clock)
    names = [str(open_run(None, CONFIG, False).path) for _ in range(3)]
    assert names == ["runs/2024-03-01-090507", "runs/2024-03-01-090507-2", "runs/2024-03-01-090507-3"]
    with pytest.raises(UserError, match=r"--out DIR.*090507-3"):
        open_run(None, CONFIG, resume=True)


@pytest.mark.parametrize("mark", ["config.yaml", "metrics.jsonl", "checkpoints"])
def test_a_directory_with_a_run_is_refused_untouched(tmp_path: Path, mark: str) -> None:
    (tmp_path / mark).mkdir() if mark == "checkpoints" else (tmp_path / mark).write_text("")
    with pytest.raises(UserError, match=r"already holds a run.*--resume.*another --out"):
        open_run(tmp_path, CONFIG, resume=False)
    assert [p.name for p in tmp_path.iterdir()] == [mark]
    assert open_run(tmp_path, CONFIG, resume=True).path == tmp_path


def test_resume_where_nothing_is_starts_a_run_and_other_files_do_not_matter(tmp_path: Path) -> None:
    assert open_run(tmp_path / "new", CONFIG, resume=True).path.is_dir()
    (tmp_path / "notes.txt").write_text("mine")
    open_run(tmp_path, CONFIG, resume=False)
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_two_runs_do_not_share_a_directory(tmp_path: Path) -> None:
    with open_run(tmp_path, CONFIG, resume=False):
        for resume in (False, True):
            with pytest.raises(UserError, match=rf"another process is writing.*process {os.getpid()} on "):
                open_run(tmp_path, CONFIG, resume)
    open_run(tmp_path, CONFIG, resume=True).close()


def test_a_disk_without_locks_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    with pytest.warns(UserWarning, match=r"has no locks \(No locks available\): start no second run"):
        run = open_run(tmp_path, CONFIG, resume=False)
    run.log({"step": 0})
    run.close()
    assert len(read_metrics(tmp_path)) == 1


def test_what_a_check_refuses_is_left_as_it_is(tmp_path: Path) -> None:
    def refuse(path: Path) -> None:
        raise UserError("other images")

    open_run(tmp_path, CONFIG, resume=False).close()
    with pytest.raises(UserError, match="other images"):
        open_run(tmp_path, {**CONFIG, "epochs": 9}, resume=True, check=refuse)
    assert yaml.safe_load((tmp_path / "config.yaml").read_text())["epochs"] == 2
    assert not (tmp_path / "log.txt").exists()


def test_a_name_that_is_no_text_is_logged(tmp_path: Path) -> None:
    with open_run(tmp_path, CONFIG, resume=False) as run:
        run.log_text("cannot read \udcff.jpg")
    assert (tmp_path / "log.txt").read_text().endswith("cannot read \\udcff.jpg\n")


def test_bad_places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match="is a file"):
        open_run(tmp_path / "file", CONFIG, resume=True)
    with pytest.raises(UserError, match=r"--out .*below cannot be written: .*file is a file, not a folder"):
        open_run(tmp_path / "file" / "below", CONFIG, resume=False)

    for place in ("/proc/dino-fast", "/proc/dino-fast/runs/1"):  # the system calls this "No such file or directory"
        with pytest.raises(UserError, match=r"/proc does not take it. Give a place in a folder of your own"):
            open_run(Path(place), CONFIG, resume=False)

    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", str(tmp_path / "locked"))

    with monkeypatch.context() as patch:
        patch.setattr(Path, "mkdir", refuse)
        with pytest.raises(UserError, match=r"--out .*locked cannot be written: nothing.*Permission denied"):
            open_run(tmp_path / "locked", CONFIG, resume=False)


def test_changed_configuration_is_noted_on_resume(tmp_path: Path) -> None:
    open_run(tmp_path, CONFIG, resume=False)
    open_run(tmp_path, CONFIG, resume=True)
    assert not (tmp_path / "log.txt").exists()
    open_run(tmp_path, {**CONFIG, "epochs": 5}, resume=True)
    assert "resumed with epochs: 5 (was 2)" in (tmp_path / "log.txt").read_text()
    assert yaml.safe_load((tmp_path / "config.yaml").read_text())["epochs"] == 5


def test_lines_are_there_at_once_and_valid_json(tmp_path: Path) -> None:
    run = open_run(tmp_path, CONFIG, resume=False)
    run.log({"step": 1, "loss": torch.tensor(2.5), "kl": float("nan"), "lr": float("inf"), "epoch": 0, "knn": None})
    text = (tmp_path / "metrics.jsonl").read_text()  # before close
    assert text.endswith("\n")
    row = json.loads(text, parse_constant=lambda word: pytest.fail(f"{word} is not JSON"))
    assert row == {"step": 1, "loss": 2.5, "kl": None, "lr": None, "epoch": 0, "knn": None}
    with pytest.raises(ValueError, match="step"):
        run.log({"loss": 1.0})
    with pytest.raises(TypeError, match="list"):
        run.log({"step": 2, "loss": [1.0]})
    run.close()
    assert read_metrics(tmp_path) == read_metrics(tmp_path / "metrics.jsonl") == [row]


def _scalars(path: Path, tag: str) -> list[tuple[int, float]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    board = EventAccumulator(str(path))
    board.Reload()
    return [(event.step, event.value) for event in board.Scalars(tag)]


def test_cut_back_and_tensorboard(tmp_path: Path) -> None:
    with open_run(tmp_path, CONFIG, resume=False) as run:
        for step in range(6):
            run.log({"step": step, "loss": float(step), "lr": 0.1, "knn": 0.5})
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 6, "lo')
    assert [row["step"] for row in read_metrics(tmp_path)] == [0, 1, 2, 3, 4, 5]

    with open_run(tmp_path, CONFIG, resume=True) as run:
        run.truncate_metrics(3)
        assert [row["step"] for row in read_metrics(tmp_path)] == [0, 1, 2, 3]
        for step in (4, 5):
            run.log({"step": step, "loss": 10.0 + step})
    assert [row["loss"] for row in read_metrics(tmp_path)] == [0, 1, 2, 3, 14, 15]
    assert _scalars(tmp_path, "train/loss") == [(0, 0), (1, 1), (2, 2), (3, 3), (4, 14), (5, 15)]
    assert len(_scalars(tmp_path, "eval/knn_teacher")) == 4 and len(_scalars(tmp_path, "schedule/lr")) == 4
    assert not list(tmp_path.glob(".tmp*"))


def test_cut_back_of_an_empty_run_and_to_nothing(tmp_path: Path) -> None:
    with open_run(tmp_path, CONFIG, resume=False) as run:
        run.truncate_metrics(5)
        run.log({"step": 0})
        run.truncate_metrics(-1)  # starts over: no checkpoint was written
    assert read_metrics(tmp_path) == []


def test_cut_back_is_atomic(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = open_run(tmp_path, CONFIG, resume=False)
    for step in range(3):
        run.log({"step": step})
    before = (tmp_path / "metrics.jsonl").read_bytes()

    def crash(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", crash)
        with pytest.raises(KeyboardInterrupt):
            run.truncate_metrics(1)
    assert (tmp_path / "metrics.jsonl").read_bytes() == before
    run.close()


def test_damage_in_the_middle_is_named(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 0}\n{"ste\n{"step": 2}\n')
    with pytest.raises(UserError, match="line 2"):
        read_metrics(tmp_path)
    with pytest.raises(UserError, match="run directory"):
        read_metrics(tmp_path / "absent.jsonl")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_full_disk_while_logging(tmp_path: Path) -> None:
    run = open_run(tmp_path, CONFIG, resume=False)
    (tmp_path / "metrics.jsonl").symlink_to("/dev/full")
    with pytest.raises(UserError, match=r"full.*--resume"):
        run.log({"step": 0})


def test_importing_does_not_load_tensorboard() -> None:
    code = "import sys, dino_fast.engine.run_dir; print('tensorboard' in sys.modules)"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "False"
