"""The names of a dataset's files, once.

manifest.json              complete: what is in the dataset
offsets.safetensors        where the samples of its shards begin, every few of them
shard-TTTTTT-PPPP.tar      part P of task T
shard-TTTTTT-PPPP.tar.index
rejects/task-TTTTTT.jsonl  inputs that became no sample
_work/plan.json            while it is written: what is made ...
_work/task-TTTTTT.json     ... which tasks are done ...
_work/run-ID.json          ... and who writes (`lease`); of a part run-ID-PART-of-PARTS.json
_work/labels/HASH.json     what `relabel` puts into the samples of a task
fields/ID/SHARD.parquet    the fields of a shard's samples, made again at will; ID is 16 digits of a dataset's fingerprint
tokens/HASH.json           how many tokens its texts are, by the tokenizer of this hash (`token_counts`); made again at will
"""

from __future__ import annotations

import re

MANIFEST = "manifest.json"
OFFSETS = "offsets.safetensors"
TAR_SUFFIX = ".tar"
INDEX_SUFFIX = ".index"
"""Follows the name of the tar. Not ".idx": Megatron-Energon writes a file of that name beside each tar, for its own use."""
REJECTS = "rejects/"
WORK = "_work/"
PLAN = WORK + "plan.json"
TASKS = WORK + "task-"
LEASES = WORK + "run-"
LABELS = WORK + "labels/"
FIELDS = "fields/"
TOKENS = "tokens/"

_REJECTS_FILE = rf"{REJECTS}task-\d{{6,}}\.jsonl"
REMOVABLE = re.compile(
    rf"{re.escape(OFFSETS)}|shard-\d{{6,}}-\d{{4,}}\.tar(\.index)?|{_REJECTS_FILE}|{re.escape(PLAN)}|{TASKS}\d{{6,}}\.json"
)
"""The files of a dataset, but for the manifest and leases. Only these are ever removed."""
MADE_AGAIN = re.compile(rf"{FIELDS}[0-9a-f]{{16}}/.+\.parquet|{TOKENS}[0-9a-f]{{32}}\.json")
"""Removed with a dataset too; they may be there before it."""
IS_REJECTS_FILE = re.compile(rf"(^|/)({_REJECTS_FILE}|{MADE_AGAIN.pattern})$")
"""Finds the rejects of a dataset, and what is made again at will, among the files of any folder."""


def shard_name(task: int, number: int) -> str:
    """The shard of a task, by its number in the task."""
    return f"shard-{task:06d}-{number:04d}{TAR_SUFFIX}"


def index_name(shard: str) -> str:
    """The index of a shard."""
    return shard + INDEX_SUFFIX


def rejects_name(task: int) -> str:
    """The rejects of a task."""
    return f"{REJECTS}task-{task:06d}.jsonl"


def marker_name(task: int) -> str:
    """What says that a task is done."""
    return f"{TASKS}{task:06d}.json"
