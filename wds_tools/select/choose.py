"""Which samples of datasets are chosen: lists of keys, conditions on fields, one of equals, a share, a split.

    fields of a shard -> --keys, --exclude -> --where -> draw by a hash -> Verdict     in any process, shard by shard
    all verdicts -> --unique: sort hashes on disk, all but the first go -> Choice      here, whatever the order they came in

Invariant: whether a sample is chosen depends on the datasets and the options, not on workers; without --unique on the sample
alone, so that it stays as it is when a dataset grows. Memory: two bytes a sample, 100 a listed key, a bucket of the sort.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from itertools import repeat
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray
from xxhash import xxh3_64_intdigest, xxh3_128_digest

from wds_tools.dataset.external_sort import ExternalSort
from wds_tools.errors import Reject, UsageError
from wds_tools.format.manifest import Manifest
from wds_tools.format.shards import ShardInfo
from wds_tools.records.fields import value_of
from wds_tools.records.where import Where
from wds_tools.run.local import Report, run_tasks
from wds_tools.run.progress import Advance, Progress
from wds_tools.select.fields import CODES_HASH, KEY, TEXT_HASH, Fields, as_text, field_of, values_of
from wds_tools.sources.text.keys import OTHER, read_keys
from wds_tools.terminal import counted, say

FATES: Final = ("", "filtered", "filtered_missing", "wrong_type", "not_chosen", "duplicate")
"""Why a sample is not chosen, by number; 0: it is."""
FILTERED, MISSING, NOT_CHOSEN, DUPLICATE = map(FATES.index, ("filtered", "filtered_missing", "not_chosen", "duplicate"))
UNIQUE = {"text": TEXT_HASH, "codes": CODES_HASH}
RECORD_BYTES = 40
"""Of a hash in the sort."""


@dataclass(frozen=True)
class KeyList:
    """Keys that a user listed."""

    named: tuple[frozenset[str], ...]
    """Of each dataset, those of lines DATASET<tab>KEY."""
    bare: frozenset[str]

    @classmethod
    def read(cls, url: str, datasets: Sequence[str], option: str) -> KeyList:
        """From a file of a key, or DATASET<tab>KEY, a line. Lines of other datasets are passed over, and counted on stderr.

        Raises:
            UsageError: a line is no text, or too long.
        """
        keys: list[set[str]] = [set() for _ in (*datasets, "bare")]
        others: list[str] = []
        for number, key in read_keys(url, datasets, option):
            if number == OTHER:
                others.append(key)
            else:
                keys[number].add(key)
        if others:
            said = f"{counted(len(others), 'line is', 'lines are')} of other datasets, such as {others[0]}"
            say(f"wds-tools: {option}: {said}", error=True)
        return cls(tuple(map(frozenset, keys[:-1])), frozenset(keys[-1]))

    def check(self, found: Sequence[set[str]], datasets: Sequence[str], option: str) -> None:
        """Say which keys no sample has.

        Args:
            found: of each dataset, those that it has.

        Raises:
            UsageError: several datasets have a key that is listed without its dataset.
        """
        seen: set[str] = set()
        for keys in found:
            if both := self.bare & seen & keys:
                where = ", ".join(url for url, keys in zip(datasets, found, strict=True) if min(both) in keys)
                raise UsageError(
                    f"{option}: {len(both):,} keys are of several inputs, such as {min(both)} ({where}): write DATASET<tab>KEY"
                )
            seen |= keys
        lost = sorted(self.bare - seen) + sorted(set().union(*(keys - of for keys, of in zip(self.named, found, strict=True))))
        if lost:
            say(f"wds-tools: {option}: {counted(len(lost), 'key is', 'keys are')} of no sample, such as {lost[0]}", error=True)


@dataclass(frozen=True)
class Verdict:
    """On the samples of a shard."""

    task: int
    fates: NDArray[np.uint8]
    """Why each is not chosen: see FATES."""
    sides: NDArray[np.uint8]
    """Between which edges each falls, from 0."""
    contents: Sequence[bytes | None]
    """Hashes of what --unique compares."""
    keys: Sequence[bytes]
    """Hashes of the keys, where they may meet."""
    listed: Mapping[str, set[str]]
    """Option -> keys of its list that were found."""
    absent: frozenset[str]
    """Fields that are asked for, and that none of the samples has."""


@dataclass(frozen=True, kw_only=True)
class Judge:
    """Decides on the samples of a shard, in whatever process it runs."""

    fields: tuple[Fields, ...]
    """Of each dataset."""
    where: Where | None = None
    lists: Mapping[str, KeyList] = field(default_factory=dict)
    """--keys and --exclude."""
    unique: str | None = None
    """text or codes."""
    draw: str = ""
    """fraction or split: they draw independently of each other."""
    edges: Sequence[float] = ()
    """Between 0 and 1, ascending."""
    by: str | None = None
    """The field whose hash is drawn by; where a sample has none, its key."""
    seed: int = 0
    prefixes: Sequence[str] | None = None
    """Of the keys of each dataset in the output; None: keys can't meet."""

    @property
    def names(self) -> list[str]:
        """Fields that are asked for."""
        return sorted({*([self.by] if self.by else []), *((self.where.names | self.where.facts) if self.where else ())})

    def __call__(self, task: tuple[int, tuple[int, ShardInfo]], report: Report) -> Verdict:
        number, (dataset, shard) = task
        heads = {name.partition(".")[0] for name in self.names}
        wanted = {*heads, *self.names, *((UNIQUE[self.unique],) if self.unique else ())}
        needs_keys = bool(self.lists or self.edges or self.prefixes)
        table = self.fields[dataset].read(shard, sorted(wanted | ({KEY} if needs_keys else set())))
        keys, there, has_by = values_of(table, KEY) if needs_keys else [], set(table.column_names), True
        fates, sides = np.zeros((2, shard.samples), np.uint8)
        listed = {}
        for option, wants in self.lists.items():
            is_listed = np.array([key in wants.bare or key in wants.named[dataset] for key in keys], bool)
            listed[option] = {keys[row] for row in np.flatnonzero(is_listed).tolist()}
            fates[is_listed == (option == "--exclude")] = NOT_CHOSEN
        if self.where is not None:
            self._ask(self.where, {name: values_of(table, name) for name in sorted(there & {*heads, *self.names})}, fates)
        if self.edges:
            values = field_of(table, self.by) if self.by else keys
            has_by = any(value is not None for value in values)
            drawn = [self._draw(key if value is None else value) for key, value in zip(keys, values, strict=True)]
            sides = np.searchsorted(np.array(self.edges), np.array(drawn), side="right").astype(np.uint8)
        report(Advance(units=shard.samples, samples=shard.samples))
        return Verdict(
            task=number,
            fates=fates,
            sides=sides,
            contents=values_of(table, UNIQUE[self.unique]) if self.unique else (),
            keys=() if self.prefixes is None else [_hash_of(self.prefixes[dataset], key) for key in keys],
            listed=listed,
            absent=frozenset(
                name for name in self.names if not {name, name.partition(".")[0]} & there or (name == self.by and not has_by)
            ),
        )

    def _draw(self, value: Any) -> float:
        return xxh3_64_intdigest(f"{self.draw}\t{as_text(value)}".encode(), self.seed) / 2.0**64

    @staticmethod
    def _ask(where: Where, columns: Mapping[str, Sequence[Any]], fates: NDArray[np.uint8]) -> None:
        rows = zip(*columns.values(), strict=True) if columns else repeat(())
        lacking = [name for name in where.names if None in columns.get(name, (None,))]
        new = fates.tolist()
        for row, (values, fate) in enumerate(zip(rows, new, strict=False)):
            if fate:
                continue
            fields = dict(zip(columns, values))  # noqa: B905  strict=True would take as long again
            try:
                if not where.keeps(fields, fields):
                    new[row] = MISSING if lacking and any(value_of(fields, name) is None for name in lacking) else FILTERED
            except Reject as cause:
                new[row] = FATES.index(cause.reason)
        fates[:] = new


def prefixed(prefix: str, key: str) -> str:
    """The key of a sample in the output."""
    return f"{prefix}-{key}" if prefix else key


def _hash_of(prefix: str, key: str) -> bytes:
    return xxh3_128_digest(prefixed(prefix, key).encode())


def choose(
    judge: Judge, urls: Sequence[str], manifests: Sequence[Manifest], *, workers: int = 1, quiet: bool = True
) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Decide on all samples of datasets.

    Args:
        judge: of single shards.
        urls, manifests: the datasets; those of `judge.fields`.
        workers: processes to use.
        quiet: show no progress.

    Returns:
        Fate and side of each sample, (N,) each, the datasets one after the other: see Verdict.

    Raises:
        UsageError: a dataset lacks what is asked for, or keys that are chosen meet; or see KeyList.check.
    """
    tasks = [(number, shard) for number, manifest in enumerate(manifests) for shard in manifest.shards]
    firsts = np.cumsum([0, *(shard.samples for _, shard in tasks)])
    total = int(firsts[-1])
    fates, sides = np.zeros(total, np.uint8), np.zeros(total, np.uint8)
    absent: dict[int, frozenset[str]] = {}
    found = {option: [set[str]() for _ in urls] for option in judge.lists}
    has_content: set[int] = set()
    with tempfile.TemporaryDirectory(prefix="wds-tools-") as folder:
        contents, keys = (ExternalSort(Path(folder) / name, total * RECORD_BYTES) for name in ("contents", "keys"))
        with (
            Progress("choose", total, quiet=quiet) as progress,
            closing(run_tasks(judge, list(enumerate(tasks)), workers=workers, on_report=progress)) as verdicts,
        ):
            for verdict in verdicts:
                dataset, first = tasks[verdict.task][0], int(firsts[verdict.task])
                fates[first : first + len(verdict.fates)] = verdict.fates
                sides[first : first + len(verdict.fates)] = verdict.sides
                absent[dataset] = absent.get(dataset, verdict.absent) & verdict.absent
                for option, listed in verdict.listed.items():
                    found[option][dataset] |= listed
                has_content.update([dataset] if any(verdict.contents) else ())
                for sort, hashes in ((contents, verdict.contents), (keys, verdict.keys)):
                    add_hashes(
                        sort,
                        (None if fate else digest for digest, fate in zip(hashes, verdict.fates.tolist(), strict=False)),
                        first,
                    )
        for number, names in absent.items():
            if names:
                known = ", ".join(sorted(judge.fields[number].read(manifests[number].shards[0]).column_names))
                raise UsageError(
                    f"{urls[number]} has no field {min(names)} in the json of its samples, only {known}: convert again with "
                    f"--keep {min(names)}, or `wds-tools relabel --fields {min(names)}=COLUMN` adds it"
                )
            if judge.unique and number not in has_content:
                raise UsageError(f"{urls[number]}: --unique {judge.unique}: its samples have no {judge.unique} to compare")
        for option, wants in judge.lists.items():
            wants.check(found[option], urls, option)
        for numbers in groups(contents):
            fates[numbers[1:]] = DUPLICATE
        for numbers in groups(keys):
            both = [number for number in numbers if not fates[number]][:2]
            if len(both) > 1:
                at = [tasks[int(np.searchsorted(firsts, number, side="right")) - 1] for number in both]
                where = " and ".join(f"{urls[number]}/{shard.name}" for number, shard in at)
                mend = "--key-prefix NAME ..., one for each input, tells them apart"
                if at[0][0] == at[1][0]:
                    mend = "third-party tars may repeat keys, a dataset of ours may not: write them again with DatasetWriter"
                raise UsageError(f"samples of {where} have the same key: {mend}")
    return fates, sides


def add_hashes(sort: ExternalSort, digests: Iterable[bytes | None], first: int) -> None:
    """Put hashes of samples, those that are not None, into a sort.

    Args:
        sort: such as `groups` takes.
        digests: of 16 bytes.
        first: number of the first sample.
    """
    for number, digest in enumerate(digests, first):
        if digest is not None:
            sort.add_hashed(digest, number.to_bytes(8, "big"))


def groups(sort: ExternalSort) -> Iterator[list[int]]:
    """The numbers of samples with equal hashes, ascending, of each hash that several have."""
    return (sorted(int.from_bytes(number, "big") for number in same) for same in sort.by_hash() if len(same) > 1)
