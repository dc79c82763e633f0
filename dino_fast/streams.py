"""Standard output and error that never end a run: a full disk behind them, a reader that left, a closed descriptor."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from typing import Any, TextIO


class LastingStream:
    """A text stream whose `write` and `flush` do not raise. Text that cannot be written is dropped.

    After a failure the stream's descriptor leads to the null device, so that native code and the interpreter's flush
    at its end go on in silence too. `error` is the first failure other than a reader that left. Characters that the
    encoding lacks are written as escapes. `stream` None (closed before Python started) drops everything.
    """

    def __init__(self, stream: TextIO | LastingStream | None) -> None:
        self._stream: Any = stream
        self.error: OSError | ValueError | None = None

    def write(self, text: str) -> int:
        """Writes `text`, or drops it; returns its length."""
        if self._stream is not None:
            try:
                self._stream.write(text)
            except UnicodeEncodeError as error:
                self.write(text.encode(error.encoding, "backslashreplace").decode(error.encoding))
            except (OSError, ValueError) as error:  # ValueError: the stream was closed
                self._drop(error)
        return len(text)

    def flush(self) -> None:
        """Hands the written text to the system, or drops it."""
        if self._stream is not None:
            try:
                self._stream.flush()
            except (OSError, ValueError) as error:
                self._drop(error)

    def isatty(self) -> bool:
        """Whether this is a terminal; False where that cannot be told."""
        try:
            return self._stream is not None and self._stream.isatty()
        except (OSError, ValueError):
            return False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def _drop(self, error: OSError | ValueError) -> None:
        if self.error is None and not isinstance(error, BrokenPipeError):
            self.error = error
        if isinstance(error, BlockingIOError):
            return  # a reader that is slow; the next line may go through
        with contextlib.suppress(OSError, ValueError):
            null = os.open(os.devnull, os.O_WRONLY)
            try:
                os.dup2(null, self._stream.fileno())
            finally:
                os.close(null)
            self._stream.flush()  # the rest that the failed write left in the buffer


@contextlib.contextmanager
def lasting_streams() -> Iterator[LastingStream]:
    """Makes `sys.stdout` (yielded) and `sys.stderr` lasting inside the `with`.

    Descriptors 0 to 2 that are closed lead to the null device from here on: else the next file opened would get such a
    number, and native messages with it.
    """
    for descriptor in (0, 1, 2):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest number that is free
    before = sys.stdout, sys.stderr
    output, errors = LastingStream(sys.stdout), LastingStream(sys.stderr)
    sys.stdout, sys.stderr = output, errors  # type: ignore[assignment]
    try:
        yield output
    finally:
        output.flush()
        errors.flush()
        sys.stdout, sys.stderr = before
