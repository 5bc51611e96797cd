"""Randomness that belongs to a sample: a function of (seed, epoch, key), so that it is the same after any resume, anywhere.

One 128-bit hash gives three independent draws; which text, and which images, are hashes of their own, so that these stay as they
are. XXH3 (Collet) is fixed by its specification. Cost: 0.5 us.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import accumulate
from typing import NamedTuple

import numpy as np
import xxhash

from wds_tools.errors import Reject, UsageError
from wds_tools.format.schema import PAIR_TYPES

Weights = tuple[tuple[str, float], ...]
"""(name of a text, its weight), by name."""
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


def is_image_trained(seed: int, epoch: int, key: str, number: int, ratio: float) -> bool:
    """Whether an image of an interleaved document is trained: a share of `ratio` is. `number`: of the image in it, from 0."""
    return xxhash.xxh3_64_intdigest(f"image {seed} {epoch} {key} {number}".encode()) < ratio * (1 << 64)


def generator_of(seed: int, epoch: int, key: str) -> np.random.Generator:
    """Random numbers for the caller's own code. Cost: 20 us."""
    return np.random.Generator(np.random.Philox(key=xxhash.xxh3_128_intdigest(f"transform {seed} {epoch} {key}".encode())))


def text_weights(where: str, weights: Mapping[str, float]) -> Weights:
    """Weights, by name. Raises UsageError, which names `where`, unless they are numbers of 0 or more, and one is above 0."""
    values = list(weights.values())
    if not all(type(value) in (int, float) and 0 <= value < float("inf") for value in values) or (values and not any(values)):
        raise UsageError(f"{where}: texts={dict(weights)}, expected a weight of 0 or more for each name, and one above 0")
    return tuple(sorted((name, float(weight)) for name, weight in weights.items()))


def check_texts(key: str, data_type: str, texts: Mapping[str, str | None] | None, weights: Weights) -> None:
    """Raise Reject if a pair has not all the texts that are chosen from; null is none, but the name is there."""
    missing = [name for name, _ in weights if name not in (texts or ())]
    if missing and data_type in PAIR_TYPES:
        known = ", ".join(texts or ()) or "none"
        raise Reject("unknown_text", f"{key} has no text named {missing[0]!r}: its texts are {known}")


def choose_text(seed: int, epoch: int, key: str, text: str, texts: Mapping[str, str | None] | None, weights: Weights) -> str:
    """The text of a sample: of those that it has, one by its weight; its own, if it has none of them.

    >>> texts = {"alt": "a cat", "recap": "A grey cat on a wall.", "ocr": None}
    >>> [choose_text(1, epoch, "k", "a cat", texts, (("alt", 1), ("ocr", 9), ("recap", 1))) for epoch in (3, 4)]
    ['a cat', 'A grey cat on a wall.']
    """
    given = [(words, weight) for name, weight in weights if weight and (words := (texts or {}).get(name))]
    ends = list(accumulate(weight for _, weight in given))
    draw = xxhash.xxh3_64_intdigest(f"text {seed} {epoch} {key}".encode()) / (1 << 64) * ends[-1] if given else 0
    return next((words for (words, _), end in zip(given, ends, strict=True) if draw < end), given[-1][0] if given else text)
