"""Batches of tensors for the calls of multi_tensor: an optimizer's rows, what gradients are multiplied by, shards."""

from __future__ import annotations

import functools
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from dino_fast.dtensor import to_local
from dino_fast.ops.autograd import PLAIN_TYPES, increment_versions, is_plain
from dino_fast.ops.multi_tensor import run_adamw_ema, run_grad_norms


@dataclass
class ParamBatch:
    """Arguments of one call of adamw_ema or ema_update; entry i of each list belongs to the i-th parameter."""

    device: torch.device
    beta1: float
    beta2: float
    eps: float
    momentum_group: int  # the group whose momentum is that of these teachers
    index: list[int] = field(default_factory=list)  # of the parameter, among all
    group: list[int] = field(default_factory=list)  # of its group
    states: list[dict[str, Any]] = field(default_factory=list)
    params: list[Tensor] = field(default_factory=list)
    grads: list[Any] = field(default_factory=list)
    exp_avgs: list[Tensor] = field(default_factory=list)
    exp_avg_sqs: list[Tensor] = field(default_factory=list)
    steps: list[Tensor] = field(default_factory=list)
    teachers: list[Tensor] = field(default_factory=list)
    param_copies: list[Tensor | None] = field(default_factory=list)
    teacher_copies: list[Tensor | None] = field(default_factory=list)
    lrs: list[float] = field(default_factory=list)
    weight_decays: list[float] = field(default_factory=list)

    def add(self, param: Tensor, copy: Tensor | None) -> None:
        self.params.append(param)
        self.param_copies.append(copy)

    def add_state(self, index: int, group: int, state: dict[str, Any]) -> None:
        self.index.append(index)
        self.group.append(group)
        self.states.append(state)
        self.exp_avgs.append(state["exp_avg"])
        self.exp_avg_sqs.append(state["exp_avg_sq"])
        self.steps.append(state["step"])

    def add_teacher(self, teacher: Tensor, copy: Tensor | None) -> None:
        self.teachers.append(teacher)
        self.teacher_copies.append(copy)

    def step(self, multipliers: Tensor | None, found_inf: Tensor | None, momentum: float) -> None:
        lists = (self.params, self.grads, self.exp_avgs, self.exp_avg_sqs, self.teachers)
        params, grads, m1, m2, teachers = map(_locals, lists)
        copies, teacher_copies = self._copies(self.param_copies), self._copies(self.teacher_copies)
        function = run_adamw_ema if is_plain(*params, *grads, *teachers) else torch.ops.dino_fast.adamw_ema
        function(
            params, grads, m1, m2, self.steps, teachers, copies, teacher_copies, multipliers, found_inf,
            self.lrs, self.weight_decays, self.beta1, self.beta2, self.eps, momentum,
        )  # fmt: skip
        if function is run_adamw_ema:
            increment_versions([*params, *teachers, *copies, *teacher_copies])

    def update_teachers(self, momentum: float, found_inf: Tensor | None = None) -> None:
        """The EMA of parameters that do not move."""
        teachers, students = _locals(self.teachers), _locals(self.params)
        copies = self._copies(self.teacher_copies)
        torch.ops.dino_fast.ema_update(teachers, students, momentum, copies, found_inf=found_inf)

    def _copies(self, copies: list[Tensor | None]) -> list[Tensor]:
        """As the operations want them: none at all, or one each, without elements where there is no copy."""
        if all(c is None for c in copies):
            return []
        none = torch.empty(0, dtype=torch.bfloat16, device=self.device)
        return [none if c is None else to_local(c) for c in copies]


@dataclass
class BatchCache:
    """The last step's batches, and what they were made from."""

    settings: list[Any]
    tensors: list[Tensor]
    with_grad: list[ParamBatch]
    without_grad: list[ParamBatch]

    def state_is_current(self) -> bool:
        """Whether the state still holds the tensors of the batches: a caller may have put others there."""
        return all(
            s.get("exp_avg") is m1 and s.get("exp_avg_sq") is m2 and s.get("step") is k
            for batch in self.with_grad
            for s, m1, m2, k in zip(batch.states, batch.exp_avgs, batch.exp_avg_sqs, batch.steps, strict=True)
        )


# ---- clipping ----


def grad_multipliers(
    batches: list[list[Tensor]], grad_scale: Tensor | None, clip_grad: float, clip_mode: str
) -> tuple[list[Tensor | None], list[Tensor]]:
    """For each batch what its gradients are multiplied by, [n]: clip coefficient over gradient scale; and where
    anything is clipped the norms, [n], of the gradients without their scale."""
    inverse = [None if grad_scale is None else grad_scale.to(b[0].device).double().reciprocal() for b in batches]
    if clip_grad == 0.0:
        return [
            None if scale is None else scale.float().reshape(1).expand(len(batch))
            for batch, scale in zip(batches, inverse, strict=True)
        ], []
    norms = [_norms(batch) for batch in batches]
    norms = [n if scale is None else n * scale for n, scale in zip(norms, inverse, strict=True)]
    unclipped = norms
    if clip_mode == "global" and norms:
        home = norms[0].device
        total = torch.linalg.vector_norm(torch.cat([n.to(home) for n in norms]))
        norms = [total.to(n.device).expand_as(n) for n in norms]
    multipliers: list[Tensor | None] = []
    for norm, scale in zip(norms, inverse, strict=True):
        coefficient = clip_grad / (norm + 1e-6)
        # The original multiplies only where the coefficient is below 1, so a NaN norm leaves that parameter's other
        # gradients alone; clip_grad_norm_ takes the minimum of it and 1, which a NaN goes through.
        if clip_mode == "parameter":
            coefficient = torch.where(coefficient < 1.0, coefficient, 1.0)
        else:
            coefficient = coefficient.clamp(max=1.0)
        multipliers.append(coefficient.float() if scale is None else (coefficient * scale).float())
    return multipliers, unclipped


def _norms(grads: list[Tensor]) -> Tensor:
    """The 2-norm of each whole gradient, [n]; shards' sums of squares are added over the mesh, as one vector."""
    shards = _locals(grads)
    norms = run_grad_norms(shards) if is_plain(*shards) else torch.ops.dino_fast.grad_norms(shards)
    sharded: dict[Any, list[int]] = {}
    for i, g in enumerate(grads):
        for dim, placement in enumerate(getattr(g, "placements", ())):
            if placement.is_shard():
                sharded.setdefault((g.device_mesh, dim), []).append(i)  # type: ignore[attr-defined]
    if not sharded:
        return norms
    squares = norms.double() ** 2
    for (mesh, dim), rows in sharded.items():
        index = _index(tuple(rows), squares.device)
        part = squares[index]
        torch.distributed.all_reduce(part, group=mesh.get_group(dim))
        squares[index] = part
    return squares.sqrt()


@functools.lru_cache(maxsize=64)
def _index(rows: tuple[int, ...], device: torch.device) -> Tensor:
    """Made once: the host would wait for the copy to a GPU at every step."""
    return torch.tensor(rows, dtype=torch.int64, device=device)


# ---- shards ----


def _locals(tensors: list[Tensor]) -> list[Tensor]:
    return tensors if PLAIN_TYPES.issuperset(map(type, tensors)) else [to_local(t) for t in tensors]
