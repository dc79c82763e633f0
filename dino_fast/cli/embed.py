"""`dino-fast embed`."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

_SHOWN = 10  # unreadable images that are named; the table has all


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's options to its parser."""
    parser.add_argument(
        "--checkpoint",
        required=True,
        help="a run, one of its checkpoints, weights of DINO, DINOv2, timm or transformers, hub:NAME or timm:NAME",
    )
    parser.add_argument("--data", required=True, help="images: a folder, list, .parquet, .tar, pattern or 'demo'")
    parser.add_argument(
        "--out",
        required=True,
        type=Path,
        help="the .parquet, .npy or .csv to write; one a row, with its name and label",
    )
    parser.add_argument(
        "--features",
        "--feature",
        choices=("cls", "mean", "patches"),
        default="cls",
        help="the class token, the mean of the patch tokens, or all patch tokens (default: %(default)s)",
    )
    parser.add_argument("--which", choices=("teacher", "student"), default="teacher", help="default: %(default)s")
    parser.add_argument("--image-size", type=int, help="pixels (default: what the checkpoint was trained for)")
    parser.add_argument("--batch-size", type=int, default=64, help="default: %(default)s")
    parser.add_argument("--device", help="cpu, cuda, cuda:1 ... (default: a GPU where there is one)")
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(args: argparse.Namespace) -> int:
    """Writes the table and says what is in it."""
    from dino_fast.eval.embed import write_embeddings

    result = write_embeddings(
        args.data,
        args.checkpoint,
        args.out,
        features=args.features,
        which=args.which,
        image_size=args.image_size,
        batch_size=args.batch_size,
        device=args.device,
    )
    if args.json:
        print(json.dumps(result))
        return 0
    shape = " x ".join(map(str, result["shape"]))
    print(f"wrote {shape} features ({args.features}) of {result['images']:,} images to {result['out']}")
    if result["continued"]:
        print(f"the first {result['continued']:,} were there from an interrupted call")
    errors = result["errors"]
    if errors:
        print(f"{len(errors):,} could not be read; their rows have an error and no features:")
        print("\n".join(f"  {text}" for text in list(errors.values())[:_SHOWN]))
    return 0
