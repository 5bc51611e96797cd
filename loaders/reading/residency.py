"""What is held in memory, by unit, and when it is dropped.

    hold(request, samples) -> take(counts) ... take(counts) -> dropped, when the order has taken all that a request brought

Invariant: a unit that a plan wants is never dropped. Memory: `memory_bytes` of fetched data, as it was estimated, plus what is in
flight; mapped data counts nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, KeysView, Mapping
from concurrent.futures import Future
from typing import Generic, TypeVar

from loaders.reading.planner import Plan, Request

_S = TypeVar("_S")


class Residency(Generic[_S]):
    """Units in memory.

    Args:
        memory_bytes: limit of the fetched data.
    """

    def __init__(self, memory_bytes: int) -> None:
        self._memory_bytes = memory_bytes
        self._units: dict[int, Request] = {}
        """By key, the request that brings it."""
        self._samples: dict[Request, _S | Future[_S]] = {}
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
        self._units.update(dict.fromkeys(request.keys, request))
        self._samples[request] = samples
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
        requests = {key: self._units[key] for key in counts}
        taken: dict[int, _S] = {}
        for key, request in requests.items():
            samples = self._samples[request]
            if isinstance(samples, Future):
                samples = self._samples[request] = samples.result()
            taken[key] = samples
        for key, count in counts.items():
            request = requests[key]
            request.num_left -= count
            if request.num_left == 0:
                self._drop(request)
        return taken

    def make_room(self, plans: Iterable[Plan]) -> None:
        """Drop what was loaded longest ago and is in none of these plans, until memory is within its limit."""
        if self._held_bytes <= self._memory_bytes:
            return
        wanted = {key for plan in plans for key in plan.counts}
        num_excess = self._held_bytes - self._memory_bytes * 7 // 8
        dropped: list[Request] = []
        for request, samples in self._samples.items():
            if request.num_bytes and not isinstance(samples, Future) and wanted.isdisjoint(request.keys):
                dropped.append(request)
                num_excess -= request.num_bytes
                if num_excess <= 0:
                    break
        for request in dropped:
            self._drop(request)
        self.num_evicted += len(dropped)

    def clear(self) -> None:
        """Drop everything."""
        self._units.clear()
        self._samples.clear()
        self._held_bytes = 0

    def _drop(self, request: Request) -> None:
        for key in request.keys:
            if self._units.get(key) is request:
                del self._units[key]
        del self._samples[request]
        self._held_bytes -= request.num_bytes
