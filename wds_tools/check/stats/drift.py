"""Which shards differ from the others, by the lengths of their texts and by their codes.

A shard is outlined by two small histograms: texts by octave of length, codes by their number modulo BUCKETS. Its distance is the
total variation from a typical shard: the share that would have to move. Invariant: a shard alone is never odd.
Cost: 1 KB a shard.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from wds_tools.check.stats.histogram import Histogram

BUCKETS = 64
"""Classes of codes in a shard's histogram."""
_ODD_DISTANCE = 0.05
_ODD_TIMES_CHANCE = 3.0


@dataclass(frozen=True, kw_only=True)
class ShardStats:
    """How one shard differs from the others."""

    name: str
    samples: int
    text_mean: float
    text_p5: int
    text_p50: int
    text_p95: int
    text_distance: float = 0.0
    """Share of its texts that would have to lie in another octave of lengths to be spread as in a typical shard: 0 to 1."""
    code_distance: float = 0.0
    """The same for its codes, in 64 classes (their number modulo 64)."""
    is_odd: bool = False
    """Whether a distance is above 0.05 and three times what chance makes of a shard of this size."""


class Outline(NamedTuple):
    """The facts about a shard that are kept until all are read."""

    stats: ShardStats
    """Without its distances."""
    octaves: NDArray[np.int64]
    """Texts by octave of their length."""
    buckets: NDArray[np.int64]
    """Codes by their number modulo BUCKETS."""
    num_grids: int


def outline(name: str, num_samples: int, text: Histogram, buckets: NDArray[np.int64], num_grids: int) -> Outline:
    """The outline of a shard, from the lengths of its texts and the buckets of its codes."""
    p5, p50, p95 = map(text.quantile, (0.05, 0.5, 0.95))
    stats = ShardStats(name=name, samples=num_samples, text_mean=text.mean, text_p5=p5, text_p50=p50, text_p95=p95)
    return Outline(stats, text.octaves, buckets, num_grids)


def drift(outlines: Sequence[Outline]) -> Iterator[ShardStats]:
    """Each shard against a typical one."""
    octaves = _typical([shard.octaves for shard in outlines])
    buckets = _typical([shard.buckets for shard in outlines])
    for shard in outlines:
        text_distance, text_chance = _distance(shard.octaves, octaves, int(shard.octaves.sum()))
        code_distance, code_chance = _distance(shard.buckets, buckets, shard.num_grids)
        is_odd = any(
            distance > max(_ODD_DISTANCE, _ODD_TIMES_CHANCE * chance)
            for distance, chance in ((text_distance, text_chance), (code_distance, code_chance))
        )
        yield replace(shard.stats, text_distance=text_distance, code_distance=code_distance, is_odd=is_odd)


def _typical(counts: Sequence[NDArray[np.int64]]) -> NDArray[np.float64]:
    """The distribution of a shard in the middle: the median share of each class, which a few odd shards do not move."""
    shares = np.array([shard / shard.sum() for shard in counts if shard.any()])
    if not len(shares):
        return np.zeros(0)
    median = np.median(shares, axis=0)
    typical: NDArray[np.float64] = median if median.any() else shares.mean(axis=0)
    typical /= typical.sum()
    return typical


def _distance(part: NDArray[np.int64], p: NDArray[np.float64], independent: int) -> tuple[float, float]:
    """Total variation between two distributions, and what chance makes of it for a part of so many independent draws.

    The latter from the mean deviation of a binomial share, sqrt(2 p (1 - p) / (pi n)). The codes of one picture hang together,
    so pictures are the independent draws, not codes.
    """
    if not part.any():
        return 0.0, 0.0
    chance = np.sqrt(2 * p * (1 - p) / (np.pi * max(independent, 1))).sum() / 2
    return float(np.abs(part / part.sum() - p).sum() / 2), float(chance)
