"""Tensors sharded over processes (`torch.distributed.tensor.DTensor`), for code that takes plain ones as well."""

from __future__ import annotations

from typing import Any, cast

from torch import Tensor


def is_sharded(tensor: Tensor) -> bool:
    """Whether this is a DTensor."""
    return hasattr(tensor, "to_local")


def to_local(tensor: Tensor) -> Tensor:
    """This process's shard of a DTensor; any other tensor itself. Differentiable."""
    return cast(Tensor, cast(Any, tensor).to_local()) if is_sharded(tensor) else tensor
