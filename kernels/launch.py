"""How every Triton kernel here is launched: on the device of its tensors, whichever is current."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from dino_fast.gpu import on_device, one_device


def launch_kernel(kernel: Any, grid: tuple[int, ...], *arguments: Any, **options: Any) -> None:
    """`kernel[grid](*arguments, **options)`, queued on the current stream of the tensors' device.

    Raises ValueError for tensors on several devices.
    """
    with on_device(one_device(x for x in arguments if isinstance(x, Tensor))):
        # Said, because Triton 3.10 changes the default.
        kernel[grid](*arguments, enable_fp_fusion=True, **options)
