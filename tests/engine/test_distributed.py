from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from dino_fast.engine import checkpoint, train
from dino_fast.engine.config import build_config
from dino_fast.engine.distributed import SINGLE_PROCESS, first_host, read_environment
from dino_fast.engine.run_dir import read_metrics
from dino_fast.ops.linear_dino_loss import linear_dino_loss_reference
from tests.engine.ranks_worker import CASES, LOSSES, STEPS, TINY, loss_case, run_with_bad_steps, trained


def start(world: int, *words: str, **variables: str) -> list[subprocess.Popen[str]]:
    """As torchrun starts them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    given = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(world), "OMP_NUM_THREADS": "1"}
    given["PYTHONWARNINGS"] = "error::FutureWarning"  # names that the newest torch deprecates
    return [
        subprocess.Popen(
            [sys.executable, *words],
            env={**os.environ, **given, "RANK": str(rank), "LOCAL_RANK": str(rank), **variables},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(world)
    ]


def finish(processes: list[subprocess.Popen[str]], code: int = 0) -> list[str]:
    outputs = [process.communicate(timeout=400)[0] for process in processes]
    assert [process.returncode for process in processes] == [code] * len(processes), "\n\n".join(outputs)
    return outputs


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What two processes find."""
    file = tmp_path_factory.mktemp("ranks") / "two.pt"
    finish(start(2, "-m", "tests.engine.ranks_worker", "messages,loss,nonfinite,mixed,train,late", str(file)))
    return torch.load(file, weights_only=False)  # written above


@pytest.mark.parametrize("case", range(len(CASES)))
def test_two_processes_train_as_one(case: int, two: dict[str, Any]) -> None:
    expected = trained(build_config({**TINY, **CASES[case]}), SINGLE_PROCESS)
    losses = torch.tensor([row["loss"] for row in expected["rows"]])
    assert len(losses) == STEPS and (case == 2 or losses.max() - losses.min() > 0.05)
    for shard in ("none", "grads", "full"):
        found = two["train"][case, shard]
        for name in ("loss", "teacher_entropy", "kl"):
            a, b = (torch.tensor([row[name] for row in x["rows"]]) for x in (found, expected))
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5 if name == "kl" else 1e-6, msg=f"{shard} {name}")
        assert_near(found["state"], expected["state"], shard)


def assert_near(found: dict[str, Any], expected: dict[str, Any], where: str) -> None:
    """Equal weights, moments and centre, but for the keys' biases: their gradients are rounding errors alone."""
    for part in ("student", "teacher", "dino_loss"):
        assert found[part].keys() == expected[part].keys()
        for name, value in expected[part].items():
            rows = torch.ones(len(value), dtype=torch.bool)
            if name.endswith("qkv.bias"):
                rows[len(value) // 3 : 2 * len(value) // 3] = False
            torch.testing.assert_close(
                found[part][name][rows], value[rows], rtol=1e-5, atol=1e-5, msg=lambda m, n=name: f"{where} {n} {m}"
            )
    for index, entries in expected["optimizer"]["state"].items():
        assert found["optimizer"]["state"][index]["step"] == entries["step"]
        assert found["optimizer"]["state"][index]["exp_avg"].shape == entries["exp_avg"].shape


@pytest.mark.parametrize("K,backend", LOSSES)
def test_cut_prototypes_give_the_whole_ones_loss_and_gradients(K: int, backend: str, two: dict[str, Any]) -> None:
    tensors = loss_case(K)
    leaves = [tensors[name].requires_grad_() for name in ("student", "student_weight", "student_gain")]
    pairs = torch.ones(2, 5).fill_diagonal_(0)
    images = tensors["student"].shape[1]
    expected = linear_dino_loss_reference(
        **tensors,
        pair_weights=pairs / pairs.sum(),
        row_weights=torch.full((images,), 1 / images),
        student_temp=0.1,
        teacher_temp=0.04,
    )
    (3 * expected.loss).backward()
    loss, entropy, *gradients = two["loss"][K, backend]
    torch.testing.assert_close(loss, expected.loss.detach(), rtol=1e-5, atol=1e-6)
    for found, leaf in zip(gradients, leaves, strict=True):
        close(found, leaf.grad)
    weight, gain, center = (tensors[name] for name in ("teacher_weight", "teacher_gain", "center"))
    logits = tensors["teacher"].double() @ (weight * (gain / weight.norm(dim=1))[:, None]).double().T
    targets = ((logits - center.double()) / 0.04).log_softmax(-1)
    exact = -(targets.exp() * targets).sum(-1).mean().float()
    torch.testing.assert_close(entropy, exact, rtol=1e-5, atol=1e-6)


def close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5 * max(1e-3, float(expected.abs().max())))


def test_a_loss_that_is_not_finite_in_one_process_changes_nothing_in_any(two: dict[str, Any]) -> None:
    for before, after in two["nonfinite"].values():
        for part in ("student", "teacher", "dino_loss"):
            assert all(torch.equal(after[part][name], value) for name, value in before[part].items())
        for entries in after["optimizer"]["state"].values():
            assert not any(x.any() for x in entries.values())


def test_bad_steps_read_late_are_passed_over_by_all(two: dict[str, Any], tmp_path: Path) -> None:
    expected = read_metrics(run_with_bad_steps(tmp_path / "one", SINGLE_PROCESS))
    assert [row.get("skipped", False) for row in expected] == [False, False, True, True, False, False]
    for path in map(Path, two["late"].values()):
        rows = read_metrics(path)
        assert [row.get("skipped") for row in rows] == [row.get("skipped") for row in expected]
        for row, other in zip(rows, expected, strict=True):
            assert row["loss"] == (None if other["loss"] is None else pytest.approx(other["loss"], rel=1e-5))
        names = sorted(file.name for file in path.glob("nonfinite*"))
        assert names == ["nonfinite-step-00000002-process-1.safetensors", "nonfinite-step-00000002.safetensors"]


def test_sixteen_bits_over_two_processes_stay_near(two: dict[str, Any]) -> None:
    for precision, scale in (
        ("fp16", 2.0**15),
        ("bf16", 1.0),
    ):  # the first step overflows float16 and halves the factor
        whole, _ = two["mixed"][precision, "none", "none"]
        for kept in ("none", "selective"):
            losses, found = two["mixed"][precision, "full", kept]
            assert found == scale
            assert losses == pytest.approx(whole, rel=0.005) and losses != whole


def test_what_processes_tell_each_other(two: dict[str, Any]) -> None:
    largest, rows, mean, first = two["messages"]
    assert largest == [1, 0]
    assert rows.tolist() == [[0, 0], [1, 1], [1, 1]]
    assert (mean.item(), first) == (0.5, 0)


RUN: dict[str, Any] = {
    "arch": "vit_tiny", "embed_dim": 32, "depth": 2, "num_heads": 2, "patch_size": 4, "global_size": 16,
    "local_size": 8,
    "local_crops": 2, "out_dim": 64, "head_hidden_dim": 32, "head_bottleneck_dim": 16, "drop_path_rate": 0.0,
    "batch_size": 12, "epochs": 4, "warmup_epochs": 1, "lr": 0.01, "knn_every": 2, "device": "cpu",
}  # fmt: skip


def test_a_checkpoint_of_two_processes_resumes_on_one_and_on_three(tmp_path: Path) -> None:
    images = tmp_path / "images"
    random = np.random.default_rng(0)
    for name, low in (("dark", 0), ("light", 128)):
        (images / name).mkdir(parents=True)
        for i in range(20):
            pixels = random.integers(low, low + 128, (20, 24, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(images / name / f"{i}.png")
    config = {**RUN, "data": str(images)}
    train(build_config({**config, "out": str(tmp_path / "one")}))
    expected = read_metrics(tmp_path / "one")
    assert len(expected) == 12

    (tmp_path / "settings.yaml").write_text(json.dumps(config))
    command = ("-m", "dino_fast", "train", "--config", str(tmp_path / "settings.yaml"))
    outputs = finish(start(2, *command, "--out", str(tmp_path / "two"), "--max-steps", "6", "--fsdp", "full"))
    assert "2 processes (fsdp full)" in outputs[0] and not outputs[1]
    assert len(read_metrics(tmp_path / "two")) == 6
    shutil.copytree(tmp_path / "two", tmp_path / "three")
    more = ("--resume", "--max-steps", "12")
    train(build_config({"out": str(tmp_path / "two"), "resume": True, "max_steps": 12, "fsdp": "none"}))
    finish(start(3, "-m", "dino_fast", "train", "--out", str(tmp_path / "three"), "--fsdp", "grads", *more))
    (_, whole) = checkpoint.load(tmp_path / "one" / "checkpoints") or pytest.fail("no checkpoint")
    for name in ("two", "three"):
        rows = read_metrics(tmp_path / name)
        for key in ("loss", "teacher_entropy"):
            assert [row[key] for row in rows] == pytest.approx([row[key] for row in expected], rel=1e-5), name
        assert [row.get("knn") for row in rows] == pytest.approx([row.get("knn") for row in expected])
        step, state = checkpoint.load(tmp_path / name / "checkpoints") or pytest.fail("no checkpoint")
        assert step == 12
        assert_near(state, whole, name)
        assert (tmp_path / name / "export" / "teacher.safetensors").exists()


@pytest.mark.slow
def test_torchrun_starts_the_processes_anew_when_one_is_lost(tmp_path: Path) -> None:
    out = tmp_path / "run"
    words = [
        "train",
        "--data",
        "demo",
        "--resume",
        "--out",
        str(out),
        "--max-steps",
        "150",
        "--fsdp",
        "full",
        "--knn-every",
        "0",
    ]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*launcher, "--max-restarts", "1", "-m", "dino_fast", *words, "--save-every", "0.05", "--knn-every", "0"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    while not list((out / "checkpoints").glob("step-*")) and process.poll() is None:
        time.sleep(0.05)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    workers = [pid for pid in children if "dino_fast" in Path(f"/proc/{pid}/cmdline").read_text()]
    os.kill(int(workers[-1]), signal.SIGKILL)
    (output,) = finish([process])
    assert "continuing at step" in output
    assert [row["step"] for row in read_metrics(out)] == list(range(150))


def test_processes_refuse_a_directory_together(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "metrics.jsonl").write_text("")
    outputs = finish(start(2, "-m", "dino_fast", "train", "--out", str(tmp_path / "run")), code=2)
    assert all("already holds a run" in text for text in outputs)


def test_place_among_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    assert read_environment({}) == (0, 1, 0, 1)
    assert read_environment({"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4"}) == (
        5,
        8,
        1,
        4,
    )
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    batch_script = {"SLURM_NTASKS": "8", "SLURM_PROCID": "0", "SLURM_JOB_ID": "71234"}
    assert read_environment(batch_script) == (0, 1, 0, 1)  # not started by srun
    step = {
        "SLURM_PROCID": "6", "SLURM_LOCALID": "2", "SLURM_STEP_NUM_TASKS": "8", "SLURM_STEP_TASKS_PER_NODE": "4(x2)",
        "SLURM_STEP_NODELIST": "gpu[03-05,9],other", "SLURM_JOB_ID": "71234",
    }  # fmt: skip
    assert read_environment(step) == (6, 8, 2, 4)
    assert (os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"]) == ("gpu03", "31234")
    assert [first_host(x) for x in ("a1,a2", "node-1", "n[7]", "n[1,4-5]")] == ["a1", "node-1", "n7", "n1"]
