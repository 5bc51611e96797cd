"""Randomness that belongs to a sample: a function of (seed, epoch, key), so that it is the same after any resume, anywhere.

One 128-bit hash gives three independent draws. XXH3 (Collet) is fixed by its specification. Cost: 0.5 us.
"""

from __future__ import annotations

from typing import NamedTuple

import xxhash

_BITS = 40
_MASK = (1 << _BITS) - 1


class Choice(NamedTuple):
    """What is left to chance in an example."""

    form: float
    """In [0, 1): text to image if below t2i_ratio."""
    drop: float
    """In [0, 1): without its text if below unconditional_ratio."""
    wording: int
    """Modulo the number of prompts: which."""


def choose(seed: int, epoch: int, key: str) -> Choice:
    """The draws of a sample in an epoch of its source."""
    bits = xxhash.xxh3_128_intdigest(f"{seed} {epoch} {key}".encode())
    return Choice((bits & _MASK) / (1 << _BITS), (bits >> _BITS & _MASK) / (1 << _BITS), bits >> 2 * _BITS)
