"""The training engine: one process, one configuration, one directory."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dino_fast.engine.config import Config

__all__ = ["train"]


def train(config: Config) -> Path:
    """Train as configured; returns the run directory. See `dino_fast.engine.config.Config` for the settings."""
    from dino_fast.engine.trainer import train as run  # imports torch

    return run(config)
