"""`dino-fast eval knn`."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from dino_fast.errors import make_folder


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--checkpoint", required=True, help="a run, one of its checkpoints, .safetensors or .pth")
    parser.add_argument("--data", required=True, help="labelled images: a folder, list, .parquet or 'demo'")
    parser.add_argument("--test", help="labelled images to classify (default: the held-out part of --data)")
    parser.add_argument("--k", type=int, default=20, help="neighbours that vote (default: %(default)s)")
    parser.add_argument("--temperature", type=float, default=0.07, help="of their weights (default: %(default)s)")
    parser.add_argument("--which", choices=("teacher", "student"), default="teacher", help="default: %(default)s")
    parser.add_argument("--image-size", type=int, help="pixels (default: what the checkpoint was trained for)")
    parser.add_argument("--batch-size", type=int, default=128, help="default: %(default)s")
    parser.add_argument("--device", default="cpu", help="default: %(default)s")
    parser.add_argument("--out", type=Path, help="a folder to write knn.json to")
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(args: argparse.Namespace) -> int:
    """Prints the accuracy, and writes it to --out where that is given."""
    from dino_fast.eval.knn import evaluate

    if args.out is not None:
        make_folder(args.out)  # before any time is spent
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
    )
    if args.out is not None:
        (args.out / "knn.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    if args.json:
        print(json.dumps(result))
    else:
        print(
            f"k-NN top-1 {100 * result['top1']:.2f} %  top-5 {100 * result['top5']:.2f} %  (k={result['k']}, "
            f"T={result['temperature']:g}, {result['which']} {result['feature']}, bank of {result['bank']} images, "
            f"{result['queries']} queries)"
        )
    return 0
