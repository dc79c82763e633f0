"""The table of docs/scaling.md: predicted times of a step on many GPUs. A prediction: no part of it was measured.

python -m benchmarks.predict_scaling
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from dino_fast.engine.config import Config
from dino_fast.engine.estimate import flops_per_image, parameters, wire_bytes

PEAK = 989e12  # FLOP/s of an H100 in bfloat16
SHARE = 0.40  # of it that a step is taken to reach, between the bars for ViT-B and what larger models allow
NEAR, FAR = (
    350e9,
    40e9,
)  # bytes/s that a GPU sends to others of its machine (NVLink 4), and to other machines (400 Gb/s)
MACHINE = 8  # GPUs


@dataclass(frozen=True)
class Model:
    name: str
    images: int  # of a GPU
    settings: dict[str, Any]


PATCH_14 = {"patch_size": 14, "local_size": 98}
MODELS = (
    Model("ViT-S/16", 64, {"arch": "vit_small"}),
    Model("ViT-B/16", 64, {"arch": "vit_base"}),
    Model("ViT-L/16", 32, {"arch": "vit_large"}),
    Model("ViT-g/14", 16, {"arch": "vit_large", "embed_dim": 1408, "depth": 40, "num_heads": 16} | PATCH_14),
)


def predict(model: Model, world: int, shard: str) -> tuple[float, float]:
    """Seconds of a step's products, and seconds on the wire if nothing else were done."""
    config = Config(
        data="x", drop_path_rate=0.0, precision="bf16", fsdp=shard, batch_size=model.images * world, **model.settings
    )
    flops = flops_per_image(config, 3)
    assert flops is not None
    return model.images * flops / (SHARE * PEAK), wire_bytes(config, 3, world) / (NEAR if world <= MACHINE else FAR)


def table() -> str:
    lines = [
        "| model | parameters | images a GPU | GPUs "
        "| products, ms | wire, `none`, ms | wire, `full`, ms | step, ms | images/s |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for model in MODELS:
        count = sum(parameters(Config(data="x", **model.settings), 3))
        for world in (8, 64, 512):
            (products, none), (_, full) = (predict(model, world, shard) for shard in ("none", "full"))
            wire = min(none, full)
            fast, slow = max(products, wire), products + wire  # all of the wire hidden behind products, or none of it
            rates = f"{model.images * world / slow:,.0f} - {model.images * world / fast:,.0f}"
            lines.append(
                f"| {model.name} | {count / 1e6:.0f} M | {model.images} | {world} "
                f"| {products * 1e3:.0f} | {none * 1e3:.1f} | "
                f"{full * 1e3:.1f} | {fast * 1e3:.0f} - {slow * 1e3:.0f} | {rates} |"
            )
    return "\n".join(lines)


if __name__ == "__main__":
    print(table())
