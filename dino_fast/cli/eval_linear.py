"""`dino-fast eval linear`."""

from __future__ import annotations

import argparse
from pathlib import Path

from dino_fast.cli.evaluation import add_common, begin, left_out_note, report


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's options to its parser."""
    add_common(
        parser,
        "labeled images to train on: a folder, list, .parquet or 'demo'",
        "labeled images to classify (default: the val/ or test/ part that came with --data, else a tenth of --data)",
    )
    parser.add_argument("--blocks", type=int, default=4, help="last blocks whose class tokens are used (default: 4)")
    parser.add_argument("--patch-mean", action="store_true", help="also use the mean patch token (published for ViT-B)")
    parser.add_argument("--rates", type=float, nargs="+", help="learning rates per 256 images (default: 0.0003 to 0.1)")
    parser.add_argument("--epochs", type=int, default=100, help="default: %(default)s")
    parser.add_argument("--batch-size", type=int, default=1024, help="default: %(default)s")
    parser.add_argument("--crops", choices=("centre", "random"), default="centre", help="default: %(default)s")
    parser.add_argument("--features", type=Path, help="a folder that keeps the features for the next time")
    parser.add_argument("--seed", type=int, default=0, help="default: %(default)s")


def run(args: argparse.Namespace) -> int:
    """Prints the accuracy for every learning rate; --out also keeps the best layer."""
    from dino_fast.eval.linear import RATES, evaluate

    begin(args)
    result, heads = evaluate(
        args.checkpoint,
        args.data,
        args.test,
        blocks=args.blocks,
        patch_mean=args.patch_mean,
        rates=args.rates or RATES,
        epochs=args.epochs,
        batch_size=args.batch_size,
        crops=args.crops,
        seed=args.seed,
        which=args.which,
        device=args.device,
        image_size=args.image_size,
        features=args.features,
    )
    if args.out is not None:
        from safetensors.torch import save_file

        weight, bias = heads.layer(heads.rates.index(result["rate"]))
        save_file({"linear.weight": weight.cpu(), "linear.bias": bias.cpu()}, args.out / "linear.safetensors")
    lines = [
        f"linear top-1 {100 * result['top1']:.2f} %  top-5 {100 * result['top5']:.2f} %  ({result['which']} "
        f"{result['feature']}, {result['train']} training images, {result['test']} test images, "
        f"{result['epochs']} epochs, {result['crops']} crops)",
        f"after the last epoch; the best epoch on the test images, as the original reports: "
        f"{100 * result['best_epoch_top1']:.2f} % (epoch {result['best_epoch'] + 1})",
        "by learning rate (per 256 images; the best is chosen on the test images):",
        *(f"  {row['rate']:<8g} {100 * row['top1']:.2f} %" for row in result["results"]),
    ]
    return report(args, "linear", result, lines + left_out_note(result["left_out"]))
