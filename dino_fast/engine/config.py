"""Everything that can be set about a run: one typed dataclass, of which every field is a command-line option.

Values come from, later ones winning: the defaults (the published ones), a preset, a YAML file, the command line.
Nothing here imports torch, so `dino-fast train --help` is immediate.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import os
import types
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from dino_fast.engine.presets import PRESETS
from dino_fast.errors import UserError, nearest

if typing.TYPE_CHECKING:
    from dino_fast.augment import MultiCrop


def option(default: Any, help: str, choices: tuple[str, ...] = ()) -> Any:
    """A field of `Config`, with what `--help` says about it."""
    return field(default=default, metadata={"help": help, "choices": choices})


@dataclass(frozen=True)
class Config:
    """The settings of a run. Lengths in epochs may be fractions; sizes are pixels; `batch_size` is the global batch."""

    # data
    data: str = option(
        "demo", "folder, .parquet or .tar files, .npy file, list of files, pattern, or 'demo' (ships with the package)"
    )
    channels: int | None = option(None, "read images as gray (1) or color (3); by default what the data says")
    mean: tuple[float, ...] = option((0.485, 0.456, 0.406), "per channel, of pixels in 0..1")
    std: tuple[float, ...] = option((0.229, 0.224, 0.225), "per channel, of pixels in 0..1")
    workers: int | None = option(None, "processes that load data; default: 0 on a CPU, on a GPU one a core, at most 10")
    augment_on: str = option("auto", "where crops are made; auto: on the GPU that trains", ("auto", "cpu", "gpu"))
    decode_on: str = option("cpu", "gpu: nvJPEG, whose pixels differ from the CPU's by a level", ("cpu", "gpu"))
    max_corrupt: float = option(0.05, "share of unreadable images that is skipped before the run stops")

    # crops
    global_size: int = option(224, "side of the two global crops")
    local_size: int = option(96, "side of the local crops")
    local_crops: int = option(8, "local crops of an image; 0 trains on the global ones alone")
    global_scale: tuple[float, float] = option((0.4, 1.0), "share of the image that a global crop covers")
    local_scale: tuple[float, float] = option((0.05, 0.4), "share of the image that a local crop covers")
    flip_p: float = option(0.5, "probability of a horizontal flip")
    jitter_p: float = option(0.8, "probability of color jitter")
    jitter: tuple[float, float, float, float] = option(
        (0.4, 0.4, 0.2, 0.1), "strength: brightness, contrast, saturation, hue"
    )
    gray_p: float = option(0.2, "probability of dropping color")
    blur_p: tuple[float, float, float] = option((1.0, 0.1, 0.5), "of a blur: first global, second global, local crops")
    solarize_p: tuple[float, float, float] = option((0.0, 0.2, 0.0), "of solarizing: the same three")

    # model
    arch: str = option(
        "vit_small",
        "backbone: vit_tiny, vit_small, vit_base, vit_large, resnet50, dinov2_*, timm/NAME or torchvision/NAME",
    )
    patch_size: int = option(16, "side of a patch")
    embed_dim: int | None = option(None, "width, instead of the architecture's")
    depth: int | None = option(None, "blocks, instead of the architecture's")
    num_heads: int | None = option(None, "attention heads, instead of the architecture's")
    drop_path_rate: float = option(0.1, "stochastic depth of the student's last block; linear from 0")
    out_dim: int = option(65536, "prototypes, K")
    head_layers: int = option(3, "linear layers of the head before the prototypes")
    head_hidden_dim: int = option(2048, "width of the head")
    head_bottleneck_dim: int = option(256, "width of the head's output, of which the prototypes are compared")
    head_bn: bool = option(False, "batch norm in the head")
    predictor: str = option(
        "none", "mlp: two more layers after the student's head and not the teacher's, as in BYOL", ("none", "mlp")
    )
    norm_last_layer: bool = option(True, "keep the prototypes at length 1")
    init_from: str | None = option(None, "weights to start from: a run, a file, hub:NAME or timm:NAME, as for eval")
    init_head: bool = option(True, "take the heads and the center too, where --init-from has them")
    init: str = option("published", "weights at the start; xavier suits narrow models", ("published", "xavier"))

    # loss and teacher
    teacher_update: str = option(
        "ema",
        "the student's moving average (ema), what it was at the end of the last epoch or before the last step, or a "
        "copy of it as it is",
        ("ema", "previous-epoch", "previous-step", "copy"),
    )
    centering: bool = option(True, "subtract the running mean of the teacher's logits from them")
    student_temp: float = option(0.1, "the student's temperature")
    teacher_temp: float = option(0.04, "the teacher's temperature, after its warm-up; the student's does not sharpen")
    warmup_teacher_temp: float = option(0.04, "the teacher's temperature at the start")
    warmup_teacher_temp_epochs: int = option(0, "epochs of the linear way from the one to the other")
    center_momentum: float = option(0.9, "weight of the old center in its moving average")
    center_init: str = option("zero", "the center at the start", ("zero", "first_batch"))

    # optimization
    batch_size: int = option(64, "images of a step, over all processes")
    grad_accum_steps: int = option(1, "micro-batches of a step, whose gradients are accumulated; to save memory")
    epochs: int = option(100, "length of the run, and of its schedules")
    max_steps: int | None = option(None, "stop after so many steps; the schedules still span the epochs")
    optimizer: str = option("adamw", "sgd and lars have momentum 0.9", ("adamw", "sgd", "lars"))
    lr: float = option(0.0005, "learning rate for 256 images; it is scaled with the batch size")
    min_lr: float = option(1e-6, "learning rate at the end (not scaled)")
    warmup_epochs: float = option(10.0, "epochs of linear warm-up of the learning rate")
    weight_decay: float = option(0.04, "at the start")
    weight_decay_end: float = option(0.4, "at the end, along a cosine")
    momentum_teacher: float = option(0.996, "the teacher's momentum at the start; 1 at the end, along a cosine")
    clip_grad: float = option(3.0, "largest norm of each parameter's gradient; 0 does not clip")
    on_nonfinite: str = option("stop", "at a loss that is inf or NaN: stop, or skip the step", ("stop", "skip"))
    nonfinite_limit: int = option(10, "steps in a row from which --on-nonfinite skip stops, too")
    freeze_last_layer: float = option(1.0, "epochs in which the prototypes stay as they are")

    # evaluation
    knn_every: float = option(1.0, "epochs between k-NN evaluations; 0 for none")
    hold_out: float = option(
        0.0, "share of the images to keep from training for the k-NN, where no val/ came with them; 0: leave-one-out"
    )
    knn_k: int = option(20, "neighbours that vote")
    knn_temperature: float = option(0.07, "of the votes' weights")
    knn_images: int = option(10_000, "at most so many images on either side of the k-NN evaluation")
    # the run and its checkpoints
    save_every: float = option(1.0, "epochs between checkpoints; 0: only at the end and at a new best")
    save_every_steps: int | None = option(None, "steps between checkpoints, too")
    save_every_minutes: float | None = option(None, "minutes between checkpoints, too")
    keep_checkpoints: int = option(3, "checkpoints that are kept, beside the best")
    save_in_background: bool | None = option(None, "write checkpoints beside the training; default: on a GPU")

    out: str | None = option(None, "run directory; by default a new runs/<date-time>")
    resume: bool = option(False, "continue the run in --out exactly where its last checkpoint is")
    wandb: str | None = option(None, "also log to this project of Weights & Biases (pip install 'dino-fast[wandb]')")
    profile: bool = option(False, "write a trace of five steps, trace.json, for chrome://tracing or ui.perfetto.dev")
    seed: int = option(0, "every random draw is a function of it")

    # speed
    device: str = option("auto", "where to train", ("auto", "cpu", "cuda"))
    fsdp: str = option(
        "none",
        "FSDP over the processes of torchrun or srun: shard gradients and moments (grads), or the weights, too (full)",
        ("none", "grads", "full"),
    )
    precision: str = option("auto", "fp32 on a CPU, bf16 on a GPU that has it", ("auto", "fp32", "bf16", "fp16"))
    tf32: bool = option(False, "on a GPU, round the inputs of float32 matrix products to TF32")
    compile: bool = option(False, "compile the blocks with torch.compile: slower to start, faster afterwards on a GPU")
    cuda_graph: str = option(
        "auto",
        "on a GPU, record the step once and replay it; auto: where that is possible, else the reason is told",
        ("auto", "on", "off"),
    )
    checkpoint_activations: str = option(
        "none",
        "keep less of each block and compute it again: all but products and attention, or everything",
        ("none", "selective", "full"),
    )
    loss_impl: str = option(
        "auto",
        "prototypes and loss: without logits (fused), logits of a few images at a time (chunked) or of all (logits); "
        "auto: fused on a GPU, chunked on a CPU",
        ("auto", "fused", "chunked", "logits"),
    )
    keep_freed_memory: bool = option(True, "let the C allocator keep freed memory: no new page faults in every step")


# Other names of settings and of their values, accepted as options, in YAML files and as arguments: those of earlier
# versions, which stored runs have in their config.yaml, and those of main_dino.py.
ALIASES = {
    "momentum": "momentum_teacher", "heads": "num_heads", "accumulate": "grad_accum_steps", "shard": "fsdp",
    "last_layer": "loss_impl", "teacher": "teacher_update", "keep": "keep_checkpoints", "max_bad": "max_corrupt",
    "grey_p": "gray_p",
    "data_path": "data", "output_dir": "out", "num_workers": "workers", "use_bn_in_head": "head_bn",
    "local_crops_number": "local_crops", "global_crops_scale": "global_scale", "local_crops_scale": "local_scale",
    "saveckp_freq": "save_every", "use_fp16": "precision",
}  # fmt: skip
VALUE_ALIASES = {
    "precision": {"true": "fp16", "false": "fp32"},  # --use_fp16
    "arch": {"resnet50": "torchvision/resnet50", "deit_tiny": "vit_tiny", "deit_small": "vit_small"},
    "loss_impl": {"parts": "chunked"},
}

# Fields that do not change what the rest of a run computes: a resumed run may be given others.
FREE_ON_RESUME = (
    *(
        "data",
        "workers",
        "augment_on",
        "max_corrupt",
        "max_steps",
        "knn_every",
        "knn_k",
        "knn_temperature",
        "knn_images",
    ),
    *("save_every", "save_every_steps", "save_every_minutes", "keep_checkpoints", "save_in_background"),
    *("on_nonfinite", "nonfinite_limit"),
    *("out", "resume", "device", "fsdp", "keep_freed_memory", "wandb", "profile"),
    *("tf32", "compile", "cuda_graph", "checkpoint_activations", "loss_impl"),
)
# Where and whether to continue is the command's affair and not written into config.yaml.
_OF_THE_COMMAND = ("out", "resume", "profile")


def build_config(
    given: dict[str, Any] | None = None, *, preset: str | None = None, file: str | Path | None = None
) -> Config:
    """The configuration from a preset, a YAML file and `given` values, the later winning; checked.

    Where the data is the demo's and no preset is named, the demo's preset is used. With `resume` the base is the
    config.yaml of the run in `out`, and only what may change may differ from it. Raises UserError.
    """
    given = _typed_layer(given or {}, _flag)
    layers = [_read_yaml(Path(file))] if file is not None else []
    layers.append(given)
    stored = _stored(layers)
    named = any("data" in layer for layer in (*layers, PRESETS.get(preset or "", {})))
    if stored is None and not named and _asked(layers).resume:
        raise _nothing_to_resume(_asked(layers).out)
    if preset is None and stored is None and not any("data" in x and x["data"] != "demo" for x in layers):
        preset = "demo"
    if preset is not None:
        layers.insert(0, _preset(preset))
    values = dict(stored or {})
    for layer in layers:
        if "arch" in layer and values.get("arch") != layer["arch"]:  # another architecture's sizes do not carry over
            values = {name: value for name, value in values.items() if name not in ("embed_dim", "depth", "num_heads")}
        values.update(layer)
    config = Config(**values)
    validate(config)
    return config


def load_config(path: str | Path) -> Config:
    """The configuration in a YAML file (a run's config.yaml, say) over the defaults."""
    config = Config(**_read_run(Path(path)))
    validate(config)
    return config


def _read_run(path: Path) -> dict[str, Any]:
    """A run's config.yaml. Versions that had no `hold_out` held out a tenth."""
    return {"hold_out": 0.1} | _read_yaml(path)


def to_dict(config: Config) -> dict[str, Any]:
    """What config.yaml holds: every field but `out`, `resume` and `profile`, which belong to the command."""
    return {name: value for name, value in dataclasses.asdict(config).items() if name not in _OF_THE_COMMAND}


def check_same(before: Config, now: Config) -> None:
    """Raise UserError naming the settings with which a resumed run would be another one."""
    changed = [f.name for f in fields(Config) if f.name not in FREE_ON_RESUME and _of(before, f) != _of(now, f)]
    if changed:
        named = ", ".join(f"{name} {getattr(before, name)!r} -> {getattr(now, name)!r}" for name in changed)
        raise UserError(
            f"--resume cannot continue the run in {now.out} with other settings ({named}). Leave them out to continue "
            "it as it was, or start a new run with another --out"
        )


def _of(config: Config, one: dataclasses.Field[Any]) -> Any:
    return getattr(config, one.name)


def stored_config(config: Config) -> Config | None:
    """The configuration of the run that `config` resumes; None where nothing is resumed or nothing is there yet."""
    if not config.resume or config.out is None:
        return None
    path = expand_user(config.out) / "config.yaml"
    return Config(**_read_run(path)) if path.exists() else None


def expand_user(path: str | Path) -> Path:
    """The path with `~` replaced by the home folder. Raises UserError where there is no such home."""
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        raise UserError(f"{path}: there is no such home folder ({error}); give the whole path") from error


def with_whole_paths(config: Config) -> Config:
    """The configuration with `data` and `init_from` as absolute paths, so that it means the same from any folder.

    Names (`demo`, `hub:NAME`) and paths of which nothing is here (those of a run begun in another folder) stay as they
    are. `~` is replaced, in `out` too.
    """
    out = None if config.out is None else str(expand_user(config.out))
    start = config.init_from and _whole_path(config.init_from)
    return dataclasses.replace(config, data=_whole_path(config.data), init_from=start, out=out)


def _whole_path(given: str) -> str:
    if given == "demo":
        return given
    path = expand_user(given)
    pattern = any(character in given for character in "*?[{")
    here = path.exists() or (pattern and Path(*_plain_part(path)).exists())
    return os.path.abspath(path) if here else str(path) if given.startswith("~") else given


def _plain_part(path: Path) -> list[str]:
    """The folders of a pattern before the first that has a wildcard; the whole working directory where none is."""
    return list(itertools.takewhile(lambda part: not any(c in part for c in "*?[{"), path.parts)) or ["."]


def _stored(layers: list[dict[str, Any]]) -> dict[str, Any] | None:
    stored = stored_config(_asked(layers))
    return None if stored is None else to_dict(stored)


def _asked(layers: list[dict[str, Any]]) -> Config:
    """What the layers say about the command; the rest are defaults."""
    asked: dict[str, Any] = {}
    for layer in layers:
        asked.update({name: layer[name] for name in _OF_THE_COMMAND if name in layer})
    return Config(**asked)


def _nothing_to_resume(out: str | None) -> UserError:
    """For `--resume` where no run is and no data are named: a mistyped directory must not begin another run."""
    if out is None:
        return UserError("--resume needs the run's directory: add --out DIR")
    path = expand_user(out)
    above = next((p for p in path.absolute().parents if (p / "config.yaml").is_file()), None)
    beside = [p.name for p in path.parent.glob("*") if (p / "config.yaml").is_file()] if path.parent.is_dir() else []
    if above is not None:
        hint = f"it lies in the run {above}: give that"
    elif path.is_dir() and any((path / "checkpoints").glob("step-*")):
        hint = "its config.yaml is missing: put it back, or repeat all of its settings, --data among them"
    else:
        hint = f"look for a mistake in its name{nearest(path.name, beside)}"
    return UserError(
        f"--resume finds no run in {out}; {hint}. To begin a new run there, say which images it is for with --data"
    )


def _preset(name: str) -> dict[str, Any]:
    if name not in PRESETS:
        raise UserError(f"there is no preset {name!r}{nearest(name, PRESETS) or '.'} Presets: {', '.join(PRESETS)}")
    return _typed_layer(PRESETS[name], lambda key: f"preset {name}: {key}")


def _read_yaml(path: Path) -> dict[str, Any]:
    import yaml

    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read the configuration {path}: {getattr(error, 'strerror', None) or error}") from error
    except yaml.YAMLError as error:
        raise UserError(f"{path} is not valid YAML: {error}") from error
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise UserError(f"{path} holds a {type(values).__name__}; expected lines such as 'batch_size: 64'")
    return _typed_layer(values, lambda name: f"{path}: {name}")


def multi_crop(config: Config) -> MultiCrop:
    """The crops of a run."""
    from dino_fast.augment import MultiCrop

    return MultiCrop(
        global_size=config.global_size,
        local_size=config.local_size,
        n_local=config.local_crops,
        global_scale=config.global_scale,
        local_scale=config.local_scale,
        flip_p=config.flip_p,
        jitter_p=config.jitter_p,
        jitter=config.jitter,
        grey_p=config.gray_p,
        blur_p=config.blur_p,
        solarize_p=config.solarize_p,
        mean=config.mean,
        std=config.std,
    )


def with_present_names(values: Mapping[Any, Any]) -> dict[str, Any]:
    """Settings of a stored config.yaml under the names and values that this version has for them."""
    present: dict[str, Any] = {}
    for given, value in values.items():
        name = ALIASES.get(str(given), str(given))
        accepted = isinstance(value, str) and name in VALUE_ALIASES
        present[name] = VALUE_ALIASES[name].get(value, value) if accepted else value
    return present


# ---- types ----

_HINTS = typing.get_type_hints(Config)


def _typed_layer(values: Mapping[Any, Any], where: Callable[[str], str]) -> dict[str, Any]:
    """Settings under their present names, as their fields' types. `where` describes a name for error messages."""
    layer: dict[str, Any] = {}
    for given, value in values.items():
        name = ALIASES.get(str(given), str(given))
        if name in layer:
            raise UserError(f"{where(str(given))} is given twice: it is another name of {name!r}. Leave one out")
        layer[name] = _typed(name, value, where(str(given)))
    return layer


def _typed(name: str, value: Any, where: str) -> Any:
    """`value` as the field's type, or a UserError naming `where`, what was given and what is accepted."""
    if name not in _HINTS:
        raise UserError(
            f"{where}: there is no such setting{nearest(name, _HINTS) or '.'} 'dino-fast train --help' lists all"
        )
    if name in VALUE_ALIASES and isinstance(value, bool):
        value = str(value).lower()  # use_fp16: true
    try:
        value = _convert(_HINTS[name], value)
        return VALUE_ALIASES[name].get(str(value).lower(), value) if name in VALUE_ALIASES else value
    except (TypeError, ValueError):
        raise UserError(f"{where} is {value!r}; expected {_describe(_HINTS[name])}") from None


def _convert(hint: Any, value: Any) -> Any:
    if isinstance(hint, types.UnionType):  # X | None
        return None if value is None else _convert(typing.get_args(hint)[0], value)
    if typing.get_origin(hint) is tuple:
        kinds = typing.get_args(hint)
        if not isinstance(value, list | tuple) or (kinds[-1] is not ... and len(value) != len(kinds)) or not value:
            raise TypeError
        return tuple(_convert(kinds[0], item) for item in value)
    if hint is float and isinstance(value, int | str) and not isinstance(value, bool):
        return float(value)  # YAML reads 1e-3 as text
    if hint is str and isinstance(value, Path):
        return str(value)
    if type(value) is not hint:
        raise TypeError
    return value


def _describe(hint: Any) -> str:
    if isinstance(hint, types.UnionType):
        return f"{_describe(typing.get_args(hint)[0])}, or null"
    if typing.get_origin(hint) is tuple:
        kinds = typing.get_args(hint)
        return "a list of numbers" if kinds[-1] is ... else f"a list of {len(kinds)} numbers"
    return {int: "a whole number", float: "a number", str: "text", bool: "true or false"}[hint]


# ---- the command line ----


# The first field of each group of options, in the order of `Config`.
GROUPS = {
    "data": "data", "global_size": "crops", "arch": "model", "teacher_update": "loss and teacher",
    "batch_size": "optimization", "knn_every": "evaluation", "save_every": "run", "device": "speed",
}  # fmt: skip
# What `--help` shows; `--help-all` shows every option.
MOST_USED = (
    *("data", "out", "resume", "arch", "patch_size", "out_dim", "epochs", "max_steps", "batch_size", "lr", "device"),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds an option for each field, without defaults: the namespace holds only what was given.

    Underscores instead of hyphens and the names in `ALIASES` are accepted, too.
    """
    most_used = parser.add_argument_group("most used")
    most_used.add_argument("--preset", metavar="NAME", help=f"a recipe to start from: {', '.join(PRESETS)}")
    _add_option(parser, "--config", metavar="FILE", help="YAML file of settings; the command line wins over it")
    parser.add_argument("--help-all", action=_HelpAll, help="show all options")
    group = parser.add_argument_group("data")
    for one in fields(Config):
        if GROUPS.get(one.name, "data") != "data":
            group = parser.add_argument_group(GROUPS[one.name])
        hint, text = _HINTS[one.name], one.metadata["help"].replace("%", "%%")
        shown = " ".join(map(str, one.default)) if isinstance(one.default, tuple) else one.default
        default = "" if one.default is None or (hint is bool and not one.default) else f" (default: {shown})"
        keywords: dict[str, Any] = {"default": argparse.SUPPRESS, "help": text + default, "dest": one.name}
        if hint is bool or hint == bool | None:
            keywords["action"] = argparse.BooleanOptionalAction
        else:
            if typing.get_origin(hint) is tuple:
                kinds = typing.get_args(hint)
                keywords["nargs"], hint = ("+" if kinds[-1] is ... else len(kinds)), kinds[0]
            plain: Callable[[str], Any] = typing.get_args(hint)[0] if isinstance(hint, types.UnionType) else hint
            keywords |= {"type": plain, "metavar": {int: "N", float: "X", str: "TEXT"}[plain]}  # type: ignore[index]
            if one.metadata["choices"]:
                keywords |= {"metavar": "|".join(one.metadata["choices"])}
        if one.name in MOST_USED:
            most_used.add_argument(_flag(one.name), **keywords)
        else:
            _add_option(group, _flag(one.name), **keywords)
        names = [one.name, *(alias for alias, name in ALIASES.items() if name == one.name)]
        spellings = {spelling for name in names for spelling in (f"--{name}", _flag(name))} - {_flag(one.name)}
        if spellings:
            parser.add_argument(*sorted(spellings), **keywords | {"help": argparse.SUPPRESS})


def _add_option(parser: argparse._ActionsContainer, *names: str, help: str, **keywords: Any) -> None:
    """Adds an option that only `--help-all` shows."""
    action = parser.add_argument(*names, help=argparse.SUPPRESS, **keywords)
    action.full_help = help  # type: ignore[attr-defined]


class _HelpAll(argparse.Action):
    """Prints the help of every option and exits."""

    def __init__(self, option_strings: list[str], dest: str, **keywords: Any) -> None:
        super().__init__(option_strings, argparse.SUPPRESS, nargs=0, default=argparse.SUPPRESS, help=keywords["help"])

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        for action in parser._actions:
            action.help = getattr(action, "full_help", action.help)
        parser.print_help()
        parser.exit()


def from_arguments(args: argparse.Namespace) -> Config:
    """The configuration that a parsed command line asks for."""
    given = {name: value for name, value in vars(args).items() if name in _HINTS}
    return build_config(given, preset=args.preset, file=args.config)


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


# ---- checks, before any time is spent ----


def validate(config: Config) -> None:
    """Raise UserError for the first setting that cannot work, naming it, its value and what is accepted."""
    for one in fields(Config):
        value, choices = getattr(config, one.name), one.metadata["choices"]
        if choices and value not in choices:
            raise UserError(
                f"{_flag(one.name)} is {value!r}{nearest(value, choices) or '.'} Accepted: {', '.join(choices)}"
            )
    for name in ("data", "out", "init_from", "wandb"):
        if (given := getattr(config, name)) is not None and not given.strip():
            raise UserError(f"{_flag(name)} is empty; give a value, or leave the option out")
    for accepted, holds, names in _RULES:
        for name in names.split():
            value = getattr(config, name)
            if value is not None and not all(map(holds, value if isinstance(value, tuple) else (value,))):
                raise UserError(f"{_flag(name)} is {value}; it must be {accepted}")
    for size in ("global_size", "local_size") if config.local_crops else ("global_size",):
        if "/" not in config.arch and getattr(config, size) % config.patch_size:
            value = getattr(config, size)
            low = value // config.patch_size * config.patch_size
            raise UserError(
                f"{_flag(size)} is {value}, which patches of {config.patch_size} do not tile; "
                f"give {f'{low} or ' if low else ''}{low + config.patch_size}, or another --patch-size"
            )
    for name in ("global_scale", "local_scale"):
        low, high = getattr(config, name)
        if not low <= high:
            raise UserError(f"{_flag(name)} is {low} {high}; give the smaller share first")
    if config.batch_size % config.grad_accum_steps:
        raise UserError(
            f"--grad-accum-steps {config.grad_accum_steps} does not divide --batch-size {config.batch_size}"
        )
    if config.embed_dim and config.num_heads and config.embed_dim % config.num_heads:
        raise UserError(f"--embed-dim {config.embed_dim} is not a multiple of --num-heads {config.num_heads}")


_Rule = tuple[str, Callable[[Any], bool], str]
_RULES: tuple[_Rule, ...] = (
    (
        "1 or more",
        lambda x: x >= 1,
        "patch_size global_size local_size embed_dim depth num_heads out_dim head_layers head_hidden_dim "
        "head_bottleneck_dim batch_size grad_accum_steps epochs max_steps save_every_steps knn_k knn_images "
        "keep_checkpoints nonfinite_limit",
    ),
    (
        "0 or more",
        lambda x: 0 <= x < float("inf"),
        "workers local_crops min_lr warmup_epochs weight_decay weight_decay_end clip_grad freeze_last_layer knn_every "
        "save_every warmup_teacher_temp_epochs jitter seed",
    ),
    (
        "above 0",
        lambda x: 0 < x < float("inf"),
        "lr student_temp teacher_temp warmup_teacher_temp knn_temperature save_every_minutes std",
    ),
    (
        "between 0 and 1",
        lambda x: 0 <= x <= 1,
        "momentum_teacher center_momentum flip_p jitter_p gray_p blur_p solarize_p max_corrupt",
    ),
    ("above 0 and at most 1", lambda x: 0 < x <= 1, "global_scale local_scale"),
    ("at least 0 and below 1", lambda x: 0 <= x < 1, "drop_path_rate"),
    ("from 0 to 0.5", lambda x: 0 <= x <= 0.5, "hold_out"),
    ("1 or 3", lambda x: x in (1, 3), "channels"),
)
