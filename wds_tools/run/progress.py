"""How far a run is: a bar on a terminal, a plain line every ten seconds elsewhere.

Shows samples, rejects, samples/s, time left from the share of the work units (lines, bytes, samples) that are done; of work on a
device images/s instead, and which share of the time it had nothing to do.
"""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import Self, TextIO

from tqdm import tqdm

from wds_tools.terminal import printable

_LINE_EVERY_S = 10.0


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
        self._done = self._samples = self._rejects = 0
        self._device_s = self._waited_s = 0.0
        self._images = 0
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

    def __call__(
        self, done: int, samples: int, rejects: int, device_s: float = 0.0, waited_s: float = 0.0, images: int = 0
    ) -> None:
        """Add to what is done.

        Args:
            done: work units.
            samples, rejects: that came of them.
            device_s: seconds that a device was in use, over all devices.
            waited_s: of these, with nothing to do.
            images: that were encoded.
        """
        self._done += done
        self._samples += samples
        self._rejects += rejects
        self._device_s += device_s
        self._waited_s += waited_s
        self._images += images
        if self._bar is not None:
            self._bar.set_postfix_str(self._counts(), refresh=False)
            self._bar.update(done)
        elif not self._quiet and time.monotonic() - self._shown >= _LINE_EVERY_S:
            self._print_line()

    def _counts(self) -> str:
        rejects = f", {self._rejects:,} rejects" if self._rejects else ""
        device = f", device waited {self._waited_s / self._device_s:.0%}" if self._device_s > 0 else ""
        speed = self._speed(self._images, "images") if self._images else self._speed(self._samples, self._unit)
        return f"{self._samples:,} {self._unit}{rejects}, {speed}{device}"

    def _speed(self, count: int, unit: str) -> str:
        each_s = count / max(time.monotonic() - self._begun, 1e-6)
        return f"{each_s:,.0f} {unit}/s" if each_s >= 10 else f"{each_s:.2g} {unit}/s"

    def _print_line(self) -> None:
        self._shown = time.monotonic()
        left = ""
        if self._total and self._done:
            left_s = (self._shown - self._begun) * max(self._total - self._done, 0) / self._done
            left = f", {100 * self._done / self._total:.0f} % done, about {tqdm.format_interval(left_s)} left"
        print(printable(f"{self._title}: {self._counts()}{left}"), file=self._stream, flush=True)
