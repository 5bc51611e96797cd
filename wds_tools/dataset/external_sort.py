"""Sort any number of records by 64-bit keys in constant memory.

    add(key, record) -> buffers, flushed to bucket files    (the bucket: which of B equal ranges the key is in)
    drain()          -> bucket after bucket: read it, sort it by key, yield, delete it

The buckets are ranges of keys in ascending order, so they only decide on where the sorting happens. Of equal keys the earlier
record goes first. Cost: memory is the buffers, then one bucket; the disk holds every record once, plus 12 bytes each, less the
buckets that were drained. One file is open at a time.
"""

from __future__ import annotations

import struct
from array import array
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from wds_tools.errors import UsageError
from wds_tools.storage.local import translate

_BUFFER_BYTES = 64 << 20
"""Records that wait in memory, over all buckets."""
_BUCKET_BYTES = 64 << 20
_MAX_BUCKETS = 4096
_HEAD = struct.Struct("<QI")
"""In front of a record in its bucket: key, size in bytes."""


class ExternalSort:
    """Records in, the same records out by their keys. First every `add`, then one `drain`.

    Args:
        folder: an empty, existing folder for the bucket files; the caller removes it.
        num_buckets: such that all records / num_buckets fits in memory.
        buffer_bytes: records that wait in memory, over all buckets.
    """

    def __init__(self, folder: Path, *, num_buckets: int, buffer_bytes: int = _BUFFER_BYTES) -> None:
        if not 0 < num_buckets <= 1 << 32:
            raise UsageError(f"num_buckets {num_buckets}: expected 1 to 2**32")
        self._folder = folder
        self._buffers: dict[int, bytearray] = {}
        self._num_buckets = num_buckets
        self._buffer_bytes = buffer_bytes
        self._waiting_bytes = 0

    @classmethod
    def of_size(cls, folder: Path, num_bytes: int) -> ExternalSort:
        """One for records of about so many bytes in all; makes the folder."""
        folder.mkdir()
        return cls(folder, num_buckets=min(num_bytes // _BUCKET_BYTES + 1, _MAX_BUCKETS))

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
        if self._waiting_bytes >= self._buffer_bytes:
            self._flush()

    def drain(self) -> Iterator[tuple[int, bytes]]:
        """All (key, record) in the order of the keys; each bucket file is deleted once it was read.

        Raises:
            StorageError: a bucket can't be read.
        """
        self._flush()
        for bucket in range(self._num_buckets):
            path = self._path(bucket)
            try:
                data = path.read_bytes()
                path.unlink()
            except FileNotFoundError:
                continue  # no key fell into this range
            except OSError as error:
                raise translate(error, "read", str(path)) from error
            yield from _sorted_records(data)
            del data  # before the next is read

    def _flush(self) -> None:
        for bucket, buffer in self._buffers.items():
            path = self._path(bucket)
            try:
                with path.open("ab", buffering=0) as file:
                    view = memoryview(buffer)
                    while view:  # an unbuffered write may take a part only
                        view = view[file.write(view) :]
            except OSError as error:
                raise translate(error, "write", str(path)) from error
        self._buffers.clear()
        self._waiting_bytes = 0

    def _path(self, bucket: int) -> Path:
        return self._folder / f"bucket-{bucket:06d}"


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
