"""Shuffle any number of records: each gets a key of its own, and an ExternalSort sorts them by it.

The keys are independent and uniform over 64 bits. Sorting by such keys makes each permutation equally likely (two of n keys are
equal with probability below n**2 / 2**65; then the earlier record goes first). The order is a function of the seed and the number
of records, whatever the number of buckets and the size of the buffers. Keys are Philox's raw output, which no release of numpy
changes.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

_DRAW = 8192


def random_keys(seed: int) -> Iterator[int]:
    """The keys of a seed, 0 to 2**64 - 1, without end."""
    generator = np.random.Philox(key=seed)
    while True:
        yield from generator.random_raw(_DRAW).tolist()
