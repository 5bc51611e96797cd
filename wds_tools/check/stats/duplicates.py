"""What stands in a dataset more than once, in bounded memory: hashes of contents, and of which samples they are.

Each content has a 64-bit hash. All are kept until there are more than `limit`; then only those below half of the hash space, then
a quarter, and so on. All copies of a content have one hash, so of what is kept every group is complete: up to `limit` samples the
result is exact (but for collisions: 3 in 10^6 that a million contents have one), above it is that of a random part of the
contents, and shares are estimates of the whole's.
Invariant: what is kept is a function of the contents, not of the order in which they came. Cost: 16 bytes a hash, three times
that while they are sorted.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, kw_only=True)
class Repeats:
    """Duplicates among the samples that were compared."""

    share_kept: float
    """Share of the hash space that was compared: 1 if everything was."""
    contents: int
    """Different contents among those that were compared."""
    samples: int
    """Samples that were compared."""
    extra: int
    """Samples whose content an earlier one had: what removing duplicates would remove."""
    groups: int
    """Contents that stand more than once."""
    largest: tuple[tuple[int, int], ...]
    """(copies, number of the first sample) of the largest groups."""

    @property
    def share(self) -> float:
        """Of the samples, what is superfluous."""
        return self.extra / self.samples if self.samples else 0.0


@dataclass(kw_only=True)
class HashSet:
    """Collects hashes and sample numbers."""

    limit: int
    """Hashes to keep at most."""
    share_kept: float = 1.0
    _hashes: list[NDArray[np.uint64]] = field(default_factory=list)
    _numbers: list[NDArray[np.int64]] = field(default_factory=list)
    _kept: int = 0

    def add(self, hashes: NDArray[np.uint64], numbers: NDArray[np.int64]) -> None:
        """Take the hashes of these samples."""
        is_kept = self._is_kept(hashes)
        self._hashes.append(hashes[is_kept])
        self._numbers.append(numbers[is_kept])
        self._kept += len(self._hashes[-1])
        while self._kept > self.limit:
            self._halve()

    def repeats(self, show: int = 10) -> Repeats:
        """What stands more than once, with the `show` largest groups."""
        hashes = np.concatenate([*self._hashes, np.zeros(0, np.uint64)])
        numbers = np.concatenate([*self._numbers, np.zeros(0, np.int64)])
        order = np.lexsort((numbers, hashes))
        hashes, numbers = hashes[order], numbers[order]
        begins = np.flatnonzero(np.append(True, hashes[1:] != hashes[:-1])) if len(hashes) else np.zeros(0, np.int64)
        copies = np.diff(np.append(begins, len(hashes)))
        top = np.lexsort((numbers[begins], -copies))[:show]
        largest = ((int(copies[group]), int(numbers[begins[group]])) for group in top if copies[group] > 1)
        return Repeats(
            share_kept=self.share_kept,
            contents=len(begins),
            samples=len(hashes),
            extra=len(hashes) - len(begins),
            groups=int((copies > 1).sum()),
            largest=tuple(largest),
        )

    def _is_kept(self, hashes: NDArray[np.uint64]) -> NDArray[Any]:
        if self.share_kept == 1.0:
            return np.ones(len(hashes), bool)
        return hashes < np.uint64(self.share_kept * 2.0**64)

    def _halve(self) -> None:
        self.share_kept /= 2
        kept = [self._is_kept(hashes) for hashes in self._hashes]
        self._hashes = [np.concatenate([part[keep] for part, keep in zip(self._hashes, kept, strict=True)])]
        self._numbers = [np.concatenate([part[keep] for part, keep in zip(self._numbers, kept, strict=True)])]
        self._kept = len(self._hashes[0])
