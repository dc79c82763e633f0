"""From a Hugging Face `datasets` source to a folder that is ready for the Hub.

    pip install datasets transformers
    python examples/hugging_face.py --out runs/hub --steps 200
    hf upload YOU/REPOSITORY runs/hub/export      # when you like it

Without network it makes the dataset from the images that ship with the package; yours is
`datasets.load_dataset("NAME", split="train")`, and the rest stays as it is.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import datasets
from PIL import Image

import dino_fast
from dino_fast.data import open_source
from dino_fast.engine.config import build_config
from dino_fast.eval.common.backbone import open_backbone
from dino_fast.models.weights.export import export

CARD = """---
library_name: transformers
pipeline_tag: image-feature-extraction
tags: [dino, self-supervised-learning]
---
A vision transformer of {parameters:.2f} M parameters, pretrained without labels with DINO (arXiv:2104.14294) on
{images} images by dino-fast {version}. Features are the class token of the last layer:

    model = transformers.AutoModel.from_pretrained("THIS REPOSITORY", add_pooling_layer=False)
    features = model(images).last_hidden_state[:, 0]
"""


def demo_dataset(images: int) -> datasets.Dataset:
    """Columns `image` and `label`, as image datasets on the Hub have them."""
    source = open_source("demo")
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=source.classes)})
    rows = {
        "image": [Image.fromarray(source.read(i)[0].numpy()) for i in range(images)],
        "label": [source.label(i) for i in range(images)],
    }
    return datasets.Dataset.from_dict(rows, features=features)


def main(argv: list[str] | None = None) -> Path:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="a new folder: dataset/, run/ and export/")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--images", type=int, default=2000, help="of the demo, at most 5,000")
    args = parser.parse_args(argv)

    dataset = demo_dataset(args.images)
    print(f"a source of {len(open_source(dataset))} images")  # a Dataset is a source for loops of your own
    dataset.save_to_disk(args.out / "dataset")  # and a saved one is `--data` of the command line
    settings = {"data": str(args.out / "dataset"), "out": str(args.out / "run"), "max_steps": args.steps, "channels": 1}
    run = dino_fast.train(build_config(settings, preset="demo"))

    frozen = open_backbone(run, "teacher", "cpu")
    facts = {"mean": list(frozen.mean), "std": list(frozen.std)}
    folder, how = export(frozen.backbone, args.out / "export", "transformers", **facts)
    parameters = sum(p.numel() for p in frozen.backbone.parameters()) / 1e6
    card = CARD.format(parameters=parameters, images=len(dataset), version=dino_fast.__version__)
    (folder / "README.md").write_text(card, encoding="utf-8")
    print(f"load it with {how}")
    return folder


if __name__ == "__main__":
    main()
