"""Backbones that a program gives as modules: `dino_fast.train(arch=module)`. Their name is `custom/CLASS`.

A module is copied where a backbone of that name is built, with the weights that it has. It turns images [B, C, H, W] of
both crops' sizes into features [B, dim].
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from dino_fast.errors import UserError

LIBRARY = "custom"
_given: dict[str, nn.Module] = {}


def register(module: nn.Module) -> str:
    """Makes `build` know the module; returns its name for `--arch`."""
    name = type(module).__name__
    _given[name] = module
    return f"{LIBRARY}/{name}"


def build(name: str, **options: Any) -> nn.Module:
    """A copy of the module of that name, with `embed_dim`, `img_size` and `in_chans`; of `options` these two are used.

    Raises UserError where no such module was given, or where it does not take such images.
    """
    if name not in _given:
        raise UserError(
            f"the backbone {LIBRARY}/{name} is a module of the program that trained it: give it again, with "
            "dino_fast.train(arch=module) or dino_fast.load(run, arch=module)"
        )
    sizes = [key for key in ("embed_dim", "depth", "num_heads") if key in options]
    if sizes:
        raise UserError(f"a backbone of your own has its own sizes; leave out {', '.join(sizes)}")
    with torch.device("cpu"):
        module: Any = copy.deepcopy(_given[name])
    size, channels = options.get("img_size", 224), options.get("in_chans") or _channels(module)
    height, width = (size, size) if isinstance(size, int) else size
    module.embed_dim = _width(module, name, channels, height, width)
    module.img_size, module.in_chans, module.patch_size, module.arch = (height, width), channels, 1, f"{LIBRARY}/{name}"
    return module  # type: ignore[no-any-return]


def _channels(module: nn.Module) -> int:
    """Of its images, as its first convolution says."""
    return next((m.in_channels for m in module.modules() if isinstance(m, nn.Conv2d)), 3)


@torch.no_grad()
def _width(module: nn.Module, name: str, channels: int, height: int, width: int) -> int:
    """The number of features of an image, from a forward pass in evaluation mode."""
    first = next(module.parameters(), None)
    if first is None:
        raise UserError(f"the backbone {name} has no parameters to train")
    training = module.training
    images = torch.zeros(2, channels, height, width, dtype=torch.float32, device=first.device)
    try:
        features = module.eval()(images)
    except Exception as error:
        raise UserError(
            f"the backbone {name} does not take images {list(images.shape)} ({type(error).__name__}: "
            f"{str(error).splitlines()[0] if str(error) else ''}); it gets both crops' sizes and the data's channels"
        ) from error
    finally:
        module.train(training)
    if not isinstance(features, Tensor) or features.dim() != 2 or len(features) != 2:
        given = list(features.shape) if isinstance(features, Tensor) else f"a {type(features).__name__}"
        raise UserError(
            f"the backbone {name} gives {given} for images {list(images.shape)}; expected features [2, dim], one row "
            "an image (take its classifier off, pool its map)"
        )
    return features.shape[1]
