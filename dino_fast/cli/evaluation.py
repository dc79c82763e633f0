"""What the commands of the evaluations share: their options, and how a result is printed and kept."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from dino_fast.errors import make_folder, unwritable


def add_common(parser: argparse.ArgumentParser, data: str, test: str | None = None, size: bool = True) -> None:
    """`--checkpoint`, `--data`, `--which`, `--device`, `--out`, `--json`; with `test` also `--test`."""
    parser.add_argument(
        "--checkpoint",
        required=True,
        help="a run, one of its checkpoints, weights of DINO, DINOv2, timm or transformers, hub:NAME or timm:NAME",
    )
    parser.add_argument("--data", required=True, help=data)
    if test is not None:
        parser.add_argument("--test", help=test)
    parser.add_argument("--which", choices=("teacher", "student"), default="teacher", help="default: %(default)s")
    if size:
        parser.add_argument("--image-size", type=int, help="pixels (default: what the checkpoint was trained for)")
    parser.add_argument("--device", help="cpu, cuda, cuda:1 ... (default: a GPU where there is one)")
    parser.add_argument("--out", type=Path, help="a folder to write results to")
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def begin(args: argparse.Namespace) -> None:
    """Makes the folder of --out, before any time is spent."""
    if args.out is not None:
        make_folder(args.out)


def report(args: argparse.Namespace, name: str, result: dict[str, Any], lines: list[str]) -> int:
    """Prints `lines`, or with --json the result; with --out also keeps it as `NAME.json`. A full disk loses nothing."""
    print(json.dumps(result) if args.json else "\n".join(lines))
    if args.out is not None:
        try:
            (args.out / f"{name}.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        except OSError as error:
            raise unwritable(args.out, error) from error
    return 0


def left_out_note(counts: dict[str, int]) -> list[str]:
    """A line that says how many images of each part were not used, or nothing."""
    parts = [f"{count} of {name}" for name, count in counts.items() if count]
    return [f"left out (unreadable, or without what it is compared to): {', '.join(parts)}"] if parts else []
