"""Indexes of sources, kept in a cache folder: walking ten million files takes minutes once and is not repeated.

An index is a few flat arrays (no Python object an image), written as one safetensors file and mapped into memory when
it is opened again, so that opening costs neither time nor memory by the image and forked workers share it. With it are
kept the sizes and times of what it was made from: folders, whose time changes when a file comes, goes or is renamed, or
the shards themselves. An index that no longer agrees with them is built again.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import stat as stat_module
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dino_fast.atomic import atomic_write

KEEP_AFTER = 1.0  # seconds of building from which an index is kept; quicker ones are not worth a file
_SETTLED = 2_000_000_000  # ns; a change within a file system's clock tick after the index was built would go unseen
_FORMAT = 2


@dataclass
class Index:
    """`arrays` by name, the `facts` beside them (anything JSON holds), and what to look at to see that they hold.

    `watched` are absolute paths joined by NUL bytes, `stamps` int64 [paths, 2] their sizes and times.
    """

    arrays: dict[str, np.ndarray]
    facts: dict[str, Any] = field(default_factory=dict)
    watched: bytes = b""
    stamps: np.ndarray = field(default_factory=lambda: np.zeros((0, 2), np.int64))


def cache_folder() -> Path:
    """`DINO_FAST_CACHE`, else dino-fast/ in the user's cache folder.

    A user without a home has it beside the temporary files.
    """
    given = os.environ.get("DINO_FAST_CACHE")
    try:
        if given:
            return Path(given).expanduser()
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dino-fast"
    except RuntimeError:  # `docker run --user 12345`
        return Path(os.environ.get("TMPDIR") or "/tmp") / f"dino-fast-{os.getuid()}"


def cached(kind: str, places: Sequence[Path], build: Callable[[], Index]) -> Index:
    """The kept index of `places` where it still holds, else a new one, kept if it took long to build."""
    file = cache_file(kind, places, ".safetensors")
    kept = load(file)
    if kept is not None and holds(kept):
        return kept
    began = time.time_ns()
    index = build()
    settled = not len(index.stamps) or int(index.stamps[:, 1].max()) < began - _SETTLED
    if settled and time.time_ns() - began >= KEEP_AFTER * 1e9:
        with contextlib.suppress(OSError):  # a full or read-only disk costs time at the next start and nothing else
            save(file, index)
    return index


def cache_file(kind: str, places: Sequence[Path], suffix: str) -> Path:
    """Where something made from `places` is kept."""
    digest = hashlib.sha256(b"\0".join(os.fsencode(place.absolute()) for place in places)).hexdigest()
    return cache_folder() / f"{kind}-{_FORMAT}-{digest[:32]}{suffix}"


def stamp(stat: os.stat_result) -> tuple[int, int]:
    """What changes when a file or the list of names of a folder does: the size (0 of a folder) and the time in ns."""
    return (stat.st_size if not stat_module.S_ISDIR(stat.st_mode) else 0, stat.st_mtime_ns)


def watch(paths: Iterable[Path]) -> dict[str, Any]:
    """The fields `watched` and `stamps` of an index made from these files."""
    absolute = [os.fsencode(path.absolute()) for path in paths]
    stamps = np.array([stamp(os.stat(path)) for path in absolute], np.int64).reshape(-1, 2)
    return {"watched": b"\0".join(absolute), "stamps": stamps}


def holds(index: Index) -> bool:
    """Whether nothing that the index was made from has changed."""
    paths = index.watched.split(b"\0") if index.watched else []
    if len(paths) != len(index.stamps):
        return False
    try:
        return all(stamp(os.stat(path)) == (size, ns) for path, (size, ns) in zip(paths, index.stamps, strict=True))
    except OSError:
        return False


def save(file: Path, index: Index) -> None:
    """Writes the index to a file that appears whole. Raises OSError."""
    from safetensors.torch import save_file

    arrays = {**index.arrays, "watched": np.frombuffer(index.watched, np.uint8), "stamps": index.stamps}
    tensors = {name: torch.from_numpy(np.array(array)) for name, array in arrays.items()}
    with atomic_write(file) as temporary:
        save_file(tensors, temporary, {"facts": json.dumps(index.facts)})


def load(file: Path) -> Index | None:
    """The index in a file, its arrays mapped; None where there is no such file or it is damaged."""
    from safetensors import SafetensorError, safe_open

    if not file.is_file():
        return None
    try:
        with safe_open(file, "pt") as kept:
            facts = json.loads(kept.metadata()["facts"])
            arrays = {name: kept.get_tensor(name).numpy() for name in kept.keys()}  # noqa: SIM118 - no mapping
        watched, stamps = arrays.pop("watched").tobytes(), arrays.pop("stamps")
    except (SafetensorError, OSError, KeyError, TypeError, ValueError):
        return None
    return Index(arrays, facts, watched, stamps)
