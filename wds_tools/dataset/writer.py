"""Write a dataset, task by task, so that it can be killed at any moment and finished later with the same bytes.

    Lease             _work/run-ID.json          see `lease`
    look, begin(plan) _work/plan.json            what is being made; a rerun, and every part, must match it
    TaskWriter        shard-TTTTTT-PPPP.tar      part P of task T: closes at a count or a size
                      shard-TTTTTT-PPPP.tar.index
                      rejects/task-TTTTTT.jsonl  only if something was rejected
                      _work/task-TTTTTT.json     written last: the task is done, and these are its files
    finish(...)       manifest.json              written last of all, if all files are there; then _work/ goes

Every file is published whole or not at all (see `storage`). A shard is a function of its task alone.
Invariant: a task's inputs, counted by whoever reads them, are its samples + rejects.
"""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import orjson

from wds_tools.dataset.files import Written, describe_changed, find_changed, written
from wds_tools.dataset.lease import PREFIX as LEASES
from wds_tools.errors import FormatError, NotFound, Reject, UsageError
from wds_tools.format import manifest as manifests
from wds_tools.format.index import SUFFIX, ShardIndex, serialize_index
from wds_tools.format.manifest import Manifest, ShardInfo, hash_rejects, serialize_manifest
from wds_tools.format.schema import SCHEMA_VERSION, Sample
from wds_tools.format.shard import ShardBuilder
from wds_tools.format.typed_json import Count, read_json
from wds_tools.storage import Store, Writer
from wds_tools.terminal import say

WORK = "_work/"
PLAN = WORK + "plan.json"
REJECTS = "rejects/"
_PARALLEL_READS = 16
_NOT_OURS = "damaged, or written by another release: start again with --overwrite"
_TASKS = WORK + "task-"
_OURS = re.compile(r"shard-\d{6,}-\d{4,}\.tar(\.index)?|rejects/task-\d{6,}\.jsonl|_work/(plan|task-\d{6,})\.json")
"""The files of a dataset, but for the manifest and claims. Only these are ever removed."""


@dataclass(frozen=True, kw_only=True)
class ShardLimits:
    """When a shard closes: at whichever comes first."""

    samples: int = 10_000
    """Samples in a shard at most."""
    bytes: int = 256 << 20
    """A shard closes once it has this many bytes."""

    def __post_init__(self) -> None:
        if self.samples < 1 or self.bytes < 1:
            raise UsageError(f"a shard holds at least one sample and one byte, got {self.samples} and {self.bytes}")


@dataclass(frozen=True, kw_only=True)
class TaskResult:
    """What became of one task."""

    task: Count
    inputs: Count
    """Records read."""
    shards: tuple[ShardInfo, ...]
    rejects: Mapping[str, Count]
    """By reason."""
    files: Mapping[str, Written]
    """All that was published: shards, indices, rejects."""
    rejects_sha256: str
    """Of the file of rejects, hexadecimal; "" if there is none."""
    counts: Mapping[str, Count] = field(default_factory=dict)
    """What else the work counted: TaskWriter.count."""


@dataclass(frozen=True, kw_only=True)
class _Plan:
    """What `begin` writes down."""

    plan: Mapping[str, Any]
    parts: Count
    codes: Mapping[str, Mapping[str, Any]]
    source: Mapping[str, Any]
    schema_version: Literal[0, 1]


class TaskWriter:
    """Writes the shards and rejects of one task. Use as a context manager; `finish` publishes, an exception discards.

    A full shard is published (flushed to the disk, or its upload completed) in a thread while the next one fills.

    Args:
        store: the dataset.
        task: its number in the plan.
        limits: when a shard closes.
        key_prefix: of the keys that `key` makes.
    """

    def __init__(self, store: Store, task: int, limits: ShardLimits, key_prefix: str = "") -> None:
        self._store = store
        self.task = task
        self._key_prefix = f"{key_prefix}-" if key_prefix else ""
        self._limits = limits
        self._builder: ShardBuilder | None = None
        self._writer: Writer | None = None
        self._publisher = ThreadPoolExecutor(1)
        self._publishing: Future[None] | None = None
        self._shards: list[ShardInfo] = []
        self._files: dict[str, Written] = {}
        self._reject_lines: list[bytes] = []
        self._rejects: Counter[str] = Counter()
        self._counts: Counter[str] = Counter()
        self.num_samples = 0
        self.num_rejects = 0

    def __enter__(self) -> TaskWriter:
        return self

    def __exit__(self, *failure: object) -> None:
        self._publisher.shutdown()
        if self._writer is not None:
            self._writer.abort()
            self._writer = None

    def key(self, number: int) -> str:
        """The key of the task's input of this number, from 0."""
        return f"{self._key_prefix}{self.task:06d}-{number:08d}"

    def add(self, sample: Sample) -> None:
        """Append a sample; closes the shard if it is full.

        Raises:
            FormatError: the sample breaks the schema; nothing was written.
            StorageError: the shard can't be written.
        """
        builder = self._builder or ShardBuilder()
        self._append(builder, builder.add(sample))

    def add_members(self, key: str, payloads: Sequence[tuple[str, bytes]]) -> None:
        """Append a sample of any members, (suffix, payload) each, to a dataset of ANY_MEMBERS. Raises StorageError as `add`."""
        builder = self._builder or ShardBuilder()
        self._append(builder, builder.add_members(key, payloads))

    def count(self, what: str, number: int = 1) -> None:
        """Add to a count of the manifest's `source["counts"]`."""
        self._counts[what] += number

    def _append(self, builder: ShardBuilder, data: bytes) -> None:
        if self._writer is None:
            self._builder, self._writer = builder, self._store.write(self._next_name())
        self._writer.write(data)
        self.num_samples += 1
        if builder.num_samples >= self._limits.samples or builder.num_bytes >= self._limits.bytes:
            self._close_shard()

    def reject(
        self, cause: Reject, *, source: str, line: int | None = None, element: int | None = None, key: str | None = None
    ) -> None:
        """Record an input that becomes no sample: its source; line, element of a JSON list, or key; reason and detail."""
        place = {"source": source, "line": line, "element": element, "key": key, "reason": cause.reason, "detail": cause.detail}
        self._reject_lines.append(orjson.dumps({name: value for name, value in place.items() if value is not None}))
        self._rejects[cause.reason] += 1
        self.num_rejects += 1

    def finish(self, inputs: int) -> TaskResult:
        """Publish what is left and mark the task as done.

        Args:
            inputs: records that were read, counted by the reader.

        Raises:
            FormatError: they are not the samples and rejects that arrived here.
        """
        if inputs != self.num_samples + self.num_rejects:
            raise FormatError(
                f"task {self.task}: read {inputs} records, but {self.num_samples} samples + {self.num_rejects} rejects "
                "came out: this is a bug of the converter"
            )
        self._close_shard()
        self._wait_for_publication()
        rejects = b"".join(line + b"\n" for line in self._reject_lines)
        if rejects:
            self._put(_rejects_name(self.task), rejects)
        result = TaskResult(
            task=self.task,
            inputs=inputs,
            shards=tuple(self._shards),
            rejects=dict(sorted(self._rejects.items())),
            files=self._files,
            rejects_sha256=hashlib.sha256(rejects).hexdigest() if rejects else "",
            counts=dict(sorted(self._counts.items())),
        )
        self._store.put(_marker(self.task), orjson.dumps(asdict(result)))
        return result

    def _next_name(self) -> str:
        return f"shard-{self.task:06d}-{len(self._shards):04d}.tar"

    def _close_shard(self) -> None:
        if self._builder is None or self._writer is None:
            return
        name = self._next_name()
        data, index, row = self._builder.finish(name)
        self._writer.write(data)
        self._wait_for_publication()
        self._publishing = self._publisher.submit(self._publish, self._writer, index, row)
        self._builder = self._writer = None
        self._shards.append(row)

    def _publish(self, writer: Writer, index: ShardIndex, row: ShardInfo) -> None:
        writer.close()
        self._files[row.name] = Written(row.bytes, row.xxh128)
        self._put(row.name + SUFFIX, serialize_index(index))

    def _put(self, name: str, data: bytes) -> None:
        self._store.put(name, data)
        self._files[name] = written(data)

    def _wait_for_publication(self) -> None:
        if self._publishing is not None:
            self._publishing.result()
            self._publishing = None


def look(store: Store, plan: Mapping[str, Any], *, resume: bool, overwrite: bool, parts: int = 0) -> Manifest | bool:
    """See what is at the output, before anything is written. Arguments and errors are those of `begin`.

    Returns:
        The manifest, if it is complete; else whether it was begun and this run goes on with it.
    """
    if resume and overwrite:
        raise UsageError("--resume and --overwrite exclude each other: keep what is there, or remove it")
    goes_on = resume or parts > 0
    if overwrite:
        _check_removable(store)
        return False
    if _has_manifest(store):
        if not goes_on:
            raise UsageError(f"{store.url} holds a complete dataset already: choose another output, or pass --overwrite")
        manifest = manifests.parse_manifest(store.read(manifests.NAME), f"{store.url}/{manifests.NAME}")
        _check_same_plan(store, manifest.source.get("plan"), plan)
        return manifest
    names = [] if store.exists(PLAN) else _names(store)
    if store.exists(PLAN):  # asked again: another part may just have claimed the output
        if not goes_on:
            raise UsageError(f"{store.url} holds an unfinished dataset: finish it with --resume, or start again with --overwrite")
        _check_same_plan(store, read_begun(store)["plan"], plan)
        return True
    if any(map(_OURS.fullmatch, names)):
        raise UsageError(f"{store.url} holds what is left of a dataset that was being removed: pass --overwrite to go on")
    if names:
        raise UsageError(f"{store.url} is not empty, and what lies there is not a dataset of this project: choose another output")
    return False


def begin(
    store: Store,
    plan: Mapping[str, Any],
    *,
    resume: bool,
    overwrite: bool,
    parts: int = 0,
    codes: Mapping[str, Mapping[str, Any]] | None = None,
    source: Mapping[str, Any] | None = None,
    schema_version: int = SCHEMA_VERSION,
) -> Manifest | None:
    """Make the output ready: empty and begun with this plan, or the matching remains of an earlier run. Under a `Lease`.

    Args:
        plan: what is made, as JSON; everything that decides on a byte of the output.
        resume: go on with an output that was begun with the same plan.
        overwrite: remove the dataset that is there.
        parts: this run is one of so many that may write here at the same time: whoever comes first begins the output, the others
            join, and none touches what another has under way.
        codes, source, schema_version: written down for `finalize`; see Manifest.

    Returns:
        The manifest, if `resume` or `parts` finds the output complete already.

    Raises:
        UsageError: the output is in the way; says what is there and which flag helps.
    """
    found = look(store, plan, resume=resume, overwrite=overwrite, parts=parts)
    if isinstance(found, Manifest):
        return found
    if found:
        if not parts:
            store.clean_temp()
        return None
    if overwrite:
        remove(store)
    begun = {"plan": plan, "parts": parts, "codes": codes or {}, "source": source or {}, "schema_version": schema_version}
    store.put(PLAN, orjson.dumps(begun, option=orjson.OPT_INDENT_2))
    return None


def read_begun(store: Store) -> dict[str, Any]:
    """What `begin` wrote down: plan, parts, codes, source, schema_version.

    Raises:
        NotFound: nothing was begun here.
        FormatError: it was, by another release.
    """
    try:
        data = store.read(PLAN)
    except NotFound as error:
        raise NotFound(f"{store.url} holds no unfinished dataset: there is no {PLAN}") from error
    return vars(read_json(_Plan, data, f"{store.url}/{PLAN}: {_NOT_OURS}"))


def done_tasks(store: Store) -> dict[int, TaskResult]:
    """The tasks that an earlier run finished, by number."""
    names = [entry.name for entry in store.list(_TASKS)]
    with ThreadPoolExecutor(_PARALLEL_READS) as pool:
        read = zip(names, pool.map(store.read, names), strict=True)
        results = {name: read_json(TaskResult, data, f"{store.url}/{name}: {_NOT_OURS}") for name, data in read}
    for name, result in results.items():
        if name != _marker(result.task):
            raise FormatError(f"{store.url}/{name}: it is of task {result.task}: {_NOT_OURS}")
    return {result.task: result for result in results.values()}


def sound_tasks(
    store: Store, results: Mapping[int, TaskResult], *, verify: bool = False, quiet: bool = True
) -> dict[int, TaskResult]:
    """Those whose files are as they were written; the others lose their markers, and are to be done again. Says so in a line.

    Args:
        store, results: what was found by `done_tasks`, or a part of it. Under a `Lease`.
        verify, quiet: see find_changed.
    """
    changed = find_changed(store, _files(results.values()), verify=verify, quiet=quiet)
    again = [task for task, result in results.items() if not changed.keys().isdisjoint(result.files)]
    for task in again:
        store.delete(_marker(task))
    if again:
        say(
            f"wds-tools: {describe_changed(store, changed)}; {len(again)} finished tasks are done again",
            error=True,
        )
    return {task: result for task, result in results.items() if task not in again}


def check_complete(store: Store, manifest: Manifest, *, verify: bool = False, quiet: bool = True) -> None:
    """Raise FormatError if shards are missing or changed, or indices are missing. Arguments: see find_changed."""
    files = {row.name: Written(row.bytes, row.xxh128) for row in manifest.shards}
    files |= {name + SUFFIX: Written(None) for name in files}
    if changed := find_changed(store, files, verify=verify, quiet=quiet):
        how = "copy them again, or make the dataset again with --overwrite (indices alone: `wds-tools index`)"
        raise FormatError(f"{describe_changed(store, changed)}, but it has a manifest: {how}")


def _files(results: Iterable[TaskResult]) -> dict[str, Written]:
    return {name: file for result in results for name, file in result.files.items()}


def finish(
    store: Store,
    num_tasks: int,
    *,
    codes: Mapping[str, Mapping[str, Any]],
    source: Mapping[str, Any],
    schema_version: int = SCHEMA_VERSION,
    parts: int = 0,
) -> Manifest:
    """Write the manifest over all tasks, and drop the working files.

    Raises:
        NotFound: a task is missing; names it, and the part that it belongs to.
        FormatError: a file is not what its task wrote; names it.
    """
    results = done_tasks(store)
    missing = [task for task in range(num_tasks) if task not in results]
    if missing:
        what = f"{store.url}: {len(missing)} of {num_tasks} tasks are not done (task {_few(map(str, missing))})"
        if parts:
            names = [f"{part}/{parts}" for part in sorted({task % parts for task in missing})]
            raise NotFound(f"{what}; they belong to part {_few(names)}: run these again, they go on where they stopped")
        raise NotFound(f"{what}: run with --resume")
    if changed := find_changed(store, _files(results.values())):
        raise FormatError(f"{describe_changed(store, changed)}: run with --resume, or the part again, which makes them again")
    manifest = manifest_of([results[task] for task in range(num_tasks)], codes, source, schema_version)
    store.put(manifests.NAME, serialize_manifest(manifest))
    drop_working_files(store)
    return manifest


def has_working_files(store: Store) -> bool:
    """Whether a run that was killed after it had written the manifest left any."""
    return any(True for _ in store.list(WORK))


def drop_working_files(store: Store) -> None:
    """Remove what a complete dataset does not need any more; a claim belongs to its run."""
    store.clean_temp()
    for entry in list(store.list(WORK)):
        if not entry.name.startswith(LEASES):
            store.delete(entry.name)


def manifest_of(
    results: Sequence[TaskResult], codes: Mapping[str, Mapping[str, Any]], source: Mapping[str, Any], schema_version: int
) -> Manifest:
    """The manifest over these tasks, in this order."""
    rejects: Counter[str] = Counter()
    counts: Counter[str] = Counter()
    for result in results:
        rejects.update(result.rejects)
        counts.update(result.counts)
    shards = tuple(row for result in results for row in result.shards)
    members = {member for row in shards for member in row.members}
    return Manifest(
        shards=shards,
        inputs=sum(result.inputs for result in results),
        rejects=dict(sorted(rejects.items())),
        rejects_hash=hash_rejects({_rejects_name(one.task): one.rejects_sha256 for one in results if one.rejects_sha256}),
        codes={column: provenance for column, provenance in codes.items() if f"{column}.npy" in members},
        source={**source, "counts": dict(sorted(counts.items()))} if counts else source,
        schema_version=schema_version,
    )


def remove(store: Store) -> None:
    """Delete a dataset; files that are not this project's stay.

    What makes it complete, or one to go on with, goes first: killed on the way, it can only be removed again.

    Raises:
        UsageError: there are files, but no dataset of this project.
    """
    ours = _check_removable(store)
    store.delete(manifests.NAME)
    store.delete(PLAN)
    with ThreadPoolExecutor(_PARALLEL_READS) as pool:
        list(pool.map(store.delete, ours))
    store.clean_temp()


def _check_removable(store: Store) -> list[str]:
    """The files that `remove` deletes beside the manifest, or UsageError if no dataset of this project is there."""
    has_manifest = _has_manifest(store)
    names = _names(store)
    ours = [name for name in names if _OURS.fullmatch(name)]
    if names and not (ours or has_manifest):
        raise UsageError(f"{store.url} holds files, but no dataset of this project to overwrite: choose another output")
    return ours


def _names(store: Store) -> list[str]:
    """All files there, but for the claims of runs."""
    return [entry.name for entry in store.list() if not entry.name.startswith(LEASES)]


def _has_manifest(store: Store) -> bool:
    """Whether a manifest of this project is there, readable or not.

    Raises:
        UsageError: it is somebody else's, or that of somebody else's tars.
    """
    if not store.exists(manifests.NAME):
        return False
    what = f"{store.url}/{manifests.NAME} is not a manifest of this project: choose another output"
    record = read_json(dict[str, Any], store.read(manifests.NAME), what, UsageError)
    if record.get("format") != manifests.FORMAT:
        raise UsageError(what)
    source = record.get("source")
    if isinstance(source, dict) and source.get("command") == manifests.INDEX_COMMAND:
        raise UsageError(f"{store.url} holds tars that were indexed where they lay, not made here: choose another output")
    return True


def _few(names: Iterable[str]) -> str:
    shown = list(names)
    return ", ".join(shown[:10]) + (" ..." if len(shown) > 10 else "")


def _marker(task: int) -> str:
    return f"{_TASKS}{task:06d}.json"


def _rejects_name(task: int) -> str:
    return f"{REJECTS}task-{task:06d}.jsonl"


def _check_same_plan(store: Store, found: Any, plan: Mapping[str, Any]) -> None:
    wanted = orjson.loads(orjson.dumps(plan))
    if found == wanted:
        return
    differences = list(_differences(found if isinstance(found, dict) else {}, wanted))
    raise UsageError(
        f"{store.url} was begun with other inputs or settings: {'; '.join(differences[:5])}: "
        "repeat the first command, or start again with --overwrite"
    )


def _differences(found: Mapping[str, Any], wanted: Mapping[str, Any]) -> Iterator[str]:
    for key in {**wanted, **found}:
        was, now = found.get(key), wanted.get(key)
        if isinstance(was, dict) and isinstance(now, dict):
            yield from _differences(was, now)
        elif was != now:
            yield f"{key} was {_short(was)}, is now {_short(now)}"


def _short(value: Any) -> str:
    text = orjson.dumps(value).decode()
    return text if len(text) <= 120 else text[:117] + "..."
