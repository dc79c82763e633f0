"""The Python door: `dino_fast.train`, `dino_fast.load` and `dino_fast.embed` are what the commands do."""

from __future__ import annotations

import dataclasses
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from dino_fast.data import open_source
from dino_fast.data.open import IN_MEMORY
from dino_fast.engine.config import Config, build_config
from dino_fast.engine.run_dir import read_metrics
from dino_fast.errors import UserError
from dino_fast.eval.embed import Embeddings, embed
from dino_fast.eval.loaded import Backbone
from dino_fast.models import custom

__all__ = ["Backbone", "Embeddings", "Run", "embed", "load", "train"]


@dataclass(frozen=True)
class Run(os.PathLike[str]):
    """A finished run. `path` is its directory; a run is given wherever a path to one is."""

    path: Path

    @property
    def metrics(self) -> list[dict[str, Any]]:
        """A dictionary a step, as metrics.jsonl has them: `step`, `loss`, `knn` where it was measured, ..."""
        return read_metrics(self.path)

    def load(self, which: str = "teacher", device: str | None = None) -> Backbone:
        """The trained backbone, ready for images; see `dino_fast.load`."""
        return load(self.path, which=which, device=device)

    def __fspath__(self) -> str:
        return str(self.path)

    def __str__(self) -> str:
        return str(self.path)


def train(config: Config | str | Path | None = None, *, preset: str | None = None, **settings: Any) -> Run:
    """Trains a backbone as `dino-fast train` does, and returns the run.

    Example: `run = dino_fast.train(data="photos/", out="runs/a", epochs=100)`, then `run.load()(images)`.

    Args:
        config: a YAML file of settings, or a `Config`; `settings` win over it.
        preset: a recipe to start from, as `--preset`.
        settings: the options of `dino-fast train` with underscores: `data`, `out`, `arch`, `batch_size`, ... `data` is
            a path or any object that `dino_fast.data.open_source` takes: an array, a list, a
            `torch.utils.data.Dataset`. `arch` is a name, or a module of your own that turns images [B, C, H, W] into
            features [B, dim].

    Raises UserError with the command's sentence for a setting that cannot be used, and KeyboardInterrupt after Ctrl-C
    or SIGTERM, once the run is saved; `resume=True` with the same `out` continues it.
    """
    from dino_fast.engine.trainer import train as run

    source, data = None, settings.get("data")
    if data is not None and not isinstance(data, str | Path):
        source = open_source(data)
        settings["data"] = f"{IN_MEMORY}{type(data).__name__}"
    if isinstance(settings.get("arch"), nn.Module):
        settings["arch"] = custom.register(settings["arch"])
    file = None
    if isinstance(config, Config):
        settings = {**dataclasses.asdict(config), **settings}
    elif config is not None:
        file = Path(config)
    return Run(run(build_config(settings, preset=preset, file=file), source))


def load(
    run_or_file: str | os.PathLike[str], *, which: str = "teacher", device: str | None = None, arch: Any = None
) -> Backbone:
    """The backbone of a run, a checkpoint, or weights of DINO, DINOv2, timm or transformers, ready for images.

    Args:
        run_or_file: what `--checkpoint` of the evaluations takes: a run, a file, a folder, `hub:NAME`, `timm:NAME`.
        which: "teacher" or "student".
        device: by default a GPU where there is one.
        arch: the module that was trained, for a run with a backbone of your own.

    Raises UserError for what cannot be read.
    """
    if isinstance(arch, nn.Module):
        custom.register(arch)
    elif arch is not None:
        raise UserError(f"arch is {arch!r}; it is a module, and only for runs with a backbone of your own")
    return Backbone.open(run_or_file, which, device)
