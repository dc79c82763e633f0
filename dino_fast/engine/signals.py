"""Signals that end a run (Ctrl-C, SIGTERM, a lost connection, a scheduler's warning): it is saved first."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterable, Iterator
from types import FrameType
from typing import Any, TypeVar

T = TypeVar("T")
SIGNALS = (
    *(signal.SIGINT, signal.SIGTERM),
    signal.SIGHUP,  # the terminal or the connection to it is gone
    *(signal.SIGUSR1, signal.SIGUSR2),  # Slurm's and submitit's warning that the time is nearly over
    signal.SIGXCPU,  # the limit of processor time
)
AT_ONCE = (signal.SIGINT, signal.SIGTERM)  # when they come again


class Interrupted(KeyboardInterrupt):
    """Raised after one of `SIGNALS`, once the run is saved; `code` is the exit status that shells expect."""

    def __init__(self, number: int, message: str) -> None:
        super().__init__(message)
        self.code = 128 + number


class Halted(Exception):
    """A signal arrived during an evaluation."""


class SignalHandler:
    """Catches `SIGNALS`, inside a `with`.

    The first one sets `number`, which the training loop reads between steps. A Ctrl-C after it acts at once, and so
    does a second SIGTERM; others change nothing, for they come in pairs (a closed terminal) or repeatedly (SIGXCPU).
    A signal that was ignored before, as `nohup` has SIGHUP ignored, stays so; Ctrl-C and SIGTERM are always caught.
    """

    def __init__(self) -> None:
        self.number: int | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> SignalHandler:
        if threading.current_thread() is threading.main_thread():  # only the main thread may set handlers
            for number in SIGNALS:
                if number in AT_ONCE or signal.getsignal(number) != signal.SIG_IGN:
                    self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.number is None:
            self.number = number
        for one in {signal.SIGINT, number} & self._before.keys() & set(AT_ONCE):
            signal.signal(one, self._before.pop(one))

    def watch(self, items: Iterable[T]) -> Iterator[T]:
        """Yields the items; raises Halted once a signal has arrived."""
        for item in items:
            if self.number is not None:
                raise Halted
            yield item


@contextlib.contextmanager
def block_signals() -> Iterator[None]:
    """Blocks `SIGNALS` inside the `with` and delivers them at its end.

    Processes started inside inherit the mask, so they never get them.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
