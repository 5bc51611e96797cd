"""Check that a dataset is exactly what its manifest says.

Every shard is read once, whole: size, XXH3-128, tar structure, index against tar, every sample against the schema, codes
against their codebook, ids of token rows against their vocabulary, counts. Then what needs the whole set: unique keys, files
nobody mentions, rejects on disk.
Cost: one pass over the bytes; memory is one shard a process, and 8 bytes a sample.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from operator import lt
from typing import Any

import numpy as np
from numpy.typing import NDArray

from wds_tools.check.token_rows import check_row
from wds_tools.dataset.layout import INDEX_SUFFIX, MADE_AGAIN, MANIFEST, OFFSETS, REJECTS, TAR_SUFFIX, index_name
from wds_tools.dataset.reader import ShardBytes, read_manifest
from wds_tools.errors import DataError, FormatError, StorageError, UsageError
from wds_tools.format.index import check_fresh, parse_index, serialize_index
from wds_tools.format.manifest import FILTERED, Manifest, hash_rejects
from wds_tools.format.offsets import hash_offsets, marked, serialize_offsets
from wds_tools.format.schema import ANY_MEMBERS, Sample, validate
from wds_tools.format.shard import sample_from_members
from wds_tools.format.shards import ShardInfo
from wds_tools.format.tar.scan import Scan, scan_tar
from wds_tools.format.typed_json import read_json
from wds_tools.jobs.index_tars import Contents
from wds_tools.run.local import OnWorkers, Report, run_tasks
from wds_tools.run.progress import Advance, Progress
from wds_tools.storage import Store, open_store

_MAX_PROBLEMS_A_SHARD = 20
_ENERGON_FOLDER, _ENERGON_SUFFIX = ".nv-meta/", ".idx"
"""What Megatron-Energon writes beside shards: no part of the dataset, and no fault."""
_UNPROTECTED = (
    "manifest.json has no manifest_hash and no rejects_hash (an earlier release wrote it): damage to what it says of codes and "
    "source, and to the texts in rejects/, can't be found",
)


@dataclass(frozen=True, kw_only=True)
class VerifyConfig(OnWorkers):
    """Check that a dataset is complete, undamaged and what its manifest says."""

    input: str
    """The dataset: a directory or URL."""


@dataclass(frozen=True, kw_only=True)
class VerifyResult:
    """The result of a check."""

    manifest: Manifest
    """Of the dataset that was checked."""
    problems: tuple[str, ...]
    """Sentences about what is wrong; none if all is well."""
    notes: tuple[str, ...] = ()
    """Sentences about what could not be checked."""


@dataclass(frozen=True)
class _Reject:
    """The field of a line of rejects that is counted."""

    reason: str


@dataclass
class _ShardReport:
    problems: list[str] = field(default_factory=list)
    key_hashes: np.ndarray[Any, np.dtype[np.uint64]] | None = None
    offsets: np.ndarray[Any, np.dtype[np.uint32]] | None = None
    """Marked of the shard."""
    first_key: str = ""
    last_key: str = ""
    is_ascending: bool = True

    def take_keys(self, keys: list[str]) -> None:
        """Remember what is needed to find keys that stand twice in the dataset."""
        hashes = [int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest(), "little") for key in keys]
        self.key_hashes = np.array(hashes, np.uint64)
        self.is_ascending = all(map(lt, keys, keys[1:]))
        self.first_key, self.last_key = (keys[0], keys[-1]) if keys else ("", "")


def verify(config: VerifyConfig) -> VerifyResult:
    """Check a dataset.

    Args:
        config: which dataset.

    Returns:
        What is wrong, one sentence a problem; none if all is well.

    Raises:
        NotFound: there is no manifest.
        FormatError: the manifest is unreadable or contradicts itself.
        StorageError: the storage does not answer. A single file that can't be read is a problem like others.
    """
    store = open_store(config.input)
    manifest = read_manifest(store, any_members=True)
    with Progress("verify", manifest.samples, quiet=config.quiet) as progress:
        check = _CheckShard(config.input, manifest)
        with closing(run_tasks(check, range(len(manifest.shards)), workers=config.workers, on_report=progress)) as found:
            reports = dict(found)
    problems = [problem for number in sorted(reports) for problem in reports[number].problems]
    problems += _check_keys(manifest, [reports[number] for number in sorted(reports)])
    problems += _check_offsets(store, manifest, [reports[number].offsets for number in sorted(reports)])
    try:
        problems += _check_files(store, manifest)
    except StorageError as error:  # of a listing: what was found before is said all the same
        problems.append(str(error))
    return VerifyResult(manifest=manifest, problems=tuple(problems), notes=_UNPROTECTED if manifest.rejects_hash is None else ())


@dataclass(frozen=True)
class _CheckShard:
    """The check of one shard, in whatever process it runs."""

    input: str
    manifest: Manifest
    reader: ShardBytes = field(default_factory=ShardBytes)

    def __call__(self, number: int, progress: Report) -> tuple[int, _ShardReport]:
        shard = self.manifest.shards[number]
        report = _ShardReport()
        store = open_store(self.input)
        try:
            self._check(store, shard, report, progress)
        except (DataError, StorageError, UsageError) as error:  # UsageError: a name that leads out of the dataset
            store.size(MANIFEST)  # raises if it is the storage that does not answer
            report.problems.append(str(error))
        return number, report

    def _check(self, store: Store, shard: ShardInfo, report: _ShardReport, progress: Report) -> None:
        tar, xxh128 = self.reader.read(store, shard.name, shard.bytes)
        scan = scan_tar(tar, shard.name)
        contents = self._check_samples(shard, scan, tar, report, progress)
        actual: dict[str, Any] = {"bytes": len(tar), "xxh128": xxh128, "samples": len(scan.keys), "members": scan.suffixes}
        if contents is not None:
            actual |= contents.totals()
        for name, value in actual.items():
            if getattr(shard, name) != value:
                report.problems.append(f"{shard.name}: {name} is {value}, the manifest says {getattr(shard, name)}")
        report.offsets = marked(scan.start, shard.bytes)
        if not self.manifest.is_indexed:
            report.take_keys(scan.keys)
        name = index_name(shard.name)
        index = parse_index(store.read(name), name)
        check_fresh(index, samples=len(scan.keys), tar_bytes=len(tar), xxh128=xxh128, name=name)
        if contents is not None:
            rebuilt = scan.index(tar, xxh128, contents.text_chars, contents.num_codes)
            if serialize_index(index) != serialize_index(rebuilt):
                report.problems.append(f"{name}: differs from an index rebuilt from the tar: rebuild it with `wds-tools index`")

    def _check_samples(
        self, shard: ShardInfo, scan: Scan, tar: memoryview, report: _ShardReport, progress: Report
    ) -> Contents | None:
        """What the samples hold, with their faults reported; None if one breaks the schema."""
        contents = Contents()
        rows = self.manifest.token_rows
        if self.manifest.schema_version == ANY_MEMBERS and rows is None:
            progress(Advance(units=len(scan.keys), samples=len(scan.keys)))
            return contents
        for key, start, payloads in zip(scan.keys, scan.start.tolist(), scan.payloads(tar), strict=True):
            try:
                if rows is not None:
                    check_row(key, payloads, rows)
                else:
                    sample = sample_from_members(key, payloads)
                    validate(sample, self.manifest.layouts)
                    contents.add(sample.data_type, sample.text_chars, sample.num_codes)
                    self._check_codes(sample)
            except DataError as error:
                if len(report.problems) < _MAX_PROBLEMS_A_SHARD:
                    report.problems.append(f"{shard.name}, byte {start}: {error}")
            progress(Advance(units=1, samples=1))
        return contents if rows is not None or len(contents.text_chars) == len(scan.keys) else None

    def _check_codes(self, sample: Sample) -> None:
        for column, codes in sample.codes.items():
            layout = self.manifest.layout(column)
            if layout.sizes or layout.dtype:
                layout.check_values(f"{sample.key}: {column}", codes)
            elif not self.manifest.is_indexed:
                raise DataError(f"{sample.key}: {column} has no provenance in the manifest")


def _check_keys(manifest: Manifest, reports: Sequence[_ShardReport]) -> Iterator[str]:
    """Keys that stand twice in the dataset. Keys that ascend all the way can't; else their hashes are compared.

    Third-party tars may repeat keys: an index knows each sample by its position.
    """
    if manifest.is_indexed:
        return
    last = ""
    for report in reports:
        if not report.is_ascending or report.first_key <= last:
            break
        last = report.last_key
    else:
        return
    hashes = np.concatenate(
        [report.key_hashes for report in reports if report.key_hashes is not None] or [np.zeros(0, np.uint64)]
    )
    num_repeated = len(hashes) - len(np.unique(hashes))
    if num_repeated:
        where = [f"{manifest.shards[a].name} and {manifest.shards[b].name}" for a, b in _sharing(reports)[:5]]
        yield f"{num_repeated} keys stand more than once in the dataset: {'; '.join(where)}"


def _check_offsets(store: Store, manifest: Manifest, offsets: Sequence[NDArray[np.uint32] | None]) -> Iterator[str]:
    """Whether the offsets file is that of the manifest, and of the tars, if all of those could be read."""
    if manifest.offsets_hash is None:
        return
    again = "write it again with `wds-tools index`"
    try:
        data = store.read(OFFSETS)
        known = [each for each in offsets if each is not None]
        if hash_offsets(data) != manifest.offsets_hash:
            yield f"{OFFSETS}: its hash is another than the manifest says: it was changed or damaged; {again}"
        elif len(known) == len(offsets) and data != serialize_offsets(manifest, known):
            yield f"{OFFSETS}: samples begin elsewhere in the tars than it says; {again}"
    except (DataError, StorageError) as error:
        yield str(error)


def _sharing(reports: Sequence[_ShardReport]) -> list[tuple[int, int]]:
    """Pairs of shards (a == b: one shard) that share a key."""
    first: dict[int, int] = {}
    pairs: dict[tuple[int, int], None] = {}
    for number, report in enumerate(reports):
        for value in report.key_hashes.tolist() if report.key_hashes is not None else ():
            if value in first:
                pairs[first[value], number] = None
            first.setdefault(value, number)
    return list(pairs)


def _check_files(store: Store, manifest: Manifest) -> Iterator[str]:
    """Files that the manifest does not know, and rejects that it counts but that are not written down.

    Beside the third-party tars anything may lie, but for tars that were not indexed; beside any, what `energon prepare` writes.
    """
    shards = {shard.name for shard in manifest.shards}
    known = {MANIFEST, OFFSETS} | shards | {name + suffix for name in shards for suffix in (INDEX_SUFFIX, _ENERGON_SUFFIX)}
    rejects: Counter[str] = Counter()
    digests: dict[str, str] = {}
    for entry in store.list():
        if manifest.is_indexed and not entry.name.endswith((TAR_SUFFIX, TAR_SUFFIX + INDEX_SUFFIX)):
            continue
        if entry.name.startswith(REJECTS):
            try:
                data = store.read(entry.name)
                digests[entry.name] = hashlib.sha256(data).hexdigest()
                rejects.update(
                    read_json(_Reject, line, f"{entry.name}: not a list of rejects").reason for line in data.splitlines()
                )
            except (FormatError, StorageError) as error:
                yield str(error)
        elif entry.name not in known and not entry.name.startswith(_ENERGON_FOLDER) and not MADE_AGAIN.fullmatch(entry.name):
            yield f"{entry.name}: not in the manifest: left by something else, or by a run that was interrupted"
    listed = {reason: count for reason, count in manifest.rejects.items() if reason not in FILTERED}
    if rejects != Counter(listed):
        yield f"{REJECTS} lists {dict(rejects)}, the manifest counts {listed}"
    if manifest.rejects_hash not in (None, digest := hash_rejects(digests)):
        yield f"{REJECTS}: its files hash to {digest}, the manifest says {manifest.rejects_hash}: they were changed or damaged"
