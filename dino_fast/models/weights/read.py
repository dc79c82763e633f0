"""Reads weights from our checkpoints, the original's and backbone-only files; writes backbones for timm and torch.hub.

Nothing is executed on loading: safetensors are plain data, and of a .pth file only tensors, plain values, numpy's
scalars (the original's schedules leave some in its optimizer) and `argparse.Namespace` are accepted.
"""

from __future__ import annotations

import argparse
import json
import pickle
import warnings
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from dino_fast.atomic import atomic_write
from dino_fast.defaults import torch_defaults
from dino_fast.errors import UserError, nearest, unwritable
from dino_fast.models.dinov2 import DINOv2
from dino_fast.models.registry import ARCHITECTURES, build_backbone, transformer_sizes
from dino_fast.models.vit import VisionTransformer
from dino_fast.models.weights.hub import download, folder_of_another_library, is_hub_name
from dino_fast.models.weights.key_mapping import published

# Of supervised models, timm's and torchvision's: no part of a backbone.
_CLASSIFIER = ("head.weight", "head.bias", "fc.weight", "fc.bias")
_SHOWN = 6  # lines of each kind in a message
# Shapes and image statistics that go with the weights; the rest of a configuration is of no use here.
_FACTS = (
    *("arch", "patch_size", "num_heads", "img_size", "global_size", "in_chans", "mean", "std"),
    *("bit_depth", "pixel_range"),
)


# How other libraries begin the names of the two networks in one state dict, and how such a name begins here. A plain
# `backbone.` beside one of them is the other network: solo-learn's student, lightly's teacher.
_NETWORKS = {
    "teacher": (
        ("momentum_backbone.", "backbone."),  # solo-learn
        ("teacher_backbone.", "backbone."),  # lightly
        ("teacher.", ""),  # DINOv2 and Lightning modules: teacher.backbone.*, teacher.head.*
        ("ssl_model.teacher.", ""),
        ("model.teacher.", ""),
    ),
    "student": (
        ("student_backbone.", "backbone."),
        ("student.", ""),
        ("ssl_model.student.", ""),
        ("model.student.", ""),
    ),
}


def read_state(path: str | Path, which: str = "teacher") -> dict[str, Tensor]:
    """The weights of one network, on the CPU: `backbone.*` and `head.*`, or a backbone's plain names.

    `path` is a run directory (its newest whole checkpoint), a checkpoint folder, a .safetensors file, or a file of
    torch.save laid out as the original's (`which` picks student or teacher) or holding one network alone. Raises
    UserError for what cannot be read or would have to run code.
    """
    return read(Path(path), which)[0]


def describe(path: str | Path, which: str = "teacher") -> dict[str, Any]:
    """The file's facts about its network: any of `arch`, `patch_size`, `num_heads`, `img_size`, `mean`, `std`, ..."""
    return read(Path(path), which)[1]


def backbone_state(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The backbone's weights under their plain names (`cls_token`, ...)."""
    inside = {name.removeprefix("backbone."): t for name, t in state.items() if name.startswith("backbone.")}
    return published(inside or {name: t for name, t in state.items() if name not in _CLASSIFIER} or state)


def load_weights(module: nn.Module, state: dict[str, Tensor], source: str | Path = "the given weights") -> None:
    """Copies `state` into `module`.

    Raises UserError naming every key that is missing, unexpected or of another shape, with the module unchanged.
    """
    own = module.state_dict()
    missing, extra = [n for n in own if n not in state], [n for n in state if n not in own]
    shapes = [n for n in own if n in state and own[n].shape != state[n].shape]
    if missing or extra or shapes:
        lines = [f"the weights in {source} do not fit this {type(module).__name__}:"]
        lines += _some("missing", [f"{n}{nearest(n, extra)}" for n in missing])
        lines += _some("unexpected", [f"{n}{nearest(n, missing)}" for n in extra])
        lines += _some("shape", [f"{n}: given {list(state[n].shape)}, expected {list(own[n].shape)}" for n in shapes])
        lines.append("Build the model with the architecture, patch size and image size of these weights")
        raise UserError("\n".join(lines))
    module.load_state_dict(state, strict=True)


@torch_defaults()
def load_backbone(
    path: str | Path,
    arch: str | None = None,
    patch_size: int | None = None,
    which: str | None = None,
    num_heads: int | None = None,
) -> VisionTransformer:
    """The backbone in `path` (see `read_state`), built to the shapes of its weights.

    `which` is "teacher" or "student"; by default it is the teacher, or the student of a file that has no teacher, with
    a warning. `arch` and `patch_size`, where given, must agree with the file. Heads are not visible in the shapes: they
    come from the file's description, from `arch`, or are taken 64 wide. A ResNet-50's weights, and those of a run with
    `timm/NAME` or `torchvision/NAME`, give that library's model instead, with `embed_dim`, `img_size` and `in_chans`
    set. Raises UserError for weights that are none of these.
    """
    try:
        whole, facts = read(Path(path), which or "teacher")
    except UserError as error:
        if which is not None:
            raise
        try:
            whole, facts = read(Path(path), "student")
        except UserError:
            raise error from None
        warnings.warn(f"{path} holds no teacher; its student is loaded", stacklevel=2)
    return backbone_from(whole, facts, path, arch, patch_size, num_heads)


def backbone_from(
    whole: dict[str, Tensor],
    facts: dict[str, Any],
    path: str | Path,
    arch: str | None = None,
    patch_size: int | None = None,
    num_heads: int | None = None,
) -> VisionTransformer:
    """`load_backbone` of weights that are read already; messages call them `path`; `facts` as `describe` gives them."""
    state = backbone_state(whole)
    other = arch if arch is not None and "/" in arch else _library_arch(state, facts)
    if other is not None:
        return cast(VisionTransformer, _library_backbone(other, state, facts, path))
    options = sizes_of(state, facts, path)
    if patch_size is not None and patch_size != options["patch_size"]:
        raise UserError(f"{path} has patches of {options['patch_size']} pixels, {patch_size} were asked for")
    if arch is not None:
        known = transformer_sizes()
        if arch not in known:
            raise UserError(f"unknown architecture '{arch}'{nearest(arch, known)}")
        asked = known[arch][:2]
        found = (options["embed_dim"], options["depth"])
        if asked != found:
            raise UserError(
                f"{path} is not a {arch}: its width and depth are {found[0]} and {found[1]}, those of {arch} "
                f"{asked[0]} and {asked[1]}{_named(found)}"
            )
    options["num_heads"] = num_heads or _heads(options, facts, path)
    backbone: VisionTransformer
    extras = extras_of(state)
    backbone = DINOv2(**options, **extras) if extras else VisionTransformer(**options)
    load_weights(backbone, state, path)
    return backbone


def export_backbone(backbone: nn.Module, path: str | Path, **facts: Any) -> Path:
    """Writes the backbone's weights with the published names, which timm and torch.hub load as they are.

    `.safetensors`, or `.pth` for torch.load. Sizes and `facts` (such as `mean` and `std`) go into the safetensors'
    metadata. The file appears whole or not at all.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    path = Path(path)
    if path.suffix not in (".safetensors", ".pth"):
        raise UserError(f"cannot export to {path}: the name must end in .safetensors or .pth")
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in backbone.state_dict().items()}
    if isinstance(backbone, VisionTransformer):
        sizes = {"patch_size": backbone.patch_size, "num_heads": backbone.num_heads}
        facts = {**sizes, "img_size": list(backbone.img_size), **facts}
    elif hasattr(backbone, "arch"):  # of timm or torchvision, which are built again by name
        facts = {"arch": backbone.arch, "img_size": list(cast("tuple[int, int]", backbone.img_size)), **facts}
    try:
        with atomic_write(path) as temporary:
            if path.suffix == ".pth":
                torch.save(state, temporary)
            else:
                temporary.touch()  # with the permissions of any new file; the library would make it the owner's only
                mode = temporary.stat().st_mode
                save_file(state, temporary, metadata={"dino_fast": json.dumps(facts)})
                temporary.chmod(mode)
    except (OSError, RuntimeError, SafetensorError) as error:  # the two writers' errors on a full disk
        raise unwritable(path, error) from error
    return path


# ---- files ----


def read(path: Path, which: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """`read_state` and `describe` in one; `which` may also be "dino_loss": the center of a full checkpoint."""
    if which not in ("teacher", "student", "dino_loss"):
        raise UserError(f"which is '{which}'; it is 'teacher' or 'student'")
    if is_hub_name(path):
        path = download(str(path).removeprefix("hub:"))
    if not path.exists():
        raise UserError(
            f"{path} does not exist; give a run directory, one of its checkpoints, a weights file, or hub:NAME"
        )
    other = folder_of_another_library(path) if path.is_dir() else None
    if other is not None:
        state, facts = read(other[0], which)
        return state, {**facts, **other[1]}
    if path.is_dir():
        state, facts = _read_folder(path, which)
    elif path.suffix == ".safetensors":
        state, facts = _read_safetensors(path, which)
    else:
        state, facts = _read_pickle(path, which)
    if not state:
        raise UserError(f"{path} holds no weights of a {which}")
    state = {_plain_name(name): tensor for name, tensor in state.items()}
    return (state if which == "dino_loss" else _one_network(state, which, path)), facts


def _one_network(state: dict[str, Tensor], which: str, path: Path) -> dict[str, Tensor]:
    """The student's or the teacher's weights of a state dict that holds both, by `_NETWORKS`; others as they are.

    Raises UserError where the network asked for is not there, or several are and none is known by its name.
    """
    found = {
        network: next((pair for pair in pairs if any(name.startswith(pair[0]) for name in state)), None)
        for network, pairs in _NETWORKS.items()
    }
    plain = ("backbone.", "backbone.") if any(name.startswith("backbone.") for name in state) else None
    if not any(found.values()):
        roots = sorted({name.removesuffix("cls_token") for name in state if name.endswith("cls_token")})
        if len(roots) > 1:
            raise UserError(
                f"{path} holds {len(roots)} networks, {', '.join(map(repr, roots))}, and which is the {which} is not "
                "known: save the state dict of one of them, or begin the names with teacher. and student."
            )
        return state
    pair = found[which] or plain
    if pair is None:
        other = "student" if which == "teacher" else "teacher"
        raise UserError(f"{path} holds no {which}: its names begin with {found[other][0]!r}; try --which {other}")  # type: ignore[index]
    given, here = pair
    return {here + name.removeprefix(given): tensor for name, tensor in state.items() if name.startswith(given)}


def _read_folder(path: Path, which: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """A checkpoint folder, or the newest whole one of a run. Only the weights asked for are read."""
    if (path / "tensors.safetensors").exists() or (path / "state.json").exists():
        try:
            return _read_checkpoint(path, which)
        except UserError as error:
            raise UserError(f"{error}. Given the run's directory, its newest whole checkpoint is used") from error
    folder = path / "checkpoints" if (path / "checkpoints").is_dir() else path
    for candidate in sorted(folder.glob("step-*"), key=lambda p: (len(p.name), p.name), reverse=True):
        try:
            return _read_checkpoint(candidate, which)
        except UserError as error:
            warnings.warn(f"{error}; trying the one before it", stacklevel=2)
    raise UserError(f"{path} holds no complete checkpoint (looked for checkpoints/step-*); is it a run directory?")


def _read_checkpoint(folder: Path, which: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    file = folder / "tensors.safetensors"
    try:
        body = json.loads((folder / "state.json").read_bytes())
        size = file.stat().st_size
    except (OSError, ValueError) as error:
        raise UserError(f"checkpoint {folder} is damaged: {error}") from error
    if size != body.get("tensors_bytes", size):
        raise UserError(f"checkpoint {folder} is damaged: {size} bytes of {body['tensors_bytes']} are there")
    state = body.get("state") or body
    # The heads that were built: the configuration names them only where they are not the architecture's.
    facts = {**(state.get("config") or {}), "num_heads": state.get("num_heads")}
    return _read_safetensors(file, which)[0], _facts(facts)


def _read_safetensors(path: Path, which: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            names = list(file.keys())
            inside = [name for name in names if name.startswith(f"{which}/")]
            if not inside and any(name.startswith(("teacher/", "student/")) for name in names):
                raise UserError(f"{path} holds no {which}")
            state = {name.removeprefix(f"{which}/"): file.get_tensor(name) for name in inside or names}
            text = (file.metadata() or {}).get("dino_fast", "{}")
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} is not a whole safetensors file: {error}. Copy or download it again") from error
    try:
        return state, _facts(json.loads(text))
    except ValueError as error:
        raise UserError(f"{path} has a description that is not JSON: {error}") from error


def _read_pickle(path: Path, which: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    try:
        with torch.serialization.safe_globals([argparse.Namespace, *_numpy_scalars()]):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        # A damaged file raises whatever the damaged byte leads to; none of it is worth a traceback.
        if isinstance(error, pickle.UnpicklingError) and "global" in str(error).lower():
            raise UserError(
                f"{path} is refused: it holds Python objects other than weights, and loading them could run code. If "
                "you trust where it comes from, load it with torch yourself and save its state dict alone"
            ) from error
        # Of a file that is no pickle torch says to try again unsafely, or names a byte: no advice to pass on.
        known = isinstance(error, OSError | RuntimeError | EOFError)
        reason = f": {(str(error) or repr(error)).splitlines()[0]}" if known else ""
        raise UserError(
            f"{path} cannot be read as a file of torch.save{reason}. Accepted: a run, one of its checkpoints, "
            ".safetensors, or a .pth of torch.save. "
            "It may be cut off: compare its size with the source's, and copy it again"
        ) from error
    if not isinstance(content, dict):
        raise UserError(f"{path} holds a {type(content).__name__}, not a checkpoint or state dict")
    state = content
    if "teacher" in content or "student" in content:
        if which not in content:
            raise UserError(f"{path} holds no {which}; it has {', '.join(map(str, content))}")
        state = content[which]
    elif isinstance(content.get("state_dict") or content.get("model"), dict):
        state = content.get("state_dict") or content["model"]
    wrong = (
        [str(n) for n, t in state.items() if not isinstance(t, Tensor)] if isinstance(state, dict) else ["all of it"]
    )
    if wrong:
        raise UserError(f"{path} is not laid out as a checkpoint: not a tensor: {', '.join(wrong[:_SHOWN])}")
    args = content.get("args")
    facts = _facts(vars(args) if isinstance(args, argparse.Namespace) else {})
    facts.pop("arch", None)  # the original's names (deit_small) and defaults; the shapes say it
    return state, facts


def _numpy_scalars() -> list[Any]:
    """The functions and types in a pickled numpy float64, under the names of numpy 1 and 2."""
    import numpy as np

    scalar = np.float64(0).__reduce__()[0]
    return [
        (scalar, "numpy.core.multiarray.scalar"),
        (scalar, "numpy._core.multiarray.scalar"),
        np.dtype,
        type(np.dtype(np.float64)),
    ]


# ---- names and sizes ----


def _plain_name(name: str) -> str:
    """Without the prefixes of DistributedDataParallel and torch.compile; DINOv2's head is called as DINO's."""
    name = name.replace("_orig_mod.", "").removeprefix("module.")
    name = f"head.{name.removeprefix('dino_head.')}" if name.startswith("dino_head.") else name
    # How torch's newer weight norm calls the two.
    name = name.replace("last_layer.parametrizations.weight.original0", "last_layer.weight_g")
    return name.replace("last_layer.parametrizations.weight.original1", "last_layer.weight_v")


def _facts(config: Any) -> dict[str, Any]:
    """The entries of `_FACTS` wherever they lie in a nested configuration."""
    found: dict[str, Any] = {}
    if isinstance(config, dict):
        for key, value in config.items():
            if isinstance(value, dict) and "$tuple" in value:
                value = value["$tuple"]
            if isinstance(value, dict):
                found = {**_facts(value), **found}
            elif key in _FACTS and value is not None:
                found[key] = value
    return found


def sizes_of(state: dict[str, Tensor], facts: dict[str, Any], path: str | Path) -> dict[str, Any]:
    """The constructor's arguments that shapes tell."""
    try:
        embed_dim, in_chans, patch, _ = state["patch_embed.proj.weight"].shape
        tokens = state["pos_embed"].shape[1] - 1
        gated = "blocks.0.mlp.w12.weight" in state
        hidden = state["blocks.0.mlp.w3.weight"].shape[1] * 1.5 if gated else state["blocks.0.mlp.fc1.weight"].shape[0]
    except (KeyError, ValueError, IndexError):
        near = ", ".join(list(state)[:_SHOWN])
        raise UserError(
            f"{path} is not a vision transformer as DINO names it: it lacks patch_embed.proj.weight, pos_embed or "
            f"blocks.0.mlp.fc1.weight; its first names are {near}"
        ) from None
    depth = len({name.split(".")[1] for name in state if name.startswith("blocks.")})
    return {
        "img_size": _img_size(tokens, patch, facts, path),
        "patch_size": patch,
        "in_chans": in_chans,
        "embed_dim": embed_dim,
        "depth": depth,
        "mlp_ratio": hidden / embed_dim,
        "qkv_bias": "blocks.0.attn.qkv.bias" in state,
    }


def extras_of(state: dict[str, Tensor]) -> dict[str, Any]:
    """The arguments that `DINOv2` has beside `VisionTransformer`'s; empty where the weights are DINO's."""
    registers, scaled = state.get("register_tokens"), "blocks.0.ls1.gamma" in state
    gated, masked = "blocks.0.mlp.w12.weight" in state, "mask_token" in state
    if registers is None and not (scaled or gated or masked):
        return {}
    count = 0 if registers is None else registers.shape[1]
    return {"registers": count, "layer_scale": 1e-5 if scaled else None, "swiglu": gated, "mask_token": masked}


def _img_size(tokens: int, patch: int, facts: dict[str, Any], path: str | Path) -> tuple[int, int]:
    for key in ("img_size", "global_size"):
        size = facts.get(key)
        sides = (size, size) if isinstance(size, int) else tuple(size or ())
        if len(sides) == 2 and (sides[0] // patch) * (sides[1] // patch) == tokens:
            return sides[0] // patch * patch, sides[1] // patch * patch
    side = round(tokens**0.5)
    if side * side != tokens:
        raise UserError(f"{path} has {tokens} position embeddings, not a square, and does not say the image size")
    return side * patch, side * patch


def _heads(options: dict[str, Any], facts: dict[str, Any], path: str | Path) -> int:
    dim = options["embed_dim"]
    known = transformer_sizes().get(facts.get("arch", ""))
    heads = facts.get("num_heads") or (known[2] if known and known[0] == dim else 0)
    if heads or dim % 64 == 0:
        return int(heads) or dim // 64
    raise UserError(
        f"{path} does not say how many heads its blocks of width {dim} have. In Python, load_backbone takes num_heads, "
        "and export_backbone writes them down"
    )


def _named(sizes: tuple[int, int]) -> str:
    return "".join(f"; it is a {name}" for name, known in ARCHITECTURES.items() if known[:2] == sizes)


def _library_arch(state: dict[str, Tensor], facts: dict[str, Any]) -> str | None:
    """The architecture of weights that are another library's model, as their description or their names say."""
    if "/" in str(facts.get("arch", "")):
        return str(facts["arch"])
    last = state.get("layer4.2.conv3.weight")  # of three bottlenecks: ResNet-50, unless the third stage is longer
    if last is not None and "layer3.6.conv1.weight" not in state and last.shape[0] == 2048:
        return "torchvision/resnet50"
    return None


def _library_backbone(arch: str, state: dict[str, Tensor], facts: dict[str, Any], path: str | Path) -> nn.Module:
    size = facts.get("img_size") or facts.get("global_size") or 224
    sides = (size, size) if isinstance(size, int) else (size[0], size[1])
    backbone = build_backbone(arch, img_size=sides[0])
    for name, tensor in backbone.state_dict().items():  # only images' channels make a convolution's second size differ
        given = state.get(name)
        if tensor.ndim == 4 and given is not None and given.ndim == 4 and given.shape[1] != tensor.shape[1] == 3:
            backbone = build_backbone(arch, in_chans=given.shape[1], img_size=sides[0])
    load_weights(backbone, state, path)
    backbone.img_size = sides
    return cast(nn.Module, backbone)


def _some(kind: str, entries: list[str]) -> list[str]:
    more = [f"  and {len(entries) - _SHOWN} more"] if len(entries) > _SHOWN else []
    return [f"  {kind}: {entry}" for entry in entries[:_SHOWN]] + more
