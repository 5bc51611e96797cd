"""Which bytes hold a run of samples, by the offsets file of a dataset instead of the indices of its shards.

    OffsetsReader.locate(shard, first, last) -> Place      the groups that hold the samples, and where they lie in the shard

The file is read once for all threads: whole, by requests of 1 MiB at the same time, if it fits OFFSETS_BYTES and may stay in
memory; else in small parts, so that a request for samples costs little more than its own bytes.
Invariant: whoever reads by a Place finds whole samples there, as many, or the offsets are not those of the shard. A file that is
read whole is taken only if it has the manifest's hash: offsets of another dataset may fit whole samples, of other numbers. The
hash of a larger one, of a dataset above 250 GB, only `wds-tools verify` compares: one of many ranks would fetch more of it than
of samples.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from operator import ge
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from wds_tools.dataset.layout import OFFSETS
from wds_tools.errors import FormatError, NotFound
from wds_tools.format.manifest import Manifest
from wds_tools.format.offsets import HEAD_BYTES, OFFSET_BYTES, Groups, hash_offsets, serialize_offsets
from wds_tools.format.tar import BLOCK
from wds_tools.storage import Store, join
from wds_tools.storage.recent import Recent

OFFSETS_BYTES = 64 << 20
"""Of the file in memory, for each reader."""
REQUEST_BYTES = 1 << 20
"""Of a file that is read whole."""
_SMALL_PART = 8 << 10
_PARALLEL_READS = 16


class Place(NamedTuple):
    """Groups of a shard, whole."""

    first: int
    """Their first sample, by its number in the shard, ..."""
    last: int
    """... and the one after their last."""
    group_samples: int
    """Of each but the shard's last."""
    bounds: list[int]
    """Byte of the tar with which each begins, and the one after the last; of the shard's last group the end of the tar."""


class OffsetsReader:
    """Finds samples of a dataset that has an offsets file; for many threads at once.

    Args:
        store: the dataset.
        manifest: its manifest.
        fetch: (name, begin, end, size of the file) -> these bytes of a file of the dataset.
    """

    def __init__(self, store: Store, manifest: Manifest, fetch: Callable[[str, int, int, int], Any]) -> None:
        self._url, self._shards, self._fetch = join(store.url, OFFSETS), manifest.shards, fetch
        self._hash = manifest.offsets_hash
        self._groups = Groups(manifest)
        self._part = part_bytes(self._groups.file_bytes) // OFFSET_BYTES
        self._parts: Recent[int, NDArray[np.uint32]] = Recent(OFFSETS_BYTES, lambda part: part.nbytes)

    def locate(self, shard: int, first: int, last: int) -> Place:
        """Where the samples [first, last) of a shard lie.

        Raises:
            NotFound: the file is not there.
            FormatError: what it says of the shard can't be.
            StorageError: it can't be read.
        """
        entry, num_groups, is_last, size = self._groups.span(shard, first, last)
        info = self._shards[shard]
        end = entry + num_groups + (not is_last)
        bounds: list[int] = []
        while entry < end:
            number, place = divmod(entry, self._part)
            found = self._parts.get(number, self._read)[place : place + end - entry]
            bounds += (found.astype(np.int64) * BLOCK).tolist()
            entry += len(found)
        bounds += [info.bytes] * is_last
        if bounds[-1] > info.bytes or any(map(ge, bounds, bounds[1:])):
            raise FormatError(f"{self._url}: groups of {info.name}, {info.bytes} bytes, begin at {bounds}")
        begin = first // size * size
        return Place(begin, min(begin + num_groups * size, info.samples), size, bounds)

    def _read(self, number: int) -> NDArray[np.uint32]:
        size = self._groups.file_bytes
        begin = HEAD_BYTES + number * self._part * OFFSET_BYTES
        end = min(begin + self._part * OFFSET_BYTES, size)
        starts = range(begin, end, REQUEST_BYTES)

        def fetch(start: int) -> Any:
            return self._fetch(OFFSETS, start, min(start + REQUEST_BYTES, end), size)

        try:
            if len(starts) > 1:
                with ThreadPoolExecutor(_PARALLEL_READS, "wds-offsets") as pool:
                    data = b"".join(pool.map(fetch, starts))
            else:  # as for each small part: no pool
                data = b"".join(map(fetch, starts))
        except NotFound as error:
            raise NotFound(f"{self._url} is missing: copy it, or write it with `wds-tools index`") from error
        offsets = np.frombuffer(data, "<u4")
        is_whole = len(data) == size - HEAD_BYTES
        if is_whole and hash_offsets(self._groups.head + data) != self._hash:
            return np.full_like(offsets, ~np.uint32(0))  # beyond the end of any tar, so that nothing is located
        return offsets


def part_bytes(file_bytes: int) -> int:
    """Size of the parts in which an offsets file of so many bytes is read."""
    return OFFSETS_BYTES if file_bytes <= OFFSETS_BYTES else _SMALL_PART


def put_offsets(store: Store, manifest: Manifest, marked: Iterable[NDArray[np.uint32]]) -> Manifest:
    """Write the offsets file of a dataset, from what was marked of each shard; returns the manifest with its hash."""
    data = serialize_offsets(manifest, marked)
    store.put(OFFSETS, data)
    return replace(manifest, offsets_hash=hash_offsets(data))
