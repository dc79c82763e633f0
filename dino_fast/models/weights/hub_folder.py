"""A backbone as a repository of the Hugging Face Hub: weights, a description, a page."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from torch import nn

from dino_fast.errors import UserError
from dino_fast.models.weights.read import export_backbone

_FORMAT = 1
_CARD = """---
library_name: dino-fast
pipeline_tag: image-feature-extraction
tags: [dino, self-supervised-learning]
---
A backbone of {parameters:.2f} M parameters, pretrained without labels with DINO (arXiv:2104.14294) by dino-fast.
Images are {channels}, {height} x {width} pixels; an image has {width_of} features.

    import dino_fast

    backbone = dino_fast.Backbone.from_pretrained("THIS REPOSITORY")
    features = backbone(images)   # PIL images, arrays, tensors, paths, of any sizes
"""


def write_folder(backbone: nn.Module, folder: Path, facts: dict[str, Any]) -> None:
    """Writes model.safetensors, config.json and, where there is none, README.md. `facts` are `mean` and `std`."""
    net: Any = backbone
    folder.mkdir(parents=True, exist_ok=True)
    arch = getattr(net, "arch", None)
    export_backbone(net, folder / "model.safetensors", **facts, **({"arch": arch} if arch else {}))
    height, width = net.img_size
    about = {"embed_dim": net.embed_dim, "img_size": [height, width], "in_chans": net.in_chans, **facts}
    config = {"library_name": "dino-fast", "dino_fast": _FORMAT, **about}
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    if not (folder / "README.md").exists():
        card = _CARD.format(
            parameters=sum(p.numel() for p in net.parameters()) / 1e6,
            channels="gray" if net.in_chans == 1 else "RGB",
            height=height,
            width=width,
            width_of=net.embed_dim,
        )
        (folder / "README.md").write_text(card, encoding="utf-8")


def download_folder(repository: str, **options: Any) -> Path:
    """The files of a repository of the Hub, in its cache. Raises UserError where it cannot be had."""
    hub = hub_library()
    try:
        files = [hub.hf_hub_download(repository, name, **options) for name in ("config.json", "model.safetensors")]
    except (OSError, ValueError, RuntimeError, hub.errors.HfHubHTTPError) as error:
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(
            f"{repository} is no folder here, and cannot be had from the Hugging Face Hub ({first}). Give a folder, or "
            "a repository USER/NAME with config.json and model.safetensors"
        ) from error
    return Path(files[1]).parent


def push_folder(folder: Path, repository: str) -> str:
    """Uploads the files of a folder to a repository of the Hub, made where there is none; returns its address."""
    hub = hub_library()
    api = hub.HfApi()
    try:
        address = api.create_repo(repository, exist_ok=True)
        api.upload_folder(
            repo_id=repository, folder_path=str(folder), commit_message="Upload a backbone with dino-fast"
        )
    except (OSError, ValueError, RuntimeError, hub.errors.HfHubHTTPError) as error:
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(
            f"--push {repository}: the Hugging Face Hub does not take it ({first}). Log in with 'hf auth login'; the "
            f"files are in {folder}"
        ) from error
    return str(address)


def hub_library() -> Any:
    """The package huggingface_hub. Raises UserError where it is not installed."""
    try:
        import huggingface_hub
    except ImportError as error:
        raise UserError(
            "the Hugging Face Hub needs the package huggingface_hub: pip install 'dino-fast[hub]'"
        ) from error
    return huggingface_hub
