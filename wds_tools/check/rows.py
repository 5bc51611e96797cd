"""Any samples of a dataset, by range: which bytes hold them, and these bytes in few requests.

    number -> (shard, row)          samples are numbered through the set, in the manifest's order
    read(shard, first, last, ...)   index rows -> ranges of the wanted members -> joined where gaps are small -> fetched together
    scan(shard, first, ...)         the same from there on, piece by piece, one piece ahead

Invariant: nothing is read but index files and ranges that hold what was asked for; an index made for another tar is refused.
A key is not in the index: it is read from a sample's first header when it is asked for.
Cost: an index file is one GET (20 bytes a sample) and stays in memory, up to INDEX_BYTES of them; a page of samples without
images is one GET more.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from wds_tools.dataset.layout import index_name
from wds_tools.errors import NotFound, UsageError
from wds_tools.format.index import ABSENT, ShardIndex, check_fresh, read_rows
from wds_tools.format.manifest import Manifest
from wds_tools.format.schema import IMAGE_EXTENSIONS
from wds_tools.format.shard import split_name
from wds_tools.format.tar import first_name
from wds_tools.storage import Store, join
from wds_tools.storage.recent import Recent

INDEX_BYTES = 128 << 20
PIECE_BYTES = 8 << 20
"""Of what `scan` fetches at a time; one piece is read while the next is on its way."""
PIECE_ROWS = 4096
_GAP_BYTES = 64 << 10
"""Fetching this much for nothing costs less than another request."""
_PARALLEL_READS = 16

Wanted = Callable[[str], bool]
"""Whether the members of this suffix are to be fetched."""


def is_text(suffix: str) -> bool:
    """Members that people can read."""
    return suffix in ("json", "txt", "text", "caption")


def is_small(suffix: str) -> bool:
    """All members of this project's schema but the source image: text and codes."""
    return is_text(suffix) or suffix.endswith("npy")


def is_image(suffix: str) -> bool:
    """A source image, by the name of its member; "1.jpg" is a conversation's second."""
    return suffix.rpartition(".")[2] in (*IMAGE_EXTENSIONS, "jpeg", "tiff")


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One sample as far as it was fetched."""

    number: int
    """Of the sample in the set, from 0."""
    shard: str
    row: int
    """Of the sample in its shard."""
    start: int
    """Its first byte in the tar, for messages."""
    size: int
    """Its bytes in the tar."""
    crc32: int
    text_chars: int
    num_codes: int
    spans: dict[str, tuple[int, int]]
    """Suffix -> first byte of the payload in the tar and the one behind it, for all its members in the index's order."""
    payloads: dict[str, memoryview]
    """Suffix -> payload, for those that were wanted."""
    head: memoryview = field(repr=False)
    """The header blocks of its first member."""

    @property
    def lengths(self) -> dict[str, int]:
        """Suffix -> bytes of the payload, for all its members."""
        return {suffix: end - begin for suffix, (begin, end) in self.spans.items()}

    @property
    def images(self) -> list[str]:
        """Suffixes of its source images, in the order in which they lie there."""
        return sorted(filter(is_image, self.spans), key=lambda suffix: self.spans[suffix])

    @property
    def key(self) -> str:
        """From the first header.

        Raises:
            FormatError: there is no header where the index says.
        """
        return split_name(first_name(self.head, self.shard, self.start), self.shard)[0]


class Rows:
    """Reads samples of one dataset; for many threads at once.

    Args:
        store: the dataset.
        manifest: its manifest.
    """

    def __init__(self, store: Store, manifest: Manifest) -> None:
        self.store = store
        self.manifest = manifest
        self._ends = np.cumsum([row.samples for row in manifest.shards], dtype=np.int64)
        self._indices: Recent[str, bytes] = Recent(INDEX_BYTES, len)
        self._readers = ThreadPoolExecutor(_PARALLEL_READS, "read")
        self._ahead = ThreadPoolExecutor(2, "read-ahead")

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def close(self) -> None:
        """End the threads."""
        self._ahead.shutdown(cancel_futures=True)
        self._readers.shutdown(cancel_futures=True)

    def locate(self, number: int) -> tuple[int, int]:
        """The shard of a sample, as a position in the manifest, and its row there.

        Raises:
            UsageError: there is no such sample.
        """
        if not 0 <= number < len(self):
            raise UsageError(f"there is no sample {number:,}: the dataset has {len(self):,}, numbered from 0")
        shard = int(np.searchsorted(self._ends, number, side="right"))
        return shard, number - self.first_of(shard)

    def first_of(self, shard: int) -> int:
        """The number of a shard's first sample."""
        return int(self._ends[shard]) - self.manifest.shards[shard].samples

    def page(self, first: int, count: int, wanted: Wanted, *, max_member_bytes: int) -> list[Row]:
        """Up to `count` samples from number `first` on, across shards; see `read`."""
        rows: list[Row] = []
        while len(rows) < count and first + len(rows) < len(self):
            shard, row = self.locate(first + len(rows))
            last = min(row + count - len(rows), self.manifest.shards[shard].samples)
            rows += self.read(shard, row, last, wanted, max_member_bytes=max_member_bytes)
        return rows

    def one(self, number: int, wanted: Wanted, *, max_member_bytes: int = ABSENT) -> Row:
        """One sample; see `read`. Raises UsageError too, see `locate`."""
        shard, row = self.locate(number)
        return self.read(shard, row, row + 1, wanted, max_member_bytes=max_member_bytes)[0]

    def read(self, shard: int, first: int, last: int, wanted: Wanted, *, max_member_bytes: int = ABSENT) -> list[Row]:
        """The rows [first, last) of a shard.

        Args:
            shard: a position in the manifest.
            first, last: at most those that the shard has.
            wanted: which members to fetch.
            max_member_bytes: larger ones are left out of the payloads all the same.

        Raises:
            NotFound: the shard or its index is not there.
            FormatError: its index is damaged, or was made for another tar.
            StorageError: a range can't be read.
        """
        return self._fetch(shard, first, self._index_rows(shard, first, last), wanted, max_member_bytes)

    def scan(self, shard: int, first: int, wanted: Wanted, last: int | None = None) -> Iterator[list[Row]]:
        """The rows of a shard from `first` to `last` (its end), in pieces that fit PIECE_BYTES or are one row.

        Raises as `read` does.
        """
        last = self.manifest.shards[shard].samples if last is None else last
        future = self._ahead.submit(self._piece, shard, first, last, wanted)
        try:
            while rows := future.result():
                first = rows[-1].row + 1
                future = self._ahead.submit(self._piece, shard, first, last, wanted)
                yield rows
        finally:
            future.cancel()

    def key_of(self, number: int) -> str:
        """The key of a sample: one GET of a header."""
        return self.one(number, lambda _: False).key

    def _piece(self, shard: int, first: int, last: int, wanted: Wanted) -> list[Row]:
        if first >= last:
            return []
        index = self._index_rows(shard, first, min(last, first + PIECE_ROWS))
        is_wanted = np.array([wanted(member) for member in index.members], bool)
        fetched = np.where((index.lengths != ABSENT) & is_wanted, index.lengths.astype(np.int64), 0).sum(axis=1) + _GAP_BYTES
        dense = np.minimum(index.size.astype(np.int64), fetched)
        count = max(1, int(np.searchsorted(np.cumsum(dense), PIECE_BYTES, side="right")))
        return self._fetch(shard, first, self._index_rows(shard, first, min(first + count, first + len(index))), wanted, ABSENT)

    def _index_rows(self, shard: int, first: int, last: int) -> ShardIndex:
        row = self.manifest.shards[shard]
        name = index_name(row.name)
        index = read_rows(self._indices.get(name, self._index), first, last, join(self.store.url, name))
        check_fresh(index, samples=row.samples, tar_bytes=row.bytes, xxh128=row.xxh128, name=join(self.store.url, name))
        return index

    def _index(self, name: str) -> bytes:
        try:
            return self.store.read(name)
        except NotFound as error:
            raise NotFound(f"{join(self.store.url, name)} is missing: write it again with `wds-tools index`") from error

    def _fetch(self, shard: int, first: int, index: ShardIndex, wanted: Wanted, max_member_bytes: int) -> list[Row]:
        name, number = self.manifest.shards[shard].name, self.first_of(shard) + first
        if not len(index):
            return []
        members, lengths = index.members, index.lengths.astype(np.int64)
        present = index.lengths != ABSENT
        start = index.start.astype(np.int64)
        begins = start[:, None] + index.offsets.astype(np.int64)
        heads = np.where(present, begins, np.iinfo(np.int64).max).min(axis=1, initial=np.iinfo(np.int64).max)
        heads = np.maximum(np.minimum(heads, start + index.size.astype(np.int64)), start)
        is_fetched = present & np.array([wanted(member) for member in members], bool) & (lengths <= max_member_bytes)
        rows, columns = np.nonzero(is_fetched)
        begin = np.concatenate([start, begins[rows, columns]])
        end = np.concatenate([heads, begins[rows, columns] + lengths[rows, columns]])
        views = self._ranges(name, begin, end)
        payloads: list[dict[str, memoryview]] = [{} for _ in range(len(index))]
        for row, column, view in zip(rows.tolist(), columns.tolist(), views[len(index) :], strict=True):
            payloads[row][members[column]] = view
        facts: tuple[list[Any], ...] = (
            start.tolist(),
            index.size.tolist(),
            index.crc32.tolist(),
            index.text_chars.tolist(),
            index.num_codes.tolist(),
            present.tolist(),
            begins.tolist(),
            (begins + lengths).tolist(),
        )
        return [
            Row(
                number=number + at,
                shard=name,
                row=first + at,
                start=begin_of,
                size=size,
                crc32=crc,
                text_chars=chars,
                num_codes=codes,
                spans={member: (low, high) for member, has, low, high in zip(members, *of, strict=True) if has},
                payloads=payloads[at],
                head=views[at],
            )
            for at, (begin_of, size, crc, chars, codes, *of) in enumerate(zip(*facts, strict=True))
        ]

    def _ranges(self, name: str, begin: NDArray[np.int64], end: NDArray[np.int64]) -> list[memoryview]:
        """The bytes [begin, end) of a file for each pair, fetched as few, longer ranges."""
        order = np.argsort(begin, kind="stable")
        reach = np.maximum.accumulate(end[order])
        is_new = np.ones(len(order), bool)
        is_new[1:] = begin[order][1:] > reach[:-1] + _GAP_BYTES
        firsts = np.flatnonzero(is_new)
        spans = list(zip(begin[order][firsts].tolist(), reach[np.append(firsts[1:], len(order)) - 1].tolist(), strict=True))
        read = self.store.read_range
        parts = (read(name, *spans[0]),) if len(spans) == 1 else self._readers.map(lambda span: read(name, *span), spans)
        blocks = [memoryview(part) for part in parts]
        block = np.empty(len(order), np.int64)
        block[order] = np.cumsum(is_new) - 1
        base = np.array([span[0] for span in spans], np.int64)[block]
        where = zip(block.tolist(), (begin - base).tolist(), (end - base).tolist(), strict=True)
        return [blocks[at][low:high] for at, low, high in where]


def find_key(rows: Rows, prefix: str) -> int | None:
    """The number of the first sample whose key begins with `prefix`, by bisection: about 2 log2(N) small GETs.

    Only right where keys ascend through the set, as this project writes them: elsewhere it may find None for a key that exists,
    but never a sample with another key.
    """
    low, high = 0, len(rows)
    while low < high:
        middle = (low + high) // 2
        if rows.key_of(middle) < prefix:
            low = middle + 1
        else:
            high = middle
    return low if low < len(rows) and rows.key_of(low).startswith(prefix) else None
