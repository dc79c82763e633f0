"""Fused kernels for DINO self-distillation, and a thin engine that pretrains vision transformers with them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
_API = ("Backbone", "Embeddings", "Run", "embed", "load", "train")
_SETTINGS = ("Config", "build_config")
__all__ = ["Backbone", "Config", "Embeddings", "Run", "__version__", "build_config", "embed", "load", "train"]

if TYPE_CHECKING:
    from dino_fast.api import Backbone, Embeddings, Run, embed, load, train
    from dino_fast.engine.config import Config, build_config


def __getattr__(name: str) -> Any:  # `import dino_fast` stays cheap: torch is loaded with the first thing that needs it
    if name in _API:
        from dino_fast.cpus import shorten_spinning

        shorten_spinning()
        from dino_fast import api

        return getattr(api, name)
    if name in _SETTINGS:
        from dino_fast.engine import config

        return getattr(config, name)
    raise AttributeError(f"module 'dino_fast' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
