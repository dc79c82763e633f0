"""`dino-fast eval video`."""

from __future__ import annotations

import argparse

from dino_fast.cli.evaluation import add_common, begin, report


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's options to its parser."""
    add_common(parser, "a folder in the layout of DAVIS: JPEGImages/480p/NAME and Annotations/480p/NAME", size=False)
    parser.add_argument("--sequences", nargs="+", metavar="NAME", help="only these (default: all)")
    parser.add_argument("--image-size", type=int, default=480, help="shorter side in pixels (default: %(default)s)")
    parser.add_argument("--last-frames", type=int, default=7, help="looked at besides the first (default: %(default)s)")
    parser.add_argument("--radius", type=int, default=12, help="reach in patches, 0 for all (default: %(default)s)")
    parser.add_argument("--topk", type=int, default=5, help="patches that count (default: %(default)s)")
    parser.add_argument("--temperature", type=float, default=0.1, help="of their weights (default: %(default)s)")


def run(args: argparse.Namespace) -> int:
    """Prints J and F of each sequence; with --out also writes the masks."""
    from dino_fast.eval.video import Settings, evaluate

    begin(args)
    result = evaluate(
        args.checkpoint,
        args.data,
        sequences=args.sequences,
        image_size=args.image_size,
        settings=Settings(args.last_frames, args.radius, args.topk, args.temperature),
        out=args.out,
        which=args.which,
        device=args.device,
    )
    lines = [
        f"J&F {100 * result['jf_mean']:.2f} %  J {100 * result['j_mean']:.2f} %  F {100 * result['f_mean']:.2f} %  "
        f"({result['which']}, {result['objects']} objects in {len(result['sequences'])} sequences, "
        f"{result['frames']} frames at {result['image_size']} pixels)",
        *(
            f"  {row['name']:<20} J {100 * row['j_mean']:.2f} %  F {100 * row['f_mean']:.2f} %"
            for row in result["sequences"]
        ),
    ]
    return report(args, "video", result, lines)
