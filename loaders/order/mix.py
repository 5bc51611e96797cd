"""Mixtures: position of the order -> (source, epoch of that source, position in it), as a pure function.

Lane c follows a fixed pattern of sources, `Weights`, that has each in exact proportion per period and starts at slot c, so that
a batch (neighbouring lanes) is close to the proportions too. Draw k of a source on lane c is position k * lanes + c of that
source's epochs, one after the other, so a process that owns a lane of the mixture owns the same lanes of every source. When the
weights change at a position, the draws go on counting.
Invariant: on every lane the draws of a source count 0, 1, 2, ...: none is lost or repeated, whatever the schedule.
Cost: a table of one period for each set of weights; a position costs a few array operations for each change before it.
"""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from typing import NamedTuple

import numpy as np

from loaders.order.generations import Epochs
from loaders.order.plan import Ints
from wds_tools.errors import UsageError

MAX_PERIOD = 10_000
_LONG_ABSENCE = 100
"""Draws of every lane without a source, above which it is absent for long: with 8 lanes a sample, 800 steps."""


class Draws(NamedTuple):
    """What stands at some positions; arrays of one length."""

    source: Ints
    epoch: Ints
    position: Ints


class Weights:
    """One set of weights as a periodic pattern.

    Args:
        weights: one per source, 0 or more, not all 0. Taken as written in decimals: 0.7 and 0.3 give a period of 10.

    Raises:
        UsageError: they are not weights, or need a period above MAX_PERIOD: write them with fewer digits.
    """

    def __init__(self, weights: Sequence[float]) -> None:
        shares = [Fraction(repr(float(weight))) if np.isfinite(weight) else Fraction(-1) for weight in weights]
        if not shares or min(shares) < 0 or not sum(shares):
            raise UsageError(f"weights {tuple(weights)}: expected numbers of 0 or more, one above 0")
        shares = [share / sum(shares) for share in shares]
        period = np.lcm.reduce([share.denominator for share in shares], dtype=object)
        if period > MAX_PERIOD:
            raise UsageError(
                f"weights {tuple(weights)} repeat after {period} samples, at most {MAX_PERIOD} is kept: write fewer digits"
            )
        self.period = int(period)
        self.counts = np.array([int(share * self.period) for share in shares])
        # Source i's k-th slot would ideally lie at (k + 1/2) / count of the period: take them in that order.
        ideal = np.concatenate([(np.arange(count) + 0.5) / count for count in self.counts if count])
        owner = np.repeat(np.arange(len(shares)), self.counts)
        self.pattern = owner[np.lexsort((owner, ideal))]
        self._before = np.zeros((len(shares), self.period + 1), np.int64)
        for source in range(len(shares)):
            np.cumsum(self.pattern == source, out=self._before[source, 1:])

    def gap(self, source: int) -> int:
        """Slots from one of a source to its next, at most; 0 if it has none."""
        slots = np.flatnonzero(self.pattern == source)
        return int(np.diff(slots, append=slots[0] + self.period).max()) if len(slots) else 0

    def draws(self, source: Ints, lane: Ints, cursor: Ints) -> Ints:
        """Number of draws of its source on each lane before this cursor, counted from where these weights begin."""
        return self._until(source, lane + cursor) - self._until(source, lane)

    def _until(self, source: Ints, slot: Ints) -> Ints:
        periods, rest = np.divmod(slot, self.period)
        until: Ints = periods * self.counts[source] + self._before[source, rest]
        return until


class Mixture:
    """The order in which sources of these sizes are drawn from.

    Two sources of 6 and 3 samples, weighted 2 to 1, over 2 lanes. The second one is exhausted after 9 positions; one of the lanes
    begins its next epoch a draw earlier:

    >>> mixture = Mixture(num_samples=[6, 3], lanes=2, schedule=[(0, (2.0, 1.0))])
    >>> draws = mixture.locate(np.arange(12))
    >>> draws.source.tolist()
    [0, 1, 1, 0, 0, 0, 0, 1, 1, 0, 0, 0]
    >>> draws.position.tolist()
    [0, 1, 0, 1, 2, 3, 4, 0, 2, 5, 0, 1]
    >>> draws.epoch.tolist()
    [0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 1, 1]
    >>> mixture.exhausted_at(1)
    9

    Args:
        num_samples: samples of an epoch of each source.
        lanes: number of lanes, as in the plans of the sources.
        schedule: (position, weights), from position 0 on, ascending. One source needs no more than ((0, (1.0,)),).

    Raises:
        UsageError: the schedule does not ascend from 0, or its weights do not fit the sources.
    """

    def __init__(self, num_samples: Sequence[int], lanes: int, schedule: Sequence[tuple[int, Sequence[float]]]) -> None:
        starts = [start for start, _ in schedule]
        if starts[:1] != [0] or starts != sorted(set(starts)):
            raise UsageError(f"a schedule begins at step 0 and ascends, got {starts}")
        if any(len(weights) != len(num_samples) for _, weights in schedule):
            raise UsageError(f"{len(num_samples)} sources, but a schedule with {sorted({len(w) for _, w in schedule})} weights")
        self._num_samples = np.array(num_samples, np.int64)
        self._epochs = [Epochs(max(samples, 1)) for samples in num_samples]
        self._lanes = lanes
        self._starts = np.array(starts, np.int64)
        self._weights = [Weights(weights) for _, weights in schedule]

    def grow(self, source: int, position: int, num_samples: int) -> int:
        """A source has other samples from its first epoch on of which nothing is drawn before a position of the stream.

        Args:
            source: number of the source.
            position: from 0, through all epochs.
            num_samples: samples of each such epoch.

        Returns:
            The first of these epochs.
        """
        lane = np.arange(min(self._lanes, position))
        num_drawn = self._drawn(source, lane, -((lane - position) // self._lanes))
        drawn_until = int(np.where(num_drawn > 0, (num_drawn - 1) * self._lanes + lane + 1, 0).max(initial=0))
        first = self._epochs[source].change(drawn_until, num_samples)
        self._num_samples[source] = self._epochs[source].length(0)
        return first

    def locate(self, positions: Ints) -> Draws:
        """What stands at these positions.

        Args:
            positions: (K,) from 0, through all epochs, in any order.

        Returns:
            Arrays (K,).
        """
        lane, cursor = positions % self._lanes, positions // self._lanes
        if len(self._weights) == 1 and len(self._num_samples) == 1:
            source, draw = np.zeros_like(positions), cursor
        else:
            source, draw = self._draw(positions, lane, cursor)
        index = draw * self._lanes + lane
        epoch, position = np.divmod(index, self._num_samples[source])
        for number, epochs in enumerate(self._epochs):
            if not epochs.is_even:
                held = source == number
                epoch[held], position[held] = epochs.locate(index[held])
        return Draws(source, epoch, position)

    def longest_absence(self, source: int) -> int:
        """Positions without a draw of the source, at most, between two that have one; 0 if that is not long.

        Lanes walk the pattern one slot apart, so a gap in it that is wider than all lanes is crossed by all at once.
        """
        wider = max(weights.gap(source) for weights in self._weights) - self._lanes
        return (wider + 2) * self._lanes - 2 if wider > _LONG_ABSENCE else 0

    def exhausted_at(self, source: int, times: int = 1) -> int:
        """The number of positions until the source has been drawn in full, `times` times.

        Args:
            source: number of the source.
            times: passes over it.

        Raises:
            UsageError: its weight ends at 0 before.
        """
        lane = np.arange(min(self._lanes, int(self._num_samples[source]) * times))
        wanted = -(-(self._num_samples[source] * times - lane) // self._lanes)
        low, high = np.zeros_like(lane), np.ones_like(lane)
        while (todo := self._drawn(source, lane, high) < wanted).any():
            if int(high.max()) > 1 << 50:
                raise UsageError(f"source {source} is never seen in full: its weight becomes 0 before that")
            high[todo] *= 2
        while (low < high).any():  # the smallest cursor before which it was drawn as often as wanted
            middle = (low + high) // 2
            enough = self._drawn(source, lane, middle) >= wanted
            high = np.where(enough, middle, high)
            low = np.where(enough, low, middle + 1)
        return int(((high - 1) * self._lanes + lane).max(initial=-1)) + 1

    def _draw(self, positions: Ints, lane: Ints, cursor: Ints) -> tuple[Ints, Ints]:
        segment = np.searchsorted(self._starts, positions, "right") - 1
        source = np.empty_like(positions)
        for number, weights in enumerate(self._weights):
            held = segment == number
            slot = cursor[held] - self._first_cursor(number, lane[held]) + lane[held]
            source[held] = weights.pattern[slot % weights.period]
        return source, self._drawn(source, lane, cursor)

    def _drawn(self, source: int | Ints, lane: Ints, cursor: Ints) -> Ints:
        """Number of draws of its source on each lane before this cursor."""
        sources = np.broadcast_to(np.asarray(source), lane.shape)
        total = np.zeros_like(lane)
        for number, weights in enumerate(self._weights):
            begin = self._first_cursor(number, lane)
            end = cursor if number + 1 == len(self._weights) else np.minimum(cursor, self._first_cursor(number + 1, lane))
            total += weights.draws(sources, lane, np.maximum(end - begin, 0))
        return total

    def _first_cursor(self, number: int, lane: Ints) -> Ints:
        """The first cursor of each lane at which the weights of this number hold."""
        cursor: Ints = np.maximum(-(-(self._starts[number] - lane) // self._lanes), 0)
        return cursor
