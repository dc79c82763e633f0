"""Runs side by side: their settings and where these differ, their steps, losses and accuracies."""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from dino_fast.engine.config import with_present_names
from dino_fast.engine.run_dir import read_metrics
from dino_fast.errors import UserError

# Settings that change no result.
_WITHOUT_EFFECT = {"out", "resume", "workers", "device", "keep_freed_memory"}


@dataclass(frozen=True)
class Summary:
    """A run as read from its directory; `rows` are the lines of metrics.jsonl."""

    path: Path
    config: dict[str, Any]
    rows: list[dict[str, Any]]
    finished: bool

    @property
    def steps(self) -> int:
        """Number of steps taken."""
        return self.rows[-1]["step"] + 1 if self.rows else 0

    def last(self, name: str) -> Any:
        """The newest value of a metric."""
        return next((row[name] for row in reversed(self.rows) if row.get(name) is not None), None)

    def best(self, name: str) -> float | None:
        """The largest value of a metric."""
        return max((row[name] for row in self.rows if row.get(name) is not None), default=None)

    def curve(self, name: str) -> tuple[list[int], list[float]]:
        """Steps and values of a metric, where it was measured."""
        points = [(row["step"], row[name]) for row in self.rows if row.get(name) is not None]
        return [step for step, _ in points], [value for _, value in points]

    def plain(self) -> dict[str, Any]:
        """One object for `--json`."""
        speeds = self.curve("images_per_second")[1]
        return {
            "run": str(self.path), "finished": self.finished, "steps": self.steps, "epoch": self.last("epoch"),
            "loss": self.last("loss"), "teacher_entropy": self.last("teacher_entropy"), "knn": self.last("knn"),
            "best_knn": self.best("knn"), "images_per_second": statistics.median(speeds) if speeds else None,
        }  # fmt: skip


def find(paths: list[Path]) -> list[Summary]:
    """The runs in the directories: each a run itself, or a folder of runs. Raises UserError where there are none."""
    runs: list[Path] = []
    for path in paths:
        if not path.is_dir():
            raise UserError(f"{path} is not a directory; give a run, or a folder of runs")
        runs += [path] if (path / "config.yaml").exists() else sorted(x.parent for x in path.glob("*/config.yaml"))
    if not runs:
        raise UserError(
            f"no runs in {', '.join(map(str, paths))}: a run has a config.yaml. 'dino-fast train' makes one"
        )
    return [summary(path) for path in runs]


def summary(path: Path) -> Summary:
    """Reads a run. Raises UserError for a config.yaml that cannot be read."""
    try:
        config = yaml.safe_load((path / "config.yaml").read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"{path / 'config.yaml'} cannot be read: {error}") from error
    rows = read_metrics(path) if (path / "metrics.jsonl").exists() else []
    return Summary(
        path,
        with_present_names(config if isinstance(config, dict) else {}),
        rows,
        (path / "export").exists() and any((path / "export").iterdir()),
    )


def differences(runs: list[Summary]) -> dict[str, list[Any]]:
    """The settings that are not the same in all runs, each with its value in every one."""
    names = dict.fromkeys(name for run in runs for name in run.config if name not in _WITHOUT_EFFECT)
    values = {name: [run.config.get(name) for run in runs] for name in names}
    return {name: row for name, row in values.items() if any(value != row[0] for value in row)}


def table(runs: list[Summary]) -> Any:
    """The runs as a table for the console."""
    from rich.table import Table

    shown = Table(box=None, pad_edge=False)
    for head in ("run", "model", "data", "steps", "loss", "entropy", "k-NN", "best", "img/s", ""):
        shown.add_column(head, justify="left" if head in ("run", "model", "data", "") else "right", overflow="fold")
    for run in runs:
        facts = run.plain()
        shown.add_row(
            str(run.path),
            f"{run.config.get('arch')}/{run.config.get('patch_size')}",
            Path(str(run.config.get("data"))).name,
            f"{run.steps:,}",
            *(_number(facts[name], "{:.4f}") for name in ("loss", "teacher_entropy")),
            *(_number(facts[name], "{:.1%}") for name in ("knn", "best_knn")),
            _number(facts["images_per_second"], "{:.0f}"),
            "finished" if run.finished else "not finished",
        )
    return shown


def plot(runs: list[Summary], file: Path) -> None:
    """Curves of loss, teacher entropy and k-NN accuracy over the steps, one color a run."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    names = [("loss", "loss"), ("teacher_entropy", "teacher entropy (nats)"), ("knn", "teacher k-NN")]
    figure, axes = pyplot.subplots(1, len(names), figsize=(15, 4.2), layout="constrained")
    for axis, (name, label) in zip(axes, names, strict=True):
        for run in runs:
            steps, values = run.curve(name)
            axis.plot(steps, values, label=str(run.path), marker="o" if name == "knn" else None, linewidth=1.2)
        axis.set_xlabel("step")
        axis.set_title(label)
        axis.grid(alpha=0.3)
    axes[0].legend(fontsize=8)
    try:
        figure.savefig(file, dpi=110)
    except (OSError, ValueError) as error:
        raise UserError(f"--plot {file} cannot be written: {error}") from error
    finally:
        pyplot.close(figure)


def _number(value: Any, form: str) -> str:
    return "-" if value is None else form.format(value)
