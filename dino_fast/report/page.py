"""The page: what is known of the run, section by section; what is missing is said in its place."""

from __future__ import annotations

import dataclasses
import math
import threading
from collections.abc import Sequence
from datetime import datetime
from html import escape
from importlib.resources import files
from pathlib import Path
from typing import Any

from dino_fast.engine.config import Config
from dino_fast.engine.run_dir import MARKS, read_metrics, run_marks
from dino_fast.errors import UserError
from dino_fast.report.curves import Curve, Row, chart, points

# Nothing may be loaded from anywhere, whatever a class or a folder is called.
_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'"
_LINES = 40  # of log.txt


class Report:
    """Draws the page of a run. Pictures, which take seconds, are drawn anew only when the checkpoints change.

    `data` replaces the run's own images; `images` is how many of them are compared. After `page`, `why_no_pictures` is
    empty, or says why the page has none. Raises UserError where `run` holds no run.
    """

    def __init__(self, run: Path, data: str | None = None, images: int = 1000, device: str | None = None) -> None:
        if not run.is_dir():
            what = "is a file" if run.exists() else "does not exist"
            raise UserError(f"{run} {what}; give the directory of a run{_near(run)}")
        if not run_marks(run):
            raise UserError(f"{run} is not a run: it holds none of {', '.join(MARKS)}. Give the --out of a training")
        self.run, self.data, self.images, self.device = run, data, images, device
        self._drawn: tuple[Any, dict[str, str]] = (None, {})
        self._environment = ""
        self.why_no_pictures = ""
        self._lock = threading.Lock()

    def page(self) -> str:
        """The whole page as it is now."""
        with self._lock:
            rows = read_metrics(self.run) if (self.run / "metrics.jsonl").exists() else []
            values, config, trouble = _configuration(self.run)
            found = self._pictures(config)
            sections = [
                ("Curves", _curves(rows, values)),
                ("Attention", found["attention"]),
                ("Nearest neighbours", found["neighbours"]),
                ("Map of the features", found["map"]),
                ("Messages", _messages(self.run)),
                ("Configuration", trouble + _settings(values)),
                ("Environment", self._environment_of()),
            ]
        name = escape(self.run.resolve().name)
        body = "".join(
            f'<section id="{title.lower().replace(" ", "-")}"><h2>{title}</h2>{html}</section>'
            for title, html in sections
        )
        return (
            '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
            f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">'
            '<meta name="viewport" content="width=device-width, initial-scale=1"><link rel="icon" href="data:,">'
            f"<title>{name} - dino-fast</title><style>{_asset('page.css')}</style></head><body><main>"
            f"<header><h1>{name}</h1><p>{_summary(rows, values)}</p>{_tiles(rows)}</header>{body}"
            f"<footer>drawn {datetime.now():%Y-%m-%d %H:%M:%S} from {escape(str(self.run))}</footer></main>"
            f"<script>{_asset('page.js')}</script></body></html>\n"
        )

    def _pictures(self, config: Config | None) -> dict[str, str]:
        from dino_fast.report.pictures import checkpoints, pictures

        state = checkpoints(self.run)
        if self._drawn[0] != state:
            try:
                found = pictures(self.run, config, self.data, self.images, self.device)
                self.why_no_pictures = ""
            except UserError as error:
                self.why_no_pictures = str(error)
                found = dict.fromkeys(("attention", "neighbours", "map"), "<p class='note'>See above: no pictures.</p>")
                found["attention"] = f"<p class='note'>No pictures. {escape(str(error))}</p>"
            self._drawn = state, found
        return self._drawn[1]

    def _environment_of(self) -> str:
        from dino_fast.cli.info import as_text, collect

        self._environment = self._environment or as_text(collect())  # a second, and the same every time
        return f"<p>Of the machine that drew this page.</p><pre>{escape(self._environment)}</pre>"


def _configuration(run: Path) -> tuple[dict[str, Any], Config | None, str]:
    """(settings by name, the same as a Config or None, what is wrong with them as HTML)."""
    from dino_fast.engine.config import load_config, to_dict

    path = run / "config.yaml"
    try:
        config = load_config(path)
        return to_dict(config), config, ""
    except UserError as error:
        text = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
        raw = f"<pre>{escape(text)}</pre>" if text else ""
        return {}, None, f"<p class='note'>{escape(str(error))}</p>{raw}"


def _curves(rows: Sequence[Row], values: dict[str, Any]) -> str:
    if not rows:
        return "<p class='note'>No metrics yet: the first line of metrics.jsonl comes after the first step.</p>"
    out_dim = values.get("out_dim")
    top = ("ln K", math.log(out_dim)) if isinstance(out_dim, int) and out_dim > 1 else None
    charts = [
        chart("Loss", [Curve("loss", points(rows, "loss"))]),
        chart("Teacher entropy (nats)", [Curve("entropy", points(rows, "teacher_entropy"))], level=top),
        chart("KL, loss less entropy (nats)", [Curve("KL", points(rows, "kl"))]),
        chart(
            "k-NN accuracy",
            [
                Curve("teacher", points(rows, "knn", 100), "c1", dots=True),
                Curve("student", points(rows, "knn_student", 100), "c2", dots=True),
            ],
            "\u00a0%",
        ),
        chart("Learning rate", [Curve("lr", points(rows, "lr"))]),
        chart("Images/s", [Curve("images/s", points(rows, "images_per_second"))]),
    ]
    missing = "" if any("knn" in row for row in rows) else "<p class='note'>k-NN accuracy was not measured.</p>"
    return f"<p>The line is a mean, the shade its range. Point at a curve for its values.</p>{missing}" + (
        f'<div class="charts">{"".join(charts)}</div>'
    )


def _summary(rows: Sequence[Row], values: dict[str, Any]) -> str:
    parts = [f"{values['arch']}/{values.get('patch_size')}"] if "arch" in values else []
    parts += [f"images of {values['data']}"] if "data" in values else []
    parts += [f"batches of {values['batch_size']}"] if "batch_size" in values else []
    if rows:
        parts.append(f"epoch {rows[-1].get('epoch', 0) + 1} of {values.get('epochs', '?')}")
    return escape(", ".join(parts))


def _tiles(rows: Sequence[Row]) -> str:
    """The numbers people ask for first."""
    if not rows:
        return ""
    accuracies = [row["knn"] for row in rows if isinstance(row.get("knn"), float | int)]
    speeds = sorted(row["images_per_second"] for row in rows if row.get("images_per_second"))
    tiles = [("steps", f"{rows[-1]['step'] + 1:,}")]
    if accuracies:
        found = {"first": accuracies[0], "best": max(accuracies), "last": accuracies[-1]}
        tiles += [(f"k-NN, {name}", f"{accuracy:.1%}") for name, accuracy in found.items()]
    if rows[-1].get("loss") is not None:
        tiles.append(("loss, last", f"{rows[-1]['loss']:.3f}"))
    if speeds:
        tiles.append(("images/s, median", f"{speeds[len(speeds) // 2]:,.0f}"))
    return f'<dl class="tiles">{"".join(f"<div><dt>{a}</dt><dd>{b}</dd></div>" for a, b in tiles)}</dl>'


def _messages(run: Path) -> str:
    try:
        lines = (run / "log.txt").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return "<p class='note'>There is no log.txt.</p>"
    cut = f"<p>The last {_LINES} of {len(lines):,} lines of log.txt.</p>" if len(lines) > _LINES else ""
    return f"{cut}<pre>{escape(chr(10).join(lines[-_LINES:]))}</pre>"


def _settings(values: dict[str, Any]) -> str:
    usual = {field.name: field.default for field in dataclasses.fields(Config)}
    rows = []
    for name, value in values.items():
        default = usual.get(name)
        style = "" if name in usual and value == default else ' class="own"'
        text = (
            ", ".join(map(str, value))
            if isinstance(value, list | tuple)
            else "not set"
            if value is None
            else str(value)
        )
        rows.append(f"<div{style}><dt>{escape(name)}</dt><dd>{escape(text)}</dd></div>")
    return f'<p>Bold where it is not the default.</p><dl class="settings">{"".join(rows)}</dl>' if rows else ""


def _near(run: Path) -> str:
    beside = sorted(p.name for p in run.parent.glob("*") if run_marks(p))
    return f" (in {run.parent} there are: {', '.join(beside[-5:])})" if beside else ""


def _asset(name: str) -> str:
    return (files("dino_fast.report") / name).read_text(encoding="utf-8")
