"""Plots as SVG text: no library, no script. Colours are classes, so that a page's light and dark styles apply to them.

    histogram   bars over a logarithmic axis           curve   one line over a logarithmic axis
    bands       a median and its 5 % to 95 % band, a shard a column          bars   a value a shard

Every number that is drawn has a <title>, which browsers show under the pointer and read aloud.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from html import escape
from typing import TypeVar

from wds_tools.terminal import from_to

Column = TypeVar("Column")
WIDTH, HEIGHT = 520, 190
_LEFT, _RIGHT, _TOP, _BOTTOM = 8, 8, 12, 26
_FLOOR = HEIGHT - _BOTTOM
_MARKED = _TOP + 12
"""Where bars begin whose marks have their names above them."""
_MAX_COLUMNS = 200
_MAX_BARS = 64


def histogram(bins: Sequence[tuple[int, int, int]], unit: str, marks: Sequence[tuple[int, str]] = ()) -> str:
    """Bars of counts.

    Args:
        bins: (from, below, count), ascending and without gaps.
        unit: what the values are.
        marks: (value, name) of lines to draw, such as the median.
    """
    if not bins:
        return empty()
    while len(bins) > _MAX_BARS:  # pairs of neighbours in one
        pairs = (bins[number : number + 2] for number in range(0, len(bins), 2))
        bins = [(pair[0][0], pair[-1][1], sum(count for _, _, count in pair)) for pair in pairs]
    x = _log_axis(bins[0][0], bins[-1][1])
    most = max(count for _, _, count in bins)
    parts = []
    for low, high, count in bins:
        if count:
            height = max(1.5, count / most * (_FLOOR - _MARKED))
            left, right = x(low), x(high)
            width = max(right - left - min(1.0, (right - left) / 6), 0.5)
            title = f"{from_to(low, high)} {unit}: {count:,}"
            parts.append(_rect(left, _FLOOR - height, width, height, "bar", title))
    for value, name in marks:
        parts.append(f'<line class="mark" x1="{x(value):.1f}" x2="{x(value):.1f}" y1="{_MARKED}" y2="{_FLOOR}"/>')
        anchor = "end" if x(value) > WIDTH * 0.8 else "start"
        parts.append(_label(x(value), _MARKED - 4, f"{name} {value:,}", "mark-name", anchor))
    return _svg([*_log_ticks(x, bins[0][0], bins[-1][1]), *parts], f"distribution of {unit}")


def curve(values: Sequence[float], name: str, level: float, level_name: str) -> str:
    """A falling line of values by rank, over a logarithmic axis of ranks, with a level to compare it with.

    Args:
        values: by rank, the largest first.
        name: what they are.
        level, level_name: a horizontal line, and what it means.
    """
    if not values or values[0] <= 0:
        return empty()
    x = _log_axis(1, len(values))
    ranks = sorted({min(len(values), round(len(values) ** (step / 200))) for step in range(201)})
    top = max(values[0], level)

    def y(value: float) -> float:
        return _FLOOR - value / top * (_FLOOR - _TOP)

    points = " ".join(f"{x(rank):.1f},{y(values[rank - 1]):.1f}" for rank in ranks)
    parts = [
        f'<polygon class="area" points="{x(1):.1f},{_FLOOR} {points} {x(len(values)):.1f},{_FLOOR}"/>',
        f'<polyline class="line" points="{points}"/>',
        f'<line class="mark" x1="{_LEFT}" x2="{WIDTH - _RIGHT}" y1="{y(level):.1f}" y2="{y(level):.1f}"/>',
        _label(WIDTH - _RIGHT, max(y(level) - 4, 10), level_name, "mark-name", "end"),
    ]
    return _svg([*_log_ticks(x, 1, len(values)), *parts], name)


def bands(columns: Sequence[tuple[str, int, int, int]]) -> str:
    """A band and a line over shards: (name, low, middle, high) each, on a logarithmic scale from below to above."""
    if not columns:
        return empty()
    columns = _thin(columns)
    floor, ceiling = min(low for _, low, _, _ in columns), max(high for _, _, _, high in columns)
    up = _log_axis(floor, ceiling + 1)
    step = (WIDTH - _LEFT - _RIGHT) / len(columns)

    def y(value: int) -> float:
        return _FLOOR - (up(value) - _LEFT) / (WIDTH - _LEFT - _RIGHT) * (_FLOOR - _TOP)

    parts = []
    for number, (name, low, middle, high) in enumerate(columns):
        left, width = _LEFT + number * step, max(step - min(1.0, step / 4), 0.5)
        title = f"{name}: 5 % below {low:,}, median {middle:,}, 5 % above {high:,}"
        parts.append(_rect(left, y(high), width, max(y(low) - y(high), 1.5), "band", title))
        parts.append(_rect(left, y(middle) - 1, width, 2, "bar", title))
    ends = [
        _label(_LEFT, HEIGHT - 8, columns[0][0], "tick"),
        _label(_LEFT + 2, _TOP + 2, f"{ceiling:,}", "mark-name"),
        _label(_LEFT + 2, _FLOOR - 3, f"{floor:,}", "mark-name"),
    ]
    if len(columns) > 1:
        ends.append(_label(WIDTH - _RIGHT, HEIGHT - 8, columns[-1][0], "tick", "end"))
    return _svg([*parts, *ends], "by shard")


def bars(columns: Sequence[tuple[str, float, bool]], top: float) -> str:
    """A share a shard: (name, share, whether it stands out); the scale reaches at least to `top`."""
    if not columns:
        return empty()
    columns = _thin(columns)
    ceiling = max(top, *(share for _, share, _ in columns))
    step = (WIDTH - _LEFT - _RIGHT) / len(columns)
    parts = []
    for number, (name, share, is_odd) in enumerate(columns):
        height, width = max(1.5, share / ceiling * (_FLOOR - _TOP)), max(step - min(1.0, step / 4), 0.5)
        kind, title = "bar odd" if is_odd else "bar", f"{name}: {share:.1%}"
        parts.append(_rect(_LEFT + number * step, _FLOOR - height, width, height, kind, title))
    return _svg([*parts, _label(_LEFT + 2, _TOP + 2, f"{ceiling:.0%}", "mark-name")], "by shard")


def empty() -> str:
    """In place of a plot of nothing."""
    return '<p class="nothing">nothing to draw</p>'


def _thin(columns: Sequence[Column]) -> Sequence[Column]:
    """At most _MAX_COLUMNS of them, evenly."""
    stride = math.ceil(len(columns) / _MAX_COLUMNS)
    return columns[::stride]


def _log_axis(low: int, high: int) -> Callable[[float], float]:
    """x of a value: log2(1 + value), fitted between `low` and `high`."""
    begin, end = math.log2(1 + low), math.log2(1 + max(high, low + 1))
    scale = (WIDTH - _LEFT - _RIGHT) / (end - begin)
    return lambda value: _LEFT + (math.log2(1 + value) - begin) * scale


def _log_ticks(x: Callable[[float], float], low: int, high: int) -> Iterator[str]:
    last = -100.0
    for power in range(16):
        for factor in (1, 2, 5):
            value = factor * 10**power
            if low <= value <= high and x(value) - last > 44:
                last = x(value)
                anchor = "end" if last > WIDTH - 30 else "start" if last < 30 else "middle"
                yield f'<line class="rule" x1="{last:.1f}" x2="{last:.1f}" y1="{_TOP}" y2="{_FLOOR + 4}"/>'
                yield _label(last, HEIGHT - 8, _short(value), "tick", anchor)


def _short(value: int) -> str:
    for unit, size in (("G", 10**9), ("M", 10**6), ("k", 10**3)):
        if value >= size:
            return f"{value // size}{unit}"
    return str(value)


def _label(x: float, y: float, text: str, kind: str, anchor: str = "start") -> str:
    return f'<text class="{kind}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'


def _rect(x: float, y: float, width: float, height: float, kind: str, title: str) -> str:
    box = f'x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height:.1f}"'
    return f'<rect class="{kind}" {box}><title>{escape(title)}</title></rect>'


def _svg(parts: Sequence[str], name: str) -> str:
    floor = f'<line class="floor" x1="{_LEFT}" x2="{WIDTH - _RIGHT}" y1="{_FLOOR}" y2="{_FLOOR}"/>'
    inside = "".join((*parts, floor))
    return f'<svg class="plot" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(name)}">{inside}</svg>'
