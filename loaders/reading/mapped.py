"""Local shards, mapped: their bytes stay in the page cache that all processes share.

    MappedShards(store, shards).get(shard) -> Mapped

A mapping holds a descriptor: `_most_mapped` files stay mapped, any others are for as long as a batch is read. Before a batch is
sliced, each file is asked for its size: to touch what was cut off would end the process. Usable from many threads.
"""

from __future__ import annotations

import faulthandler
import resource
from mmap import mmap
from typing import NamedTuple

from wds_tools.errors import FormatError
from wds_tools.format.shards import Shards
from wds_tools.storage import LocalStore, join

_OPEN_SHARDS = 4096


class Mapped(NamedTuple):
    """A local shard."""

    view: memoryview
    """Its bytes, as far as it was mapped."""
    size: int
    """Its size in bytes at this moment; touching what lies beyond would end the process (SIGBUS)."""
    stays: bool
    """Whether it stays mapped; else nothing may refer to it for long."""


class MappedShards:
    """The shards of a local source.

    Args:
        store, shards: the source.
        num_sources: that share the files that may stay mapped.
    """

    def __init__(self, store: LocalStore, shards: Shards, num_sources: int) -> None:
        self._store, self._shards = store, shards
        self._maps: dict[int, memoryview] = {}
        self._most_maps = _most_mapped() // num_sources

    def get(self, shard: int) -> Mapped:
        """A shard.

        Raises:
            FormatError: it was not as long as the manifest says when it was mapped.
            StorageError: it can't be read.
        """
        view = self._maps.get(shard)
        if view is None:
            info = self._shards[shard]
            if not faulthandler.is_enabled():  # a file may still be cut between the look at its size and the reading
                faulthandler.enable(2)
            view = self._store.map(info.name)
            if len(view) != info.bytes:
                raise self.cut_off(shard, len(view))
            if len(self._maps) < self._most_maps:
                self._maps[shard] = view
        return Mapped(view, view.obj.size() if isinstance(view.obj, mmap) else 0, shard in self._maps)

    def cut_off(self, shard: int, num_bytes: int) -> FormatError:
        """What to raise for a shard that has so many bytes."""
        info = self._shards[shard]
        return FormatError(
            f"{join(self._store.url, info.name)}: {num_bytes} bytes, the manifest says {info.bytes}: "
            "the shard was cut off or replaced"
        )


def _most_mapped() -> int:
    """Files that a reader may keep mapped: they hold a quarter of the descriptors that the process may have."""
    allowed, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return _OPEN_SHARDS if allowed == resource.RLIM_INFINITY else min(allowed // 4, _OPEN_SHARDS)
