"""`linear_dino_loss` with the prototypes cut over processes: each holds some rows of both last layers.

Every process needs the rows z of all images, which are gathered; its prototypes give it, for each row, a maximum m_r, a
sum l_r relative to it, a read E_r (see `linear_dino_loss`) and pair products d_r. With M the largest m_r, and the share
a_r = l_r e^((m_r - M) / temp) of the sum L = sum_r a_r,

    E = sum_r a_r / L E_r,      d(u, v) = sum_r a_r(u) / L(u) (d_r(u, v) + (m_r(v) - M(v)) / tau)

so two small reductions make the loss, a third sums the gradient w.r.t. z into the process that owns the image, and
the gradient w.r.t. a process's own prototypes, of all images, needs none: it is made from M and L as in one process.

Bytes that a process sends, of P, for B images of it: (P - 1)(V + T) B D e to gather rows and (P - 1) V B D 4 for their
gradient. Cutting the prototypes for storage alone, and gathering both layers, takes (P - 1)/P 12 K D.
"""

from __future__ import annotations

from typing import Any, NamedTuple, cast

import torch
import torch.distributed as dist
from torch import Tensor

from dino_fast.backends import choose
from dino_fast.ops import autograd
from dino_fast.ops import linear_dino_loss as whole

# torch 2.14 renamed both collectives: there the old names warn, before it the new ones are missing.
_all_gather: Any = getattr(dist, "all_gather_single", None) or getattr(dist, "all_gather_into_tensor", None)
_reduce_scatter: Any = getattr(dist, "reduce_scatter_single", None) or getattr(dist, "reduce_scatter_tensor", None)

# Float32 logits of the teacher that are made at a time for the entropy.
BUFFER = 1 << 24


class ShardedLoss(NamedTuple):
    """The results of `linear_dino_loss_ranks`."""

    loss: Tensor  # float32 scalar, of all images, the same in every process
    teacher_entropy: Tensor  # float32 scalar, detached: mean entropy of all images' targets, in nats


def linear_dino_loss_ranks(
    student: Tensor,
    student_weight: Tensor,
    teacher: Tensor,
    teacher_weight: Tensor,
    center: Tensor,
    *,
    student_temp: float,
    teacher_temp: float,
    student_gain: Tensor | None = None,
    teacher_gain: Tensor | None = None,
    group: Any = None,
    backend: str = "auto",
) -> ShardedLoss:
    """The DINO loss of all processes' images, each process with its own prototypes.

    Args:
        student: [V, B, D], this process's rows, the two global crops first; teacher: [2, B, D]. B is the same in all.
        student_weight, teacher_weight: [K_r, D], this process's prototypes; K_r may differ, and be 0.
        student_gain, teacher_gain, center: [K_r], of the same prototypes; see `linear_dino_loss`.
        student_temp, teacher_temp: positive divisors of the logits before the softmax.
        group: the processes; by default all.
        backend: "auto" or a name that `dino-fast info` lists for linear_dino_loss.

    Differentiable w.r.t. `student` (the gradient of all images' loss), `student_weight` and `student_gain` (complete:
    nothing is left to reduce). The upstream gradient must be the same in all processes.

    Raises:
        ValueError: temperatures, shapes, dtypes or devices that do not fit.
        BackendError: an explicitly chosen backend cannot run these inputs.
    """
    V, T = len(student), len(teacher)
    pairs = torch.ones(T, V, dtype=torch.float32, device=student.device).fill_diagonal_(0.0)
    fixed = (teacher, teacher_weight, teacher_gain, center, pairs / pairs.sum())
    temps = float(student_temp), float(teacher_temp)
    autograd.refuse_transforms("linear_dino_loss_ranks", whole.REFERENCE, student, student_weight, student_gain)
    loss, entropy = _Loss.apply(student, student_weight, student_gain, *fixed, *temps, group, backend)
    return ShardedLoss(loss, entropy)


class _Loss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        student: Tensor,
        student_weight: Tensor,
        student_gain: Tensor | None,
        teacher: Tensor,
        teacher_weight: Tensor,
        teacher_gain: Tensor | None,
        center: Tensor,
        pair_weights: Tensor,
        student_temp: float,
        teacher_temp: float,
        group: Any,
        backend: str,
    ) -> tuple[Tensor, Tensor]:
        T, B = len(teacher), student.shape[1]
        rows, targets = gathered_images(student.detach(), group), gathered_images(teacher.detach(), group)
        layers = (student_weight.detach(), None if student_gain is None else student_gain.detach())
        others: tuple[Tensor, Tensor | None, Tensor] = (
            teacher_weight.detach(),
            None if teacher_gain is None else teacher_gain.detach(),
            center.detach(),
        )
        images = rows.shape[1]
        temps = torch.full((T + len(rows), 1), student_temp, dtype=torch.float64, device=student.device)
        temps[:T] = teacher_temp
        with torch.autocast(student.device.type, enabled=False):
            statistics, pairs, reads = _own(rows, *layers, targets, others, student_temp, teacher_temp, backend)
            maxima = statistics[0].double()
            top = maxima.clone()
            dist.all_reduce(top, dist.ReduceOp.MAX, group=group)
            shares = statistics[1].double() * ((maxima - top) / temps).exp()  # [T + V, B], a_r
            moved = pairs.double() + (maxima[T:] - top[T:])[None] / student_temp
            summed = _entropy_sums(targets, *others, top[:T], teacher_temp)  # [2, T, B]
            own_pairs = torch.where(shares[:T, None] == 0, 0.0, shares[:T, None] * moved)
            everything = torch.cat([x.flatten() for x in (shares, own_pairs, summed)])
            dist.all_reduce(everything, group=group)
            total, pairs, summed = (
                x.view(y.shape)
                for x, y in zip(
                    everything.split([shares.numel(), own_pairs.numel(), summed.numel()]),
                    (shares, own_pairs, summed),
                    strict=True,
                )
            )
            merged = torch.stack([top, total]).to(statistics.dtype)
            row_weights = torch.full((images,), 1.0 / images, dtype=torch.float64, device=student.device)
            loss = whole.loss_from_rows(pair_weights, row_weights, merged, pairs / total[:T, None])
            entropy = (summed[0].log() - summed[1] / summed[0]).mean().to(loss.dtype)
            A = pair_weights.double()
            E = reads.double() * (shares / total)[..., None]  # [T + V, B, D], this process's part
            gradient = A.sum(0)[:, None, None] * E[T:] - torch.einsum("uv,ubd->vbd", A, E[:T])
            gradient = own_images((gradient / (student_temp * images)).to(statistics.dtype), B, group)
        ctx.mark_non_differentiable(entropy)
        ctx.anchors = [autograd.anchor(x) for x in (student, student_weight, student_gain) if x is not None]
        ctx.temps, ctx.backend = (student_temp, teacher_temp), backend
        others = (*others[:2], others[2].clone())  # the centre is updated in place before the backward
        saved = (rows, *layers, targets, *others, pair_weights, row_weights, merged, gradient)
        ctx.save_for_backward(*(None if x is None else autograd.savable(x) for x in saved))
        ctx.dtype = student.dtype
        return loss, entropy

    @staticmethod
    @autograd.once_differentiable("linear_dino_loss_ranks", whole.REFERENCE)
    def backward(ctx: Any, upstream: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        *tensors, gradient = ctx.saved_tensors
        grad_rows = (gradient * upstream).to(ctx.dtype) if ctx.needs_input_grad[0] else None
        grad_weight = grad_gain = None
        if ctx.needs_input_grad[1] or ctx.needs_input_grad[2]:
            weight, gain = tensors[1], tensors[2]
            if len(weight):
                grad_weight, grad_gain = torch.ops.dino_fast.linear_dino_loss_weight_gradient(
                    *tensors, upstream, *ctx.temps, ctx.backend
                )
            else:
                grad_weight, grad_gain = torch.empty_like(weight), None if gain is None else torch.empty_like(gain)
        return (
            grad_rows,
            grad_weight if ctx.needs_input_grad[1] else None,
            grad_gain if ctx.needs_input_grad[2] else None,
            *[None] * 9,
        )


def _own(
    rows: Tensor,
    weight: Tensor,
    gain: Tensor | None,
    targets: Tensor,
    others: tuple[Tensor, Tensor | None, Tensor],
    student_temp: float,
    teacher_temp: float,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Statistics [2, T + V, B], products [T, V, B] and reads [T + V, B, D] over this process's prototypes."""
    teacher_weight, teacher_gain, center = others
    T, V, images, D = len(targets), len(rows), rows.shape[1], rows.shape[2]
    if len(weight) == 0:  # more processes than prototypes
        wide = whole.result_dtype(rows)
        statistics = torch.zeros(2, T + V, images, dtype=wide, device=rows.device)
        statistics[0] = torch.finfo(wide).min
        return statistics, statistics.new_zeros(T, V, images), statistics.new_zeros(T + V, images, D)
    chosen = choose("linear_dino_loss", rows, weight, targets, teacher_weight, backend=backend)
    statistics, pairs, reads, _ = whole.FORWARD[chosen](
        rows, weight, gain, targets, teacher_weight, teacher_gain, center, None, student_temp, teacher_temp, True
    )
    assert reads is not None
    return statistics, pairs, reads


def _entropy_sums(
    targets: Tensor, weight: Tensor, gain: Tensor | None, center: Tensor, top: Tensor, temp: float
) -> Tensor:
    """Sums of e^y and of e^y y over this process's prototypes, y = (logit - top) / temp, float64 [2, T, B].

    The entropy is log L - S / L of the two; both are of the same logits, so that errors of these cancel.
    """
    z, highest = targets.float().flatten(0, 1), top.flatten()[:, None]
    total = torch.zeros(2, len(z), dtype=torch.float64, device=z.device)
    step = max(1, BUFFER // max(1, len(z)))
    for first in range(0, len(weight), step):
        part = slice(first, first + step)
        matrix = whole.effective_weight(weight[part], None if gain is None else gain[part], torch.float32)
        y = (z @ matrix.T - center[part].float() - highest.float()) / temp
        e = y.exp()
        total[0] += e.sum(1, dtype=torch.float64)
        total[1] += torch.where(e == 0, 0.0, e * y).sum(1, dtype=torch.float64)
    return cast(Tensor, total.unflatten(1, targets.shape[:2]))


def gathered_images(rows: Tensor, group: Any) -> Tensor:
    """[V, B, D] of every process -> [V, P B, D], process by process."""
    first = rows.transpose(0, 1).contiguous()  # images outermost
    everyone = first.new_empty(dist.get_world_size(group) * len(first), *first.shape[1:])
    _all_gather(everyone, first, group=group)
    return everyone.transpose(0, 1).contiguous()


def own_images(parts: Tensor, count: int, group: Any) -> Tensor:
    """[V, P B, D], summed over the processes, of which each gets its own images [V, B, D]."""
    first = parts.transpose(0, 1).contiguous()
    own = first.new_empty(count, *first.shape[1:])
    _reduce_scatter(own, first, group=group)
    return own.transpose(0, 1).contiguous()
