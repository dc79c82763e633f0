from __future__ import annotations

import io
import sys

import pytest

from dino_fast.progress import watched


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_terminal_sees_the_count_and_gets_every_item(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = Terminal()
    monkeypatch.setattr(sys, "stderr", screen)
    monkeypatch.setenv("TERM", "xterm")
    assert list(watched(iter("abc"), 3, "letters")) == ["a", "b", "c"]
    assert "letters" in screen.getvalue() and "3/3" in screen.getvalue()
    assert list(watched(iter("abc"), None, "letters")) == ["a", "b", "c"]


def test_a_log_sees_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    quiet = io.StringIO()
    monkeypatch.setattr(sys, "stderr", quiet)
    assert list(watched([1, 2], 2, "numbers")) == [1, 2] and not quiet.getvalue()


def test_leaving_early_ends_the_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", Terminal())
    for item in watched(range(5), 5, "numbers"):
        if item == 2:
            break
    assert list(watched(range(2), 2, "again")) == [0, 1]  # only one bar may be live
