"""How much memory a run may use, and a message instead of a traceback where it does not suffice."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from pathlib import Path

import torch

from dino_fast.errors import UserError

ADVICE = "Give a smaller --batch-size, or more --grad-accum-steps; --checkpoint-activations full keeps less, too"
_OF_GROUP = ("memory.max", "memory/memory.limit_in_bytes")  # cgroup v2, v1


def memory_limit(root: Path = Path("/")) -> int:
    """Bytes that the processes of this machine, or of this container, may use together.

    RAM and swap, or the control group's limit where that is lower. `root` is where proc/ and sys/ lie.
    """
    info = (root / "proc/meminfo").read_text()
    total = sum(int(size) * 1024 for size in re.findall(r"^(?:MemTotal|SwapTotal):\s*(\d+) kB", info, re.MULTILINE))
    for name in _OF_GROUP:
        with contextlib.suppress(OSError, ValueError):  # no such group, or "max"
            total = min(total, int((root / "sys/fs/cgroup" / name).read_text()))
    return total


def check_memory(estimated: float, processes: int, limit: int) -> None:
    """Raises UserError where `processes` of `estimated` bytes each are more than `limit` bytes."""
    if estimated * processes > limit:
        several = f" in each of {processes} processes" if processes > 1 else ""
        raise UserError(
            f"the run needs about {estimated / 1e9:.1f} GB of memory{several}, and this machine (or container) allows "
            f"{limit / 1e9:.1f} GB. {ADVICE} ('--dry-run' shows what takes the memory)"
        )


@contextlib.contextmanager
def explained_out_of_memory() -> Iterator[None]:
    """Turns running out of memory, on a CPU or a GPU, into a UserError that says what to change."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        text = str(error)
        known = isinstance(error, MemoryError | torch.OutOfMemoryError) or "can't allocate memory" in text
        if not known and "bad_alloc" not in text:
            raise
        first = text.strip().splitlines()[0] if text.strip() else "the system gave none"
        raise UserError(f"out of memory ({first}). {ADVICE}") from error
