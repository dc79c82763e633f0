"""A lightly pipeline with dino-fast's loss: `FusedDINOLoss` takes what `lightly.loss.DINOLoss` takes.

pip install lightly
python examples/lightly_loss.py --steps 10
"""

from __future__ import annotations

import argparse

import torch
from lightly.loss import DINOLoss
from lightly.models.modules import DINOProjectionHead
from lightly.models.utils import deactivate_requires_grad, update_momentum
from lightly.transforms import DINOTransform
from PIL import Image
from torch import Tensor, nn

from dino_fast.data import open_source
from dino_fast.models import VisionTransformer
from dino_fast.ops.dino_loss import dino_loss  # dino_fast.loss.dino_loss, and the mean teacher logits beside it


class FusedDINOLoss(DINOLoss):
    """Same arguments, numbers and state dict as lightly's, for two teacher views; one fused operation."""

    def forward(
        self,
        teacher_out: list[Tensor],
        student_out: list[Tensor],
        teacher_temp: float | None = None,
        epoch: int | None = None,
    ) -> Tensor:
        """Lists of logits [B, K], one tensor a view, in the same order -> scalar; then the centre moves."""
        if teacher_temp is None:
            warming = epoch is not None and epoch < self.warmup_teacher_temp_epochs
            teacher_temp = float(self.teacher_temp_schedule[epoch]) if warming else self.teacher_temp
        student, teacher = torch.stack(student_out), torch.stack(teacher_out)
        temps = {"student_temp": self.student_temp, "teacher_temp": teacher_temp}
        result = dino_loss(student, teacher, self.center.flatten(), **temps)
        self.update_center(result.teacher_mean[None, None])  # the mean over ranks of one row, which is each one's mean
        return result.loss


def network() -> nn.Module:
    vit = VisionTransformer(img_size=28, patch_size=7, embed_dim=64, depth=2, num_heads=2)
    return nn.Sequential(vit, DINOProjectionHead(64, 128, 64, 512))


def main(argv: list[str] | None = None) -> list[float]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=10)
    steps = parser.parse_args(argv).steps
    torch.manual_seed(0)
    source = open_source("demo")
    transform = DINOTransform(global_crop_size=28, local_crop_size=14, n_local_views=2)
    student, teacher = network(), network()
    teacher.load_state_dict(student.state_dict())
    deactivate_requires_grad(teacher)
    criterion = FusedDINOLoss(output_dim=512, warmup_teacher_temp_epochs=5)
    optimizer = torch.optim.AdamW(student.parameters(), lr=0.001)
    losses = []
    for step in range(steps):
        images = [Image.fromarray(source.read(16 * step + i)[0].numpy()).convert("RGB") for i in range(16)]
        views = [torch.stack(view) for view in zip(*map(transform, images), strict=True)]  # 4 of [16, 3, h, w]
        update_momentum(student, teacher, 0.99)
        loss = criterion([teacher(v) for v in views[:2]], [student(v) for v in views], epoch=step // 5)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        print(f"step {step}: loss {losses[-1]:.4f}")
    return losses


if __name__ == "__main__":
    main()
