"""The published training loop with three imports changed: the loss, the teacher's average and the optimizer.

    python examples/original_loop.py --steps 20

Names from `dino_fast.benchmarks.original` stand for what your script defines already. The losses it prints are those
that it printed before. One line further, `AdamWEMA` clips and moves the teacher in its own pass: lightning_module.py.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from dino_fast.augment import MultiCrop
from dino_fast.benchmarks import original
from dino_fast.data import open_source, train_loader
from dino_fast.loss import DINOLoss  # was: the script's own
from dino_fast.optim import AdamWEMA, ema_update  # was: torch.optim.AdamW; a loop over parameters

EPOCHS, PER_EPOCH, BATCH, LOCAL, OUT_DIM = 2, 10, 16, 4, 512


def network(drop_path_rate: float = 0.0) -> nn.Module:
    vit = original.ViT(
        img_size=28, patch_size=7, in_chans=1, embed_dim=64, depth=3, num_heads=2, drop_path_rate=drop_path_rate
    )
    return original.MultiCropWrapper(vit, original.DINOHead(64, OUT_DIM, hidden_dim=128, bottleneck_dim=64))


def demo_crops(steps: int) -> Iterator[list[Tensor]]:
    """Lists of crops [B, 1, h, w], the two global ones first, of the images that ship with the package."""
    crops = MultiCrop(28, 14, LOCAL, mean=(0.286,), std=(0.353,))
    batches = iter(train_loader(open_source("demo"), crops, batch_size=BATCH, seed=0))
    for _, batch in zip(range(steps), batches, strict=False):
        yield [*batch.global_crops, *batch.local_crops]


def train(student: nn.Module, teacher: nn.Module, batches: Iterator[list[Tensor]]) -> Iterator[float]:
    teacher.load_state_dict(student.state_dict())
    optimizer = AdamWEMA(original.get_params_groups(student), None)
    dino_loss = DINOLoss(OUT_DIM, 2 + LOCAL, 0.04, 0.07, 1, EPOCHS)
    lr = original.cosine_scheduler(0.002, 1e-6, EPOCHS, PER_EPOCH, 1)
    weight_decay = original.cosine_scheduler(0.04, 0.4, EPOCHS, PER_EPOCH)
    momentum = original.cosine_scheduler(0.9, 1.0, EPOCHS, PER_EPOCH)
    for it, crops in enumerate(batches):
        for i, group in enumerate(optimizer.param_groups):
            group["lr"] = lr[it]
            if i == 0:
                group["weight_decay"] = weight_decay[it]
        with torch.no_grad():
            teacher_output = teacher(crops[:2])
        loss = dino_loss(student(crops), teacher_output, it // PER_EPOCH)
        optimizer.zero_grad()
        loss.backward()
        original.clip_gradients(student, 3.0)
        original.cancel_gradients_last_layer(it // PER_EPOCH, student, 1)
        optimizer.step()
        ema_update(teacher.parameters(), student.parameters(), momentum[it])
        yield loss.item()


def main(argv: list[str] | None = None) -> list[float]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, choices=range(1, 21), default=20, metavar="1..20")
    steps = parser.parse_args(argv).steps
    torch.manual_seed(0)
    losses = []
    for loss in train(network(0.1), network(), demo_crops(steps)):
        losses.append(loss)
        print(f"step {len(losses) - 1}: loss {loss:.6f}")
    return losses


if __name__ == "__main__":
    main()
