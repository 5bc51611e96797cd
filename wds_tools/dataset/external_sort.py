"""Sort any number of records by 64-bit keys in constant memory.

    add(key, record)            -> buffers, flushed to bucket files    (the bucket: which of B equal ranges the key is in)
    drain()                     -> bucket after bucket: read it, sort it by key, yield, delete it
    add_hashed(digest, record), by_hash()    the same by 16 bytes of a hash: all records of one hash together
    merged(sorts, bucket)                    a bucket of several sorts, as if all records had been added to one

The buckets are ranges of keys in ascending order, so they only decide on where the sorting happens. Of equal keys the earlier
record goes first. Cost: memory is the buffers, then one bucket; the disk holds every record once, plus 12 bytes each, less the
buckets that were drained. One file is open at a time.
"""

from __future__ import annotations

import struct
from array import array
from collections.abc import Iterator, Sequence
from itertools import groupby
from operator import itemgetter
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from wds_tools.storage.local import translate

BUFFER_BYTES = 64 << 20
"""Records that wait in memory, over all buckets."""
BUCKET_BYTES = 64 << 20
"""What is sorted at a time in memory, about."""
_HEAD = struct.Struct("<QI")
"""In front of a record in its bucket: key, size in bytes."""


def count_buckets(num_bytes: int) -> int:
    """Number of the buckets for so many bytes."""
    return num_bytes // BUCKET_BYTES + 1


def bucket_of(keys: NDArray[np.uint64], num_buckets: int) -> NDArray[np.int64]:
    """(N,) the bucket of each key."""
    return ((keys >> 32) * num_buckets >> 32).astype(np.int64)


class ExternalSort:
    """Records in, the same records out by their keys. First every `add`, then one `drain`, or `flush` and `merged`.

    Args:
        folder: for the bucket files: it is made here, and the caller removes it.
        num_bytes: of all records, about.
    """

    def __init__(self, folder: Path, num_bytes: int) -> None:
        folder.mkdir()
        self._folder = folder
        self._buffers: dict[int, bytearray] = {}
        self._num_buckets = count_buckets(num_bytes)
        self._waiting_bytes = 0

    def add(self, key: int, record: bytes) -> None:
        """Take a record in; its key is 0 to 2**64 - 1.

        Raises:
            OutOfSpace, StorageError: a bucket can't be written.
        """
        bucket = (key >> 32) * self._num_buckets >> 32
        buffer = self._buffers.get(bucket)
        if buffer is None:
            buffer = self._buffers[bucket] = bytearray()
        buffer += _HEAD.pack(key, len(record))
        buffer += record
        self._waiting_bytes += _HEAD.size + len(record)
        if self._waiting_bytes >= BUFFER_BYTES:
            self.flush()

    def drain(self) -> Iterator[tuple[int, bytes]]:
        """All (key, record) in the order of the keys; each bucket file is deleted once it was read.

        Raises:
            StorageError: a bucket can't be read.
        """
        self.flush()
        for bucket in range(self._num_buckets):
            for number, record in enumerate(merged([self._folder], bucket)):
                if not number:  # all of it is in memory
                    _path(self._folder, bucket).unlink()
                yield record

    def add_hashed(self, digest: bytes, record: bytes) -> None:
        """Take in a record by its hash, of 16 bytes. Raises as `add`."""
        self.add(int.from_bytes(digest[:8], "big"), digest[8:] + record)

    def by_hash(self) -> Iterator[list[bytes]]:
        """The records of each hash, the earlier first, where `add_hashed` took them in. Raises as `drain`."""
        for _, records in groupby(self.drain(), itemgetter(0)):
            same: dict[bytes, list[bytes]] = {}
            for _, record in records:
                same.setdefault(record[:8], []).append(record[8:])
            yield from same.values()

    def flush(self) -> None:
        """Write what waits in memory. Raises as `add`."""
        for bucket, buffer in self._buffers.items():
            path = _path(self._folder, bucket)
            try:
                with path.open("ab") as file:
                    file.write(buffer)
            except OSError as error:
                raise translate(error, "write", str(path)) from error
        self._buffers.clear()
        self._waiting_bytes = 0


def merged(folders: Sequence[Path], bucket: int) -> Iterator[tuple[int, bytes]]:
    """All (key, record) of a bucket of several sorts of one size, by their keys; of equal ones those of the earlier sort first.

    Raises:
        StorageError: it can't be read.
    """
    pieces: list[bytes] = []
    for path in (_path(folder, bucket) for folder in folders):
        try:
            pieces.append(path.read_bytes())
        except FileNotFoundError:
            continue  # no key fell into this range
        except OSError as error:
            raise translate(error, "read", str(path)) from error
    yield from _sorted_records(b"".join(pieces))


def _path(folder: Path, bucket: int) -> Path:
    return folder / f"bucket-{bucket:06d}"


def _sorted_records(data: bytes) -> Iterator[tuple[int, bytes]]:
    keys, starts, ends = array("Q"), array("Q"), array("Q")
    at = 0
    while at < len(data):
        key, size = _HEAD.unpack_from(data, at)
        keys.append(key)
        starts.append(at + _HEAD.size)
        at += _HEAD.size + size
        ends.append(at)
    for place in np.argsort(np.frombuffer(keys, np.uint64), kind="stable").tolist():
        yield keys[place], data[starts[place] : ends[place]]
