"""The page of a run, rendered from template.html; a part of the run that is missing is named in its section."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from dino_fast.engine.config import Config, load_config, to_dict
from dino_fast.engine.run_dir import MARKS, read_metrics, run_marks
from dino_fast.errors import UserError
from dino_fast.report.curves import Curve, Row, chart, points


def render_report(run: Path, data: str | None = None, images: int = 1000, device: str | None = None) -> str:
    """One self-contained HTML page about the run in the directory `run`, finished or not.

    `data` replaces the run's own images; `images` is how many of them are compared; `device` as torch names it, by
    default a GPU if there is one. Raises UserError if `run` holds no run.
    """
    from dino_fast.cli.info import as_text, collect
    from dino_fast.report.pictures import draw_pictures

    if not run.is_dir():
        problem = "is a file" if run.exists() else "does not exist"
        raise UserError(f"{run} {problem}; give the directory of a run{_near(run)}")
    if not run_marks(run):
        raise UserError(f"{run} is not a run: it holds none of {', '.join(MARKS)}. Give the --out of a training")
    rows = read_metrics(run) if (run / "metrics.jsonl").exists() else []
    config, config_error, config_text = _read_config(run)
    values = to_dict(config) if config else {}
    pictures, no_pictures = None, ""
    try:
        pictures = draw_pictures(run, config, data, images, device)
    except UserError as error:
        no_pictures = str(error)
    environment = Environment(
        loader=PackageLoader("dino_fast.report", ""), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    return environment.get_template("template.html").render(
        name=run.resolve().name,
        path=run,
        time=f"{datetime.now():%Y-%m-%d %H:%M:%S}",
        summary=_summary(rows, values),
        tiles=_tiles(rows),
        rows=rows,
        charts=_charts(rows, values),
        has_knn=any("knn" in row for row in rows),
        pictures=pictures,
        no_pictures=no_pictures,
        log=_log(run),
        config_error=config_error,
        config_text=config_text,
        settings=_settings(values),
        environment=as_text(collect()),
    )


def _read_config(run: Path) -> tuple[Config | None, str, str]:
    """(the run's configuration, "", "") or, if it cannot be read, (None, the reason, the file's text)."""
    path = run / "config.yaml"
    try:
        return load_config(path), "", ""
    except UserError as error:
        return None, str(error), path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""


def _charts(rows: Sequence[Row], values: dict[str, Any]) -> list[str]:
    out_dim = values.get("out_dim")
    top = ("ln K", math.log(out_dim)) if isinstance(out_dim, int) and out_dim > 1 else None
    knn = [
        Curve("teacher", points(rows, "knn", 100), "c1", dots=True),
        Curve("student", points(rows, "knn_student", 100), "c2", dots=True),
    ]
    return [
        chart("Loss", [Curve("loss", points(rows, "loss"))]),
        chart("Teacher entropy (nats)", [Curve("entropy", points(rows, "teacher_entropy"))], level=top),
        chart("KL, loss less entropy (nats)", [Curve("KL", points(rows, "kl"))]),
        chart("k-NN accuracy", knn, "\u00a0%"),
        chart("Learning rate", [Curve("lr", points(rows, "lr"))]),
        chart("Images/s", [Curve("images/s", points(rows, "images_per_second"))]),
    ]


def _summary(rows: Sequence[Row], values: dict[str, Any]) -> str:
    parts = [f"{values['arch']}/{values.get('patch_size')}"] if "arch" in values else []
    parts += [f"images of {values['data']}"] if "data" in values else []
    parts += [f"batches of {values['batch_size']}"] if "batch_size" in values else []
    if rows:
        parts.append(f"epoch {rows[-1].get('epoch', 0) + 1} of {values.get('epochs', '?')}")
    return ", ".join(parts)


def _tiles(rows: Sequence[Row]) -> list[tuple[str, str]]:
    """(name, value) of the numbers people ask for first."""
    if not rows:
        return []
    accuracies = [row["knn"] for row in rows if isinstance(row.get("knn"), float | int)]
    speeds = sorted(row["images_per_second"] for row in rows if row.get("images_per_second"))
    tiles = [("steps", f"{rows[-1]['step'] + 1:,}")]
    if accuracies:
        chosen = {"first": accuracies[0], "best": max(accuracies), "last": accuracies[-1]}
        tiles += [(f"k-NN, {name}", f"{accuracy:.1%}") for name, accuracy in chosen.items()]
    if rows[-1].get("loss") is not None:
        tiles.append(("loss, last", f"{rows[-1]['loss']:.3f}"))
    if speeds:
        tiles.append(("images/s, median", f"{speeds[len(speeds) // 2]:,.0f}"))
    return tiles


def _log(run: Path) -> list[str] | None:
    try:
        return (run / "log.txt").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return None


def _settings(values: dict[str, Any]) -> list[tuple[str, str, bool]]:
    """(name, value as text, whether it is the default) of each setting."""
    defaults = {field.name: field.default for field in dataclasses.fields(Config)}

    def text(value: Any) -> str:
        if isinstance(value, list | tuple):
            return ", ".join(map(str, value))
        return "not set" if value is None else str(value)

    return [(name, text(value), name in defaults and value == defaults[name]) for name, value in values.items()]


def _near(run: Path) -> str:
    beside = sorted(p.name for p in run.parent.glob("*") if run_marks(p))
    return f" (in {run.parent} there are: {', '.join(beside[-5:])})" if beside else ""
