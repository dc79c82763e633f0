"""`dino-fast data preview`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from dino_fast.cli.pixels import add_pixel_options, given_pixel_options
from dino_fast.engine.config import build_config, multi_crop
from dino_fast.engine.presets import PRESETS
from dino_fast.errors import UserError, make_folder, unwritable


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's options to its parser."""
    parser.add_argument("path", help="folder, .parquet file, text file listing images, or 'demo'")
    parser.add_argument("--out", type=Path, default=Path("preview.png"), help="picture to write (default: %(default)s)")
    parser.add_argument("--images", type=int, default=4, metavar="N", help="images to show (default: %(default)s)")
    parser.add_argument("--preset", metavar="NAME", help=f"crops of this recipe: {', '.join(PRESETS)}")
    parser.add_argument("--config", metavar="FILE", help="crops of this YAML file (a run's config.yaml, say)")
    given: dict[str, Any] = {"default": argparse.SUPPRESS, "type": int}
    parser.add_argument("--local-crops", metavar="N", help="instead of the recipe's", **given)
    parser.add_argument("--global-size", metavar="PX", help="instead of the recipe's", **given)
    parser.add_argument("--local-size", metavar="PX", help="instead of the recipe's", **given)
    parser.add_argument("--seed", help="another one draws other crops", **given)
    add_pixel_options(parser)


def run(args: argparse.Namespace) -> int:
    """Writes the picture and says where."""
    given = {name: getattr(args, name) for name in ("local_crops", "global_size", "local_size", "seed") if name in args}
    config = build_config(
        {**given, **given_pixel_options(args), "data": args.path}, preset=args.preset, file=args.config
    )
    from dino_fast.data import open_source
    from dino_fast.data.deep_pixels import range_of
    from dino_fast.data.inspect import draw, readable
    from dino_fast.data.source import configure

    source = open_source(config.data)
    configure(source, config.channels, range_of(config.bit_depth, config.pixel_range))
    images = readable(source, args.images)
    picture = draw(images, multi_crop(config), config.seed)
    make_folder(args.out.parent)
    try:
        picture.save(args.out)
    except ValueError as error:
        raise UserError(f"--out {args.out} is no name of a picture ({error}); end it in .png or .jpg") from error
    except OSError as error:
        raise unwritable(args.out, error) from error
    print(
        f"{args.out}: {len(images)} images; each row is the image with its boxes, "
        f"2 global crops of {config.global_size} px, {config.local_crops} local of {config.local_size}"
    )
    return 0
