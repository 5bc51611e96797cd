"""How far a run is: a bar on a terminal, a plain line every ten seconds elsewhere.

Shows samples, rejects, samples/s, time left from the share of the work units (lines, bytes, samples) that are done; of work on a
device images/s instead, and which share of the time it had nothing to do.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, fields
from operator import add, attrgetter, sub
from types import TracebackType
from typing import Any, Self, TextIO

from tqdm import tqdm

from wds_tools.terminal import printable

_LINE_EVERY_S = 10.0


@dataclass(frozen=True, slots=True)
class Advance:
    """What is new since the last report, or the sum of several."""

    units: int = 0
    """Work units: lines, bytes or samples, as the total counts them."""
    samples: int = 0
    """Samples that came of them, or whatever else is counted beside the work."""
    rejects: int = 0
    """Inputs that became no sample."""
    images: int = 0
    """Images that were encoded."""
    device_s: float = 0.0
    """Seconds that a device was in use, over all devices."""
    waited_s: float = 0.0
    """Of these, seconds with nothing to do."""

    def __add__(self, other: Advance) -> Advance:
        return Advance(*map(add, _values(self), _values(other)))

    def __sub__(self, other: Advance) -> Advance:
        return Advance(*map(sub, _values(self), _values(other)))


_values: Callable[[Advance], tuple[Any, ...]] = attrgetter(*(field.name for field in fields(Advance)))


@dataclass(frozen=True, kw_only=True)
class Shown:
    """Whether a run says how far it is."""

    help_group = "messages"

    quiet: bool = False
    """Show no progress."""


class Progress:
    """A context manager; call it with what is new, as it comes.

    Args:
        title: what is going on, one word.
        total: work units in all, 0 if unknown.
        quiet: count, but show nothing.
        unit: what is counted beside the work, in the plural.
        stream: where to write; a bar if it is a terminal.
    """

    def __init__(
        self, title: str, total: int, *, quiet: bool = False, unit: str = "samples", stream: TextIO | None = None
    ) -> None:
        self._title = title
        self._total = total
        self._quiet = quiet
        self._unit = unit
        self._stream = sys.stderr if stream is None else stream
        self._done = Advance()
        self._begun = self._shown = time.monotonic()
        self._bar: tqdm[None] | None = None

    def __enter__(self) -> Self:
        self._begun = self._shown = time.monotonic()
        if self._stream.isatty() and not self._quiet:
            layout = "{desc}: {percentage:3.0f}%|{bar}| {elapsed} elapsed, {remaining} left{postfix}"
            self._bar = tqdm(total=self._total or None, desc=self._title, file=self._stream, bar_format=layout, leave=False)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._bar is not None:
            self._bar.close()
        elif kind is None and self._shown != self._begun:
            self._print_line()

    def __call__(self, new: Advance) -> None:
        """Add to what is done."""
        self._done += new
        if self._bar is not None:
            self._bar.set_postfix_str(self._counts(), refresh=False)
            self._bar.update(new.units)
        elif not self._quiet and time.monotonic() - self._shown >= _LINE_EVERY_S:
            self._print_line()

    def _counts(self) -> str:
        done = self._done
        rejects = f", {done.rejects:,} rejects" if done.rejects else ""
        device = f", device waited {done.waited_s / done.device_s:.0%}" if done.device_s > 0 else ""
        speed = self._speed(done.images, "images") if done.images else self._speed(done.samples, self._unit)
        return f"{done.samples:,} {self._unit}{rejects}, {speed}{device}"

    def _speed(self, count: int, unit: str) -> str:
        each_s = count / max(time.monotonic() - self._begun, 1e-6)
        return f"{each_s:,.0f} {unit}/s" if each_s >= 10 else f"{each_s:.2g} {unit}/s"

    def _print_line(self) -> None:
        self._shown = time.monotonic()
        left = ""
        if self._total and self._done.units:
            left_s = (self._shown - self._begun) * max(self._total - self._done.units, 0) / self._done.units
            left = f", {100 * self._done.units / self._total:.0f} % done, about {tqdm.format_interval(left_s)} left"
        print(printable(f"{self._title}: {self._counts()}{left}"), file=self._stream, flush=True)
