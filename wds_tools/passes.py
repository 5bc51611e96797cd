"""A pass: tasks in, a finished data set out. Converters and the encoding pass differ only in their plan and their work.

    plan -> begin (claim the output, or take up what an earlier run left)
         -> work(task, writer) in this process or in workers -> finish (manifest)

Invariants: the output depends on the plan alone, never on the number of workers, their order, or interruptions; every input
is a sample or a reject; more rejects than `max_rejects` stop the run before it counts as complete.
"""

from __future__ import annotations

import hashlib
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

import orjson

from wds_tools.dataset.write import REJECTS, ShardLimits, TaskResult, TaskWriter, begin, done_tasks, finish
from wds_tools.errors import TooManyRejects, UsageError
from wds_tools.format.manifest import Manifest
from wds_tools.format.schema import SCHEMA_VERSION
from wds_tools.run.local import Report, run_tasks
from wds_tools.run.progress import Progress
from wds_tools.storage import join, open_store

Item = TypeVar("Item")

FILTER_REASONS = frozenset({"aspect_ratio"})
"""Rejects that the user's own settings ask for: counted and written down, but no fault, so not held against `max_rejects`."""
_EARLY_INPUTS = 1000
_REPORT_EVERY = 64


@dataclass(frozen=True, kw_only=True)
class PassOptions:
    """How any pass runs. None of these changes a byte of the output, but for the shard limits."""

    output: str
    """Where the data set goes: a directory or an object-store prefix."""
    workers: int = 1
    """Processes to use."""
    resume: bool = False
    """Go on with an output that an earlier, interrupted run of the same command began."""
    overwrite: bool = False
    """Remove the data set that is at the output first."""
    max_rejects: str = "10%"
    """Most inputs that may be unusable: a count ("100") or a share ("2.5%"). Images outside the aspect ratio don't count."""
    shard_samples: int = ShardLimits.samples
    """A shard holds at most this many samples ..."""
    shard_bytes: int = ShardLimits.bytes
    """... and closes once it has this many bytes."""
    quiet: bool = False
    """Show no progress."""

    def __post_init__(self) -> None:
        if self.workers < 1:
            raise UsageError(f"--workers {self.workers}: at least 1")
        RejectBudget.parse(self.max_rejects)
        ShardLimits(samples=self.shard_samples, bytes=self.shard_bytes)


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


class Work(Protocol):
    """What a pass does with one task."""

    def __call__(self, task: Any, writer: TaskWriter, advance: Callable[[int], None]) -> int:
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


def run_pass(plan: Plan, work: Work, options: PassOptions) -> Manifest:
    """Carry out a plan.

    Returns:
        The manifest of the finished data set (at once, if --resume finds it complete).

    Raises:
        UsageError: the output is in the way.
        TooManyRejects: finished tasks stay, so that a run with --resume and a larger budget goes on from there.
    """
    store = open_store(options.output)
    limits = ShardLimits(samples=options.shard_samples, bytes=options.shard_bytes)
    budget = RejectBudget.parse(options.max_rejects)
    try:
        tasks_json = orjson.dumps(plan.tasks)
    except TypeError as error:
        raise UsageError("the name of an input file is not UTF-8, and can't be written down in a manifest: rename it") from error
    fixed = {
        "command": plan.command,
        "settings": {**plan.settings, "shard_samples": limits.samples, "shard_bytes": limits.bytes},
        "num_tasks": len(plan.tasks),
        "inputs_sha256": hashlib.sha256(tasks_json).hexdigest(),
    }
    complete = begin(store, fixed, resume=options.resume, overwrite=options.overwrite)
    if complete is not None:
        return complete
    results = done_tasks(store)
    todo = [(number, task) for number, task in enumerate(plan.tasks) if number not in results]
    rejects: Counter[str] = Counter()
    inputs = 0
    for result in results.values():
        rejects.update(result.rejects)
        inputs += result.inputs
    with Progress(plan.command, _share(plan, todo), quiet=options.quiet) as progress:
        task_fn = _RunTask(work, options.output, limits)
        for result in run_tasks(task_fn, todo, workers=options.workers, on_report=progress):
            rejects.update(result.rejects)
            inputs += result.inputs
            budget.check(rejects, inputs, final=False, where=store.url)
    budget.check(rejects, inputs, final=True, where=store.url)
    source = {"plan": fixed, "python": sys.version.split()[0], **plan.source}
    return finish(store, len(plan.tasks), codes=plan.codes, source=source, schema_version=plan.schema_version)


def group_to_limit(items: Sequence[Item], size: Callable[[Item], int], limit: int) -> Iterator[list[Item]]:
    """Cut items into runs whose sizes add up to `limit` at most; a larger item is a run of its own."""
    group: list[Item] = []
    held = 0
    for item in items:
        if group and held + size(item) > limit:
            yield group
            group, held = [], 0
        group.append(item)
        held += size(item)
    if group:
        yield group


def _share(plan: Plan, todo: Sequence[Any]) -> int:
    """The units of the tasks that are left, taking all tasks as equal."""
    return plan.total * len(todo) // max(len(plan.tasks), 1)


@dataclass(frozen=True)
class _RunTask:
    """One task in whatever process it runs; picklable."""

    work: Work
    output: str
    limits: ShardLimits

    def __call__(self, numbered: tuple[int, Any], report: Report) -> TaskResult:
        number, task = numbered
        with TaskWriter(open_store(self.output), number, self.limits) as writer:
            told = [0, 0, 0]

            def advance(units: int, *, flush: bool = False) -> None:
                told[0] += units
                news = (writer.num_samples - told[1], writer.num_rejects - told[2])
                if flush or sum(news) >= _REPORT_EVERY:
                    report(told[0], *news)
                    told[:] = [0, told[1] + news[0], told[2] + news[1]]

            inputs = self.work(task, writer, advance)
            advance(0, flush=True)
            return writer.finish(inputs)
