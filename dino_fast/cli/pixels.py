"""The options of `data check` and `data preview` that say how files become pixels; `train` has the same."""

from __future__ import annotations

import argparse
from typing import Any


def add_pixel_options(parser: argparse.ArgumentParser) -> None:
    """`--channels`, `--bit-depth` and `--pixel-range`; the namespace holds only what was given."""
    absent: dict[str, Any] = {"default": argparse.SUPPRESS}
    parser.add_argument("--channels", type=int, metavar="N", help="read as gray (1), color (3) or N bands", **absent)
    parser.add_argument(
        "--bit-depth", type=int, metavar="N", help="bits in use of images of more than 8: 12 for 0 to 4095", **absent
    )
    parser.add_argument(
        "--pixel-range",
        type=float,
        nargs=2,
        metavar=("LOW", "HIGH"),
        help="values that become black and white in images of more than 8 bits, signed ones and floats",
        **absent,
    )


def given_pixel_options(args: argparse.Namespace) -> dict[str, Any]:
    """The options of `add_pixel_options` that were given, as settings."""
    return {name: getattr(args, name) for name in ("channels", "bit_depth", "pixel_range") if name in args}
