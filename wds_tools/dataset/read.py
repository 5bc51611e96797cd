"""Read a data set: manifest -> shards -> samples, in order, streaming.

Invariant: a shard that is not byte for byte what the manifest says (size, XXH3-128, number of samples) is refused, at the
latest when its last byte was read. Memory is one read buffer plus one sample.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import BinaryIO

from wds_tools.errors import FormatError, NotFound
from wds_tools.format import manifest as manifests
from wds_tools.format.checksum import content_hash
from wds_tools.format.manifest import Manifest, ShardRow, unpack_manifest
from wds_tools.format.schema import Sample
from wds_tools.format.shard import StoredSample, group_samples, sample_from_members
from wds_tools.format.tar import Member, TarReader
from wds_tools.storage import Store

_READ_BYTES = 4 << 20


def read_manifest(store: Store) -> Manifest:
    """The manifest of a complete data set.

    Raises:
        NotFound: there is none: not a data set, or one that is not finished.
        FormatError: see unpack_manifest.
    """
    try:
        data = store.read(manifests.NAME)
    except NotFound as error:
        raise NotFound(
            f"{store.url} has no {manifests.NAME}: it is not a data set, or its conversion did not finish "
            "(run the same command with --resume)"
        ) from error
    return unpack_manifest(data, f"{store.url}/{manifests.NAME}")


def read_shard(store: Store, row: ShardRow) -> Iterator[Sample]:
    """The samples of a shard in order.

    Raises:
        FormatError: the shard is damaged, or not what the manifest says.
        StorageError: it can't be read.
    """
    for stored in read_stored(store, row):
        try:
            sample = sample_from_members(stored.key, stored.payloads)
        except FormatError as error:
            raise FormatError(f"{store.url}/{row.name}, byte {stored.start}: {error}") from error
        yield sample


def read_stored(store: Store, row: ShardRow) -> Iterator[StoredSample]:
    """The same, not yet parsed. Payloads are views into the read buffer."""
    name = f"{store.url}/{row.name}"
    count = 0
    with store.open(row.name) as stream:
        for stored in group_samples(_members(stream, row, name), name):
            count += 1
            yield stored
    if count != row.samples:
        raise FormatError(f"{name}: {count} samples, the manifest says {row.samples}")


def _members(stream: BinaryIO, row: ShardRow, name: str) -> Iterator[Member]:
    reader = TarReader(name, max_member_bytes=row.bytes)
    digest = content_hash()
    size = 0
    while data := stream.read(_READ_BYTES):
        digest.update(data)
        size += len(data)
        yield from reader.feed(data)
    reader.close()
    if (size, digest.hexdigest()) != (row.bytes, row.xxh128):
        raise FormatError(
            f"{name}: {size} bytes, xxh128 {digest.hexdigest()[:12]}; the manifest says {row.bytes} bytes, xxh128 "
            f"{row.xxh128[:12]}: the shard was changed or damaged"
        )
