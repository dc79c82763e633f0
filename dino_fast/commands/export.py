"""`dino-fast export`."""

from __future__ import annotations

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--checkpoint", required=True, help="a run, one of its checkpoints, .safetensors or .pth")
    parser.add_argument("--out", required=True, type=Path, help="the file to write: .safetensors or .pth")
    parser.add_argument("--which", choices=("teacher", "student"), default="teacher", help="default: %(default)s")


def run(args: argparse.Namespace) -> int:
    """Writes the backbone and says where."""
    from dino_fast.models.checkpoints import describe, export_backbone, load_backbone

    facts = describe(args.checkpoint, args.which)
    statistics = {name: facts[name] for name in ("mean", "std") if name in facts}
    backbone = load_backbone(args.checkpoint, which=args.which)
    path = export_backbone(backbone, args.out, **statistics)
    count = sum(p.numel() for p in backbone.parameters())
    print(f"wrote the {args.which}'s backbone ({count / 1e6:.2f} M parameters) to {path}")
    return 0
