"""Worker processes of the training loader: how they start, how their failures reach the training process, how they end.

Workers are forked with the signals blocked that the training loop handles, so that a Ctrl-C sent to all
processes lets them finish. SIGTERM is unblocked in them: Python and PyTorch end workers with it, and would otherwise
wait for ever. PyTorch's handler in the worker obeys its parent in silence.
"""

from __future__ import annotations

import contextlib
import errno
import multiprocessing.context
import multiprocessing.queues
import os
import resource
import signal
import threading
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch._utils import ExceptionWrapper
from typing_extensions import override

from dino_fast.data.batch import Batch
from dino_fast.defaults import torch_defaults
from dino_fast.errors import UserError

_FILES = 12  # that a worker opens here: pipes, and two for each batch on its way (measured: 9)
_OTHER_FILES = 32  # shards, images, checkpoints, logs


class _Queue(multiprocessing.queues.Queue):  # type: ignore[type-arg]
    """Says in a batch's place why it cannot be sent.

    A plain queue prints a traceback in the worker and sends nothing, and the training process waits for ever.
    """

    def _on_queue_feeder_error(self, error: BaseException, item: tuple[int, Any]) -> None:
        number, unsent = item
        if not isinstance(unsent, ExceptionWrapper):
            told = (type(error), error, error.__traceback__)
            unsent = ExceptionWrapper(told, where="in a DataLoader worker that could not hand a batch over")
        unsent.exc_type = RuntimeError  # its own may be what cannot be sent
        self.put((number, unsent))


class ForkContext(multiprocessing.context.ForkContext):
    """Forked workers share the source's memory, and use no GPU."""

    @override
    def Queue(self, maxsize: int = 0) -> _Queue:  # type: ignore[override]
        return _Queue(maxsize, ctx=self)


def init_worker(worker: int) -> None:
    """Runs first in each worker."""
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
    torch.set_num_threads(1)  # the workers are the parallelism


def start_workers(loader: Iterable[Batch], workers: int) -> Iterator[Batch]:
    """The iterator of a `torch.utils.data.DataLoader`, its workers started.

    PyTorch's signal handler would have a worker's death raise from wherever this process is just then, in the middle of
    a step; the wait for the next batch notices it as well, within seconds, so it is put back.
    """
    if workers:
        _allow_open_files(workers)
    before = signal.getsignal(signal.SIGCHLD)
    try:
        with torch_defaults():  # its seed is drawn on the default device
            return iter(loader)
    finally:
        if before is not None and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGCHLD, before)


@contextlib.contextmanager
def explained_shortages() -> Iterator[None]:
    """Raises UserError for an error that comes of too little shared memory or too few files."""
    try:
        yield
    except (RuntimeError, OSError) as error:
        if lacking := _lacking(error):
            raise UserError(lacking) from error
        raise


def next_batch(batches: Iterator[Batch]) -> Batch | None:
    """The next batch, None at the end. Raises UserError for a dead worker and for want of shared memory or files."""
    try:
        with explained_shortages():
            return next(batches, None)
    except (RuntimeError, ConnectionError, EOFError) as error:
        # Dead at its work or while it handed a batch over; what a living worker raised says "Caught".
        dead = isinstance(error, ConnectionError | EOFError) or "DataLoader worker" in str(error)
        if "Caught" in str(error) or not dead:
            raise
        if any(worker.exitcode == -signal.SIGBUS for worker in getattr(batches, "_workers", ())):
            raise UserError(_lacking_shared_memory()) from error
        raise UserError(
            f"a data-loading worker died ({error or type(error).__name__}). If memory ran out, use fewer --workers "
            "or a smaller batch; --workers 0 loads in the training process"
        ) from error


def stop_workers(batches: Iterator[Batch] | None) -> None:
    """Ends the workers now.

    Left to Python, an exception's traceback keeps the iterator until the interpreter exits, when PyTorch ends no
    workers any more.
    """
    shutdown = getattr(batches, "_shutdown_workers", None)  # absent where there are no workers
    if shutdown is not None:
        shutdown()


def _allow_open_files(workers: int) -> None:
    """Raises the soft limit of open files to what the workers take. Raises UserError where the hard one is lower."""
    needed = len(os.listdir("/dev/fd")) + _OTHER_FILES + _FILES * workers
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY or soft >= needed:
        return
    if hard != resource.RLIM_INFINITY and hard < needed:
        raise UserError(_lacking_files(f"{workers} workers take up to {needed}"))
    resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))


def _lacking(error: BaseException) -> str | None:
    """The advice for an error for want of files or of shared memory.

    PyTorch's files there are named </torch_...>; Python's semaphores lie there, too.
    """
    text = str(error)
    if "Too many open files" in text or "items of ancdata" in text:
        return _lacking_files("the data-loading workers ran out of them")
    full = isinstance(error, OSError) and error.errno == errno.ENOSPC
    return _lacking_shared_memory() if full or "</torch_" in text else None


def _lacking_files(why: str) -> str:
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return (
        f"{limit} open files are allowed, and {why}. Use fewer --workers (0 loads in the training process), or allow "
        "more with 'ulimit -n 4096'"
    )


def _lacking_shared_memory() -> str:
    try:
        place = os.statvfs("/dev/shm")
        size = f" (/dev/shm holds {place.f_blocks * place.f_frsize / 1e6:,.0f} MB)"
    except OSError:
        size = ""
    return (
        f"the data-loading workers ran out of shared memory{size}. Use fewer --workers (0 loads in the training "
        "process) or a smaller --batch-size, or allow more: 'docker run --shm-size 8g'"
    )
