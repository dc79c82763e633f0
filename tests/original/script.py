"""The published training script around the iteration: crops by Pillow in data-loader workers, a log line an epoch.

Kept to what it does to every image and every step; its command line, checkpoints and process group are left out.
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image, ImageFilter, ImageOps
from torch import Tensor
from torchvision import transforms

from .head import DINOHead, MultiCropWrapper
from .loss import DINOLoss
from .optim import cosine_scheduler
from .train import Trainer
from .vit import ViT


class GaussianBlur:
    def __init__(self, p: float) -> None:
        self.p = p

    def __call__(self, image: Image.Image) -> Image.Image:
        if random.random() > self.p:
            return image
        return image.filter(ImageFilter.GaussianBlur(radius=random.uniform(0.1, 2.0)))


class Solarization:
    def __init__(self, p: float) -> None:
        self.p = p

    def __call__(self, image: Image.Image) -> Image.Image:
        return ImageOps.solarize(image) if random.random() < self.p else image


class Augmentation:
    """An image -> two global crops and `n_local` local ones, each normalised."""

    def __init__(self, global_size: int, local_size: int, n_local: int) -> None:
        bicubic = transforms.InterpolationMode.BICUBIC
        jitter = transforms.ColorJitter(brightness=0.4, contrast=0.4, saturation=0.2, hue=0.1)
        colour = [
            transforms.RandomHorizontalFlip(p=0.5),
            transforms.RandomApply([jitter], p=0.8),
            transforms.RandomGrayscale(p=0.2),
        ]
        normalise = [transforms.ToTensor(), transforms.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))]

        def crop(size: int, scale: tuple[float, float], *more: Callable) -> transforms.Compose:
            first = transforms.RandomResizedCrop(size, scale=scale, interpolation=bicubic)
            return transforms.Compose([first, *colour, *more, *normalise])

        self.first = crop(global_size, (0.4, 1.0), GaussianBlur(1.0))
        self.second = crop(global_size, (0.4, 1.0), GaussianBlur(0.1), Solarization(0.2))
        self.local = crop(local_size, (0.05, 0.4), GaussianBlur(0.5))
        self.n_local = n_local

    def __call__(self, image: Image.Image) -> list[Tensor]:
        return [self.first(image), self.second(image), *(self.local(image) for _ in range(self.n_local))]


class Images(torch.utils.data.Dataset):
    """uint8 arrays [H, W, 3] in memory."""

    def __init__(self, arrays: list[np.ndarray], augmentation: Augmentation) -> None:
        self.arrays, self.augmentation = arrays, augmentation

    def __len__(self) -> int:
        return len(self.arrays)

    def __getitem__(self, index: int) -> tuple[list[Tensor], int]:
        return self.augmentation(Image.fromarray(self.arrays[index])), 0


@dataclass
class Settings:
    out_dim: int = 65536
    batch_size: int = 64
    epochs: int = 100
    global_size: int = 32
    local_size: int = 16
    local_crops: int = 8
    patch_size: int = 4
    width: int = 192
    depth: int = 6
    heads: int = 3
    head_hidden: int = 2048
    drop_path_rate: float = 0.1
    lr: float = 0.0005
    freeze_last_layer: int = 0
    workers: int = 0
    seed: int = 0


def run(arrays: list[np.ndarray], settings: Settings) -> Iterator[tuple[float, float]]:
    """Trains; yields each step's loss and the time at its end."""
    random.seed(settings.seed)
    torch.manual_seed(settings.seed)
    s = settings
    data = Images(arrays, Augmentation(s.global_size, s.local_size, s.local_crops))
    loader = torch.utils.data.DataLoader(
        data, batch_size=s.batch_size, shuffle=True, drop_last=True, num_workers=s.workers, pin_memory=False
    )
    backbone = (s.global_size, s.patch_size, 3, s.width, s.depth, s.heads)
    student, teacher = (
        MultiCropWrapper(ViT(*backbone, drop_path_rate=rate), DINOHead(s.width, s.out_dim, hidden_dim=s.head_hidden))
        for rate in (s.drop_path_rate, 0.0)
    )
    steps = len(loader)
    trainer = Trainer(
        student,
        teacher,
        DINOLoss(s.out_dim, 2 + s.local_crops, 0.04, 0.04, 0, s.epochs),
        cosine_scheduler(s.lr * s.batch_size / 256, 1e-6, s.epochs, steps, warmup_epochs=10),
        cosine_scheduler(0.04, 0.4, s.epochs, steps),
        cosine_scheduler(0.996, 1.0, s.epochs, steps),
        freeze_last_layer=s.freeze_last_layer,
    )
    for epoch in range(s.epochs):
        for step, (crops, _) in enumerate(loader):
            loss = trainer.step(crops, steps * epoch + step, epoch)
            if not math.isfinite(loss):
                raise RuntimeError(f"loss is {loss}")
            yield loss, time.perf_counter()
