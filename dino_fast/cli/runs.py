"""`dino-fast runs`."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's options to its parser."""
    parser.add_argument("paths", nargs="*", type=Path, default=[Path("runs")], help="runs, or folders of runs")
    parser.add_argument(
        "--plot", type=Path, metavar="FILE", help="draw loss, entropy and k-NN over the steps (.png, .pdf)"
    )
    parser.add_argument("--json", action="store_true", help="print one object for each run")


def run(args: argparse.Namespace) -> int:
    """Prints the runs, the settings in which they differ, and draws their curves."""
    from rich.console import Console

    from dino_fast.report import compare as runs

    found = runs.find(args.paths)
    if args.plot:
        runs.plot(found, args.plot)
    if args.json:
        import json

        for one in found:
            print(json.dumps(one.plain()))
        return 0
    console = Console() if sys.stdout.isatty() else Console(width=1000)  # a pipe gets whole lines
    console.print(runs.table(found))
    for name, values in runs.differences(found).items() if len(found) > 1 else ():
        console.print(f"{name}: {', '.join(str(value) for value in values)}", markup=False, highlight=False)
    if args.plot:
        console.print(f"curves in {args.plot}", markup=False, highlight=False)
    return 0
