"""How a job runs: the options that all jobs share, and how many rejects it may have."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import orjson

from wds_tools.dataset.layout import REJECTS
from wds_tools.dataset.lease import Part
from wds_tools.dataset.writer import ShardLimits
from wds_tools.errors import TooManyRejects, UsageError
from wds_tools.format.manifest import FILTERED
from wds_tools.run.local import OnWorkers
from wds_tools.storage import Store, join
from wds_tools.storage.place import check_apart

FILTER_REASONS = frozenset({"aspect_ratio", *FILTERED})
"""Rejects that the user's own settings ask for: counted, but no fault, so not held against `max_rejects`."""
_EARLY_INPUTS = 1000


@dataclass(frozen=True, kw_only=True)
class Places(OnWorkers):
    """Where the tasks of a job run."""

    help_group = "workers and machines"

    part: str | None = None
    """Do one of N equal parts, such as "3/64", on any machine and at any time; after all parts, run `wds-tools finalize`. Counted
    from 0 or from 1 (64/64 is 0/64). A repeated part continues where it stopped."""
    executor: Literal["local", "ray"] = "local"
    """local: in this process, or in --workers. ray: on a Ray cluster, with as many tasks at a time as it can hold."""
    ray_address: str | None = None
    """Address of the Ray cluster. Default: RAY_ADDRESS, or else the cluster on this machine; it is started if there is none."""
    task_cpus: float = 1
    """With ray: CPUs that a task takes."""
    task_gpus: float | None = None
    """With ray: GPUs that a task takes, or a share of one. Default: 1 if the work runs on GPUs (see --device), else none."""


@dataclass(frozen=True, kw_only=True)
class JobOptions(Places):
    """How any job runs. None of these changes a byte of the output, but for the shard limits."""

    help_group = "output"

    output: str
    """Where the dataset goes: a directory or an object-store prefix."""
    resume: bool = False
    """Continue an interrupted run of the same command. Finished tasks are kept if all of their files exist with the right size;
    other tasks are done again."""
    verify: bool = False
    """With --resume or --part: also compare the hashes of finished files, which reads them."""
    overwrite: bool = False
    """First remove the dataset at the output."""
    max_rejects: str = "10%"
    """Maximum of unusable inputs: a count ("100") or a share ("2.5%"). Images outside the aspect ratio, and records that --where
    drops, don't count."""
    shard_samples: int = ShardLimits.samples
    """A shard holds at most this many samples."""
    shard_bytes: int = ShardLimits.bytes
    """A shard closes once it has this many bytes."""

    def __post_init__(self) -> None:
        super().__post_init__()
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
        check_apart(getattr(self, "input", ()), self.output)  # of every job; options alone have none
        self.which_part  # noqa: B018  # checks it
        RejectBudget.parse(self.max_rejects)
        self.shard_limits  # noqa: B018

    @property
    def which_part(self) -> Part | None:
        """The value of `part`."""
        if self.part is None:
            return None
        match = re.fullmatch(r"(\d{1,9})/(\d{1,9})", self.part, re.ASCII)
        if match is None or not 0 <= int(match[1]) <= int(match[2]) or not int(match[2]):
            raise UsageError(f"--part {self.part}: expected I/N, such as 3/64, with I from 0 to N - 1, or from 1 to N")
        return Part(int(match[1]) % int(match[2]), int(match[2]))

    @property
    def shard_limits(self) -> ShardLimits:
        """When a shard closes."""
        return ShardLimits(samples=self.shard_samples, bytes=self.shard_bytes)

    @property
    def remote_cpus(self) -> int | None:
        """CPUs that a task has, if it runs on another machine; None if all run here."""
        return max(1, int(self.task_cpus)) if self.executor == "ray" else None


@dataclass(frozen=True)
class RejectBudget:
    """How many rejects a run may have."""

    limit: float
    """Rejects at most; or the share of the inputs, 0 to 1."""
    is_share: bool

    @classmethod
    def parse(cls, text: str) -> RejectBudget:
        """From "100" or "2.5%".

        Raises:
            UsageError: neither.
        """
        is_share = text.endswith("%")
        try:
            limit = float(text[:-1]) / 100 if is_share else int(text)
        except ValueError as error:
            raise UsageError(f"--max-rejects {text!r}: expected a count such as 100 or a share such as 2.5%") from error
        if not 0 <= limit <= (1 if is_share else math.inf):
            raise UsageError(f"--max-rejects {text!r}: a count is at least 0, a share between 0% and 100%")
        return cls(limit, is_share)

    def check(self, rejects: Mapping[str, int], inputs: int, *, final: bool, store: Store, way_on: str) -> None:
        """Raise TooManyRejects if these are too many; a share is judged at the end, or once it can't be an accident.

        Args:
            rejects: by reason.
            inputs: of which they are.
            final: no more are to come.
            store: has them listed, so that the message can say what is wrong with the first.
            way_on: end of the message: what can be done.
        """
        faults = Counter({reason: count for reason, count in rejects.items() if reason not in FILTER_REASONS})
        num_faults = faults.total()
        is_judged = final or not self.is_share or inputs >= _EARLY_INPUTS
        if is_judged and num_faults > self.limit * (inputs if self.is_share else 1):
            allowed = f"{100 * self.limit:g}%" if self.is_share else f"{self.limit}"
            reasons = ", ".join(f"{count} {reason}" for reason, count in faults.most_common(6))
            where = "; --image-root names the folder that image paths are relative to" if "missing_image" in faults else ""
            fault = f"({reasons}){_first_fault(store)}: {way_on}{where}"
            raise TooManyRejects(f"{num_faults} of {inputs} inputs can't be used, allowed are {allowed} {fault}")


def way_on(store: Store) -> str:
    """What can be done about too many rejects."""
    return f"see {join(store.url, REJECTS)}; then repair the input, or go on with --resume and a larger --max-rejects"


def _first_fault(store: Store) -> str:
    """Where the first listed fault is, and what it is."""
    lines = (line for entry in store.list(REJECTS) for line in store.read(entry.name).splitlines())
    for reject in map(orjson.loads, lines):
        if reject["reason"] not in FILTER_REASONS:
            place = "".join(f", {name} {reject[name]}" for name in ("line", "element", "key") if name in reject)
            return f"; the first, in {reject['source']}{place}: {reject['detail']}"
    return ""


def check_kept(rejects: Mapping[str, int], inputs: int) -> None:
    """Raise TooManyRejects if no sample is left of a dataset, and the user's own choice has dropped records of it."""
    num_filtered = sum(rejects.get(reason, 0) for reason in FILTERED)
    if num_filtered and sum(rejects.values()) == inputs:
        missing = rejects.get("filtered_missing", 0)
        raise TooManyRejects(
            f"the choice keeps none of the {inputs:,} records: {num_filtered:,} were dropped ({missing:,} of them lack a "
            f"field that --where names, or have null there), and {inputs - num_filtered:,} can't be used"
        )
