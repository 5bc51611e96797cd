"""Samples of a shard in memory: one byte range, and where in it each sample's members lie.

    SourceReader.load(shard, first, last) -> LoadedSamples       offsets of groups -> one ranged read -> the headers in it
                                             without offsets:    index -> one ranged read
    bytes_of(loaded, sample_indices) -> SampleBytes              what holds each sample, and where in it its members lie

What is fetched by the offsets of a dataset is whole groups of samples, of which every header is checked. If they do not go
together, the index says what is there. It is also taken where there are no offsets, for a CRC-32, and for local files.
A local file is mapped (mapped.py), so its bytes stay in the page cache that all processes share; a remote one is fetched. Usable
from many threads.
Cost: 48 bytes a sample that is loaded, 3 us for one that is found, and the bound of IndexReader for indices used last.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from itertools import islice
from threading import Lock
from typing import Any, NamedTuple

import numpy as np

from loaders.order.plan import Ints
from loaders.order.samples import OpenSource
from loaders.reading.cache import BlockCache
from loaders.reading.mapped import MappedShards
from loaders.reading.members import code_members, wanted_members
from loaders.reading.spans import spans_of_index, spans_of_runs
from wds_tools.dataset.offsets import OffsetsReader, Place
from wds_tools.dataset.samples import IndexReader
from wds_tools.errors import FormatError
from wds_tools.format.codes import HW, is_code_column
from wds_tools.format.index import ShardIndex
from wds_tools.format.schema import IMAGE_EXTENSIONS
from wds_tools.format.tar.scan import scan_run, scan_runs
from wds_tools.storage import LocalStore, join
from wds_tools.storage.recent import SingleFlight

_CACHE_REGION_BYTES = 4 << 20
_FEW_GROUPS, _MANY_GROUPS = 64, 256
"""To scan fewer groups costs as much as to scan twice as many: others of their requests, so many, are scanned with them."""


class LoadedSamples:
    """Samples [first, last) of a shard. Where those of a group lie is found out when one of them is asked for."""

    __slots__ = ("_index", "_place", "begin", "data", "first", "last", "reader", "shard", "spans", "url")

    def __init__(
        self,
        reader: SourceReader,
        shard: int,
        first: int,
        last: int,
        data: memoryview | None,
        found: ShardIndex | Place,
    ) -> None:
        self.reader = reader
        self.shard = shard
        self.first = first
        self.last = last
        self.data = data
        """From the first byte of the first sample to the last of the last; None of a local shard."""
        self.begin: int
        """Byte of the shard at which what is in memory begins; 0 of a local shard."""
        self.spans: memoryview
        """Of int64, a row a sample, from `first` on: begin and end of the sample, in bytes from `begin` on (0, 0: not known yet,
        see `find`); then begin and end of each wanted member (0, 0: it has none). Rows of it are joined for a batch."""
        self.url = join(reader.opened.store.url, reader.opened.shards.name(shard))
        """URL of the shard."""
        self._index: ShardIndex | None = None
        self._place: Place | None = None
        if isinstance(found, ShardIndex):
            self._take(found)
        else:
            self._place, self.begin = found, found.bounds[0]
            self.spans = np.zeros((last - first) * reader.span_width, np.int64).data

    @property
    def members(self) -> tuple[str, ...]:
        """Suffixes that samples of the shard have."""
        return self.reader.opened.shards.members(self.shard)

    @property
    def index(self) -> ShardIndex:
        """Index of these samples. Of those that were found by offsets it says what their headers do; no CRC-32.

        Raises:
            FormatError, StorageError: they are not samples, and no index says where these are.
        """
        if self._index is None:
            self._take(self._read_headers())
        assert self._index is not None
        return self._index

    @property
    def is_found(self) -> bool:
        """Whether `spans` has all samples."""
        return self._place is None

    def missing(self, sample_index: int) -> int | None:
        """The group of a sample, if it is not known yet where in it the samples lie."""
        if self._place is None or self.spans[(sample_index - self.first) * self.reader.span_width + 1]:
            return None
        return (sample_index - self.first) // self._place.group_samples

    def others_missing(self) -> Iterator[int]:
        """All groups of which that is not known yet."""
        if self._place is not None:
            size = self._place.group_samples
            ends = self.spans[1 :: size * self.reader.span_width].tolist()
            yield from (number for number, end in enumerate(ends) if not end)

    def group(self, number: int) -> tuple[int, memoryview]:
        """Where in `data` a missing group begins, and its bytes."""
        assert self._place is not None
        assert self.data is not None
        begin, end = self._place.bounds[number] - self.begin, self._place.bounds[number + 1] - self.begin
        return begin, self.data[begin:end]

    def found(self, number: int, spans: Ints) -> None:
        """Take note of where the samples of a missing group lie, rows of `spans`: if they are as many as it should have. If not,
        raises as `index` does."""
        if self._place is None:  # known since another group of the same samples was not as it should be
            return
        low = number * self._place.group_samples
        high = min(low + self._place.group_samples, self.last - self.first)
        if len(spans) != high - low:
            self._take(self.index)
            return
        width = self.reader.span_width
        self.spans[low * width : high * width] = spans.reshape(-1).data

    def _read_headers(self) -> ShardIndex:
        """What the headers say, or the index of the shard if they do not go together with the offsets."""
        assert self._place is not None
        assert self.data is not None
        try:
            index = scan_run(self.data, self.members, self.last - self.first, self.url)
            return replace(index, start=index.start.astype(np.int64) + self.begin)
        except FormatError:
            again = self.reader.load_indexed(self.shard, self.first, self.last)
            self.data = again.data
            return again.index

    def _take(self, index: ShardIndex) -> None:
        self._index, self._place, self.begin = index, None, 0 if self.data is None else int(index.start[0])
        self.spans = spans_of_index(index, self.begin, self.reader.wanted).reshape(-1).data

    def where(self, sample_index: int) -> str:
        """Shard and byte of a sample that was found, for messages."""
        begin = self.begin + self.spans[(sample_index - self.first) * self.reader.span_width]
        return f"{self.url}, sample {sample_index} at byte {begin}"

    def view(self) -> memoryview | None:
        """What `spans` count in; None of a file that does not stay mapped, or was cut off: see `copy`. Raises as that."""
        if self.data is not None:
            return self.data
        assert self.reader.maps is not None
        mapped = self.reader.maps.get(self.shard)
        return mapped.view if mapped.stays and mapped.size >= len(mapped.view) else None

    def copy(self, begin: int, end: int) -> memoryview:
        """Bytes of a local shard. Raises FormatError: it is shorter than that; StorageError."""
        assert self.reader.maps is not None
        mapped = self.reader.maps.get(self.shard)
        if end > mapped.size:
            raise self.reader.maps.cut_off(self.shard, mapped.size)
        return memoryview(bytes(mapped.view[begin:end]))


class SampleBytes(NamedTuple):
    """The bytes of B samples, in place."""

    views: list[memoryview]
    """What holds each."""
    spans: Ints
    """(B, 2 + 2 W) Begin and end of each in its view, from its first header to the last padding; then those of each of the W
    members that the source's reader wants (an empty one: it has none)."""
    readers: set[SourceReader]
    """Of their sources."""

    def cut(self, begin: Ints, end: Ints) -> list[memoryview]:
        """Bytes begin ... end of each view, (B,) both."""
        return [view[low:high] for view, low, high in zip(self.views, begin.tolist(), end.tolist(), strict=True)]

    def samples(self) -> list[memoryview]:
        """All bytes of each."""
        return self.cut(self.spans[:, 0], self.spans[:, 1])

    def members(self, number: int) -> list[memoryview]:
        """The payload of one of the wanted members of each."""
        return self.cut(self.spans[:, 2 + 2 * number], self.spans[:, 3 + 2 * number])


def bytes_of(loaded: Sequence[LoadedSamples], sample_indices: Sequence[int]) -> SampleBytes:
    """Where the bytes of some samples are. Those of local shards are looked up here.

    Args:
        loaded: what holds each sample, of sources that want as many members.
        sample_indices: number of each sample in its shard.

    Returns:
        They, in the order given. Those of files that do not stay mapped are copies.

    Raises:
        FormatError: a shard is shorter than the manifest says.
        StorageError: it can't be read.
    """
    held = set(loaded)
    if not all(samples.is_found for samples in held):
        _find(loaded, sample_indices)
    width = loaded[0].reader.span_width
    rows = [
        samples.spans[(sample_index - samples.first) * width : (sample_index - samples.first + 1) * width]
        for samples, sample_index in zip(loaded, sample_indices, strict=True)
    ]
    spans = np.frombuffer(bytearray().join(rows), np.int64).reshape(-1, width)
    in_place = {samples: samples.view() for samples in held}
    views: list[Any] = [in_place[samples] for samples in loaded]
    for number in [number for number, view in enumerate(views) if view is None] if None in in_place.values() else ():
        begin, end = spans[number, :2].tolist()
        views[number] = loaded[number].copy(begin, end)
        spans[number] -= begin
    return SampleBytes(views, spans, {samples.reader for samples in held})


def _find(loaded: Sequence[LoadedSamples], sample_indices: Sequence[int]) -> None:
    """Find out where samples lie, and the others of their groups; of all those at once whose shards have the same members."""
    alike: dict[Any, dict[tuple[LoadedSamples, int], None]] = {}
    for samples, sample_index in zip(loaded, sample_indices, strict=True):
        if (number := samples.missing(sample_index)) is not None:
            alike.setdefault((samples.reader, samples.members), {})[samples, number] = None
    for (reader, members), groups in alike.items():
        if len(groups) < _FEW_GROUPS:
            held = dict.fromkeys(samples for samples, _ in groups)
            others = ((samples, number) for samples in held for number in samples.others_missing())
            groups.update(dict.fromkeys(islice(others, _MANY_GROUPS)))
        begins, data = zip(*[samples.group(number) for samples, number in groups], strict=True)
        runs = scan_runs(data)
        if runs is None or not set(runs.suffixes) <= set(members):
            first, spans = [0] * (len(groups) + 1), np.zeros((0, reader.span_width), np.int64)
        else:
            first, spans = runs.first.tolist(), spans_of_runs(runs, begins, reader.wanted)
        for (samples, number), low, high in zip(groups, first[:-1], first[1:], strict=True):
            samples.found(number, spans[low:high])


class SourceReader:
    """Reads samples of one source.

    Args:
        opened: the source.
        cache: keeps what is fetched on a local disk; not asked for local sources.
        num_sources: that share the files that may stay mapped.
        check_crc: whether samples are compared with their CRC-32, which the index has.
    """

    def __init__(
        self, opened: OpenSource, cache: BlockCache | None = None, num_sources: int = 1, *, check_crc: bool = False
    ) -> None:
        self.opened = opened
        self.has_schema = opened.has_schema
        self.has_images = any(suffix in IMAGE_EXTENSIONS for suffix in opened.manifest.members)
        self.data_types = {*opened.manifest.data_types}
        self.code_members = code_members(opened)
        layouts = [opened.manifest.layout(name.removesuffix(".npy")) for name in self.code_members] or [HW]
        self.layout = layouts[0] if layouts.count(layouts[0]) == len(layouts) else None
        """What its codes are; None: that depends on the column."""
        self.wanted = wanted_members(opened, self.code_members)
        """Members whose spans every sample gets: the first that it has of each of these."""
        self.span_width = 2 + 2 * len(self.wanted)
        others = [name for name in opened.manifest.members if is_code_column(name) and name not in self.code_members]
        self.made: Mapping[str, Mapping[str, Any]] = opened.manifest.codes if others and self.code_members else {}
        """Provenance of the code columns, if samples may have others beside those that are read."""
        self._store = opened.store
        self.maps = MappedShards(opened.store, opened.shards, num_sources) if isinstance(opened.store, LocalStore) else None
        self.is_mapped = self.maps is not None
        self._cache = None if self.is_mapped else cache
        self.indices = IndexReader(opened.store, opened.manifest, None if self.is_mapped else self._count)
        has_offsets = opened.manifest.offsets_hash is not None and not (self.is_mapped or check_crc)
        self._offsets = OffsetsReader(opened.store, opened.manifest, self._fetch) if has_offsets else None
        self._regions: SingleFlight[tuple[int, int, bool], memoryview] = SingleFlight()
        self._counting = Lock()
        self.num_requests = 0
        self.num_bytes = 0
        self.num_misplaced = 0
        """Loads for which offsets and headers did not go together, so that the index was read."""

    @property
    def is_cached(self) -> bool:
        """Whether what is loaded may come from a local disk."""
        return self._cache is not None

    def load(self, shard: int, first: int, last: int, *, again: bool = False) -> LoadedSamples:
        """Samples [first, last) of a shard, and what else is in their groups.

        Args:
            shard: number of the shard in the manifest.
            first, last: samples of the shard, 0 <= first < last <= its samples.
            again: fetch them whatever the cache has, and put them there.

        Returns:
            The samples, with their bytes unless the source is mapped.

        Raises:
            FormatError: the index is damaged or of other bytes; the shard is shorter than the manifest says.
            StorageError: the storage does not answer.
        """
        if self._offsets is not None:
            with suppress(FormatError):
                place = self._offsets.locate(shard, first, last)
                data = self._bytes(shard, place.bounds[0], place.bounds[-1], again=again)
                return LoadedSamples(self, shard, place.first, place.last, data, place)
        return self.load_indexed(shard, first, last, again=again)

    def load_indexed(self, shard: int, first: int, last: int, *, again: bool = False) -> LoadedSamples:
        """The same by the index; counted where there are offsets, since these or the shard are then damaged."""
        self.num_misplaced += self._offsets is not None
        index = self.indices.read(shard, first, last)
        data = None
        if not self.is_mapped:
            data = self._bytes(shard, int(index.start[0]), int(index.start[-1]) + int(index.size[-1]), again=again)
        return LoadedSamples(self, shard, first, last, data, index)

    def _bytes(self, shard: int, begin: int, end: int, *, again: bool) -> memoryview:
        if self._cache is not None:
            regions = range(begin // _CACHE_REGION_BYTES * _CACHE_REGION_BYTES, end, _CACHE_REGION_BYTES)
            parts = [self._regions.get((shard, start, again), self._region) for start in regions]
            parts[-1] = parts[-1][: end - regions[-1]]
            parts[0] = parts[0][begin - regions[0] :]
            return memoryview(b"".join(parts))  # a copy, so that a small piece does not keep its whole region
        return self._fetch_shard(shard, begin, end)

    def _region(self, key: tuple[int, int, bool]) -> memoryview:
        assert self._cache is not None
        shard, begin, again = key
        info = self.opened.shards[shard]
        end = min(begin + _CACHE_REGION_BYTES, info.bytes)
        data = None if again else self._cache.read(info.xxh128, begin, end)
        if data is None:
            data = self._fetch_shard(shard, begin, end)
            self._cache.write(info.xxh128, begin, end, data)
        return memoryview(data)

    def _fetch_shard(self, shard: int, begin: int, end: int) -> memoryview:
        info = self.opened.shards[shard]
        return self._fetch(info.name, begin, end, info.bytes)

    def _fetch(self, name: str, begin: int, end: int, size: int) -> memoryview:
        data = memoryview(self._store.read_range(name, begin, end, size))
        self._count(end - begin)
        return data

    def _count(self, num_bytes: int) -> None:
        with self._counting:
            self.num_requests += 1
            self.num_bytes += num_bytes
