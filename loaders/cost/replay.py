"""Plays the part of one training process: what it would ask of storage, counted instead of fetched.

    SampleOrder, BatchPartition -> the training's own PositionReader over fetches that only count -> ProcessCost

A process that has few steps is played in full. Of any other, two windows are: from the start of the epoch, for what is in
memory at most, and from its middle, where whole cycles of its read-ahead are counted and taken for the whole epoch. Where not
even two cycles are few, sizes of requests are taken from a part of one, and a process with lanes of its own to read each once.
Invariant: planning is the training's own (loaders/reading); storage is taken to answer at once.
Cost: a few seconds, whatever the length of the epoch.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from loaders.config import LoaderConfig
from loaders.order.partition import BatchPartition
from loaders.order.plan import block_samples
from loaders.order.samples import OpenSource, SampleOrder
from loaders.reading.planner import PositionRange, Request
from loaders.reading.reader import PositionReader, ReadAhead
from wds_tools.dataset.offsets import OFFSETS_BYTES, REQUEST_BYTES, part_bytes
from wds_tools.dataset.samples import INDEX_BYTES, RUN_BYTES, RUN_SAMPLES
from wds_tools.format.offsets import OFFSET_BYTES, Groups
from wds_tools.storage import LocalStore
from wds_tools.storage.recent import Recent

_WINDOW_STEPS = 20_000
_WINDOW_SAMPLES = 4_000_000
_CYCLES = 3
_ENOUGH_EVICTED = 5_000
_SHARE_SAMPLES = 1 << 16
_INDEX_SAMPLE_BYTES = 20
"""Of a sample in an index file (docs/format.md)."""
_INDEX_RUNS = INDEX_BYTES // 2 // RUN_BYTES
"""Parsed runs that an IndexReader keeps; the other half of its memory are index files."""


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
    """For parts of the offsets file; for indices where there is none."""
    index_bytes: float
    """An index is fetched whole, and estimated at 20 bytes a sample of the shard."""
    first_requests: tuple[int, ...]
    """What the first batch waits for, and each of those that open lanes after it, offsets or indices included."""
    first_batch_bytes: int
    evicted: float
    """Requests whose samples are dropped before they are used up, for want of memory."""
    late: float
    """Share of the steps that ask for what they need only when they are due, since memory is too full to ask ahead."""
    peak_blocks: int
    """Blocks (or regions of small sources) that are in memory at once."""
    peak_bytes: int
    """Memory that it takes at once for what it has fetched and for indices; the interpreter and batches come on top."""


class CountingFetches:
    """Fetches that bring nothing and count what they would have fetched.

    Args:
        sources: what is read; only their manifests are looked at.
        as_remote: count local files as if they were fetched.
        check_crc: whether indices are needed, whatever else there is.
    """

    is_full = False

    def __init__(self, sources: Sequence[OpenSource], *, as_remote: bool, check_crc: bool = False) -> None:
        self._sources = sources
        self.is_mapped: Sequence[bool] = [not as_remote and isinstance(opened.store, LocalStore) for opened in sources]
        self.num_loads = self.num_requests = self.num_bytes = self.index_requests = self.index_bytes = 0
        self._groups = [
            None if check_crc or opened.manifest.offsets_hash is None else Groups(opened.manifest) for opened in sources
        ]
        self._offset_parts = [Recent[int, range](OFFSETS_BYTES, len) for _ in sources]
        self._index_files = [Recent[int, range](INDEX_BYTES // 2, len) for _ in sources]
        self._index_runs = [Recent[tuple[int, int], bool](_INDEX_RUNS) for _ in sources]

    def load(self, request: Request) -> None:
        """Count a request, and what of offsets or indices it needs."""
        source, shard, first, last = request.source, request.shard, request.first, request.last
        self.num_loads += 1
        if self.is_mapped[source]:
            return
        info = self._sources[source].manifest.shards[shard]
        if (groups := self._groups[source]) is not None:
            span = groups.span(shard, first, last)
            part = part_bytes(groups.file_bytes)
            for number in range(span.entry * OFFSET_BYTES // part, (span.entry + span.num_groups) * OFFSET_BYTES // part + 1):
                self._offset_parts[source].get(number, lambda _: self._fetch_about(min(part, groups.file_bytes), REQUEST_BYTES))
            first = first // span.group_samples * span.group_samples
            last = min(first + span.num_groups * span.group_samples, info.samples)
        else:
            for start in range(first // RUN_SAMPLES, -(-last // RUN_SAMPLES)):
                self._index_runs[source].get((shard, start), lambda key: self._parse_index(source, key[0]))
        self.num_requests += 1
        self.num_bytes += info.bytes * last // info.samples - info.bytes * first // info.samples

    def index_memory_bytes(self, times: float) -> int:
        """What is kept of offsets and indices once it has done so many times as much: no more than there are, and may stay."""
        total = 0.0
        for parts, groups in zip(self._offset_parts, self._groups, strict=True):
            total += min(parts.size * times, groups.file_bytes if groups else 0, OFFSETS_BYTES)
        for opened, files, runs in zip(self._sources, self._index_files, self._index_runs, strict=True):
            all_files = _INDEX_SAMPLE_BYTES * opened.manifest.samples
            all_runs = int((-(-opened.shards.num_samples // RUN_SAMPLES)).sum()) * RUN_BYTES
            total += min(files.size * times, all_files, INDEX_BYTES // 2) + min(
                runs.size * RUN_BYTES * times, all_runs, INDEX_BYTES // 2
            )
        return round(total)

    def cancel(self) -> None:
        """Nothing is in flight."""

    def counts(self) -> dict[str, int]:
        """Requests and bytes, without those of indices."""
        return {"requests": self.num_requests, "bytes": self.num_bytes}

    def _parse_index(self, source: int, shard: int) -> bool:
        self._index_files[source].get(shard, lambda shard: self._fetch_index(source, shard))
        return True

    def _fetch_index(self, source: int, shard: int) -> range:
        return self._fetch_about(_INDEX_SAMPLE_BYTES * self._sources[source].manifest.shards[shard].samples)

    def _fetch_about(self, num_bytes: int, request_bytes: int = sys.maxsize) -> range:
        self.index_requests += -(-num_bytes // request_bytes)
        self.index_bytes += num_bytes
        return range(num_bytes)  # something of that length


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
        return _Counts(*(after - before for after, before in zip(self, other, strict=True)))


class _Process:
    """Worker 0 of rank 0, which reads its part of one step after the other.

    Args:
        order, steps: what it reads.
        config: its workers and memory.
        as_remote: see simulate().
    """

    def __init__(self, order: SampleOrder, config: LoaderConfig, steps: BatchPartition, *, as_remote: bool) -> None:
        self.step_numbers = range(0, len(steps), max(config.num_workers, 1))
        """Its steps."""
        low, high = steps.part(0, 0)
        self._fetches = CountingFetches(order.sources, as_remote=as_remote, check_crc=config.check_crc)
        stride = self.step_numbers.step * steps.batch_size
        reader = PositionReader(order, high - low, stride, config.memory_bytes, self._fetches)
        self.planner, self.residency, self._read_ahead = reader.planner, reader.residency, ReadAhead(reader)
        self._sample_bytes = [max(opened.manifest.bytes // max(opened.manifest.samples, 1), 1) for opened in order.sources]
        self._order, self._steps = order, steps
        self._counts = dict.fromkeys(("steps", "late", "samples", "sample_bytes"), 0)

    def read(self, first: int, count: int, *, ahead: bool = True) -> _Counts:
        """Read so many of its steps, from its first-th on, or until it is clear that memory is too short.

        Returns:
            What it has done since it was made.
        """
        enough, counts = self.residency.num_evicted + _ENOUGH_EVICTED, self._counts
        for number in range(first, first + count):
            if self.residency.num_evicted > enough:
                break
            upcoming = self.step_numbers[number + 1 :] if ahead else range(0)
            is_due, num_loads = number > first and not self._read_ahead.num_planned, self._fetches.num_loads
            located, _ = self._read_ahead.read(self._positions_of(self.step_numbers[number]), map(self._positions_of, upcoming))
            counts["steps"] += 1
            counts["late"] += is_due and self._fetches.num_loads > num_loads
            counts["samples"] += len(located.source)
            counts["sample_bytes"] += int(np.bincount(located.source, minlength=len(self._sample_bytes)) @ self._sample_bytes)
        return self.done()

    def peak_bytes(self, num_samples: int) -> int:
        """Memory of what it has fetched, and of indices when it will have read so many samples; see ProcessCost."""
        return self.residency.peak_bytes + self._fetches.index_memory_bytes(max(num_samples / max(self._counts["samples"], 1), 1))

    def done(self) -> _Counts:
        """What it has done since it was made."""
        fetches = self._fetches
        return _Counts(
            **self._counts,
            requests=fetches.num_requests,
            bytes=fetches.num_bytes,
            index_requests=fetches.index_requests,
            index_bytes=fetches.index_bytes,
            evicted=self.residency.num_evicted,
        )

    def _positions_of(self, step: int) -> PositionRange:
        return PositionRange(self._order.latest_epoch, *self._steps.part(step, 0))

    def cycle_samples(self) -> float:
        """How many samples of each lane it has read when it has fetched from each of them once more."""
        order, spec, length = self._order, self._order.spec, self._order.length
        middle = np.arange(length // 2, min(length // 2 + _SHARE_SAMPLES, length))
        shares = np.bincount(order.locate(order.latest_epoch, middle).source, minlength=len(self._sample_bytes)) / len(middle)
        cycles = [1.0]
        for opened, share, sample_bytes in zip(order.sources, shares.tolist(), self._sample_bytes, strict=True):
            if not share:
                continue
            shards = opened.shards
            shard = shards[int(shards.num_samples.argmax())]
            block = int(block_samples(np.array(shard.samples), np.array(shard.bytes), opened.manifest.group_samples, spec))
            fetched_ahead = block + max(self.planner.ahead_bytes // sample_bytes, 1)
            cycles.append(min(max(spec.chunk_bytes // sample_bytes, block), fetched_ahead, shard.samples) / share)
        return min(max(cycles), length / spec.lanes)


def replay(order: SampleOrder, config: LoaderConfig, steps: BatchPartition, *, as_remote: bool) -> ProcessCost:
    """What worker 0 of rank 0 does in an epoch.

    Args:
        order, config, steps: what is read.
        as_remote: count local files as if they were fetched.
    """
    start, middle, first = (_Process(order, config, steps, as_remote=as_remote) for _ in range(3))
    first_batch = first.read(0, 1, ahead=False)
    opening = [first_batch]
    while len(opening) < min(order.spec.lanes_per_sample, len(first.step_numbers)):
        opening.append(first.read(len(opening), 1, ahead=False))
    asked = [counts.requests + counts.index_requests for counts in opening]
    num_steps, stride_samples = len(start.step_numbers), start.step_numbers.step * config.batch_size
    budget = min(_WINDOW_STEPS, max(_WINDOW_SAMPLES // first_batch.samples, _CYCLES + 1))
    cycle = max(round(start.cycle_samples() * order.spec.lanes / stride_samples), 1)
    is_own = not order.spec.lanes % stride_samples and not config.batch_size % steps.world_size
    is_whole, has_cycles = num_steps <= budget, 2 * cycle <= budget
    if is_whole:
        counts = start.read(0, num_steps)
    elif has_cycles:
        start.read(0, cycle)
        cycles = min(budget // cycle - 1, _CYCLES if is_own else budget)
        begin = min(num_steps // 2, num_steps - cycle * (1 + cycles))
        before = middle.read(begin, cycle)
        counts = middle.read(begin + before.steps, cycle * cycles).since(before)
    else:
        start.read(0, budget // 2)
        counts = middle.read(num_steps // 2, budget // 2)
    samples = counts.samples if counts.steps == num_steps else num_steps * first_batch.samples
    times = samples / counts.samples
    if not is_whole and not has_cycles and is_own and not counts.evicted:
        times *= counts.sample_bytes / counts.bytes  # what was fetched ahead will be used: each byte once
    return ProcessCost(
        samples=samples,
        lanes=start.planner.num_lanes,
        is_whole=counts.steps == num_steps,
        is_rough=not is_whole and not has_cycles,
        replayed_steps=start.done().steps + middle.done().steps,
        requests=counts.requests * times,
        bytes=counts.bytes * times,
        amplification=counts.bytes * times / (counts.sample_bytes * samples / counts.samples),
        index_requests=max(counts.index_requests * times, start.done().index_requests),  # those that stay are read at the start
        index_bytes=max(counts.index_bytes * times, start.done().index_bytes),
        first_requests=tuple(after - before for before, after in pairwise([0, *asked])),
        first_batch_bytes=first_batch.bytes + first_batch.index_bytes,
        evicted=counts.evicted * times,
        late=counts.late / counts.steps,
        peak_blocks=max(start.residency.peak_units, middle.residency.peak_units),
        peak_bytes=max(start.peak_bytes(samples), middle.peak_bytes(samples)),
    )
