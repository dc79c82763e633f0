"""Before a run begins: its images, its loader, and what "auto" means on this machine."""

from __future__ import annotations

import os
from dataclasses import dataclass

import numpy as np
import torch

from dino_fast.backends import cuda_missing
from dino_fast.data import Source, Subset, TrainLoader, open_source, split, train_loader
from dino_fast.data.gpu_crops import nvjpeg_missing
from dino_fast.engine.config import Config, multi_crop
from dino_fast.engine.distributed import ALONE, Ranks
from dino_fast.errors import UserError


@dataclass
class Data:
    """The images of a run; `bank` and `test` are None where k-NN is not measured, for the reason in `why`."""

    train: Source
    bank: Source | None = None
    test: Source | None = None
    why: str = ""


def open_data(config: Config) -> Data:
    """Opens the images; holds some out for k-NN where they have labels and no held-out part of their own."""
    source = open_source(config.data)
    if config.channels is not None:
        for part in (source, source.test):
            if part is not None:
                part.channels = config.channels
    if config.knn_every == 0:
        return Data(source, why="k-NN evaluation is off (knn_every 0)")
    if not labelled(source):
        return Data(source, why="no k-NN evaluation: the images have no labels (class sub-folders give them labels)")
    training, test = split(source)
    if not labelled(test):
        return Data(training, why="no k-NN evaluation: the held-out images have no labels")
    return Data(training, sample(training, config.knn_images), sample(test, config.knn_images))


def labelled(source: Source) -> bool:
    return source.labels is not None and bool((source.labels >= 0).any())


def sample(source: Source, count: int) -> Source:
    """At most `count` images, always the same ones."""
    if len(source) <= count:
        return source
    return Subset(source, np.sort(np.random.default_rng(0).permutation(len(source))[:count]))


def make_loader(config: Config, source: Source, device: torch.device, ranks: Ranks = ALONE) -> TrainLoader:
    colour = source.channels == 3 and len(config.mean) == 3
    crops = multi_crop(config)
    if not colour:
        crops.statistics(source.channels)  # refuses means that do not fit, before anything is written
    return train_loader(
        source,
        crops,
        batch_size=config.batch_size,
        seed=config.seed,
        workers=choose_workers(config.workers, device, ranks.local_world),
        rank=ranks.rank,
        world=ranks.world,
        epochs=config.epochs,
        max_bad=config.max_bad,
        pin_memory=device.type == "cuda",
        gpu=choose_cropping(config.augment_on, config.decode_on, device),
        encoded=config.decode_on == "gpu",
    )


def choose_cropping(augment_on: str, decode_on: str, device: torch.device) -> torch.device | None:
    """The GPU that makes the crops, None for the CPU."""
    missing = cuda_missing() if device.type == "cuda" else f"the run trains on {device}"
    if augment_on == "gpu" and missing:
        raise UserError(f"--augment-on gpu: {missing}; use --augment-on cpu or auto ('dino-fast info' tells more)")
    if decode_on == "gpu" and (missing or augment_on == "cpu"):
        raise UserError(f"--decode-on gpu: {missing or 'the crops are made on the CPU'}; use --decode-on cpu")
    if augment_on == "cpu" or missing:
        return None
    if decode_on == "gpu" and (reason := nvjpeg_missing(device)):
        raise UserError(f"--decode-on gpu: torchvision cannot ({reason}); use --decode-on cpu")
    return device


def choose_device(name: str) -> torch.device:
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError(
            "--device cuda: PyTorch finds no GPU here ('dino-fast info' tells what it finds); use --device cpu"
        )
    return torch.device("cuda" if name == "auto" and torch.cuda.is_available() else name.replace("auto", "cpu"))


def choose_workers(count: int | None, device: torch.device, processes: int = 1) -> int:
    """On a CPU none: training and loading share the cores. On a GPU one for each of this process's share of them.

    On two cores the demo ran at 1030 images/s without workers, 990 with one, 870 with two.
    """
    if count is not None:
        return count
    return 0 if device.type == "cpu" else max(1, min(10, (os.cpu_count() or 1) // processes))


def choose_precision(name: str, device: torch.device) -> str:
    if name != "auto":
        return name
    if device.type == "cpu":
        return "fp32"
    return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
