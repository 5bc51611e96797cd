"""What is held in memory, by unit, and when it is dropped.

    hold(request, samples) -> take(counts) ... take(counts) -> dropped, when the order has taken all that a request brought

Invariant: a unit that a plan wants is never dropped. Memory: `memory_bytes` of fetched data, as it was estimated, plus what is in
flight; mapped data counts nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, KeysView, Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Generic, TypeVar

from loaders.reading.planner import Plan, Request

_S = TypeVar("_S")


@dataclass(slots=True, eq=False)
class _Held(Generic[_S]):
    """What a request brings."""

    request: Request
    samples: _S | Future[_S]


class Residency(Generic[_S]):
    """Units in memory.

    Args:
        memory_bytes: limit of the fetched data.
    """

    def __init__(self, memory_bytes: int) -> None:
        self._memory_bytes = memory_bytes
        self._units: dict[int, _Held[_S]] = {}
        """By key, in the order of their requests; those of one request share what it brings."""
        self._held_bytes = 0
        self.num_evicted = 0
        """Requests whose samples were dropped for want of memory and may be fetched again."""
        self.peak_units = 0
        """Largest number of units in memory at once."""
        self.peak_bytes = 0
        """Largest size of fetched data in memory at once."""

    def keys(self) -> KeysView[int]:
        """Keys of the units that are held or in flight."""
        return self._units.keys()

    @property
    def is_full(self) -> bool:
        """Whether to stop reading ahead."""
        return self._held_bytes > self._memory_bytes * 3 // 4

    def hold(self, request: Request, samples: _S | Future[_S]) -> None:
        """Keep what a request brings, or its future."""
        self._units.update(dict.fromkeys(request.keys, _Held(request, samples)))
        self._held_bytes += request.num_bytes
        self.peak_units = max(self.peak_units, len(self._units))
        self.peak_bytes = max(self.peak_bytes, self._held_bytes)

    def take(self, counts: Mapping[int, int]) -> dict[int, _S]:
        """The samples of each unit; waits for those in flight. Drops what is taken in full.

        Args:
            counts: key -> number of samples that the caller takes from the unit.

        Raises:
            FormatError, StorageError: a fetch failed.
        """
        taken: dict[int, _S] = {}
        units = [self._units[key] for key in counts]
        for key, held in zip(counts, units, strict=True):
            if isinstance(held.samples, Future):
                held.samples = held.samples.result()
            taken[key] = held.samples
        for count, held in zip(counts.values(), units, strict=True):
            held.request.num_left -= count
            if held.request.num_left == 0:
                self._drop(held)
        return taken

    def make_room(self, plans: Iterable[Plan]) -> None:
        """Drop what was loaded longest ago and is in none of these plans, until memory is within its limit."""
        if self._held_bytes <= self._memory_bytes:
            return
        wanted = {key for plan in plans for key in plan.counts}
        num_excess = self._held_bytes - self._memory_bytes * 7 // 8
        dropped: list[_Held[_S]] = []
        for held in dict.fromkeys(self._units.values()):
            request = held.request
            if request.num_bytes and not isinstance(held.samples, Future) and wanted.isdisjoint(request.keys):
                dropped.append(held)
                num_excess -= request.num_bytes
                if num_excess <= 0:
                    break
        for held in dropped:
            self._drop(held)
        self.num_evicted += len(dropped)

    def clear(self) -> None:
        """Drop everything."""
        self._units.clear()
        self._held_bytes = 0

    def _drop(self, held: _Held[_S]) -> None:
        for key in held.request.keys:
            if self._units.get(key) is held:
                del self._units[key]
        self._held_bytes -= held.request.num_bytes
