"""Which implementation of an operation runs.

Every operation has a reference in plain PyTorch, and native (C++), Triton or CUDA kernels where they exist. `auto`
takes the first in its list, fastest first, that can run on the given tensors. The environment variable
`DINO_FAST_BACKEND` overrides `auto`, read at each call: `NAME` for every operation that has a backend of that name, or
`operation=NAME,...` strictly. An explicit choice raises where it cannot run, and says why.
"""

from __future__ import annotations

import importlib
import os
import shutil
import sysconfig
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from dino_fast import gpu


class BackendError(RuntimeError):
    """An explicitly chosen backend cannot run here; the message says why and what can."""


@dataclass(frozen=True)
class Backend:
    """One implementation of an operation.

    `unavailable_reason()` names the part that this machine or build lacks, `unsupported_reason(*tensors)` why it does
    not take these inputs; both return None if it can run.
    """

    name: str
    unavailable_reason: Callable[[], str | None] = lambda: None
    unsupported_reason: Callable[..., str | None] = lambda *tensors: None


@dataclass(frozen=True)
class Preference:
    """A rule for operations whose fastest backend depends on the inputs.

    `first(*inputs)` names the one that `auto` tries before the others, or None; `explain()` is the rule in words, for
    `dino-fast info`.
    """

    first: Callable[..., str | None]
    explain: Callable[[], str]


# Inputs that an operation's backends may be asked about, of which `choose` looks at sizes, dtypes and devices.
Example = Callable[[torch.device], tuple[Tensor | int, ...]]

OPERATIONS: dict[str, tuple[Backend, ...]] = {}
PREFERENCES: dict[str, Preference] = {}
EXAMPLES: dict[str, Example] = {}


def register(operation: str, *backends: Backend, example: Example, preference: Preference | None = None) -> None:
    """Declares an operation's backends, fastest first; the last must run everywhere.

    `example(device)` makes ordinary inputs of the operation on a device, in the form that `choose` is given them, for
    `dino-fast info`.
    """
    OPERATIONS[operation] = backends
    EXAMPLES[operation] = example
    if preference is not None:
        PREFERENCES[operation] = preference


def choose(operation: str, *tensors: Tensor | int, backend: str = "auto") -> str:
    """The name of the backend that will run `operation` on these tensors (and sizes that its backends look at)."""
    candidates = OPERATIONS[operation]
    wanted, strict = _requested(operation, backend)
    if wanted is not None:
        for candidate in candidates:
            if candidate.name == wanted:
                reason = candidate.unavailable_reason() or candidate.unsupported_reason(*tensors)
                if reason is None:
                    return wanted
                raise BackendError(f"{operation}: backend '{wanted}' was asked for but cannot run: {reason}")
        if strict:
            names = ", ".join(candidate.name for candidate in candidates)
            raise BackendError(f"{operation} has no backend '{wanted}'; it has: {names}, or auto")
    if operation in PREFERENCES:
        first = PREFERENCES[operation].first(*tensors)
        candidates = tuple(sorted(candidates, key=lambda candidate: candidate.name != first))
    reasons = []
    for candidate in candidates:
        reason = candidate.unavailable_reason() or candidate.unsupported_reason(*tensors)
        if reason is None:
            return candidate.name
        reasons.append(f"{candidate.name}: {reason}")
    raise BackendError(f"{operation}: no backend can run these inputs. " + "; ".join(reasons))


def _requested(operation: str, backend: str) -> tuple[str | None, bool]:
    """(name, strict): strict where the name was given for this operation alone and must therefore exist."""
    if backend != "auto":
        return backend, True
    setting = os.environ.get("DINO_FAST_BACKEND")
    if not setting:
        return None, False
    general = None
    for part in setting.split(","):
        name, _, choice = part.strip().partition("=")
        if choice:
            if name not in OPERATIONS:
                raise BackendError(f"DINO_FAST_BACKEND names operation '{name}'; there are: {', '.join(OPERATIONS)}")
            if name == operation:
                return (None if choice == "auto" else choice), True
        elif name and name != "auto":
            if not any(b.name == name for backends in OPERATIONS.values() for b in backends):
                known = sorted({b.name for backends in OPERATIONS.values() for b in backends})
                raise BackendError(
                    f"DINO_FAST_BACKEND={name}: no operation has it; there are: {', '.join(known)}, auto"
                )
            general = name
    return general, False


@cache
def native_unavailable_reason() -> str | None:
    """Why the compiled module cannot be used, or None."""
    try:
        import dino_fast._C  # noqa: F401
    except ImportError as error:
        return f"dino_fast._C does not import ({error}); in a checkout, install with `pip install -e .`"
    return None


@cache
def cuda_unavailable_reason() -> str | None:
    """Why the compiled CUDA kernels cannot be used, or None."""
    if reason := native_unavailable_reason():
        return reason
    compiled_for = importlib.import_module("dino_fast._C").cuda_version
    if compiled_for is None:
        return "this build has no CUDA kernels: no nvcc was found when it was installed"
    if not torch.cuda.is_available():
        return "no CUDA device"
    return gpu.driver_too_old(compiled_for)


@cache
def triton_unavailable_reason() -> str | None:
    """Why Triton kernels cannot be used, or None. With TRITON_INTERPRET=1 they run, slowly, on CPU tensors.

    A GPU whose kernels cannot be launched for want of a C compiler or of a newer driver is warned about, once.
    """
    try:
        import triton
    except ImportError as error:
        return f"triton does not import ({error})"
    if os.environ.get("TRITON_INTERPRET") == "1":
        return None
    if not torch.cuda.is_available():
        return "no CUDA device (TRITON_INTERPRET=1 runs the kernels on the CPU)"
    reason = _launcher_unavailable_reason(triton) or gpu.driver_too_old(_ptxas_version())
    if reason is not None:
        warnings.warn(f"dino_fast runs without its Triton kernels: {reason}", RuntimeWarning, stacklevel=2)
    return reason


def _launcher_unavailable_reason(triton: Any) -> str | None:
    """Why Triton cannot build the C module with which it launches a kernel for the first time, or None."""
    if getattr(triton.knobs.build, "impl", None) is not None:
        return None
    compiler = os.environ.get("CC")
    if compiler is not None and shutil.which(compiler) is None:
        return f"the environment variable CC names no program: {compiler}"
    if compiler is None and not (shutil.which("gcc") or shutil.which("clang")):
        return "Triton needs a C compiler to launch a kernel and finds none; install gcc, or name one in CC"
    scheme = sysconfig.get_default_scheme()
    header = sysconfig.get_paths("posix_prefix" if scheme == "posix_local" else scheme)["include"] + "/Python.h"
    if not os.path.exists(header):
        return f"Triton needs Python's C headers to launch a kernel, and there is no {header}; install python3-dev"
    return None


def _ptxas_version() -> str | None:
    """The CUDA version that Triton compiles for on the current GPU, None where it does not tell."""
    from triton.backends.nvidia import compiler

    major, minor = gpu.chip(torch.device("cuda")).capability
    try:
        version: str = compiler.get_ptxas(10 * major + minor).version
        return version
    except (AttributeError, RuntimeError):
        return None
