"""The console of a run: a live progress bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import math
import os
import sys
import time
from types import TracebackType
from typing import TYPE_CHECKING, Any

import torch

from dino_fast.engine.health import WAIT
from dino_fast.streams import LastingStream

if TYPE_CHECKING:
    from rich.console import Console, RenderableType


class Progress:
    """The console of a run: a live bar on a terminal, elsewhere a plain line every `interval` seconds. Use in a `with`.

    `total` and `start` are optimizer steps. `update` takes a step's metrics (the keys of metrics.jsonl); a number
    measured now and then, as `knn`, stays on show. Nothing is printed when `enabled` is False (other ranks, quiet
    runs).
    """

    def __init__(
        self,
        total: int,
        start: int = 0,
        *,
        interval: float = 5.0,
        console: Console | None = None,
        enabled: bool = True,
        device: str = "cpu",
    ) -> None:
        from rich.console import Console

        self.total, self.interval, self.enabled, self.device = total, interval, enabled, device
        # Without a terminal, lines go to a file or a pipe: never wrapped, no colours.
        output: Any = LastingStream(sys.stdout)
        plain: dict[str, Any] = {} if output.isatty() else {"width": 1000, "color_system": None}
        self.console = console or Console(file=output, **plain)
        self._step = self._start = start
        self._shown: dict[str, Any] = {}
        self._began = self._printed = time.monotonic()
        self._live: Any = None

    def __enter__(self) -> Progress:
        self._began = time.monotonic()
        self._printed = self._began - self.interval  # the first update is shown at once
        if self.enabled and self.console.is_terminal:
            from rich.live import Live

            self._live = Live(get_renderable=self._render, console=self.console, refresh_per_second=4)
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None
        elif self._shown and self._step != self._last:
            self._line()

    _last = -1  # step of the last plain line

    def update(self, metrics: dict[str, Any]) -> None:
        """Show a step's metrics. Cheap: the terminal is drawn four times a second at most, by another thread."""
        self._step = int(metrics.get("step", self._step))
        # replaced rather than changed: the drawing thread reads it
        self._shown = {**self._shown, **{name: value for name, value in metrics.items() if value is not None}}
        now = time.monotonic()
        if self._live is None and now - self._printed >= self.interval:
            self._printed = now
            self._line()

    def message(self, text: str) -> None:
        """Print a line above the bar, as it is (no markup)."""
        if self.enabled:
            self.console.print(text, markup=False, highlight=False, soft_wrap=not self.console.is_terminal)

    def _line(self) -> None:
        self._last = self._step
        head = f"step {self._step}/{self.total}"
        self.message("  ".join([head, *(f"{name} {value}" for name, value in self._stats()), f"left {self._left()}"]))

    def _render(self) -> RenderableType:
        from rich.console import Group
        from rich.progress_bar import ProgressBar
        from rich.table import Table
        from rich.text import Text

        head = Table.grid(padding=(0, 1), expand=True)
        head.add_column(no_wrap=True)
        head.add_column(ratio=1)
        head.add_column(no_wrap=True, justify="right")
        epoch = f"epoch {self._shown['epoch']}  " if "epoch" in self._shown else ""
        share = self._step / self.total if self.total else 1.0
        head.add_row(
            Text(f"{epoch}step {self._step}/{self.total}", style="bold"),
            ProgressBar(total=max(self.total, 1), completed=self._step),
            Text(f"{math.floor(100 * share)}%, {self._left()} left"),
        )
        stats = Text()
        for name, value in self._stats():
            stats.append("  " if stats else "")
            # spaces that do not break: a narrow terminal wraps between pairs
            stats.append(f"{name} ".replace(" ", "\xa0"), style="dim").append(value.replace(" ", "\xa0"), style="cyan")
        return Group(head, stats)

    def _stats(self) -> list[tuple[str, str]]:
        """(label, value) of what there is to show, in reading order."""
        formats = [
            ("loss", "loss", "{:.4f}"),
            ("teacher_entropy", "entropy", "{:.3f}"),
            ("kl", "KL", "{:.3f}"),
            ("grad_norm", "grad", "{:.3g}"),
            ("lr", "lr", "{:.2e}"),
            ("momentum", "momentum", "{:.4f}"),
            ("images_per_second", "img/s", "{:.0f}"),
            ("tokens_per_second", "tokens/s", "{:.0f}"),
            ("tflops", "TFLOP/s", "{:.3g}"),
            ("mfu", "MFU", "{:.1%}"),
            ("data_wait", "data wait", "{:.0%}"),
            ("knn", "k-NN", "{:.1%}"),
        ]
        shown = self._shown
        rows = [(label, form.format(float(shown[name]))) for name, label, form in formats if name in shown]
        rows = [(label, text + bound(shown) if label == "data wait" else text) for label, text in rows]
        return [*rows, ("memory", _bytes(memory(self.device)))]

    def _left(self) -> str:
        done = self._step - self._start
        if self._step >= self.total:
            return "0:00"
        if done <= 0:
            return "-:--"
        return clock((time.monotonic() - self._began) / done * (self.total - self._step))


def bound(shown: dict[str, Any]) -> str:
    """Beside the share of waiting: which side sets the pace."""
    return " (data-bound)" if float(shown["data_wait"]) > WAIT else " (model-bound)"


def memory(device: str = "cpu") -> int:
    """Bytes in use: this process's resident memory for `cpu`, the most that PyTorch reserved on the GPU for `cuda`."""
    if device.startswith("cuda") and torch.cuda.is_initialized():
        return torch.cuda.max_memory_reserved(device)
    with open("/proc/self/statm", encoding="ascii") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def clock(seconds: float) -> str:
    """75 -> `1:15`, 3675 -> `1:01:15`, 90061 -> `1d 1:01:01`."""
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    days, hour = divmod(hours, 24)
    short = f"{hour}:{minute:02d}:{second:02d}" if hours else f"{minute}:{second:02d}"
    return f"{days}d {short}" if days else short


def _bytes(count: int) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.0f} MB"
