"""Tensors sharded over processes (`torch.distributed.tensor.DTensor`), for code that takes plain ones as well."""

from __future__ import annotations

from typing import Any, cast

from torch import Tensor
from torch.nn import Parameter

_PLAIN_TYPES = frozenset((Tensor, Parameter))  # asking them for an attribute that they lack takes a microsecond each


def is_sharded(tensor: Tensor) -> bool:
    """Whether this is a DTensor."""
    return type(tensor) not in _PLAIN_TYPES and hasattr(tensor, "to_local")


def to_local(tensor: Tensor) -> Tensor:
    """This process's shard of a DTensor; any other tensor itself. Differentiable."""
    return cast(Tensor, cast(Any, tensor).to_local()) if is_sharded(tensor) else tensor
