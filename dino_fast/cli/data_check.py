"""`dino-fast data check`."""

from __future__ import annotations

import argparse
import warnings

from dino_fast.cli.pixels import add_pixel_options, given_pixel_options
from dino_fast.cpus import usable_cpus


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's options to its parser."""
    parser.add_argument(
        "path", help="folder, .parquet, .tar, .zip or .npy file, text file listing images, pattern, or 'demo'"
    )
    parser.add_argument("--limit", type=int, metavar="N", help="look at N images spread over each part (default: all)")
    parser.add_argument("--workers", type=int, default=2, metavar="N", help="threads that read (default: %(default)s)")
    add_pixel_options(parser)


def run(args: argparse.Namespace) -> int:
    """Prints the findings; 1 when an image cannot be read, else 0."""
    from dino_fast.data import SourceNote, open_source
    from dino_fast.data.deep_pixels import range_of
    from dino_fast.data.inspect import check, crops_per_second, describe, speed
    from dino_fast.data.source import configure
    from dino_fast.engine.config import build_config, multi_crop

    config = build_config({"data": args.path, **given_pixel_options(args)})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SourceNote)  # they are in the report
        source = open_source(args.path)
    configure(source, config.channels, range_of(config.bit_depth, config.pixel_range))
    crops = multi_crop(config)
    report = check(source, args.limit, args.workers)
    lines = [f"note         {note}" for note in source.all_notes()] + [*describe(source, report)]
    bad = len(report.bad)
    if len(report.bad) < report.images:
        lines += speed(report, args.workers, crops_per_second(source, crops), crops, usable_cpus())
    print("\n".join(lines))
    if source.test is not None:
        print("held out:")
        held = check(source.test, args.limit, args.workers)
        print("\n".join(f"  {line}" for line in describe(source.test, held)))
        bad += len(held.bad)
    return 1 if bad else 0
