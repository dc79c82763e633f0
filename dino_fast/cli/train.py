"""`dino-fast train`."""

from __future__ import annotations

import argparse
import os

from dino_fast.engine import config as settings

# Options of main_dino.py that have no counterpart: what to do instead.
NOT_HERE = {
    "batch-size-per-gpu": "--batch-size counts the images of all processes: give the product with their number",
    "bs": "did you mean '--batch-size'?",
    "dist-url": "torchrun and srun set up the processes themselves; leave it out",
    "local-rank": "torchrun and srun set up the processes themselves; leave it out",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's options to its parser."""
    parser.usage = "dino-fast train [--data PATH] [--out DIR] [OPTION ...]"
    settings.add_arguments(parser)
    parser.add_argument("--dry-run", action="store_true", help="print what the run would cost, and end")


def run(args: argparse.Namespace) -> int:
    """Runs the command and returns its exit status."""
    config = settings.from_arguments(args)
    if args.dry_run:
        from dino_fast.engine.estimate import dry_run_report
        from dino_fast.engine.memory_limit import explained_out_of_memory

        with explained_out_of_memory():
            print(dry_run_report(config, dict(os.environ)))
        return 0
    from dino_fast.engine.trainer import train  # imports torch: a wrong setting has been told by now

    train(config)
    return 0
