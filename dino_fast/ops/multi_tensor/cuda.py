"""Host side of the CUDA kernels of multi_tensor: tables of addresses in device memory, written only when they change.

A plan is the device memory for one list of tensors (csrc/cuda/multi_tensor.h): their addresses, which chunk of 8192
elements belongs to which tensor, the gradients' addresses and the hyper-parameters. A steady step launches two kernels
over it, and one that carries new hyper-parameters in its arguments; nothing is copied from host memory, nothing waits.

CUDA graphs: plans must exist before a capture (run one step first). A captured step reads its hyper-parameters from the
plan; `writing_hyper_only` turns the same call, outside the graph, into the upload of new ones for the next replay.
"""

from __future__ import annotations

from array import array
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from dino_fast.gpu import on_device, too_old
from dino_fast.ops.multi_tensor.memory import DTYPE_CODES, flat_memory, write_back

# Plans kept of lists that have not been captured. An optimizer needs one for its norms, one for its step and one for
# teachers of parameters at rest, for each device and setting of AdamW.
KEPT = 32


def unsupported_reason(*tensors: Tensor) -> str | None:
    """Why the kernels cannot take these tensors, or None."""
    for t in tensors:
        if not t.is_cuda:
            return f"the CUDA kernels run on CUDA tensors; one is on {t.device}"
        if t.dtype not in DTYPE_CODES:
            return f"the CUDA kernels take float32, bfloat16 and float16; one tensor is {t.dtype}"
    return too_old(tensors[0].device) if tensors else None


@dataclass
class Plan:
    memory: Tensor  # uint8, zeroed
    tensors: int
    chunks: int
    hyper_at: int
    gradients_at: int
    hyper: bytes = b""  # what the device has, or will have when it gets there
    gradients: bytes = b""
    captured: bool = False  # a graph holds its address: never dropped

    def write_hyper(self, scalars: Sequence[float], stream: int) -> None:
        data = array("d", scalars).tobytes()
        # A replay must see what is written between replays, so a capture records no write of them.
        if data != self.hyper and not _capturing(self.memory):
            _kernels().cuda_upload(self.memory.data_ptr() + self.hyper_at, data, stream)
            self.hyper = data

    def write_gradients(self, grads: Sequence[Tensor], stream: int) -> None:
        data = array("Q", chain.from_iterable((_address(g), DTYPE_CODES[g.dtype]) for g in grads)).tobytes()
        # A capture records the write, since its gradients have addresses of their own and steps outside may change the
        # table; and a replay changes it unseen, so from then on every step writes it.
        if data != self.gradients or self.captured:
            _kernels().cuda_upload(self.memory.data_ptr() + self.gradients_at, data, stream)
            self.gradients = data

    @property
    def place(self) -> tuple[int, int, int]:
        return self.memory.data_ptr(), self.tensors, self.chunks


_plans: OrderedDict[tuple[torch.device, bytes], Plan] = OrderedDict()
_hyper_only = False


@contextmanager
def writing_hyper_only() -> Iterator[None]:
    """Within it the operations upload their hyper-parameters and compute nothing; norms are zeros."""
    global _hyper_only
    before, _hyper_only = _hyper_only, True
    try:
        yield
    finally:
        _hyper_only = before


def ema_update(
    teacher: Sequence[Tensor],
    student: Sequence[Tensor],
    momentum: float,
    copies: Sequence[Tensor],
    found_inf: Tensor | None = None,
) -> None:
    """The operation `ema_update` on CUDA tensors."""
    (t, s, c), written = flat_memory((teacher, student, copies), mutated=(True, False, True))
    kinds = [DTYPE_CODES[x.dtype] | DTYPE_CODES[y.dtype] << 16 for x, y in zip(s, t, strict=True)]
    with on_device(t[0].device):
        stream = _stream(t[0])
        plan = _plan(t[0], (s, (), (), t, (), c, ()), kinds, stream)
        plan.write_hyper((0.0, 0.0, 0.0, momentum), stream)
        if not _hyper_only:
            found_inf = None if found_inf is None else found_inf.float()
            _kernels().cuda_multi_tensor_ema_update(*plan.place, _address(found_inf), stream)
    write_back(written)


def grad_norms(grads: Sequence[Tensor]) -> Tensor:
    """The operation `grad_norms` on CUDA tensors: float32 [n]."""
    ((g,), _) = flat_memory((grads,), mutated=(False,))
    norms = torch.zeros(len(g), dtype=torch.float32, device=g[0].device)
    if not _hyper_only:
        with on_device(g[0].device):
            stream = _stream(g[0])
            # The plan is that of the shapes: gradients often move, shapes do not.
            plan = _plan(g[0], ((),) * 7, [0] * len(g), stream, g)
            plan.write_gradients(g, stream)
            _kernels().cuda_multi_tensor_norms(*plan.place, norms.data_ptr(), stream)
    return norms


def adamw_ema(
    params: Sequence[Tensor], grads: Sequence[Tensor], exp_avgs: Sequence[Tensor], exp_avg_sqs: Sequence[Tensor],
    steps: Sequence[Tensor], teachers: Sequence[Tensor], param_copies: Sequence[Tensor],
    teacher_copies: Sequence[Tensor], multipliers: Tensor | None, found_inf: Tensor | None, lrs: Sequence[float],
    weight_decays: Sequence[float], beta1: float, beta2: float, eps: float, momentum: float,
) -> None:  # fmt: skip
    """The operation `adamw_ema` on CUDA tensors."""
    lists = (params, grads, exp_avgs, exp_avg_sqs, teachers, param_copies, teacher_copies)
    (p, g, m1, m2, t, pc, tc), written = flat_memory(lists, mutated=(True, False, True, True, True, True, True))
    with on_device(p[0].device):
        stream = _stream(p[0])
        plan = _plan(p[0], (p, m1, m2, t, pc, tc, steps), [0] * len(p), stream)
        plan.write_hyper(
            (beta1, beta2, eps, momentum, *chain.from_iterable(zip(lrs, weight_decays, strict=True))), stream
        )
        if not _hyper_only:
            plan.write_gradients(g, stream)
            if multipliers is not None:
                multipliers = multipliers.float().contiguous()
            if found_inf is not None:
                found_inf = found_inf.float()
            _kernels().cuda_multi_tensor_adamw_ema(*plan.place, _address(multipliers), _address(found_inf), stream)
    write_back(written)


def _plan(
    like: Tensor,
    columns: Sequence[Sequence[Tensor]],
    kinds: Sequence[int],
    stream: int,
    sized_like: Sequence[Tensor] = (),
) -> Plan:
    """The plan of these tensors; columns are the addresses of csrc/cuda/multi_tensor_tables.h's Entry, in its order."""
    counts = [t.numel() for t in sized_like or columns[0]]
    n, chunks, first = len(counts), 0, []
    size = _kernels().cuda_multi_tensor_chunk
    for count in counts:
        first.append(chunks)
        chunks += -(-count // size)
    addresses = [[_address(t) for t in column] or [0] * n for column in columns]
    last = [f | k << 32 for f, k in zip(first, kinds, strict=True)]
    entries = array("Q", chain.from_iterable(zip(*addresses, counts, last, strict=True))).tobytes()

    key = (like.device, entries)
    plan = _plans.get(key)
    capturing = _capturing(like)
    if plan is None:
        if capturing:
            raise RuntimeError(
                "multi_tensor meets these tensors for the first time while a CUDA graph is captured; run one step with "
                "the same parameters before the capture, so that their tables are on the device"
            )
        hyper_at, gradients_at, entries_at, size = _kernels().cuda_multi_tensor_offsets(n, chunks)
        memory = torch.zeros(size, dtype=torch.uint8, device=like.device)
        plan = _plans[key] = Plan(memory, n, chunks, hyper_at, gradients_at)
        _kernels().cuda_upload(memory.data_ptr() + entries_at, entries, stream)
        _kernels().cuda_multi_tensor_fill_chunks(*plan.place, stream)
        _forget()
    _plans.move_to_end(key)
    plan.captured |= capturing
    return plan


def _forget() -> None:
    """Drop the plans unused for longest."""
    free = [key for key, plan in _plans.items() if not plan.captured]
    for key in free[:-KEPT]:
        del _plans[key]


def _address(tensor: Tensor | None) -> int:
    return tensor.data_ptr() if tensor is not None and tensor.numel() > 0 else 0


# ---- the device; tests put the host in its place ----


def _kernels() -> Any:
    from dino_fast import _C

    return _C


def _stream(tensor: Tensor) -> int:
    return torch.cuda.current_stream(tensor.device).cuda_stream


def _capturing(tensor: Tensor) -> bool:
    return torch.cuda.is_current_stream_capturing()
