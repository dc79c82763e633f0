"""Images: sources, decoding, the training loader and the batches of an evaluation."""

from __future__ import annotations

from dino_fast.data.batch import Batch
from dino_fast.data.decode import ImageError
from dino_fast.data.eval_loader import eval_batches
from dino_fast.data.open import open_source, split
from dino_fast.data.source import ArraySource, Source, SourceNote, Subset
from dino_fast.data.train_loader import TrainLoader, train_loader

__all__ = [
    "ArraySource",
    "Batch",
    "ImageError",
    "Source",
    "SourceNote",
    "Subset",
    "TrainLoader",
    "eval_batches",
    "open_source",
    "split",
    "train_loader",
]
