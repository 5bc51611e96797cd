"""Rebuild what can be derived: the index files of a data set, from its shards.

Every shard is first checked against the manifest, so a rebuilt index never blesses a damaged shard.
"""

from __future__ import annotations

from wds_tools.dataset.read import read_manifest
from wds_tools.errors import FormatError
from wds_tools.format.checksum import content_hash, crc32
from wds_tools.format.index import SUFFIX, IndexBuilder, ShardIndex, pack_index
from wds_tools.format.shard import read_samples, sample_from_members
from wds_tools.storage import Store


def rebuild_indices(store: Store) -> int:
    """Write the index of every shard anew.

    Returns:
        Number of index files written.

    Raises:
        FormatError: a shard is not what the manifest says.
    """
    manifest = read_manifest(store)
    for row in manifest.shards:
        tar = memoryview(store.read(row.name))
        xxh128 = content_hash(tar).hexdigest()
        if (len(tar), xxh128) != (row.bytes, row.xxh128):
            raise FormatError(
                f"{store.url}/{row.name}: {len(tar)} bytes, xxh128 {xxh128[:12]}; the manifest says "
                f"{row.bytes} bytes, xxh128 {row.xxh128[:12]}: the shard was changed or damaged"
            )
        store.put(row.name + SUFFIX, pack_index(_index_of(tar, xxh128, row.name)))
    return len(manifest.shards)


def _index_of(tar: memoryview, xxh128: str, name: str) -> ShardIndex:
    """The index of a complete shard in memory.

    Raises:
        FormatError: the tar or a sample in it is broken.
    """
    builder = IndexBuilder()
    for stored in read_samples(tar, name):
        sample = sample_from_members(stored.key, stored.payloads)
        span = tar[stored.start : stored.end]
        builder.add(stored.start, len(span), stored.layout, crc32(span), len(sample.text), sample.num_codes)
    return builder.build(len(tar), xxh128)
