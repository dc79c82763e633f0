"""Fine-tuning the whole network with labels, as data-efficient image transformers are trained (Touvron et al. 2021).

AdamW with 5e-4 per 512 images, weight decay 0.05 on matrices, 5 epochs of warm-up and half a cosine; stochastic depth
0.1, label smoothing 0.1, mixup 0.8 or CutMix 1.0 on every batch (each half of the time), RandAugment (2 operations of
magnitude 9), random erasing 0.25. The paper says to follow these; the original publishes no code for it.

Each picture is a function of (seed, epoch, image index), each mixture of (seed, epoch, batch).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.transforms import RandAugment, RandomErasing

from dino_fast.augment import statistics
from dino_fast.data import ImageError, Source, eval_batches
from dino_fast.data.train_loader import epoch_order
from dino_fast.defaults import torch_defaults
from dino_fast.errors import UserError
from dino_fast.eval.common.crops import random_crop
from dino_fast.models import VisionTransformer, set_drop_path_seed
from dino_fast.seeding import derive_seed

_AUGMENT, _CROP, _ERASE, _MIX, _HEAD = range(10, 15)  # draws' purposes, part of their seeds; others than the loader's
_GRAY = 128  # fills the pixels that RandAugment uncovers


@dataclass(frozen=True)
class Recipe:
    """The published settings; see the module."""

    epochs: int = 100
    batch_size: int = 512
    lr: float = 5e-4  # per 512 images
    min_lr: float = 1e-6
    warmup_epochs: float = 5
    weight_decay: float = 0.05
    drop_path: float = 0.1
    smoothing: float = 0.1
    mixup: float = 0.8  # both parameters of the Beta distribution; 0: never
    cutmix: float = 1.0
    operations: int = 2  # of RandAugment; 0: none
    magnitude: int = 9
    erase: float = 0.25
    seed: int = 0

    def check(self) -> None:
        """Raises UserError for a value that cannot be."""
        shares = {"drop_path": self.drop_path, "smoothing": self.smoothing, "erase": self.erase}
        for name, value in shares.items():
            if not 0 <= value < 1:
                raise UserError(f"{name} is {value}; it is a share from 0 to below 1")
        if self.epochs < 1 or self.batch_size < 1 or not self.lr > 0:
            raise UserError(
                f"epochs is {self.epochs}, the batch size {self.batch_size} and lr {self.lr}; all must be above 0"
            )


class Classifier(nn.Module):
    """A backbone and a linear layer on its class token: images `[B, C, H, W]` -> logits `[B, classes]`."""

    def __init__(self, backbone: VisionTransformer, classes: int, seed: int) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = nn.Linear(backbone.embed_dim, classes)
        generator = torch.Generator().manual_seed(derive_seed(seed, _HEAD))
        nn.init.trunc_normal_(self.head.weight, std=0.02, generator=generator)
        nn.init.zeros_(self.head.bias)

    def forward(self, images: Tensor) -> Tensor:
        """Logits `[B, classes]` of images `[B, C, H, W]`."""
        return cast(Tensor, self.head(self.backbone(images)))


class _Pictures(torch.utils.data.Dataset["tuple[Tensor, int, int] | None"]):
    """Distorted images of one epoch: uint8 `[C, h, w]` with their label and index, None for an unreadable image."""

    def __init__(self, source: Source, size: tuple[int, int], recipe: Recipe, epoch: int) -> None:
        self.source, self.size, self.recipe, self.epoch = source, size, recipe, epoch
        fill = [_GRAY] * source.channels
        self.augment = RandAugment(recipe.operations, recipe.magnitude, fill=fill) if recipe.operations else None

    def __getitem__(self, index: int) -> tuple[Tensor, int, int] | None:
        seed = self.recipe.seed
        try:
            image = random_crop(self.source.read(index), self.size, derive_seed(seed, _CROP, self.epoch, index))
        except ImageError:
            return None
        if self.augment is not None:
            with torch_defaults(), torch.random.fork_rng(devices=[]):
                torch.manual_seed(derive_seed(seed, _AUGMENT, self.epoch, index))
                image = self.augment(image)
        label = self.source.label(index)
        assert label is not None
        return image, label, index


def batches(
    source: Source, size: tuple[int, int], recipe: Recipe, epoch: int, workers: int = 0
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """One epoch: uint8 images `[B, C, h, w]`, labels `[B]`, indices `[B]`; every labeled, readable image once."""
    assert source.labels is not None
    labeled = torch.from_numpy(np.flatnonzero(source.labels >= 0))
    order = labeled[epoch_order(len(labeled), recipe.seed, epoch)]
    loader = torch.utils.data.DataLoader(
        _Pictures(source, size, recipe, epoch),
        batch_sampler=[part.tolist() for part in order.split(recipe.batch_size)],
        num_workers=workers,
        collate_fn=_together,
    )
    for batch in loader:
        if batch is not None:
            yield batch


def _together(rows: list[tuple[Tensor, int, int] | None]) -> tuple[Tensor, Tensor, Tensor] | None:
    """The readable rows as one batch; None if there are none."""
    readable = [row for row in rows if row is not None]
    if not readable:
        return None
    images, labels, index = zip(*readable, strict=True)
    numbers = [torch.tensor(x, dtype=torch.int64, device="cpu") for x in (labels, index)]
    return torch.stack(images), numbers[0], numbers[1]


def mixed(images: Tensor, targets: Tensor, recipe: Recipe, epoch: int, batch: int) -> tuple[Tensor, Tensor]:
    """Images `[B, C, h, w]` and targets `[B, classes]`, each mixed with the batch reversed, by mixup or CutMix."""
    kinds = [kind for kind in ("mixup", "cutmix") if getattr(recipe, kind) > 0]
    if not kinds:
        return images, targets
    rng = np.random.default_rng(derive_seed(recipe.seed, _MIX, epoch, batch))
    kind = kinds[rng.integers(len(kinds))]
    alpha = getattr(recipe, kind)
    share = float(rng.beta(alpha, alpha))  # of an image itself
    other = images.flip(0)
    if kind == "mixup":
        images = images * share + other * (1 - share)
    else:
        height, width = images.shape[2:]
        h, w = (round(side * math.sqrt(1 - share)) for side in (height, width))
        y, x = rng.integers(height), rng.integers(width)  # the box's center
        box = np.s_[:, :, max(0, y - h // 2) : y + h - h // 2, max(0, x - w // 2) : x + w - w // 2]
        images = images.clone()
        images[box] = other[box]
        share = 1 - images[0, 0][box[2:]].numel() / (height * width)
    return images, targets * share + targets.flip(0) * (1 - share)


def fit(
    backbone: VisionTransformer,
    source: Source,
    classes: int,
    size: tuple[int, int],
    recipe: Recipe,
    *,
    mean: tuple[float, ...],
    std: tuple[float, ...],
    workers: int = 0,
    on_epoch: Callable[[int, float], None] | None = None,
) -> tuple[Classifier, int]:
    """Trains `backbone` (on its device, in place) and a new linear layer on the labeled images of `source`.

    bf16 on a GPU that has it. `on_epoch` gets the epoch and its mean loss. Returns the network, in evaluation mode, and
    how many images an epoch had. Raises UserError where the loss is not finite.
    """
    recipe.check()
    assert source.labels is not None
    device = next(backbone.parameters()).device
    half = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    model = Classifier(backbone, classes, recipe.seed).to(device).train().requires_grad_(True)
    for i, block in enumerate(backbone.blocks):
        block.drop_path.rate = recipe.drop_path * i / max(1, len(backbone.blocks) - 1)  # type: ignore[union-attr]
    matrices = [p for n, p in model.named_parameters() if p.ndim > 1 and not n.endswith(("pos_embed", "cls_token"))]
    others = [p for p in model.parameters() if not any(p is q for q in matrices)]
    groups = [{"params": matrices, "weight_decay": recipe.weight_decay}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=recipe.lr)
    steps = max(1, -(-int((source.labels >= 0).sum()) // recipe.batch_size))  # an epoch
    offset, scale = statistics(mean, std, source.channels)
    eraser = RandomErasing(recipe.erase, value="random") if recipe.erase else None
    for epoch in range(recipe.epochs):
        losses, used = [], 0
        for number, (images, labels, index) in enumerate(batches(source, size, recipe, epoch, workers)):
            x = images.float().div_(255).sub_(offset).div_(scale)
            if eraser is not None:
                seeds = [derive_seed(recipe.seed, _ERASE, epoch, i) for i in index.tolist()]
                x = torch.stack([_erased(eraser, one, seed) for one, seed in zip(x, seeds, strict=True)])
            x, targets = mixed(x.to(device), F.one_hot(labels, classes).float().to(device), recipe, epoch, number)
            step = epoch * steps + number
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(recipe, step, steps)
            set_drop_path_seed(model, recipe.seed, step)
            optimizer.zero_grad()
            with torch.autocast(device.type, torch.bfloat16, enabled=half):
                logits = model(x)
            loss = F.cross_entropy(logits.float(), targets, label_smoothing=recipe.smoothing)
            loss.backward()
            optimizer.step()
            losses.append(loss.detach())
            used += len(x)
        if not losses:
            raise UserError(f"none of the {len(source)} training images can be read; 'dino-fast data check' says why")
        average = torch.stack(losses).mean().item()
        if not math.isfinite(average):
            raise UserError(f"the loss is {average} in epoch {epoch}; try a lower --lr than {recipe.lr:g}")
        if on_epoch is not None:
            on_epoch(epoch, average)
    return model.eval(), used


def learning_rate(recipe: Recipe, step: int, steps: int) -> float:
    """At `step` of `recipe.epochs * steps`: rising from 1e-6 through the warm-up, then half a cosine to `min_lr`."""
    top = recipe.lr * recipe.batch_size / 512
    total, warm = recipe.epochs * steps, min(recipe.warmup_epochs, recipe.epochs / 2) * steps
    if step < warm:
        return 1e-6 + (top - 1e-6) * step / warm
    done = (step - warm) / max(1e-9, total - warm)
    return recipe.min_lr + (top - recipe.min_lr) * 0.5 * (1 + math.cos(math.pi * done))


@torch.no_grad()
def accuracy(
    model: nn.Module, source: Source, size: tuple[int, int], mean: tuple[float, ...], std: tuple[float, ...]
) -> tuple[float, float, int]:
    """The shares of labeled images whose class is first, and among the first five, and the number of these images."""
    device = next(model.parameters()).device
    first = five = count = 0
    for images, labels in eval_batches(source, size, mean, std, 128):
        labeled = labels >= 0
        logits = model(images[labeled].to(device)).float().cpu()
        own = logits.gather(1, labels[labeled, None])
        above = (logits > own).sum(dim=1)
        first, five, count = first + int((above < 1).sum()), five + int((above < 5).sum()), count + len(above)
    if not count:
        raise UserError("no image that can be read has a label")
    return first / count, five / count, count


@torch_defaults()
def evaluate(
    checkpoint: str | Path,
    data: str | Path,
    test: str | Path | None = None,
    *,
    recipe: Recipe | None = None,
    workers: int = 0,
    which: str = "teacher",
    device: str | None = None,
    image_size: int | None = None,
    on_epoch: Callable[[int, float], None] | None = None,
) -> tuple[dict[str, Any], Classifier]:
    """Fine-tunes a checkpoint on `data` and classifies `test`, or the held-out part of `data`, after the last epoch.

    A `batch_size` above the number of training images is lowered to it. Returns (`top1`, `top5`, `train`, `test`,
    `left_out` and the settings; the trained network).
    """
    from dino_fast.eval.common.backbone import open_backbone
    from dino_fast.eval.common.labels import left_out, open_labeled

    recipe = recipe or Recipe()
    recipe.check()
    train, held_out, classes = open_labeled(data, test)
    assert train.labels is not None
    labeled = int((train.labels >= 0).sum())
    recipe = replace(recipe, batch_size=min(recipe.batch_size, labeled))
    frozen = open_backbone(checkpoint, which, device)
    size = frozen.size(image_size)
    frozen.prepare(train)
    frozen.prepare(held_out)
    model, used = fit(
        frozen.backbone,
        train,
        classes,
        size,
        recipe,
        mean=frozen.mean,
        std=frozen.std,
        workers=workers,
        on_epoch=on_epoch,
    )
    top1, top5, count = accuracy(model, held_out, size, frozen.mean, frozen.std)
    result = {
        "top1": top1,
        "top5": top5,
        "train": used,
        "test": count,
        "left_out": {"train": left_out(train, used), "test": left_out(held_out, count)},
        "classes": classes,
        "image_size": list(size),
        "which": which,
        "checkpoint": str(checkpoint),
        **vars(recipe),
    }
    return result, model


def _erased(eraser: RandomErasing, image: Tensor, seed: int) -> Tensor:
    with torch_defaults(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return cast(Tensor, eraser(image))
