"""The last layer and the loss from the logits of a few images at a time, with gradients made in the forward pass.

A logit costs D multiplications to make again and 12 bytes to keep. A CPU's caches keep the logits of a few images, so
making each of them once, (6 V + 2 T) products of D by K an image, beats recomputing them in the backward pass, which
takes 8 V + 4 T. 64 images, K = 65536, two cores: 206 ms, 242 ms with all logits at once, 359 ms with recomputation;
at a third of the memory of all logits.
"""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from dino_fast.ops import autograd
from dino_fast.ops.dino_loss import dino_loss
from dino_fast.ops.linear.matmul import matmul

CHUNK = 16 << 20  # floats of logits at a time, 25 images of 10 crops at K = 65536; half of it: 267 ms, twice: 193 ms
REFERENCE = "dino_fast.ops.linear_dino_loss.linear_dino_loss_reference"
ENTROPY_ROWS = 128  # rows whose logits `teacher_entropy` holds at a time


def linear_dino_loss_chunked(
    student: Tensor,
    student_weight: Tensor,
    teacher: Tensor,
    teacher_weight: Tensor,
    center: Tensor,
    *,
    student_temp: float,
    teacher_temp: float,
) -> tuple[Tensor, Tensor]:
    """DINO loss and mean entropy of the teacher's targets (nats), float32 scalars.

    `student` [V, B, D] and `student_weight` [K, D] have one dtype, float32 or bfloat16; `teacher` [2, B, D] and
    `teacher_weight` [K, D] likewise; `center` [K] is float32; all are on one device. Gradients reach `student` and
    `student_weight`. They are computed for an upstream gradient of 1 and scaled afterwards, too late for the loss
    scaling that float16 needs. Raises NotImplementedError in forward-mode differentiation and under `torch.func`.
    """
    autograd.refuse_transforms("linear_dino_loss_chunked", REFERENCE, student, student_weight)
    targets = _TeacherLogits(teacher, teacher_weight)
    temps = {"student_temp": student_temp, "teacher_temp": teacher_temp}
    loss, entropy = ChunkedDinoLoss.apply(student, student_weight, targets, center, temps)
    return loss, entropy


@torch.no_grad()
def teacher_entropy(teacher: Tensor, teacher_weight: Tensor, center: Tensor, teacher_temp: float) -> Tensor:
    """Mean entropy (nats, float32 scalar) of softmax((teacher W^T - center) / teacher_temp) over rows [N, D]."""
    total = torch.zeros((), dtype=torch.float32, device=teacher.device)
    for rows in teacher.split(ENTROPY_ROWS):
        log_p = ((F.linear(rows, teacher_weight).float() - center) / teacher_temp).log_softmax(dim=-1)
        total -= (log_p.exp() * log_p).sum()
    return total / len(teacher)


class _TeacherLogits:
    """The teacher's logits of a slice of images; stored for all images if they are smaller than the weight."""

    @torch.no_grad()
    def __init__(self, rows: Tensor, weight: Tensor) -> None:
        self.rows = rows  # [2, B, D]
        self.weight: Tensor | None = weight  # [K, D]
        self.logits: Tensor | None = None  # [2, B, K]
        if rows.shape[1] * 2 <= rows.shape[2]:
            self.logits = self[:]
            self.weight = None

    def __getitem__(self, images: slice) -> Tensor:
        if self.weight is None:
            assert self.logits is not None
            return self.logits[:, images]
        rows = self.rows[:, images]
        # Flattened first: a batched product would be one product for each crop.
        return cast(Tensor, matmul(rows.reshape(-1, rows.shape[2]), self.weight.t()).unflatten(0, rows.shape[:2]))


class ChunkedDinoLoss(torch.autograd.Function):
    """See `linear_dino_loss_chunked`. Each chunk's gradients are made while its logits are in the cache."""

    @staticmethod
    def forward(
        ctx: Any,
        rows: Tensor,
        weight: Tensor,
        targets: _TeacherLogits,
        center: Tensor,
        temps: dict[str, Any],
    ) -> tuple[Tensor, Tensor]:
        """Loss and entropy; the gradients w.r.t. `rows` and `weight` are saved for the backward."""
        V, B, D = rows.shape
        wants_rows, wants_weight = ctx.needs_input_grad[:2]
        grad_rows = torch.empty_like(rows, memory_format=torch.contiguous_format) if wants_rows else None
        grad_weight = torch.empty_like(weight) if wants_weight else None
        chunks = -(-B // max(1, CHUNK // (V * len(weight))))
        size = -(-B // chunks)  # evenly: memory is needed for the largest chunk
        values = []
        for first in range(0, B, size):
            images = slice(first, first + size)
            chunk, target_logits = rows[:, images], targets[images]
            share, flat = chunk.shape[1] / B, chunk.reshape(-1, D)
            logits = matmul(flat, weight.t()).requires_grad_(wants_rows)
            with torch.enable_grad():
                crop_logits = logits.unflatten(0, chunk.shape[:2])
                result = dino_loss(crop_logits, target_logits, center, inplace=True, **temps)
            values.append(torch.stack([result.loss.detach(), result.teacher_entropy]) * share)
            if grad_rows is not None:
                (gradient,) = torch.autograd.grad(result.loss, logits)
                grad_rows[:, images] = matmul(gradient, weight).unflatten(0, chunk.shape[:2]) * share
                if grad_weight is not None:
                    matmul(gradient.t(), flat * share, out=grad_weight, add=first > 0)
                del gradient
            del logits, target_logits, crop_logits, result  # before the next chunk's are made
        ctx.save_for_backward(grad_rows, grad_weight)
        ctx.anchors = [autograd.anchor(x) for x in (rows, weight) if x.requires_grad]
        loss, entropy = torch.stack(values).sum(0)
        ctx.mark_non_differentiable(entropy)
        return loss, entropy

    @staticmethod
    @autograd.once_differentiable("linear_dino_loss_chunked", REFERENCE)
    def backward(ctx: Any, upstream: Tensor, unused: Tensor) -> tuple[Tensor | None, ...]:
        """The saved gradients, times `upstream`."""
        gradients = [None if x is None else _scale_grad(x, upstream) for x in ctx.saved_tensors]
        return *gradients, None, None, None


def _scale_grad(gradient: Tensor, upstream: Tensor) -> Tensor:
    """gradient * upstream, without a pass over memory if upstream is 1. CPU tensors: reading it blocks on nothing."""
    return gradient if upstream.item() == 1.0 else gradient * upstream.to(gradient.dtype)
