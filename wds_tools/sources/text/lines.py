"""Lines of files, plain or zstd, with their numbers, in constant memory; and the sources of one JSON object a line.

Lines end at b"\\n" alone (U+2028 and friends are data). Blank lines are no records. `plan_lines` cuts big files into ranges that
begin and end at a line, so that several workers can read one file and every reject still has its true line number. Compressed
files are read whole; one that breaks off or is damaged gives the lines before the damage, and one reject that says where it ends.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import orjson

from wds_tools.errors import Reject, UsageError
from wds_tools.run.progress import Advance, Progress
from wds_tools.sources.inputs import by_suffix
from wds_tools.sources.record import InputFile, Record, file_records, group_to_limit
from wds_tools.sources.text.objects import MAX_LINE_BYTES, Line, fields_of
from wds_tools.sources.text.zstd import decompress
from wds_tools.storage import open_store, split_url

_READ_BYTES = 4 << 20
_RANGE_BYTES = 64 << 20


@dataclass(frozen=True)
class LineRange:
    """Consecutive lines of one file: bytes start ... end, which hold whole lines."""

    url: str
    start: int
    end: int
    first_line: int
    """Number of the first line, from 1."""
    num_lines: int


def plan_lines(files: Sequence[InputFile], lines_per_range: int, *, quiet: bool = True) -> list[LineRange]:
    """Cut files into ranges of `lines_per_range` lines (fewer where lines are very long). Reads each file once.

    Shows how far it is, unless it is to be quiet: large files take minutes.

    A range holds at least one line, and blank lines count.

    Raises:
        UsageError: a file is UTF-16, or a JSON array instead of one object a line; or there is nothing in a range.
    """
    if lines_per_range < 1:
        raise UsageError(f"lines_per_range={lines_per_range}: a range holds at least one line")
    ranges: list[LineRange] = []
    with Progress("plan", sum(file.size for file in files), quiet=quiet, unit="lines") as progress:
        for file in files:
            for span in _plan_file(file.url, lines_per_range):
                ranges.append(span)
                progress(Advance(units=span.end - span.start, samples=span.num_lines))
    return ranges


def read_lines(span: LineRange) -> Iterator[Line]:
    """The lines of a range."""
    root, name = split_url(span.url)
    store = open_store(root)
    starts = range(span.start, span.end, _READ_BYTES)
    chunks = (bytes(store.read_range(name, at, min(at + _READ_BYTES, span.end))) for at in starts)
    return number_lines(chunks, span.first_line)


def number_lines(chunks: Iterable[bytes], first: int = 1) -> Iterator[Line]:
    """Lines of a text that comes in chunks, numbered; blank ones are left out, a byte order mark is dropped."""
    for number, data in enumerate(_split(chunks), first):
        if number == 1 and data is not None:
            data = data.removeprefix(b"\xef\xbb\xbf")
        if data is None or (data and not data.isspace()):
            yield Line(number, data)


@dataclass(frozen=True)
class Lines:
    """Source of one JSON object a line; a task is a range of lines, and a record's number counts blank ones too."""

    task_lines: int
    quiet: bool
    choose = staticmethod(by_suffix(".jsonl"))

    def plan(self, files: Sequence[InputFile]) -> tuple[Sequence[LineRange], int]:
        """The ranges, and lines over all of them. Raises as plan_lines."""
        ranges = plan_lines(files, self.task_lines, quiet=self.quiet)
        return ranges, sum(span.num_lines for span in ranges)

    def read(self, task: LineRange) -> Iterator[Record[Mapping[str, Any]]]:
        """The records of a range."""
        for line in read_lines(task):
            yield Record(line.number - task.first_line, fields_of(line), task.url, line=line.number)


@dataclass(frozen=True)
class CompressedLines:
    """Source of one JSON object a line in zstd files; a task is whole files, up to `task_bytes` compressed bytes or one file."""

    task_bytes: int
    choose = staticmethod(by_suffix(".jsonl.zst", ".json.zst", ".jsonl.zstd", ".json.zstd"))

    def plan(self, files: Sequence[InputFile]) -> tuple[Sequence[Sequence[tuple[str, int]]], int]:
        """Groups of files, and compressed bytes over all of them."""
        groups = group_to_limit(files, lambda file: file.size, self.task_bytes)
        return [[(file.url, file.size) for file in group] for group in groups], sum(file.size for file in files)

    def read(self, task: Sequence[tuple[str, int]]) -> Iterator[Record[Mapping[str, Any]]]:
        """The records of the files."""
        number = 0
        for url, _ in task:
            for record in file_records(url, _decompressed_lines(url), number):
                yield record
                number = record.number + 1


def _decompressed_lines(url: str) -> Iterator[tuple[int, Mapping[str, Any] | Reject, int]]:
    """(number, fields, compressed bytes read) of each line."""
    new_bytes = 0

    def chunks() -> Iterator[bytes]:
        nonlocal new_bytes
        seen_bytes = 0
        for data, read_bytes in decompress(stream):
            new_bytes += read_bytes - seen_bytes
            seen_bytes = read_bytes
            yield data

    root, name = split_url(url)
    with open_store(root).open(name) as stream:
        for line in number_lines(chunks()):
            num_bytes, new_bytes = new_bytes, 0
            yield line.number, fields_of(line), num_bytes


def _plan_file(url: str, lines_per_range: int) -> Iterator[LineRange]:
    root, name = split_url(url)
    at = start = 0
    line = first_line = 1
    last = b"\n"
    with open_store(root).open(name) as stream:
        while chunk := stream.read(_READ_BYTES):
            if at == 0:
                _check_encoding(chunk, url)
            ends = np.flatnonzero(np.frombuffer(chunk, np.uint8) == 10) + (at + 1)
            taken = 0
            while taken < len(ends):
                wanted = lines_per_range - (line - first_line)
                stop = min(taken + wanted, len(ends))
                if ends[stop - 1] - start > _RANGE_BYTES:  # very long lines: close early, but hold at least one
                    stop = max(taken + 1, min(stop, int(np.searchsorted(ends, start + _RANGE_BYTES, "right"))))
                line += stop - taken
                end = int(ends[stop - 1])
                taken = stop
                if line - first_line >= lines_per_range or end - start >= _RANGE_BYTES:
                    yield LineRange(url, start, end, first_line, line - first_line)
                    start, first_line = end, line
            at += len(chunk)
            last = chunk[-1:]
    if at > start:
        yield LineRange(url, start, at, first_line, line - first_line + (last != b"\n"))


def _check_encoding(head: bytes, url: str) -> None:
    if head.startswith((b"\xff\xfe", b"\xfe\xff")) or b"\0" in head[:2]:
        raise UsageError(f"{url} is UTF-16: convert it first, with `iconv -f UTF-16 -t UTF-8`")
    first = head.removeprefix(b"\xef\xbb\xbf").lstrip().partition(b"\n")[0].rstrip()
    if first.startswith(b"["):
        try:
            is_array_of_objects = any(type(item) is dict for item in orjson.loads(first))
        except orjson.JSONDecodeError:  # it goes on in the next line, or behind `head`
            is_array_of_objects = first == b"[" or b"{" in first
        if is_array_of_objects:
            raise UsageError(f"{url} is a JSON array; expected one object a line: convert it with `jq -c '.[]'`")


def _split(chunks: Iterable[bytes]) -> Iterator[bytes | None]:
    pieces: list[bytes] = []  # of the line that is not at its end yet
    held = 0  # its bytes so far, also those that are no longer kept since it is too long
    for chunk in chunks:
        *ends, tail = chunk.split(b"\n")
        for end in ends:
            held += len(end)
            pieces.append(end)
            yield b"".join(pieces) if held <= MAX_LINE_BYTES else None
            pieces.clear()
            held = 0
        held += len(tail)
        pieces.append(tail)
        if held > MAX_LINE_BYTES:
            pieces.clear()
    if held:
        yield b"".join(pieces) if held <= MAX_LINE_BYTES else None
