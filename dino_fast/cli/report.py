"""`dino-fast report`."""

from __future__ import annotations

import argparse
from pathlib import Path

from dino_fast.errors import UserError, make_folder, unwritable

PICTURE = 'src="data:image/'  # how a page holds one


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's options to its parser."""
    parser.add_argument("run", type=Path, help="directory of a run, finished or not")
    parser.add_argument("--out", type=Path, metavar="FILE", help="page to write (default: report.html in the run)")
    parser.add_argument("--data", metavar="PATH", help="images to draw (default: those that the run was given)")
    parser.add_argument(
        "--images", type=int, default=1000, metavar="N", help="images to compare (default: %(default)s)"
    )
    parser.add_argument("--device", help="cpu, cuda, cuda:1 ... (default: a GPU where there is one)")


def run(args: argparse.Namespace) -> int:
    """Writes the page and prints where."""
    if args.images < 2:
        raise UserError(f"--images is {args.images}; give 2 or more, neighbors are looked for among them")
    from dino_fast.report import render_report

    page = render_report(args.run, args.data, args.images, args.device)
    out = args.out or args.run / "report.html"
    make_folder(out.parent)
    if PICTURE not in page and out.is_file() and PICTURE in out.read_text(encoding="utf-8", errors="replace"):
        raise UserError(
            f"{out} is left as it is, since it has pictures and a new page would have none: its images or checkpoints "
            "cannot be read. Say where the images are with --data PATH; with another --out FILE the page says why"
        )
    try:
        out.write_text(page, encoding="utf-8")
    except OSError as error:
        raise unwritable(out, error) from error
    print(f"{out}: {len(page.encode()) / 1024:.0f} KiB, needs no other file and no network")
    return 0
