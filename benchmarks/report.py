"""What a benchmark leaves behind: a table on the console, a JSON file, and a picture."""

from __future__ import annotations

import datetime
import itertools
import json
import operator
import os
import platform
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from .harness import UNSTEADY, Row
from .load import LIMIT


def device_name(device: str = "cpu") -> str:
    """The processor's model, as the machine names it."""
    if device != "cpu":
        return torch.cuda.get_device_name()
    try:
        found = re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text())
    except OSError:
        found = None
    return found.group(1).strip() if found else platform.processor() or platform.machine()


def document(operation: str, rows: list[Row], *, quick: bool = False, device: str = "cpu") -> dict[str, Any]:
    """The JSON object of one operation's run: where and how it was measured, and the rows."""
    from dino_fast import _C

    return {
        "operation": operation,
        "device": device_name(device),
        "threads": torch.get_num_threads(),
        "cpus": len(os.sched_getaffinity(0)),
        "isa": _C.isa(),
        "amx": _C.matmul_unavailable_reason() is None,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "quick": quick,
        "load_average": [round(load, 2) for load in os.getloadavg()],
        "rows": [row.as_dict() for row in rows],
    }


def results_directory(*, quick: bool = False) -> Path:
    """benchmarks/results in a checkout, the current directory elsewhere; of quick runs, which are no results to keep,
    benchmarks/quick, which git ignores."""
    here = Path(__file__).resolve().parent
    return here / ("quick" if quick else "results") if (here.parent / "pyproject.toml").is_file() else Path.cwd()


def write(result: dict[str, Any], directory: Path, *, merge: bool = False) -> tuple[Path, Path]:
    """Writes `<device>_torch-<version>_<operation>_<date>.json` and a .png of the same name; returns both paths.

    With `merge` the comparisons of a file of that name stay, except those that are in `result` too.
    """
    directory.mkdir(parents=True, exist_ok=True)
    parts = (result["device"], f"torch-{result['torch']}", result["operation"], result["date"][:10])
    name = "_".join(re.sub(r"[^A-Za-z0-9.+-]+", "-", part).strip("-").lower() for part in parts)
    if result["quick"]:
        name += "_quick"
    path = directory / f"{name}.json"
    if merge and path.is_file():
        new = {key for key, _ in groups(result["rows"])}
        before = [row for key, rows in groups(json.loads(path.read_text())["rows"]) if key not in new for row in rows]
        result = result | {"rows": [*before, *result["rows"]]}
    path.write_text(json.dumps(result, indent=1) + "\n")
    return path, draw(result, path.with_suffix(".png"))


def groups(rows: Iterable[dict[str, Any]]) -> list[tuple[tuple[str, str, str], list[dict[str, Any]]]]:
    """Rows by (operation, shape, dtype), in the order measured."""
    by = operator.itemgetter("operation", "shape", "dtype")
    return [(key, list(group)) for key, group in itertools.groupby(rows, key=by)]


def human_bytes(count: int | None) -> str:
    if count is None:
        return ""
    size = float(count)
    for unit in ("B", "KiB", "MiB"):
        if size < 1024:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.2f} GiB"


def backend_of(row: dict[str, Any]) -> str:
    """What of ours ran; nothing for other contenders and for files that do not say it."""
    backend = str(row.get("backend", ""))
    return "PyTorch itself" if backend == "PyTorch" else backend


def name_of(row: dict[str, Any]) -> str:
    """The contender, and what of ours it ran on."""
    backend = backend_of(row)
    return f"{row['contender']} ({backend})" if backend else str(row["contender"])


def cells(row: dict[str, Any]) -> list[str]:
    """A row as text: contender, ms, spread, ratio, floor share, peak memory, error, note."""
    note = row["note"]
    if row["allocator"] and row["allocator"] != "keeps freed memory":
        note = f"allocator: {row['allocator']}" + (f"; {note}" if note else "")
    spread = row.get("spread")  # which files of before do not have
    ratio = "unsteady" if UNSTEADY in note else ""
    return [
        name_of(row),
        "" if row["ms"] is None else f"{row['ms']:.4g}",
        "" if spread is None else f"{100 * spread:.0f} %",
        ratio if row["ratio"] is None else f"{row['ratio']:.2f}x",
        "" if row["floor_share"] is None else f"{100 * row['floor_share']:.0f} %",
        human_bytes(row["peak_bytes"]),
        "" if row["error"] is None else f"{row['error']:.1e}",
        note,
    ]


# "±": half the distance between the quartiles of the rounds, over the median. "time / ours": how many times as long as
# ours a contender takes, by rounds.
HEADINGS = ["contender", "ms", "±", "time / ours", "of the floor", "extra memory", "error", ""]


def loaded(rows: Iterable[dict[str, Any]]) -> str:
    """A sentence where other programs used the processors while these rows were measured, else nothing."""
    most = max((row.get("others") or 0.0 for row in rows), default=0.0)
    return f"The machine is loaded: other programs took {most:.1f} of its processors." if most > LIMIT else ""


def show(result: dict[str, Any]) -> None:
    """Prints one table per shape."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console()
    if not console.is_terminal:
        console = Console(width=1000)  # nothing is cut for a file or a pipe; tables take what they need
    for (operation, shape, dtype), rows in groups(result["rows"]):
        allocators = sorted({row["allocator"] for row in rows if row["allocator"]})
        caption = f"{result['device']}, {result['threads']} threads, torch {result['torch']}, allocator: "
        title = f"{operation}  {shape}  {dtype}"
        table = Table(
            title=title, caption=caption + " / ".join(allocators), title_justify="left", caption_justify="left"
        )
        for i, heading in enumerate(HEADINGS[:-1]):
            table.add_column(heading, justify="right" if i else "left")
        for row in rows:
            table.add_row(*(Text(cell) for cell in cells(row)[:-1]))
        console.print(table)
        for row in rows:
            if note := cells(row)[-1]:
                console.print(Text(f"  {row['contender']}: {note}"))  # below: a column for them would be too wide
        if warning := loaded(rows):
            console.print(Text(f"  {warning}"))


def draw(result: dict[str, Any], path: Path) -> Path:
    """Draws horizontal bars of milliseconds from zero, one panel a shape, the floor as a dashed line."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    panels = [(key, [row for row in rows if row["ms"]]) for key, rows in groups(result["rows"])]
    panels = [(key, rows) for key, rows in panels if rows]
    heights = [1.2 + 0.32 * len(rows) for _, rows in panels] or [1.0]
    figure, axes = plt.subplots(
        len(heights), 1, figsize=(8, sum(heights)), squeeze=False, height_ratios=heights, layout="constrained"
    )
    for ((operation, shape, dtype), rows), ax in zip(panels, axes[:, 0], strict=False):
        bars = [row for row in rows if row["role"] != "floor"]
        colours = ["#c2410c" if row["role"] == "ours" else "#94a3b8" for row in bars]
        y = range(len(bars))
        ax.barh(y, [row["ms"] for row in bars], color=colours)
        ax.set_yticks(y, [name_of(row) for row in bars])
        ax.set_ylim(len(bars), -0.6)  # the first on top, room for the floor's name below
        high = max(row["ms"] for row in rows)
        ax.set_xlim(0, high * 1.3)  # room for the longest bar's figures
        for i, row in enumerate(bars):
            ratio = "  (unsteady)" if UNSTEADY in row["note"] else ""
            ratio = ratio if row["ratio"] in (None, 1.0) else f"  ({row['ratio']:.1f}x)"
            time = f"{row['ms']:.3g}" if row["ms"] < 1000 else f"{row['ms']:.0f}"
            ground = {"facecolor": "white", "edgecolor": "none", "pad": 1}  # over the floor's line
            ax.text(row["ms"] + high / 100, i, f"{time} ms{ratio}", va="center", fontsize=9, bbox=ground)
        for row in rows:
            if row["contender"] == "floor":
                ax.axvline(row["ms"], color="black", linestyle="--", linewidth=1)
                ax.text(row["ms"], len(bars) - 0.3, " floor", va="center", fontsize=8)
        ax.set_title(f"{operation}   {shape}   {dtype}", fontsize=10, loc="left")
        ax.xaxis.set_major_formatter("{x:g}")
        ax.set_xlabel("ms")
        ax.spines[["top", "right"]].set_visible(False)
    figure.suptitle(f"{result['device']}, {result['threads']} threads, torch {result['torch']}", fontsize=9)
    figure.savefig(path, dpi=130)
    plt.close(figure)
    return path
