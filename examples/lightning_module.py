"""DINO as a Lightning module: the fused loss, and one optimizer step that clips, updates and moves the teacher.

pip install lightning
python examples/lightning_module.py --steps 50
"""

from __future__ import annotations

import argparse
import copy
import math
from typing import Any

import lightning
import torch
from torch import Tensor

from dino_fast.augment import MultiCrop
from dino_fast.data import Batch, open_source, train_loader
from dino_fast.loss import DINOLoss
from dino_fast.models import DINOHead, MultiCropWrapper, VisionTransformer
from dino_fast.optim import AdamWEMA


class DINO(lightning.LightningModule):
    def __init__(self, student: MultiCropWrapper, loss: DINOLoss, *, steps: int, lr: float = 0.001) -> None:
        super().__init__()
        self.student, self.teacher, self.loss = student, copy.deepcopy(student).requires_grad_(False), loss
        self.steps, self.lr = steps, lr

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        large, small = batch.global_crops.flatten(0, 1), batch.local_crops.flatten(0, 1)  # [crops * B, C, h, w]
        with torch.no_grad():
            targets = self.teacher([large])
        loss = self.loss(self.student([large, small]), targets, batch.epoch)
        self.log_dict({"loss": loss.detach(), "teacher_entropy": self.loss.teacher_entropy, "kl": self.loss.kl})
        return loss

    def configure_optimizers(self) -> AdamWEMA:
        decayed: dict[str, Any] = {"params": [], "teacher_params": [], "weight_decay": 0.04}
        plain: dict[str, Any] = {"params": [], "teacher_params": [], "weight_decay": 0.0}  # biases and norms
        for p, average in zip(self.student.parameters(), self.teacher.parameters(), strict=True):
            group = plain if p.ndim == 1 else decayed
            group["params"].append(p)
            group["teacher_params"].append(average)
        return AdamWEMA([decayed, plain], None, lr=self.lr, clip_grad=3.0)

    def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None) -> None:
        done = self.global_step / self.steps
        for group in optimizer.param_groups:
            group["lr"] = self.lr * min(1.0, 10 * done + 0.1) * (1 + math.cos(math.pi * done)) / 2
        momentum = 1 - 0.01 * (1 + math.cos(math.pi * done)) / 2
        optimizer.step(closure=optimizer_closure, momentum=momentum)


def main(argv: list[str] | None = None) -> DINO:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=50)
    steps = parser.parse_args(argv).steps
    lightning.seed_everything(0, verbose=False)
    crops = MultiCrop(28, 14, 2, local_scale=(0.15, 0.5), mean=(0.286,), std=(0.353,))
    batches = train_loader(open_source("demo"), crops, batch_size=32, seed=0)  # endless
    vit = VisionTransformer(img_size=28, patch_size=7, in_chans=1, embed_dim=64, depth=3, num_heads=2)
    student = MultiCropWrapper(vit, DINOHead(64, 512, hidden_dim=128, bottleneck_dim=64))
    module = DINO(student, DINOLoss(512, crops.n_crops, 0.03, 0.03, 0, 1), steps=steps)
    quiet = {"logger": False, "enable_checkpointing": False, "enable_model_summary": False}
    trainer = lightning.Trainer(max_steps=steps, devices=1, enable_progress_bar=False, **quiet)
    trainer.fit(module, batches)
    print(f"{steps} steps:", ", ".join(f"{name} {value:.4f}" for name, value in trainer.callback_metrics.items()))
    return module


if __name__ == "__main__":
    main()
