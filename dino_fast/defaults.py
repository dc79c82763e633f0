"""PyTorch's own default dtype and device, for others' code that relies on them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch


@contextmanager
def torch_defaults() -> Iterator[None]:
    """Makes float32 on the CPU the defaults within, whatever the caller's program has set.

    The default dtype is the process's: not for code beside which other threads make tensors.
    """
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        # Only where it is needed: such a context is asked about every function that PyTorch runs.
        with nullcontext() if torch.get_default_device().type == "cpu" else torch.device("cpu"):
            yield
    finally:
        torch.set_default_dtype(before)
