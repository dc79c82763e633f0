from __future__ import annotations

import errno
import json
import math
import os
import pickle
import random
import signal
import subprocess
import sys
import textwrap
import time
import warnings
from pathlib import Path

import pytest
import torch

from dino_fast.engine import checkpoint
from dino_fast.errors import UserError


def _same(a: object, b: object) -> bool:
    if isinstance(a, torch.Tensor):
        assert isinstance(b, torch.Tensor)
        if (a.dtype, a.shape) != (b.dtype, b.shape):
            return False
        return checkpoint._bytes(a).tolist() == checkpoint._bytes(b).tolist()
    if type(a) is not type(b):
        return False
    if isinstance(a, dict):
        return list(a) == list(b) and all(_same(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(_same, a, b))
    if isinstance(a, float) and math.isnan(a):
        return math.isnan(b)
    return a == b and (not isinstance(a, float) or math.copysign(1, a) == math.copysign(1, b))


def _state(value: float = 1.0) -> dict:
    return {"student": {"w": torch.full((1000,), value)}, "epoch": 3, "note": "x"}


def test_round_trip_bit_for_bit(tmp_path: Path) -> None:
    storage = torch.randn(8, 6)
    odd = torch.tensor([float("nan"), float("inf"), -0.0, 1e-45])
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.randn(3))])
    optimizer.param_groups[0]["params"][0].grad = torch.ones(3)
    optimizer.step()
    state = {
        "rng": {"torch": torch.get_rng_state(), "python": random.getstate(), "seed": 2**64 - 1},
        "bf16": torch.randn(5).bfloat16(),
        "half": torch.randn(3, 2).half(),
        "scalar": torch.tensor(3.5),
        "empty": torch.empty(0, 4),
        "bool": torch.tensor([True, False]),
        "complex": torch.randn(2, 3, dtype=torch.complex128).conj(),
        "complex scalar": torch.tensor(1 + 2j),
        "shared": [storage, storage, storage[2:5], storage.t(), storage[:, ::2]],
        "expanded": torch.ones(1).expand(4),
        "odd": odd,
        "parameter": torch.nn.Parameter(torch.ones(2)),
        "optimizer": optimizer.state_dict(),
        "a/b": torch.ones(1),
        "a": {"b": torch.zeros(1)},
        "values": [1, -(2**70), 0.1, -0.0, math.inf, -math.inf, math.nan, "ü\n", "", True, False, None, [], {}, ()],
        "$tensor": "not one",
        "unicode κ": {"π": 3.14, 7: "int key"},
    }
    folder = checkpoint.save(tmp_path / "c", 12, state)
    assert folder.name == "step-00000012"
    assert sorted(p.name for p in folder.iterdir()) == ["state.json", "tensors.safetensors"]
    loaded = checkpoint.load(tmp_path / "c")
    assert loaded is not None and loaded[0] == 12
    assert _same({**state, "parameter": state["parameter"].detach()}, loaded[1])
    random.setstate(loaded[1]["rng"]["python"])
    torch.set_rng_state(loaded[1]["rng"]["torch"])
    optimizer.load_state_dict(loaded[1]["optimizer"])
    json.loads((folder / "state.json").read_text(), parse_constant=lambda word: pytest.fail(f"{word} is not JSON"))


def test_tensors_read_by_the_library(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    state = {
        "student": {"backbone.cls_token": torch.randn(1, 1, 4), "n": torch.tensor(2)},
        "t": torch.ones(3).bfloat16(),
    }
    stored = load_file(checkpoint.save(tmp_path, 1, state) / "tensors.safetensors")
    assert stored.keys() == {"student/backbone.cls_token", "student/n", "t"}
    assert torch.equal(stored["student/backbone.cls_token"], state["student"]["backbone.cls_token"])


def test_loaded_tensors_do_not_depend_on_the_file(tmp_path: Path) -> None:
    folder = checkpoint.save(tmp_path, 1, _state(2.0))
    loaded = checkpoint.load(tmp_path)
    assert loaded is not None
    with open(folder / "tensors.safetensors", "r+b") as file:
        file.write(b"\xff" * os.path.getsize(file.name))
    assert torch.equal(loaded[1]["student"]["w"], torch.full((1000,), 2.0))


@pytest.mark.parametrize("value", [object(), {1.5: 0}, b"bytes", {1, 2}])
def test_unsupported_value_is_named(tmp_path: Path, value: object) -> None:
    with pytest.raises(TypeError, match="deep/0/here"):
        checkpoint.save(tmp_path, 1, {"deep": [{"here": value}]})
    assert checkpoint.load(tmp_path) is None


def test_nothing_there(tmp_path: Path) -> None:
    assert checkpoint.load(tmp_path) is None
    assert checkpoint.load(tmp_path / "absent") is None


def _truncate(folder: Path) -> None:
    os.truncate(folder / "tensors.safetensors", 2000)


def _flip(folder: Path, name: str = "tensors.safetensors", at: int = -100) -> None:
    data = bytearray((folder / name).read_bytes())
    data[at] ^= 4
    (folder / name).write_bytes(data)


def _rewrite(folder: Path, body: dict) -> None:
    """state.json with a checksum that fits, as an attacker or a later version would write it."""
    body.pop("crc32", None)
    (folder / "state.json").write_text(json.dumps({"crc32": checkpoint._crc(body), **body}))


DAMAGES = {
    "truncated": (_truncate, "2000 bytes"),
    "bit flip in a tensor": (_flip, "checksum"),
    "bit flip in the header": (lambda f: _flip(f, at=12), "checksum"),
    "bit flip in the state": (lambda f: _flip(f, "state.json", -4), "checksum|not whole"),
    "cut state": (lambda f: os.truncate(f / "state.json", 50), "not whole"),
    "empty state": (lambda f: os.truncate(f / "state.json", 0), "not whole"),
    "no state": (lambda f: (f / "state.json").unlink(), "missing"),
    "no tensors": (lambda f: (f / "tensors.safetensors").unlink(), "missing"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_is_named_and_the_previous_used(tmp_path: Path, damage: str) -> None:
    checkpoint.save(tmp_path, 1, _state(1.0))
    newest = checkpoint.save(tmp_path, 2, _state(2.0))
    apply, reason = DAMAGES[damage]
    apply(newest)
    with pytest.warns(UserWarning, match=reason) as caught:
        loaded = checkpoint.load(tmp_path)
    assert "step-00000002" in str(caught[0].message)
    assert loaded is not None and loaded[0] == 1 and _same(loaded[1], _state(1.0))
    with pytest.raises(UserError):
        checkpoint.read(newest)


def test_every_flipped_byte_is_found(tmp_path: Path) -> None:
    folder = checkpoint.save(tmp_path, 1, {"w": torch.arange(4.0), "x": 0.25, "y": [1, "two"]})
    for name in ("tensors.safetensors", "state.json"):
        whole = (folder / name).read_bytes()
        for at in range(len(whole)):
            (folder / name).write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
            try:
                step, state = checkpoint.read(folder)
            except UserError:
                continue
            # only white space or the spelling of the same JSON may differ without harm
            assert step == 1 and _same(state, {"w": torch.arange(4.0), "x": 0.25, "y": [1, "two"]}), (name, at)
        (folder / name).write_bytes(whole)


def test_another_format_is_refused_with_a_reason(tmp_path: Path) -> None:
    folder = checkpoint.save(tmp_path, 1, _state())
    body = json.loads((folder / "state.json").read_text())
    _rewrite(folder, {**body, "format": 99})
    with pytest.raises(UserError, match="format 99"):
        checkpoint.load(tmp_path)


def test_keeps_the_last_and_the_best(tmp_path: Path) -> None:
    for step in range(1, 5):
        checkpoint.save(tmp_path, step, _state(step), keep=2)
        if step == 1:
            checkpoint.mark_best(tmp_path, 1)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["best", "step-00000001", "step-00000003", "step-00000004"]
    assert checkpoint.read(tmp_path / "best")[0] == 1
    assert checkpoint.load(tmp_path)[0] == 4  # type: ignore[index]
    checkpoint.mark_best(tmp_path, 4)
    assert _same(checkpoint.read(tmp_path / "best")[1], _state(4))
    assert os.readlink(tmp_path / "best") == "step-00000004"  # relative: the run may be moved
    checkpoint.save(tmp_path, 5, _state(5), keep=2)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["best", "step-00000004", "step-00000005"]
    with pytest.raises(FileNotFoundError, match="step 9"):
        checkpoint.mark_best(tmp_path, 9)


def test_the_link_to_the_best_is_replaced_in_one_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for step in (1, 2):
        checkpoint.save(tmp_path, step, _state(step))
    checkpoint.mark_best(tmp_path, 1)
    monkeypatch.setattr(os, "rename", None)  # nothing is moved aside: a reader always finds a best one
    checkpoint.mark_best(tmp_path, 2)
    assert checkpoint.read(tmp_path / "best")[0] == 2


@pytest.mark.parametrize("code", [errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS])
def test_the_best_is_a_copy_where_there_are_no_links(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(code, "no links here")

    monkeypatch.setattr(os, "symlink", refuse)
    for step in (1, 2):
        checkpoint.save(tmp_path, step, _state(step), keep=1)
        checkpoint.mark_best(tmp_path, step)
        checkpoint.save(tmp_path, step, _state(step + 0.5))
    assert _same(checkpoint.read(tmp_path / "best")[1], _state(2))
    assert _same(checkpoint.load(tmp_path)[1], _state(2.5))  # type: ignore[index]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["best", "step-00000002"]
    monkeypatch.undo()  # the run goes on where links work, and back
    checkpoint.mark_best(tmp_path, 2)
    assert (tmp_path / "best").is_symlink()
    monkeypatch.setattr(os, "symlink", refuse)
    checkpoint.mark_best(tmp_path, 2)
    assert not (tmp_path / "best").is_symlink() and checkpoint.read(tmp_path / "best")[0] == 2
    assert not list(tmp_path.glob(".*"))


def test_a_full_disk_leaves_the_best_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    for step in (1, 2):
        checkpoint.save(tmp_path, step, _state(step))
    checkpoint.mark_best(tmp_path, 1)
    monkeypatch.setattr(os, "symlink", full)
    with pytest.raises(UserError, match="no space"):
        checkpoint.mark_best(tmp_path, 2)
    assert checkpoint.read(tmp_path / "best")[0] == 1 and not list(tmp_path.glob(".*"))


def test_a_damaged_later_one_never_costs_the_newest_whole_one(tmp_path: Path) -> None:
    _flip(checkpoint.save(tmp_path, 9, _state(9)))
    for step in (5, 6):
        checkpoint.save(tmp_path, step, _state(step), keep=1)
        with pytest.warns(UserWarning, match="step-00000009"):
            assert checkpoint.load(tmp_path)[0] == step  # type: ignore[index]
    checkpoint.save(tmp_path, 10, _state(10), keep=2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert checkpoint.load(tmp_path)[0] == 10  # type: ignore[index]


def test_interrupted_replacement_is_found_and_tidied(tmp_path: Path) -> None:
    os.rename(checkpoint.save(tmp_path, 4, _state(4)), tmp_path / ".old-step-00000004")
    (tmp_path / ".tmp-step-00000004-abc").mkdir()
    (tmp_path / ".tmp-best-abc").symlink_to("step-00000003")
    assert checkpoint.load(tmp_path)[0] == 4  # type: ignore[index]
    checkpoint.save(tmp_path, 5, _state(5))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-00000004", "step-00000005"]


def test_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint.save(tmp_path, 1, _state(1), keep=1)

    def full(file: object, block: memoryview) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "_write_block", full)
        with pytest.raises(UserError, match=r"0\.\d MB and the disk mounted at /.* MB left.*--resume"):
            checkpoint.save(tmp_path, 2, {"w": torch.zeros(50_000)}, keep=1)
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000001"]
    assert checkpoint.load(tmp_path)[0] == 1  # type: ignore[index]


class _Hostile:
    def __init__(self, target: str) -> None:
        self.target = target

    def __reduce__(self) -> tuple:
        return (os.mkdir, (self.target,))


def test_a_pickle_is_never_read(tmp_path: Path) -> None:
    victim = tmp_path / "executed"
    poison = pickle.dumps(_Hostile(str(victim)))
    checkpoint.save(tmp_path, 1, _state(1))
    for name in ("tensors.safetensors", "state.json", "state.pkl", "state.pth"):
        folder = checkpoint.save(tmp_path, 2, _state(2))
        (folder / name).write_bytes(poison)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            assert checkpoint.load(tmp_path)[0] == (1 if name in ("tensors.safetensors", "state.json") else 2)  # type: ignore[index]
    # even where size and checksum are made to fit
    folder = checkpoint.save(tmp_path, 2, _state(2))
    (folder / "tensors.safetensors").write_bytes(poison)
    body = json.loads((folder / "state.json").read_text())
    body.update(tensors_bytes=len(poison), tensors_crc32=checkpoint._file_crc(folder / "tensors.safetensors"))
    _rewrite(folder, body)
    with pytest.warns(UserWarning, match="do not fit together"):
        assert checkpoint.load(tmp_path)[0] == 1  # type: ignore[index]
    assert not victim.exists()
    pickle.loads(poison)
    assert victim.exists()  # the poison works; it was not taken


WRITER = """
    import sys, time, torch
    from pathlib import Path
    from dino_fast.engine import checkpoint
    plain = checkpoint._write_block
    checkpoint._CHUNK = 1 << 14
    def slow(file, block):
        plain(file, block); file.flush(); time.sleep(0.002)
    checkpoint._write_block = slow
    step = int(sys.argv[2])
    print("ready", flush=True)
    while True:
        step += 1
        checkpoint.save(Path(sys.argv[1]), step, {"w": torch.full((40_000,), float(step)), "step": step}, keep=1)
        checkpoint.mark_best(Path(sys.argv[1]), step)
        print(step, flush=True)
"""


def test_kill_in_the_middle_never_loses_the_previous(tmp_path: Path) -> None:
    """Writing takes ~20 ms of each ~25 ms here, so a kill at a random time lands inside a save."""
    draw, done, cut = random.Random(0), 0, 0
    for _ in range(4):
        command = [sys.executable, "-c", textwrap.dedent(WRITER), str(tmp_path), str(done)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as writer:
            assert writer.stdout is not None
            assert writer.stdout.readline() == "ready\n"
            for _ in range(2):
                done = int(writer.stdout.readline())
            time.sleep(draw.uniform(0.0, 0.1))
            writer.send_signal(signal.SIGKILL)
            done = max([done, *map(int, writer.stdout.read().split())])
        cut += bool(list(tmp_path.glob(".tmp-*")))
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # nothing damaged may carry a checkpoint's name
            loaded = checkpoint.load(tmp_path)
        assert loaded is not None and loaded[0] in (done, done + 1)
        assert torch.equal(loaded[1]["w"], torch.full((40_000,), float(loaded[0])))
        best_step, best = checkpoint.read(tmp_path / "best")
        assert best_step in (done, done + 1) and best["step"] == best_step
        done = loaded[0]
    assert cut, "no kill fell into a write: the test proved nothing"
