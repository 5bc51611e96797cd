"""The life of an output: a dataset while it is written, which can be killed at any moment and finished later with the same bytes.

    output = Output(store, spec)      spec: what is made, how many tasks
    output.look()                     is it complete, or in the way? Writes nothing
    with output:                      a `Lease`: no other run writes here
        output.begin()                _work/plan.json; a rerun, and every part, must match it
        output.sound_results()        the tasks that earlier runs finished
        ... TaskWriter ...            the others; `output.check()`: is the lease still held?
        output.finish(results)        manifest.json, last of all, if all files are there; then _work/ goes

Invariant: a manifest means that the dataset is complete. Cost: `look` lists an output that is not this project's or is to be
overwritten, and only that; it is asked again by `begin`, since what was seen before the lease may have changed. The markers of
tasks are listed once, files when a run goes on and before the manifest is written.
"""

from __future__ import annotations

import base64
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from types import TracebackType
from typing import Annotated, Any, Self

import numpy as np
import orjson
from numpy.typing import NDArray

from wds_tools.dataset.files import Written, describe_changed, find_changed
from wds_tools.dataset.layout import (
    LEASES,
    MADE_AGAIN,
    MANIFEST,
    PLAN,
    REMOVABLE,
    TASKS,
    WORK,
    marker_name,
    rejects_name,
)
from wds_tools.dataset.lease import Lease, Part, files_of
from wds_tools.dataset.offsets import put_offsets
from wds_tools.dataset.writer import TaskResult
from wds_tools.errors import FormatError, NotFound, UsageError
from wds_tools.format.manifest import (
    FORMAT,
    INDEX_COMMAND,
    Manifest,
    code_layouts,
    hash_rejects,
    parse_manifest,
    serialize_manifest,
)
from wds_tools.format.schema import SCHEMA_VERSION
from wds_tools.format.shards import Shards
from wds_tools.format.typed_json import Count, read_json
from wds_tools.storage import Store
from wds_tools.terminal import counted, say

_PARALLEL_READS = 16
_NOT_OURS = "damaged, or written by another release: start again with --overwrite"


@dataclass(frozen=True, kw_only=True)
class OutputSpec:
    """What is made: `_work/plan.json`, from the first run to the manifest."""

    num_tasks: Annotated[int, range(1 << 24)]
    source: Mapping[str, Any]
    """Source of the manifest. Its "plan" is everything that decides on a byte of the output: a rerun must have the same."""
    codes: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """Provenance of the columns of codes, for the manifest."""
    schema_version: Annotated[int, range(SCHEMA_VERSION + 1)] = SCHEMA_VERSION
    """Version of the samples' schema, unless one of them needs a newer; or ANY_MEMBERS."""
    parts: Count = 0
    """Number of parts that the run which began was one of; 0: it did all."""


class Output:
    """A dataset that is being written. A context manager: on entering it takes the lease, on leaving it sets it free.

    Args:
        store: where the dataset goes.
        spec: what is made.
        part: the part that this run does, beside runs that do the others; whoever comes first begins the output, and none touches
            what another has under way. None: all of it.
        resume: go on with an output that was begun with the same plan.
        overwrite: remove the dataset that is there.
    """

    def __init__(
        self, store: Store, spec: OutputSpec, *, part: Part | None = None, resume: bool = False, overwrite: bool = False
    ) -> None:
        if resume and overwrite:
            raise UsageError("--resume and --overwrite exclude each other: keep what is there, or remove it")
        self.store = store
        self.spec = spec
        self.part = part
        self._goes_on = resume or part is not None
        self._overwrites = overwrite
        self._lease: Lease | None = None

    @classmethod
    def begun(cls, store: Store) -> Output:
        """The output that is begun there, with the spec that `begin` wrote.

        Raises:
            NotFound: nothing was begun there.
            FormatError: it was, by another release.
        """
        try:
            return cls(store, _read_spec(store))
        except NotFound as error:
            raise NotFound(f"{store.url} holds no unfinished dataset: there is no {PLAN}") from error

    def __enter__(self) -> Self:
        self._lease = Lease(self.store, self.part).__enter__()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        assert self._lease is not None
        self._lease.__exit__(kind, error, trace)

    def check(self) -> None:
        """Raise StorageError if another run has taken this one for dead and gone on in its place."""
        if self._lease is not None:
            self._lease.check()

    def look(self) -> Manifest | None:
        """See what is there, before anything is written.

        Returns:
            The manifest, if the dataset is complete and this run may go on with it.

        Raises:
            UsageError: the output is in the way; says what is there and which flag helps.
        """
        seen = self._look()
        return seen if isinstance(seen, Manifest) else None

    def begin(self) -> Manifest | None:
        """Make the output ready: empty and begun with this spec, or the matching remains of an earlier run. Under the lease.

        Returns:
            The manifest, if it is complete meanwhile; see `look`, which also says what is raised.
        """
        seen = self._look()
        if isinstance(seen, Manifest):
            return seen
        if not seen:
            if self._overwrites:
                remove(self.store)
            self.store.put(PLAN, orjson.dumps(self.spec, option=orjson.OPT_INDENT_2))
        else:
            self.store.clean_temp(only_dead=self.part is not None)
        return None

    def results(self) -> dict[int, TaskResult]:
        """The tasks that earlier runs finished, by number. Raises FormatError: a marker is damaged, or of another release."""
        names = [entry.name for entry in self.store.list(TASKS)]
        with ThreadPoolExecutor(_PARALLEL_READS) as pool:
            documents = list(pool.map(self.store.read, names))
        results = {}
        for name, data in zip(names, documents, strict=True):
            result = read_json(TaskResult, data, f"{self.store.url}/{name}: {_NOT_OURS}")
            if name != marker_name(result.task):
                raise FormatError(f"{self.store.url}/{name}: it is of task {result.task}: {_NOT_OURS}")
            results[result.task] = result
        return results

    def sound_results(self, *, verify: bool = False, quiet: bool = True) -> dict[int, TaskResult]:
        """Those of this part whose files are as they were written; the others lose their markers, and are to be done again.

        Says so in a line. Arguments: see find_changed.
        """
        numbers = (self.part or Part()).tasks(self.spec.num_tasks)
        results = {number: result for number, result in self.results().items() if number in numbers}
        changed = find_changed(self.store, _files(results.values()), verify=verify, quiet=quiet)
        again = [task for task, result in results.items() if not changed.keys().isdisjoint(result.files)]
        self.store.delete_all(map(marker_name, again))
        if again:
            done = counted(len(again), "finished task is", "finished tasks are")
            say(f"wds-tools: {describe_changed(self.store, changed)}; {done} done again", error=True)
        return {task: result for task, result in results.items() if task not in again}

    def finish(self, results: Mapping[int, TaskResult]) -> Manifest:
        """Write the manifest over all tasks, and drop the working files.

        Args:
            results: of the tasks that are done, by number.

        Raises:
            NotFound: a task is missing; names it, and the part that it belongs to.
            FormatError: a file is not what its task wrote; names it.
            StorageError: see `check`.
        """
        url, num_tasks, parts = self.store.url, self.spec.num_tasks, self.spec.parts
        missing = [task for task in range(num_tasks) if task not in results]
        if missing:
            what = f"{url}: {len(missing)} of {num_tasks} tasks are not done (task {_few(map(str, missing))})"
            if parts:
                names = [f"{part}/{parts}" for part in sorted({task % parts for task in missing})]
                raise NotFound(f"{what}; they belong to part {_few(names)}: run these again, they go on where they stopped")
            raise NotFound(f"{what}: run with --resume")
        if changed := find_changed(self.store, _files(results.values())):
            again = "run with --resume, or the part again, which makes them again"
            raise FormatError(f"{describe_changed(self.store, changed)}: {again}")
        manifest = self.manifest(results[task] for task in range(num_tasks))
        marked = (offsets for task in range(num_tasks) for offsets in self._marked(task, results[task]))
        self.check()
        manifest = put_offsets(self.store, manifest, marked)
        self.store.put(MANIFEST, serialize_manifest(manifest))
        _drop_working_files(self.store)
        return manifest

    def _marked(self, task: int, result: TaskResult) -> list[NDArray[np.uint32]]:
        """What a task has marked of its shards, for the offsets file."""
        try:
            return [np.frombuffer(base64.b64decode(result.offsets[shard.name]), "<u4") for shard in result.shards]
        except (KeyError, ValueError) as error:
            raise FormatError(
                f"{self.store.url}/{marker_name(task)}: the offsets of its shards are not what a task writes down: remove this "
                "file and run with --resume, or the part again, which does the task again"
            ) from error

    def discard(self) -> None:
        """Remove all that was made, under the lease: for a run that came to nothing."""
        remove(self.store)
        _drop_working_files(self.store)

    def manifest(self, results: Iterable[TaskResult], **source: Any) -> Manifest:
        """The manifest over these tasks, in this order; with more to say in its source."""
        done = list(results)
        shards = Shards.of(shard for result in done for shard in result.shards)
        members = {member for members, _ in shards.kinds for member in members}
        codes = {column: provenance for column, provenance in self.spec.codes.items() if f"{column}.npy" in members}
        counts = _total(result.counts for result in done)
        versions = [self.spec.schema_version, *(result.schema_version for result in done)]
        versions += [layout.schema_version for layout in code_layouts(codes).values()]
        return Manifest(
            shards=shards,
            inputs=sum(result.inputs for result in done),
            rejects=dict(sorted(count_rejects(done).items())),
            rejects_hash=hash_rejects(
                {rejects_name(result.task): result.rejects_sha256 for result in done if result.rejects_sha256}
            ),
            codes=codes,
            source={**self.spec.source, **source, **({"counts": dict(sorted(counts.items()))} if counts else {})},
            schema_version=max(versions),
        )

    def _look(self) -> Manifest | bool:
        """The manifest, if it is complete; else whether it was begun and this run goes on with it."""
        store = self.store
        if self._overwrites:
            _check_removable(store)
            return False
        if (data := _manifest_data(store)) is not None:
            if not self._goes_on:
                raise UsageError(f"{store.url} holds a complete dataset already: choose another output, or pass --overwrite")
            manifest = parse_manifest(data, f"{store.url}/{MANIFEST}")
            self._check_same_plan(manifest.source)
            return manifest
        names = [] if store.exists(PLAN) else [name for name in files_of(store) if not MADE_AGAIN.fullmatch(name)]
        if store.exists(PLAN):  # asked again: another part may just have claimed the output
            if not self._goes_on:
                raise UsageError(
                    f"{store.url} holds an unfinished dataset: finish it with --resume, or start again with --overwrite"
                )
            self._check_same_plan(_read_spec(store).source)
            return True
        if any(map(REMOVABLE.fullmatch, names)):
            raise UsageError(f"{store.url} holds what is left of a dataset that was being removed: pass --overwrite to go on")
        if names:
            raise UsageError(
                f"{store.url} is not empty, and what lies there is not a dataset of this project: choose another output"
            )
        return False

    def _check_same_plan(self, source: Mapping[str, Any]) -> None:
        before, plan = source.get("plan"), orjson.loads(orjson.dumps(self.spec.source.get("plan")))
        if before == plan:
            return
        differences = list(_differences(before if isinstance(before, dict) else {}, plan or {}))
        raise UsageError(
            f"{self.store.url} was begun with other inputs or settings: {'; '.join(differences[:5])}: "
            "repeat the first command, or start again with --overwrite"
        )


def count_rejects(results: Iterable[TaskResult]) -> Counter[str]:
    """Rejects by reason, over tasks."""
    return _total(result.rejects for result in results)


def _total(counts: Iterable[Mapping[str, int]]) -> Counter[str]:
    """Counts by name, added up; what was counted and is zero stays."""
    total: Counter[str] = Counter()
    for each in counts:
        total.update(each)
    return total


def remove(store: Store) -> None:
    """Delete a dataset; files that are not this project's stay.

    What makes it complete, or one to go on with, goes first: killed on the way, it can only be removed again.

    Raises:
        UsageError: there are files, but no dataset of this project.
    """
    names = _check_removable(store)
    store.delete(MANIFEST)
    store.delete(PLAN)
    store.delete_all(names)
    store.clean_temp()


def clear_complete(store: Store) -> None:
    """Remove what a run left that was killed after it had written the manifest. Raises UsageError: another run writes there."""
    if any(True for _ in store.list(WORK)):
        with Lease(store):
            _drop_working_files(store)


def _drop_working_files(store: Store) -> None:
    """Remove what a complete dataset does not need any more; a lease belongs to its run."""
    store.clean_temp()
    store.delete_all([entry.name for entry in store.list(WORK) if not entry.name.startswith(LEASES)])


def _read_spec(store: Store) -> OutputSpec:
    return read_json(OutputSpec, store.read(PLAN), f"{store.url}/{PLAN}: {_NOT_OURS}")


def _files(results: Iterable[TaskResult]) -> dict[str, Written]:
    return {name: file for result in results for name, file in result.files.items()}


def _check_removable(store: Store) -> list[str]:
    """The files that `remove` deletes beside the manifest, or UsageError if no dataset of this project is there."""
    data = _manifest_data(store)
    names = files_of(store)
    removable = [name for name in names if REMOVABLE.fullmatch(name) or MADE_AGAIN.fullmatch(name)]
    if names and not removable and data is None:
        raise UsageError(f"{store.url} holds files, but no dataset of this project to overwrite: choose another output")
    return removable


def _manifest_data(store: Store) -> bytes | None:
    """The manifest of this project that is there, readable or not; None if there is none.

    Raises:
        UsageError: it is somebody else's, or that of third-party tars.
    """
    if not store.exists(MANIFEST):
        return None
    data = store.read(MANIFEST)
    what = f"{store.url}/{MANIFEST} is not a manifest of this project: choose another output"
    record = read_json(dict[str, Any], data, what, UsageError)
    if record.get("format") != FORMAT:
        raise UsageError(what)
    source = record.get("source")
    if isinstance(source, dict) and source.get("command") == INDEX_COMMAND:
        raise UsageError(f"{store.url} holds tars that were indexed where they lay, not made here: choose another output")
    return data


def _few(names: Iterable[str]) -> str:
    shown = list(names)
    return ", ".join(shown[:10]) + (" ..." if len(shown) > 10 else "")


def _differences(before: Mapping[str, Any], plan: Mapping[str, Any]) -> Iterator[str]:
    for key in {**plan, **before}:
        was, now = before.get(key), plan.get(key)
        if isinstance(was, dict) and isinstance(now, dict):
            yield from _differences(was, now)
        elif was != now:
            yield f"{key} was {_short(was)}, is now {_short(now)}"


def _short(value: Any) -> str:
    text = orjson.dumps(value).decode()
    return text if len(text) <= 120 else text[:117] + "..."
