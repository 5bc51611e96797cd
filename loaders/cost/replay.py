"""Plays the part of one training process: what it would ask of storage, counted instead of fetched.

    SampleOrder, BatchPartition -> the process's own Reader over sources that only count -> ProcessCost

A process that has few steps is played in full. Of any other, two windows are: from the start of the epoch, for what is in
memory at most, and from its middle, where whole cycles of its read-ahead are counted and taken for the whole epoch. Where not
even two cycles are few, sizes of requests are taken from a part of one, and a process with lanes of its own to read each once.
Invariant: planning is the training's own (prefetch.py); storage is taken to answer at once.
Cost: a few seconds, whatever the length of the epoch.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from loaders.config import LoaderConfig
from loaders.order.partition import BatchPartition
from loaders.order.plan import block_samples
from loaders.order.samples import OpenSource, SampleOrder
from loaders.reading.cache import BlockCache
from loaders.reading.fetches import Fetcher
from loaders.reading.prefetch import PositionRange, Reader, lanes_of
from loaders.reading.source import LoadedRows, SourceReader
from wds_tools.dataset.samples import IndexReader
from wds_tools.format.index import ShardIndex

_WINDOW_STEPS = 20_000
_WINDOW_SAMPLES = 4_000_000
_CYCLES = 3
_ENOUGH_EVICTED = 5_000
_SHARE_SAMPLES = 1 << 16
_INDEX_ROW_BYTES = 20
"""Of a sample in an index file (docs/format.md)."""


@dataclass(frozen=True, kw_only=True)
class ProcessCost:
    """What one process reads in an epoch: worker 0 of rank 0."""

    samples: int
    lanes: int
    """Lanes that it reads."""
    is_whole: bool
    """Replayed in full; else extrapolated."""
    is_rough: bool
    """Extrapolated from less than a cycle of its read-ahead, which is too long."""
    replayed_steps: int
    requests: float
    """For samples; mapped files need none."""
    bytes: float
    """Fetched for samples."""
    amplification: float
    """Fetched bytes for each byte of its samples: above 1 where it fetches what others use, fetches again, or has something
    left at the end of the epoch."""
    index_requests: float
    index_bytes: float
    """Estimated at 20 bytes a sample of the shard; an index is fetched whole."""
    first_batch_requests: int
    """What the first batch waits for, indices included."""
    first_batch_bytes: int
    evicted: float
    """Requests whose rows are dropped before they are used up, for want of memory."""
    late: float
    """Share of the steps that ask for what they need only when they are due, since memory is too full to ask ahead."""
    peak_blocks: int
    """Blocks (or regions of small sources) that are in memory at once."""
    peak_bytes: int
    """Fetched bytes in memory at once."""


class _CountedRows(LoadedRows):
    """Rows that nobody will look into."""

    __slots__ = ()

    def __init__(self, reader: SourceReader, shard: int, first: int, last: int, num_bytes: int) -> None:
        self.reader = reader
        self.shard = shard
        self.first = first
        self.last = last
        self.num_bytes = num_bytes
        self.left = 0
        self.keys = []


_NO_ROWS = ShardIndex(**dict.fromkeys(ShardIndex.__dataclass_fields__, np.zeros((0, 0), np.int64)))  # type: ignore[arg-type]


class _CountedIndices(IndexReader):
    """Counts what would be fetched of the indices."""

    num_requests = num_bytes = 0

    def parse(self, run: tuple[int, int]) -> ShardIndex:
        """Nothing; the file of the shard, if it is not in memory, is counted."""
        self._files.get(run[0], self.fetch)
        return _NO_ROWS

    def fetch(self, shard: int) -> Any:
        """Something as long as the index file would be."""
        size = _INDEX_ROW_BYTES * self._manifest.shards[shard].samples
        self.num_requests += 1
        self.num_bytes += size
        return range(size)


class _CountingReader(SourceReader):
    """Counts what it is asked for, and what it would fetch of the indices."""

    def __init__(self, as_remote: bool, opened: OpenSource, cache: BlockCache | None, num_sources: int) -> None:
        super().__init__(opened, cache, num_sources)
        self.is_mapped = self.is_mapped and not as_remote
        self.indices = self.counted_indices = _CountedIndices(opened.store, opened.manifest)

    def load(self, shard: int, first: int, last: int, *, again: bool = False) -> LoadedRows:  # noqa: ARG002
        """What SourceReader.load would give, but for the bytes."""
        if self.is_mapped:
            return _CountedRows(self, shard, first, last, 0)
        self.indices.read(shard, first, last)
        row = self.opened.manifest.shards[shard]
        num_bytes = row.bytes * last // row.samples - row.bytes * first // row.samples
        self.num_requests += 1
        self.num_bytes += num_bytes
        return _CountedRows(self, shard, first, last, num_bytes)


class _AtOnce(Fetcher[LoadedRows]):
    """Does what is submitted there and then."""

    def __init__(self) -> None:
        super().__init__(1)

    def submit(self, task: Callable[[], LoadedRows]) -> Future[LoadedRows]:
        future: Future[LoadedRows] = Future()
        future.set_result(task())
        return future


class _Counts(NamedTuple):
    """What a process has done."""

    steps: int
    late: int
    """Steps that asked for what they need only when they were due."""
    samples: int
    sample_bytes: int
    """Of these samples."""
    requests: int
    bytes: int
    index_requests: int
    index_bytes: int
    evicted: int

    def since(self, other: _Counts) -> _Counts:
        return _Counts(*(mine - before for mine, before in zip(self, other, strict=True)))


class _CountingProcess(Reader):
    """The Reader of worker 0 of a rank, which reads its part of one step after the other.

    Args:
        stream, steps: what it reads, as rank 0.
        config: its workers and memory.
        as_remote: see simulate().
    """

    def __init__(self, order: SampleOrder, config: LoaderConfig, steps: BatchPartition, *, as_remote: bool) -> None:
        self.numbers = range(0, len(steps), max(config.num_workers, 1))
        """Its steps."""
        low, high = steps.part(0, 0)
        self.own_lanes = lanes_of(order.spec.lanes, high - low, self.numbers.step * steps.batch_size)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what a run would warn of is among the results
            reader = partial(_CountingReader, as_remote)
            super().__init__(order, self.own_lanes, high - low, config.memory_bytes, open_reader=reader)
        self._pool = _AtOnce()
        self._row_bytes = [max(opened.manifest.bytes // max(opened.manifest.samples, 1), 1) for opened in order.sources]
        self._steps = steps
        self._num_steps = self._num_late = self._num_asked = self._samples = self._sample_bytes = 0
        self.peak_blocks = self.peak_bytes = 0

    def read(self, first: int, count: int, *, ahead: bool = True) -> _Counts:
        """Read so many of its steps, from its first-th on, or until it is clear that memory is too short.

        Returns:
            What it has done since it was made.
        """
        enough = self.num_evicted + _ENOUGH_EVICTED
        for at in range(first, first + count):
            if self.num_evicted > enough:
                break
            self._num_steps += 1
            upcoming = self.numbers[at + 1 :] if ahead else range(0)
            is_due, asked_before = at > first and not self._planned, self._num_asked
            located, _ = self.rows(self._part_of(self.numbers[at]), map(self._part_of, upcoming))
            self._num_late += is_due and self._num_asked > asked_before
            self._samples += len(located.source)
            self._sample_bytes += int(np.bincount(located.source, minlength=len(self._row_bytes)) @ self._row_bytes)
        return self.done()

    def done(self) -> _Counts:
        """What it has done since it was made."""
        sources = [source for source in self.sources if isinstance(source, _CountingReader)]
        return _Counts(
            steps=self._num_steps,
            late=self._num_late,
            samples=self._samples,
            sample_bytes=self._sample_bytes,
            requests=sum(source.num_requests for source in sources),
            bytes=sum(source.num_bytes for source in sources),
            index_requests=sum(source.counted_indices.num_requests for source in sources),
            index_bytes=sum(source.counted_indices.num_bytes for source in sources),
            evicted=self.num_evicted,
        )

    def _part_of(self, step: int) -> PositionRange:
        return PositionRange(0, *self._steps.part(step, 0))

    def cycle_depth(self) -> float:
        """How deep in its lanes this process is when it has fetched from each of them once more."""
        spec, length = self._order.spec, self._order.length
        depth = length / spec.lanes
        middle = np.arange(length // 2, min(length // 2 + _SHARE_SAMPLES, length))
        shares = np.bincount(self._order.locate(0, middle).source, minlength=len(self.sources)) / len(middle)
        rows = [1.0]
        for opened, share, row_bytes in zip(self._order.sources, shares.tolist(), self._row_bytes, strict=True):
            shard = max(opened.manifest.shards, key=lambda row: row.samples)
            block = int(block_samples(np.array(shard.samples), np.array(shard.bytes), spec))
            most = min(max(spec.chunk_bytes // row_bytes, block), block + max(self._ahead_bytes // row_bytes, 1), shard.samples)
            rows.append(most / (share or 1))
        return min(max(rows), depth)

    def _load(self, reader: SourceReader, shard: int, first: int, last: int, keys: Sequence[int], left: int) -> None:
        super()._load(reader, shard, first, last, keys, left)
        self._num_asked += 1
        self.peak_blocks = max(self.peak_blocks, len(self._loaded))
        self.peak_bytes = max(self.peak_bytes, self._held_bytes)


def replay(order: SampleOrder, config: LoaderConfig, steps: BatchPartition, *, as_remote: bool) -> ProcessCost:
    """What worker 0 of rank 0 does in an epoch.

    Args:
        stream, config, steps: what is read.
        as_remote: count local files as if they were fetched.
    """
    start, middle, first = (_CountingProcess(order, config, steps, as_remote=as_remote) for _ in range(3))
    first_batch = first.read(0, 1, ahead=False)
    own_steps, stride_samples = len(start.numbers), start.numbers.step * config.batch_size
    budget = min(_WINDOW_STEPS, max(_WINDOW_SAMPLES // first_batch.samples, _CYCLES + 1))
    cycle = max(round(start.cycle_depth() * order.spec.lanes / stride_samples), 1)
    is_own = not order.spec.lanes % stride_samples and not config.batch_size % steps.world_size
    is_whole, has_cycles = own_steps <= budget, 2 * cycle <= budget
    if is_whole:
        counts = start.read(0, own_steps)
    elif has_cycles:
        start.read(0, cycle)
        cycles = min(budget // cycle - 1, _CYCLES if is_own else budget)
        at = min(own_steps // 2, own_steps - cycle * (1 + cycles))
        before = middle.read(at, cycle)
        counts = middle.read(at + before.steps, cycle * cycles).since(before)
    else:
        start.read(0, budget // 2)
        counts = middle.read(own_steps // 2, budget // 2)
    samples = counts.samples if counts.steps == own_steps else own_steps * first_batch.samples
    times = samples / counts.samples
    if not is_whole and not has_cycles and is_own and not counts.evicted:
        times *= counts.sample_bytes / counts.bytes  # what was fetched ahead will be used: each byte once
    return ProcessCost(
        samples=samples,
        lanes=start.own_lanes,
        is_whole=counts.steps == own_steps,
        is_rough=not is_whole and not has_cycles,
        replayed_steps=start.done().steps + middle.done().steps,
        requests=counts.requests * times,
        bytes=counts.bytes * times,
        amplification=counts.bytes * times / (counts.sample_bytes * samples / counts.samples),
        index_requests=counts.index_requests * times,
        index_bytes=counts.index_bytes * times,
        first_batch_requests=first_batch.requests + first_batch.index_requests,
        first_batch_bytes=first_batch.bytes + first_batch.index_bytes,
        evicted=counts.evicted * times,
        late=counts.late / counts.steps,
        peak_blocks=max(start.peak_blocks, middle.peak_blocks),
        peak_bytes=max(start.peak_bytes, middle.peak_bytes),
    )
