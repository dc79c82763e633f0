"""`dino-fast data check`."""

from __future__ import annotations

import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "path", help="folder, .parquet, .tar or .npy file, text file listing images, pattern, or 'demo'"
    )
    parser.add_argument("--limit", type=int, metavar="N", help="look at N images spread over the source (default: all)")
    parser.add_argument("--workers", type=int, default=2, metavar="N", help="threads that read (default: %(default)s)")


def run(args: argparse.Namespace) -> int:
    """Prints the findings; 1 when an image cannot be read, else 0."""
    from dino_fast.data import open_source
    from dino_fast.data.check import check, describe

    source = open_source(args.path)
    report = check(source, args.limit, max(1, args.workers))
    for line in describe(source, report):
        print(line)
    if source.test is not None:
        print(f"held out     {len(source.test):,} images (not read; check their own path)")
    return 1 if report.bad else 0
