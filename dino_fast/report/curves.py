"""Curves as inline SVG: the plot stretches with the page, its labels are HTML and keep their size.

A curve of more than `SHOWN` points is drawn as the means of equal numbers of neighbors, with their range behind it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

from markupsafe import Markup

SHOWN = 400  # more could not be told apart on a screen, and each costs bytes
WIDTH, HEIGHT = 1000, 400  # of the SVG's own coordinates

Row = dict[str, Any]


@dataclass(frozen=True)
class Point:
    """`step`, mean and range of the values there; `value` None where none was finite: the curve breaks."""

    step: float
    value: float | None
    low: float
    high: float


@dataclass(frozen=True)
class Curve:
    """A named curve; `style` is a class of the page's style sheet, `dots` marks its points."""

    name: str
    points: list[Point]
    style: str = "c1"
    dots: bool = False


def points(rows: Sequence[Row], metric: str, scale: float = 1.0, shown: int = SHOWN) -> list[Point]:
    """The metric where it was measured, at most `shown` points; `scale` multiplies it."""
    measured = [(row["step"], row[metric]) for row in rows if metric in row]
    each = max(1, math.ceil(len(measured) / shown))
    result = []
    for start in range(0, len(measured), each):
        group = measured[start : start + each]
        step = sum(step for step, _ in group) / len(group)
        values = [value * scale for _, value in group if isinstance(value, int | float)]
        if values:
            result.append(Point(step, math.fsum(values) / len(values), min(values), max(values)))
        else:
            result.append(Point(step, None, 0.0, 0.0))
    return result


def ticks(low: float, high: float, about: int = 4) -> list[float]:
    """Round numbers (1, 2 or 5 times a power of ten apart) from at most `low` to at least `high`."""
    span = (high - low) or abs(high) or 1.0
    power = 10.0 ** math.floor(math.log10(span / about))
    distance = next(factor * power for factor in (1, 2, 5, 10) if factor * power * about >= span * 0.999)
    first, last = math.floor(low / distance + 1e-9), math.ceil(high / distance - 1e-9)
    return [round(i * distance, 12) for i in range(first, max(last, first + 1) + 1)]


def chart(title: str, curves: Sequence[Curve], unit: str = "", level: tuple[str, float] | None = None) -> str:
    """HTML of a figure of the curves over the steps; '' where no curve has a value.

    `unit` follows each value; `level` is the name and value of a dashed line across.
    """
    drawn = [curve for curve in curves if any(p.value is not None for p in curve.points)]
    if not drawn:
        return ""
    finite = [p for curve in drawn for p in curve.points if p.value is not None]
    edges = [p.low for p in finite] + [p.high for p in finite] + ([level[1]] if level else [])
    y = ticks(min(edges), max(edges))
    end = max(max(p.step for curve in drawn for p in curve.points), 1)
    x = [at for at in ticks(0, end) if at <= end]
    parts = [f'<path class="grid" d="M0 {_number(_down(at, y))}H{WIDTH}"/>' for at in y]
    if level:
        parts.append(f'<path class="level" d="M0 {_number(_down(level[1], y))}H{WIDTH}"/>')
    for curve in drawn:
        parts += _drawn(curve, end, y)
    names = [f'<span class="{curve.style}">{escape(curve.name)}</span>' for curve in drawn if len(curves) > 1]
    names += [f'<span class="level">{escape(level[0])} = {level[1]:.4g}</span>'] if level else []
    data = {
        "end": end,
        "unit": unit,
        "at": _at(drawn),
        "curves": [{"name": c.name, "points": [[_short(p.step), _short(p.value)] for p in c.points]} for c in drawn],
    }
    left = "".join(f'<i style="top:{_number(_down(at, y) / HEIGHT * 100)}%">{_tick(at)}{unit}</i>' for at in y)
    below = "".join(f'<i style="left:{_number(at / end * 100)}%">{at:,.6g}</i>' for at in x)
    return Markup(
        f'<figure class="chart"><figcaption><b>{escape(title)}</b>{"".join(names)}</figcaption>'
        f'<div class="plot" data-curves="{escape(json.dumps(data, separators=(",", ":")))}">'
        f'<div class="y" aria-hidden="true">{left}</div><svg viewBox="0 0 {WIDTH} {HEIGHT}" preserveAspectRatio="none" '
        f'role="img" aria-label="{escape(title)} over the steps">{"".join(parts)}</svg>'
        f'<div class="x" aria-hidden="true">{below}</div><div class="cursor"></div></div>'
        f'<output class="value">{escape(_last(drawn, unit))}</output></figure>'
    )


def _drawn(curve: Curve, end: float, y: list[float]) -> list[str]:
    """The range, the line and the dots of each stretch without a gap."""
    result = []
    for stretch in _stretches(curve.points):
        across = [_number(p.step / end * WIDTH) for p in stretch]
        if any(p.low < p.high for p in stretch):
            upper = [f"{at} {_number(_down(p.high, y))}" for at, p in zip(across, stretch, strict=True)]
            lower = [f"{at} {_number(_down(p.low, y))}" for at, p in zip(across, stretch, strict=True)]
            result.append(f'<path class="range {curve.style}" d="M{"L".join(upper + lower[::-1])}Z"/>')
        line = [f"{at} {_number(_down(p.value, y))}" for at, p in zip(across, stretch, strict=True)]
        result.append(f'<path class="line {curve.style}" d="M{"L".join(line)}"/>')
        if curve.dots or len(stretch) == 1:  # a line of no length with round ends is a dot, whatever the stretch
            result.append(f'<path class="dots {curve.style}" d="{"".join(f"M{at}h0" for at in line)}"/>')
    return result


def _stretches(points: Sequence[Point]) -> list[list[Point]]:
    result: list[list[Point]] = [[]]
    for point in points:
        if point.value is None:
            result.append([])
        else:
            result[-1].append(point)
    return [stretch for stretch in result if stretch]


def _down(value: float | None, y: list[float]) -> float:
    """Distance from the top of the plot in the SVG's coordinates."""
    assert value is not None
    return (y[-1] - value) / (y[-1] - y[0]) * HEIGHT


def _last(curves: Sequence[Curve], unit: str) -> str:
    """Caption of a chart that nobody points at: the curves' last values."""
    ends = [next(p for p in reversed(curve.points) if p.value is not None) for curve in curves]
    return f"{_at(curves)} {max(p.step for p in ends):,.0f}: " + ", ".join(
        f"{curve.name} {p.value:.4g}{unit}" for curve, p in zip(curves, ends, strict=True)
    )


def _at(curves: Sequence[Curve]) -> str:
    """Unit of the position along the curves: "around step" where points are means of several."""
    return "around step" if any(p.step % 1 or p.low < p.high for c in curves for p in c.points) else "step"


def _number(value: float) -> str:
    return f"{value:.2f}".rstrip("0").rstrip(".")


def _short(value: float | None) -> float | None:
    return None if value is None else float(f"{value:.6g}")


def _tick(value: float) -> str:
    if value == 0 or abs(value) >= 1e-3:
        return f"{value:,.10g}"
    return f"{value:.1e}".replace(".0e", "e").replace("e-0", "e-")
