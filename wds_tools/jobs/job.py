"""A job: tasks in, a finished dataset out. Converters, encode and pack differ only in their tasks and in the work on one.

    Job -> Output.look (is it in the way?) -> lease (no other run writes there) -> begin, or take up what an earlier run left
        -> work(task, writer, report) in this process, in workers, or on a Ray cluster -> finish (manifest)

A run with `part` does every Nth task, and `finalize` what is left to do when all parts are through.
Invariants: the output depends on the job alone, never on who works on it, in which order, or on interruptions; every input
is a sample or a reject; more rejects than `max_rejects` stop the run before it counts as complete.
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, closing, nullcontext
from dataclasses import dataclass, field
from typing import Any, Generic, Protocol, TypeVar

import orjson

from wds_tools.dataset.files import check_complete
from wds_tools.dataset.lease import Part
from wds_tools.dataset.output import Output, OutputSpec, clear_complete, count_rejects
from wds_tools.dataset.writer import ShardLimits, TaskResult, TaskWriter
from wds_tools.errors import TooManyRejects, UsageError
from wds_tools.format.codes import CodeGrid
from wds_tools.format.manifest import Manifest, code_layouts
from wds_tools.format.schema import SCHEMA_VERSION
from wds_tools.jobs.options import JobOptions, RejectBudget, check_kept, way_on
from wds_tools.run.local import Report, Rest, run_tasks
from wds_tools.run.progress import Advance, Progress
from wds_tools.run.ray_cluster import check_device, on_cluster, run_on_ray
from wds_tools.storage import open_store
from wds_tools.terminal import say

Task = TypeVar("Task")
_Task_contra = TypeVar("_Task_contra", contravariant=True)


class Work(Protocol[_Task_contra]):
    """What a job does with one task; picklable."""

    def __call__(self, task: _Task_contra, writer: TaskWriter, report: Report) -> int:
        """Do a task: give each input to `writer.add` or `writer.reject`.

        Args:
            task: what to read.
            writer: of the task's shards and rejects.
            report: to be told on the way of `units`, as the job counts them, `images` and seconds of a device; samples and
                rejects are the writer's.

        Returns:
            Number of inputs read, counted where they are read.
        """
        ...


@dataclass(frozen=True, kw_only=True)
class Job(Generic[Task]):
    """What is made, and how. Everything that decides on a byte of the output is in here, but for the shard limits."""

    command: str
    """Name in the manifest, such as "convert documents"."""
    settings: Mapping[str, Any]
    """JSON values that a rerun must have too."""
    tasks: Sequence[Task]
    """JSON-able, picklable; one output shard (or more) each."""
    work: Work[Task]
    """What is done with each."""
    total: int
    """Work units over all tasks, for the progress display."""
    codes: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """Provenance of code columns, for the manifest."""
    source: Mapping[str, Any] = field(default_factory=dict)
    """Further provenance for the manifest: inputs, library versions."""
    schema_version: int = SCHEMA_VERSION
    """Version of the samples' schema, or ANY_MEMBERS."""
    device: str = "cpu"
    """What a task runs on: "cpu", "cuda" (or "cuda:..."), or "auto", which is a GPU where there is one."""
    notes: Sequence[str] = ()
    """Lines to say before the work begins, unless all is to be quiet."""
    key_prefix: str = ""
    """Prefix of the keys that are made here; if it is empty, neither keys nor manifest mention it."""


def run_job(job: Job[Task], options: JobOptions) -> Manifest:
    """Carry out a job.

    Args:
        job: what is made.
        options: where it goes, and how it runs.

    Returns:
        The manifest of the finished dataset (at once, if --resume finds it complete). Of a part: what that part made, with
        `part` in its source; the dataset has no manifest yet.

    Raises:
        UsageError: the output is in the way, or another run is writing there.
        StorageError: another run has taken this one for dead.
        FormatError: files are not what was written; names them.
        TooManyRejects: finished tasks stay, so that a run with --resume and a larger budget goes on from there; if none of
            their inputs was usable, nothing stays.
    """
    if options.executor == "ray":
        check_device(job.device)
    part = options.which_part
    spec = _spec(job, options, part)
    output = Output(open_store(options.output), spec, part=part, resume=options.resume, overwrite=options.overwrite)
    if (manifest := output.look()) is not None:
        check_complete(output.store, manifest, verify=options.verify, quiet=options.quiet)
        if part is None:
            clear_complete(output.store)
        return manifest
    with on_cluster(options.ray_address, quiet=options.quiet) if options.executor == "ray" else nullcontext(), output:
        return output.begin() or _run_tasks(job, options, output)


def _spec(job: Job[Task], options: JobOptions, part: Part | None) -> OutputSpec:
    """What is made, as a rerun has to make it too."""
    try:
        tasks_json = orjson.dumps(job.tasks)
    except TypeError as error:
        raise UsageError("the name of an input file is not UTF-8, and can't be written down in a manifest: rename it") from error
    prefix = {"key_prefix": job.key_prefix} if job.key_prefix else {}
    plan = {
        "command": job.command,
        "settings": {**job.settings, **prefix, "shard_samples": options.shard_samples, "shard_bytes": options.shard_bytes},
        "num_tasks": len(job.tasks),
        "inputs_sha256": hashlib.sha256(tasks_json).hexdigest(),
    }
    return OutputSpec(
        num_tasks=len(job.tasks),
        source={"plan": plan, "python": sys.version.split()[0], **job.source},
        codes=job.codes,
        schema_version=job.schema_version,
        parts=part.num_parts if part else 0,
    )


def _run_tasks(job: Job[Task], options: JobOptions, output: Output) -> Manifest:
    """Do the tasks that are left, of an output that is begun and this run's, or this part's."""
    if job.notes and not options.quiet:
        say(*job.notes, error=True)
    part, budget = output.part, RejectBudget.parse(options.max_rejects)
    numbers = (part or Part()).tasks(len(job.tasks))
    results = output.sound_results(verify=options.verify, quiet=options.quiet)
    todo = [(number, job.tasks[number]) for number in numbers if number not in results]
    total = job.total * len(todo) // max(len(job.tasks), 1)  # taking all tasks as equal
    rejects = count_rejects(results.values())
    num_inputs = sum(result.inputs for result in results.values())
    run_task = _RunTask(job.work, options.output, options.shard_limits, job.key_prefix, code_layouts(job.codes))

    def judge(*, final: bool) -> None:
        on = way_on(output.store) if is_kept() else "no input was usable, so no files are left"
        budget.check(rejects, num_inputs, final=final, store=output.store, way_on=on)

    def is_kept() -> bool:
        return part is not None or any(result.shards for result in results.values())

    try:
        with Progress(job.command, total, quiet=options.quiet) as report:
            if options.executor == "local":
                finished = run_tasks(run_task, todo, workers=options.workers, on_report=report)
            else:
                cpus, gpus = options.task_cpus, options.task_gpus
                finished = run_on_ray(run_task, todo, cpus=cpus, gpus=gpus, device=job.device, on_report=report)
            with closing(finished):  # whatever ends this ends the tasks
                for result in finished:
                    output.check()
                    results[result.task] = result
                    rejects.update(result.rejects)
                    num_inputs += result.inputs
                    judge(final=False)
        judge(final=True)
        if part is None:
            check_kept(rejects, num_inputs)
    except TooManyRejects:
        if not is_kept():
            output.discard()
        raise
    if options.part is not None:
        return output.manifest((results[number] for number in numbers), part=options.part)
    return output.finish(results)


@dataclass(frozen=True)
class _RunTask(Generic[Task]):
    """One task in whatever process it runs; picklable."""

    work: Work[Task]
    output: str
    limits: ShardLimits
    key_prefix: str
    layouts: Mapping[str, CodeGrid]

    def __call__(self, numbered: tuple[int, Task], report: Report) -> TaskResult | Rest[TaskResult]:
        """Do a task; publishing what is left of it is the rest."""
        number, task = numbered
        with ExitStack() as opened:
            store = open_store(self.output)
            writer = opened.enter_context(TaskWriter(store, number, self.limits, self.key_prefix, self.layouts))
            written = Advance()

            def report_all(new: Advance) -> None:
                """What the work reports, with what the writer has counted since."""
                nonlocal written
                before, written = written, Advance(samples=writer.num_samples, rejects=writer.num_rejects)
                report(new + written - before)

            num_inputs = self.work(task, writer, report_all)
            report_all(Advance())
            until_published = opened.pop_all()

        def finish() -> TaskResult:
            with until_published:
                return writer.finish(num_inputs)

        return Rest(finish)
