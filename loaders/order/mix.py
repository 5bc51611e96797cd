"""Mixtures: position of the order -> (source, epoch of that source, position in it), as a pure function.

The period of a set of `Weights` is a ring of slots, of which each source has a run of neighbours, as many as its weight says.
Cursor i of lane c draws from the source of slot (G i + H c) mod period: two rotations, by about sqrt(2) - 1 and the golden ratio,
which meet any run of slots in its proportion within few steps. So a lane has the weights along its cursors, exactly in each
period, and a batch (neighbouring lanes) has them too, however rare a source is.
Draw k of a source on lane c is position k * lanes + c of that source's epochs, one after the other, so a process that owns a lane
of the mixture owns the same lanes of every source. When the weights change at a position, the draws go on counting.
Invariant: on every lane the draws of a source count 0, 1, 2, ...: none is lost or repeated, whatever the schedule.
Cost: 4 bytes a slot for each set of weights; a position costs a few array operations for each change before it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from fractions import Fraction
from typing import NamedTuple

import numpy as np

from loaders.order.generations import Epochs
from loaders.order.plan import Ints
from wds_tools.errors import UsageError

MAX_PERIOD = 1 << 20
_MAX_SOURCES = 4096
_SQRT2, _GOLDEN = 0x6A09E667, 0x9E3779B9
"""sqrt(2) - 1 and (sqrt(5) - 1) / 2, times 2**32."""
_EVEN = 10


class Draws(NamedTuple):
    """What stands at some positions; arrays of one length."""

    source: Ints
    epoch: Ints
    position: Ints


class Weights:
    """One set of weights as a ring of slots.

    Args:
        weights: one per source, each 0 (it is not drawn from) or at least 2**-20 of their sum. Taken as written in decimals: 0.7
            and 0.3 give a period of 10. Where that would be above 2**20 slots, they are rounded to so many: see `error`.

    Raises:
        UsageError: they are not weights, or too many.
    """

    def __init__(self, weights: Sequence[float]) -> None:
        shares = [Fraction(repr(float(weight))) if np.isfinite(weight) else Fraction(-1) for weight in weights]
        total = sum(shares)
        if not shares or min(shares) < 0 or not total or len(shares) > _MAX_SOURCES:
            raise UsageError(f"weights {_short(weights)}: expected 1 to {_MAX_SOURCES} numbers of 0 or more, one above 0")
        if least := [number for number, share in enumerate(shares) if 0 < share * MAX_PERIOD < total]:
            raise UsageError(
                f"weights {_short(weights)}: that of source {least[0]} is {float(shares[least[0]] / total):.2g} of their sum: "
                "expected 0, which leaves it out, or at least 2**-20 (9.6e-07)"
            )
        shares = [share / total for share in shares]
        self.period = min(math.lcm(*(share.denominator for share in shares)), MAX_PERIOD)
        """Slots."""
        wanted = [share * self.period for share in shares]
        self.counts = np.array([int(slots) for slots in wanted])
        by_rest = sorted(range(len(wanted)), key=lambda source: int(wanted[source]) - wanted[source])
        self.counts[by_rest[: self.period - int(self.counts.sum())]] += 1
        """Slots of each source."""
        kept = zip(self.counts.tolist(), wanted, strict=True)
        self.error = max(float(abs(slots - exact) / exact) for slots, exact in kept if exact)
        """How far a source's share is from its weight, at most, as a part of the weight; 0 where the period is exact."""
        self._ends = np.cumsum(self.counts)
        self._turn = _turn(_SQRT2, self.period)
        back = pow(self._turn, -1, self.period)
        self._phase = _turn(_GOLDEN, self.period) * back % self.period
        if max(_quotients(self._phase, self.period)) > _EVEN:  # lanes would begin in clumps, and meet a rare source together
            self._phase = _turn(_GOLDEN, self.period, back) * back % self.period
        # Visit j of the ring is to slot turn * j; sorted: by source, then visits.
        visits = np.arange(self.period) * back % self.period
        self._visits = np.sort(np.repeat(np.arange(len(shares)), self.counts) * self.period + visits).astype(np.uint32)

    def source(self, lane: Ints, cursor: Ints) -> Ints:
        """The source that each lane draws from at this cursor, counted from where these weights begin."""
        visit = (lane * self._phase + cursor) % self.period
        return np.searchsorted(self._ends, visit * self._turn % self.period, "right")

    def draws(self, source: Ints, lane: Ints, cursor: Ints) -> Ints:
        """Number of draws of its source on each lane before this cursor, counted from where these weights begin."""
        begin = lane * self._phase % self.period
        return self._until(source, begin + cursor) - self._until(source, begin)

    def _until(self, source: Ints, visit: Ints) -> Ints:
        periods, rest = np.divmod(visit, self.period)
        before = np.searchsorted(self._visits, (source * self.period + rest).astype(np.uint32))
        until: Ints = periods * self.counts[source] + before - (self._ends - self.counts)[source]
        return until


def _turn(share: int, period: int, back: int = 1) -> int:
    """A step near share / 2**32 of the period that comes to every slot, and meets any run of slots in its proportion within few
    steps: of those, the one whose continued fraction has the smallest largest quotient, and that of `back` times it."""
    first = max(share * period >> 32, 1)
    near = (step for step in range(first, first + min(period // 8, 64) + 8) if math.gcd(step, period) == 1)
    return min(near, key=lambda step: max(*_quotients(step, period), *_quotients(step * back % period, period)))


def _quotients(numerator: int, denominator: int) -> Iterator[int]:
    while denominator:
        yield numerator // denominator
        numerator, denominator = denominator, numerator % denominator


def _short(weights: Sequence[float]) -> str:
    return f"({', '.join(map(str, weights[:8]))}{', ...' if len(weights) > 8 else ''})"


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
        self._grown: dict[int, Epochs] = {}
        self._lanes = lanes
        self._starts = np.array(starts, np.int64)
        self._weights = [Weights(weights) for _, weights in schedule]
        self.error = max(weights.error for weights in self._weights)
        """Of all weights; see Weights."""

    def grow(self, source: int, position: int, num_samples: int) -> int:
        """A source has other samples from its first epoch on of which nothing is drawn before a position of the stream.

        Args:
            source: number of the source.
            position: from 0, through all epochs.
            num_samples: samples of each such epoch.

        Returns:
            The first of these epochs.
        """
        drawn_until = self._drawn_until(source, position)
        self._grown[source] = epochs = self._epochs_of(source)
        return epochs.change(drawn_until, num_samples)

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
        for number, epochs in self._grown.items():
            held = source == number
            epoch[held], position[held] = epochs.locate(index[held])
        return Draws(source, epoch, position)

    def epochs_between(self, source: int, low: int, high: int) -> range:
        """The epochs of a source that positions low ... high - 1 of the stream may draw from."""
        lane = np.arange(min(self._lanes, high))
        drawn_before = self._drawn(source, lane, np.maximum(-((lane - low) // self._lanes), 0)) * self._lanes + lane
        epochs, last = self._epochs_of(source), self._drawn_until(source, high) - 1
        return range(epochs.at(int(drawn_before.min(initial=last + 1)))[0], epochs.at(last)[0] + 1) if last >= 0 else range(0)

    def positions_of(self, source: int, epoch: int, positions: Ints, high: int) -> Ints:
        """Where positions of an epoch of a source are drawn: the inverse of `locate`.

        Args:
            source: number of the source.
            epoch: of its own.
            positions: (K,) of that epoch.
            high: a position of the stream.

        Returns:
            Positions of the stream, (K,); `high` for those that are not drawn before it.
        """
        draw, lane = np.divmod(self._epochs_of(source).start(epoch) + positions, self._lanes)
        most = np.maximum(-((lane - high) // self._lanes), 0)
        cursor = self._cursor_after(source, lane, draw + 1, most) - 1
        is_drawn = self._drawn(source, lane, most) > draw
        return np.where(is_drawn, cursor * self._lanes + lane, high)

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
        high = np.ones_like(lane)
        while (todo := self._drawn(source, lane, high) < wanted).any():
            if int(high.max()) > 1 << 50:
                raise UsageError(f"source {source} is never seen in full: its weight becomes 0 before that")
            high[todo] *= 2
        return int(((self._cursor_after(source, lane, wanted, high) - 1) * self._lanes + lane).max(initial=-1)) + 1

    def _cursor_after(self, source: int, lane: Ints, wanted: Ints, high: Ints) -> Ints:
        """The smallest cursor of each lane, up to `high`, before which the source was drawn as often as wanted."""
        low = np.zeros_like(lane)
        while (low < high).any():
            middle = (low + high) // 2
            enough = self._drawn(source, lane, middle) >= wanted
            high = np.where(enough, middle, high)
            low = np.where(enough, low, np.minimum(middle + 1, high))
        return high

    def _drawn_until(self, source: int, position: int) -> int:
        """Behind the last sample of a source, through all its epochs, that is drawn before a position of the stream."""
        lane = np.arange(min(self._lanes, position))
        num_drawn = self._drawn(source, lane, -((lane - position) // self._lanes))
        return int(np.where(num_drawn > 0, (num_drawn - 1) * self._lanes + lane + 1, 0).max(initial=0))

    def _epochs_of(self, source: int) -> Epochs:
        return self._grown.get(source) or Epochs(int(self._num_samples[source]))

    def _draw(self, positions: Ints, lane: Ints, cursor: Ints) -> tuple[Ints, Ints]:
        segment = np.searchsorted(self._starts, positions, "right") - 1
        source = np.empty_like(positions)
        for number, weights in enumerate(self._weights):
            held = segment == number
            source[held] = weights.source(lane[held], cursor[held] - self._first_cursor(number, lane[held]))
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
