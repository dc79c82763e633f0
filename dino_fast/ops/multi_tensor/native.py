"""The native backend of multi_tensor: csrc/cpu/multi_tensor.cpp over tables of addresses."""

from __future__ import annotations

import math
from array import array
from collections.abc import Sequence

import torch
from torch import Tensor

from dino_fast.ops.multi_tensor.memory import DTYPE_CODES, flat_memory, write_back


def unsupported_reason(*tensors: Tensor) -> str | None:
    """Why the kernels cannot take these tensors, or None."""
    for t in tensors:
        if not t.is_cpu:
            return f"the C++ kernels run on CPU tensors; one is on {t.device}"
        if t.dtype not in DTYPE_CODES:
            return f"the C++ kernels take float32, bfloat16 and float16; one tensor is {t.dtype}"
    return None


def ema_update(
    teacher: Sequence[Tensor],
    student: Sequence[Tensor],
    momentum: float,
    copies: Sequence[Tensor],
    found_inf: Tensor | None,
) -> None:
    """The operation `ema_update` on CPU tensors."""
    from dino_fast import _C

    if found_inf is not None and found_inf.item() == math.inf:
        return
    n = len(teacher)
    (t, p, c), written = flat_memory((teacher, student, copies), mutated=(True, False, True))
    table = array("q", [x.numel() for x in t] + _addresses(t, n) + _addresses(p, n) + _addresses(c, n))
    table.extend([DTYPE_CODES[x.dtype] for x in t] + [DTYPE_CODES[x.dtype] for x in p])
    _C.multi_tensor_ema_update(n, table, momentum, torch.get_num_threads())
    write_back(written)


def grad_norms(grads: Sequence[Tensor]) -> Tensor:
    """The operation `grad_norms` on CPU tensors: float32 [n]."""
    from dino_fast import _C

    n = len(grads)
    norms = torch.empty(n, dtype=torch.float32, device="cpu")
    ((g,), _) = flat_memory((grads,), mutated=(False,))
    table = array("q", [x.numel() for x in g] + _addresses(g, n) + [DTYPE_CODES[x.dtype] for x in g])
    _C.multi_tensor_grad_norms(n, table, norms.data_ptr(), torch.get_num_threads())
    return norms


def adamw_ema(
    params: Sequence[Tensor], grads: Sequence[Tensor], exp_avgs: Sequence[Tensor], exp_avg_sqs: Sequence[Tensor],
    steps: Sequence[Tensor], teachers: Sequence[Tensor], param_copies: Sequence[Tensor],
    teacher_copies: Sequence[Tensor], multipliers: Tensor | None, found_inf: Tensor | None, lrs: Sequence[float],
    weight_decays: Sequence[float], beta1: float, beta2: float, eps: float, momentum: float,
) -> None:  # fmt: skip
    """The operation `adamw_ema` on CPU tensors."""
    from dino_fast import _C

    n, overflow = len(params), 0.0 if found_inf is None else found_inf.item()
    if overflow == math.inf:
        return
    lists = (params, grads, exp_avgs, exp_avg_sqs, teachers, param_copies, teacher_copies)
    columns, written = flat_memory(lists, mutated=(True, False, True, True, True, True, True))
    table = array("q", [x.numel() for x in params])
    for column in (*columns, steps):
        table.extend(_addresses(column, n))
    table.extend([DTYPE_CODES[x.dtype] for x in grads])
    if multipliers is not None:
        multipliers = multipliers.float().contiguous()
    _C.multi_tensor_adamw_ema(
        n, table, array("d", [*lrs, *weight_decays]), 0 if multipliers is None else multipliers.data_ptr(),
        beta1, beta2, eps, momentum, overflow > 0, torch.get_num_threads(),
    )  # fmt: skip
    write_back(written)


def _addresses(tensors: Sequence[Tensor], n: int) -> list[int]:
    """Zero where there is no tensor, or none with elements."""
    return [t.data_ptr() for t in tensors] if tensors else [0] * n
