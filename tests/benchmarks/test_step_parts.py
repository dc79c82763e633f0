from __future__ import annotations

import itertools
import json
import re
import time
from dataclasses import fields, replace

import pytest
import torch
import yaml

from dino_fast.benchmarks import bench_step, command, step_parts
from dino_fast.engine.build import build_train_state
from dino_fast.engine.config import Config, to_dict
from dino_fast.engine.schedules import Schedules
from dino_fast.engine.train_step import train_step
from dino_fast.errors import UserError
from tests.engine.test_train_step import _batch, _config

CPU = torch.device("cpu")
TINY = Config(
    channels=3, global_size=16, local_size=8, local_crops=2, arch="vit_tiny", patch_size=4, embed_dim=32, depth=2,
    num_heads=2, drop_path_rate=0.0, out_dim=256, head_hidden_dim=64, head_bottleneck_dim=32, batch_size=8,
    device="cpu",
)  # fmt: skip


def test_parts_add_up_to_the_step():
    rows = step_parts.parts(TINY, seconds=0.5)
    assert [row.contender for row in rows] == [*step_parts.PARTS, "whole step"]
    assert all(row.ms and row.ms > 0 and row.dtype == "float32" for row in rows)
    *each, whole = rows
    assert sum(row.ms for row in each) == pytest.approx(whole.ms, rel=0.25)  # medians of each
    shares = [float(row.note.split("%")[0]) for row in each]
    assert sum(shares) == pytest.approx(100, abs=25)
    largest = max(each, key=lambda row: row.ms).contender
    assert f"the largest part is {largest} (" in whole.note
    assert whole.note.endswith(step_parts.advice(largest, TINY, CPU))


@pytest.mark.parametrize("accumulate", [1, 2])
def test_the_stopwatch_gives_each_part_its_time(accumulate, monkeypatch):
    config = _config(accumulate=accumulate)
    run = build_train_state(config, 3, CPU, "fp32")
    marks = []
    watch = step_parts.Stopwatch(CPU)
    run.on_phase = lambda part: (marks.append(part), watch(part))
    watch("data")
    train_step(run, _batch(0, config), Schedules(config, 5).values_at(6), 1)
    watch.end()
    assert marks == ["teacher", "student", "loss", "backward"] * accumulate + ["optimizer"]
    assert all(ms > 0 for ms in watch.laps[0].values())

    clock = itertools.count(0.0, 2.0)  # every look at it is two seconds later
    monkeypatch.setattr(time, "perf_counter", lambda: next(clock))
    for part in ("data", "teacher", "loss", "teacher", "loss"):
        watch(part)
    watch.end()
    assert watch.laps[1] == {
        "data": 2000, "teacher": 4000, "student": 0, "loss": 4000, "backward": 0, "optimizer": 0
    }  # fmt: skip


CONFIGS = [
    TINY,
    *(replace(TINY, **given) for given in (
        {"local_crops": 0}, {"drop_path_rate": 0.1}, {"checkpoint_activations": "full"}, {"loss_impl": "logits"},
        {"compile": True}, {"precision": "fp32"}, {"precision": "fp32", "tf32": True}, {"augment_on": "cpu"},
        {"augment_on": "gpu", "decode_on": "gpu"},
    )),
]  # fmt: skip


@pytest.mark.parametrize("part", step_parts.PARTS)
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_advice_names_options_that_there_are_and_that_change_something(part, device):
    known = {f"--{field.name.replace('_', '-')}": field.name for field in fields(Config)}
    for config in CONFIGS:
        text = step_parts.advice(part, config, torch.device(device))
        assert "\n" not in text and text[-1] != "."
        found = re.findall(r"(--[a-z0-9-]+)(?: ([a-z0-9]+))?", text)
        assert found or "images stored smaller" in text
        for option, value in found:
            assert option in known, text
            assert str(getattr(config, known[option])) != value, (text, config)  # it is not so already


def test_the_command_times_a_runs_parts(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(bench_step, "comparisons", lambda quick: pytest.fail("only the parts were asked for"))
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump({k: list(v) if isinstance(v, tuple) else v for k, v in to_dict(TINY).items()}))
    parser = command.argparse.ArgumentParser()
    command.add_arguments(parser)
    assert command.run(parser.parse_args(["step", "--quick", "--json", "--config", str(file)])) == 0
    (result,) = json.loads(capsys.readouterr().out)
    assert len(result["rows"]) == 7 and "K256" in result["rows"][0]["shape"]
    assert list(tmp_path.iterdir()) == [file]
    with pytest.raises(UserError, match="dino-fast bench step --config FILE"):
        command.run(parser.parse_args(["dino_loss", "--config", str(file)]))
