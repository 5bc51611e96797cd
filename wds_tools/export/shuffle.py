"""Shuffle any number of records in constant memory.

    add(record) -> draw a 64-bit key -> ExternalSort -> drain()

Every record gets a key of its own, independent and uniform, and what comes out is all records sorted by key. Sorting by
such keys makes each permutation equally likely (two of n keys are equal with probability below n**2 / 2**65; then the earlier
record goes first). The order is a function of the seed and the number of records, whatever the number of buckets and the size of
the buffers. Keys are Philox's raw output, which no release of numpy changes. Cost: that of the sort.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from wds_tools.dataset.external_sort import ExternalSort
from wds_tools.errors import UsageError

BUFFER_BYTES = 64 << 20
"""Records that wait in memory, over all buckets."""
_DRAW = 8192


class Shuffle:
    """Records in, the same records out in random order. First every `add`, then one `drain`.

    Args:
        folder: an empty, existing folder for the bucket files; the caller removes it.
        seed: 0 to 2**64 - 1. The same seed and records give the same order.
        num_buckets: such that all records / num_buckets fits in memory.
        buffer_bytes: see BUFFER_BYTES, the default.
    """

    def __init__(self, folder: Path, *, seed: int, num_buckets: int, buffer_bytes: int | None = None) -> None:
        if not 0 <= seed < 1 << 64:
            raise UsageError(f"seed {seed}: expected 0 to 2**64 - 1")
        self._keys = _draw_keys(seed)
        self._sort = ExternalSort(folder, num_buckets=num_buckets, buffer_bytes=buffer_bytes or BUFFER_BYTES)

    def add(self, record: bytes) -> None:
        """Take a record in. Raises as ExternalSort.add."""
        self._sort.add(next(self._keys), record)

    def drain(self) -> Iterator[bytes]:
        """All records in their new order. Raises as ExternalSort.drain."""
        return (record for _, record in self._sort.drain())


def _draw_keys(seed: int) -> Iterator[int]:
    generator = np.random.Philox(key=seed)
    while True:
        yield from generator.random_raw(_DRAW).tolist()
