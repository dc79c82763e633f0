"""Makes the demo set from the four files of Fashion-MNIST: `python tools/make_demo.py FOLDER`.

Debian's package `dataset-fashion-mnist` installs them to /usr/share/datasets/fashion-mnist.
"""

from __future__ import annotations

import gzip
import io
import json
import sys
from pathlib import Path

import numpy as np
from PIL import Image

from dino_fast.data.formats.demo import DEMO_FILES

CLASSES = ["T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"]
PARTS = {"train": ("train", 500), "test": ("t10k", 100)}  # prefix of the files, images a class


def make(folder: Path) -> None:
    """Writes the Parquet files: a seeded, balanced choice, shuffled, as PNG in the layout of Hugging Face datasets."""
    import pyarrow as arrow
    import pyarrow.parquet

    features = {"image": {"_type": "Image"}, "label": {"names": CLASSES, "_type": "ClassLabel"}}
    schema = arrow.schema(
        {"image": arrow.struct({"bytes": arrow.binary(), "path": arrow.string()}), "label": arrow.int64()},
        metadata={"huggingface": json.dumps({"info": {"features": features}})},
    )
    for part, (prefix, count) in PARTS.items():
        images = np.frombuffer(
            gzip.decompress((folder / f"{prefix}-images-idx3-ubyte.gz").read_bytes()), np.uint8, offset=16
        )
        labels = np.frombuffer(
            gzip.decompress((folder / f"{prefix}-labels-idx1-ubyte.gz").read_bytes()), np.uint8, offset=8
        )
        rng = np.random.default_rng(0)
        chosen = np.concatenate([rng.choice(np.flatnonzero(labels == c), count, replace=False) for c in range(10)])
        rows = [
            {
                "image": {"bytes": _png(images.reshape(-1, 28, 28)[i]), "path": f"{prefix}-{i}.png"},
                "label": int(labels[i]),
            }
            for i in rng.permutation(chosen)
        ]
        arrow.parquet.write_table(arrow.Table.from_pylist(rows, schema=schema), DEMO_FILES[part], compression="zstd")


def _png(pixels: np.ndarray) -> bytes:
    data = io.BytesIO()
    Image.fromarray(pixels).save(data, "PNG", optimize=True)
    return data.getvalue()


if __name__ == "__main__":
    make(Path(sys.argv[1]))
