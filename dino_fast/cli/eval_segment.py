"""`dino-fast eval segment`."""

from __future__ import annotations

import argparse

from dino_fast.cli.evaluation import add_common, begin, left_out_note, report


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's options to its parser."""
    add_common(parser, "images, or a folder in the layout of PASCAL VOC, DAVIS, or images/ and masks/", size=False)
    parser.add_argument("--masks", help="the folder of their masks, of the same names (default: inside --data)")
    parser.add_argument("--image-size", type=int, default=480, help="shorter side in pixels (default: %(default)s)")
    parser.add_argument("--mass", type=float, default=0.6, help="share of attention in a mask (default: %(default)s)")


def run(args: argparse.Namespace) -> int:
    """Prints the Jaccard index of the best head."""
    from dino_fast.eval.segment import evaluate

    begin(args)
    result = evaluate(
        args.checkpoint,
        args.data,
        args.masks,
        image_size=args.image_size,
        mass=args.mass,
        which=args.which,
        device=args.device,
    )
    lines = [
        f"Jaccard {100 * result['jaccard']:.2f} %  (best head for each object; {result['which']}, "
        f"{100 * result['mass']:g} % of the attention, {result['objects']} objects in {result['images']} images)",
        f"best single head: {result['best_head']} with {100 * result['best_head_jaccard']:.2f} %; by head: "
        + "  ".join(f"{100 * value:.2f}" for value in result["heads"]),
    ]
    return report(args, "segment", result, lines + left_out_note(result["left_out"]))
