"""`dino-fast eval copy`."""

from __future__ import annotations

import argparse

from dino_fast.cli.evaluation import add_common, begin, left_out_note, report
from dino_fast.errors import UserError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's options to its parser."""
    add_common(parser, "a folder of originals", "a folder of distorted copies, named as their originals", size=False)
    parser.add_argument("--distractors", help="a folder of images that are nobody's original")
    parser.add_argument(
        "--whiten", metavar="PATH", help="images to learn whitening from (default: all that are searched)"
    )
    parser.add_argument("--no-whitening", action="store_true", help="compare the features as they are")
    parser.add_argument(
        "--match", metavar="REGEX", help="its first group is what a copy's and its original's name share"
    )
    parser.add_argument("--image-size", type=int, help="side in pixels (default: 320 in whole patches)")


def run(args: argparse.Namespace) -> int:
    """Prints the mean average precision."""
    from dino_fast.eval.copy import evaluate

    if args.test is None:
        raise UserError("copy detection needs --test, a folder of distorted copies of the images in --data")
    begin(args)
    result = evaluate(
        args.checkpoint,
        args.data,
        args.test,
        distractors=args.distractors,
        whiten=args.whiten,
        use_whitening=not args.no_whitening,
        pattern=args.match,
        image_size=args.image_size,
        which=args.which,
        device=args.device,
    )
    white = f"whitened on {result['whitened_on']} images" if result["whitened_on"] else "not whitened"
    lines = [
        f"copy detection mAP {100 * result['map']:.2f} %  first {100 * result['first']:.2f} %  ({result['which']} "
        f"{result['feature']}, {white}, {result['queries']} copies, {result['database']} images)"
    ]
    return report(args, "copy", result, lines + left_out_note(result["left_out"]))
