"""Files of JSON records, one list or one object a line -> ranges of whole records -> the records, numbered.

A list is cut without parsing it: one pass over the bytes finds where its elements begin and end, so memory does not grow with
the file, several workers can read one file, and every reject has the number that `jq '.[N]'` takes. An element that can't be
parsed is one reject, found later; a list without an end, or with something behind it, is refused: who knows what is missing.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import orjson

from wds_tools.errors import FormatError, UsageError
from wds_tools.sources.inputs import by_suffix
from wds_tools.sources.record import InputFile, Record
from wds_tools.sources.text.lines import LineRange, plan_lines, read_lines
from wds_tools.sources.text.objects import MAX_LINE_BYTES, Line, fields_of
from wds_tools.storage import open_store, split_url

_READ_BYTES = 4 << 20
_RANGE_BYTES = 64 << 20
_BOM = b"\xef\xbb\xbf"
_TOKEN = re.compile(rb'"[^"\\]*(?:\\.[^"\\]*)*"|[\[\]{},]|[^\s\[\]{},:"]+|"', re.DOTALL)
"""A string, a mark, any other value; a quote alone is where a string begins that has no end yet."""


@dataclass(frozen=True)
class ElementRange(LineRange):
    """Consecutive elements of a JSON list in place of lines, counted from 0; `end` is before the comma behind the last."""


@dataclass(frozen=True)
class JsonRecords:
    """Source of JSON lists, or one object a line; a task is a range of records."""

    task_records: int
    choose = staticmethod(by_suffix(".json", ".jsonl"))

    def plan(self, files: Sequence[InputFile]) -> tuple[Sequence[LineRange], int]:
        """The ranges, and records over all of them. Raises as plan_records."""
        ranges = plan_records(files, self.task_records)
        return ranges, sum(span.num_lines for span in ranges)

    def read(self, task: LineRange) -> Iterator[Record[Mapping[str, Any]]]:
        """The records of a range."""
        is_list = isinstance(task, ElementRange)
        for line in read_records(task):
            line_number, element = (None, line.number) if is_list else (line.number, None)
            yield Record(line.number - task.first_line, fields_of(line), task.url, line_number, element)


def plan_records(files: Sequence[InputFile], per_range: int) -> list[LineRange]:
    """Cut files into ranges of `per_range` records, fewer where they are very long. Reads each file once.

    Raises:
        UsageError: a file is UTF-16, or a single object.
        FormatError: a list breaks off.
    """
    ranges: list[LineRange] = []
    for file in files:
        root, name = split_url(file.url)
        with open_store(root).open(name) as stream:
            head = stream.read(_READ_BYTES)
            if head.removeprefix(_BOM).lstrip()[:1] == b"[":
                chunks = iter(lambda: stream.read(_READ_BYTES), b"")  # used up before the next file
                try:
                    ranges += _group(file.url, _elements(head, chunks), per_range)
                except FormatError as error:
                    raise FormatError(f"{file.url}: {error}") from None
                continue
        _check_lines(file.url, head)
        ranges += plan_lines([file], per_range)
    return ranges


def read_records(span: LineRange) -> Iterator[Line]:
    """The records of a range, each as a line: of a list, `number` counts elements."""
    if not isinstance(span, ElementRange):
        yield from read_lines(span)
        return
    if span.end - span.start > MAX_LINE_BYTES + _RANGE_BYTES:  # one element, or what looks like one
        yield Line(span.first_line, None)
        return
    root, name = split_url(span.url)
    data = bytes(open_store(root).read_range(name, span.start, span.end))
    for number, (start, end) in enumerate(_elements(b"[", [data, b"]"]), span.first_line):
        yield Line(number, data[start - 1 : end - 1] if end - start <= MAX_LINE_BYTES else None)


def _elements(head: bytes, chunks: Iterable[bytes]) -> Iterator[tuple[int, int]]:
    """(start, end) of each element of a JSON list, in bytes of the file.

    Raises:
        FormatError: the list has no end, or it has one and something behind it.
    """
    buffer, base = head, 0  # base: offset of the buffer
    depth = count = begin = 0
    is_empty, is_closed = True, False
    chunks = iter(chunks)
    while True:
        at = len(buffer)
        for token in _TOKEN.finditer(buffer):
            mark = token[0]
            if mark == b'"':
                at = token.start()
                break
            if mark in b"[{" and not is_closed:
                depth += 1
                if depth == 1:
                    begin, is_empty = base + token.end(), True
                    continue
            elif mark in b"]}" and depth > 1:
                depth -= 1
            elif depth == 1 and mark in b",]":
                if mark == b"," or count or not is_empty:
                    yield begin, base + token.start()
                    count += 1
                begin, is_empty = base + token.end(), True
                is_closed = mark == b"]"
                depth -= is_closed
                continue
            is_empty = False
        buffer, base = buffer[at:], base + at
        chunk = next(chunks, b"")
        if not chunk or len(buffer) > MAX_LINE_BYTES:
            break
        buffer += chunk
    if depth:
        raise FormatError(
            f"the list is not closed: its element {count}, which begins at byte {begin}, goes on to byte {base + len(buffer)}: "
            "the file breaks off, or a bracket or quote is missing there"
        )
    if not is_empty:
        raise FormatError(f"there is something behind the list, which ends at byte {begin}")


def _group(url: str, elements: Iterable[tuple[int, int]], per_range: int) -> Iterator[ElementRange]:
    start = end = first = count = 0
    for element in elements:
        if count and (count == per_range or element[1] - start > _RANGE_BYTES):
            yield ElementRange(url, start, end, first, count)
            first, count = first + count, 0
        if not count:
            start = element[0]
        end = element[1]
        count += 1
    if count:
        yield ElementRange(url, start, end, first, count)


def _check_lines(url: str, head: bytes) -> None:
    """Raise UsageError if a file that is no list can't be one object a line either."""
    first = head.removeprefix(_BOM).lstrip().partition(b"\n")[0]
    if url.lower().endswith(".jsonl") or not first.startswith(b"{"):
        return
    try:
        record = orjson.loads(first)
        lists = [name for name, value in record.items() if isinstance(value, list) and value and isinstance(value[0], dict)]
        is_record = "conversations" in record or not lists
    except orjson.JSONDecodeError:
        is_record, lists = len(first) == len(head) == _READ_BYTES, []
    if not is_record:
        inside = f"`jq '.{lists[0]}'`" if lists else "`jq`"
        raise UsageError(
            f"{url} is one object; expected a list of records, or one record a line: take the list out with {inside}"
        )
