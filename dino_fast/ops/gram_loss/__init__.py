"""Gram anchoring (DINOv3, arXiv:2508.10104, section 4.2) in feature space: no patches by patches matrix where patches
outnumber features.

With the unit rows X (student) and Y (anchor) [P, D] of an image's patches, the loss compares their similarities:

    loss = |X X' - Y Y'|^2  (Frobenius), a mean over images, divided by P^2 for the mean over pairs of patches.

In E = X - Y and S = X + Y the difference is (E S' + S E') / 2, and its norm needs only matrices of D by D:

    |X X' - Y Y'|^2 = (<E'E, S'S> + tr(M M)) / 2,       M = E'S
    gradient w.r.t. X = E (S'S + M') + S (M + E'E)

Every term is of second order in E. The expansion |X'X|^2 + |Y'Y|^2 - 2 |X'Y|^2 is the same number, but the difference
of large ones: where the student is near its anchor, as it should be, rounding would be all that is left of it.

Floating-point operations an image: 10 P D^2 with the gradient, against 8 P^2 D for autograd on the definition, and no
pass over P^2 elements. With P <= D the product of P by P is the smaller one, and is made directly.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dino_fast.ops import autograd

REFERENCE = "dino_fast.ops.gram_loss.gram_loss_reference"
REDUCTIONS = ("mean", "sum")


def gram_loss(student: Tensor, anchor: Tensor, *, reduction: str = "mean") -> Tensor:
    """Squared difference between the patch similarities of a student and of its Gram anchor.

    Args:
        student: [B, P, D] patch features of B images, float32, bfloat16, float16 or float64; normalized here.
        anchor: [B, P, D], the same patches seen by the Gram teacher. Not differentiated.
        reduction: over an image's P^2 pairs of patches: "mean" (as published training does), or "sum", the squared
            Frobenius norm of the paper. Either way the mean over images.

    Returns:
        A scalar, float32 (float64 for a float64 student), differentiable once w.r.t. `student`.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit, said in the message.
    """
    validate_inputs(student, anchor, reduction)
    with torch.autocast(student.device.type, enabled=False):
        x, y = _unit_rows(student), _unit_rows(anchor.detach())
        autograd.refuse_transforms("gram_loss", REFERENCE, x)
        patches = student.shape[1]
        per_image: Tensor = _SquaredDifference.apply(x, y)
        return per_image.mean() / (patches * patches if reduction == "mean" else 1)


def gram_loss_reference(student: Tensor, anchor: Tensor, *, reduction: str = "mean") -> Tensor:
    """The definition in plain PyTorch, with the P by P similarities; arguments and result of `gram_loss`."""
    validate_inputs(student, anchor, reduction)
    with torch.autocast(student.device.type, enabled=False):
        x, y = _unit_rows(student), _unit_rows(anchor.detach())
        squares = (x @ x.mT - y @ y.mT).square()  # [B, P, P]
        return squares.mean() if reduction == "mean" else squares.sum() / len(squares)


def validate_inputs(student: Tensor, anchor: Tensor, reduction: str) -> None:
    """Raises ValueError for inputs that do not fit, with what was given and what is accepted."""
    if student.dim() != 3 or student.shape != anchor.shape or 0 in student.shape:
        raise ValueError(
            "gram_loss: student and anchor are [images, patches, features] of the same sizes, none of them 0; got "
            f"{list(student.shape)} and {list(anchor.shape)}. Resize the anchor's patch grid to the student's first"
        )
    for name, tensor in (("student", student), ("anchor", anchor)):
        if not tensor.is_floating_point():
            raise ValueError(f"gram_loss: the {name} must be of a floating-point dtype; got {tensor.dtype}")
    if student.device != anchor.device:
        raise ValueError(f"gram_loss: the student is on {student.device} but the anchor on {anchor.device}; move one")
    if reduction not in REDUCTIONS:
        raise ValueError(f"gram_loss: reduction is one of {', '.join(REDUCTIONS)}; got {reduction!r}")


def _unit_rows(x: Tensor) -> Tensor:
    return F.normalize(x.to(torch.float64 if x.dtype == torch.float64 else torch.float32), dim=-1)


class _SquaredDifference(torch.autograd.Function):
    """[B, P, D] twice -> [B]: |X X' - Y Y'|^2 of each image; the gradient is made in the forward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor) -> Tensor:
        y = y.to(x.dtype)
        wanted = ctx.needs_input_grad[0]
        e, s = x - y, x + y
        gradient = None
        if x.shape[1] > x.shape[2]:
            ee, ss, m = e.mT @ e, s.mT @ s, e.mT @ s  # [B, D, D]
            loss = ((ee * ss).sum((1, 2)) + (m * m.mT).sum((1, 2))) / 2
            if wanted:
                gradient = torch.baddbmm(e @ (ss + m.mT), s, m + ee)
        else:
            half = e @ s.mT  # [B, P, P]
            difference = (half + half.mT).div_(2)
            loss = difference.square().sum((1, 2))
            if wanted:
                gradient = (difference @ x).mul_(4)
        ctx.save_for_backward(x, gradient)
        return loss

    @staticmethod
    @autograd.once_differentiable("gram_loss", REFERENCE)
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return ctx.saved_tensors[1] * upstream[:, None, None], None
