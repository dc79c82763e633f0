"""Files that appear whole: written under a temporary name, flushed to the disk and renamed."""

from __future__ import annotations

import contextlib
import os
import uuid
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Yields a temporary path beside `path`, of the same suffix; at the end of the `with` it replaces `path`.

    A reader, or a crash, sees the old file or the new one and nothing between. After an exception `path` is as it was
    and the temporary file is removed. Makes the folder of `path`. Raises OSError, and whatever the caller raises.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.absolute().with_name(f".tmp-{uuid.uuid4().hex[:8]}.{path.name}")
    try:
        yield temporary
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()
