"""`dino-fast train`."""

from __future__ import annotations

import argparse

from dino_fast.engine.config import add_arguments, from_arguments

__all__ = ["add_arguments", "run"]


def run(args: argparse.Namespace) -> int:
    config = from_arguments(args)
    from dino_fast.engine.loop import train  # imports torch: a wrong setting has been told by now

    train(config)
    return 0
