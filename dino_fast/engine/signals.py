"""Ctrl-C and SIGTERM: the run is saved before it ends."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterable, Iterator
from types import FrameType
from typing import Any, TypeVar

T = TypeVar("T")
SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interrupted(KeyboardInterrupt):
    """Raised after Ctrl-C or SIGTERM, once the run is saved; `code` is the exit status that shells expect."""

    def __init__(self, number: int, message: str) -> None:
        super().__init__(message)
        self.code = 128 + number


class Halted(Exception):
    """A signal arrived during an evaluation."""


class SignalHandler:
    """Catches Ctrl-C and SIGTERM, inside a `with`.

    The first one sets `number`, which the training loop reads between steps; a second one acts at once.
    """

    def __init__(self) -> None:
        self.number: int | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> SignalHandler:
        if threading.current_thread() is threading.main_thread():  # only the main thread may set handlers
            self._before = {number: signal.signal(number, self._handle) for number in SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.number = number
        self.__exit__()

    def watch(self, items: Iterable[T]) -> Iterator[T]:
        """Yields the items; raises Halted once a signal has arrived."""
        for item in items:
            if self.number is not None:
                raise Halted
            yield item


@contextlib.contextmanager
def block_signals() -> Iterator[None]:
    """Blocks both signals inside the `with` and delivers them at its end.

    Processes started inside inherit the mask, so they never get them.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
