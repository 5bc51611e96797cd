"""Where the groups of all shards begin, in one file: so a reader asks for a run of samples without having read an index.

    marked(start, ...)                  of a finished shard, by its task: the offset of every few samples, kept in its marker
    serialize_offsets(manifest, ...)    offsets.safetensors: one u32 a group, in blocks of 512 bytes, shard after shard
    Groups(manifest).span(...)          samples [first, last) of a shard -> the groups that hold them, and their place in the file

A group of a shard has the samples of Manifest.group_samples or, where its own are so small that a task keeps fewer offsets, more:
16 KiB of them at most. The file's head has a fixed length, so that any part of the file can be fetched by itself.
Invariant: the file is a function of the manifest's rows and of the indices. Cost: 4 bytes for 16 to 32 KiB of data.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np
import orjson
from numpy.typing import NDArray

from wds_tools.errors import FormatError
from wds_tools.format.manifest import Manifest
from wds_tools.format.tar import BLOCK

HEAD_BYTES = 128
"""Of the file, before the first offset."""
OFFSET_BYTES = 4
_MARKED_BYTES = 16 << 10
_Blocks = NDArray[np.uint32]


def _marked_samples(samples: Any, num_bytes: Any) -> Any:
    """Samples from one marked offset of a shard to the next: the largest power of two of them that has 16 KiB on average."""
    return 1 << np.log2(np.maximum(_MARKED_BYTES * samples // np.maximum(num_bytes, 1), 1)).astype(np.int64)


def marked(start: NDArray[Any], num_bytes: int) -> _Blocks:
    """The offsets that a task keeps of a shard, in blocks.

    Args:
        start: (N,) first byte of each sample.
        num_bytes: of the tar.

    Raises:
        FormatError: a sample begins within a block, or beyond 2 TiB.
    """
    blocks, rest = np.divmod(start[:: int(_marked_samples(np.int64(len(start)), num_bytes))], BLOCK)
    if rest.any() or (len(blocks) and blocks[-1] >= 1 << 32):
        raise FormatError(f"samples begin at bytes up to {start[-1]}: expected whole blocks of {BLOCK} bytes, fewer than 2**32")
    return blocks.astype("<u4")


class Span(NamedTuple):
    """The groups that hold some samples of a shard."""

    entry: int
    """Number of the first group among those of all shards: its offset stands at HEAD_BYTES + OFFSET_BYTES * entry."""
    num_groups: int
    is_last: bool
    """Whether they end with the shard; else the offset after theirs is where they end."""
    group_samples: int
    """Of each but the shard's last."""


class Groups:
    """How the offsets file of a dataset is laid out; 24 bytes a shard."""

    def __init__(self, manifest: Manifest) -> None:
        self._samples = manifest.shards.num_samples
        self._marked = _marked_samples(self._samples, manifest.shards.num_bytes)
        self._size = np.maximum(self._marked, manifest.group_samples)
        self._ends = np.cumsum(-(-self._samples // self._size))

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    @property
    def file_bytes(self) -> int:
        """Size of the file."""
        return HEAD_BYTES + OFFSET_BYTES * len(self)

    @property
    def head(self) -> bytes:
        """What the file begins with: that of a safetensors file with one column."""
        entry = {"dtype": "U32", "shape": [len(self)], "data_offsets": [0, OFFSET_BYTES * len(self)]}
        return (HEAD_BYTES - 8).to_bytes(8, "little") + orjson.dumps({"offsets": entry}).ljust(HEAD_BYTES - 8)

    def of_marked(self, shard: int, offsets: _Blocks) -> _Blocks:
        """Those of a shard's marked offsets with which groups begin."""
        return offsets[:: int(self._size[shard] // self._marked[shard])]

    def span(self, shard: int, first: int, last: int) -> Span:
        """The groups of the samples [first, last) of a shard."""
        size, samples = int(self._size[shard]), int(self._samples[shard])
        begin, end = first // size, -(-last // size)
        of_shard = -(-samples // size)
        before = int(self._ends[shard]) - of_shard
        return Span(before + begin, end - begin, end == of_shard, size)


def serialize_offsets(manifest: Manifest, shards: Iterable[_Blocks]) -> bytes:
    """The bytes of the offsets file.

    Args:
        manifest: of the dataset.
        shards: the marked offsets of each of its shards.
    """
    groups = Groups(manifest)
    parts = (groups.of_marked(number, offsets).tobytes() for number, offsets in enumerate(shards))
    data = groups.head + b"".join(parts)
    if len(data) != groups.file_bytes:
        raise FormatError(f"offsets of {(len(data) - HEAD_BYTES) // OFFSET_BYTES} groups, the manifest makes it {len(groups)}")
    return data


def hash_offsets(data: bytes) -> str:
    """ "sha256:<hex>" of the file, as the manifest has it."""
    return f"sha256:{hashlib.sha256(data).hexdigest()}"
