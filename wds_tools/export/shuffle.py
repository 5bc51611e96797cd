"""Shuffle any number of records in constant memory.

    add(record) -> draw a 64-bit key -> buffers, flushed to bucket files    (the bucket: which of B equal ranges the key is in)
    drain()     -> bucket after bucket: read it, sort it by key, yield, delete it

Every record gets a key of its own, independent and uniform, and what comes out is all records sorted by key. Sorting by
such keys makes each permutation equally likely (two of n keys are equal with probability below n**2 / 2**65; then the earlier
record goes first). The buckets are ranges of keys in ascending order, so they only decide on where the sorting happens:
the order is a function of the seed and the number of records, whatever the number of buckets and the size of the buffers.
Keys are Philox's raw output, which no release of numpy changes.

Cost: memory is the buffers, then one bucket; the disk holds every record once, plus 12 bytes each, less the buckets that
were drained. One file is open at a time.
"""

from __future__ import annotations

import struct
from array import array
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from wds_tools.errors import UsageError
from wds_tools.storage.local import translate

BUFFER_BYTES = 64 << 20
"""Records that wait in memory, over all buckets."""
_HEAD = struct.Struct("<QI")
"""In front of a record in its bucket: key, size in bytes."""
_DRAW = 8192


class Shuffle:
    """Records in, the same records out in random order. First every `add`, then one `drain`.

    Args:
        folder: an empty, existing folder for the bucket files; the caller removes it.
        seed: 0 to 2**64 - 1. The same seed and records give the same order.
        num_buckets: such that all records / num_buckets fits in memory.
        buffer_bytes: see BUFFER_BYTES, the default.
    """

    def __init__(self, folder: Path, *, seed: int, num_buckets: int, buffer_bytes: int | None = None) -> None:
        if not 0 <= seed < 1 << 64:
            raise UsageError(f"seed {seed}: expected 0 to 2**64 - 1")
        if not 0 < num_buckets <= 1 << 32:
            raise UsageError(f"num_buckets {num_buckets}: expected 1 to 2**32")
        self._folder = folder
        self._keys = _draw_keys(seed)
        self._buffers: dict[int, bytearray] = {}
        self._num_buckets = num_buckets
        self._buffer_bytes = BUFFER_BYTES if buffer_bytes is None else buffer_bytes
        self._waiting_bytes = 0

    def add(self, record: bytes) -> None:
        """Take a record in.

        Raises:
            OutOfSpace, StorageError: a bucket can't be written.
        """
        key = next(self._keys)
        bucket = (key >> 32) * self._num_buckets >> 32
        buffer = self._buffers.get(bucket)
        if buffer is None:
            buffer = self._buffers[bucket] = bytearray()
        buffer += _HEAD.pack(key, len(record))
        buffer += record
        self._waiting_bytes += _HEAD.size + len(record)
        if self._waiting_bytes >= self._buffer_bytes:
            self._flush()

    def drain(self) -> Iterator[bytes]:
        """All records in their new order; each bucket file is deleted once it was read.

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


def _draw_keys(seed: int) -> Iterator[int]:
    generator = np.random.Philox(key=seed)
    while True:
        yield from generator.random_raw(_DRAW).tolist()


def _sorted_records(data: bytes) -> Iterator[bytes]:
    keys, starts, ends = array("Q"), array("Q"), array("Q")
    at = 0
    while at < len(data):
        key, size = _HEAD.unpack_from(data, at)
        keys.append(key)
        starts.append(at + _HEAD.size)
        at += _HEAD.size + size
        ends.append(at)
    for place in np.argsort(np.frombuffer(keys, np.uint64), kind="stable").tolist():
        yield data[starts[place] : ends[place]]
