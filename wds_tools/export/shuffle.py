"""Shuffle any number of records: each gets a key of its own, and ExternalSorts sort them by it.

    keys_from(seed, first, count)    keys of the records from number `first` on, in whatever process
    SortedRows(...)(low, high)       the records of some rows, once all were added to the sorts


The keys are independent and uniform over 64 bits. Sorting by such keys makes each permutation equally likely (two of n keys are
equal with probability below n**2 / 2**65; then the earlier record goes first). The order is a function of the seed and the number
of records, whatever the number of buckets and the size of the buffers. Keys are Philox's raw output, which no release of numpy
changes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import chain, islice
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from wds_tools.dataset.external_sort import bucket_of, merged

Ints = NDArray[np.int64]
_DRAW = 8192
_WORDS = 4
"""Keys that Philox makes at a time."""


def bucket_ends(seed: int, rows: int, num_buckets: int) -> Ints:
    """(num_buckets + 1,) the row with which each bucket begins, and the number of rows."""
    counts = np.zeros(num_buckets + 1, np.int64)
    for first in range(0, rows, _DRAW):
        keys = keys_from(seed, first, min(_DRAW, rows - first))
        counts[1:] += np.bincount(bucket_of(keys, num_buckets), minlength=num_buckets)
    return np.cumsum(counts)


class SortedRows:
    """The rows [low, high) in their random order; picklable.

    Args:
        folders: of the sorts, in the order of the records.
        ends: see bucket_ends.
        low, high: which rows their buckets are of; those at the ends may be of others too.
    """

    def __init__(self, folders: Sequence[Path], ends: Ints, low: int, high: int) -> None:
        self._folders, self._ends = folders, ends
        self.buckets = range(self._bucket(low), int(np.searchsorted(ends, high)))
        """Those that hold them."""
        self.is_shared = bool(self.buckets) and int(ends[self.buckets.start]) < low
        """Whether the first holds rows before them."""

    def __call__(self, low: int, high: int) -> Iterator[bytes]:
        """The records of some of the rows. Raises StorageError: they can't be read."""
        first = self._bucket(low)
        before = int(self._ends[first])
        records = chain.from_iterable(merged(self._folders, bucket) for bucket in range(first, self.buckets.stop))
        return (record for _, record in islice(records, low - before, high - before))

    def _bucket(self, row: int) -> int:
        """The bucket that holds a row."""
        return int(np.searchsorted(self._ends, row, side="right")) - 1


def keys_from(seed: int, first: int, count: int) -> NDArray[np.uint64]:
    """(count,) of these keys, from number `first` on."""
    generator = np.random.Philox(key=seed)
    generator.advance(first // _WORDS)
    return generator.random_raw(first % _WORDS + count)[first % _WORDS :]
