"""The head's last layer and the loss, in one of three ways that give the same numbers to rounding.

fused     `linear_dino_loss`: no logits at all. On a GPU the fastest, and the smallest everywhere
chunked   logits of some images at a time, of which the gradients are left. On a CPU the default: the fastest, at a
          third of the memory of all logits at once (64 images, K = 65536, two cores: 206 ms, those 242 ms; with the
          logits made again, `linear_dino_loss`, 359 ms)
logits    those of all images at once, by PyTorch's layer and `dino_loss`
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dino_fast.backends import choose
from dino_fast.loss import linear_dino_loss
from dino_fast.models import WeightNormLinear
from dino_fast.ops.dino_loss import dino_loss
from dino_fast.ops.linear.matmul import matmul

PART = 16 << 20  # floats of logits at a time, 25 images of 10 crops at K = 65536; half of it: 267 ms, twice: 193 ms
ENTROPY_ROWS = 128  # whose logits are made for the teacher's entropy where the loss needs none


def choose_way(asked: str, rows: Tensor, weight: Tensor) -> str:
    """`asked`, or for "auto" the fastest for these rows: fused where kernels for the GPU are, else chunked on a CPU."""
    if asked != "auto":
        return asked
    if rows.is_cuda:
        return "fused" if choose("linear_dino_loss", rows, weight, rows, weight) == "triton" else "logits"
    return "chunked"


def loss_of_rows(
    rows: Tensor,
    student: WeightNormLinear,
    targets: Tensor,
    teacher: WeightNormLinear,
    center: Tensor,
    *,
    student_temp: float,
    teacher_temp: float,
    way: str = "auto",
) -> tuple[Tensor, Tensor]:
    """The loss and the targets' mean entropy, from what the last layers are given: [V, B, D] and [2, B, D]."""
    mixed = torch.is_autocast_enabled(rows.device.type)
    dtype = torch.get_autocast_dtype(rows.device.type) if mixed else rows.dtype
    way = choose_way(way, rows, student.weight_v)
    if way == "chunked" and dtype == torch.float16:  # whose gradients must be made with the scaler's factor
        way = "logits"
    temps: dict[str, Any] = {"student_temp": student_temp, "teacher_temp": teacher_temp}
    if way == "fused":
        temps |= {"student_gain": student.weight_g[:, 0], "teacher_gain": teacher.weight_g[:, 0]}
        with torch.autocast(rows.device.type, enabled=False):
            loss, _ = linear_dino_loss(rows, student.weight_v, targets, teacher.weight_v, center, **temps)
        return loss, entropy_of(targets.flatten(0, 1), teacher, center, teacher_temp)
    if way == "chunked":
        of_teacher = _Targets(targets.to(dtype), teacher, dtype)
        loss, entropy = _Parts.apply(rows.to(dtype), student.weight.to(dtype), of_teacher, center, temps)
        return loss, entropy
    with torch.no_grad():
        target_logits = F.linear(targets, teacher.weight)  # [2, B, K]
    logits = F.linear(rows, student.weight)  # [V, B, K]
    # In place: nothing else reads the student's logits.
    result = dino_loss(logits, target_logits, center, inplace=True, **temps)
    return result.loss, result.teacher_entropy


@torch.no_grad()
def entropy_of(targets: Tensor, teacher: WeightNormLinear, center: Tensor, teacher_temp: float) -> Tensor:
    """Mean entropy (nats) of softmax((teacher(targets) - center) / teacher_temp) for targets [rows, D], float32."""
    weight, total = teacher.weight, torch.zeros((), dtype=torch.float32, device=targets.device)
    for part in targets.split(ENTROPY_ROWS):
        log_p = ((F.linear(part, weight).float() - center) / teacher_temp).log_softmax(dim=-1)
        total -= (log_p.exp() * log_p).sum()
    return total / len(targets)


class _Targets:
    """The teacher's logits, kept where they are smaller than the weights that they are made with."""

    @torch.no_grad()
    def __init__(self, targets: Tensor, teacher: WeightNormLinear, dtype: torch.dtype) -> None:
        self.targets = targets  # [2, B, D]
        self.weight: Tensor | None = teacher.weight.to(dtype)  # [K, D]
        self.kept: Tensor | None = None  # [2, B, K]
        if targets.shape[1] * 2 <= targets.shape[2]:
            self.kept = self[:]
            self.weight = None

    def __getitem__(self, images: slice) -> Tensor:
        if self.weight is None:
            assert self.kept is not None
            return self.kept[:, images]
        rows = self.targets[:, images]
        # Of rows side by side: a product of separate crops is one for each of them.
        return matmul(rows.reshape(-1, rows.shape[2]), self.weight.t()).unflatten(0, rows.shape[:2])


class _Parts(torch.autograd.Function):
    """dino_loss(rows W^T, the teacher's logits, center) and the mean entropy, some images after the others.

    The gradients are made with the loss, for an upstream gradient of 1, while the logits are in the cache; a scaler's
    factor would come too late for float16.
    """

    @staticmethod
    def forward(
        ctx: Any,
        rows: Tensor,
        weight: Tensor,
        targets: _Targets,
        center: Tensor,
        temps: dict[str, Any],
    ) -> tuple[Tensor, Tensor]:
        V, B, D = rows.shape
        wants_rows, wants_weight = ctx.needs_input_grad[:2]
        by_rows = torch.empty_like(rows, memory_format=torch.contiguous_format) if wants_rows else None
        by_weight = torch.empty_like(weight) if wants_weight else None
        parts = -(-B // max(1, PART // (V * len(weight))))
        step = -(-B // parts)  # evenly: the largest part is what memory is needed for
        values = []
        for first in range(0, B, step):
            images = slice(first, first + step)
            part, target_logits = rows[:, images], targets[images]
            share, flat = part.shape[1] / B, part.reshape(-1, D)
            logits = matmul(flat, weight.t()).requires_grad_(wants_rows)
            with torch.enable_grad():
                of_crops = logits.unflatten(0, part.shape[:2])
                result = dino_loss(of_crops, target_logits, center, inplace=True, **temps)
            values.append(torch.stack([result.loss.detach(), result.teacher_entropy]) * share)
            if by_rows is not None:
                (gradient,) = torch.autograd.grad(result.loss, logits)
                by_rows[:, images] = matmul(gradient, weight).unflatten(0, part.shape[:2]) * share
                if by_weight is not None:
                    matmul(gradient.t(), flat * share, out=by_weight, add=first > 0)
                del gradient
            del logits, target_logits, of_crops, result  # before the next ones are made
        ctx.save_for_backward(by_rows, by_weight)
        loss, entropy = torch.stack(values).sum(0)
        ctx.mark_non_differentiable(entropy)
        return loss, entropy

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, upstream: Tensor, unused: Tensor) -> tuple[Tensor | None, ...]:
        gradients = [None if x is None else _times(x, upstream) for x in ctx.saved_tensors]
        return *gradients, None, None, None


def _times(gradient: Tensor, upstream: Tensor) -> Tensor:
    """gradient * upstream, without a pass over memory where that is 1; of a CPU's numbers, which nothing waits for."""
    return gradient if upstream.item() == 1.0 else gradient * upstream.to(gradient.dtype)
