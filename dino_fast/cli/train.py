"""`dino-fast train`."""

from __future__ import annotations

import argparse
import os

from dino_fast.engine import config as settings

# Turns for which an OpenMP thread spins between operations before it sleeps. libgomp's own 300,000 suit a machine of
# one's own; two demo runs at once on two cores then wait for each other's spinning. Images/s, alone and each of two:
# 300,000: 1055, 72; 10,000: 1062, 136; 4,000: 1128, 428; 2,000: 874, 524; asleep at once: 558, 315.
SPIN = "4000"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    settings.add_arguments(parser)
    parser.add_argument("--dry-run", action="store_true", help="print what the run would cost, and end")


def run(args: argparse.Namespace) -> int:
    config = settings.from_arguments(args)
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", SPIN)  # read when torch is imported
    if args.dry_run:
        from dino_fast.engine.estimate import dry_run_report

        print(dry_run_report(config, dict(os.environ)))
        return 0
    from dino_fast.engine.trainer import train  # imports torch: a wrong setting has been told by now

    train(config)
    return 0
