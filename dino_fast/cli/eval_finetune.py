"""`dino-fast eval finetune`."""

from __future__ import annotations

import argparse
import sys

from dino_fast.cli.evaluation import add_common, begin, left_out_note, report


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's options to its parser."""
    add_common(
        parser,
        "labeled images to train on: a folder, list, .parquet or 'demo'",
        "labeled images to classify (default: the val/ or test/ part that came with --data, else a tenth of --data)",
    )
    parser.add_argument("--epochs", type=int, default=100, help="default: %(default)s")
    parser.add_argument("--batch-size", type=int, default=512, help="default: %(default)s")
    parser.add_argument("--lr", type=float, default=5e-4, help="per 512 images (default: %(default)s)")
    parser.add_argument("--warmup-epochs", type=float, default=5, help="default: %(default)s")
    parser.add_argument("--weight-decay", type=float, default=0.05, help="default: %(default)s")
    parser.add_argument("--drop-path", type=float, default=0.1, help="stochastic depth (default: %(default)s)")
    parser.add_argument("--smoothing", type=float, default=0.1, help="of the labels (default: %(default)s)")
    parser.add_argument("--mixup", type=float, default=0.8, help="0: never (default: %(default)s)")
    parser.add_argument("--cutmix", type=float, default=1.0, help="0: never (default: %(default)s)")
    parser.add_argument("--operations", type=int, default=2, help="of RandAugment, 0: none (default: %(default)s)")
    parser.add_argument(
        "--erase", type=float, default=0.25, help="share of images erased in part (default: %(default)s)"
    )
    parser.add_argument("--workers", type=int, default=0, help="processes that read images (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="default: %(default)s")


def run(args: argparse.Namespace) -> int:
    """Trains, with a line an epoch on stderr, and prints the accuracy; --out also keeps the network."""
    from dino_fast.eval.finetune import Recipe, evaluate

    begin(args)
    names = ("epochs", "batch_size", "lr", "warmup_epochs", "weight_decay", "drop_path", "smoothing", "mixup", "cutmix")
    recipe = Recipe(**{name: getattr(args, name) for name in (*names, "operations", "erase", "seed")})
    result, model = evaluate(
        args.checkpoint,
        args.data,
        args.test,
        recipe=recipe,
        workers=args.workers,
        which=args.which,
        device=args.device,
        image_size=args.image_size,
        on_epoch=lambda epoch, loss: print(f"epoch {epoch + 1}/{args.epochs}  loss {loss:.4f}", file=sys.stderr),
    )
    if args.out is not None:
        from safetensors.torch import save_file

        state = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
        save_file(state, args.out / "finetune.safetensors")
    lines = [
        f"fine-tuned top-1 {100 * result['top1']:.2f} %  top-5 {100 * result['top5']:.2f} %  ({result['which']}, "
        f"{result['train']} training images, {result['test']} test images, {result['epochs']} epochs)"
    ]
    return report(args, "finetune", result, lines + left_out_note(result["left_out"]))
