"""The head's last layer and the loss, forward and backward: loss, mean teacher logits, gradients by rows and weight.

The layer is weight-normed with a gain of 1, as the original's is. The floor is the matrix products of the layer alone,
6 operations a student row and 2 a teacher row for each of K D weights: what storing the logits takes. Not storing them
takes 8 and 6 (see dino_fast/ops/linear_dino_loss), so this floor cannot be reached by a loss without logits.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from dino_fast.loss import linear_dino_loss, linear_ibot_loss
from dino_fast.ops.linear_dino_loss import linear_dino_loss_reference

from .harness import Comparison, Contender, Row, run_all

T, D = 2, 256
TEMPS = {"student_temp": 0.1, "teacher_temp": 0.04}
# (V, B, K), dtype: 2+8 crops, the head of the published runs; on a GPU also the widest head.
CPU = (((10, 64, 65536), torch.float32),)
CUDA = (((10, 64, 65536), torch.bfloat16), ((10, 64, 262144), torch.bfloat16), ((10, 64, 65536), torch.float32))
QUICK = (((10, 4, 8192), torch.float32),)

Loss = Callable[..., tuple[Tensor, Tensor]]


class Problem:
    """Rows of length 1, prototypes, centre; `student` and `student_weight` want gradients."""

    def __init__(self, V: int, B: int, K: int, dtype: torch.dtype, device: str) -> None:
        generator = torch.Generator().manual_seed(0)

        def drawn(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator)

        def on_device(tensor: Tensor) -> Tensor:
            return tensor.to(device, dtype)

        self.V, self.B = V, B
        self.student = on_device(torch.nn.functional.normalize(drawn(V, B, D), dim=-1)).requires_grad_()
        self.teacher = on_device(torch.nn.functional.normalize(drawn(T, B, D), dim=-1))
        weight = drawn(K, D)
        self.student_weight = on_device(weight).requires_grad_()
        self.teacher_weight = on_device(weight + 0.1 * drawn(K, D))
        self.gain, self.center = torch.ones(K, device=device), (0.05 * drawn(K)).to(device)

    def call(self, loss: Loss) -> list[Tensor]:
        """The loss, the mean of the teacher's logits, and the gradients w.r.t. the rows and the weight."""
        tensors = (self.student, self.student_weight, self.teacher, self.teacher_weight, self.center, self.gain)
        value, mean = loss(*tensors)
        return [value.detach(), mean, *torch.autograd.grad(value, (self.student, self.student_weight))]

    def exact(self) -> list[Tensor]:
        """float64, eight images at a time: all of them together would need gigabytes."""
        wide = [x.detach().double() for x in (self.student, self.student_weight, self.teacher, self.teacher_weight)]
        student, weight, teacher, teacher_weight = wide
        student.requires_grad_()
        weight.requires_grad_()
        pairs = torch.ones(T, self.V, dtype=torch.float64, device=student.device).fill_diagonal_(0.0)
        gains = {"student_gain": self.gain, "teacher_gain": self.gain}
        loss, mean = weight.new_zeros(()), weight.new_zeros(len(weight))
        row = 1 / (self.B * pairs.sum().item())
        for first in range(0, self.B, 8):
            some = slice(first, first + 8)
            tensors = (student[:, some], weight, teacher[:, some], teacher_weight, self.center, pairs)
            n = tensors[0].shape[1]
            part, logits = linear_dino_loss_reference(*tensors, weight.new_full((n,), row), **gains, **TEMPS)
            part.backward()
            loss, mean = loss + part.detach(), mean + logits * (n / self.B)
        return [loss, mean, student.grad, weight.grad]


def ours(
    student: Tensor, student_weight: Tensor, teacher: Tensor, teacher_weight: Tensor, center: Tensor, gain: Tensor
) -> tuple[Tensor, Tensor]:
    tensors = (student, student_weight, teacher, teacher_weight, center)
    return linear_dino_loss(*tensors, student_gain=gain, teacher_gain=gain, **TEMPS)


def logits(rows: Tensor, weight: Tensor, gain: Tensor) -> Tensor:
    """[n * B, K], in the rows' dtype, through torch's weight norm."""
    return rows.flatten(0, 1) @ torch._weight_norm(weight, gain[:, None].to(weight.dtype), 0).T


def eager(
    student: Tensor, student_weight: Tensor, teacher: Tensor, teacher_weight: Tensor, center: Tensor, gain: Tensor
) -> tuple[Tensor, Tensor]:
    """The original's loop over pairs; softmax in float32, as autocast has it."""
    predictions = (logits(student, student_weight, gain) / TEMPS["student_temp"]).chunk(len(student))
    with torch.no_grad():
        raw = logits(teacher, teacher_weight, gain)
        targets = torch.softmax(((raw - center) / TEMPS["teacher_temp"]).float(), dim=-1).chunk(T)
    total, pairs = center.new_zeros(()), 0
    for u, q in enumerate(targets):
        for v, x in enumerate(predictions):
            if u != v:
                total = total + torch.sum(-q * torch.log_softmax(x.float(), dim=-1), dim=-1).mean()
                pairs += 1
    return total / pairs, raw.float().mean(0)


def einsum(
    student: Tensor, student_weight: Tensor, teacher: Tensor, teacher_weight: Tensor, center: Tensor, gain: Tensor
) -> tuple[Tensor, Tensor]:
    """The form of later codes: one softmax each, all pairs by one product, the diagonal left out."""
    V, B, _ = student.shape
    x = logits(student, student_weight, gain).unflatten(0, (V, B)).float()
    with torch.no_grad():
        raw = logits(teacher, teacher_weight, gain).unflatten(0, (T, B)).float()
        targets = torch.softmax((raw - center) / TEMPS["teacher_temp"], dim=-1)
    pairs = -torch.einsum("ubk,vbk->uv", targets, torch.log_softmax(x / TEMPS["student_temp"], dim=-1))
    pairs = torch.diagonal_scatter(pairs, pairs.new_zeros(T))
    return pairs.sum() / (B * (T * V - T)), raw.mean((0, 1))


def comparisons(quick: bool = False) -> Iterator[Comparison]:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    for (V, B, K), dtype in QUICK if quick else CUDA if device == "cuda" else CPU:
        yield comparison(V, B, K, dtype, device)


def comparison(
    V: int, B: int, K: int, dtype: torch.dtype, device: str, compiler: Callable = torch.compile
) -> Comparison:
    problem = Problem(V, B, K, dtype, device)

    def contender(name: str, loss: Loss, **options: bool) -> Contender:
        return Contender(name, functools.partial(problem.call, loss), **options)

    return Comparison(
        operation="linear_dino_loss",
        shape=f"B{B} V{V} K{K} D{D}",
        dtype=str(dtype).removeprefix("torch."),
        device=device,
        reference=problem.exact,
        floor_flops=(6 * V + 2 * T) * B * K * D,
        output_bytes=problem.student.nbytes + problem.student_weight.nbytes,  # the gradients
        contenders=[
            contender("dino-fast", ours, ours=True),
            contender("original, eager", eager, baseline=True),
            contender("einsum, eager", einsum),
            contender("original, torch.compile", compiler(eager)),
            contender("einsum, torch.compile", compiler(einsum)),
        ],
        seconds=30.0,
    )


def ibot_comparison(
    rows: int, K: int, dtype: torch.dtype, device: str, compiler: Callable = torch.compile
) -> Comparison:
    """iBOT's patch loss: one target row a student row, a weight for each. Eager is the form of DINOv2's code."""
    problem = Problem(1, rows, K, dtype, device)
    row_weights = torch.rand(rows, generator=torch.Generator().manual_seed(1)).to(device) / rows
    student, teacher = problem.student, problem.teacher[0]
    weights = problem.student_weight, problem.teacher_weight

    def called(loss: Callable[[], tuple[Tensor, Tensor]]) -> Callable[[], list[Tensor]]:
        def call() -> list[Tensor]:
            value, mean = loss()
            return [value.detach(), mean, *torch.autograd.grad(value, (student, weights[0]))]

        return call

    def ours_of_rows() -> tuple[Tensor, Tensor]:
        gains = {"student_gain": problem.gain, "teacher_gain": problem.gain}
        tensors = (student[0], weights[0], teacher, weights[1], problem.center, row_weights)
        return linear_ibot_loss(*tensors, **gains, **TEMPS)

    def eager_of_rows(s: Tensor, w: Tensor, t: Tensor, wt: Tensor, center: Tensor) -> tuple[Tensor, Tensor]:
        predictions = logits(s[None], w, problem.gain).float() / TEMPS["student_temp"]
        with torch.no_grad():
            raw = logits(t[None], wt, problem.gain).float()
            targets = torch.softmax((raw - center) / TEMPS["teacher_temp"], dim=-1)
        losses = torch.sum(targets * torch.log_softmax(predictions, dim=-1), dim=-1)
        return -(losses * row_weights).sum(), raw.mean(0)

    def exact() -> list[Tensor]:
        """float64, some rows at a time."""
        wide = [x.detach().double() for x in (student, weights[0], teacher[None], weights[1])]
        wide[0].requires_grad_()
        wide[1].requires_grad_()
        gains = {"student_gain": problem.gain, "teacher_gain": problem.gain}
        loss, mean, pairs = wide[1].new_zeros(()), wide[1].new_zeros(K), wide[1].new_ones(1, 1)
        for first in range(0, rows, 256):
            some = slice(first, first + 256)
            tensors = (wide[0][:, some], wide[1], wide[2][:, some], wide[3], problem.center, pairs, row_weights[some])
            part, some_logits = linear_dino_loss_reference(*tensors, **gains, **TEMPS)
            part.backward()
            loss, mean = loss + part.detach(), mean + some_logits * (len(row_weights[some]) / rows)
        return [loss, mean, wide[0].grad, wide[1].grad]

    def contender(name: str, loss: Callable, **options: bool) -> Contender:
        arguments = (student[0], weights[0], teacher, weights[1], problem.center)
        return Contender(name, called(functools.partial(loss, *arguments)), **options)

    return Comparison(
        operation="linear_ibot_loss",
        shape=f"N{rows} K{K} D{D}",
        dtype=str(dtype).removeprefix("torch."),
        device=device,
        reference=exact,
        floor_flops=8 * rows * K * D,
        output_bytes=student.nbytes + weights[0].nbytes,
        contenders=[
            Contender("dino-fast", called(ours_of_rows), ours=True),
            contender("eager", eager_of_rows, baseline=True),
            contender("torch.compile", compiler(eager_of_rows)),
        ],
    )


def run(quick: bool = False) -> list[Row]:
    return run_all(comparisons(quick), quick=quick)


def test_speed(benchmark, contender: Contender) -> None:
    benchmark(contender)
