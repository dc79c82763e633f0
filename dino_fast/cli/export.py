"""`dino-fast export`."""

from __future__ import annotations

import argparse
from pathlib import Path

from dino_fast.errors import UserError

# Names of `dino_fast.models.weights.export.FORMATS`, which imports torch.
FORMATS = ("safetensors", "timm", "torch-hub", "hub", "transformers", "onnx", "torch-export")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's options to its parser."""
    parser.add_argument(
        "--checkpoint",
        required=True,
        help="a run, one of its checkpoints, a weights file or folder of DINO, DINOv2, timm or transformers, hub:NAME "
        "or timm:NAME",
    )
    parser.add_argument("--out", type=Path, help="the file (.safetensors, .pth, .onnx, .pt2) or folder to write")
    parser.add_argument(
        "--format",
        choices=FORMATS,
        help="by default what the ending of --out says; timm, torch-hub, hub and transformers are folders",
    )
    parser.add_argument(
        "--push", metavar="REPO", help="with --format hub: also upload it to this repository of the Hugging Face Hub"
    )
    parser.add_argument("--which", choices=("teacher", "student"), default="teacher", help="default: %(default)s")


def run(args: argparse.Namespace) -> int:
    """Writes the backbone and says where, and how to load it."""
    if args.push is not None and args.format != "hub":
        raise UserError(f"--push {args.push} uploads what --format hub writes; add --format hub")
    if args.out is None:
        if args.push is None:
            raise UserError("--out is missing: the file or folder to write")
        args.out = Path(args.push.rpartition("/")[2])
    from dino_fast.eval.common.backbone import open_backbone
    from dino_fast.models.weights.export import export

    frozen = open_backbone(args.checkpoint, args.which, "cpu", tokens=False)
    facts = {"mean": list(frozen.mean), "std": list(frozen.std)}
    if frozen.pixel_range is not None:
        facts["pixel_range"] = list(frozen.pixel_range)
    path, how = export(frozen.backbone, args.out, args.format, **facts)
    count = sum(p.numel() for p in frozen.backbone.parameters())
    print(f"wrote the {args.which}'s backbone ({count / 1e6:.2f} M parameters) to {path}\nload it with: {how}")
    if args.push is not None:
        from dino_fast.models.weights.hub_folder import push_folder

        address = push_folder(path, args.push)
        print(f"uploaded to {address}; load it with: dino_fast.Backbone.from_pretrained({args.push!r})")
    return 0
