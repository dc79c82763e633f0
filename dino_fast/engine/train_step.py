"""One optimizer step: the published algorithm on one global batch."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import Any, Protocol, cast

import torch
from torch import Tensor

from dino_fast.engine import distributed as many
from dino_fast.engine.last_layer import loss_of_rows
from dino_fast.engine.later import Found
from dino_fast.engine.monitor import feature_spread
from dino_fast.engine.schedules import Rates
from dino_fast.engine.train_state import Learner, build_learner, learner_state, parameter_groups, restore_learner
from dino_fast.models import DINOHead, VisionTransformer, WeightNormLinear, set_drop_path_seed
from dino_fast.ops.linear_dino_loss.sharded import linear_dino_loss_ranks
from dino_fast.optim import ema_update

__all__ = [
    "Crops",
    "Learner",
    "build_learner",
    "compute_step",
    "learner_state",
    "parameter_groups",
    "restore_learner",
    "train_step",
]


class Crops(Protocol):
    """What a step needs of a batch."""

    global_crops: Tensor  # [2, B, C, H, W]
    local_crops: Tensor  # [n_local, B, C, h, w]


def train_step(run: Learner, batch: Crops, rates: Rates, step: int) -> Found:
    """Forward, loss, backward, clip, AdamW, teacher, centre: one published iteration on one global batch.

    With `accumulate` the batch goes through the models in parts; targets, gradients and centre are those of the whole.
    Returns the step's `loss`, `teacher_entropy`, `kl` (nats), `feature_spread` and `grad_norm` (before clipping), which
    nothing has waited for yet. A loss that is not finite leaves weights, moments, teacher and centre as they are; where
    the configuration says that it stops the run, so do all losses after it.
    """
    parts = list(_parts(batch, run.config.accumulate, run.device))
    _set_rates(run, rates)
    if step == 0 and run.config.center_init == "first_batch" and run.config.centering:
        _start_center(run, parts)
    kept = [_kept(run, crops, step * len(parts) + i) for i, crops in enumerate(parts)]
    compute = functools.partial(compute_step, run)
    if run.graph is not None:
        return Found(run.graph(compute, parts, kept, rates))
    numbers = compute(parts, kept, rates)
    run.optimizer.zero_grad()
    return Found(numbers)


def compute_step(
    run: Learner, parts: list[tuple[Tensor, Tensor]], kept: list[Tensor | None], rates: Rates
) -> dict[str, Tensor]:
    """What a GPU does in a step, from crops and drawn depths that lie on it: the host reads no number and copies none,
    so it can be recorded (`engine/cuda_graph.py`). Returns the step's numbers, scalars on the device."""
    loss = torch.zeros((), dtype=torch.float32, device=run.device)
    entropy = torch.zeros_like(loss)
    # Of what the teacher's last layer is given.
    mean = torch.zeros(run.config.head_bottleneck_dim, dtype=torch.float32, device=run.device)
    features = []
    _, teacher = run.computing
    teacher_head = cast(DINOHead, teacher.head)
    for i, (large, small) in enumerate(parts):
        last = i == len(parts) - 1
        with _autocast(run), many.reduce_gradients(run.student, run.through, last):
            run.mark("teacher")
            with torch.no_grad():
                tokens = teacher.backbone(large)  # [2 B, C]
                targets = teacher_head.bottleneck(tokens)  # [2 B, D]
            run.mark("student")
            rows = run.through(_rows, run, [large, small] if len(small) else [large], kept[i])  # [V B, D]
            run.mark("loss")
            part, part_entropy = _loss(run, rows, targets, rates.teacher_temp)
        loss += part.detach() / len(parts)
        entropy += part_entropy / len(parts)
        mean += targets.float().mean(dim=0) / len(parts)
        features.append(tokens[: len(tokens) // 2])  # of the first global crops
        if last:  # on their way before the last backward pass: nothing waits for that one
            of_all = run.ranks.start_mean(mean)
            spread = [feature_spread(torch.cat(features))] if sum(map(len, features)) > 1 else []
            means = run.ranks.start_mean(torch.stack([loss, entropy, *spread]))
        run.mark("backward")
        run.scaler.scale(part / len(parts)).backward()
    run.mark("optimizer")
    numbers = dict(zip(("loss", "teacher_entropy", "feature_spread"), means().unbind(), strict=False))
    bad = ~numbers["loss"].isfinite()
    run.held.copy_(bad | run.held if run.config.on_nonfinite == "stop" else bad)
    of_prototypes = teacher_head.last_layer.of_mean(of_all())  # before the teacher moves
    if run.config.teacher == "previous-step":
        ema_update(run.teacher.parameters(), run.student.parameters(), 0.0, hold=run.held)
    run.scaler.step(run.optimizer, momentum=rates.momentum, hold=run.held)
    run.scaler.update()
    if run.config.centering:
        run.loss.update_center(of_prototypes, run.prototypes, hold=run.held)
    norm = getattr(run.optimizer, "grad_norm", None)
    return numbers if norm is None else numbers | {"grad_norm": norm}


def _rows(run: Learner, crops: list[Tensor], kept: Tensor | None) -> Tensor:
    """What the student's last layer is given."""
    student, _ = run.computing
    return cast(DINOHead, student.head).bottleneck(student.features(crops, kept))


def _loss(run: Learner, rows: Tensor, targets: Tensor, teacher_temp: float) -> tuple[Tensor, Tensor]:
    """The loss and the targets' mean entropy, of this process's images; of all where the prototypes are cut, with the
    gradients of the former by `rows` either way."""
    student, teacher = (cast(WeightNormLinear, network.head.last_layer) for network in run.computing)
    temps: dict[str, Any] = {"student_temp": run.config.student_temp, "teacher_temp": teacher_temp}
    if run.cut:
        if rows.requires_grad:  # the others' share of the mean is theirs, and the gradients will be averaged
            rows.register_hook(lambda gradient: gradient * run.ranks.world)
        return linear_dino_loss_ranks(
            rows.unflatten(0, (run.loss.ncrops, -1)),
            many.local(student.weight_v),
            targets.unflatten(0, (2, -1)),
            many.local(teacher.weight_v),
            run.loss.center[0, run.prototypes],
            student_gain=many.local(student.weight_g)[:, 0],
            teacher_gain=many.local(teacher.weight_g)[:, 0],
            **temps,
        )
    return loss_of_rows(
        rows.unflatten(0, (run.loss.ncrops, -1)),
        student,
        targets.unflatten(0, (2, -1)),
        teacher,
        run.loss.center[0],
        way=run.config.last_layer,
        **temps,
    )


def _parts(batch: Crops, count: int, device: torch.device) -> Iterator[tuple[Tensor, Tensor]]:
    """The images in `count` parts: (global crops [2 b, C, H, W], local crops [n b, C, h, w]), crop by crop."""
    # First to the device: the pieces of a part would be put together in memory that is not pinned, and be waited for.
    both = (x.to(device, non_blocking=True).chunk(count, dim=1) for x in (batch.global_crops, batch.local_crops))
    for large, small in zip(*both, strict=True):
        yield large.flatten(0, 1), small.flatten(0, 1)


def _kept(run: Learner, crops: tuple[Tensor, Tensor], number: int) -> Tensor | None:
    """What stochastic depth draws for the student, a function of seed and `number`, on the device."""
    student, (large, small) = run.computing[0], crops
    set_drop_path_seed(student, run.config.seed, number)
    if not isinstance(student.backbone, VisionTransformer):
        return None
    drawn = student.backbone.stochastic_depth([large, small] if len(small) else [large])
    if drawn is None or not large.is_cuda:
        return drawn
    return drawn.pin_memory().to(run.device, non_blocking=True)


def _set_rates(run: Learner, rates: Rates) -> None:
    decayed, plain = run.optimizer.param_groups
    decayed["lr"] = plain["lr"] = rates.lr
    decayed["weight_decay"] = rates.weight_decay
    # While frozen, no gradient of the prototypes is computed; the teacher's follow them all the same.
    last = cast(WeightNormLinear, run.student.head.last_layer)
    changed = last.weight_v.requires_grad == rates.frozen
    last.weight_v.requires_grad_(not rates.frozen)
    last.weight_g.requires_grad_(not rates.frozen and not run.config.norm_last_layer)
    if run.copies is not None:
        copied = cast(WeightNormLinear, run.copies[0].head.last_layer)
        copied.weight_v.requires_grad_(last.weight_v.requires_grad)
        copied.weight_g.requires_grad_(last.weight_g.requires_grad)
    if run.ranks.world > 1 and run.config.shard == "none" and (changed or run.through is many.directly):
        run.through = many.replicate(run.student)


@torch.no_grad()
def _start_center(run: Learner, parts: list[tuple[Tensor, Tensor]]) -> None:
    """The centre becomes the mean of the teacher's logits over the batch."""
    head = cast(DINOHead, run.teacher.head)
    with _autocast(run):
        means = [head.bottleneck(run.teacher.backbone(large)).float().mean(dim=0) for large, _ in parts]
    mean = run.ranks.start_mean(torch.stack(means).mean(dim=0))()
    own, start = run.loss.center[:, run.prototypes], head.last_layer.of_mean(mean)
    own.copy_(torch.where(mean.isfinite().all(), start, own))


def _autocast(run: Learner) -> contextlib.AbstractContextManager[Any]:
    return torch.autocast(run.device.type, run.autocast, enabled=run.autocast is not None)
