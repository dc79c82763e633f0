"""Writes checkpoints beside the training: one thread, one checkpoint at a time, what it met told at the next step."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import Any

from dino_fast.engine import checkpoint


class Writer:
    """`save` takes copies that nobody changes and returns at once, or writes at once where not in the `background`.

    An error of the thread is raised by the next `poll`, `save` or `wait`. `seconds` is how long the last one took.
    """

    def __init__(self, background: bool) -> None:
        self.background = background
        self.seconds = 0.0
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def save(self, directory: Path, step: int, state: dict[str, Any], keep: int, best: bool) -> None:
        """Write the checkpoint, after the one that is being written; with `best` it becomes the best one."""
        self.wait()
        # Not a daemon: an interpreter that ends for another reason finishes the checkpoint first.
        self._thread = threading.Thread(
            target=self._write, args=(directory, step, state, keep, best), name="checkpoint"
        )
        self._thread.start()
        if not self.background:
            self.wait()

    def poll(self) -> None:
        """Raise what went wrong with a checkpoint that is done; does not wait for one that is not."""
        if self._thread is not None and not self._thread.is_alive():
            self.wait()

    def wait(self) -> None:
        """Until the checkpoint is on the disk; raise what went wrong."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def _write(self, directory: Path, step: int, state: dict[str, Any], keep: int, best: bool) -> None:
        began = time.monotonic()
        try:
            checkpoint.save(directory, step, state, keep=keep)
            if best:
                checkpoint.mark_best(directory, step)
        except BaseException as error:
            self._error = error
        self.seconds = time.monotonic() - began
