"""Blocks -> samples: one ranged read a block, sliced by the shard's index; no tar parsing on the way.

Cost: a request for each block, and one for each shard's index (the last `_INDEX_CACHE` stay in memory).
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Iterator

from loaders.plan import Block
from wds_tools.errors import FormatError
from wds_tools.format import manifest as manifests
from wds_tools.format.checksum import crc32
from wds_tools.format.index import ABSENT, SUFFIX, ShardIndex, check_fresh, unpack_index
from wds_tools.format.manifest import Manifest, unpack_manifest
from wds_tools.format.schema import Sample
from wds_tools.format.shard import sample_from_members
from wds_tools.format.tar import BLOCK
from wds_tools.storage import Store

_INDEX_CACHE = 256


def read_manifest(store: Store) -> Manifest:
    """The manifest of the data set at this store. Raises NotFound, FormatError."""
    return unpack_manifest(store.read(manifests.NAME), f"{store.url}/{manifests.NAME}")


class BlockReader:
    """Reads blocks of one data set.

    Args:
        store: the data set.
        manifest: its manifest.
        check_crc: compare every sample's bytes with the CRC-32 in the index.
    """

    def __init__(self, store: Store, manifest: Manifest, *, check_crc: bool = False) -> None:
        self._store = store
        self._manifest = manifest
        self._check_crc = check_crc
        self._indices: OrderedDict[int, ShardIndex] = OrderedDict()

    def read(self, block: Block, rows: Iterable[int]) -> Iterator[Sample]:
        """The samples of a block, in the order `rows` (0 is the block's first).

        Raises:
            FormatError: the index or a sample is damaged; names shard, byte and key.
            StorageError: the storage does not answer.
        """
        shard = self._manifest.shards[block.shard]
        index = self._index(block.shard)
        begin = int(index.start[block.first])
        end = int(index.start[block.last - 1]) + int(index.size[block.last - 1])
        data = memoryview(self._store.read_range(shard.name, begin, end))
        starts = (index.start[block.first : block.last].astype("i8") - begin).tolist()
        sizes = index.size[block.first : block.last].tolist()
        offsets = index.offsets[block.first : block.last].tolist()
        lengths = index.lengths[block.first : block.last].tolist()
        for row in rows:
            sample = data[starts[row] : starts[row] + sizes[row]]
            if self._check_crc and crc32(sample) != index.crc32[block.first + row]:
                raise FormatError(f"{self._store.url}/{shard.name}: the sample at byte {begin + starts[row]} is damaged (CRC-32)")
            members = {
                suffix: sample[at : at + length]
                for suffix, at, length in zip(index.members, offsets[row], lengths[row], strict=True)
                if length != ABSENT
            }
            yield sample_from_members(_key(sample[offsets[row][0] - BLOCK :]), members)

    def _index(self, number: int) -> ShardIndex:
        if number in self._indices:
            self._indices.move_to_end(number)
            return self._indices[number]
        row = self._manifest.shards[number]
        name = row.name + SUFFIX
        index = unpack_index(self._store.read(name), f"{self._store.url}/{name}")
        check_fresh(index, row.bytes, row.xxh128, f"{self._store.url}/{name}")
        if len(index) != row.samples:
            raise FormatError(f"{self._store.url}/{name}: {len(index)} samples, the manifest says {row.samples}")
        self._indices[number] = index
        if len(self._indices) > _INDEX_CACHE:
            self._indices.popitem(last=False)
        return index


def _key(header: memoryview) -> str:
    """The key in a member's header: its name up to the first dot."""
    return bytes(header[:100]).partition(b".")[0].decode()
