"""`dino-fast data preview`."""

from __future__ import annotations

import argparse
from pathlib import Path

from dino_fast.errors import UserError, make_folder, unwritable


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("path", help="folder, .parquet file, text file listing images, or 'demo'")
    parser.add_argument("--out", type=Path, default=Path("preview.png"), help="picture to write (default: %(default)s)")
    parser.add_argument("--images", type=int, default=4, metavar="N", help="images to show (default: %(default)s)")
    parser.add_argument("--local-crops", type=int, default=8, metavar="N", help="local crops (default: %(default)s)")
    parser.add_argument("--global-size", type=int, metavar="PX", help="default: 224, or the image's size if smaller")
    parser.add_argument("--local-size", type=int, metavar="PX", help="default: 3/7 of the global size")
    parser.add_argument("--seed", type=int, default=0, help="default: %(default)s")


def run(args: argparse.Namespace) -> int:
    """Writes the picture and says where."""
    from dino_fast.augment import MultiCrop
    from dino_fast.data import open_source
    from dino_fast.data.preview import draw, readable

    images = readable(open_source(args.path), args.images)
    size = args.global_size or min(224, *(min(image.shape[1:]) for image in images))
    local = args.local_size or max(1, round(size * 3 / 7))
    crops = MultiCrop(global_size=size, local_size=local, n_local=args.local_crops)
    picture = draw(images, crops, args.seed)
    make_folder(args.out.parent)
    try:
        picture.save(args.out)
    except ValueError as error:
        raise UserError(f"--out {args.out} is no name of a picture ({error}); end it in .png or .jpg") from error
    except OSError as error:
        raise unwritable(args.out, error) from error
    print(
        f"{args.out}: {len(images)} images; each row is the image with its boxes, 2 global crops, {crops.n_local} local"
    )
    return 0
