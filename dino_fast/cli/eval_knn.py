"""`dino-fast eval knn`."""

from __future__ import annotations

import argparse
from pathlib import Path

from dino_fast.cli.evaluation import add_common, begin, left_out_note, report


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's options to its parser."""
    add_common(
        parser,
        "labeled images: a folder, list, .parquet or 'demo'",
        "labeled images to classify (default: the val/ or test/ part that came with --data, else a tenth of --data)",
    )
    parser.add_argument(
        "--k", type=int, nargs="+", default=[20], help="neighbors that vote; one or more numbers (default: 20)"
    )
    parser.add_argument(
        "--temperature", type=float, nargs="+", default=[0.07], help="of their weights; one or more (default: 0.07)"
    )
    parser.add_argument("--features", type=Path, help="a folder that keeps the features for the next time")
    parser.add_argument("--batch-size", type=int, default=128, help="default: %(default)s")


def run(args: argparse.Namespace) -> int:
    """Prints the accuracy for every k and temperature."""
    from dino_fast.eval.knn import evaluate

    begin(args)
    result = evaluate(
        args.checkpoint,
        args.data,
        args.test,
        k=args.k,
        temperature=args.temperature,
        which=args.which,
        batch_size=args.batch_size,
        device=args.device,
        image_size=args.image_size,
        features=args.features,
    )
    lines = [
        f"k-NN top-1 {100 * row['top1']:.2f} %  top-5 {100 * row['top5']:.2f} %  (k={row['k']}, "
        f"T={row['temperature']:g}, {result['which']} {result['feature']}, bank of {result['bank']} images, "
        f"{result['queries']} queries)"
        for row in result["results"]
    ]
    return report(args, "knn", result, lines + left_out_note(result["left_out"]))
