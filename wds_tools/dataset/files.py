"""Whether files are still as they were written: by their names and sizes, from one listing; if that is asked, by their hashes.

A task's marker and an export's list hold a `Written` for each file, so that a run that goes on does not take their word alone.
Cost: a listing; with hashes, one read of every byte, a few files at a time.
"""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice

from wds_tools.dataset.layout import OFFSETS, index_name
from wds_tools.errors import FormatError, NotFound
from wds_tools.format.checksum import content_hash
from wds_tools.format.manifest import Manifest
from wds_tools.run.progress import Advance, Progress
from wds_tools.storage import Store
from wds_tools.terminal import counted

_PARALLEL_READS = 8
_READ_BYTES = 4 << 20


@dataclass(frozen=True, slots=True)
class Written:
    """A file when it was written."""

    bytes: int | None
    """None: not known, but it has to be there."""
    xxh128: str | None = None


def written(data: bytes) -> Written:
    """What is remembered of a file with this content."""
    return Written(len(data), content_hash(data).hexdigest())


def find_changed(store: Store, files: Mapping[str, Written], *, verify: bool = False, quiet: bool = True) -> dict[str, str]:
    """Compare files with what was written.

    Args:
        store, files: where they are, and what they were.
        verify: compare hashes too, which reads them; else names and sizes alone.
        quiet: show no progress of that.

    Returns:
        Of each file that is another: its name, and what is wrong, such as "is gone".

    Raises:
        StorageError: they can't be listed or read.
    """
    sizes = {entry.name: entry.size for entry in store.list()}
    changed = {}
    for name, file in files.items():
        if name not in sizes:
            changed[name] = "is gone"
        elif file.bytes not in (None, sizes[name]):
            changed[name] = f"has {sizes[name]:,} bytes, {file.bytes:,} were written"
    hashes = {name: file.xxh128 for name, file in files.items() if verify and file.xxh128 and name not in changed}
    with (
        Progress("verify", sum(sizes[name] for name in hashes), quiet=quiet or not hashes, unit="files") as progress,
        ThreadPoolExecutor(_PARALLEL_READS) as pool,
    ):
        for name, xxh128 in zip(hashes, pool.map(lambda name: _hash(store, name), hashes), strict=True):
            progress(Advance(units=sizes[name], samples=1))
            if xxh128 != hashes[name]:
                changed[name] = "is gone" if xxh128 is None else "has other bytes than were written"
    return changed


def describe_changed(store: Store, changed: Mapping[str, str]) -> str:
    """What find_changed found, in a part of a line: the first few by name."""
    shown = [f"{name} {what}" for name, what in islice(changed.items(), 5)] + ["..."] * (len(changed) > 5)
    return f"{store.url}: {counted(len(changed), 'file is', 'files are')} not what was written: {', '.join(shown)}"


def check_complete(store: Store, manifest: Manifest, *, verify: bool = False, quiet: bool = True) -> None:
    """Raise FormatError if shards are missing or changed, or indices are missing. Arguments: see find_changed."""
    files = {shard.name: Written(shard.bytes, shard.xxh128) for shard in manifest.shards}
    files |= {index_name(name): Written(None) for name in files}
    files |= {OFFSETS: Written(None)} if manifest.offsets_hash else {}
    if changed := find_changed(store, files, verify=verify, quiet=quiet):
        how = "copy them again, or make the dataset again with --overwrite (indices alone: `wds-tools index`)"
        raise FormatError(f"{describe_changed(store, changed)}, but it has a manifest: {how}")


def _hash(store: Store, name: str) -> str | None:
    digest = content_hash()
    try:
        with store.open(name) as stream:
            while data := stream.read(_READ_BYTES):
                digest.update(data)
    except NotFound:
        return None
    return digest.hexdigest()
