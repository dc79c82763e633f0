"""Backbones in the layouts of other libraries: each format is a function of a backbone and a place to write to.

The weights in `safetensors`, `torch-hub`, `timm` and `transformers` are the backbone's own, bit for bit, under other
names (timm's models with registers add the class token's position to the class token). `onnx` and `torch-export` are
the computation itself, for images of one size and any number of them.
"""

from __future__ import annotations

import json
import shutil
import uuid
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dino_fast.atomic import atomic_write
from dino_fast.augment import IMAGENET_MEAN, IMAGENET_STD
from dino_fast.errors import UserError, nearest, unwritable
from dino_fast.models.dinov2 import DINOv2
from dino_fast.models.vit import Attention, Block, VisionTransformer, grid_of
from dino_fast.models.weights.hub_folder import write_folder
from dino_fast.models.weights.key_mapping import to_timm, to_transformers
from dino_fast.models.weights.read import export_backbone

Writer = Callable[[Any, Path, dict[str, Any]], str]

_HUBCONF = '''"""torch.hub.load(FOLDER, "backbone", source="local") gives the backbone with its weights."""

from pathlib import Path

dependencies = ["torch", "dino_fast"]


def backbone():
    """The backbone: images [B, C, H, W], normalized by MEAN and STD -> class tokens [B, dim]."""
    from dino_fast.models import load_backbone

    return load_backbone(Path(__file__).parent / "backbone.safetensors")


MEAN, STD = {mean}, {std}
'''


def export(backbone: nn.Module, path: str | Path, format: str | None = None, **facts: Any) -> tuple[Path, str]:
    """Writes `backbone` to `path` as `format` (by default the format of its ending), whole or not at all.

    `facts` are `mean` and `std` of the images it was trained on, and `pixel_range`, the values of images of more than 8
    bits that were 0 and 1. Models of timm and torchvision, from `build_backbone` or `load_backbone`, have fewer
    formats. Returns the path and how to load it. Raises UserError for an unknown format, one that has no such models,
    an ending or a place that does not fit, or a library that is not installed.
    """
    path = Path(path)
    format = format or _by_ending(path)
    if format not in FORMATS:
        raise UserError(f"there is no format '{format}'{nearest(format, FORMATS)}; formats: {', '.join(FORMATS)}")
    write, ending = FORMATS[format]
    if not isinstance(backbone, VisionTransformer):
        library = str(getattr(backbone, "arch", "")).partition("/")[0]
        if format in ("transformers", "hub") or (format == "timm" and library != "timm"):
            raise UserError(
                f"--format {format} has no layout for {getattr(backbone, 'arch', type(backbone).__name__)}; use "
                "safetensors (the model's own names), torch-hub, onnx or torch-export"
            )
    if ending and path.suffix not in ending:
        raise UserError(f"--format {format} writes a file: the name must end in {' or '.join(ending)}, not {path.name}")
    if not ending and (path.is_file() or (path.is_dir() and any(path.iterdir()))):
        raise UserError(
            f"--format {format} writes a folder, new or empty; {path} is {'a file' if path.is_file() else 'not empty'}"
        )
    mode = backbone.training
    try:
        how = write(backbone.eval(), path, {"mean": list(IMAGENET_MEAN), "std": list(IMAGENET_STD), **facts})
    finally:
        backbone.train(mode)
    return path, how


def _by_ending(path: Path) -> str:
    named = [name for name, (_, ending) in FORMATS.items() if path.suffix in ending]
    if not named:
        raise UserError(
            f"--out {path.name} does not say the format; end it in .safetensors, .pth, .onnx or .pt2, or give --format "
            f"({', '.join(FORMATS)})"
        )
    return named[0]


# ---- weights ----


def _safetensors(backbone: nn.Module, path: Path, facts: dict[str, Any]) -> str:
    export_backbone(backbone, path, **facts)
    return f"dino_fast.models.load_backbone({str(path)!r})"


def _torch_hub(backbone: nn.Module, path: Path, facts: dict[str, Any]) -> str:
    def fill(folder: Path) -> None:
        export_backbone(backbone, folder / "backbone.safetensors", **facts)
        export_backbone(backbone, folder / "backbone.pth")
        text = _HUBCONF.replace("{mean}", str(facts["mean"])).replace("{std}", str(facts["std"]))
        if "pixel_range" in facts:
            text += f"PIXEL_RANGE = {facts['pixel_range']}  # values that are 0 and 1, of more than 8 bits\n"
        (folder / "hubconf.py").write_text(text, encoding="utf-8")

    _folder(path, fill)
    return f"torch.hub.load({str(path)!r}, 'backbone', source='local')"


def _hub(backbone: VisionTransformer, path: Path, facts: dict[str, Any]) -> str:
    _folder(path, lambda folder: write_folder(backbone, folder, facts))
    return f"dino_fast.Backbone.from_pretrained({str(path)!r})"


def _timm(backbone: nn.Module, path: Path, facts: dict[str, Any]) -> str:
    if isinstance(backbone, VisionTransformer):
        config, state = _timm_config(backbone, facts), to_timm(_state(backbone))
    else:
        config, state = _timm_model_config(backbone, facts), _state(backbone)

    def fill(folder: Path) -> None:
        _write_tensors(folder / "model.safetensors", state)
        _write_json(folder / "config.json", config)

    _folder(path, fill)
    return f"timm.create_model('local-dir:{path}', pretrained=True)"


def _timm_model_config(backbone: Any, facts: dict[str, Any]) -> dict[str, Any]:
    """The description of a model of timm's own, built by `build_backbone`."""
    own = backbone.pretrained_cfg
    about = {"input_size": [backbone.in_chans, *backbone.img_size], "mean": facts["mean"], "std": facts["std"]}
    about |= {key: own[key] for key in ("interpolation", "crop_pct", "first_conv", "classifier") if key in own}
    return {
        "architecture": backbone.arch.partition("/")[2],
        "num_classes": 0,
        "num_features": backbone.embed_dim,
        "model_args": {**backbone.model_args, "num_classes": 0},
        "pretrained_cfg": {**about, "num_classes": 0},
    }


def _timm_config(backbone: VisionTransformer, facts: dict[str, Any]) -> dict[str, Any]:
    """The description of timm's vision transformer with this backbone's sizes."""
    size = {"img_size": list(backbone.img_size), "patch_size": backbone.patch_size, "embed_dim": backbone.embed_dim}
    arguments = {**size, "depth": len(backbone.blocks), "num_heads": backbone.num_heads, "num_classes": 0}
    name = "vit_small_patch16_224"
    ratio = _hidden(backbone) / backbone.embed_dim
    if isinstance(backbone, DINOv2):
        gated = _gated(backbone)
        name = "vit_giant_patch14" if gated else "vit_small_patch14"
        name += "_reg4_dinov2" if backbone.registers else "_dinov2"
        arguments |= {"reg_tokens": backbone.registers} if backbone.registers else {}
        ratio = 2 * ratio if gated else ratio
        if not _scaled(backbone):
            arguments["init_values"] = None
    arguments |= {
        "mlp_ratio": ratio,
        "in_chans": backbone.in_chans,
        "qkv_bias": _block(backbone).attn.qkv.bias is not None,
    }
    about = {
        "input_size": [backbone.in_chans, *backbone.img_size],
        "mean": facts["mean"],
        "std": facts["std"],
        "interpolation": "bicubic",
        "crop_pct": 0.875,
        "fixed_input_size": True,
        "num_classes": 0,
        "first_conv": "patch_embed.proj",
        "classifier": "head",
    }
    about |= {"pixel_range": facts["pixel_range"]} if "pixel_range" in facts else {}
    return {
        "architecture": name,
        "num_classes": 0,
        "num_features": backbone.embed_dim,
        "global_pool": "token",
        "model_args": arguments,
        "pretrained_cfg": about,
    }


def _transformers(backbone: VisionTransformer, path: Path, facts: dict[str, Any]) -> str:
    second = isinstance(backbone, DINOv2)
    size = backbone.img_size[0] if backbone.img_size[0] == backbone.img_size[1] else list(backbone.img_size)
    config: dict[str, Any] = {
        "hidden_size": backbone.embed_dim,
        "num_hidden_layers": len(backbone.blocks),
        "num_attention_heads": backbone.num_heads,
        "image_size": size,
        "patch_size": backbone.patch_size,
        "num_channels": backbone.in_chans,
        "qkv_bias": _block(backbone).attn.qkv.bias is not None,
        "hidden_act": "gelu",
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        "layer_norm_eps": 1e-6,
        "dtype": "float32",
    }
    if isinstance(backbone, DINOv2):
        if not _scaled(backbone) or not hasattr(backbone, "mask_token"):
            raise UserError("transformers' DINOv2 models have LayerScale and a mask token, and this backbone lacks one")
        config |= {"mlp_ratio": _whole_ratio(backbone), "layerscale_value": 1.0, "use_swiglu_ffn": _gated(backbone)}
        config |= {"drop_path_rate": 0.0, "model_type": "dinov2", "architectures": ["Dinov2Model"]}
        if backbone.registers:
            config |= {"model_type": "dinov2_with_registers", "num_register_tokens": backbone.registers}
            config |= {"architectures": ["Dinov2WithRegistersModel"]}
    else:
        config |= {"model_type": "vit", "architectures": ["ViTModel"], "intermediate_size": _hidden(backbone)}
    height, width = backbone.img_size
    images = {
        "image_processor_type": "ViTImageProcessor",
        "do_resize": True,
        "do_rescale": True,
        "do_normalize": True,
        "resample": 3,  # bicubic
        "size": {"height": height, "width": width},
        "rescale_factor": 1 / 255,
        "image_mean": facts["mean"],
        "image_std": facts["std"],
    }
    if "pixel_range" in facts:
        images["pixel_range"] = facts["pixel_range"]

    def fill(folder: Path) -> None:
        _write_tensors(folder / "model.safetensors", to_transformers(_state(backbone), second))
        _write_json(folder / "config.json", config)
        _write_json(folder / "preprocessor_config.json", images)

    _folder(path, fill)
    more = "" if second else ", add_pooling_layer=False"
    return f"transformers.AutoModel.from_pretrained({str(path)!r}{more})"


# ---- computations ----


def _torch_export(backbone: nn.Module, path: Path, facts: dict[str, Any]) -> str:
    images = _images(backbone)
    batch = torch.export.Dim("batch", min=1)
    with _tracing(backbone):
        program = torch.export.export(_traceable(backbone), (images,), dynamic_shapes=({0: batch},))
    _file(path, lambda temporary: torch.export.save(program, temporary))
    return f"torch.export.load({str(path)!r}).module()"


def _onnx(backbone: nn.Module, path: Path, facts: dict[str, Any]) -> str:
    try:
        import onnx  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise UserError(
            f"--format onnx needs the package {error.name}: pip install onnx onnxscript onnxruntime"
        ) from error
    images = _images(backbone)
    with warnings.catch_warnings(), _tracing(backbone):
        warnings.simplefilter("ignore")  # the exporter's remarks about itself
        program = torch.onnx.export(
            _traceable(backbone),
            (images,),
            input_names=["images"],
            output_names=["features"],
            dynamic_shapes=({0: torch.export.Dim("batch", min=1)},),
            dynamo=True,
            verbose=False,
        )
    assert program is not None
    _file(path, lambda temporary: program.save(str(temporary), external_data=False))
    return f"onnxruntime.InferenceSession({str(path)!r}){_checked(backbone, path, images[:1])}"


def _checked(backbone: nn.Module, path: Path, images: Tensor) -> str:
    """Compares the file's features, computed by onnxruntime, with the backbone's; returns the note about it."""
    try:
        import onnxruntime
    except ImportError:
        return "  (not checked: onnxruntime is not installed)"
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    found = torch.from_numpy(session.run(None, {"images": images.numpy()})[0])
    with torch.no_grad():
        expected = backbone(images)
    error = float((found - expected).abs().max() / expected.abs().max())
    if not error < 1e-3:
        path.unlink()
        raise UserError(
            f"the ONNX file computes other features than the backbone (relative error {error:.1e}); removed"
        )
    return f"  (checked by onnxruntime: largest relative difference {error:.1e})"


@contextmanager
def _tracing(backbone: nn.Module) -> Iterator[None]:
    """Another library's model may hold Python that cannot be traced: then a message instead of the tracer's errors."""
    try:
        yield
    except Exception as error:
        if isinstance(backbone, VisionTransformer):
            raise
        reason = (str(error) or repr(error)).splitlines()[0]
        arch = getattr(backbone, "arch", type(backbone).__name__)
        raise UserError(f"{arch} cannot be traced by torch.export ({reason}); use --format safetensors") from error


def _traceable(backbone: nn.Module) -> nn.Module:
    return Batched(backbone) if isinstance(backbone, VisionTransformer) else backbone


class Batched(nn.Module):
    """The same features from a batch of images of one size, `[B, N, C]` instead of one buffer of tokens.

    A buffer's sizes would be constants of the exported program, and so would the number of images.
    """

    def __init__(self, backbone: VisionTransformer) -> None:
        super().__init__()
        self.backbone = backbone

    def forward(self, images: Tensor) -> Tensor:
        """Images `[B, C, H, W]` -> normalized class tokens `[B, embed_dim]`."""
        net = self.backbone
        position = net.position_embedding(*grid_of(images.shape[2], images.shape[3], net.patch_size))
        patches = net.patch_embed.proj(images).flatten(2).transpose(1, 2) + position[:, 1:]
        x = torch.cat((net._leading(position).expand(images.shape[0], -1, -1), patches), dim=1)
        for block in cast("list[Block]", net.blocks):
            x = x + _layer_scale(block, "ls1")(self._attention(block.attn, block.norm1(x)))
            x = x + _layer_scale(block, "ls2")(block.mlp(block.norm2(x)))
        return cast(Tensor, net.norm(x[:, 0]))

    def _attention(self, attention: Attention, x: Tensor) -> Tensor:
        q, k, v = attention.qkv(x).unflatten(2, (3, attention.num_heads, -1)).permute(2, 0, 3, 1, 4)
        output = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return cast(Tensor, attention.proj(output))


def _layer_scale(block: Block, name: str) -> Callable[[Tensor], Tensor]:
    return getattr(block, name, None) or nn.Identity()


@torch.no_grad()
def _images(backbone: Any) -> Tensor:
    """Two images for the tracer. One pass fills the caches of constant matrices, which must not hold traced tensors."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(
        2, backbone.in_chans, *backbone.img_size, generator=generator, dtype=torch.float32, device="cpu"
    )
    _traceable(backbone)(images)
    return images


# ---- files ----


def _folder(path: Path, fill: Callable[[Path], None]) -> None:
    temporary = path.absolute().with_name(f".{path.name}.{uuid.uuid4().hex[:8]}")
    try:
        temporary.mkdir(parents=True)
        fill(temporary)
        if path.exists():
            path.rmdir()  # it was empty
        temporary.rename(path)
    except OSError as error:
        raise unwritable(path, error) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _file(path: Path, write: Callable[[Path], Any]) -> None:
    try:
        with atomic_write(path) as temporary:
            write(temporary)
    except OSError as error:
        raise unwritable(path, error) from error


def _write_tensors(path: Path, state: dict[str, Tensor]) -> None:
    from safetensors.torch import save_file

    path.touch()  # with the permissions of any new file; the library alone would make it the owner's only
    mode = path.stat().st_mode
    save_file(state, path, metadata={"format": "pt"})
    path.chmod(mode)


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


# ---- sizes and parts of a backbone ----


def _state(backbone: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().cpu().contiguous() for name, tensor in backbone.state_dict().items()}


def _block(backbone: VisionTransformer) -> Any:
    return backbone.blocks[0]


def _gated(backbone: VisionTransformer) -> bool:
    return hasattr(_block(backbone).mlp, "w12")


def _scaled(backbone: VisionTransformer) -> bool:
    return hasattr(_block(backbone).ls1, "gamma")


def _whole_ratio(backbone: VisionTransformer) -> int:
    """The mlp_ratio from which transformers computes this width; its models take whole ones."""
    gated, dim = _gated(backbone), backbone.embed_dim
    ratio = int(_hidden(backbone) * (1.5 if gated else 1.0) / dim)
    width = -(-int(dim * ratio * 2 / 3) // 8) * 8 if gated else dim * ratio
    if width != _hidden(backbone):
        raise UserError(f"transformers' DINOv2 models have no MLP of width {_hidden(backbone)} for tokens of {dim}")
    return ratio


def _hidden(backbone: VisionTransformer) -> int:
    """Width between the MLP's two layers."""
    mlp = _block(backbone).mlp
    return int((mlp.w3 if _gated(backbone) else mlp.fc2).in_features)


# Name -> writer, and the endings of a file; none means that a folder is written.
FORMATS: dict[str, tuple[Writer, tuple[str, ...]]] = {
    "safetensors": (_safetensors, (".safetensors", ".pth")),
    "timm": (_timm, ()),
    "torch-hub": (_torch_hub, ()),
    "hub": (_hub, ()),
    "transformers": (_transformers, ()),
    "onnx": (_onnx, (".onnx",)),
    "torch-export": (_torch_export, (".pt2",)),
}
