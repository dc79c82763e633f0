"""Weights as others publish them: names of torch.hub, and the folders of timm, transformers and torch.hub."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from dino_fast.errors import UserError, nearest

_DINO, _DINOV2 = "https://dl.fbaipublicfiles.com/dino", "https://dl.fbaipublicfiles.com/dinov2"

# Name in torch.hub, of facebookresearch/dino and dinov2 -> its weights. `NAME_full`, of DINO's, has student, teacher
# and heads, to continue from.
URLS = {
    "dino_vits16": f"{_DINO}/dino_deitsmall16_pretrain/dino_deitsmall16_pretrain.pth",
    "dino_vits8": f"{_DINO}/dino_deitsmall8_pretrain/dino_deitsmall8_pretrain.pth",
    "dino_vitb16": f"{_DINO}/dino_vitbase16_pretrain/dino_vitbase16_pretrain.pth",
    "dino_vitb8": f"{_DINO}/dino_vitbase8_pretrain/dino_vitbase8_pretrain.pth",
    "dino_resnet50": f"{_DINO}/dino_resnet50_pretrain/dino_resnet50_pretrain.pth",
    **{
        f"dinov2_{size}14{kind}": f"{_DINOV2}/dinov2_{size}14/dinov2_{size}14{file}_pretrain.pth"
        for size in ("vits", "vitb", "vitl", "vitg")
        for kind, file in (("", ""), ("_reg", "_reg4"))
    },
}
URLS |= {
    f"{name}_full": url.replace("_pretrain.pth", "_pretrain_full_checkpoint.pth")
    for name, url in URLS.items()
    if name.startswith("dino_")
}


def download(name: str) -> Path:
    """The file of a model by its name in torch.hub, in torch's cache (TORCH_HOME); fetched where it is not there yet.

    Raises UserError for an unknown name, or without a network, saying which file to fetch by hand.
    """
    import torch

    if name not in URLS:
        raise UserError(f"torch.hub has no '{name}'{nearest(name, URLS)}; known: {', '.join(URLS)}")
    path = Path(torch.hub.get_dir()) / "checkpoints" / URLS[name].rpartition("/")[2]
    if not path.exists():
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(URLS[name], str(path))
        except OSError as error:
            raise UserError(
                f"hub:{name} cannot be fetched ({error}). Download {URLS[name]} where there is a network, and give "
                f"that file, or put it at {path}"
            ) from error
    return path


def folder_of_another_library(path: Path) -> tuple[Path, dict[str, Any]] | None:
    """The weights' file in a folder that timm, transformers or `dino-fast export` wrote; None for any other folder.

    With it comes the folder's description of the weights: `num_heads`, `img_size`, `mean`, `std`, as far as it has
    them.
    """
    if (path / "hubconf.py").exists() and (path / "backbone.safetensors").exists():
        return path / "backbone.safetensors", {}
    files = [path / name for name in ("model.safetensors", "pytorch_model.bin") if (path / name).exists()]
    if not files or not (path / "config.json").exists():
        return None
    config = _json(path / "config.json")
    if "dino_fast" in config:  # ours: the weights' file says all
        return files[0], {}
    facts = _timm_facts(config) if "architecture" in config else _transformers_facts(config)
    images = path / "preprocessor_config.json"
    if images.exists():
        statistics = _json(images)
        facts |= {"mean": statistics.get("image_mean"), "std": statistics.get("image_std")}
    return files[0], {name: value for name, value in facts.items() if value is not None}


def _transformers_facts(config: dict[str, Any]) -> dict[str, Any]:
    return {"num_heads": config.get("num_attention_heads"), "img_size": config.get("image_size")}


def _timm_facts(config: dict[str, Any]) -> dict[str, Any]:
    about, options = config.get("pretrained_cfg") or {}, config.get("model_args") or {}
    size = options.get("img_size") or (about.get("input_size") or [None])[1:]
    facts = {"num_heads": options.get("num_heads"), "mean": about.get("mean"), "std": about.get("std")}
    return facts | {"img_size": size or None}


def _json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} holds a {type(content).__name__}, not the description of a model")
    return content


def is_hub_name(path: str | os.PathLike[str]) -> bool:
    """Whether it is `hub:NAME`."""
    return str(path).startswith("hub:")
