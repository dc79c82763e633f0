"""`dino-fast eval attention`."""

from __future__ import annotations

import argparse
from pathlib import Path

from dino_fast.cli.evaluation import add_common, report


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's options to its parser."""
    add_common(parser, "an image, a folder of images, a video file, or with --video a folder of frames", size=False)
    parser.add_argument("--image-size", type=int, default=480, help="shorter side in pixels (default: %(default)s)")
    parser.add_argument("--mass", type=float, default=0.6, help="share of attention in a mask (default: %(default)s)")
    parser.add_argument("--video", action="store_true", help="the images of the folder are the frames of one video")
    parser.add_argument("--fps", type=float, help="of the mp4 (default: the video file's, else 30)")


def run(args: argparse.Namespace) -> int:
    """Draws, and says where."""
    from dino_fast.eval.attention import evaluate

    args.out = args.out or Path("attention")
    result = evaluate(
        args.checkpoint,
        args.data,
        args.out,
        image_size=args.image_size,
        mass=args.mass,
        video=args.video,
        fps=args.fps,
        which=args.which,
        device=args.device,
    )
    if "frames" in result:
        is_path = result["mp4"].endswith(".mp4")
        lines = [
            f"attention of {result['frames']} frames ({result['which']}, mean of {result['heads']} heads): "
            f"{args.out / 'frames'}",
            result["mp4"] if is_path else f"no mp4 was written: that needs the package av ({result['mp4']})",
        ]
    else:
        lines = [
            f"attention of {result['images']} images ({result['which']}, {result['heads']} heads): {args.out}",
            *(f"left out: {message}" for message in result["left_out"]),
        ]
    return report(args, "attention", result, lines)
