"""A distribution of whole numbers in constant memory: exact below 16, then 16 bins an octave.

Counts, sum, least and most are exact; a quantile is that of its bin, so within 3 % of the value. Histograms add up, in any order.
Bins: value v with highest bit e >= 4 is in bin 16 (e - 3) + (v >> (e - 4)) - 16; as HdrHistogram lays them out.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

_BITS = 4
_BINS = 16 * 50
"""Values up to 2**53, and with room."""


@dataclass(kw_only=True)
class Histogram:
    """A histogram of values that are at least 0."""

    counts: NDArray[np.int64] = field(default_factory=lambda: np.zeros(_BINS, np.int64))
    count: int = 0
    total: int = 0
    least: int = 0
    most: int = 0

    def add(self, values: Iterable[int] | NDArray[Any]) -> None:
        """Count values."""
        array = np.asarray(values if isinstance(values, np.ndarray) else list(values), np.int64)
        if not len(array):
            return
        self.counts += np.bincount(bins_of(array), minlength=_BINS)
        self._note(len(array), int(array.sum()), int(array.min()), int(array.max()))

    def merge(self, other: Histogram) -> None:
        """Count what another one has counted."""
        if other.count:
            self.counts += other.counts
            self._note(other.count, other.total, other.least, other.most)

    @property
    def mean(self) -> float:
        """0 if nothing was counted."""
        return self.total / self.count if self.count else 0.0

    def quantile(self, share: float) -> int:
        """The value that this share of all lies at or below: exact at 0 and 1 and below 16, else the middle of a bin."""
        if not self.count or share <= 0:
            return self.least
        if share >= 1:
            return self.most
        bin_number = int(np.searchsorted(np.cumsum(self.counts), share * self.count))
        low, high = edges(bin_number)
        return min(max((low + high - 1) // 2, self.least), self.most)

    @property
    def octaves(self) -> NDArray[np.int64]:
        """Counts of the values below 16, below 32, below 64, ..."""
        octaves: NDArray[np.int64] = self.counts.reshape(-1, 16).sum(axis=1)
        return octaves

    def bars(self) -> list[tuple[int, int, int]]:
        """(from, below, count) of all bins from the first to the last that has something."""
        used = np.flatnonzero(self.counts)
        if not len(used):
            return []
        return [(*edges(number), int(self.counts[number])) for number in range(int(used[0]), int(used[-1]) + 1)]

    def _note(self, count: int, total: int, least: int, most: int) -> None:
        self.least = min(self.least, least) if self.count else least
        self.most = max(self.most, most)
        self.count += count
        self.total += total


def bins_of(values: NDArray[np.int64]) -> NDArray[np.int64]:
    """The bin of each value."""
    exponent = np.frexp(values.astype(np.float64))[1].astype(np.int64) - 1
    exponent -= (exponent > _BITS) & (values < (np.int64(1) << np.maximum(exponent, 0)))  # rounded up to a power of two
    shift = np.maximum(exponent - _BITS, 0)
    bins: NDArray[np.int64] = (shift << _BITS) + (values >> shift)
    return bins


def edges(number: int) -> tuple[int, int]:
    """The least value of a bin, and that of the next."""
    shift = max((number >> _BITS) - 1, 0)
    low = (number - (shift << _BITS)) << shift
    return low, low + (1 << shift)
