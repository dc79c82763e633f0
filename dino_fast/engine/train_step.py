"""One optimizer step: the published algorithm on one global batch."""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Iterator
from typing import Any, Protocol, cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from dino_fast.backends import choose
from dino_fast.dtensor import to_local
from dino_fast.engine.metrics import StepMetrics
from dino_fast.engine.parallelize import replicate
from dino_fast.engine.schedules import StepHyperparams
from dino_fast.engine.train_state import TrainState, call_direct
from dino_fast.loss import linear_dino_loss
from dino_fast.models import DINOHead, VisionTransformer, WeightNormLinear, set_drop_path_seed
from dino_fast.ops.dino_loss import dino_loss
from dino_fast.ops.linear_dino_loss.chunked import linear_dino_loss_chunked, teacher_entropy
from dino_fast.ops.linear_dino_loss.sharded import linear_dino_loss_ranks
from dino_fast.optim import ema_update


class Crops(Protocol):
    """The crops of a batch: float32, on any device."""

    global_crops: Tensor  # [2, B, C, H, W]
    local_crops: Tensor  # [n_local, B, C, h, w]


def train_step(state: TrainState, batch: Crops, hyperparams: StepHyperparams, step: int) -> StepMetrics:
    """Forward, loss, backward, clip, AdamW, teacher, center: one published iteration on one global batch.

    With `grad_accum_steps` the batch goes through the models in micro-batches; targets, gradients and center are those
    of the whole batch. Returns `loss`, `teacher_entropy`, `kl` (nats), `feature_spread` and `grad_norm` (before
    clipping), whose copy to the host has only been started. A non-finite loss leaves weights, moments, teacher and
    center as they are; with `on_nonfinite: stop` so do all steps after it.
    """
    micro_batches = list(_micro_batches(batch, state.config.grad_accum_steps, state.device))
    _set_hyperparams(state, hyperparams)
    if step == 0 and state.config.center_init == "first_batch" and state.config.centering:
        _init_center(state, micro_batches)
    keep_indices, first = [], state.context.rank * batch.global_crops.shape[1]
    for crops in micro_batches:
        keep_indices.append(_keep_indices(state, *crops, step, first))
        first += len(crops[0]) // 2
    compute = functools.partial(compute_step, state)
    if state.graph is not None:
        return StepMetrics(state.graph(compute, micro_batches, keep_indices, hyperparams))
    numbers = compute(micro_batches, keep_indices, hyperparams)
    state.optimizer.zero_grad()
    return StepMetrics(numbers)


def compute_step(
    state: TrainState,
    micro_batches: list[tuple[Tensor, Tensor]],
    keep_indices: list[Tensor | None],
    hyperparams: StepHyperparams,
) -> dict[str, Tensor]:
    """The device's work of a step, from crops and keep indices that lie on it. Returns scalars on the device.

    The host reads no value and copies nothing, so that it can be recorded as a CUDA graph.
    """
    config, count = state.config, len(micro_batches)
    loss = torch.zeros((), dtype=torch.float32, device=state.device)
    entropy = torch.zeros_like(loss)
    # Mean input of the teacher's last layer.
    bottleneck_mean = torch.zeros(config.head_bottleneck_dim, dtype=torch.float32, device=state.device)
    features = []
    _, teacher = state.forward_models
    teacher_head = cast(DINOHead, teacher.head)
    for i, (global_crops, local_crops) in enumerate(micro_batches):
        last = i == count - 1
        with _autocast(state), state.sync_gradients(last):
            state.on_phase("teacher")
            with torch.no_grad():
                tokens = teacher.backbone(global_crops)  # [2 B, C]
                targets = teacher_head.bottleneck(tokens)  # [2 B, D]
            state.on_phase("student")
            crops = [global_crops, local_crops] if len(local_crops) else [global_crops]
            rows = state.forward_fn(_student_rows, state, crops, keep_indices[i])  # [V B, D]
            state.on_phase("loss")
            micro_loss, micro_entropy = _loss(state, rows, targets, hyperparams.teacher_temp)
        loss += micro_loss.detach() / count
        entropy += micro_entropy / count
        bottleneck_mean += targets.float().mean(dim=0) / count
        features.append(tokens[: len(tokens) // 2])  # of the first global crops
        if last:  # all-reduced while the last backward pass runs, which waits for neither
            reduced_mean = state.context.start_mean(bottleneck_mean)
            spread = [feature_spread(torch.cat(features))] if sum(map(len, features)) > 1 else []
            reduced_numbers = state.context.start_mean(torch.stack([loss, entropy, *spread]))
        state.on_phase("backward")
        state.scaler.scale(micro_loss / count).backward()
    state.on_phase("optimizer")
    names = ("loss", "teacher_entropy", "feature_spread")
    numbers = dict(zip(names, reduced_numbers().unbind(), strict=False))
    nonfinite = ~numbers["loss"].isfinite()
    state.skip_step.copy_(nonfinite | state.skip_step if config.on_nonfinite == "stop" else nonfinite)
    mean_logits = teacher_head.last_layer.mean_logits(reduced_mean())  # before the teacher's weights change
    if config.teacher_update == "previous-step":
        ema_update(state.teacher.parameters(), state.student.parameters(), 0.0, skip=state.skip_step)
    state.scaler.step(state.optimizer, momentum=hyperparams.momentum, skip=state.skip_step)
    state.scaler.update()
    if config.centering:
        state.loss.update_center(mean_logits, state.prototypes, skip=state.skip_step)
    norm = getattr(state.optimizer, "grad_norm", None)
    return numbers if norm is None else numbers | {"grad_norm": norm}


def _student_rows(state: TrainState, crops: list[Tensor], keep_indices: Tensor | None) -> Tensor:
    """Inputs [V B, D] of the student's last layer."""
    student, _ = state.forward_models
    return cast(DINOHead, student.head).bottleneck(student.features(crops, keep_indices))


def _loss(state: TrainState, rows: Tensor, targets: Tensor, teacher_temp: float) -> tuple[Tensor, Tensor]:
    """Loss and mean entropy of the targets, from the inputs [V B, D] and [2 B, D] of the last layers.

    Means over this process's images; over those of all processes if the prototypes are sharded. Either way the gradient
    w.r.t. `rows` is that of this process's mean.
    """
    student, teacher = (cast(WeightNormLinear, network.head.last_layer) for network in state.forward_models)
    temps: dict[str, Any] = {"student_temp": state.config.student_temp, "teacher_temp": teacher_temp}
    rows, targets = rows.unflatten(0, (state.loss.ncrops, -1)), targets.unflatten(0, (2, -1))
    center = state.loss.center[0, state.prototypes]
    if state.is_sharded:
        if rows.requires_grad:  # FSDP averages gradients, and this loss is already the mean over the processes
            rows.register_hook(lambda gradient: gradient * state.context.world)
        return linear_dino_loss_ranks(
            rows,
            to_local(student.weight_v),
            targets,
            to_local(teacher.weight_v),
            center,
            student_gain=to_local(student.weight_g)[:, 0],
            teacher_gain=to_local(teacher.weight_g)[:, 0],
            **temps,
        )
    return last_layer_loss(rows, student, targets, teacher, center, impl=state.config.loss_impl, **temps)


def last_layer_loss(
    rows: Tensor,
    student: WeightNormLinear,
    targets: Tensor,
    teacher: WeightNormLinear,
    center: Tensor,
    *,
    student_temp: float,
    teacher_temp: float,
    impl: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Loss and mean entropy of the targets (nats), float32 scalars, from the last layers' inputs [V, B, D], [2, B, D].

    `impl` is "auto", or one of three that agree to rounding: "fused" (`linear_dino_loss`) stores no logits, "chunked"
    those of a few images at a time, "logits" those of all images.
    """
    mixed = torch.is_autocast_enabled(rows.device.type)
    dtype = torch.get_autocast_dtype(rows.device.type) if mixed else rows.dtype
    impl = select_loss_impl(impl, rows, student.weight_v, dtype)
    temps: dict[str, Any] = {"student_temp": student_temp, "teacher_temp": teacher_temp}
    if impl == "fused":
        temps |= {"student_gain": student.weight_g[:, 0], "teacher_gain": teacher.weight_g[:, 0]}
        with torch.autocast(rows.device.type, enabled=False):
            loss, _ = linear_dino_loss(rows, student.weight_v, targets, teacher.weight_v, center, **temps)
        return loss, teacher_entropy(targets.flatten(0, 1), teacher.weight, center, teacher_temp)
    if impl == "chunked":
        with torch.no_grad():
            teacher_weight = teacher.weight.to(dtype)
        student_weight = student.weight.to(dtype)
        return linear_dino_loss_chunked(
            rows.to(dtype), student_weight, targets.to(dtype), teacher_weight, center, **temps
        )
    with torch.no_grad():
        target_logits = F.linear(targets, teacher.weight)  # [2, B, K]
    logits = F.linear(rows, student.weight)  # [V, B, K]
    # In place: nothing else reads the student's logits.
    result = dino_loss(logits, target_logits, center, inplace=True, **temps)
    return result.loss, result.teacher_entropy


def select_loss_impl(asked: str, rows: Tensor, weight: Tensor, dtype: torch.dtype = torch.float32) -> str:
    """`asked`; "auto" becomes "fused" if a GPU has kernels for it, "logits" if not, and "chunked" on a CPU.

    In float16 "chunked" becomes "logits": its gradients would be made without the loss scaling.
    """
    if asked == "auto" and rows.is_cuda:
        return "fused" if choose("linear_dino_loss", rows, weight, rows, weight) == "triton" else "logits"
    impl = "chunked" if asked == "auto" else asked
    return "logits" if impl == "chunked" and dtype == torch.float16 else impl


def feature_spread(features: Tensor) -> Tensor:
    """How far the features of different images lie apart: 1 if isotropic, 0 if all are the same.

    `features` [N, C] of any float dtype, N >= 2 -> float32 scalar: the mean over dimensions of the standard deviation
    of the L2-normalized rows, times sqrt(C), the inverse of its value for directions spread evenly.
    """
    if features.ndim != 2 or features.shape[0] < 2:
        raise ValueError(f"features have shape {tuple(features.shape)}; [N, C] with at least two rows is needed")
    rows = F.normalize(features.detach().float(), dim=1)  # [N, C]
    return rows.std(dim=0, unbiased=False).mean() * math.sqrt(rows.shape[1])


def _micro_batches(batch: Crops, count: int, device: torch.device) -> Iterator[tuple[Tensor, Tensor]]:
    """The images in `count` micro-batches: (global crops [2 b, C, H, W], local crops [n b, C, h, w]), crop-major."""
    # Copied whole: flattening a chunk on the host would make a new tensor that is not pinned, and the copy would block.
    both = (x.to(device, non_blocking=True).chunk(count, dim=1) for x in (batch.global_crops, batch.local_crops))
    for global_crops, local_crops in zip(*both, strict=True):
        yield global_crops.flatten(0, 1), local_crops.flatten(0, 1)


def _keep_indices(state: TrainState, global_crops: Tensor, local_crops: Tensor, step: int, first: int) -> Tensor | None:
    """Stochastic depth of the student for a micro-batch whose images begin with the `first` of the step, on the device.

    A function of the seed, the step, and the numbers that the crops have among those of all processes.
    """
    student = state.forward_models[0]
    set_drop_path_seed(student, state.config.seed, step)
    if not isinstance(student.backbone, VisionTransformer):
        return None
    ncrops = state.loss.ncrops
    images = np.arange(first, first + len(global_crops) // 2)
    numbers = (images * ncrops + np.arange(ncrops)[:, None]).flatten()  # crop-major, as the crops are
    crops = [global_crops, local_crops] if len(local_crops) else [global_crops]
    drawn = student.backbone.stochastic_depth(crops, numbers)
    if drawn is None or not global_crops.is_cuda:
        return drawn
    return drawn.pin_memory().to(state.device, non_blocking=True)


def _set_hyperparams(state: TrainState, hyperparams: StepHyperparams) -> None:
    """Writes learning rate and weight decay to the optimizer and freezes or unfreezes the last layer."""
    decayed, plain = state.optimizer.param_groups
    decayed["lr"] = plain["lr"] = hyperparams.lr
    decayed["weight_decay"] = hyperparams.weight_decay
    # While frozen, the prototypes get no gradient; the teacher's still follow them.
    last = cast(WeightNormLinear, state.student.head.last_layer)
    changed = last.weight_v.requires_grad == hyperparams.frozen
    last.weight_v.requires_grad_(not hyperparams.frozen)
    last.weight_g.requires_grad_(not hyperparams.frozen and not state.config.norm_last_layer)
    if state.bf16_models is not None:
        copied = cast(WeightNormLinear, state.bf16_models[0].head.last_layer)
        copied.weight_v.requires_grad_(last.weight_v.requires_grad)
        copied.weight_g.requires_grad_(last.weight_g.requires_grad)
    if state.context.world > 1 and state.config.fsdp == "none" and (changed or state.forward_fn is call_direct):
        state.forward_fn = replicate(state.student)


@torch.no_grad()
def _init_center(state: TrainState, micro_batches: list[tuple[Tensor, Tensor]]) -> None:
    """Sets the center to the mean of the teacher's logits over the batch, if that is finite."""
    head = cast(DINOHead, state.teacher.head)
    with _autocast(state):
        means = [head.bottleneck(state.teacher.backbone(crops)).float().mean(dim=0) for crops, _ in micro_batches]
    mean = state.context.start_mean(torch.stack(means).mean(dim=0))()
    center, start = state.loss.center[:, state.prototypes], head.last_layer.mean_logits(mean)
    center.copy_(torch.where(mean.isfinite().all(), start, center))


def _autocast(state: TrainState) -> contextlib.AbstractContextManager[Any]:
    return torch.autocast(state.device.type, state.autocast, enabled=state.autocast is not None)
