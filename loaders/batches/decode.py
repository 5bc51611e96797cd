"""Rows in memory -> columns, and what to do about a row that can't be read.

An unreadable row stops the run, or its position is filled by the next readable row of its shard, so that no rank ever
takes a different number of steps.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple, TypeVar

import numpy as np
import orjson

from loaders.batches.collate import Data, check_crc
from loaders.order.samples import Located
from loaders.reading.source import LoadedRows, bytes_of
from wds_tools.errors import DataError, FormatError, Reject

_MOST_TRIED = 64
_T = TypeVar("_T")
Parse = Callable[[Sequence[LoadedRows], Sequence[int], Data], _T]
"""Makes something of rows, as collate.read_columns does."""
_READING_ERRORS = (DataError, KeyError, IndexError, ValueError, TypeError)


class Substitution(NamedTuple):
    """A position whose own sample could not be read."""

    source: int
    shard: int
    sample_index: int
    substitute_index: int
    reason: str
    """crc32, json, format, or why a sample makes no token row."""


class Decoder:
    """Turns rows into columns.

    Args:
        check_crc: compare every row's bytes with the index.
        substitute: replace a row that can't be read; else it is a FormatError.
    """

    def __init__(self, *, check_crc: bool, substitute: bool) -> None:
        self._check_crc = check_crc
        self._substitute = substitute

    def decode(self, located: Located, rows: list[LoadedRows], parse: Parse[_T]) -> tuple[_T, list[Substitution], Located]:
        """These rows parsed, what was substituted, and those of `located` that were not.

        Args:
            located: where the positions lead.
            rows: what holds the row of each.
            parse: what is made of them, such as collate.read_columns.

        Raises:
            FormatError: a row can't be read, and was not to be replaced or none of the next 64 of its shard can be read either.
        """
        with _paused_gc():
            return self._decode(located, rows, parse)

    def _decode(self, located: Located, rows: list[LoadedRows], parse: Parse[_T]) -> tuple[_T, list[Substitution], Located]:
        numbers = located.sample_index.tolist()
        try:
            return self._parsed(rows, numbers, parse), [], located
        except _READING_ERRORS:
            substitutions = self._replace_bad(located, rows, numbers, parse)
            good = Located(*(column[located.sample_index == np.array(numbers)] for column in located))
            return self._parsed(rows, numbers, parse), substitutions, good

    def _parsed(
        self,
        rows: Sequence[LoadedRows],
        numbers: Sequence[int],
        parse: Parse[_T],
    ) -> _T:
        data = bytes_of(rows, numbers)
        if self._check_crc:
            check_crc(rows, numbers, data)
        return parse(rows, numbers, data)

    def _replace_bad(
        self, located: Located, rows: list[LoadedRows], numbers: list[int], parse: Parse[object]
    ) -> list[Substitution]:
        """Put another row of its shard in place of each that can't be read; stop at the first if that was not asked for."""
        substitutions = []
        for at, (held, row) in enumerate(zip(rows, numbers, strict=True)):
            error = self._problem(held, row, parse)
            if error is None or self._fetch_anew(rows, at, row, error, parse):
                continue
            what = f"{held.where(row)}: {error}"
            if not self._substitute:
                raise FormatError(f"{what}. on_error='substitute' goes on without it") from error
            num_rows = held.reader.opened.manifest.shards[held.shard].samples
            others = ((row + step) % num_rows for step in range(1, min(num_rows, _MOST_TRIED + 1)))
            found = next(((rows[at], other) for other in others if self._put(rows, at, other, parse)), None)
            if found is None:
                raise FormatError(
                    f"{what}; nor can any of the next {min(num_rows - 1, _MOST_TRIED)} of its shard be read"
                ) from error
            substitute_index = found[1]
            numbers[at] = substitute_index
            substitutions.append(Substitution(int(located.source[at]), held.shard, row, substitute_index, _reason(error)))
        return substitutions

    def _fetch_anew(self, rows: list[LoadedRows], at: int, row: int, error: Exception, parse: Parse[object]) -> bool:
        """Make `rows[at]` what the storage has by now, if a cache may have kept this row damaged; whether it can be read then."""
        if not rows[at].reader.is_cached or isinstance(error, Reject):
            return False
        for again in False, True:  # another row of its region may have had it fetched
            held = rows[at].reader.load(rows[at].shard, row, row + 1, again=again)
            if self._problem(held, row, parse) is None:
                rows[at] = held
                return True
        return False

    def _put(self, rows: list[LoadedRows], at: int, row: int, parse: Parse[object]) -> bool:
        """Make `rows[at]` what holds this row of the same shard; whether the row can be read."""
        held = rows[at]
        if not held.first <= row < held.last:
            held = held.reader.load(held.shard, row, row + 1)
        if self._problem(held, row, parse) is not None:
            return False
        rows[at] = held
        return True

    def _problem(self, held: LoadedRows, row: int, parse: Parse[object]) -> Exception | None:
        try:
            self._parsed([held], [row], parse)
        except _READING_ERRORS as error:
            return error
        return None


def _reason(error: Exception) -> str:
    """A short word for a count."""
    if isinstance(error, Reject):
        return error.reason
    return "crc32" if "CRC-32" in str(error) else "json" if isinstance(error, orjson.JSONDecodeError) else "format"


@contextmanager
def _paused_gc() -> Iterator[None]:
    """Thousands of views live for a moment here; letting the cycle collector look at them costs a fifth of the time."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()
