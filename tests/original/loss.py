"""The published loss: a loop over pairs of views, and the einsum over all of them that later codes use."""

from __future__ import annotations

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn


class DINOLoss(nn.Module):
    """Cross-entropy between the teacher's two global views and every other view of the student.

    `forward(student_output [V*B, K], teacher_output [2*B, K], epoch)` with crop-major rows returns the mean over
    images and pairs, then moves `center` (1, K) towards the mean teacher logits (over all ranks, where there are any).
    """

    center: Tensor

    def __init__(
        self,
        out_dim: int,
        ncrops: int,
        warmup_teacher_temp: float,
        teacher_temp: float,
        warmup_teacher_temp_epochs: int,
        nepochs: int,
        student_temp: float = 0.1,
        center_momentum: float = 0.9,
    ) -> None:
        super().__init__()
        self.student_temp = student_temp
        self.center_momentum = center_momentum
        self.ncrops = ncrops
        self.register_buffer("center", torch.zeros(1, out_dim))
        self.teacher_temp_schedule = np.concatenate(
            (
                np.linspace(warmup_teacher_temp, teacher_temp, warmup_teacher_temp_epochs),
                np.ones(nepochs - warmup_teacher_temp_epochs) * teacher_temp,
            )
        )

    def forward(self, student_output: Tensor, teacher_output: Tensor, epoch: int) -> Tensor:
        student_crops = (student_output / self.student_temp).chunk(self.ncrops)  # V x [B, K]
        temp = float(self.teacher_temp_schedule[epoch])
        targets = F.softmax((teacher_output - self.center) / temp, dim=-1).detach().chunk(2)  # 2 x [B, K]

        total = torch.zeros((), device=student_output.device)
        pairs = 0
        for u, target in enumerate(targets):
            for v, logits in enumerate(student_crops):
                if u == v:
                    continue  # the same view on both sides
                cross_entropy = torch.sum(-target * F.log_softmax(logits, dim=-1), dim=-1)  # [B]
                total = total + cross_entropy.mean()
                pairs += 1
        self.update_center(teacher_output)
        return total / pairs

    @torch.no_grad()
    def update_center(self, teacher_output: Tensor) -> None:
        mean = teacher_output.sum(dim=0, keepdim=True)  # [1, K]
        world = 1
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(mean)
            world = dist.get_world_size()
        mean = mean / (len(teacher_output) * world)
        self.center = self.center * self.center_momentum + mean * (1 - self.center_momentum)


def einsum_dino_loss(
    student: Tensor, teacher: Tensor, center: Tensor, *, student_temp: float, teacher_temp: float
) -> Tensor:
    """The same number as one einsum over all pairs: `[V, B, K]`, `[2, B, K]`, `[K]` -> scalar.

    Later codes multiply every target by every log-probability at once and drop the same-view diagonal.
    """
    views, batch = student.shape[:2]
    targets = F.softmax((teacher - center) / teacher_temp, dim=-1).detach()
    log_probs = F.log_softmax(student / student_temp, dim=-1)
    pairs = -torch.einsum("ubk,vbk->uv", targets, log_probs)  # [2, V], summed over images
    same = torch.eye(2, views, dtype=torch.bool, device=student.device)
    return pairs.masked_fill(same, 0.0).sum() / (batch * (2 * views - 2))
