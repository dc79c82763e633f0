"""Builds the parts of a run from its configuration: data, loader, networks, optimizer; and resolves "auto" settings."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from torch import nn

from dino_fast.backends import BackendError, choose, cuda_unavailable_reason
from dino_fast.cpus import usable_cpus
from dino_fast.data import Source, Subset, TrainLoader, open_source, split, train_loader
from dino_fast.data.gpu_crops import nvjpeg_unavailable_reason
from dino_fast.engine import parallelize
from dino_fast.engine.config import Config, multi_crop
from dino_fast.engine.cuda_graph import StepGraph
from dino_fast.engine.distributed import SINGLE_PROCESS, DistContext
from dino_fast.engine.train_state import TrainState
from dino_fast.errors import UserError
from dino_fast.loss import DINOLoss
from dino_fast.models import DINOHead, MultiCropWrapper, VisionTransformer, build_backbone
from dino_fast.models.weights.pretrained import load_pretrained
from dino_fast.optim import AdamWEMA, build_optimizer

# The narrow models that `init: xavier` is for stay at a loss of ln K with the published deviation of 0.02.
XAVIER_POSITION_STD = 0.3

# ---- data ----


@dataclass
class Data:
    """The images of a run.

    Without `bank` no k-NN is measured; without `test` each image of the bank is left out in turn. `note` says which of
    these, and why.
    """

    train: Source
    bank: Source | None = None
    test: Source | None = None
    note: str = ""


def open_data(config: Config) -> Data:
    """Opens the images. All are trained on, but for a part that came as a test set and the share `hold_out`."""
    source = open_source(config.data)
    if config.channels is not None:
        for part in (source, source.test):
            if part is not None:
                part.channels = config.channels
    if config.knn_every == 0:
        return Data(source, note="k-NN evaluation is off (knn_every 0)")
    if not is_labeled(source):
        reason = source.unused_labels or "the images have no labels (class sub-folders give them labels)"
        return Data(source, note=f"no k-NN evaluation: {reason}")
    note, train, test = "", source, source.test
    if test is None and config.hold_out:
        train, test = split(source, config.hold_out)
        note = f"{len(test)} of {len(source)} images are held out for the k-NN and not trained on"
    if reason := useless_labels(train, test):
        return Data(train, note=f"no k-NN evaluation: {reason}")
    bank = sample(train, config.knn_images)
    if test is not None:
        return Data(train, bank, sample(test, config.knn_images), note)
    return Data(
        train,
        bank,
        note=f"all images are trained on; the k-NN leaves each of {len(bank)} out in turn "
        "(--hold-out 0.1 keeps a tenth for it alone)",
    )


def useless_labels(bank: Source, test: Source | None) -> str:
    """Why a k-NN accuracy with these labels would say nothing, or an empty text."""
    assert bank.labels is not None
    known, counts = np.unique(bank.labels[bank.labels >= 0], return_counts=True)
    if len(known) < 2:
        name = f" ({bank.classes[known[0]]})" if bank.classes and len(known) else ""
        return f"all labeled images are of one class{name}"
    if test is None:
        return "each label is of one image only, so that the labels are no classes" if counts.max() == 1 else ""
    if not is_labeled(test):
        return "the held-out images have no labels"
    assert test.labels is not None
    asked = np.unique(test.labels[test.labels >= 0])
    if not np.isin(asked, known).any():
        return "no held-out image is of a class that the training images have; are their folders classes?"
    return ""


def is_labeled(source: Source) -> bool:
    """Whether any image has a label."""
    return source.labels is not None and bool((source.labels >= 0).any())


def sample(source: Source, count: int) -> Source:
    """At most `count` images, the same ones at every call."""
    if len(source) <= count:
        return source
    return Subset(source, np.sort(np.random.default_rng(0).permutation(len(source))[:count]))


def make_loader(
    config: Config, source: Source, device: torch.device, context: DistContext = SINGLE_PROCESS
) -> TrainLoader:
    """This process's loader of training batches."""
    color = source.channels == 3 and len(config.mean) == 3
    crops = multi_crop(config)
    if not color:
        crops.statistics(source.channels)  # refuses means that do not fit, before anything is written
    return train_loader(
        source,
        crops,
        batch_size=config.batch_size,
        seed=config.seed,
        workers=resolve_workers(config.workers, device, context.local_world),
        rank=context.rank,
        world=context.world,
        epochs=config.epochs,
        max_bad=config.max_corrupt,
        pin_memory=device.type == "cuda",
        gpu=resolve_crop_device(config.augment_on, config.decode_on, device),
        encoded=config.decode_on == "gpu",
    )


# ---- "auto" ----


def resolve_crop_device(augment_on: str, decode_on: str, device: torch.device) -> torch.device | None:
    """The GPU that makes the crops; None: the CPU does."""
    missing = cuda_unavailable_reason() if device.type == "cuda" else f"the run trains on {device}"
    if augment_on == "gpu" and missing:
        raise UserError(f"--augment-on gpu: {missing}; use --augment-on cpu or auto ('dino-fast info' tells more)")
    if decode_on == "gpu" and (missing or augment_on == "cpu"):
        raise UserError(f"--decode-on gpu: {missing or 'the crops are made on the CPU'}; use --decode-on cpu")
    if augment_on == "cpu" or missing:
        return None
    if decode_on == "gpu" and (reason := nvjpeg_unavailable_reason(device)):
        raise UserError(f"--decode-on gpu: JPEGs cannot be decoded there ({reason}); use --decode-on cpu")
    return device


def resolve_device(name: str) -> torch.device:
    """The device called "auto", "cpu" or "cuda". Raises UserError for "cuda" without a GPU."""
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError(
            "--device cuda: PyTorch finds no GPU here ('dino-fast info' tells what it finds); use --device cpu"
        )
    return torch.device("cuda" if name == "auto" and torch.cuda.is_available() else name.replace("auto", "cpu"))


def resolve_workers(count: int | None, device: torch.device, processes: int = 1) -> int:
    """Number of loader processes: `count`, or by default none on a CPU and up to 10 on a GPU.

    On a CPU training and loading share the cores; on a GPU each core of this process's share gets a worker.
    On two cores the demo ran at 1030 images/s without workers, 990 with one, 870 with two.
    """
    if count is not None:
        return count
    return 0 if device.type == "cpu" else max(1, min(10, usable_cpus() // processes))


def resolve_precision(name: str, device: torch.device) -> str:
    """Number format "fp32", "bf16" or "fp16".

    "auto" is fp32 on a CPU, bf16 on a GPU that computes in it, else fp16.
    """
    if name != "auto":
        return name
    if device.type == "cpu":
        return "fp32"
    return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"


# ---- networks, loss, optimizer ----


def build_train_state(
    config: Config, channels: int, device: torch.device, precision: str, context: DistContext = SINGLE_PROCESS
) -> TrainState:
    """The state of a new run, a function of the configuration and its seed alone."""
    torch.manual_seed(config.seed)
    student = build_model(config, channels, config.drop_path_rate).to(device)
    teacher = build_model(config, channels, 0.0).to(device)
    teacher.load_state_dict(student.state_dict())
    teacher.requires_grad_(False)
    cast(DINOHead, teacher.head).predicts = False
    loss = DINOLoss(
        config.out_dim,
        2 + config.local_crops,
        config.warmup_teacher_temp,
        config.teacher_temp,
        min(config.warmup_teacher_temp_epochs, config.epochs),
        config.epochs,
        config.student_temp,
        config.center_momentum,
    ).to(device)
    if config.init_from is not None:
        load_pretrained(config.init_from, student, teacher, loss, config.init_head)
    autocast = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    bf16 = parallelize.uses_bf16_models(config, precision, student, context.world)
    if not bf16:
        _checkpoint_and_compile(config, student, teacher)
    if context.world > 1:  # after compiling: collectives stay outside of compiled code
        parallelize.parallelize(config, student, teacher, device, autocast)
    groups, bf16_models = parameter_groups(student, teacher), None
    if bf16:
        bf16_models, autocast = (parallelize.bf16_copy(student), parallelize.bf16_copy(teacher)), None
        for group, copies in zip(groups, parameter_groups(*bf16_models), strict=True):
            group |= {"bf16_params": copies["params"], "bf16_teacher": copies["teacher_params"]}
        _checkpoint_and_compile(config, *bf16_models)
    if device.type == "cuda":
        parallelize.use_tf32(config.tf32)
    optimizer = build_optimizer(config.optimizer, groups, config.lr, config.weight_decay, config.clip_grad)
    scaler = torch.amp.GradScaler(device.type, enabled=autocast is torch.float16)
    skip_step = torch.zeros((), dtype=torch.bool, device=device)
    state = TrainState(
        *(config, device, autocast, student, teacher, loss, optimizer, scaler, skip_step, context),
        bf16_models=bf16_models,
    )
    state.graph = build_graph(state)
    return state


def _checkpoint_and_compile(config: Config, student: MultiCropWrapper, teacher: MultiCropWrapper) -> None:
    """Applies --checkpoint-activations and --compile to the networks of the forward pass."""
    parallelize.checkpoint_blocks(student.backbone, config.checkpoint_activations)
    if config.compile:
        for network in (student, teacher):
            parallelize.compile_blocks(network)


def build_model(config: Config, channels: int, drop_path_rate: float) -> MultiCropWrapper:
    """Backbone and head as configured."""
    backbone = build_configured_backbone(config, channels, drop_path_rate)
    head = DINOHead(
        backbone.embed_dim,
        config.out_dim,
        use_bn=config.head_bn,
        norm_last_layer=config.norm_last_layer,
        nlayers=config.head_layers,
        hidden_dim=config.head_hidden_dim,
        bottleneck_dim=config.head_bottleneck_dim,
        predictor=config.predictor == "mlp",
    )
    if config.init == "xavier":
        if not isinstance(backbone, VisionTransformer):
            raise UserError(f"--init xavier is for vit_* architectures; use --init published with --arch {config.arch}")
        init_xavier(backbone, head)
    return MultiCropWrapper(backbone, head)


def build_configured_backbone(config: Config, channels: int, drop_path_rate: float) -> Any:
    """The backbone: ours, or one from timm or torchvision."""
    sizes = {"embed_dim": config.embed_dim, "depth": config.depth, "num_heads": config.num_heads}
    return build_backbone(
        config.arch,
        patch_size=config.patch_size,
        img_size=config.global_size,
        in_chans=channels,
        drop_path_rate=drop_path_rate,
        **{name: size for name, size in sizes.items() if size is not None},
    )


def init_xavier(backbone: VisionTransformer, head: nn.Module) -> None:
    """Xavier-uniform linear layers and wide position embeddings; the prototypes keep their own initialization."""
    for module in (*backbone.modules(), *head.modules()):
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            nn.init.zeros_(module.bias)
    nn.init.normal_(backbone.pos_embed, std=XAVIER_POSITION_STD)


def parameter_groups(student: nn.Module, teacher: nn.Module) -> list[dict[str, Any]]:
    """The two published groups, each with its teacher's parameters: weights with decay; biases and vectors without."""
    decayed: dict[str, Any] = {"params": [], "teacher_params": []}
    plain: dict[str, Any] = {"params": [], "teacher_params": [], "weight_decay": 0.0}
    for (name, parameter), follower in zip(student.named_parameters(), teacher.parameters(), strict=True):
        if parameter.requires_grad:
            group = plain if name.endswith(".bias") or parameter.ndim == 1 else decayed
            group["params"].append(parameter)
            group["teacher_params"].append(follower)
    return [decayed, plain]


# ---- CUDA graph ----


def build_graph(state: TrainState) -> StepGraph | None:
    """The CUDA graph of a state's steps, or None. Raises UserError if `--cuda-graph on` is not possible."""
    reason = unsupported_reason(state)
    if state.config.cuda_graph == "on" and reason:
        raise UserError(f"--cuda-graph on: {reason}; use --cuda-graph auto or off")
    if state.config.cuda_graph == "off" or reason:
        return None
    assert isinstance(state.optimizer, AdamWEMA)
    return StepGraph(state.optimizer, state.device, required=state.config.cuda_graph == "on")


def unsupported_reason(state: TrainState) -> str | None:
    """Why a step cannot be recorded as a CUDA graph, or None."""
    if state.device.type != "cuda":
        return f"a CUDA graph needs a GPU, and the run trains on {state.device}"
    if state.context.world > 1:
        return "with several processes gradients are exchanged within the step"
    if not isinstance(state.optimizer, AdamWEMA):
        return f"--optimizer {state.config.optimizer} does not read its hyperparameters on the GPU"
    if state.autocast is not None:
        return "under autocast (fp16, or bf16 with batch norm) the step is not the same each time"
    if not isinstance(state.student.backbone, VisionTransformer):
        return f"--arch {state.config.arch} may compute differently from step to step"
    try:
        backend = choose("multi_tensor", next(state.student.parameters()).detach())
    except BackendError as error:
        return str(error)
    return None if backend == "cuda" else f"the {backend} optimizer does not read its hyperparameters on the GPU"
