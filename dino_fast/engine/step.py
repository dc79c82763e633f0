"""One optimizer step: the published algorithm on one global batch, and what it keeps between steps."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn

from dino_fast.engine.config import Config
from dino_fast.engine.monitor import feature_spread
from dino_fast.engine.optimizers import Optimizer, build_optimizer
from dino_fast.engine.schedules import Rates
from dino_fast.errors import UserError
from dino_fast.loss import DINOLoss
from dino_fast.models import (
    DINOHead,
    MultiCropWrapper,
    VisionTransformer,
    WeightNormLinear,
    build_backbone,
    set_drop_path_seed,
)
from dino_fast.ops.dino_loss import dino_loss
from dino_fast.optim import ema_update

# The narrow models that `init: xavier` is for start at ln K and stay there with the published deviation of 0.02.
XAVIER_POSITION_STD = 0.3


class Crops(Protocol):
    """What a step needs of a batch."""

    global_crops: Tensor  # [2, B, C, H, W]
    local_crops: Tensor  # [n_local, B, C, h, w]


class NonFiniteLoss(Exception):
    """The loss of a step is inf or NaN; weights and optimizer are as they were before the step."""


@dataclass
class Learner:
    """Everything that a step reads and changes."""

    config: Config
    device: torch.device
    autocast: torch.dtype | None  # bfloat16 or float16; None computes in float32
    student: MultiCropWrapper
    teacher: MultiCropWrapper
    loss: DINOLoss  # holds the centre
    optimizer: Optimizer
    scaler: torch.amp.GradScaler


def build_learner(config: Config, channels: int, device: torch.device, precision: str) -> Learner:
    """Student, teacher, loss and optimizer of a new run, a function of the configuration and its seed alone."""
    torch.manual_seed(config.seed)
    student = build_model(config, channels, config.drop_path_rate).to(device)
    teacher = build_model(config, channels, 0.0).to(device)
    teacher.load_state_dict(student.state_dict())
    teacher.requires_grad_(False)
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
    groups = parameter_groups(student, teacher)
    optimizer = build_optimizer(config.optimizer, groups, config.lr, config.weight_decay, config.clip_grad)
    autocast = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    scaler = torch.amp.GradScaler(device.type, enabled=autocast is torch.float16)
    return Learner(config, device, autocast, student, teacher, loss, optimizer, scaler)


def build_model(config: Config, channels: int, drop_path_rate: float) -> MultiCropWrapper:
    """Backbone and head as configured."""
    sizes = {"embed_dim": config.embed_dim, "depth": config.depth, "num_heads": config.heads}
    backbone = build_backbone(
        config.arch,
        patch_size=config.patch_size,
        img_size=config.global_size,
        in_chans=channels,
        drop_path_rate=drop_path_rate,
        **{name: size for name, size in sizes.items() if size is not None},
    )
    head = DINOHead(
        backbone.embed_dim,
        config.out_dim,
        use_bn=config.head_bn,
        norm_last_layer=config.norm_last_layer,
        nlayers=config.head_layers,
        hidden_dim=config.head_hidden_dim,
        bottleneck_dim=config.head_bottleneck_dim,
    )
    if config.init == "xavier":
        if not isinstance(backbone, VisionTransformer):
            raise UserError(f"--init xavier is for vit_* architectures; use --init published with --arch {config.arch}")
        xavier(backbone, head)
    return MultiCropWrapper(backbone, head)


def xavier(backbone: VisionTransformer, head: nn.Module) -> None:
    """Xavier-uniform linear layers and wide position embeddings; the prototypes keep their own initialisation."""
    for module in (*backbone.modules(), *head.modules()):
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            nn.init.zeros_(module.bias)
    nn.init.normal_(backbone.pos_embed, std=XAVIER_POSITION_STD)


def parameter_groups(student: nn.Module, teacher: nn.Module) -> list[dict[str, Any]]:
    """Two groups as published, each with its teacher's parameters: what decays, and biases and vectors."""
    decayed: dict[str, Any] = {"params": [], "teacher_params": []}
    plain: dict[str, Any] = {"params": [], "teacher_params": [], "weight_decay": 0.0}
    for (name, parameter), follower in zip(student.named_parameters(), teacher.parameters(), strict=True):
        if parameter.requires_grad:
            group = plain if name.endswith(".bias") or parameter.ndim == 1 else decayed
            group["params"].append(parameter)
            group["teacher_params"].append(follower)
    return [decayed, plain]


def train_step(run: Learner, batch: Crops, rates: Rates, step: int) -> dict[str, float]:
    """Forward, loss, backward, clip, AdamW, teacher, centre: one published iteration on one global batch.

    With `accumulate` the batch goes through the models in parts; targets, gradients and centre are those of the whole.
    Returns the step's `loss`, `teacher_entropy`, `kl` (nats) and `feature_spread`. Raises NonFiniteLoss.
    """
    parts = list(_parts(batch, run.config.accumulate, run.device))
    _set_rates(run, rates)
    if step == 0 and run.config.center_init == "first_batch" and run.config.centering:
        _start_center(run, parts)
    loss, entropy = torch.zeros((), device=run.device), torch.zeros((), device=run.device)
    mean = torch.zeros(run.config.out_dim, device=run.device)
    features = []
    for i, (large, small) in enumerate(parts):
        set_drop_path_seed(run.student, run.config.seed, step * len(parts) + i)
        with _autocast(run):
            with torch.no_grad():
                tokens = run.teacher.backbone(large)  # [2 B, C]
                targets = run.teacher.head(tokens)  # [2 B, K]
            logits = run.student([large, small] if len(small) else [large])  # [V B, K]
        result = dino_loss(
            logits.unflatten(0, (run.loss.ncrops, -1)),
            targets.unflatten(0, (2, -1)),
            run.loss.center[0],
            student_temp=run.config.student_temp,
            teacher_temp=rates.teacher_temp,
            inplace=True,  # nothing else reads the student's logits
        )
        loss += result.loss.detach() / len(parts)
        entropy += result.teacher_entropy / len(parts)
        mean += result.teacher_mean / len(parts)
        features.append(tokens[: len(tokens) // 2])  # of the first global crops
        if i == len(parts) - 1:  # on their way before the last backward pass: nothing waits for that one
            spread = [feature_spread(torch.cat(features))] if run.config.batch_size > 1 else []
            numbers = read_later(torch.stack([loss, entropy, *spread]))
        run.scaler.scale(result.loss / len(parts)).backward()
    value, entropy_value, *spreads = numbers()
    if not math.isfinite(value):
        run.optimizer.zero_grad()
        raise NonFiniteLoss(value)
    if run.config.teacher == "previous-step":
        ema_update(run.teacher.parameters(), run.student.parameters(), 0.0)
    run.scaler.step(run.optimizer, momentum=rates.momentum)
    run.scaler.update()
    run.optimizer.zero_grad()
    if run.config.centering:
        run.loss.update_center(mean)
    metrics = {"loss": value, "teacher_entropy": entropy_value, "kl": value - entropy_value}
    return metrics | ({"feature_spread": spreads[0]} if spreads else {})


def read_later(values: Tensor) -> Callable[[], list[float]]:
    """Starts copying `values` to the host; the function returned waits for that copy alone and gives the numbers."""
    host = values.to("cpu", non_blocking=True)  # into pinned memory, from a GPU
    if not values.is_cuda:
        return host.tolist
    copied = torch.cuda.Event()
    copied.record()

    def numbers() -> list[float]:
        copied.synchronize()
        return cast(list[float], host.tolist())

    return numbers


def learner_state(run: Learner) -> dict[str, Any]:
    """What a checkpoint holds of a learner."""
    return {
        "student": run.student.state_dict(),
        "teacher": run.teacher.state_dict(),
        "dino_loss": run.loss.state_dict(),
        "optimizer": run.optimizer.state_dict(),
        "scaler": run.scaler.state_dict(),
        "torch_rng": torch.get_rng_state(),
    }


def restore_learner(run: Learner, state: dict[str, Any], source: str) -> None:
    """The inverse of `learner_state`. Raises UserError where the checkpoint is of another model."""
    for name, module in (("student", run.student), ("teacher", run.teacher), ("dino_loss", run.loss)):
        try:
            module.load_state_dict(state[name])
        except (RuntimeError, KeyError) as error:
            raise UserError(
                f"the checkpoint in {source} is of another model than this configuration describes ({error}). "
                "Resume with the settings of that run (leave them out), or start a new run with another --out"
            ) from error
    run.optimizer.load_state_dict(state["optimizer"])
    run.scaler.load_state_dict(state["scaler"])
    torch.set_rng_state(state["torch_rng"])


def _parts(batch: Crops, count: int, device: torch.device) -> Iterator[tuple[Tensor, Tensor]]:
    """The images in `count` parts: (global crops [2 b, C, H, W], local crops [n b, C, h, w]), crop by crop."""
    split = zip(batch.global_crops.chunk(count, dim=1), batch.local_crops.chunk(count, dim=1), strict=True)
    for large, small in split:
        yield (
            large.flatten(0, 1).to(device, non_blocking=True),
            small.flatten(0, 1).to(device, non_blocking=True),
        )


def _set_rates(run: Learner, rates: Rates) -> None:
    decayed, plain = run.optimizer.param_groups
    decayed["lr"] = plain["lr"] = rates.lr
    decayed["weight_decay"] = rates.weight_decay
    # While frozen, no gradient of the prototypes is computed; the teacher's follow them all the same.
    last = cast(WeightNormLinear, run.student.head.last_layer)
    last.weight_v.requires_grad_(not rates.frozen)
    last.weight_g.requires_grad_(not rates.frozen and not run.config.norm_last_layer)


@torch.no_grad()
def _start_center(run: Learner, parts: list[tuple[Tensor, Tensor]]) -> None:
    """The centre becomes the mean of the teacher's logits over the batch."""
    with _autocast(run):
        means = [run.teacher([large]).float().mean(dim=0) for large, _ in parts]
    run.loss.center.copy_(torch.stack(means).mean(dim=0)[None])


def _autocast(run: Learner) -> contextlib.AbstractContextManager[Any]:
    return torch.autocast(run.device.type, run.autocast, enabled=run.autocast is not None)
