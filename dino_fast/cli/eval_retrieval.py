"""`dino-fast eval retrieval`."""

from __future__ import annotations

import argparse

from dino_fast.cli.evaluation import add_common, begin, left_out_note, report


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's options to its parser."""
    add_common(
        parser,
        "the database: labeled images, or any with --ground-truth",
        "the queries (default: the held-out part that came with --data, or each image of --data in turn)",
        size=False,
    )
    parser.add_argument("--ground-truth", help="JSON of what each query should find (default: images of its class)")
    parser.add_argument("--image-size", type=int, default=224, help="longest side in pixels (default: %(default)s)")
    parser.add_argument("--scales", type=float, nargs="+", help="sizes that are averaged (default: 1 0.7071 0.5)")


def run(args: argparse.Namespace) -> int:
    """Prints the mean average precision."""
    from dino_fast.eval.retrieval import SCALES, evaluate

    begin(args)
    result = evaluate(
        args.checkpoint,
        args.data,
        args.test,
        ground_truth=args.ground_truth,
        image_size=args.image_size,
        scales=tuple(args.scales or SCALES),
        which=args.which,
        device=args.device,
    )
    hard = f"  hard {100 * result['map_hard']:.2f} %" if "map_hard" in result else ""
    lines = [
        f"mAP {100 * result['map']:.2f} %{hard}  ({result['which']} class token at {len(result['scales'])} scales, "
        f"{result['queries']} queries, {result['database']} images)"
    ]
    return report(args, "retrieval", result, lines + left_out_note(result["left_out"]))
