"""What to load for positions of the order: arithmetic, no I/O.

    Planner.plan(ranges) -> plans, units                   where each position leads, and which unit holds its sample
    Planner.requests(units, is_held) -> Request, ...       units that are missing; neighbours become one request

A unit is what is dropped as a whole: the part of a shuffle block that one lane reads or, of a source that fits memory, a region
of up to 4 MiB. A request goes on along its lane, over units that nobody has asked for yet, as far as memory allows.
Invariant: units and requests never change the order. Cost: 0.5 us a position, for about 1,000 positions at a time.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Container, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from loaders.config import LoaderConfig
from loaders.order.plan import MAX_CHUNK_BYTES, SMALL_BYTES, Ints, block_samples, chunk_samples
from loaders.order.samples import Located, OpenSource, SampleOrder
from wds_tools.storage import LocalStore

_MAX_REQUEST_BYTES = 8 << 20
_PLANNED_AT_ONCE = 1024
_CHUNKS_SIDE_BY_SIDE = 8
_SHARED = 1.5
_SAMPLE_BYTES = 100
"""Memory that a sample takes beside its bytes: where it and its members lie."""


class PositionRange(NamedTuple):
    """Positions range(low, high, stride) of an epoch of the order."""

    epoch: int
    low: int
    high: int
    stride: int = 1

    @property
    def num_positions(self) -> int:
        """Number of positions."""
        return len(range(self.low, self.high, self.stride))


class Plan(NamedTuple):
    """Where the positions of a range lead, and the units that hold their samples."""

    positions: PositionRange
    located: Located
    all_units: Located
    """The unit of each position of all ranges that were planned together ..."""
    span: slice
    """... and where those of this range stand in it."""
    keys: list[int]
    """Key of the unit of each position."""
    counts: dict[int, int]
    """Key of each unit -> number of positions that it serves."""

    @property
    def units(self) -> Located:
        """The unit of each position."""
        return _columns(self.all_units, self.span)


@dataclass(slots=True, eq=False)
class Request:
    """Samples [first, last) of a shard, loaded together and dropped together."""

    source: int
    shard: int
    first: int
    last: int
    keys: list[int]
    """Keys of the units in it."""
    num_left: int
    """Samples that the order has yet to take from it before it is dropped; below 0: it is kept."""
    num_bytes: int
    """Estimated size; 0 of a mapped source."""


def lanes_of(lanes: int, num_positions: int, stride_positions: int) -> int:
    """Number of lanes that a process reads which takes `num_positions` in a row out of every `stride_positions`.

    >>> lanes_of(512, num_positions=16, stride_positions=64)  # a quarter of the batch, always at the same lanes
    128
    >>> lanes_of(512, num_positions=16, stride_positions=60)  # 60 does not divide 512: the process meets all lanes
    512
    """
    return min(lanes, num_positions * (lanes // math.gcd(lanes, stride_positions)))


def shared_lanes(order: SampleOrder, config: LoaderConfig, world_size: int, *, as_remote: bool = False) -> str | None:
    """What is fetched more than once because several processes read the same lanes; None where each has its own.

    Args:
        order, config: what is read, and by how many workers.
        world_size: number of ranks.
        as_remote: local files are fetched too.
    """
    lanes, batch_size, workers = order.spec.lanes, config.batch_size, max(config.num_workers, 1)
    times = lanes_of(lanes, -(-batch_size // world_size), workers * batch_size) * workers * world_size / lanes
    is_kept = (
        opened.manifest.bytes <= SMALL_BYTES or (isinstance(opened.store, LocalStore) and not as_remote)
        for opened in order.sources
    )
    if times < _SHARED or not order.spec.shuffle or all(is_kept):
        return None
    good = [str(count) for count in range(1, lanes // batch_size + 1) if lanes % (batch_size * count) == 0]
    mend = f"num_workers of {', '.join(good)} keep each to one" if good else "a batch_size that divides them keeps each to one"
    return (
        f"num_workers={config.num_workers}, batch_size={batch_size}: each of the {lanes:,} lanes (the first batch size x "
        f"{order.spec.lanes_per_sample}) is read by {times:.1f} processes, which fetch as many times the bytes; {mend}"
    )


class Planner:
    """Plans what one process reads.

    Args:
        order: which sample stands at a position.
        num_positions: consecutive positions that the process takes ...
        stride_positions: ... out of every so many.
        memory_bytes: limit of the data in memory.
        is_mapped: of each source, whether its shards are mapped files; loading them takes no memory.
    """

    def __init__(
        self, order: SampleOrder, num_positions: int, stride_positions: int, memory_bytes: int, is_mapped: Sequence[bool]
    ) -> None:
        self._order, self._memory_bytes, self._is_mapped = order, memory_bytes, is_mapped
        spec, num_sources = order.spec, len(order.sources)
        self.num_lanes = lanes_of(spec.lanes, num_positions, stride_positions)
        """Lanes that the process reads."""
        self._sample_bytes = [
            np.maximum(opened.shards.num_bytes // np.maximum(opened.shards.num_samples, 1), 1) for opened in order.sources
        ]
        neighbours = self.num_lanes if self.num_lanes == num_positions * spec.lanes_per_sample else 1
        regions = [
            self._samples_of_regions(opened, is_mapped=mapped, side_by_side=neighbours)
            for opened, mapped in zip(order.sources, is_mapped, strict=True)
        ]
        self._region_base = np.cumsum([0, *map(len, regions)])
        self._region_samples = np.concatenate(regions)
        """Samples of a region of each shard of each source; 0: the source is read in pieces."""
        lane_bytes = memory_bytes // 2 // max(self.num_lanes, 1) // num_sources
        self.ahead_bytes = min(max(lane_bytes - spec.block_bytes, 0), MAX_CHUNK_BYTES)
        """Limit of what a request reads beyond what was asked for."""
        self.at_once = _PLANNED_AT_ONCE
        """Number of positions to plan together."""
        self.num_planned = 0
        """Positions planned; to be set to 0 when what is in memory is dropped, so that at first a little of each lane is read."""
        self.needed_bytes = 0
        """Memory with which an open block of each lane fits; with less, data is fetched more than once. 0: any will do."""
        self.is_local = all(is_mapped)
        """Whether nothing is fetched."""
        if self.is_local:
            return
        largest = max(int(sizes.max(initial=1)) for sizes in self._sample_bytes)
        self.at_once = min(_PLANNED_AT_ONCE, max(memory_bytes // 8 // max(spec.block_bytes, largest), 1))
        if not self._region_samples.all():
            self.needed_bytes = -(-self.num_lanes * spec.block_bytes * num_sources * 4 // 3)

    def plan(self, ranges: Sequence[PositionRange]) -> tuple[list[Plan], Located]:
        """Locate the positions of some ranges; one call for many is much cheaper than one for each.

        Returns:
            The plan of each range, and the units of all of them, one for each position.
        """
        epoch, starts = ranges[0].epoch, self._order.epochs.start
        positions = [np.arange(part.low, part.high, part.stride) + starts(part.epoch) - starts(epoch) for part in ranges]
        located = self._order.locate(epoch, np.concatenate(positions))
        units = self._with_regions(located)
        self.num_planned += len(located.sample_index)
        plans: list[Plan] = []
        end = 0
        for part, part_positions in zip(ranges, positions, strict=True):
            span = slice(end, end := end + len(part_positions))
            keys = units.key[span].tolist()
            counts = {keys[0]: 1} if len(keys) == 1 else Counter(keys)
            plans.append(Plan(part, _columns(located, span), units, span, keys, counts))
        return plans, units

    def requests(self, units: Located, held: Container[int]) -> Iterator[Request]:
        """What is to be loaded so that all of these units are held, in the order in which it is needed.

        Args:
            units: as `plan` returns them.
            held: keys of units in memory. Consulted as requests are taken, so it may grow meanwhile.
        """
        keys, indices = np.unique(units.key, return_index=True)
        missing = [index for key, index in zip(keys.tolist(), indices.tolist(), strict=True) if key not in held]
        units = _columns(units, missing)
        ascending = np.lexsort((units.first, units.shard, units.source))
        needed = np.array(missing, np.int64)[ascending].tolist()
        source, shard, key, first, num_samples, done, run = (
            column[ascending].tolist()
            for column in (units.source, units.shard, units.key, units.first, units.num_samples, units.num_done, units.num_in_run)
        )
        runs: list[tuple[int, int, int]] = []
        """Neighbours that become one request: (when it is needed, begin, end)."""
        begin = 0
        while begin < len(source):
            where = source[begin], shard[begin]
            end, stop = begin + 1, first[begin] + num_samples[begin]
            limit = first[begin] + max(_MAX_REQUEST_BYTES // int(self._sample_bytes[where[0]][where[1]]), 1)
            while end < len(source) and (source[end], shard[end]) == where and first[end] == stop and stop < limit:
                stop += num_samples[end]
                end += 1
            runs.append((min(needed[begin:end]), begin, end))
            begin = end
        for _, begin, end in sorted(runs):
            where = source[begin], shard[begin]
            sample_bytes = int(self._sample_bytes[where[0]][where[1]])
            stop = first[end - 1] + num_samples[end - 1]
            keys = key[begin:end]
            num_left = sum(num_samples[begin:end]) - sum(done[begin:end])
            last, opened, is_mapped = end - 1, self._order.sources[where[0]], self._is_mapped[where[0]]
            beyond = min(run[last], num_samples[last] + self.ahead_bytes // sample_bytes) - num_samples[last]
            if key[last] >= 0 and not is_mapped and self.num_planned > self.num_lanes:  # first a little of each lane
                shard_samples, shard_bytes = (
                    opened.shards.num_samples[where[1]],
                    opened.shards.num_bytes[where[1]],
                )
                block = int(block_samples(shard_samples, shard_bytes, opened.manifest.group_samples, self._order.spec))
                for offset in range(num_samples[last], num_samples[last] + beyond, block):
                    if key[last] + offset in held:
                        break
                    size = min(block, run[last] - offset)
                    keys.append(key[last] + offset)
                    num_left += size
                    stop += size
            stop = min(stop, int(opened.shards.num_samples[where[1]]))
            num_bytes = 0 if is_mapped else (stop - first[begin]) * (sample_bytes + _SAMPLE_BYTES)
            yield Request(*where, first[begin], stop, keys, num_left if key[last] >= 0 else -1, num_bytes)

    def _with_regions(self, located: Located) -> Located:
        """The unit of each position: its piece, or a region where the source is kept whole."""
        if not self._region_samples.any():
            return located
        shard = self._region_base[located.source] + located.shard
        region_samples = self._region_samples[shard]
        is_whole = region_samples > 0
        size = np.maximum(region_samples, 1)
        region = located.sample_index // size
        return located._replace(
            key=np.where(is_whole, -1 - ((shard << 32) + region), located.key),
            first=np.where(is_whole, region * size, located.first),
            num_samples=np.where(is_whole, size, located.num_samples),
            num_done=np.where(is_whole, 0, located.num_done),
            num_in_run=np.where(is_whole, size, located.num_in_run),
        )

    def _samples_of_regions(self, opened: OpenSource, *, is_mapped: bool, side_by_side: int) -> Ints:
        """(S,) samples of a region of each shard if the source is kept whole, zeros if it is read in pieces.

        Kept whole is a mapped source whose samples' offsets fit an eighth of the memory, and a fetched one that fits three
        quarters of it. Regions have 4 MiB if this process reads most of the lanes, or as many bytes in pieces as the source has
        (both neighbours read the block where a lane ends), or the source is small; else they are the chunks, if its lanes that
        lie side by side have several: the few chunks at their ends are others' too.
        """
        manifest, spec = opened.manifest, self._order.spec
        if is_mapped:
            is_kept = manifest.samples * _SAMPLE_BYTES <= self._memory_bytes // 8
        else:
            is_kept = manifest.bytes <= self._memory_bytes * 3 // 4 // len(self._order.sources)
        bytes_in_pieces = self.num_lanes * (manifest.bytes / spec.lanes + spec.block_bytes)
        is_most = self.num_lanes > spec.lanes // 2 or bytes_in_pieces >= manifest.bytes
        if is_kept and (is_mapped or is_most or manifest.bytes <= SMALL_BYTES):
            size = max(math.ceil(MAX_CHUNK_BYTES * manifest.samples / max(manifest.bytes, 1)), 1)
            return np.full(len(manifest.shards), size)
        if is_kept and side_by_side * manifest.bytes / spec.lanes >= _CHUNKS_SIDE_BY_SIDE * spec.chunk_bytes:
            return chunk_samples(opened.shards.num_samples, opened.shards.num_bytes, opened.manifest.group_samples, spec)
        return np.zeros(len(manifest.shards), np.int64)


def _columns(located: Located, which: slice | list[int]) -> Located:
    return Located(*[column[which] for column in located])
