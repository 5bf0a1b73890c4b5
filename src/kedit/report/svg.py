"""Plots as SVG text: no plotting library, no network."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from kedit.evaluation.statistics import Estimate

COLOURS = ("#4477aa", "#ee6677", "#228833", "#ccbb44", "#66ccee", "#aa3377", "#777777")
_FONT = 'font-family="sans-serif" font-size="12"'


def dots(rows: Sequence[tuple[str, Sequence[Estimate | None]]], series: Sequence[str], *, unit: str = "%") -> str:
    """A row per metric, a dot with its interval per series, on one axis from 0 to 100."""
    left, width, step = 150, 420, 14 * len(series) + 12
    height = step * len(rows) + 50

    def x(value: float) -> float:
        return left + width * min(max(value, 0.0), 100.0) / 100

    parts = [_legend(series, left, height - 8)]
    for tick in range(0, 101, 20):
        parts.append(f'<line x1="{x(tick):.1f}" y1="8" x2="{x(tick):.1f}" y2="{height - 36}" stroke="#ddd"/>')
        parts.append(f'<text x="{x(tick):.1f}" y="{height - 24}" text-anchor="middle" {_FONT}>{tick}{unit}</text>')
    for i, (label, values) in enumerate(rows):
        top = 8 + step * i
        parts.append(f'<text x="{left - 10}" y="{top + step / 2:.1f}" text-anchor="end" {_FONT}>{escape(label)}</text>')
        for j, value in enumerate(values):
            if value is not None:
                y = top + 12 + 14 * j
                if value.low is not None and value.high is not None:
                    parts.append(_line(x(value.low), y, x(value.high), y, COLOURS[j % len(COLOURS)]))
                parts.append(f'<circle cx="{x(value.value):.1f}" cy="{y}" r="4" fill="{COLOURS[j % len(COLOURS)]}"/>')
    return _svg(left + width + 40, height, parts)


@dataclass(frozen=True)
class Curve:
    """A named line through points (x, estimate), with a label per point."""

    name: str
    points: Sequence[tuple[float, Estimate]]
    labels: Sequence[str] = ()


def curves(lines: Sequence[Curve], x_label: str, y_label: str) -> str:
    """Lines with intervals as bars; axes fitted to the points."""
    left, top, width, height = 70, 16, 460, 280
    xs = [x for line in lines for x, _ in line.points]
    ends = [v for line in lines for _, e in line.points for v in (e.low, e.high, e.value) if v is not None]
    if not xs:
        return ""
    (x0, x1), (y0, y1) = _room(xs), _room(ends)

    def place(x: float, y: float) -> tuple[float, float]:
        return left + width * (x - x0) / (x1 - x0), top + height * (1 - (y - y0) / (y1 - y0))

    parts = [_legend([line.name for line in lines], left, top + height + 58)]
    for tick in _ticks(x0, x1):
        px, _ = place(tick, y0)
        parts.append(f'<text x="{px:.1f}" y="{top + height + 18}" text-anchor="middle" {_FONT}>{tick:g}</text>')
    for tick in _ticks(y0, y1):
        _, py = place(x0, tick)
        parts.append(f'<line x1="{left}" y1="{py:.1f}" x2="{left + width}" y2="{py:.1f}" stroke="#ddd"/>')
        parts.append(f'<text x="{left - 8}" y="{py + 4:.1f}" text-anchor="end" {_FONT}>{tick:g}</text>')
    middle = left + width / 2
    parts.append(f'<text x="{middle}" y="{top + height + 36}" text-anchor="middle" {_FONT}>{escape(x_label)}</text>')
    turn = f'transform="rotate(-90 16 {top + height / 2})"'
    parts.append(f'<text x="16" y="{top + height / 2}" text-anchor="middle" {turn} {_FONT}>{escape(y_label)}</text>')
    for j, line in enumerate(lines):
        colour = COLOURS[j % len(COLOURS)]
        path = " ".join("{:.1f},{:.1f}".format(*place(x, e.value)) for x, e in line.points)
        parts.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="1.5"/>')
        for x, e in line.points:
            px, py = place(x, e.value)
            if e.low is not None and e.high is not None:
                aside = 3 * j  # so that bars at the same place are all seen
                parts.append(_line(px + aside, place(x, e.low)[1], px + aside, place(x, e.high)[1], colour))
            parts.append(f'<circle cx="{px:.1f}" cy="{py:.1f}" r="4" fill="{colour}"/>')
        anchor, aside, below = ("start", 8, 4) if j % 2 == 0 else ("end", -6, 16)  # of two lines, one's on each side
        for (px, py), label in _together([place(x, e.value) for x, e in line.points], line.labels):
            text = f'text-anchor="{anchor}" fill="{colour}" {_FONT}>{escape(label)}'
            parts.append(f'<text x="{px + aside:.1f}" y="{py + below:.1f}" {text}</text>')
    return _svg(left + width + 110, top + height + 70, parts)


def _ticks(low: float, high: float) -> list[float]:
    """Three to eight round numbers between the two."""
    step = 10.0 ** math.floor(math.log10((high - low) / 3))
    step *= next(factor for factor in (5, 2, 1) if (high - low) / (factor * step) >= 3)
    return [round(i * step, 10) for i in range(math.ceil(low / step), math.floor(high / step) + 1)]


def _together(places: Sequence[tuple[float, float]], labels: Sequence[str]) -> list[tuple[tuple[float, float], str]]:
    """The labels of points that lie on top of one another as one label, at the first of them."""
    found: list[tuple[tuple[float, float], str]] = []
    for place, label in zip(places, labels, strict=False):
        near = [i for i, (other, _) in enumerate(found) if math.dist(place, other) < 12]
        if near:
            found[near[0]] = found[near[0]][0], f"{found[near[0]][1]}, {label}"
        else:
            found.append((place, label))
    return found


def _room(values: Sequence[float]) -> tuple[float, float]:
    low, high = min(values), max(values)
    margin = (high - low) * 0.05 or 1.0
    return low - margin, high + margin


def _line(x1: float, y1: float, x2: float, y2: float, colour: str) -> str:
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" stroke="{colour}" stroke-width="2"/>'


def _legend(names: Sequence[str], left: float, y: float) -> str:
    parts, x = [], left
    for j, name in enumerate(names):
        parts.append(f'<circle cx="{x:.0f}" cy="{y - 4:.0f}" r="4" fill="{COLOURS[j % len(COLOURS)]}"/>')
        parts.append(f'<text x="{x + 8:.0f}" y="{y:.0f}" {_FONT}>{escape(name)}</text>')
        x += 24 + 7 * len(name)
    return "".join(parts)


def _svg(width: float, height: float, parts: Sequence[str]) -> str:
    size = f'viewBox="0 0 {width:.0f} {height:.0f}" width="{width:.0f}" height="{height:.0f}"'
    return f'<svg xmlns="http://www.w3.org/2000/svg" {size} role="img">{"".join(parts)}</svg>'
