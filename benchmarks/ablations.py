"""`python -m benchmarks.ablations --data DIR`: trains the paper's ablations at a CPU's size and draws their curves.

DIR holds CIFAR-10 as `cifar10-train.parquet` and `cifar10-test.parquet`, each a column of encoded images and one of
labels. 5,000 images are trained on, 2,000 others are classified by k-NN. Every run is the command `command(name)`; its
curves go to `results/ablations.json`, and from that file, and from nowhere else, come the pictures and the tables of
docs/ablations.md. `--check` trains nothing and exits 1 where the document is not what the file says.
"""

from __future__ import annotations

import argparse
import datetime
import json
import math
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULT = ROOT / "benchmarks" / "results" / "ablations.json"
DOCUMENT = ROOT / "docs" / "ablations.md"
BLOCK = re.compile(r"(<!-- ablation: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)
EPOCHS = 8
OUT_DIM = 512
CURVES = ("loss", "teacher_entropy", "kl", "feature_spread")
EVERY = 8  # steps that are averaged to one point of a curve

COMMON = (
    "--arch vit_tiny --patch-size 4 --embed-dim 64 --depth 3 --heads 1 --drop-path-rate 0 --init xavier "
    f"--out-dim {OUT_DIM} --head-hidden-dim 256 --head-bottleneck-dim 64 --global-size 32 --local-size 16 "
    "--local-crops 2 --local-scale 0.15 0.5 --blur-p 0 0 0 --solarize-p 0 0 0 --mean 0.491 0.482 0.447 "
    f"--std 0.247 0.243 0.262 --batch-size 32 --epochs {EPOCHS} --warmup-epochs 0.64 --lr 0.016 --min-lr 4e-5 "
    "--weight-decay-end 0.04 "
    "--momentum 0.985 --freeze-last-layer 0.32 --teacher-temp 0.03 --warmup-teacher-temp 0.03 "
    "--center-init first_batch --knn-images 2000 --save-every 100 --seed 0 --device cpu"
)

# Name -> (what it changes, what it is called in tables). The student's temperature is 0.1, which sharpens nothing.
TEACHERS = {
    "ema": ("", "moving average (momentum 0.985 to 1)"),
    "previous-epoch": ("--teacher previous-epoch", "student of the previous epoch"),
    "previous-step": ("--teacher previous-step", "student of the previous step"),
    "copy": ("--teacher copy", "copy of the student"),
}
TARGETS = {
    "ema": ("", "centring and sharpening"),
    "no-sharpening": ("--teacher-temp 0.1 --warmup-teacher-temp 0.1", "centring alone"),
    "no-centering": ("--no-centering", "sharpening alone"),
    "neither": ("--no-centering --teacher-temp 0.1 --warmup-teacher-temp 0.1", "neither"),
}
# Three times as long: whether the average draws ahead.
LONGER = {
    "ema-long": ("--epochs 24 --knn-every 2", "moving average"),
    "previous-epoch-long": ("--teacher previous-epoch --epochs 24 --knn-every 2", "student of the previous epoch"),
}
DRAWN = {"teachers": TEACHERS, "targets": TARGETS}
GROUPS = {**DRAWN, "longer": LONGER}
RUNS = {**TEACHERS, **TARGETS, **LONGER}


def command(name: str, data: str = "cifar10/", out: str | None = None) -> str:
    """The command line of a run."""
    return " ".join(["dino-fast train --data", data, COMMON, RUNS[name][0], "--out", out or f"runs/{name}"]).replace(
        "  ", " "
    )


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("--data", type=Path, help="folder of cifar10-train.parquet and cifar10-test.parquet")
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="where the runs go; finished ones are kept")
    parser.add_argument("--check", action="store_true", help="compare the document with the results, train nothing")
    args = parser.parse_args(arguments)
    if args.data is not None:
        subset = make_data(args.data, args.runs / "cifar10")
        for name in RUNS:
            train(name, subset, args.runs / name)
        RESULT.write_text(json.dumps(collect(args.runs), indent=None, separators=(",", ":")) + "\n", encoding="utf-8")
        draw(json.loads(RESULT.read_text()))
    before = DOCUMENT.read_text(encoding="utf-8")
    after = fill(before, json.loads(RESULT.read_text()))
    if args.check:
        return int(before != after)
    DOCUMENT.write_text(after, encoding="utf-8")
    return 0


def make_data(source: Path, folder: Path) -> Path:
    """`folder/train` with 5,000 images of CIFAR-10's training part, `folder/test` with 2,000 of its test part."""
    import pyarrow.parquet as parquet

    for part, count in (("train", 5000), ("test", 2000)):
        (folder / part).mkdir(parents=True, exist_ok=True)
        table = parquet.read_table(source / f"cifar10-{part}.parquet")
        parquet.write_table(table.slice(0, count), folder / part / "images.parquet")
    return folder


def train(name: str, data: Path, out: Path) -> None:
    if (out / "export" / "teacher.safetensors").exists():
        return
    words = command(name, str(data), str(out)).split()
    subprocess.run([sys.executable, "-m", "dino_fast", *words[1:], "--resume"], check=True)


def collect(runs: Path) -> dict[str, Any]:
    """The curves of every run, means of EVERY steps, and where they were measured."""
    import torch

    from dino_fast.engine.run_dir import read_metrics

    from .report import device_name

    found = {}
    for name in RUNS:
        rows = read_metrics(runs / name)
        pieces = [rows[i : i + EVERY] for i in range(0, len(rows), EVERY)]
        curves = {key: [_mean([row[key] for row in piece]) for piece in pieces] for key in CURVES}
        measured = [(row["step"], row["knn"], row["knn_student"]) for row in rows if "knn" in row]
        found[name] = {"command": command(name), "steps": len(rows), "knn": measured, **curves}
    return {
        "ablations": found,
        "device": device_name(),
        "torch": torch.__version__,
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }


def _mean(values: list[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return round(sum(known) / len(known), 5) if known else None


def draw(result: dict[str, Any], folder: Path | None = None) -> list[Path]:
    """docs/ablations-teachers.png and docs/ablations-targets.png: k-NN, the loss's two parts, the features' spread."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    folder = folder or DOCUMENT.parent
    panels = {
        "k-NN accuracy of the teacher (%)": None,
        "entropy of the targets (nats)": "teacher_entropy",
        "KL of targets and student (nats)": "kl",
        "spread of the features": "feature_spread",
    }
    paths = []
    for group, members in DRAWN.items():
        figure, axes = plt.subplots(1, len(panels), figsize=(15, 3.9), constrained_layout=True)
        for axis, (title, key) in zip(axes, panels.items(), strict=True):
            for (name, (_, label)), colour in zip(members.items(), ("C0", "C1", "C2", "C3"), strict=True):
                run = result["ablations"][name]
                if key is None:
                    steps, values = [row[0] for row in run["knn"]], [100 * row[1] for row in run["knn"]]
                    axis.plot(steps, values, marker="o", markersize=3, color=colour, label=label)
                else:
                    steps = [EVERY * i for i in range(len(run[key]))]
                    axis.plot(steps, [math.nan if v is None else v for v in run[key]], color=colour, label=label)
            if key == "teacher_entropy":
                axis.axhline(math.log(OUT_DIM), color="0.6", linewidth=0.8, linestyle="--")
                axis.text(0, math.log(OUT_DIM), " ln K", va="bottom", color="0.4", fontsize=8)
            axis.set_title(title, fontsize=10)
            axis.set_xlabel("step")
            axis.grid(alpha=0.3)
        lines, labels = axes[0].get_legend_handles_labels()
        figure.legend(lines, labels, loc="outside lower center", ncols=4, fontsize=9)
        paths.append(folder / f"ablations-{group}.png")
        figure.savefig(paths[-1], dpi=110)
        plt.close(figure)
    return paths


def fill(text: str, result: dict[str, Any]) -> str:
    """The document with its blocks written anew."""
    return BLOCK.sub(lambda found: found[1] + block(found[2], result) + found[3], text)


def block(name: str, result: dict[str, Any]) -> str:
    """What stands between `<!-- ablation: NAME -->` and `<!-- end -->`: a table, the commands, or where it was run."""
    if name == "machine":
        return f"{result['device']}, torch {result['torch']}, {result['date'][:10]}.\n"
    if name == "commands":
        lines = [f"    dino-fast train --data cifar10/ {COMMON} OPTIONS --out runs/NAME", "", "| NAME | OPTIONS |"]
        lines += ["|---|---|", *(f"| {run} | {f'`{given}`' if given else ''} |" for run, (given, _) in RUNS.items())]
        return "\n".join(lines) + "\n"
    head = "| | k-NN at the start | after a half | at the end | entropy, of ln K | KL (nats) | spread |"
    lines = [head, "|---|---:|---:|---:|---:|---:|---:|"]
    for run, (_, label) in GROUPS[name].items():
        row = result["ablations"][run]
        accuracies = [row["knn"][i][1] for i in (0, len(row["knn"]) // 2, -1)]
        entropy, kl, spread = (_mean(row[key][-5:]) for key in ("teacher_entropy", "kl", "feature_spread"))
        shown = [f"{100 * value:.1f} %" for value in accuracies]
        shown.append("not finite" if entropy is None else f"{100 * entropy / math.log(OUT_DIM):.1f} %")
        shown += ["not finite" if value is None else f"{value:.3f}" for value in (kl, spread)]
        lines.append(f"| {label} | " + " | ".join(shown) + " |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
