from __future__ import annotations

import io
import math
import mmap
import re

import numpy as np
import pytest
import torch
from rich.console import Console

from dino_fast.engine import health
from dino_fast.engine import progress as progress_module
from dino_fast.engine.health import WINDOW, Health
from dino_fast.engine.progress import Progress, clock
from dino_fast.engine.train_step import feature_spread

K = 4096
TOP = math.log(K)


def _run(health: Health, steps: int, **metrics: float) -> list[str]:
    return [text for _ in range(steps) for text in health.check(metrics)]


# ---- feature spread ----


def test_spread_of_isotropic_and_collapsed_features() -> None:
    generator = torch.Generator().manual_seed(0)
    isotropic = torch.randn(4000, 192, generator=generator)
    # the standard error of a standard deviation over 4000 rows is 1.1 %, of the mean over 192 of them 0.1 %
    assert feature_spread(isotropic).item() == pytest.approx(1.0, abs=0.005)
    assert feature_spread(isotropic * 100).item() == pytest.approx(feature_spread(isotropic).item(), rel=1e-5)
    same = isotropic[:1].expand(50, -1)
    assert feature_spread(same).item() < 1e-6
    assert feature_spread(same + 0.001 * isotropic[:50]).item() < health.SPREAD
    assert 0.2 < feature_spread(isotropic + 3.0).item() < 0.5  # a common mean, as random networks have
    spread = feature_spread(isotropic.bfloat16().requires_grad_())
    assert spread.dtype == torch.float32 and not spread.requires_grad


@pytest.mark.parametrize("shape", [(5,), (1, 5), (2, 3, 4)])
def test_spread_refuses(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="at least two rows"):
        feature_spread(torch.ones(shape))


# ---- health ----


def test_a_healthy_run_is_left_alone() -> None:
    """Flat at first, as untrained networks are, then falling, then sharp with KL above 0."""
    health = Health(K, patience=300)
    told = _run(health, 250, teacher_entropy=0.995 * TOP, kl=0.01, feature_spread=0.2, data_wait=0.02)
    for step in range(400):
        entropy = TOP * max(0.99 - 0.004 * step, 0.01)
        told += health.check({"teacher_entropy": entropy, "kl": 0.8, "feature_spread": 0.5, "data_wait": 0.05})
    assert told == []


def test_uniform_collapse_after_learning() -> None:
    health = Health(K, patience=10_000)
    assert _run(health, 100, teacher_entropy=0.6 * TOP, kl=0.5) == []
    told = _run(health, 3 * WINDOW, teacher_entropy=0.999 * TOP, kl=0.001)
    assert len(told) == 1
    assert re.search(r"^uniform collapse.*ln K = 8\.32.*teacher_temp.*learning rate.*freeze", told[0])


def test_uniform_collapse_of_a_run_that_never_learned() -> None:
    health = Health(K, patience=300)
    assert _run(health, 300, teacher_entropy=0.999 * TOP, kl=0.001) == []
    assert len(_run(health, 300, teacher_entropy=0.999 * TOP, kl=0.001)) == 1


def test_flat_targets_with_something_to_learn_are_no_collapse() -> None:
    assert _run(Health(K), 2000, teacher_entropy=0.99 * TOP, kl=0.3) == []


def test_one_prototype_collapse() -> None:
    told = _run(Health(K), 3 * WINDOW, teacher_entropy=0.01, kl=0.002)
    assert len(told) == 1
    assert re.search(r"^one-prototype collapse.*center_momentum.*higher teacher temperature", told[0])


def test_sharp_targets_that_differ_between_images_are_no_collapse() -> None:
    assert _run(Health(K), 500, teacher_entropy=0.05, kl=1.2) == []


def test_one_odd_batch_is_no_collapse() -> None:
    health = Health(K)
    for step in range(500):
        odd = step % 20 == 0
        assert health.check({"teacher_entropy": 0.001 if odd else 0.5 * TOP, "kl": 0.0 if odd else 0.5}) == []


def test_a_second_episode_is_told_again() -> None:
    health = Health(K)
    bad, good = {"teacher_entropy": 0.001, "kl": 0.0}, {"teacher_entropy": 4.0, "kl": 0.5}
    told = [_run(health, 2 * WINDOW, **m) for m in (bad, good, bad)]  # type: ignore[arg-type]
    assert [len(texts) for texts in told] == [1, 0, 1]


def test_narrow_features() -> None:
    told = _run(Health(K), 2 * WINDOW, feature_spread=0.004, teacher_entropy=4.0, kl=0.5)
    assert len(told) == 1 and "spread 0.004" in told[0] and "data preview" in told[0]
    assert _run(Health(K), 2 * WINDOW, feature_spread=0.1) == []


def test_data_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(health, "usable_cpus", lambda: 8)
    assert _run(Health(K), 500, data_wait=0.09) == []
    told = _run(Health(K, workers=2, device="cuda"), 500, data_wait=0.25)
    assert len(told) == 1
    assert "the GPU waits 25%" in told[0] and "--workers (now 2, this machine has 8 cores)" in told[0]
    told = _run(Health(K, workers=8), 500, data_wait=0.25)
    assert "already a worker for each of the 8 cores" in told[0] and "--workers" not in told[0]
    swinging = Health(K, workers=2)  # around the bound: told once
    assert sum(len(_run(swinging, WINDOW, data_wait=wait)) for wait in (0.11, 0.09, 0.11, 0.09, 0.11)) == 1


def test_missing_and_non_finite_values() -> None:
    health = Health(K)
    assert _run(health, 200) == []
    assert _run(health, 200, teacher_entropy=math.nan, kl=math.nan, data_wait=math.inf) == []
    assert len([t for _ in range(200) for t in health.check({"teacher_entropy": None, "data_wait": torch.tensor(0.5)})])
    assert _run(Health(1), 500, teacher_entropy=0.0, kl=0.0) == []


# ---- console ----


def _metrics(step: int, **more: float) -> dict[str, float]:
    return {
        "step": step,
        "epoch": 0,
        "loss": 8.1234567,
        "teacher_entropy": 5.25,
        "images_per_second": 812.4,
        "data_wait": 0.031,
        **more,
    }


def test_plain_lines() -> None:
    out = io.StringIO()
    with Progress(100, console=Console(file=out, width=1000), interval=1000) as progress:
        for step in range(1, 51):
            progress.update(_metrics(step, **({"knn": 0.4321} if step == 10 else {})))
        progress.message("a [bold]message[/bold] " + "x" * 100)
    first, message, last = out.getvalue().splitlines()
    assert message == "a [bold]message[/bold] " + "x" * 100
    stats = r"loss 8\.1235  entropy 5\.250  img/s 812  data wait 3% \(model-bound\)  {}"
    stats += r"memory \d+(\.\d)? [MG]B  left \d+:\d\d"
    assert re.fullmatch(r"step 1/100  " + stats.format(""), first)
    assert re.fullmatch(r"step 50/100  " + stats.format(r"k-NN 43\.2%  "), last)


@pytest.mark.parametrize(("wait", "said"), [(0.09, "data wait 9% (model-bound)"), (0.4, "data wait 40% (data-bound)")])
def test_the_line_says_which_side_sets_the_pace(wait: float, said: str) -> None:
    out = io.StringIO()
    with Progress(100, console=Console(file=out, width=1000)) as progress:
        progress.update(_metrics(1) | {"data_wait": wait})
    assert said in out.getvalue()


def test_plain_lines_come_every_interval(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(progress_module.time, "monotonic", lambda: now[0])
    out = io.StringIO()
    with Progress(1000, start=400, console=Console(file=out, width=1000), interval=5.0) as progress:
        for step in range(401, 431):
            now[0] += 1.0
            progress.update(_metrics(step))
    lines = out.getvalue().splitlines()
    assert [re.search(r"step (\d+)", line)[1] for line in lines] == ["401", "406", "411", "416", "421", "426", "430"]  # type: ignore[index]
    assert lines[-1].endswith("left 9:30")  # 570 steps of a second: the steps before `start` do not count


@pytest.mark.parametrize("width", [60, 80, 120])
def test_live_bar_fits_the_terminal(width: int) -> None:
    out = io.StringIO()
    console = Console(file=out, width=width, height=20, force_terminal=True, color_system=None, legacy_windows=False)
    with Progress(100, console=console) as progress:
        progress.update(_metrics(42, knn=0.4321))
        progress.message("noted")
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", out.getvalue())
    assert "noted" in text
    frame = " ".join(text.split("noted")[-1].split())
    for part in (
        "step 42/100",
        "42%",
        "loss 8.1235",
        "entropy 5.250",
        "img/s 812",
        "data wait 3%",
        "k-NN 43.2%",
        "left",
    ):
        assert part in frame, part
    assert all(len(line) <= width for line in re.split(r"[\r\n]+", text))


def test_disabled_prints_nothing() -> None:
    out = io.StringIO()
    with Progress(10, console=Console(file=out), enabled=False, interval=0.0) as progress:
        progress.update(_metrics(1))
        progress.message("x")
    assert out.getvalue() == ""


def test_an_error_inside_passes_through() -> None:
    with pytest.raises(RuntimeError, match="boom"), Progress(10, console=Console(file=io.StringIO())) as progress:
        progress.update(_metrics(1))
        raise RuntimeError("boom")


def test_clock_and_memory() -> None:
    assert [clock(s) for s in (0.4, 75, 3675, 90061)] == ["0:00", "1:15", "1:01:15", "1d 1:01:01"]
    before = progress_module.memory()
    block = mmap.mmap(-1, 200_000_000)  # fresh pages: an allocator may hand out what the process has
    np.frombuffer(block, dtype=np.uint8)[:] = 1
    assert progress_module.memory() - before > 150e6
