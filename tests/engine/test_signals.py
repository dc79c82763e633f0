"""Which signals are caught, and what a second one does: sent to this process."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator

import pytest

from dino_fast.engine.signals import SIGNALS, Halted, SignalHandler, block_signals


@pytest.fixture(autouse=True)
def handlers() -> Iterator[list[int]]:
    """Signals that nobody else caught land here, instead of ending the tests."""
    caught: list[int] = []
    before = {number: signal.signal(number, lambda number, frame: caught.append(number)) for number in SIGNALS}
    yield caught
    for number, handler in before.items():
        signal.signal(number, handler)


def _send(number: int) -> None:
    signal.pthread_kill(threading.get_ident(), number)  # no other thread takes it, which blocks nothing
    signal.getsignal(number)  # handlers run between two bytecodes


@pytest.mark.parametrize("number", SIGNALS)
def test_the_first_one_is_noted(number: int, handlers: list[int]) -> None:
    with SignalHandler() as signals:
        assert signals.number is None
        _send(number)
        assert signals.number == number and handlers == []
        with pytest.raises(Halted):
            list(signals.watch([1]))
    _send(number)
    assert handlers == [number]  # as before


@pytest.mark.parametrize("first", SIGNALS)
@pytest.mark.parametrize("second", SIGNALS)
def test_a_ctrl_c_or_the_same_sigterm_acts_at_once_after_it(first: int, second: int, handlers: list[int]) -> None:
    with SignalHandler() as signals:
        _send(first)
        _send(second)
        at_once = second == signal.SIGINT or first == second == signal.SIGTERM
        assert handlers == ([second] if at_once else []) and signals.number == first


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2, signal.SIGXCPU])
def test_what_was_ignored_stays_ignored(number: int) -> None:
    """`nohup dino-fast train &` is meant to outlive its terminal."""
    signal.signal(number, signal.SIG_IGN)
    with SignalHandler() as signals:
        _send(number)
        assert signals.number is None
    assert signal.getsignal(number) == signal.SIG_IGN


def test_blocked_ones_come_at_the_end() -> None:
    with SignalHandler() as signals:
        with block_signals():
            for number in SIGNALS[2:]:
                _send(number)
            assert signals.number is None
        assert signals.number in SIGNALS[2:]
