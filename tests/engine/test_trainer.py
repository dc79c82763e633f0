from __future__ import annotations

import errno
import json
import math
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import types
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from dino_fast.engine import checkpoint, train
from dino_fast.engine import trainer as loop
from dino_fast.engine.build import resolve_workers
from dino_fast.engine.config import Config, build_config
from dino_fast.engine.run_dir import read_metrics
from dino_fast.engine.trainer import Trainer
from dino_fast.errors import UserError
from dino_fast.models.weights.read import load_backbone

STEPS = 90
KEYS = {
    *("step", "epoch", "loss", "lr", "weight_decay", "momentum", "teacher_temp", "teacher_entropy", "kl"),
    *("images_per_second", "data_wait", "feature_spread", "grad_norm", "tokens_per_second", "tflops"),
}
MODEL: dict[str, Any] = {
    "arch": "vit_tiny", "embed_dim": 32, "depth": 2, "num_heads": 2, "patch_size": 4, "global_size": 16,
    "local_size": 8,
    "local_crops": 2, "out_dim": 64, "head_hidden_dim": 32, "head_bottleneck_dim": 16, "drop_path_rate": 0.2,
    "batch_size": 8, "epochs": 18, "warmup_epochs": 2, "lr": 0.02, "knn_every": 9, "device": "cpu",
}  # fmt: skip


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two classes of 22 pictures: 5 steps of 8 an epoch."""
    root = tmp_path_factory.mktemp("images")
    random = np.random.default_rng(0)
    for name, low in (("dark", 0), ("light", 128)):
        (root / name).mkdir()
        for i in range(22):
            pixels = random.integers(low, low + 128, (20, 24, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(root / name / f"{i}.png")
    return root


def _config(images: Path, out: Path, **given: Any) -> Config:
    return build_config({**MODEL, "data": str(images), "out": str(out), **given})


def _start(images: Path, out: Path, *words: str, workers: int = 0) -> subprocess.Popen[str]:
    settings = out.with_suffix(".yaml")
    settings.write_text(json.dumps({**MODEL, "data": str(images), "workers": workers, "save_every": 1}))
    command = [
        sys.executable,
        "-m",
        "dino_fast",
        "train",
        "--config",
        str(settings),
        "--out",
        str(out),
        *words,
    ]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )


def _finish(process: subprocess.Popen[str]) -> tuple[int, str]:
    output, _ = process.communicate(timeout=300)
    return process.returncode, output


def _wait_for(out: Path, step: int, process: subprocess.Popen[str]) -> None:
    """Returns once the run is past `step` and has a checkpoint."""
    while process.poll() is None:
        file = out / "metrics.jsonl"
        saved = list((out / "checkpoints").glob("step-*")) if out.exists() else []
        if saved and file.exists() and file.read_bytes().count(b"\n") > step:
            return
        time.sleep(0.002)
    raise AssertionError(f"the run ended before step {step}: {process.communicate()[0]}")


def _assert_same_run(out: Path, other: Path) -> None:
    """Bit for bit the same losses, weights, optimizer, centre."""
    rows, others = read_metrics(out), read_metrics(other)
    assert [row["step"] for row in rows] == list(range(STEPS))
    for name in ("loss", "kl", "teacher_entropy", "feature_spread", "lr", "knn", "knn_student"):
        assert [row.get(name) for row in rows] == [row.get(name) for row in others], name
    (step, state), (other_step, expected) = (checkpoint.load(path / "checkpoints") for path in (out, other))
    assert step == other_step == STEPS
    _assert_equal(state, expected)


def _assert_equal(a: Any, b: Any, where: str = "") -> None:
    if isinstance(a, torch.Tensor):
        assert torch.equal(a, b), where
    elif isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for key in a:
            if key not in ("workers", "save_in_background"):
                _assert_equal(a[key], b[key], f"{where}/{key}")
    else:
        assert a == b, where


@pytest.fixture(scope="module")
def undisturbed(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "undisturbed"
    code, output = _finish(_start(images, out))
    assert code == 0, output
    return out


def test_a_run_is_complete_in_itself(undisturbed: Path) -> None:
    rows = read_metrics(undisturbed)
    assert [row["step"] for row in rows] == list(range(STEPS))
    assert all(row.keys() >= KEYS for row in rows)
    assert [row["epoch"] for row in rows] == [step // 5 for step in range(STEPS)]
    assert [row["step"] for row in rows if "knn" in row] == [0, 44, 89]
    assert [row["step"] for row in rows if "knn_student" in row] == [0, 44, 89]
    for name in KEYS - {"step", "epoch"}:
        assert all(isinstance(row[name], float) and math.isfinite(row[name]) for row in rows), name
    assert all(0 <= row["data_wait"] <= 1 and row["images_per_second"] > 0 for row in rows)
    assert rows[0]["knn"] == rows[0]["knn_student"]  # of the same weights, before any update
    assert all(0 <= row["knn"] <= 1 for row in rows if "knn" in row)
    assert sorted(path.name for path in (undisturbed / "checkpoints").iterdir())[0] == "best"
    assert list(undisturbed.glob("events.out.*"))
    from safetensors.torch import load_file

    exported = load_file(undisturbed / "export" / "teacher.safetensors")
    _, state = checkpoint.load(undisturbed / "checkpoints") or pytest.fail("no checkpoint")
    assert load_backbone(undisturbed).num_heads == MODEL["num_heads"]
    assert torch.equal(exported["cls_token"], state["teacher"]["backbone.cls_token"])
    log = (undisturbed / "log.txt").read_text()
    assert "k-NN (k=20, temperature 0.07" in log
    assert f"dino-fast eval knn --checkpoint {undisturbed}" in log


@pytest.mark.parametrize("workers", [0, 2])
def test_killed_and_resumed_equals_undisturbed(images: Path, undisturbed: Path, tmp_path: Path, workers: int) -> None:
    out = tmp_path / "run"
    process = _start(images, out, workers=workers)
    _wait_for(out, 30, process)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    code, output = _finish(_start(images, out, "--resume", workers=workers))
    assert code == 0, output
    at = int(output.partition("continuing at step ")[2].split()[0])
    assert 0 < at < STEPS
    _assert_same_run(out, undisturbed)
    code, output = _finish(_start(images, out, "--resume", workers=workers))
    assert code == 0
    assert "is finished: 90 steps of 90" in output


@pytest.mark.parametrize(("number", "workers"), [(signal.SIGTERM, 2), (signal.SIGINT, 0)])
def test_a_signal_saves_first(images: Path, undisturbed: Path, tmp_path: Path, number: int, workers: int) -> None:
    out = tmp_path / "run"
    process = _start(images, out, workers=workers)
    _wait_for(out, 20, process)
    os.killpg(process.pid, number)  # all of the group get it, as from a terminal or a scheduler
    code, output = _finish(process)
    assert code == 128 + number, output
    assert f"dino-fast train --resume --out {out}" in output
    assert "Traceback" not in output
    step = len(read_metrics(out))
    assert (out / "checkpoints" / f"step-{step:08d}").exists()  # nothing is lost
    # the command that the message names, with nothing else
    command = [sys.executable, "-m", "dino_fast", "train", "--resume", "--out", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    _assert_same_run(out, undisturbed)


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2, signal.SIGXCPU])
def test_other_signals_save_first_too(images: Path, tmp_path: Path, number: int) -> None:
    out = tmp_path / "run"
    process = _start(images, out, "--epochs", "1000", workers=1)
    _wait_for(out, 6, process)
    for _ in range(2):  # a closed terminal sends two, the limit of processor time one a second
        os.killpg(process.pid, number)
    code, output = _finish(process)
    assert code == 128 + number, output
    assert "and saved" in output and "Traceback" not in output
    assert (out / "checkpoints" / f"step-{len(read_metrics(out)):08d}").exists()


def test_checkpoints_by_steps_and_by_minutes(images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def saved(name: str, **given: Any) -> list[int]:
        train(_config(images, tmp_path / name, max_steps=7, knn_every=0, save_every=0, keep_checkpoints=9, **given))
        return sorted(int(path.name[5:]) for path in (tmp_path / name / "checkpoints").glob("step-*"))

    assert saved("end") == [7]
    assert saved("steps", save_every_steps=3) == [3, 6, 7]
    times = iter(range(0, 10_000, 10))  # seconds; each step looks twice, each save once
    clock = types.SimpleNamespace(monotonic=lambda: float(next(times)), perf_counter=time.perf_counter)
    monkeypatch.setattr(loop, "time", clock)
    assert saved("minutes", save_every_minutes=1) == [3, 6, 7]


def test_stopping_early_and_lengthening_is_exact(images: Path, undisturbed: Path, tmp_path: Path) -> None:
    train(_config(images, tmp_path / "run", max_steps=13))
    assert len(read_metrics(tmp_path / "run")) == 13
    train(_config(images, tmp_path / "run", resume=True, max_steps=STEPS))
    rows, others = read_metrics(tmp_path / "run"), read_metrics(undisturbed)
    assert [row["loss"] for row in rows] == [row["loss"] for row in others]


def test_no_checkpoint_yet_starts_over(images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "run"
    train(_config(images, out, max_steps=3))
    for folder in (out / "checkpoints").glob("step-*"):  # the link `best` leads nowhere then
        for file in folder.iterdir():
            file.unlink()
        folder.rmdir()
    train(_config(images, out, max_steps=3, resume=True))
    assert "starting over" in capsys.readouterr().out
    assert [row["step"] for row in read_metrics(out)] == [0, 1, 2]


def test_a_truncated_checkpoint_is_named_and_the_previous_used(
    images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    train(_config(images, out, max_steps=4))
    train(_config(images, out, max_steps=8, resume=True))
    with open(out / "checkpoints" / "step-00000008" / "tensors.safetensors", "r+b") as file:
        file.truncate(1000)
    train(_config(images, out, max_steps=8, resume=True))
    output = capsys.readouterr().out
    assert "step-00000008 is damaged" in output
    assert "continuing at step" in output
    assert [row["step"] for row in read_metrics(out)] == list(range(8))


def _contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_run_whose_only_checkpoint_is_damaged_is_left_as_it_is(images: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    train(_config(images, out, max_steps=4))
    with open(out / "checkpoints" / "step-00000004" / "tensors.safetensors", "r+b") as file:
        file.truncate(1000)
    before = _contents(out)
    with pytest.raises(UserError, match=r"no whole checkpoint.*step-00000004 is damaged.*start anew.*another --out"):
        train(_config(images, out, max_steps=8, resume=True))
    assert _contents(out) == before


def test_a_second_process_is_refused_and_a_killed_one_lets_go(images: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    train(_config(images, out, max_steps=2))
    first = _start(images, out, "--resume", "--max-steps", "100000", "--epochs", "18", workers=1)
    while first.poll() is None and (out / "metrics.jsonl").read_bytes().count(b"\n") < 4:
        time.sleep(0.01)
    first.send_signal(signal.SIGSTOP)  # so that it does not end meanwhile
    before = (out / "config.yaml").read_bytes()
    with pytest.raises(UserError, match=rf"another process is writing .*process {first.pid} on {socket.gethostname()}"):
        train(_config(images, out, max_steps=7, resume=True))
    assert (out / "config.yaml").read_bytes() == before
    first.kill()  # not its worker
    _finish(first)
    train(_config(images, out, max_steps=STEPS, resume=True))
    assert [row["step"] for row in read_metrics(out)] == list(range(STEPS))


def test_a_start_that_failed_does_not_block_the_next(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "run"

    def fail(*_: object) -> None:
        raise UserError("no memory")

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "fit", fail)
        with pytest.raises(UserError, match="no memory"):
            train(_config(images, out))
    train(_config(images, out, max_steps=2))
    assert len(read_metrics(out)) == 2


@pytest.mark.parametrize("redirection", [">/dev/full", "2>/dev/full >/dev/full", ">&- 2>&-", "<&- >&- 2>&-", "| true"])
def test_no_output_never_ends_a_run(images: Path, tmp_path: Path, redirection: str) -> None:
    out = tmp_path / "run"
    settings = tmp_path / "settings.yaml"
    settings.write_text(json.dumps({**MODEL, "data": str(images), "max_steps": 3, "knn_every": 0}))
    command = f"{sys.executable} -m dino_fast train --config {settings} --out {out}"
    done = subprocess.run(
        ["bash", "-o", "pipefail", "-c", f"{command} {redirection}"], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr and "Exception ignored" not in done.stderr
    assert len(read_metrics(out)) == 3 and "finished at step 3" in (out / "log.txt").read_text()
    assert (out / "export" / "teacher.safetensors").exists()


def test_a_closed_output_does_not_end_a_run_from_python(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lost = open(os.devnull, "w")  # noqa: SIM115
    lost.close()
    for number, stream in enumerate((lost, None)):
        monkeypatch.setattr(sys, "stdout", stream)
        train(_config(images, tmp_path / str(number), max_steps=2))
        assert len(read_metrics(tmp_path / str(number))) == 2


def test_a_directory_with_a_run_is_refused(images: Path, tmp_path: Path) -> None:
    train(_config(images, tmp_path / "run", max_steps=1))
    before = (tmp_path / "run" / "metrics.jsonl").read_bytes()
    with pytest.raises(UserError, match="already holds a run"):
        train(_config(images, tmp_path / "run", max_steps=1))
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == before


def test_resuming_as_another_run_is_refused(images: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    train(_config(images, out, max_steps=2))
    before = (out / "config.yaml").read_text()
    with pytest.raises(UserError, match=r"embed_dim 32 -> 64"):
        train(_config(images, out, embed_dim=64, resume=True))
    assert (out / "config.yaml").read_text() == before
    (out / "config.yaml").write_text(before.replace("embed_dim: 32", "embed_dim: 64"))
    with pytest.raises(UserError, match="another model"):
        train(_config(images, out, embed_dim=64, resume=True, max_steps=4))
    assert len(read_metrics(out)) == 2


def test_other_images_on_resume_are_refused(images: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    train(_config(images, out, max_steps=2))
    before = (out / "config.yaml").read_bytes()
    with pytest.raises(UserError, match="trains on 44 images"):
        train(_config(images / "dark", out, resume=True, max_steps=4))
    others = tmp_path / "others"
    shutil.copytree(images, others)
    for path in others.rglob("*.png"):
        Image.open(path).transpose(Image.Transpose.FLIP_LEFT_RIGHT).save(path)
    with pytest.raises(UserError, match=r"trains on other images.*100% of a sample differ"):
        train(_config(others, out, resume=True, max_steps=4))
    assert (out / "config.yaml").read_bytes() == before


def test_nothing_is_held_out_unless_asked(images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "all"
    train(_config(images, out, max_steps=2))
    said = capsys.readouterr().out
    assert "44 images of" in said and "all images are trained on; the k-NN leaves each of 44 out in turn" in said
    assert "(k=20, temperature 0.07, 44 training images, leaving one out): teacher " in said
    train(_config(images, tmp_path / "tenth", max_steps=2, hold_out=0.1))
    said = capsys.readouterr().out
    assert "40 images of" in said and "4 of 44 images are held out for the k-NN and not trained on" in said
    assert "4 held-out images): teacher " in said


def test_a_run_of_a_version_that_held_out_a_tenth_continues_so(images: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    train(_config(images, out, max_steps=2, hold_out=0.1))
    text = (out / "config.yaml").read_text()
    (out / "config.yaml").write_text(text.replace("hold_out: 0.1\n", ""))
    assert "hold_out" not in (out / "config.yaml").read_text()
    train(build_config({"out": str(out), "resume": True, "max_steps": 4}))
    assert len(read_metrics(out)) == 4


def test_the_same_images_elsewhere_continue(
    images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(images, tmp_path / "photos")
    monkeypatch.chdir(tmp_path)
    train(_config(Path("photos"), Path("run"), max_steps=2))
    assert f"data: {tmp_path / 'photos'}" in (tmp_path / "run" / "config.yaml").read_text()
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    train(build_config({"out": "../run", "resume": True, "max_steps": 4}))  # a whole path: found from here
    (tmp_path / "photos").rename(tmp_path / "moved")
    first = sorted((tmp_path / "moved").rglob("*.png"))[0]
    Image.open(first).transpose(Image.Transpose.FLIP_LEFT_RIGHT).save(first)  # one was repaired
    train(build_config({"out": "../run", "resume": True, "max_steps": 6, "data": str(tmp_path / "moved")}))
    assert len(read_metrics(tmp_path / "run")) == 6

    folder = tmp_path / "run" / "checkpoints" / "step-00000006"
    step, state = checkpoint.read(folder)
    del state["fingerprint"]  # as earlier versions wrote it
    checkpoint.save(folder.parent, step, state)
    train(build_config({"out": "../run", "resume": True, "max_steps": 8}))
    assert len(read_metrics(tmp_path / "run")) == 8
    file = tmp_path / "run" / "config.yaml"
    file.write_text(file.read_text().replace(str(tmp_path / "moved"), "moved"))
    with pytest.raises(UserError, match=r"'moved', which is not in this folder.*--data"):
        train(build_config({"out": "../run", "resume": True, "max_steps": 9}))


def test_a_loss_that_is_not_finite_leaves_its_inputs(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    build = loop.build_train_state

    def poisoned(*args: Any) -> Any:
        train_state = build(*args)
        with torch.no_grad():
            train_state.student.head.mlp[0].weight[0, 0] = torch.nan
        return train_state

    monkeypatch.setattr(loop, "build_train_state", poisoned)
    with pytest.raises(UserError, match=r"the loss of step 0 is nan") as error:
        train(_config(images, tmp_path / "run", knn_every=0))
    from safetensors.torch import load_file

    file = tmp_path / "run" / "nonfinite-step-00000000.safetensors"
    assert str(file) in str(error.value)
    saved = load_file(file)
    assert saved["global_crops"].shape == (2, 8, 3, 16, 16)
    assert saved["local_crops"].shape == (2, 8, 3, 8, 8)
    assert saved["student/head.mlp.0.weight"].isnan().any()
    assert len(saved["index"]) == 8


def test_a_full_disk_stops_with_a_sentence(images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "run"
    train(_config(images, out, max_steps=5))

    def full(file: object, block: memoryview) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "_write_block", full)
        with pytest.raises(UserError, match="no space for the checkpoint"):
            train(_config(images, out, max_steps=10, resume=True))
    train(_config(images, out, max_steps=10, resume=True))
    assert [row["step"] for row in read_metrics(out)] == list(range(10))


def test_bad_data_is_told_before_anything_is_written(images: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    out = tmp_path / "run"
    for given, message in (
        ({"data": str(tmp_path / "empty")}, "no images"),
        ({"data": str(tmp_path / "absent")}, "does not exist"),
        ({"batch_size": 64}, "batch size 64 is larger than the data set"),
        ({"mean": (0.5, 0.5), "std": (0.5, 0.5)}, "mean has 2 entries"),
        ({"arch": "vit_tini"}, "vit_tini"),
        ({"device": "cuda"}, "no GPU") if not torch.cuda.is_available() else ({"channels": 4}, "channels"),
    ):
        with pytest.raises(UserError, match=message):
            train(replace(_config(images, out), **given))
    assert not out.exists()


def test_images_without_labels_train_and_say_so(
    images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train(_config(images / "dark", tmp_path / "run", max_steps=2, channels=1, local_crops=0))
    said = capsys.readouterr().out
    assert "the images have no labels" in said and "Try next: dino-fast eval attention" in said
    assert all("knn" not in row for row in read_metrics(tmp_path / "run"))


def test_an_unreadable_image_is_skipped_and_named(images: Path, tmp_path: Path) -> None:
    import shutil

    shutil.copytree(images, tmp_path / "data")
    (tmp_path / "data" / "dark" / "0.png").write_text("not a picture")
    train(_config(tmp_path / "data", tmp_path / "run", max_steps=5, knn_every=0, batch_size=44))
    assert "dark/0.png" in (tmp_path / "run" / "log.txt").read_text()


def test_a_lost_disk_stops_the_run_after_saving_it(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, undisturbed: Path
) -> None:
    disk, out, plain = tmp_path / "disk", tmp_path / "run", Trainer.log_step
    shutil.copytree(images, disk)

    def record(trainer: Trainer, *given: Any) -> None:
        plain(trainer, *given)
        if trainer.step == 3:
            disk.rename(tmp_path / "away")

    monkeypatch.setattr(Trainer, "log_step", record)
    with pytest.raises(UserError, match=r"is the disk still there\? The last: .*disk.*Saved at step 3\. Continue with"):
        train(_config(disk, out, max_corrupt=1.0))
    assert len(read_metrics(out)) == 3
    monkeypatch.setattr(Trainer, "log_step", plain)
    (tmp_path / "away").rename(disk)
    train(_config(disk, out, max_corrupt=1.0, resume=True))
    rows, whole = read_metrics(out), read_metrics(undisturbed)
    assert [row["loss"] for row in rows] == [row["loss"] for row in whole]


def test_workers_by_device() -> None:
    assert resolve_workers(3, torch.device("cpu")) == 3
    assert resolve_workers(None, torch.device("cpu")) == 0
    assert 1 <= resolve_workers(None, torch.device("cuda")) <= 10


@pytest.mark.parametrize("background", [True, False])
def test_checkpoints_written_beside_the_training_are_the_same(
    images: Path, tmp_path: Path, undisturbed: Path, background: bool
) -> None:
    train(_config(images, tmp_path / "run", save_in_background=background, save_every=1))
    _assert_same_run(tmp_path / "run", undisturbed)


def test_a_full_disk_beside_the_training_stops_with_a_sentence(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(file: object, block: memoryview) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(checkpoint, "_write_block", full)
    with pytest.raises(UserError, match="no space for the checkpoint"):
        train(_config(images, tmp_path / "run", max_steps=3, save_in_background=True))


def test_steps_that_are_not_finite_are_passed_over_up_to_a_limit(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, bad = loop.train_step, {3, 4, 9}

    def sometimes(train_state: Any, batch: Any, hyperparams: Any, step: int) -> Any:
        if step in bad:
            batch.global_crops[0, 0, 0, 0, 0] = math.nan
        return plain(train_state, batch, hyperparams, step)

    monkeypatch.setattr(loop, "train_step", sometimes)
    given: dict[str, Any] = {"on_nonfinite": "skip", "nonfinite_limit": 3, "max_steps": 12, "knn_every": 0}
    train(_config(images, tmp_path / "run", **given))
    rows = read_metrics(tmp_path / "run")
    assert [row["step"] for row in rows if row.get("skipped")] == sorted(bad)
    assert [row["step"] for row in rows if row["loss"] is None] == sorted(bad)
    assert sorted(path.name for path in (tmp_path / "run").glob("nonfinite*")) == [
        f"nonfinite-step-{step:08d}.safetensors" for step in (3, 9)
    ]
    bad.update(range(5, 12))
    with pytest.raises(UserError, match=r"3 losses in a row are not finite; the loss of step 5 is nan"):
        train(_config(images, tmp_path / "other", **given))


def test_a_hostile_pickle_in_a_run_is_never_opened(images: Path, tmp_path: Path) -> None:
    import pickle

    class Hostile:
        def __reduce__(self) -> Any:
            return (Path.touch, (tmp_path / "executed",))

    out = tmp_path / "run"
    train(_config(images, out, max_steps=2))
    folder = next((out / "checkpoints").glob("step-*"))
    for name in ("tensors.safetensors", "state.json"):
        (folder / name).write_bytes(pickle.dumps(Hostile()))
    (folder / ".metadata").write_bytes(pickle.dumps(Hostile()))
    with pytest.raises(UserError, match="is damaged"):
        checkpoint.load(out / "checkpoints")
    file = tmp_path / "weights.pth"
    torch.save({"teacher": Hostile()}, file)
    with pytest.raises(UserError, match="could run code"):
        load_backbone(file)
    settings = tmp_path / "settings.yaml"
    settings.write_text(f"data: !!python/object/apply:pathlib.Path.touch ['{tmp_path / 'executed'}']")
    with pytest.raises(UserError, match="not valid YAML"):
        build_config(file=settings)
    assert not (tmp_path / "executed").exists()


def test_a_trace_and_another_log_on_request(images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    logged: list[Any] = []
    fake = types.ModuleType("wandb")
    fake.init = lambda **given: logged.append(given) or fake  # type: ignore[attr-defined,func-returns-value]
    fake.log = lambda row, step: logged.append((step, row))  # type: ignore[attr-defined]
    fake.finish = lambda: logged.append("finished")  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "wandb", fake)
    out = tmp_path / "run"
    train(_config(images, out, max_steps=12, knn_every=0, wandb="photos", profile=True))
    assert logged[0]["project"] == "photos" and logged[0]["config"]["embed_dim"] == 32
    assert [entry[0] for entry in logged[1:-1]] == list(range(12)) and logged[-1] == "finished"
    assert logged[1][1]["train/loss"] == read_metrics(out)[0]["loss"]
    events = json.loads((out / "trace.json").read_text())["traceEvents"]
    assert any("linear" in str(event.get("name")) for event in events)
    assert "profile" not in (out / "config.yaml").read_text()
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError, match="dino-fast\\[wandb\\]"):
        train(_config(images, tmp_path / "other", wandb="photos"))


def test_a_bf16_run_says_so(images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The bfloat16 copies replace autocast, whose absence once read as fp32 and hid the share of the peak."""
    train(_config(images, tmp_path / "run", max_steps=1, knn_every=0, precision="bf16"))
    assert ", cpu bf16, in" in capsys.readouterr().out
