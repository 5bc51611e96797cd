"""A pass: tasks in, a finished dataset out. Converters and the encoding pass differ only in their plan and their work.

    plan -> look (is the output in the way?) -> Lease (no other run writes there) -> begin, or take up what an earlier run left
         -> work(task, writer) in this process, in workers, or on a Ray cluster -> finish (manifest)

A run with `part` does every Nth task, and `finalize` what is left to do when all parts are through.
Invariants: the output depends on the plan alone, never on who works on it, in which order, or on interruptions; every input
is a sample or a reject; more rejects than `max_rejects` stop the run before it counts as complete.
"""

from __future__ import annotations

import hashlib
import re
import sys
from collections import Counter
from collections.abc import Generator, Iterable, Mapping, Sequence
from contextlib import closing, nullcontext, suppress
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal, Protocol

import orjson

from wds_tools.dataset.lease import Lease
from wds_tools.dataset.reader import read_manifest
from wds_tools.dataset.writer import (
    PLAN,
    REJECTS,
    ShardLimits,
    TaskResult,
    TaskWriter,
    begin,
    check_complete,
    done_tasks,
    drop_working_files,
    finish,
    has_working_files,
    look,
    manifest_of,
    read_begun,
    sound_tasks,
)
from wds_tools.errors import StorageError, TooManyRejects, UsageError
from wds_tools.format.manifest import NAME, Manifest
from wds_tools.format.schema import SCHEMA_VERSION
from wds_tools.format.typed_json import shape
from wds_tools.run.local import Report, run_tasks
from wds_tools.run.progress import Progress
from wds_tools.run.ray_cluster import on_cluster, run_on_ray
from wds_tools.storage import Store, join, open_store
from wds_tools.storage.place import check_apart

FILTER_REASONS = frozenset({"aspect_ratio"})
"""Rejects that the user's own settings ask for: counted and written down, but no fault, so not held against `max_rejects`."""
_EARLY_INPUTS = 1000
_REPORT_EVERY = 64


@dataclass(frozen=True, kw_only=True)
class JobOptions:
    """How any pass runs. None of these changes a byte of the output, but for the shard limits."""

    output: str
    """Where the dataset goes: a directory or an object-store prefix."""
    workers: int = 1
    """Processes to use."""
    resume: bool = False
    """Go on with an output that an earlier, interrupted run of the same command began. What it finished is kept if all files are
    there in their sizes; a task with another is done again."""
    verify: bool = False
    """With --resume or --part: compare the hashes of what was finished too, which reads it."""
    overwrite: bool = False
    """Remove the dataset that is at the output first."""
    max_rejects: str = "10%"
    """Most inputs that may be unusable: a count ("100") or a share ("2.5%"). Images outside the aspect ratio don't count."""
    shard_samples: int = ShardLimits.samples
    """A shard holds at most this many samples ..."""
    shard_bytes: int = ShardLimits.bytes
    """... and closes once it has this many bytes."""
    part: str | None = None
    """Do one of N equal parts, as "3/64": on any machines, at any time, each by itself; then `wds-tools finalize`. Counted from 0
    or from 1 (64/64 is 0/64). A part that is repeated goes on where it stopped."""
    executor: Literal["local", "ray"] = "local"
    """local: in this process, or in --workers. ray: on a Ray cluster, as many tasks at a time as it has room for."""
    ray_address: str | None = None
    """Of the cluster. Default: RAY_ADDRESS, else the cluster on this machine, which is started if there is none."""
    task_cpus: float = 1
    """With ray: CPUs that a task takes."""
    task_gpus: float | None = None
    """With ray: GPUs that a task takes, or a share of one. Default: 1 if the work runs on GPUs (see --device), else none."""
    quiet: bool = False
    """Show no progress."""

    def __post_init__(self) -> None:
        if self.workers < 1:
            raise UsageError(f"--workers {self.workers}: at least 1")
        if self.executor == "ray" and self.workers != 1:
            raise UsageError(
                "--workers is for --executor local: Ray runs as many tasks as --task-cpus and --task-gpus leave room for"
            )
        if self.executor != "ray" and (self.ray_address is not None or self.task_cpus != 1 or self.task_gpus is not None):
            raise UsageError("--ray-address, --task-cpus and --task-gpus need --executor ray")
        if self.task_cpus < 0 or (self.task_gpus or 0) < 0:
            raise UsageError(f"--task-cpus {self.task_cpus}, --task-gpus {self.task_gpus}: at least 0")
        if self.part is not None and self.overwrite:
            raise UsageError("--part and --overwrite exclude each other: it would remove the work of other parts")
        if self.verify and not (self.resume or self.part):
            raise UsageError("--verify is for --resume and --part: it looks at what earlier runs finished")
        check_apart(getattr(self, "input", ()), self.output)  # of every pass; options alone have none
        _parse_part(self.part)
        RejectBudget.parse(self.max_rejects)
        ShardLimits(samples=self.shard_samples, bytes=self.shard_bytes)

    @property
    def remote_cpus(self) -> int | None:
        """CPUs that a task has, if it runs on another machine; None if all run here."""
        return max(1, int(self.task_cpus)) if self.executor == "ray" else None


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What a pass makes. Everything that decides on a byte of the output is in here."""

    command: str
    """Such as "convert dclm"."""
    settings: Mapping[str, Any]
    """JSON values."""
    tasks: Sequence[Any]
    """JSON-able, picklable; one output shard (or more) each."""
    total: int
    """Work units over all tasks, for the progress display."""
    codes: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """Provenance of code columns, for the manifest."""
    source: Mapping[str, Any] = field(default_factory=dict)
    """Further provenance for the manifest: inputs, library versions."""
    schema_version: int = SCHEMA_VERSION
    """Of the samples."""
    device: str = "cpu"
    """What a task runs on: "cpu", "cuda" (or "cuda:..."), or "auto", which is a GPU where there is one."""
    key_prefix: str = ""
    """Of the keys that are made here; if it is empty, neither keys nor manifest mention it."""


class Advance(Protocol):
    """Tells how far the work on a task is."""

    def __call__(self, units: int, device_s: float = 0.0, waited_s: float = 0.0, images: int = 0) -> None:
        """Add to what is done.

        Args:
            units: of the plan's total.
            device_s, waited_s: seconds that the device was in use, and of these with nothing to do.
            images: that it encoded.
        """
        ...


class Work(Protocol):
    """What a pass does with one task."""

    def __call__(self, task: Any, writer: TaskWriter, advance: Advance) -> int:
        """Read the task's inputs, give each to `writer.add` or `writer.reject`, call `advance(units)` on the way.

        Returns:
            Number of inputs read, counted where they are read.
        """
        ...


@dataclass(frozen=True)
class RejectBudget:
    """How many rejects a run may have."""

    count: int | None = None
    share: float | None = None

    @classmethod
    def parse(cls, text: str) -> RejectBudget:
        """From "100" or "2.5%".

        Raises:
            UsageError: neither.
        """
        try:
            budget = cls(share=float(text[:-1]) / 100) if text.endswith("%") else cls(count=int(text))
        except ValueError as error:
            raise UsageError(f"--max-rejects {text!r}: expected a count such as 100 or a share such as 2.5%") from error
        if (budget.count or 0) < 0 or not 0 <= (budget.share or 0) <= 1:
            raise UsageError(f"--max-rejects {text!r}: a count is at least 0, a share between 0% and 100%")
        return budget

    def check(self, rejects: Mapping[str, int], inputs: int, *, final: bool, where: str) -> None:
        """Raise TooManyRejects if these are too many; a share is judged at the end, or once it can't be an accident."""
        faults = sum(count for reason, count in rejects.items() if reason not in FILTER_REASONS)
        if self.count is not None:
            over = faults > self.count
        else:
            assert self.share is not None
            over = faults > self.share * inputs and (final or inputs >= _EARLY_INPUTS)
        if over:
            allowed = f"{self.count}" if self.count is not None else f"{100 * (self.share or 0):g}%"
            counts = Counter({reason: count for reason, count in rejects.items() if reason not in FILTER_REASONS})
            reasons = ", ".join(f"{count} {reason}" for reason, count in counts.most_common(6))
            raise TooManyRejects(
                f"{faults} of {inputs} inputs can't be used, allowed are {allowed} ({reasons}): see {join(where, REJECTS)}; "
                "then repair the input, or go on with --resume and a larger --max-rejects"
            )


def run_job(plan: Plan, work: Work, options: JobOptions) -> Manifest:
    """Carry out a plan.

    Returns:
        The manifest of the finished dataset (at once, if --resume finds it complete). Of a part: what that part made, with
        `part` in its source; the dataset has no manifest yet.

    Raises:
        UsageError: the output is in the way, or another run is writing there.
        StorageError: another run has taken this one for dead.
        FormatError: files are not what was written; names them.
        TooManyRejects: finished tasks stay, so that a run with --resume and a larger budget goes on from there.
    """
    if options.executor == "ray":
        check_ray_device(plan.device)
    store = open_store(options.output)
    part, parts = _parse_part(options.part)
    joining = parts if options.part else 0
    fixed = _fixed(plan, options)
    found = look(store, fixed, resume=options.resume, overwrite=options.overwrite, parts=joining)
    if isinstance(found, Manifest):
        check_complete(store, found, verify=options.verify, quiet=options.quiet)
        if options.part is None and has_working_files(store):
            with Lease(store, part, joining):
                drop_working_files(store)
        return found
    with (
        on_cluster(options.ray_address) if options.executor == "ray" else nullcontext(),
        Lease(store, part, joining) as claim,
    ):
        try:
            return _run_claimed(plan, fixed, work, options, store, claim)
        except KeyboardInterrupt:
            with suppress(StorageError):
                claim.check()
                if not joining:  # else other parts write there too, and finalize clears up
                    store.clean_temp()  # workers were killed in the midst of writing
            raise


def _fixed(plan: Plan, options: JobOptions) -> dict[str, Any]:
    """Everything that decides on a byte of the output, as a rerun has to have it too."""
    try:
        tasks_json = orjson.dumps(plan.tasks)
    except TypeError as error:
        raise UsageError("the name of an input file is not UTF-8, and can't be written down in a manifest: rename it") from error
    prefix = {"key_prefix": plan.key_prefix} if plan.key_prefix else {}
    return {
        "command": plan.command,
        "settings": {**plan.settings, **prefix, "shard_samples": options.shard_samples, "shard_bytes": options.shard_bytes},
        "num_tasks": len(plan.tasks),
        "inputs_sha256": hashlib.sha256(tasks_json).hexdigest(),
    }


def _run_claimed(plan: Plan, fixed: Mapping[str, Any], work: Work, options: JobOptions, store: Store, claim: Lease) -> Manifest:
    """See run_job; the output is this run's, or this part's."""
    part, parts = _parse_part(options.part)
    budget = RejectBudget.parse(options.max_rejects)
    source = {"plan": fixed, "python": sys.version.split()[0], **plan.source}
    complete = begin(
        store,
        fixed,
        resume=options.resume,
        overwrite=options.overwrite,
        parts=parts if options.part else 0,
        codes=plan.codes,
        source=source,
        schema_version=plan.schema_version,
    )
    if complete is not None:
        return complete
    own = range(part, len(plan.tasks), parts)
    results = {number: result for number, result in done_tasks(store).items() if number in own}
    results = sound_tasks(store, results, verify=options.verify, quiet=options.quiet)
    todo = [(number, plan.tasks[number]) for number in own if number not in results]
    rejects, inputs = _sum_up(results.values())
    limits = ShardLimits(samples=options.shard_samples, bytes=options.shard_bytes)
    task_fn = _RunTask(work, options.output, limits, plan.key_prefix)
    with (
        Progress(plan.command, _share(plan, todo), quiet=options.quiet) as progress,
        closing(_execute(plan, task_fn, todo, options, progress)) as finished,  # whatever ends this ends the tasks
    ):
        for result in finished:
            claim.check()
            results[result.task] = result
            rejects.update(result.rejects)
            inputs += result.inputs
            budget.check(rejects, inputs, final=False, where=store.url)
    budget.check(rejects, inputs, final=True, where=store.url)
    if options.part is not None:
        return manifest_of([results[number] for number in own], plan.codes, {**source, "part": options.part}, plan.schema_version)
    claim.check()
    return finish(store, len(plan.tasks), codes=plan.codes, source=source, schema_version=plan.schema_version)


def check_ray_device(device: str) -> None:
    """Raise UsageError for a device by number, or for several: Ray deals them out."""
    if ":" in device or "," in device:
        raise UsageError(f"--device {device} with --executor ray: each task gets a GPU of its own, so give --device cuda")


@dataclass(frozen=True, kw_only=True)
class FinalizeConfig:
    """Write the manifest of a dataset that was made in parts; if some are missing, say which."""

    output: str
    """The dataset: what the parts had as --output."""
    max_rejects: str = JobOptions.max_rejects
    """Most inputs that may be unusable, over all parts: a count or a share."""

    def __post_init__(self) -> None:
        RejectBudget.parse(self.max_rejects)


@dataclass(frozen=True)
class _Size:
    """What is counted with of a plan that was written down."""

    num_tasks: Annotated[int, range(1 << 24)]


def finalize(config: FinalizeConfig) -> Manifest:
    """Write the manifest over all parts; returns it, also if it was written before.

    Raises:
        NotFound: nothing was begun there, or a part is not finished; says which.
        UsageError: a part is still at work.
        TooManyRejects: over all parts.
        FormatError: a file is not what its part wrote.
    """
    store = open_store(config.output)
    if store.exists(NAME):
        manifest = read_manifest(store, any_members=True)
        check_complete(store, manifest)
        return manifest
    begun = read_begun(store)
    with Lease(store, 0, 0):
        budget = RejectBudget.parse(config.max_rejects)
        budget.check(*_sum_up(done_tasks(store).values()), final=True, where=store.url)
        size = shape(_Size, begun.pop("plan"), f"{store.url}/{PLAN}: not a plan")
        return finish(store, size.num_tasks, **begun)


def _execute(
    plan: Plan, run_task: _RunTask, todo: Sequence[tuple[int, Any]], options: JobOptions, on_report: Report
) -> Generator[TaskResult, None, None]:
    if options.executor == "local":
        yield from run_tasks(run_task, todo, workers=options.workers, on_report=on_report)
    else:
        yield from run_on_ray(
            run_task,
            todo,
            cpus=options.task_cpus,
            gpus=options.task_gpus,
            device=plan.device,
            on_report=on_report,
        )


def _parse_part(part: str | None) -> tuple[int, int]:
    """(which, of how many): of the tasks, those whose number leaves `which` over when divided. No part is the only one.

    Raises:
        UsageError: not "I/N".
    """
    if part is None:
        return 0, 1
    match = re.fullmatch(r"(\d{1,9})/(\d{1,9})", part, re.ASCII)
    if match is None or not 0 <= int(match[1]) <= int(match[2]) or not int(match[2]):
        raise UsageError(f"--part {part}: expected I/N, such as 3/64, with I from 0 to N - 1, or from 1 to N")
    return int(match[1]) % int(match[2]), int(match[2])


def _sum_up(results: Iterable[TaskResult]) -> tuple[Counter[str], int]:
    """Rejects by reason, and inputs."""
    rejects: Counter[str] = Counter()
    inputs = 0
    for result in results:
        rejects.update(result.rejects)
        inputs += result.inputs
    return rejects, inputs


def _share(plan: Plan, todo: Sequence[Any]) -> int:
    """The units of the tasks that are left, taking all tasks as equal."""
    return plan.total * len(todo) // max(len(plan.tasks), 1)


@dataclass(frozen=True)
class _RunTask:
    """One task in whatever process it runs; picklable."""

    work: Work
    output: str
    limits: ShardLimits
    key_prefix: str

    def __call__(self, numbered: tuple[int, Any], report: Report) -> TaskResult:
        number, task = numbered
        with TaskWriter(open_store(self.output), number, self.limits, self.key_prefix) as writer:
            told = [0, 0, 0]
            use = [0.0, 0.0, 0]

            def advance(
                units: int, device_s: float = 0.0, waited_s: float = 0.0, images: int = 0, *, flush: bool = False
            ) -> None:
                told[0] += units
                use[:] = use[0] + device_s, use[1] + waited_s, use[2] + images
                news = (writer.num_samples - told[1], writer.num_rejects - told[2])
                if flush or sum(news) >= _REPORT_EVERY:
                    report(told[0], *news, *use)
                    told[:] = [0, told[1] + news[0], told[2] + news[1]]
                    use[:] = 0.0, 0.0, 0

            inputs = self.work(task, writer, advance)
            advance(0, flush=True)
            return writer.finish(inputs)
