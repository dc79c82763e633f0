"""Images: sources, decoding, the training loader and the batches of an evaluation."""

from __future__ import annotations

from dino_fast.data.decode import ImageError
from dino_fast.data.loader import Batch, TrainLoader, eval_batches, train_loader
from dino_fast.data.sources import ArraySource, Source, Subset, held_out, open_source, split

__all__ = [
    "ArraySource",
    "Batch",
    "ImageError",
    "Source",
    "Subset",
    "TrainLoader",
    "eval_batches",
    "held_out",
    "open_source",
    "split",
    "train_loader",
]
