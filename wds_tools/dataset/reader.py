"""Read a dataset: manifest -> shards -> samples, in order, streaming.

Invariant: a shard that is not byte for byte what the manifest says (size, XXH3-128, number of samples) is refused, at the
latest when its last byte was read. Memory is one read buffer plus one sample.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from typing import BinaryIO

import numpy as np

from wds_tools.dataset.layout import MANIFEST, PLAN, REMOVABLE, TAR_SUFFIX
from wds_tools.errors import FormatError, NotFound, UsageError
from wds_tools.format.checksum import content_hash
from wds_tools.format.manifest import Manifest, parse_manifest
from wds_tools.format.schema import ANY_MEMBERS, Sample
from wds_tools.format.shard import StoredSample, group_samples, sample_from_members
from wds_tools.format.shards import ShardInfo
from wds_tools.format.tar import Member, TarReader
from wds_tools.storage import LocalStore, Store

_READ_BYTES = 4 << 20
_MOST_LISTED = 1000
_MAX_EXPECTED_BYTES = 1 << 30
"""More of a shard than this is believed when it arrives: a manifest may claim anything."""


def read_manifest(
    store: Store, *, any_members: bool = False, instead_of_rows: str = "name the datasets they were made of"
) -> Manifest:
    """The manifest of a complete dataset.

    Args:
        store: the dataset.
        any_members: take indexed third-party tars too, whose samples are not of this project's schema.
        instead_of_rows: what a user who named token rows is to do, where the schema is needed.

    Raises:
        NotFound: there is none: not a dataset, or one that is not finished; or nothing is there at all.
        FormatError: see parse_manifest.
        UsageError: it is one of any members, or of token rows, and the caller needs the schema.
    """
    try:
        stream = store.open(MANIFEST)
    except NotFound as error:
        raise NotFound(_no_manifest(store)) from error
    with stream:
        manifest = parse_manifest(stream, f"{store.url}/{MANIFEST}")
    if any_members:
        return manifest
    if rows := manifest.token_rows:
        made_of = ", ".join(str(made.get("url")) for made in manifest.source.get("inputs", ()))
        raise UsageError(
            f"{store.url} holds rows of {rows.get('length')} tokens that `wds-tools pack` made of {made_of}, no samples with "
            f"texts, images or codes: {instead_of_rows}"
        )
    if manifest.schema_version == ANY_MEMBERS:
        raise UsageError(
            f"{store.url} is indexed WebDataset data of any members ({', '.join(manifest.members)}): not in this project's "
            "schema; loaders can stream it, this command can't"
        )
    return manifest


def _no_manifest(store: Store) -> str:
    """What is there in place of a dataset, and what makes one of it."""
    names = [entry.name for entry in islice(store.list(), _MOST_LISTED)]
    if isinstance(store, LocalStore) and not names:
        return f"{store.url}: there is no such folder, or nothing is in it"
    tar = next((name for name in names if name.endswith(TAR_SUFFIX) and not REMOVABLE.fullmatch(name)), None)
    if tar is None or PLAN in names:
        what = "it is not a dataset, or making it (run the same command with --resume) or copying it did not finish"
        return f"{store.url} has no {MANIFEST}: {what}"
    return (
        f"{store.url} has no {MANIFEST}, but tars such as {tar}: `wds-tools convert pairs --input {store.url} --output OUTPUT` "
        f"makes a dataset of their images and captions; `wds-tools index {store.url}` is enough to stream them as they are"
    )


class ShardBytes:
    """Reads shards whole, one after the other, into the same memory: fresh memory would take longer than the reading."""

    def __init__(self) -> None:
        self._buffer = np.empty(0, np.uint8)

    def __reduce__(self) -> tuple[type[ShardBytes], tuple[()]]:
        return ShardBytes, ()  # without the memory

    def read(self, store: Store, name: str, likely_bytes: int) -> tuple[memoryview, str]:
        """A shard's bytes, which are good until the next call, and their XXH3-128.

        Args:
            store, name: where it is.
            likely_bytes: what it has, as far as is known.

        Raises:
            NotFound: there is no such shard.
            StorageError: it can't be read.
        """
        size = 0
        digest = content_hash()
        self._grow(min(likely_bytes, _MAX_EXPECTED_BYTES) + 1, keep=0)
        with store.open(name) as stream:
            while count := stream.readinto(piece := self._buffer.data[size : size + _READ_BYTES]):
                digest.update(piece[:count])
                size += count
                if size == len(self._buffer):
                    self._grow(2 * size, keep=size)
        return self._buffer.data[:size].toreadonly(), digest.hexdigest()

    def _grow(self, size: int, *, keep: int) -> None:
        if size > len(self._buffer):
            grown = np.empty(size, np.uint8)
            grown[:keep] = self._buffer[:keep]
            self._buffer = grown


def read_shard(store: Store, shard: ShardInfo, first: int = 0) -> Iterator[Sample]:
    """The samples of a shard in order, from number `first` on; those before it are read, but not parsed.

    Raises:
        FormatError: the shard is damaged, or not what the manifest says.
        StorageError: it can't be read.
    """
    for stored in islice(read_stored(store, shard), first, None):
        yield parse_stored(store, shard, stored)


def parse_stored(store: Store, shard: ShardInfo, stored: StoredSample) -> Sample:
    """A sample of a shard. Raises FormatError: it breaks the schema."""
    try:
        return sample_from_members(stored.key, stored.payloads)
    except FormatError as error:
        raise FormatError(f"{store.url}/{shard.name}, byte {stored.start}: {error}") from error


def read_stored(store: Store, shard: ShardInfo) -> Iterator[StoredSample]:
    """The same, not yet parsed. Payloads are views into the read buffer."""
    name = f"{store.url}/{shard.name}"
    count = 0
    with store.open(shard.name) as stream:
        for stored in group_samples(_members(stream, shard, name), name):
            count += 1
            yield stored
    if count != shard.samples:
        raise FormatError(f"{name}: {count} samples, the manifest says {shard.samples}")


def _members(stream: BinaryIO, shard: ShardInfo, name: str) -> Iterator[Member]:
    reader = TarReader(name, max_member_bytes=shard.bytes)
    digest = content_hash()
    size = 0
    while data := stream.read(_READ_BYTES):
        digest.update(data)
        size += len(data)
        yield from reader.feed(data)
    reader.close()
    check_unchanged(shard, tar_bytes=size, xxh128=digest.hexdigest(), name=name)


def check_unchanged(shard: ShardInfo, *, tar_bytes: int, xxh128: str, name: str) -> None:
    """Raise FormatError unless a shard's bytes are those that the manifest describes; `name` is for the message."""
    if (tar_bytes, xxh128) != (shard.bytes, shard.xxh128):
        raise FormatError(
            f"{name}: {tar_bytes} bytes, xxh128 {xxh128[:12]}; the manifest says {shard.bytes} bytes, "
            f"xxh128 {shard.xxh128[:12]}: the shard was changed or damaged"
        )
