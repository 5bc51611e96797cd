"""Index tars: write the index file of each beside it; for tars that have no manifest, also that.

    rebuild_indices   the shards of a dataset: each is checked against the manifest first, so that no index blesses damage
    index_tars        a folder of any WebDataset tars: what their manifest says is what was found

Killed on the way, either leaves whole index files and no new manifest; the same call begins again.
Invariant: an index is a function of its tar and of the schema of the dataset. Memory is one shard a process.
"""

from __future__ import annotations

import contextlib
import sys
from collections import Counter
from collections.abc import Hashable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from wds_tools.dataset.layout import MANIFEST, PLAN, TAR_SUFFIX, index_name
from wds_tools.dataset.lease import Lease
from wds_tools.dataset.offsets import put_offsets
from wds_tools.dataset.reader import ShardBytes, check_unchanged, read_manifest
from wds_tools.errors import FormatError, NotFound, OutOfSpace, StorageError, UsageError, WorkerDied
from wds_tools.format.codes import NO_LAYOUTS, CodeGrid
from wds_tools.format.index import parse_index, serialize_index
from wds_tools.format.manifest import INDEX_COMMAND, PASSED_OVER, Manifest, are_plain_names, serialize_manifest
from wds_tools.format.offsets import marked
from wds_tools.format.schema import ANY_MEMBERS, SCHEMA_VERSION, check_key, validate
from wds_tools.format.shard import form_of, sample_from_members
from wds_tools.format.shards import ShardInfo, Shards
from wds_tools.format.tar.scan import Scan, scan_tar
from wds_tools.run.local import Report, run_tasks
from wds_tools.run.progress import Advance, Progress
from wds_tools.storage import Store, join
from wds_tools.terminal import counted

_COMPRESSED = {
    ".tar.gz": "gunzip",
    ".tgz": "gunzip -S .tgz",
    ".tar.bz2": "bunzip2",
    ".tar.xz": "unxz",
    ".tar.zst": "unzstd",
    ".tar.lz4": "unlz4",
}


@dataclass(frozen=True)
class Contents:
    """What the samples of a shard hold; nothing is known of any if they are not of this project's schema."""

    data_types: Counter[str] = field(default_factory=Counter)
    text_chars: list[int] = field(default_factory=list)
    """Of each sample, as are `num_codes`."""
    num_codes: list[int] = field(default_factory=list)
    schema_versions: set[int] = field(default_factory=set)

    def add(self, data_type: str, text_chars: int, num_codes: int, schema_version: int = SCHEMA_VERSION) -> None:
        """Count the next sample."""
        self.schema_versions.add(schema_version)
        self.data_types[data_type] += 1
        self.text_chars.append(text_chars)
        self.num_codes.append(num_codes)

    def totals(self) -> dict[str, Any]:
        """As a manifest has them."""
        data_types = dict(sorted(self.data_types.items()))
        return {"data_types": data_types, "text_chars": sum(self.text_chars), "num_codes": sum(self.num_codes)}


def rebuild_indices(store: Store, *, workers: int = 1, quiet: bool = True) -> Manifest:
    """Write the index of every shard of a dataset again.

    Args:
        store: the dataset.
        workers: processes to use.
        quiet: show no progress.

    Returns:
        Its manifest.

    Raises:
        NotFound: there is no manifest.
        FormatError: a shard is not what the manifest says; or other tars lie where indexed ones did.
        UsageError, StorageError: see index_tars.
    """
    manifest = read_manifest(store, any_members=True)
    if manifest.is_indexed and (changed := {shard.name for shard in manifest.shards}.symmetric_difference(_tars(store))):
        raise FormatError(
            f"{store.url}: {counted(len(changed), 'tar')} came or went since it was indexed ({min(changed)}): "
            f"remove its {MANIFEST} to index what is there now"
        )
    with _lease_of(store) as lease:
        _, offsets, _, _ = _run(_IndexShard(store, manifest.schema_version, manifest.layouts), manifest.shards, workers, quiet)
        return _publish(store, lease, manifest, offsets)


def index_tars(store: Store, *, workers: int = 1, quiet: bool = True) -> Manifest:
    """Make a dataset of all tars below a folder or prefix.

    Args:
        store: the folder. Index files are written beside the tars, and the manifest last.
        workers: processes to use.
        quiet: show no progress.

    Returns:
        The manifest. Its shards are in the order of their names; its schema version is this project's if that of every sample
        is, else ANY_MEMBERS.

    Raises:
        NotFound: there are no tars.
        UsageError: there are compressed ones, or the beginnings of a dataset; or another run is writing there.
        FormatError: a tar is damaged, or no WebDataset tar.
        StorageError: a tar can't be read, or nothing can be written beside it.
    """
    if store.exists(PLAN):
        raise UsageError(f"{store.url} holds an unfinished dataset: repeat the command that began it, with --resume")
    nothing = Contents().totals()
    tars = [ShardInfo(name=name, samples=0, bytes=size, xxh128="", members=(), **nothing) for name, size in _tars(store).items()]
    with _lease_of(store) as lease:
        shards, offsets, num_passed_over, newest = _run(_IndexShard(store, None, NO_LAYOUTS), tars, workers, quiet)
        counts = {"counts": {PASSED_OVER: num_passed_over}} if num_passed_over else {}
        is_ours = all(shard.data_types or not shard.samples for shard in shards)
        manifest = Manifest(
            shards=Shards.of(shard if is_ours else _without_contents(store, shard) for shard in shards),
            inputs=sum(shard.samples for shard in shards),
            source={"command": INDEX_COMMAND, "python": sys.version.split()[0], **counts},
            schema_version=max(newest, SCHEMA_VERSION) if is_ours else ANY_MEMBERS,
        )
        return _publish(store, lease, manifest, offsets)


_Indexed = tuple[ShardInfo, NDArray[np.uint32], int, int]


@dataclass(frozen=True)
class _IndexShard:
    """Writes the index of a shard, in whatever process it runs; gives what a manifest says of it, its marked offsets, members
    passed over, and the newest schema that a sample needs."""

    store: Store
    schema_version: int | None
    """As its manifest says; None: there is no manifest, and of the shard no more is known than its name and likely size."""
    layouts: Mapping[str, CodeGrid]
    """Of the code columns, as it says."""
    shards: ShardBytes = field(default_factory=ShardBytes)

    def __call__(self, shard: ShardInfo, report: Report) -> _Indexed:
        where = join(self.store.url, shard.name)
        tar, xxh128 = self.shards.read(self.store, shard.name, shard.bytes)
        if self.schema_version is not None:
            check_unchanged(shard, tar_bytes=len(tar), xxh128=xxh128, name=where)
        scan = scan_tar(tar, where)
        contents = Contents()
        if self.schema_version != ANY_MEMBERS:
            try:
                contents = _contents(scan, tar, self.layouts)
            except FormatError:  # of the first sample that isn't ours: nothing is lost by trying
                if self.schema_version is not None:
                    raise
        index = scan.index(tar, xxh128, contents.text_chars, contents.num_codes)
        _put(self.store, index_name(shard.name), serialize_index(index))
        report(Advance(units=shard.bytes, samples=len(index)))
        measured = {"samples": len(index), "bytes": len(tar), "xxh128": xxh128, "members": index.members, **contents.totals()}
        row = shard if self.schema_version is not None else replace(shard, **measured)
        newest = max(contents.schema_versions, default=ANY_MEMBERS)
        return row, marked(index.start, len(tar)), scan.num_passed_over, newest


def _contents(scan: Scan, tar: memoryview, layouts: Mapping[str, CodeGrid]) -> Contents:
    """What the samples hold; of each form the first is parsed and validated, and speaks for the others.

    Raises:
        FormatError: one is not of this project's schema.
    """
    contents = Contents()
    known: dict[Hashable, tuple[str, int]] = {}
    for key, payloads in zip(scan.keys, scan.payloads(tar), strict=True):
        form, text = form_of(payloads) or (None, "")
        if form in known:
            check_key(key)
            data_type, num_codes = known[form]
            contents.add(data_type, len(text), num_codes)
        else:
            sample = sample_from_members(key, payloads)
            validate(sample, layouts)
            contents.add(sample.data_type, sample.text_chars, sample.num_codes, sample.schema_version)
            if form is not None:
                known[form] = (sample.data_type, sample.num_codes)
    return contents


def _without_contents(store: Store, shard: ShardInfo) -> ShardInfo:
    """What the manifest says of a shard that is of this project's schema, in a dataset that isn't; its index is written again."""
    if shard.data_types:
        index = parse_index(store.read(index_name(shard.name)), join(store.url, index_name(shard.name)))
        none = np.zeros(len(index), "<u4")
        _put(store, index_name(shard.name), serialize_index(replace(index, text_chars=none, num_codes=none)))
    return replace(shard, **Contents().totals())


def _tars(store: Store) -> dict[str, int]:
    """The tars below the root, sorted by name, and their sizes. Raises NotFound, UsageError: see index_tars."""
    sizes = {}
    for entry in store.list():
        compressed = next((suffix for suffix in _COMPRESSED if entry.name.endswith(suffix)), None)
        if compressed:
            raise UsageError(
                f"{join(store.url, entry.name)} is compressed, and can't be read from the middle: "
                f"unpack it (and its like) with `{_COMPRESSED[compressed]}`, or move it away"
            )
        if entry.name.endswith(TAR_SUFFIX):
            if not are_plain_names([entry.name]):
                raise UsageError(f"{store.url}: the name {entry.name!r} can't be written down in a manifest: rename the file")
            sizes[entry.name] = entry.size
    if not sizes:
        raise NotFound(f"{store.url} has no {MANIFEST} and no {TAR_SUFFIX} files: give the folder of a dataset, or of tars")
    return sizes


def _run(
    index_shard: _IndexShard, shards: Sequence[ShardInfo], workers: int, quiet: bool
) -> tuple[list[ShardInfo], list[NDArray[np.uint32]], int, int]:
    """Index shards; what came of each, and its marked offsets, in the same order; members passed over, and the newest schema."""
    with Progress("index", sum(shard.bytes for shard in shards), quiet=quiet) as progress:
        try:
            with closing(run_tasks(index_shard, shards, workers=workers, on_report=progress)) as found:
                indexed = {done[0].name: done for done in found}
        except WorkerDied as error:
            raise WorkerDied(
                "a worker process ended without a word: it was killed, or memory ran out. Each holds a whole shard: "
                "run again, with fewer --workers if memory was short"
            ) from error
    ordered = [indexed[shard.name] for shard in shards]
    rows, offsets = [row for row, _, _, _ in ordered], [kept for _, kept, _, _ in ordered]
    newest = max((version for _, _, _, version in ordered), default=ANY_MEMBERS)
    return rows, offsets, sum(number for _, _, number, _ in ordered), newest


def _publish(store: Store, lease: Lease, manifest: Manifest, offsets: Sequence[NDArray[np.uint32]]) -> Manifest:
    """The offsets, and the manifest last, if it says anything new."""
    lease.check()
    with _beside_tars():
        made = put_offsets(store, manifest, offsets)
        if made != manifest or not store.exists(MANIFEST):
            store.put(MANIFEST, serialize_manifest(made))
    return made


@contextlib.contextmanager
def _lease_of(store: Store) -> Iterator[Lease]:
    """No other run writes among the tars meanwhile; what one left that was killed goes first."""
    with contextlib.ExitStack() as stack:
        with _beside_tars():
            lease = stack.enter_context(Lease(store))
            store.clean_temp()
        yield lease


def _put(store: Store, name: str, data: bytes) -> None:
    with _beside_tars():
        store.put(name, data)


@contextlib.contextmanager
def _beside_tars() -> Iterator[None]:
    try:
        yield
    except OutOfSpace:
        raise
    except StorageError as error:
        raise StorageError(f"{error}; an index lies beside its tar: index a copy of the tars where you may write") from error
