"""CSV and TSV with a header -> rows, each as field -> text.

Fields in quotes may hold separators, quotes (doubled) and line ends, as spreadsheets and pandas write them (RFC 4180). A row with
another number of fields than the header is a reject, never filled up or cut: so a quote without an end shows.
Memory: a row, which has MAX_ROW_BYTES and MAX_ROW_SEPARATORS at most.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Iterable, Iterator
from itertools import chain
from typing import Any

from wds_tools.errors import Reject
from wds_tools.sources.text.lines import split_lines

MAX_ROW_BYTES = 16 << 20
MAX_ROW_SEPARATORS = 1_000_000
MAX_COLUMNS = 10_000
_BOM = b"\xef\xbb\xbf"
csv.field_size_limit(MAX_ROW_BYTES)


def read_rows(chunks: Iterable[bytes], separators: str) -> Iterator[tuple[int, dict[str, Any] | Reject]]:
    """(line where it begins, from 1; field -> text) of each row behind the header.

    Args:
        chunks: the text, in any pieces.
        separators: those that it may have: the one that the first line has most often, of several the first.

    Raises:
        Reject: "bad_header": the first row is none, or has more than MAX_COLUMNS fields; or what `chunks` raises.
    """
    rest = split_lines(chunks)
    first = next(rest, b"")
    unquoted = re.sub(rb'"[^"]*"', b"", first or b"")
    separator = max(separators, key=lambda each: unquoted.count(each.encode()))
    lines = _Lines(chain((first,), rest), separator)
    rows = csv.reader(lines, delimiter=separator, strict=True)
    header: list[str] = []
    while True:
        line = rows.line_num + 1
        fields: dict[str, Any] | Reject
        try:
            row = next(rows)
            fields = _fields(header, row) if header or not row else Reject("", "")
        except StopIteration:
            return
        except csv.Error as error:
            row, fields = [""], Reject("bad_csv", str(error))
        except _TooLong as error:
            row, fields = [""], Reject("line_too_long", str(error))
        lines.begin_row()
        if not row:  # a blank line
            continue
        if header:
            yield line, fields
        else:
            header = _checked_header(row)


class _TooLong(Exception):
    pass


class _Lines:
    """Lines as the csv module wants them; bytes that are not UTF-8 are lone surrogates. Goes on behind what it raises."""

    def __init__(self, lines: Iterator[bytes | None], separator: str) -> None:
        self._lines = lines
        self._separator = separator.encode()
        self._is_first = True
        self.begin_row()

    def begin_row(self) -> None:
        """A row begins with the next line."""
        self._bytes = self._separators = 0

    def __iter__(self) -> _Lines:
        return self

    def __next__(self) -> str:
        data = next(self._lines)
        if self._is_first and data is not None:
            data = data.removeprefix(_BOM)
        self._is_first = False
        if data is not None:
            self._bytes += len(data)
            self._separators += data.count(self._separator)
        if data is None or self._bytes > MAX_ROW_BYTES or self._separators > MAX_ROW_SEPARATORS:
            raise _TooLong(f"a row of more than {MAX_ROW_BYTES} bytes or {MAX_ROW_SEPARATORS} fields: is a quote not closed?")
        return data.decode(errors="surrogateescape") + "\n"


def _checked_header(row: list[str]) -> list[str]:
    problem = None
    if len(row) > MAX_COLUMNS:
        problem = f"{len(row)} fields, at most {MAX_COLUMNS}"
    elif twice := sorted({name for name in row if row.count(name) > 1}):
        problem = f"two fields are named {twice[0]!r}"
    elif not any(row):
        problem = "it can't be read"
    if problem:
        raise Reject("bad_header", f"the first row should name the fields: {problem}")
    return row


def _fields(header: list[str], row: list[str]) -> dict[str, Any] | Reject:
    if len(row) != len(header):
        return Reject("bad_csv", f"{len(row)} fields, the header has {len(header)}")
    for name, text in zip(header, row, strict=True):
        try:
            text.encode()
        except UnicodeEncodeError as error:
            return Reject("invalid_utf8", f"{name}: byte {ord(text[error.start]) & 0xFF:#04x} at character {error.start}")
    return dict(zip(header, row, strict=True))
