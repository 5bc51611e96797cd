"""Rows of a shard in memory: one byte range, and where in it each sample's members lie. No tar is parsed on the way.

    SourceReader.load(shard, first, last) -> LoadedRows        its index in runs of 2,048 rows, its bytes by one ranged read

A local file is mapped, so its bytes stay in the page cache that all processes share; a remote one is fetched. Usable from
many threads. Cost: 48 bytes a row that is loaded, and `_INDEX_BYTES` for the indices that were used last.
"""

from __future__ import annotations

from array import array
from collections import OrderedDict
from collections.abc import Callable, Sequence
from threading import Lock
from typing import Any, Generic, TypeVar

import numpy as np

from loaders.cache import BlockCache
from loaders.stream import OpenSource
from wds_tools.errors import FormatError, NotFound, UsageError
from wds_tools.format.index import ABSENT, SUFFIX, ShardIndex, check_fresh, read_rows
from wds_tools.format.schema import CODE_COLUMNS, IMAGE_EXTENSIONS, TOKEN_MEMBERS, named_column
from wds_tools.storage import LocalStore, join

_INDEX_ROWS = 2048
_INDEX_BYTES = 128 << 20
_OPEN_SHARDS = 4096
_CACHE_REGION_BYTES = 4 << 20
_V = TypeVar("_V")


class LoadedRows:
    """Rows [first, last) of a shard."""

    __slots__ = (
        "data",
        "end",
        "first",
        "index",
        "keys",
        "last",
        "left",
        "num_bytes",
        "places",
        "reader",
        "shard",
        "start",
        "url",
    )

    def __init__(self, reader: SourceReader, shard: int, first: int, last: int, data: memoryview, index: ShardIndex) -> None:
        self.reader = reader
        self.shard = shard
        self.first = first
        self.last = last
        self.data = data
        """From the first byte of the first sample to the last of the last."""
        self.index = index
        """Of these rows."""
        self.num_bytes = 0 if reader.is_mapped else len(data)
        self.left = 0
        """Rows that are still to be handed out; kept by whoever holds this."""
        self.keys: list[int] = []
        """Of the pieces it holds; kept by whoever holds this."""
        self.start, self.end, *self.places = _places(index, reader.wanted)
        """Offsets in `data` by row, from `first` on: of the sample, and of each wanted member, begin and end (0, 0: none)."""
        self.url = join(reader.opened.store.url, reader.opened.manifest.shards[shard].name)
        """Of the shard."""

    def where(self, row: int) -> str:
        """Shard and byte of a row, for messages."""
        return f"{self.url}, sample {row} at byte {int(self.index.start[row - self.first])}"


class SourceReader:
    """Reads rows of one source.

    Args:
        opened: the source.
        cache: keeps what is fetched on a local disk; not asked for local sources.
    """

    def __init__(self, opened: OpenSource, cache: BlockCache | None = None) -> None:
        self.opened = opened
        self.has_schema = opened.has_schema
        self.has_images = any(suffix in IMAGE_EXTENSIONS for suffix in opened.manifest.members)
        self.has_conversations = any("visual_sft" in row.data_types for row in opened.manifest.shards)
        self.code_members = _code_members(opened)
        self.wanted = _wanted(opened, self.code_members)
        """Members to have the places of in every row: any one of each."""
        self._store = opened.store
        self._local = opened.store if isinstance(opened.store, LocalStore) else None
        self.is_mapped = self._local is not None
        self._cache = None if self.is_mapped else cache
        self._files: _Recent[int, memoryview] = _Recent(_OPEN_SHARDS, lambda _: 1)
        self._index_files: _Recent[int, Any] = _Recent(_INDEX_BYTES // 2, len)
        self._index_rows: _Recent[tuple[int, int], ShardIndex] = _Recent(_INDEX_BYTES // 2, lambda _: 40 * _INDEX_ROWS)
        self.num_requests = 0
        self.num_bytes = 0

    def row_bytes(self, shard: int) -> int:
        """Bytes of a row of a shard, on average."""
        return max(int(self.opened.sizes[shard]) // max(int(self.opened.samples[shard]), 1), 1)

    @property
    def most_row_bytes(self) -> int:
        """The greatest `row_bytes` of its shards."""
        return int((self.opened.sizes // np.maximum(self.opened.samples, 1)).max(initial=1))

    @property
    def is_cached(self) -> bool:
        """Whether what is loaded may come from a local disk."""
        return self._cache is not None

    def load(self, shard: int, first: int, last: int, *, anew: bool = False) -> LoadedRows:
        """Rows [first, last) of a shard.

        Args:
            shard, first, last: which.
            anew: fetch them whatever the cache has, and put them there.

        Raises:
            FormatError: the index is damaged or of other bytes; the shard is shorter than the manifest says.
            StorageError: the storage does not answer.
        """
        index = self._rows(shard, first, last)
        begin = int(index.start[0])
        end = int(index.start[-1]) + int(index.size[-1])
        return LoadedRows(self, shard, first, last, self._bytes(shard, begin, end, anew=anew), index)

    def _bytes(self, shard: int, begin: int, end: int, *, anew: bool) -> memoryview:
        row = self.opened.manifest.shards[shard]
        if self.is_mapped:
            return self._files.get(shard, self._map)[begin:end]
        if self._cache is not None:
            regions = range(begin // _CACHE_REGION_BYTES * _CACHE_REGION_BYTES, end, _CACHE_REGION_BYTES)
            parts = [self._region(shard, at, min(at + _CACHE_REGION_BYTES, row.bytes), anew=anew) for at in regions]
            parts[-1] = parts[-1][: end - regions[-1]]
            parts[0] = parts[0][begin - regions[0] :]
            return memoryview(b"".join(parts))  # a copy, so that a small piece does not keep its whole region
        return self._fetch(shard, begin, end)

    def _region(self, shard: int, begin: int, end: int, *, anew: bool) -> memoryview:
        assert self._cache is not None
        row = self.opened.manifest.shards[shard]
        data = None if anew else self._cache.read(row.xxh128, begin, end)
        if data is None:
            data = self._fetch(shard, begin, end)
            self._cache.write(row.xxh128, begin, end, data)
        return memoryview(data)

    def _fetch(self, shard: int, begin: int, end: int) -> memoryview:
        row = self.opened.manifest.shards[shard]
        data = memoryview(self._store.read_range(row.name, begin, end, row.bytes))
        self.num_requests += 1
        self.num_bytes += end - begin
        return data

    def _map(self, shard: int) -> memoryview:
        row = self.opened.manifest.shards[shard]
        assert self._local is not None
        view = self._local.map(row.name)
        if len(view) != row.bytes:
            raise FormatError(
                f"{join(self._store.url, row.name)}: {len(view)} bytes, the manifest says {row.bytes}: "
                "the shard was cut off or replaced"
            )
        return view

    def _rows(self, shard: int, first: int, last: int) -> ShardIndex:
        starts = range(first // _INDEX_ROWS * _INDEX_ROWS, last, _INDEX_ROWS)
        runs = [self._index_rows.get((shard, start), self._read_index) for start in starts]
        if len(runs) == 1:
            return _slice(runs[0], first - starts[0], last - starts[0])
        return _joined([_slice(run, max(first - start, 0), last - start) for run, start in zip(runs, starts, strict=True)])

    def _read_index(self, place: tuple[int, int]) -> ShardIndex:
        shard, start = place
        row = self.opened.manifest.shards[shard]
        name = row.name + SUFFIX
        where = join(self._store.url, name)
        data = self._index_files.get(shard, lambda _: self._index_file(name))
        index = read_rows(data, start, min(start + _INDEX_ROWS, row.samples), where)
        check_fresh(index, samples=row.samples, tar_bytes=row.bytes, xxh128=row.xxh128, name=where)
        return index

    def _index_file(self, name: str) -> Any:
        try:
            data = self._store.read(name)
        except NotFound as error:
            raise NotFound(f"{join(self._store.url, name)}: the index is missing: write it with `wds-tools index`") from error
        if not self.is_mapped:
            self.num_requests += 1
            self.num_bytes += len(data)
        return data


_K = TypeVar("_K")


class _Recent(Generic[_K, _V]):
    """A cache of what was used last, by total size. Two threads may make the same value; one of them is kept."""

    def __init__(self, max_size: int, size_of: Callable[[_V], int]) -> None:
        self._max_size = max_size
        self._size_of = size_of
        self._size = 0
        self._values: OrderedDict[_K, _V] = OrderedDict()
        self._lock = Lock()

    def get(self, key: _K, make: Callable[[_K], _V]) -> _V:
        with self._lock:
            if key in self._values:
                self._values.move_to_end(key)
                return self._values[key]
        value = make(key)
        with self._lock:
            if key not in self._values:
                self._values[key] = value
                self._size += self._size_of(value)
                while self._size > self._max_size and len(self._values) > 1:
                    self._size -= self._size_of(self._values.popitem(last=False)[1])
        return value


_COLUMNS = ("start", "size", "lengths", "offsets", "crc32", "text_chars", "num_codes")


def _slice(index: ShardIndex, first: int, last: int) -> ShardIndex:
    return _with_columns(index, {name: getattr(index, name)[first:last] for name in _COLUMNS})


def _joined(runs: list[ShardIndex]) -> ShardIndex:
    return _with_columns(runs[0], {name: np.concatenate([getattr(run, name) for run in runs]) for name in _COLUMNS})


def _with_columns(index: ShardIndex, columns: dict[str, Any]) -> ShardIndex:
    return ShardIndex(
        members=index.members, samples=index.samples, tar_bytes=index.tar_bytes, tar_xxh128=index.tar_xxh128, **columns
    )


def _code_members(opened: OpenSource) -> Sequence[str]:
    """The members that hold the codes of a source; of those that a sample has the first counts."""
    members = [member for member in opened.manifest.members if member.endswith(".npy")]
    name = opened.source.codes
    if name is None:
        return members
    named = [member for member in members if member.removesuffix(".npy") in {named_column(c, name) for c in CODE_COLUMNS}]
    if not named:
        raise UsageError(f"source {opened.source.url} has no codes named {name!r}, but {', '.join(members) or 'none at all'}")
    return named


def _wanted(opened: OpenSource, code_members: Sequence[str]) -> Sequence[Sequence[str]]:
    """The json and the codes of a sample, or the members of a row that was packed ahead; of tars of any members none."""
    if opened.has_schema:
        return ("json",), code_members
    return [(name,) for name in TOKEN_MEMBERS] if opened.manifest.token_rows else ()


def _places(index: ShardIndex, wanted: Sequence[Sequence[str]]) -> list[array[int]]:
    """See LoadedRows.places. Arrays, since taking one number from a numpy column costs four times as much."""
    start = index.start.astype(np.int64)
    start -= start[0]
    out = np.zeros((2 + 2 * len(wanted), len(start)), np.int64)
    out[0], out[1] = start, start + index.size
    for low, names in zip(range(2, len(out), 2), wanted, strict=True):
        for column, suffix in reversed(list(enumerate(index.members))):
            if suffix in names:
                lengths = index.lengths[:, column]
                present = lengths != ABSENT
                at = start + index.offsets[:, column]
                out[low] = np.where(present, at, out[low])
                out[low + 1] = np.where(present, at + lengths, out[low + 1])
    return [array("q", row.tobytes()) for row in out]
