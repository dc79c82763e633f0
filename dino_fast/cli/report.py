"""`dino-fast report`."""

from __future__ import annotations

import argparse
from pathlib import Path

from dino_fast.errors import UserError, make_folder, unwritable

PORT = 8420
PICTURE = b'src="data:image/'  # how a page holds one


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", type=Path, help="directory of a run, finished or not")
    parser.add_argument("--out", type=Path, metavar="FILE", help="page to write (default: report.html in the run)")
    parser.add_argument("--data", metavar="PATH", help="images to draw (default: those that the run was given)")
    parser.add_argument(
        "--images", type=int, default=1000, metavar="N", help="images to compare (default: %(default)s)"
    )
    parser.add_argument("--device", help="cpu, cuda, cuda:1 ... (default: a GPU where there is one)")
    parser.add_argument("--watch", action="store_true", help="serve the page to this machine and keep it up to date")
    parser.add_argument("--port", type=int, default=PORT, help="of --watch, 0: any free one (default: %(default)s)")


def run(args: argparse.Namespace) -> int:
    """Writes the page and says where; with --watch serves it until it is interrupted."""
    if args.images < 2:
        raise UserError(f"--images is {args.images}; give 2 or more, neighbours are looked for among them")
    if not 0 <= args.port < 65536:
        raise UserError(f"--port is {args.port}; give a number from 0 (any free port) to 65535")
    from dino_fast.report import Report

    report = Report(args.run, args.data, args.images, args.device)
    out = args.out or args.run / "report.html"
    make_folder(out.parent)
    page = report.page()
    if report.why_no_pictures and out.is_file() and PICTURE in out.read_bytes():
        raise UserError(
            f"{out} is left as it is, since it has pictures and a new page would have none: {report.why_no_pictures} "
            "For a page without pictures give another --out FILE"
        )
    try:
        out.write_text(page, encoding="utf-8")
    except OSError as error:
        raise unwritable(out, error) from error
    print(f"{out}: {len(page.encode()) / 1024:.0f} KiB, needs no other file and no network")
    if args.watch:
        from dino_fast.report.serve import open_server, serve

        server = open_server(report, args.port)
        print(f"watching {args.run}: http://127.0.0.1:{server.server_address[1]}/ (Ctrl-C ends it)", flush=True)
        serve(server)
    return 0
