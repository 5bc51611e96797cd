"""Reads positions of a stream, ahead of need: the plan knows what comes next.

    Reader.rows(part, upcoming) -> (LoadedRows, row) of each position, in order

For each part that comes up, the pieces not yet in memory are merged where they lie side by side, read on along their lane as
far as memory allows, and fetched in the background, up to `_IN_FLIGHT` requests at a time. Pieces are dropped when all
their rows were handed out; a source that fits memory is kept, in regions of up to 4 MiB.
Invariant: what is in memory never changes the order. Memory: `memory_bytes` of fetched data, plus what is in flight.
"""

from __future__ import annotations

import math
import os
import warnings
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from typing import NamedTuple

import numpy as np

from loaders.order.plan import MAX_CHUNK_BYTES, SMALL_BYTES, Ints, block_samples, chunk_samples
from loaders.order.samples import Located, OpenSource, SampleOrder
from loaders.reading.cache import BlockCache
from loaders.reading.fetches import Fetcher, end_with_trainer
from loaders.reading.source import LoadedRows, SourceReader

_IN_FLIGHT = 16
_MAX_REQUEST_BYTES = 8 << 20
_PARTS_AHEAD = 64
_PLANNED_AT_ONCE = 1024
"""Positions."""
_CHUNKS_SIDE_BY_SIDE = 8
_ROW_BYTES = 64
"""What a row of a mapped shard takes in memory."""


class PositionRange(NamedTuple):
    """Positions range(low, high, stride) of a stream's epoch."""

    epoch: int
    low: int
    high: int
    stride: int = 1

    @property
    def num_positions(self) -> int:
        """How many they are."""
        return len(range(self.low, self.high, self.stride))


class Planned(NamedTuple):
    part: PositionRange
    located: Located
    all_to_load: Located
    """The same, of all that was planned together, with the units to load: pieces, or regions of a source that is kept whole."""
    own: slice
    """Where this part stands in them."""
    keys: list[int]
    """Of the unit of each position."""
    counts: dict[int, int]
    """Key of each unit -> positions of the part that it serves."""


def lanes_of(lanes: int, part_samples: int, stride_samples: int) -> int:
    """How many of the lanes a process reads that takes so many consecutive positions out of every `stride_samples`."""
    return min(lanes, part_samples * (lanes // math.gcd(lanes, stride_samples)))


class Reader:
    """What one process reads of a stream.

    Args:
        stream: the order.
        own_lanes: lanes that this process reads, of `stream.order.lanes`.
        side_by_side: how many of them are neighbours of each other.
        memory_bytes: of fetched data.
        cache: on a local disk, for what is fetched.
        open_reader: opens a source; a simulation opens it to count only.
    """

    def __init__(
        self,
        order: SampleOrder,
        own_lanes: int,
        side_by_side: int,
        memory_bytes: int,
        cache: BlockCache | None = None,
        open_reader: Callable[[OpenSource, BlockCache | None, int], SourceReader] = SourceReader,
    ) -> None:
        self._order = order
        self._cache = cache
        self._memory_bytes = memory_bytes
        self.sources = [open_reader(opened, cache, len(order.sources)) for opened in order.sources]
        self._any_remote = any(not source.is_mapped for source in self.sources)
        regions = [self._rows_of_regions(source, own_lanes, side_by_side) for source in self.sources]
        self._region_base = np.cumsum([0, *map(len, regions)])
        self._region_rows = np.concatenate(regions)
        """Rows of a region of each shard of each source; 0 for sources that are read in pieces."""
        lane_bytes = memory_bytes // 2 // max(own_lanes, 1) // len(self.sources)
        self._ahead_bytes = min(max(lane_bytes - order.spec.block_bytes, 0), MAX_CHUNK_BYTES)
        self._loaded: dict[int, LoadedRows | Future[LoadedRows]] = {}
        self._held_bytes = 0
        self._planned: deque[Planned] = deque()
        self._upcoming: Iterator[PositionRange] = iter(())
        self._num_planned = 0
        self._own_lanes = own_lanes
        self._at_once = _PLANNED_AT_ONCE
        if self._any_remote:
            largest = max(source.most_row_bytes for source in self.sources)
            self._at_once = min(_PLANNED_AT_ONCE, max(memory_bytes // 8 // max(order.spec.block_bytes, largest), 1))
        self._in_flight: deque[Future[LoadedRows]] = deque()
        pieces = not self._region_rows.all() and self._any_remote
        if pieces and own_lanes * order.spec.block_bytes * len(self.sources) > memory_bytes * 3 // 4:
            warnings.warn(
                f"memory_bytes={memory_bytes:,} does not hold a block of {order.spec.block_bytes:,} bytes for each of the "
                f"{own_lanes:,} lanes that this process reads: it will fetch data more than once. Give it more "
                "memory, use more processes, or a batch size and workers that divide the lanes; see `wds-tools simulate`",
                stacklevel=2,
            )
        self._pool: Fetcher[LoadedRows] | None = None
        self._pid = os.getpid()
        end_with_trainer()
        self.num_evicted = 0
        """Runs of rows that were dropped for want of memory and may be fetched again."""

    def rows(self, part: PositionRange, upcoming: Iterator[PositionRange]) -> tuple[Located, list[LoadedRows]]:
        """Where the positions of a part lead, and the rows in memory that hold them.

        Args:
            part: what is wanted.
            upcoming: the parts that this process will be asked for next. Taken as far as is planned ahead, and kept while
                what is wanted is what it said.

        Raises:
            FormatError, StorageError: see SourceReader.load.
        """
        expected = self._planned[0].part if self._planned else next(self._upcoming, None)
        if expected != part:
            self.forget()
            self._upcoming = upcoming
            self._plan([part])  # alone, so that the first batch comes soon
        elif not self._planned:
            self._plan([part, *self._next_parts(0 if self._is_full() else self._at_once - part.num_positions)])
        while self._any_remote and len(self._planned) <= _PARTS_AHEAD and not self._is_full():
            if not (parts := self._next_parts(self._at_once)):
                break
            self._plan(parts)
        planned = self._planned.popleft()
        try:
            return planned.located, self._take(planned)
        except BaseException:
            self.forget()
            raise

    def ask(self, parts: Sequence[PositionRange]) -> list[Planned]:
        """Ask for parts, whenever they will be wanted: `answer` takes each, in any order. Not to be mixed with `rows`."""
        return self._plan(parts) if parts else []

    def answer(self, asked: Sequence[Planned]) -> list[tuple[Located, list[LoadedRows]]]:
        """What `rows` would return for each of these parts that were asked for."""
        answered = set(map(id, asked))
        self._planned = deque(other for other in self._planned if id(other) not in answered)
        return [(planned.located, self._take(planned)) for planned in asked]

    def counts(self) -> dict[str, int]:
        """What this process has read since it started: requests, bytes, cache hits and misses, runs of rows dropped too early."""
        counts = {"requests": 0, "bytes": 0, "evicted": self.num_evicted}
        for source in self.sources:
            counts["requests"] += source.num_requests
            counts["bytes"] += source.num_bytes
        if self._cache is not None:
            counts |= {f"cache_{name}": count for name, count in self._cache.stats().items()}
        return counts

    def forget(self) -> None:
        """Drop what was planned and fetched: something else comes than was said to come."""
        for future in self._in_flight:
            future.cancel()
        self._planned.clear()
        self._in_flight.clear()
        self._loaded.clear()
        self._held_bytes = 0
        self._num_planned = 0

    def _next_parts(self, num_positions: int) -> list[PositionRange]:
        """The parts that come up, until they have so many positions."""
        parts: list[PositionRange] = []
        while num_positions > 0 and (part := next(self._upcoming, None)) is not None:
            parts.append(part)
            num_positions -= max(part.num_positions, 1)
        return parts

    def _is_full(self) -> bool:
        while self._in_flight and self._in_flight[0].done():
            self._in_flight.popleft()
        return len(self._in_flight) >= _IN_FLIGHT or self._held_bytes > self._memory_bytes * 3 // 4

    def _plan(self, parts: Sequence[PositionRange]) -> list[Planned]:
        """Locate the positions of these parts, and ask for what is not in memory. Small parts are dear one by one."""
        epoch, length = parts[0].epoch, self._order.length
        ranges = [np.arange(part.low, part.high, part.stride) + (part.epoch - epoch) * length for part in parts]
        located = self._order.locate(epoch, np.concatenate(ranges))
        to_load = self._with_regions(located)
        self._num_planned += len(located.sample_index)
        begin = 0
        new: list[Planned] = []
        for part, positions in zip(parts, ranges, strict=True):
            own = slice(begin, begin := begin + len(positions))
            keys = to_load.key[own].tolist()
            planned = Planned(
                part,
                Located(*[column[own] for column in located]),
                to_load,
                own,
                keys,
                {keys[0]: 1} if len(keys) == 1 else Counter(keys),
            )
            new.append(planned)
        self._planned.extend(new)
        if any(not self._loaded.keys() >= planned.counts.keys() for planned in new):
            self._request_missing(to_load)
        return new

    def _with_regions(self, located: Located) -> Located:
        """The same, with regions in place of shuffle blocks for sources that are kept whole."""
        if not self._region_rows.any():
            return located
        shard = self._region_base[located.source] + located.shard
        rows = self._region_rows[shard]
        whole = rows > 0
        size = np.maximum(rows, 1)
        region = located.sample_index // size
        key = -1 - ((shard << 32) + region)
        return located._replace(
            key=np.where(whole, key, located.key),
            first=np.where(whole, region * size, located.first),
            num_samples=np.where(whole, size, located.num_samples),
            num_done=np.where(whole, 0, located.num_done),
            num_in_run=np.where(whole, size, located.num_in_run),
        )

    def _request_missing(self, to_load: Located) -> None:
        keys, at = np.unique(to_load.key, return_index=True)
        missing = [index for key, index in zip(keys.tolist(), at.tolist(), strict=True) if key not in self._loaded]
        if missing:
            self._request(Located(*(column[missing] for column in to_load)))

    def _request(self, new: Located) -> None:
        """Load these units, the neighbours among them together."""
        ascending = np.lexsort((new.first, new.shard, new.source))
        source, shard, key, first, num_rows, done, run = (
            column[ascending].tolist()
            for column in (new.source, new.shard, new.key, new.first, new.num_samples, new.num_done, new.num_in_run)
        )
        begin = 0
        while begin < len(source):
            where = source[begin], shard[begin]
            reader = self.sources[where[0]]
            row_bytes = reader.row_bytes(where[1])
            end, stop = begin + 1, first[begin] + num_rows[begin]
            most = first[begin] + max(_MAX_REQUEST_BYTES // row_bytes, 1)
            while end < len(source) and (source[end], shard[end]) == where and first[end] == stop and stop < most:
                stop += num_rows[end]
                end += 1
            keys = key[begin:end]
            left = sum(num_rows[begin:end]) - sum(done[begin:end])
            last = end - 1
            beyond = min(run[last], num_rows[last] + self._ahead_bytes // row_bytes) - num_rows[last]
            if key[last] >= 0 and not reader.is_mapped and self._num_planned > self._own_lanes:  # first a little of each lane
                row = reader.opened.manifest.shards[where[1]]
                block = int(block_samples(np.array(row.samples), np.array(row.bytes), self._order.spec))
                for offset in range(num_rows[last], num_rows[last] + beyond, block):
                    if key[last] + offset in self._loaded:
                        break
                    size = min(block, run[last] - offset)
                    keys.append(key[last] + offset)
                    left += size
                    stop += size
            self._load(reader, where[1], first[begin], stop, keys, left if key[last] >= 0 else -1)
            begin = end

    def _load(self, reader: SourceReader, shard: int, first: int, last: int, keys: Sequence[int], left: int) -> None:
        last = min(last, reader.opened.manifest.shards[shard].samples)

        def load() -> LoadedRows:
            rows = reader.load(shard, first, last)
            rows.left = left
            rows.keys.extend(keys)
            return rows

        if reader.is_mapped:
            rows = load()
            for key in keys:
                self._loaded[key] = rows
            return
        self._make_room()
        if self._pool is None or self._pid != os.getpid():
            self._pool, self._pid = Fetcher(_IN_FLIGHT), os.getpid()
        future = self._pool.submit(load)
        self._held_bytes += (last - first) * reader.row_bytes(shard)
        self._in_flight.append(future)
        for key in keys:
            self._loaded[key] = future

    def _take(self, planned: Planned) -> list[LoadedRows]:
        """What holds each of a part's rows. Waits for what is in flight; drops what is handed out in full."""
        loaded = self._loaded
        if not loaded.keys() >= planned.counts.keys():
            self._request_missing(Located(*(column[planned.own] for column in planned.all_to_load)))
        held: dict[int, LoadedRows] = {}
        for key in planned.counts:
            rows = loaded[key]
            if isinstance(rows, Future):
                rows = rows.result()
                loaded.update(dict.fromkeys(rows.keys, rows))
            held[key] = rows
        for key, count in planned.counts.items():
            rows = held[key]
            rows.left -= count
            if rows.left == 0:
                self._drop(rows)
        return [held[key] for key in planned.keys]

    def _drop(self, rows: LoadedRows) -> None:
        rows.left = -1
        for key in rows.keys:
            self._loaded.pop(key, None)
        if not rows.reader.is_mapped:
            self._held_bytes -= (rows.last - rows.first) * rows.reader.row_bytes(rows.shard)

    def _make_room(self) -> None:
        """Drop what was loaded longest ago and is not wanted by a planned part, until memory is within its bound."""
        if self._held_bytes <= self._memory_bytes:
            return
        wanted = {key for planned in self._planned for key in planned.counts}
        enough = self._held_bytes - self._memory_bytes * 7 // 8
        dropped: dict[int, LoadedRows] = {}
        for rows in self._loaded.values():
            if isinstance(rows, LoadedRows) and rows.num_bytes and id(rows) not in dropped and wanted.isdisjoint(rows.keys):
                dropped[id(rows)] = rows
                enough -= rows.num_bytes
                if enough <= 0:
                    break
        for rows in dropped.values():
            self._drop(rows)
        self.num_evicted += len(dropped)

    def _rows_of_regions(self, source: SourceReader, own_lanes: int, side_by_side: int) -> Ints:
        """(S,) rows of a region of each shard where a source is kept, or zeros where it is read in pieces.

        Kept is what is mapped, if the places of its samples fit an eighth of the memory; and what is fetched, if it fits three
        quarters of it. Then regions have 4 MiB, if this process needs most of the source anyway or the source is small; else
        they are the chunks, if its lanes that lie side by side have several: the few at their ends are others' too.
        """
        manifest, spec = source.opened.manifest, self._order.spec
        lane_bytes = manifest.bytes / spec.lanes
        if source.is_mapped:
            is_kept = manifest.samples * _ROW_BYTES <= self._memory_bytes // 8
        else:
            is_kept = manifest.bytes <= self._memory_bytes * 3 // 4 // len(self._order.sources)
        if is_kept and (source.is_mapped or own_lanes > spec.lanes // 2 or manifest.bytes <= SMALL_BYTES):
            rows = max(math.ceil(MAX_CHUNK_BYTES * manifest.samples / max(manifest.bytes, 1)), 1)
            return np.full(len(manifest.shards), rows)
        if is_kept and side_by_side * lane_bytes >= _CHUNKS_SIDE_BY_SIDE * spec.chunk_bytes:
            return chunk_samples(source.opened.samples, source.opened.sizes, spec)
        return np.zeros(len(manifest.shards), np.int64)
