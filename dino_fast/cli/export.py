"""`dino-fast export`."""

from __future__ import annotations

import argparse
from pathlib import Path

# Names of `dino_fast.models.weights.export.FORMATS`, which imports torch.
FORMATS = ("safetensors", "timm", "torch-hub", "transformers", "onnx", "torch-export")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's options to its parser."""
    parser.add_argument(
        "--checkpoint",
        required=True,
        help="a run, one of its checkpoints, a weights file or folder of DINO, DINOv2, timm or transformers, hub:NAME "
        "or timm:NAME",
    )
    parser.add_argument(
        "--out", required=True, type=Path, help="the file (.safetensors, .pth, .onnx, .pt2) or folder to write"
    )
    parser.add_argument(
        "--format",
        choices=FORMATS,
        help="by default what the ending of --out says; timm, torch-hub and transformers are folders",
    )
    parser.add_argument("--which", choices=("teacher", "student"), default="teacher", help="default: %(default)s")


def run(args: argparse.Namespace) -> int:
    """Writes the backbone and says where, and how to load it."""
    from dino_fast.eval.common.backbone import open_backbone
    from dino_fast.models.weights.export import export

    frozen = open_backbone(args.checkpoint, args.which, "cpu", tokens=False)
    path, how = export(frozen.backbone, args.out, args.format, mean=list(frozen.mean), std=list(frozen.std))
    count = sum(p.numel() for p in frozen.backbone.parameters())
    print(f"wrote the {args.which}'s backbone ({count / 1e6:.2f} M parameters) to {path}\nload it with: {how}")
    return 0
