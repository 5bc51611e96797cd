"""Reads positions of the order in one process: plans, what is held, and requests, put together.

    PositionReader.plan(ranges) -> plans        asks for what is not in memory; returns at once
    PositionReader.take(plan) -> where its positions lead, and what holds the sample of each

Plans are taken in any order, each once. `ReadAhead` takes them one after the other and plans what comes up, as far as memory
and requests in flight allow.
Invariant: what is in memory never changes the order.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from typing import Generic, TypeVar

from loaders.config import LoaderConfig
from loaders.order.samples import Located, SampleOrder
from loaders.reading.cache import BlockCache
from loaders.reading.fetches import BackgroundFetches, Fetches, end_with_trainer
from loaders.reading.planner import Plan, Planner, PositionRange
from loaders.reading.residency import Residency
from loaders.reading.source import LoadedSamples
from wds_tools.errors import UsageError

_RANGES_AHEAD = 64
_S = TypeVar("_S")


def open_reader(
    order: SampleOrder, config: LoaderConfig, num_positions: int, stride_positions: int
) -> PositionReader[LoadedSamples]:
    """The reader of this process.

    Args:
        order: which sample stands at a position.
        config: memory and cache.
        num_positions, stride_positions: see Planner.

    Raises:
        UsageError: memory_bytes do not hold what is read at one time, and scarce_memory was not asked for.
    """
    end_with_trainer()
    cache = BlockCache(config.cache_dir, config.cache_bytes) if config.cache_dir else None
    fetches = BackgroundFetches(order.sources, config, cache)
    reader = PositionReader(order, num_positions, stride_positions, config.memory_bytes, fetches)
    if reader.planner.needed_bytes > config.memory_bytes and not config.scarce_memory:
        raise UsageError(
            f"memory_bytes={config.memory_bytes:,} does not hold a block of {order.spec.block_bytes:,} bytes for each of the "
            f"{reader.planner.num_lanes:,} lanes that this process reads: give it {reader.planner.needed_bytes:,}, or use more "
            "processes, or a batch size and workers that divide the lanes (see `wds-tools simulate`); with scarce_memory=True it "
            "runs all the same, and fetches data more than once"
        )
    return reader


class PositionReader(Generic[_S]):
    """What one process reads.

    Args:
        order, num_positions, stride_positions, memory_bytes: see Planner.
        fetches: carries out the requests.
    """

    def __init__(
        self, order: SampleOrder, num_positions: int, stride_positions: int, memory_bytes: int, fetches: Fetches[_S]
    ) -> None:
        self.planner = Planner(order, num_positions, stride_positions, memory_bytes, fetches.is_mapped)
        self.residency: Residency[_S] = Residency(memory_bytes)
        self._fetches = fetches
        self._plans: dict[int, Plan] = {}
        """By identity, those not yet taken."""

    def plan(self, ranges: Sequence[PositionRange]) -> list[Plan]:
        """Ask for the samples of some ranges; each plan is to be taken once.

        Raises:
            FormatError, StorageError: a mapped source can't be read; of fetched ones, `take` raises.
        """
        if not ranges:
            return []
        plans, units = self.planner.plan(ranges)
        self._plans.update((id(plan), plan) for plan in plans)
        if any(not self.residency.keys() >= plan.counts.keys() for plan in plans):
            self._load(units)
        return plans

    def take(self, plan: Plan) -> tuple[Located, list[_S]]:
        """Where the positions of a plan lead, and what holds the sample of each. Waits for what is in flight.

        Raises:
            FormatError, StorageError: a sample can't be read; see SourceReader.load.
        """
        del self._plans[id(plan)]
        if not self.residency.keys() >= plan.counts.keys():  # dropped since, for want of memory
            self._load(plan.units)
        samples = self.residency.take(plan.counts)
        return plan.located, [samples[key] for key in plan.keys]

    def forget(self) -> None:
        """Drop all plans and what is in memory: something else comes."""
        self._fetches.cancel()
        self._plans.clear()
        self.residency.clear()
        self.planner.num_planned = 0

    @property
    def is_full(self) -> bool:
        """Whether to stop reading ahead: for the requests in flight, or for memory."""
        return self._fetches.is_full or self.residency.is_full

    def counts(self) -> dict[str, int]:
        """What this process has read since it started: requests, bytes, evicted (requests dropped too early), cache_*."""
        return {**self._fetches.counts(), "evicted": self.residency.num_evicted}

    def _load(self, units: Located) -> None:
        for request in self.planner.requests(units, self.residency.keys()):
            if request.num_bytes:
                self.residency.make_room(self._plans.values())
            self.residency.hold(request, self._fetches.load(request))


class ReadAhead(Generic[_S]):
    """Reads ranges in the order in which they were announced.

    Args:
        reader: of this process.
    """

    def __init__(self, reader: PositionReader[_S]) -> None:
        self._reader = reader
        self._at_once, self._is_local = reader.planner.at_once, reader.planner.is_local
        self._plans: deque[Plan] = deque()
        self._upcoming: Iterator[PositionRange] = iter(())

    @property
    def num_planned(self) -> int:
        """Number of ranges that are planned ahead."""
        return len(self._plans)

    def read(self, positions: PositionRange, upcoming: Iterator[PositionRange]) -> tuple[Located, list[_S]]:
        """See PositionReader.take.

        Args:
            positions: what is wanted.
            upcoming: the ranges that will be wanted next. Taken as far as is planned ahead, and kept while what is wanted is
                what it announced.

        Raises:
            FormatError, StorageError: a sample can't be read; what was planned is forgotten.
        """
        try:
            return self._reader.take(self._next_plan(positions, upcoming))
        except BaseException:
            self._plans.clear()
            self._reader.forget()
            raise

    def _next_plan(self, positions: PositionRange, upcoming: Iterator[PositionRange]) -> Plan:
        expected = self._plans[0].positions if self._plans else next(self._upcoming, None)
        if expected != positions:
            self._plans.clear()
            self._reader.forget()
            self._upcoming = upcoming
            self._plans += self._reader.plan([positions])  # alone, so that the first batch comes soon
        elif not self._plans:
            num_more = 0 if self._reader.is_full else self._at_once - positions.num_positions
            self._plans += self._reader.plan([positions, *self._next_ranges(num_more)])
        while not self._is_local and len(self._plans) <= _RANGES_AHEAD and not self._reader.is_full:
            if not (ranges := self._next_ranges(self._at_once)):
                break
            self._plans += self._reader.plan(ranges)
        return self._plans.popleft()

    def _next_ranges(self, num_positions: int) -> list[PositionRange]:
        """The ranges that come up, until they have so many positions."""
        ranges: list[PositionRange] = []
        while num_positions > 0 and (positions := next(self._upcoming, None)) is not None:
            ranges.append(positions)
            num_positions -= max(positions.num_positions, 1)
        return ranges
