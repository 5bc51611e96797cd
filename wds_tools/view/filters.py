"""Samples by their fields: which of them a condition chooses, and the first ones in the order of a field.

    tables.chosen(where, shard)     the samples of a shard for which it is true; the last answers are kept
    Ranking.advance(seconds)        shard by shard, keeps the first MAX_RANKED samples by a field; says how far it is

Invariant: a condition chooses here what `wds-tools select --where` chooses. Nothing is written: the tables are those of
`wds-tools index --fields`; where there are none, that of a shard up to SMALL_SHARD_BYTES is made in memory for the answer.
Cost: about 3 us a sample, 5 to sort, three times that where tables are made; memory is one table, and a shard of that size.
"""

from __future__ import annotations

import heapq
import time
from collections.abc import Callable
from itertools import chain
from operator import itemgetter
from threading import Lock
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from wds_tools.dataset.samples import SampleReader
from wds_tools.errors import UsageError
from wds_tools.format.shards import ShardInfo
from wds_tools.records.where import Where
from wds_tools.select.choose import FATES, Judge
from wds_tools.select.fields import Fields, values_of
from wds_tools.storage.recent import Recent

SMALL_SHARD_BYTES = 64 << 20
MAX_RANKED = 2400
"""Samples that are kept in the order of a field: 100 pages."""
_KEPT_BYTES = 16 << 20
_WRONG_TYPE = FATES.index("wrong_type")
_Place = tuple[tuple[bool, Any], int]
"""Of a sample in the order, and its number."""


class Chosen(NamedTuple):
    """What a condition says of a shard."""

    rows: NDArray[np.int64]
    """Places in the shard of the samples that it chooses, ascending."""
    num_wrong_type: int
    """Samples whose values it can't compare; they are not chosen."""
    absent: frozenset[str]
    """Fields that it names, and that no sample has."""


class Tables:
    """The fields of a dataset, for many threads: one table at a time.

    Args:
        reader: the dataset.
    """

    def __init__(self, reader: SampleReader) -> None:
        self._reader = reader
        self._fields: Fields | None = None
        self._turn = Lock()
        self._chosen: Recent[tuple[str, int], Chosen] = Recent(_KEPT_BYTES, lambda chosen: chosen.rows.nbytes + 100)

    def names(self) -> list[str]:
        """The fields of the first shard. Raises as `chosen`."""
        with self._turn:
            return [name for shard in self._reader.manifest.shards[:1] for name in self._of(shard).read(shard).column_names]

    def chosen(self, where: str, shard: int) -> Chosen:
        """The samples of a shard for which a condition is true.

        Args:
            where: as `select --where` takes it; "" is true for all.
            shard: a position in the manifest.

        Raises:
            UsageError: it is no condition; or the shard is large, and has no table.
            FormatError: the table or the shard is damaged.
            MissingPackage: pyarrow is not installed.
        """
        return self._chosen.get((where, shard), self._choose)

    def values(self, name: str, shard: int) -> list[Any]:
        """A field of the samples of a shard; None where one lacks it. Raises as `chosen`."""
        info = self._reader.manifest.shards[shard]
        with self._turn:
            return values_of(self._of(info).read(info, [name]), name)

    def _choose(self, asked: tuple[str, int]) -> Chosen:
        where, info = asked[0], self._reader.manifest.shards[asked[1]]
        if not where:
            return Chosen(np.arange(info.samples), 0, frozenset())
        condition = Where(where)
        with self._turn:
            verdict = Judge(fields=(self._of(info),), where=condition)((0, (0, info)), lambda _: None)
        return Chosen(np.flatnonzero(verdict.fates == 0), int((verdict.fates == _WRONG_TYPE).sum()), verdict.absent)

    def _of(self, shard: ShardInfo) -> Fields:
        """Where the table of a shard comes from. Raises UsageError."""
        store, manifest = self._reader.store, self._reader.manifest
        if self._fields is None or (self._fields.home is None and shard.bytes > SMALL_SHARD_BYTES):  # perhaps made since
            self._fields = Fields.find(store, manifest)
        if self._fields.home is None and shard.bytes > SMALL_SHARD_BYTES:
            raise UsageError(
                f"{store.url} has no tables of its fields, and {shard.name}, of {shard.bytes >> 20:,} MiB, is too large to be "
                f"read for this: `wds-tools index {store.url} --fields` makes them, then try again"
            )
        return self._fields


class Ranking:
    """The first samples of a dataset in the order of a field, found bit by bit.

    Args:
        tables: the fields.
        reader: the dataset.
        by: the field; "-FIELD": from the largest on.
        where: only samples for which this condition is true; "": all.
    """

    def __init__(self, tables: Tables, reader: SampleReader, by: str, where: str) -> None:
        self._tables, self._reader, self._where = tables, reader, where
        self._field = by.removeprefix("-")
        self._first_of: Callable[..., list[_Place]] = heapq.nlargest if by.startswith("-") else heapq.nsmallest
        self._best: list[_Place] = []
        self._absent: frozenset[str] | None = None
        self._shard = self._num_chosen = self._num_without = self._num_wrong_type = 0
        self._turn = Lock()

    def advance(self, budget_s: float) -> dict[str, Any]:
        """Look at more shards, at least one, until the time is used up.

        Returns:
            `numbers` of the first MAX_RANKED samples; `looked_at`, how many samples it has passed; `chosen`, for how many of them
            the condition was true; `without`, how many of these have no number or text in the field, so no place in the order;
            `absent` and `wrong_type` as Chosen has them, of all samples that it has passed.

        Raises:
            UsageError: no sample has the field; or as Tables.chosen.
        """
        deadline, shards = time.monotonic() + budget_s, self._reader.manifest.shards
        with self._turn:
            while self._shard < len(shards):
                self._add(self._shard)
                self._shard += 1
                if time.monotonic() >= deadline:
                    break
            looked_at = self._reader.first_of(self._shard) if self._shard < len(shards) else len(self._reader)
            if looked_at == len(self._reader) and 0 < self._num_chosen == self._num_without:
                names = ", ".join(self._tables.names())
                raise UsageError(f"none of these samples has a number or text in {self._field!r}; the fields are {names}")
            numbers = [number for _, number in self._best]
            return {
                "numbers": numbers,
                "looked_at": looked_at,
                "chosen": self._num_chosen,
                "without": self._num_without,
                "absent": sorted(self._absent or ()),
                "wrong_type": self._num_wrong_type,
            }

    def _add(self, shard: int) -> None:
        chosen, first = self._tables.chosen(self._where, shard), self._reader.first_of(shard)
        rows = chosen.rows.tolist()
        values = self._tables.values(self._field, shard) if rows else []
        places = [(place, first + row) for row in rows if (place := _place(values[row])) is not None]
        self._absent = chosen.absent if self._absent is None else self._absent & chosen.absent
        self._num_wrong_type += chosen.num_wrong_type
        self._num_chosen += len(rows)
        self._num_without += len(rows) - len(places)
        self._best = self._first_of(MAX_RANKED, chain(self._best, places), key=itemgetter(0))  # of equal ones the earlier first


def _place(value: Any) -> tuple[bool, Any] | None:
    """Where a value stands in the order: numbers, then texts; None: nowhere."""
    if isinstance(value, bytes):
        value = value.hex()
    if isinstance(value, str):
        return True, value
    return (False, value) if isinstance(value, int | float) and value == value else None  # NaN is not equal to itself
