"""How many requests to have in flight: twice as many while that brings clearly more bytes a second, one step back if not.

    Concurrency(most).done(num_bytes, is_busy=...) after each request;  .level is how many may be in flight now

A level is judged when as many requests as it has have ended while all its places were taken. What a link, a bucket or this
process can do changes, so a level that was not left for _SETTLED judgements is doubled once more to see.
Invariant: 1 <= level <= most. Cost: a few additions a request.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator

FIRST_LEVEL = 64
_GAIN = 1.2
"""What twice as many requests have to bring."""
_SETTLED = 32
_LATEST = 256


def levels(most: int) -> Iterator[int]:
    """The levels on the way up; the last for ever."""
    level = min(FIRST_LEVEL, most)
    while True:
        yield level
        level = min(2 * level, most)


class Concurrency:
    """The level of one process; to be used under the lock of whoever counts its requests.

    Args:
        most: highest level.
        clock: seconds.
    """

    def __init__(self, most: int, clock: Callable[[], float] = time.monotonic) -> None:
        self.level = next(levels(most))
        self._most, self._clock = most, clock
        self._rate_below = 0.0
        """Bytes a second at half of this level; 0: it is settled."""
        self._num_settled = 0
        self._ended: deque[tuple[float, int]] = deque(maxlen=_LATEST)
        """Time and bytes of the latest requests."""
        self._begin()
        self._since = 0.0
        """When this judgement began: with a request that ended, so that no latency counts before the first; 0: not yet."""

    def _begin(self) -> None:
        self._since, self._num_ended, self._num_bytes = self._clock(), 0, 0

    def done(self, num_bytes: int, *, is_busy: bool) -> None:
        """A request has ended.

        Args:
            num_bytes: that it brought.
            is_busy: whether all places of this level were taken, with more to ask for: else nothing can be learnt.
        """
        self._ended.append((self._clock(), num_bytes))
        self._num_ended += 1
        self._num_bytes += num_bytes
        if not is_busy or not self._since:
            self._begin()
        elif self._num_ended >= self.level:
            rate = self._num_bytes / max(self._clock() - self._since, 1e-9)
            self._judge(rate)
            self._begin()

    @property
    def bytes_per_s(self) -> float:
        """What the latest requests brought, up to now."""
        ended = list(self._ended)
        return sum(num_bytes for _, num_bytes in ended[1:]) / max(self._clock() - ended[0][0], 1e-9) if ended else 0.0

    def _judge(self, rate: float) -> None:
        is_better = rate > _GAIN * self._rate_below
        if self._rate_below and not is_better:
            self.level = max(self.level // 2, 1)
            self._rate_below, self._num_settled = 0.0, 1
        elif self._num_settled and self._num_settled < _SETTLED:
            self._num_settled += 1
        elif self.level < self._most:
            self._rate_below, self._num_settled = rate, 0
            self.level = min(2 * self.level, self._most)
        else:
            self._rate_below = 0.0
