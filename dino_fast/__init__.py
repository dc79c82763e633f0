"""Fused kernels for DINO self-distillation, and a thin engine that pretrains vision transformers with them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = ["__version__", "train"]

if TYPE_CHECKING:
    from dino_fast.engine import train


def __getattr__(name: str) -> Any:  # `import dino_fast` stays cheap: torch is loaded with the first thing that needs it
    if name == "train":
        from dino_fast.cpus import shorten_spinning

        shorten_spinning()
        from dino_fast.engine import train

        return train
    raise AttributeError(f"module 'dino_fast' has no attribute {name!r}")
