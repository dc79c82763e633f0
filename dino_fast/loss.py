"""The DINO loss: a function of logits, and a module that replaces the original's.

`DINOLoss` takes what the original takes and gives its numbers: the loss, the centre after every call, the temperature
of every epoch, the state dict. The work is one fused operation, `dino_fast.ops.dino_loss`.
"""

from __future__ import annotations

import warnings
from typing import cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from dino_fast.ops import dino_loss as operation
from dino_fast.ops import linear_dino_loss as linear_operation
from dino_fast.ops.dino_loss.common import TEACHER_CROPS
from dino_fast.ops.gram_loss import gram_loss
from dino_fast.ops.koleo_loss import koleo_loss
from dino_fast.ops.sinkhorn_center import sinkhorn_center

__all__ = [
    "DINOLoss",
    "bank_loss",
    "dino_loss",
    "gram_loss",
    "koleo_loss",
    "linear_dino_loss",
    "linear_ibot_loss",
    "sinkhorn_center",
]


def dino_loss(
    student: Tensor,
    teacher: Tensor,
    center: Tensor,
    *,
    student_temp: float | Tensor,
    teacher_temp: float | Tensor,
    inplace: bool = False,
    backend: str = "auto",
) -> Tensor:
    """Mean cross-entropy between the teacher's and the student's distributions over all pairs of different crops.

    Args:
        student: logits [V, B, K] of V crops of B images, the two global crops first; float32, bfloat16, float16 or
            float64.
        teacher: logits [2, B, K] of the global crops, in the same order. Not differentiated.
        center: [K], subtracted from the teacher's logits.
        student_temp, teacher_temp: what logits are divided by before the softmax. Compiled code is compiled anew for
            each number; a tensor on the host, of no dimensions, may change from call to call.
        inplace: the gradient may be written over the student's logits, which saves their size in memory and time; see
            `dino_fast.ops.dino_loss.dino_loss`.
        backend: "auto" or a name that `dino-fast info` lists.

    Returns:
        A float32 scalar (float64 for float64 logits), differentiable by `student`.

    Raises:
        ValueError: shapes, dtypes, devices or temperatures that do not fit.
    """
    return operation.dino_loss(
        student, teacher, center, student_temp=student_temp, teacher_temp=teacher_temp, inplace=inplace, backend=backend
    ).loss


def linear_dino_loss(
    student: Tensor,
    student_weight: Tensor,
    teacher: Tensor,
    teacher_weight: Tensor,
    center: Tensor,
    *,
    student_temp: float | Tensor,
    teacher_temp: float | Tensor,
    student_gain: Tensor | None = None,
    teacher_gain: Tensor | None = None,
    pair_weights: Tensor | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """`dino_loss` from the inputs of the head's last layer, a linear one without bias, whose logits are never stored.

    Args:
        student: [V, B, D], what the student's last layer would get, the two global crops first; float32, bfloat16,
            float16 or float64.
        student_weight: [K, D], that layer's matrix, of any of these dtypes.
        teacher, teacher_weight: [T, B, D] and [K, D] of the teacher, in the same order. Not differentiated.
        center: [K], subtracted from the teacher's logits.
        student_temp, teacher_temp: what logits are divided by before the softmax. Compiled code is compiled anew for
            each number; a tensor on the host, of no dimensions, may change from call to call.
        student_gain, teacher_gain: [K], where the layer is weight-normed: row k of the matrix is then
            gain[k] * weight[k] / |weight[k]|. With the original's head, `last_layer.weight_g[:, 0]` and
            `last_layer.weight_v`.
        pair_weights: [T, V], how much each pair of crops counts in the mean. Default: 1, but 0 for a crop with itself.
        backend: "auto" or a name that `dino-fast info` lists.

    Returns:
        The loss, a float32 scalar (float64 for a float64 student), differentiable by `student`, `student_weight` and
        `student_gain`; and the mean [K] of this process's raw teacher logits, for the centre.

    Raises:
        ValueError: shapes, dtypes, devices or temperatures that do not fit.
    """
    if student.dim() != 3 or teacher.dim() != 3 or 0 in student.shape or 0 in teacher.shape:
        raise ValueError(
            f"linear_dino_loss: student and teacher are [crops, images, D], none of them 0; "
            f"got {list(student.shape)} and {list(teacher.shape)}"
        )
    V, B, T = student.shape[0], student.shape[1], teacher.shape[0]
    if pair_weights is None:
        if V == 1 and T == 1:
            raise ValueError("linear_dino_loss: one crop each leaves no pair of different crops; give pair_weights")
        pair_weights = torch.ones(T, V, dtype=torch.float32, device=student.device).fill_diagonal_(0.0)
    scaled = pair_weights.to(linear_operation.result_dtype(student))
    rows = torch.ones(B, dtype=scaled.dtype, device=student.device)
    return linear_operation.linear_dino_loss(
        student,
        student_weight,
        teacher,
        teacher_weight,
        center,
        scaled / (B * scaled.sum()),
        rows,
        student_temp=student_temp,
        teacher_temp=teacher_temp,
        student_gain=student_gain,
        teacher_gain=teacher_gain,
        backend=backend,
    )


def linear_ibot_loss(
    student: Tensor,
    student_weight: Tensor,
    teacher: Tensor,
    teacher_weight: Tensor,
    center: Tensor,
    row_weights: Tensor,
    *,
    student_temp: float | Tensor,
    teacher_temp: float | Tensor,
    student_gain: Tensor | None = None,
    teacher_gain: Tensor | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """The patch loss of iBOT (Zhou et al. 2022) without logits: one target row for each student row.

    Args:
        student, teacher: [N, D], the masked patches as the last layers would get them, in the same order.
        row_weights: [N]. The loss is sum_n row_weights[n] * cross-entropy of row n: for the mean over images of the
            mean over each image's masked patches, 1 / (images * masked patches of the row's image).
        center: [K], the patches' own.
        student_weight, teacher_weight, student_temp, teacher_temp, student_gain, teacher_gain, backend: as in
            `linear_dino_loss`.

    Returns:
        The loss and the mean [K] of the raw teacher logits, as `linear_dino_loss`. Without a row (a batch in which no
        patch is masked) a loss of 0 with gradients of 0, and a mean of 0.
    """
    if student.dim() != 2 or student.shape != teacher.shape or student.shape[1] == 0:
        raise ValueError(
            f"linear_ibot_loss: student and teacher are [rows, D] of the same sizes; "
            f"got {list(student.shape)} and {list(teacher.shape)}"
        )
    if len(student) == 0:
        wide = linear_operation.result_dtype(student)
        leaves = (student, student_weight, student_gain)
        zero = sum((x.sum(dtype=wide) * 0 for x in leaves if x is not None), center.new_zeros((), dtype=wide))
        return zero, center.new_zeros(len(student_weight), dtype=wide)
    return linear_operation.linear_dino_loss(
        student[None],
        student_weight,
        teacher[None],
        teacher_weight,
        center,
        torch.ones(1, 1, dtype=torch.float32, device=student.device),
        row_weights,
        student_temp=student_temp,
        teacher_temp=teacher_temp,
        student_gain=student_gain,
        teacher_gain=teacher_gain,
        backend=backend,
    )


def bank_loss(
    student: Tensor,
    teacher: Tensor,
    bank: Tensor,
    *,
    student_temp: float | Tensor = 0.2,
    teacher_temp: float | Tensor = 0.01,
    backend: str = "auto",
) -> Tensor:
    """Distillation by similarities to a bank of features (SEED, Fang et al. 2021, arXiv:2101.04731).

    `linear_dino_loss` with the bank as both weights and no center: the mean over images of the cross-entropy between
    softmax(bank . teacher / teacher_temp) and softmax(bank . student / student_temp). The [N, K] similarities are not
    stored.

    Args:
        student: [N, D], a row an image: the student's features, projected to the teacher's width and of unit length.
        teacher: [N, D], the teacher's features of the same images, of unit length. Not differentiated.
        bank: [K, D], features of the teacher, of unit length, those of this batch among them (as published, the batch
            is put into the bank first), so K >= N. Not differentiated.
        student_temp, teacher_temp, backend: as in `linear_dino_loss`.

    Returns:
        A scalar, float32 (float64 for a float64 student), differentiable once w.r.t. `student`.

    Raises:
        ValueError: shapes, dtypes, devices or temperatures that do not fit; a bank smaller than the batch.
    """
    if student.dim() != 2 or student.shape != teacher.shape or 0 in student.shape:
        raise ValueError(
            "bank_loss: student and teacher are [images, D] of the same sizes, none of them 0 (project the student's "
            f"features to the teacher's width); got {list(student.shape)} and {list(teacher.shape)}"
        )
    if bank.dim() != 2 or bank.shape[1] != student.shape[1] or len(bank) < len(student):
        raise ValueError(
            f"bank_loss: the bank is [K, D] with D = {student.shape[1]} and at least as many rows as the batch has "
            f"images ({len(student)}); got {list(bank.shape)}"
        )
    wide = linear_operation.result_dtype(student)
    rows = torch.full((len(student),), 1 / len(student), dtype=wide, device=student.device)
    center = torch.zeros(len(bank), dtype=wide, device=student.device)
    bank = bank.detach()
    return linear_ibot_loss(
        student, bank, teacher, bank, center, rows,
        student_temp=student_temp, teacher_temp=teacher_temp, backend=backend,
    )[0]  # fmt: skip


class DINOLoss(nn.Module):
    """The original's loss module: same arguments, numbers, centre, state dict and temperature schedule.

    Args:
        out_dim: K, the number of prototypes.
        ncrops: V, the student's crops of an image, the two global ones among them.
        warmup_teacher_temp, teacher_temp: the teacher's temperature in epoch 0, and from epoch
            `warmup_teacher_temp_epochs` on; linear in between.
        warmup_teacher_temp_epochs, nepochs: the warm-up's length and the run's. A warm-up longer than the run is
            shortened to it, with a warning; the original raises there.
        student_temp: the student's temperature.
        center_momentum: how much of the centre is kept at an update.

    Attributes:
        center: buffer (1, K), float32: the running mean of the teacher's logits, over all ranks where a process group
            is initialised.
        teacher_entropy, kl: of the last forward, detached float32 scalars in nats: the mean entropy of the targets, and
            what the loss has above it.
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
        if ncrops < TEACHER_CROPS:
            raise ValueError(f"DINOLoss: ncrops counts the two global crops too, so it is 2 or more; got {ncrops}")
        self.out_dim, self.ncrops = out_dim, ncrops
        self.student_temp, self.center_momentum = student_temp, center_momentum
        self.register_buffer("center", torch.zeros(1, out_dim, dtype=torch.float32, device=torch.get_default_device()))
        self.teacher_temp_schedule = teacher_temp_schedule(
            warmup_teacher_temp, teacher_temp, warmup_teacher_temp_epochs, nepochs
        )
        # Compiled code takes the epoch's temperature from a tensor: as a number it would be compiled anew for each.
        self._teacher_temps = torch.tensor(self.teacher_temp_schedule, dtype=torch.float64, device="cpu")
        self.teacher_entropy: Tensor | None = None
        self.kl: Tensor | None = None

    def forward(self, student_output: Tensor, teacher_output: Tensor, epoch: int) -> Tensor:
        """The loss of one batch; then the centre takes in the teacher's logits.

        Args:
            student_output: logits [V * B, K], crop by crop: row v * B + b is crop v of image b.
            teacher_output: logits [2 * B, K] of the global crops, in the same order.
            epoch: counted from 0; beyond the schedule the last temperature holds.
        """
        student = self._by_crop("student_output", student_output, self.ncrops)
        teacher = self._by_crop("teacher_output", teacher_output, TEACHER_CROPS)
        compiling = torch.compiler.is_compiling()
        temp = self._teacher_temps[self._entry(epoch)] if compiling else self.teacher_temp(epoch)
        result = operation.dino_loss(
            student, teacher, self.center[0], student_temp=self.student_temp, teacher_temp=temp
        )
        self.teacher_entropy = result.teacher_entropy.detach()
        self.kl = result.loss.detach() - self.teacher_entropy
        self.update_center(result.teacher_mean)
        return result.loss

    def teacher_temp(self, epoch: int) -> float:
        """The teacher's temperature in an epoch."""
        return self.teacher_temp_schedule[self._entry(epoch)]

    def _entry(self, epoch: int) -> int:
        return min(max(int(epoch), 0), len(self.teacher_temp_schedule) - 1)

    @torch.no_grad()
    def update_center(
        self, teacher_mean: Tensor, prototypes: slice | None = None, *, skip: Tensor | None = None
    ) -> None:
        """Moves the center towards the mean over ranks of `teacher_mean` [K], this process's mean of raw logits.

        With `prototypes` the mean is of these alone, and of all ranks already: nothing is communicated. Where `skip`, a
        boolean scalar on the device, is true the center stays as it is. Raises ValueError for another shape: the
        original's method takes the logits [2B, K] themselves.
        """
        width = self.center[0, prototypes or slice(None)].numel()
        if teacher_mean.shape != (width,):
            raise ValueError(
                f"DINOLoss.update_center takes the mean of the teacher's logits, [{width}]; got "
                f"{list(teacher_mean.shape)}. For logits [2 B, K] give logits.mean(dim=0)"
            )
        mean = teacher_mean.to(self.center.dtype)
        if prototypes is None and dist.is_available() and dist.is_initialized():
            mean = mean.clone()
            dist.all_reduce(mean)
            mean = mean / dist.get_world_size()
        own = self.center[:, prototypes or slice(None)]
        new = own * self.center_momentum + mean[None] * (1 - self.center_momentum)
        own.copy_(new if skip is None else torch.where(skip, own, new))

    def _by_crop(self, name: str, logits: Tensor, crops: int) -> Tensor:
        """[crops * B, K] -> [crops, B, K], a view."""
        if logits.dim() != 2 or logits.shape[1] != self.out_dim:
            raise ValueError(
                f"DINOLoss: {name} must be [{crops} * images, {self.out_dim}] (out_dim={self.out_dim}); "
                f"got {list(logits.shape)}"
            )
        if logits.shape[0] % crops or logits.shape[0] == 0:
            raise ValueError(
                f"DINOLoss: {name} has {logits.shape[0]} rows, which {crops} crops do not divide; "
                f"give one row for each of {crops} crops of every image, or make DINOLoss with the right ncrops"
            )
        return cast(Tensor, logits.unflatten(0, (crops, logits.shape[0] // crops)))

    def extra_repr(self) -> str:
        """Sizes and temperature, for `print(loss)`."""
        return f"out_dim={self.out_dim}, ncrops={self.ncrops}, student_temp={self.student_temp}"


def teacher_temp_schedule(warmup_temp: float, temp: float, warmup_epochs: int, epochs: int) -> list[float]:
    """One temperature an epoch, as `teacher_temp_at`. A warm-up longer than the run is shortened, with a warning."""
    if warmup_epochs > epochs:
        warnings.warn(
            f"the teacher temperature's warm-up of {warmup_epochs} epochs is longer than the run; "
            f"it is shortened to {epochs}",
            stacklevel=3,
        )
    return [teacher_temp_at(epoch, warmup_temp, temp, warmup_epochs, epochs) for epoch in range(epochs)] or [temp]


def teacher_temp_at(epoch: int, warmup_temp: float, temp: float, warmup_epochs: int, epochs: int) -> float:
    """The teacher's temperature in an epoch: linear over the warm-up's epochs, then `temp`.

    The last epoch of the warm-up has the final value. The warm-up is at most as long as the run of `epochs`.
    """
    warmup_epochs = min(warmup_epochs, epochs)
    if epoch >= warmup_epochs:
        return temp
    return warmup_temp + (temp - warmup_temp) * epoch / max(warmup_epochs - 1, 1)
