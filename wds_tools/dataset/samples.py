"""Any samples of a dataset, by number: which bytes hold them, and these bytes in few requests.

    IndexReader.read(shard, first, last)    the index of some samples; what was used last is kept, and made once for all threads
    SampleReader.locate(number)             number in the dataset -> (shard, sample_index)
    SampleReader.read(shard, first, ...)    index -> ranges of the wanted members, joined where gaps are small -> fetched
    SampleReader.scan(shard, first, ...)    the same from there on, in pieces, one piece ahead
    SampleReader.stored(shard, rows)        whole samples as they lie in the tar, their CRC-32 compared

Invariant: nothing is read but index files and ranges that hold what was asked for; an index that is not of the shard that the
manifest describes is refused. A key is not in the index: it is read from a sample's first header when it is asked for.
Cost: an index file is one GET (20 bytes a sample), and INDEX_BYTES are kept; a page of samples without images is one GET more.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from wds_tools.dataset.layout import index_name
from wds_tools.errors import FormatError, NotFound, UsageError
from wds_tools.format.checksum import crc32
from wds_tools.format.index import ABSENT, ShardIndex, check_fresh, join_parts, read_part
from wds_tools.format.manifest import Manifest
from wds_tools.format.schema import IMAGE_EXTENSIONS
from wds_tools.format.shard import split_name
from wds_tools.format.tar import first_name
from wds_tools.storage import Store, join
from wds_tools.storage.ahead import ahead
from wds_tools.storage.recent import Recent

INDEX_BYTES = 128 << 20
"""Index files and parsed runs in memory, for each reader."""
RUN_SAMPLES = 2048
"""Samples whose index is parsed at a time."""
PIECE_BYTES = 8 << 20
"""Bytes that `scan` fetches at a time; one piece is read while the next is on its way."""
PIECE_SAMPLES = 2 * RUN_SAMPLES
RUN_BYTES = 40 * RUN_SAMPLES
_GAP_BYTES = 64 << 10
"""Fetching this much for nothing costs less than another request."""
_PARALLEL_READS = 16

Wanted = Callable[[str], bool]
"""Whether the members of this suffix are to be fetched."""


def is_text(suffix: str) -> bool:
    """Members that people can read."""
    return suffix.lower() in ("json", "txt", "text", "caption")


def is_small(suffix: str) -> bool:
    """All members of this project's schema but the source image: text and codes."""
    return is_text(suffix) or suffix.endswith("npy")


def is_image(suffix: str) -> bool:
    """A source image, by the name of its member; "1.jpg" is a conversation's second."""
    return suffix.rpartition(".")[2].lower() in (*IMAGE_EXTENSIONS, "jpeg", "tiff")


class IndexReader:
    """Reads the indices of a dataset's shards; for many threads at once.

    Args:
        store: the dataset.
        manifest: its manifest, which every index has to agree with.
        on_fetch: told the bytes of each index file that was read.
    """

    def __init__(self, store: Store, manifest: Manifest, on_fetch: Callable[[int], object] | None = None) -> None:
        self._store = store
        self._manifest = manifest
        self._on_fetch = on_fetch
        self._files: Recent[int, Any] = Recent(INDEX_BYTES // 2, len)
        self._runs: Recent[tuple[int, int], ShardIndex] = Recent(INDEX_BYTES // 2, lambda _: RUN_BYTES)

    def read(self, shard: int, first: int, last: int) -> ShardIndex:
        """The index of the samples [first, last) of a shard, a position in the manifest.

        Raises:
            NotFound: the index is not there.
            FormatError: it is damaged, or was made for another tar.
            StorageError: it can't be read.
        """
        starts = range(first - first % RUN_SAMPLES, max(last, first + 1), RUN_SAMPLES)
        runs = [self._runs.get((shard, start), self._parse) for start in starts]
        parts = [run.part(max(first - start, 0), last - start) for run, start in zip(runs, starts, strict=True)]
        return join_parts(parts)  # copies: a view would keep its whole run, and the file behind that, as long as whoever has it

    def _parse(self, run: tuple[int, int]) -> ShardIndex:
        """A run of RUN_SAMPLES samples: (shard, first sample), which was not in memory."""
        shard, first = run
        info = self._manifest.shards[shard]
        name = join(self._store.url, index_name(info.name))
        index = read_part(self._files.get(shard, self._fetch), first, min(first + RUN_SAMPLES, info.samples), name)
        check_fresh(index, samples=info.samples, tar_bytes=info.bytes, xxh128=info.xxh128, name=name)
        return index

    def _fetch(self, shard: int) -> Any:
        """The bytes of an index file, which was not in memory."""
        name = index_name(self._manifest.shards[shard].name)
        try:
            data = self._store.read(name)
        except NotFound as error:
            raise NotFound(f"{join(self._store.url, name)}: the index is missing: write it with `wds-tools index`") from error
        if self._on_fetch is not None:
            self._on_fetch(len(data))
        return data


@dataclass(frozen=True, slots=True, kw_only=True)
class PartialSample:
    """One sample as far as it was fetched."""

    number: int
    """Number of the sample in the dataset, from 0."""
    shard: str
    """Name of its tar."""
    sample_index: int
    """Number of the sample in its shard, from 0."""
    start: int
    """First byte of the sample in the tar."""
    size: int
    """Bytes of the sample in the tar, headers and padding included."""
    crc32: int
    text_chars: int
    num_codes: int
    spans: dict[str, tuple[int, int]]
    """Suffix -> first byte of the payload in the tar and the one after it, for all its members in the index's order."""
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
        """The key, from the first header.

        Raises:
            FormatError: there is no header where the index says.
        """
        return split_name(first_name(self.head, self.shard, self.start), self.shard)[0]


class SampleReader:
    """Reads samples of one dataset; for many threads at once.

    Args:
        store: the dataset.
        manifest: its manifest.
    """

    def __init__(self, store: Store, manifest: Manifest) -> None:
        self.store = store
        self.manifest = manifest
        self._ends = np.cumsum(manifest.shards.num_samples)
        self._indices = IndexReader(store, manifest)
        self._fetching = ThreadPoolExecutor(_PARALLEL_READS, "read")
        self._ahead = ThreadPoolExecutor(2, "read-ahead")

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def close(self) -> None:
        """End the threads."""
        self._ahead.shutdown(cancel_futures=True)
        self._fetching.shutdown(cancel_futures=True)

    def locate(self, number: int) -> tuple[int, int]:
        """The shard of a sample, as a position in the manifest, and its sample_index there.

        Raises:
            UsageError: there is no such sample.
        """
        if not 0 <= number < len(self):
            raise UsageError(f"there is no sample {number:,}: the dataset has {len(self):,}, numbered from 0")
        shard = int(np.searchsorted(self._ends, number, side="right"))
        return shard, number - self.first_of(shard)

    def first_of(self, shard: int) -> int:
        """The number of a shard's first sample."""
        return int(self._ends[shard - 1]) if shard else 0

    def page(self, first: int, count: int, wanted: Wanted, *, max_member_bytes: int) -> list[PartialSample]:
        """Up to `count` samples from number `first` on, across shards; see `read`."""
        samples: list[PartialSample] = []
        while len(samples) < count and first + len(samples) < len(self):
            shard, sample_index = self.locate(first + len(samples))
            last = min(sample_index + count - len(samples), int(self.manifest.shards.num_samples[shard]))
            samples += self.read(shard, sample_index, last, wanted, max_member_bytes=max_member_bytes)
        return samples

    def sample(self, number: int, wanted: Wanted, *, max_member_bytes: int = ABSENT) -> PartialSample:
        """One sample; see `read`. Raises UsageError too, see `locate`."""
        shard, sample_index = self.locate(number)
        return self.read(shard, sample_index, sample_index + 1, wanted, max_member_bytes=max_member_bytes)[0]

    def read(self, shard: int, first: int, last: int, wanted: Wanted, *, max_member_bytes: int = ABSENT) -> list[PartialSample]:
        """The samples [first, last) of a shard.

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
        return self._fetch(shard, first, self._indices.read(shard, first, last), wanted, max_member_bytes)

    def scan(self, shard: int, first: int, wanted: Wanted, last: int | None = None) -> Iterator[list[PartialSample]]:
        """The samples of a shard from `first` to `last` (its end), in pieces that fit PIECE_BYTES or are one sample.

        Raises as `read` does.
        """
        last = int(self.manifest.shards.num_samples[shard]) if last is None else last
        future = self._ahead.submit(self._piece, shard, first, last, wanted)
        try:
            while piece := future.result():
                first = piece[-1].sample_index + 1
                future = self._ahead.submit(self._piece, shard, first, last, wanted)
                yield piece
        finally:
            future.cancel()

    def stored(self, shard: int, rows: NDArray[np.int64]) -> Iterator[tuple[ShardIndex, list[memoryview]]]:
        """Some samples of a shard as they lie in its tar, in pieces that fit PIECE_BYTES or are one sample, read ahead.

        Args:
            shard: a position in the manifest.
            rows: places in the shard, ascending.

        Returns:
            The index of a piece's samples, and the bytes of each.

        Raises:
            FormatError: the bytes of a sample are not those that the index was made for; or see `read`.
        """
        info = self.manifest.shards[shard]
        chosen = self._indices.read(shard, 0, info.samples).take(rows)
        pieces = (np.cumsum(chosen.size, dtype=np.int64) - chosen.size) // PIECE_BYTES
        bounds = [0, *(np.flatnonzero(np.diff(pieces)) + 1).tolist(), len(rows)]

        def fetch(bounds: tuple[int, int]) -> tuple[ShardIndex, list[memoryview]]:
            piece = chosen.part(*bounds)
            start = piece.start.astype(np.int64)
            samples = self._ranges(info.name, start, start + piece.size.astype(np.int64))
            for sample, crc, at in zip(samples, piece.crc32.tolist(), start.tolist(), strict=True):
                if crc32(sample) != crc:
                    raise FormatError(
                        f"{join(self.store.url, info.name)}, byte {at}: the sample is damaged: its CRC-32 is another"
                    )
            return piece, samples

        return ahead(fetch, pairwise(bounds))

    def key_of(self, number: int) -> str:
        """The key of a sample: one GET of a header."""
        return self.sample(number, lambda _: False).key

    def number_of(self, key: str) -> int | None:
        """The number of the sample of this key; None: see `find_key`."""
        number = self.find_key(key)
        return number if number is not None and self.key_of(number) == key else None

    def find_key(self, prefix: str) -> int | None:
        """The number of the first sample whose key begins with `prefix`, by bisection: about 2 log2(N) small GETs.

        Only right where keys ascend through the dataset, as this project writes them: elsewhere it may find None for a key that
        exists, but never a sample with another key.
        """
        low, high = 0, len(self)
        while low < high:
            middle = (low + high) // 2
            if self.key_of(middle) < prefix:
                low = middle + 1
            else:
                high = middle
        return low if low < len(self) and self.key_of(low).startswith(prefix) else None

    def _piece(self, shard: int, first: int, last: int, wanted: Wanted) -> list[PartialSample]:
        index = self._indices.read(shard, first, min(last, first + PIECE_SAMPLES))
        is_wanted = np.array([wanted(member) for member in index.members], bool)
        fetched = np.where((index.lengths != ABSENT) & is_wanted, index.lengths.astype(np.int64), 0).sum(axis=1) + _GAP_BYTES
        dense = np.minimum(index.size.astype(np.int64), fetched)
        count = max(1, int(np.searchsorted(np.cumsum(dense), PIECE_BYTES, side="right")))
        return self._fetch(shard, first, index.part(0, count), wanted, ABSENT)

    def _fetch(self, shard: int, first: int, index: ShardIndex, wanted: Wanted, max_member_bytes: int) -> list[PartialSample]:
        if not len(index):
            return []
        name, number = self.manifest.shards[shard].name, self.first_of(shard) + first
        members, lengths = index.members, index.lengths.astype(np.int64)
        present = index.lengths != ABSENT
        start = index.start.astype(np.int64)
        begins = start[:, None] + index.offsets.astype(np.int64)
        heads = np.where(present, begins, np.iinfo(np.int64).max).min(axis=1, initial=np.iinfo(np.int64).max)
        heads = np.maximum(np.minimum(heads, start + index.size.astype(np.int64)), start)
        is_fetched = present & np.array([wanted(member) for member in members], bool) & (lengths <= max_member_bytes)
        samples, columns = np.nonzero(is_fetched)
        begin = np.concatenate([start, begins[samples, columns]])
        end = np.concatenate([heads, begins[samples, columns] + lengths[samples, columns]])
        views = self._ranges(name, begin, end)
        payloads: list[dict[str, memoryview]] = [{} for _ in range(len(index))]
        for sample, column, view in zip(samples.tolist(), columns.tolist(), views[len(index) :], strict=True):
            payloads[sample][members[column]] = view
        columns_of = (start, index.size, index.crc32, index.text_chars, index.num_codes, present, begins, begins + lengths)
        facts: Iterator[Any] = zip(*(column.tolist() for column in columns_of), strict=True)
        return [
            PartialSample(
                number=number + offset,
                shard=name,
                sample_index=first + offset,
                start=sample_start,
                size=size,
                crc32=crc,
                text_chars=chars,
                num_codes=codes,
                spans={member: (low, high) for member, has, low, high in zip(members, *ranges, strict=True) if has},
                payloads=payloads[offset],
                head=views[offset],
            )
            for offset, (sample_start, size, crc, chars, codes, *ranges) in enumerate(facts)
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
        parts = (read(name, *spans[0]),) if len(spans) == 1 else self._fetching.map(lambda span: read(name, *span), spans)
        blocks = [memoryview(part) for part in parts]
        block = np.empty(len(order), np.int64)
        block[order] = np.cumsum(is_new) - 1
        base = np.array([span[0] for span in spans], np.int64)[block]
        ranges = zip(block.tolist(), (begin - base).tolist(), (end - base).tolist(), strict=True)
        return [blocks[number][low:high] for number, low, high in ranges]
