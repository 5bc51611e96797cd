"""Lines of files, with their numbers, in constant memory.

Lines end at b"\\n" alone (U+2028 and friends are data). Blank lines are no records. `plan_lines` cuts big files into ranges that
begin and end at a line, so that several workers can read one file and every reject still has its true line number.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

import numpy as np

from wds_tools.errors import UsageError
from wds_tools.run.progress import Advance, Progress
from wds_tools.sources.record import InputFile
from wds_tools.sources.text.objects import MAX_LINE_BYTES, Line
from wds_tools.storage import open_store, split_url
from wds_tools.storage.ahead import ahead

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
        UsageError: there is nothing in a range.
    """
    if lines_per_range < 1:
        raise UsageError(f"lines_per_range={lines_per_range}: a range holds at least one line")
    pieces = ((file.url, at, file.size) for file in files for at in range(0, file.size, _READ_BYTES))
    ranges: list[LineRange] = []
    with Progress("plan", sum(file.size for file in files), quiet=quiet, unit="lines") as progress:
        chunks = _read_all(pieces, are_far=any("://" in file.url for file in files))
        for file in files:
            for span in _plan_file(file.url, islice(chunks, -(-file.size // _READ_BYTES)), lines_per_range):
                ranges.append(span)
                progress(Advance(units=span.end - span.start, samples=span.num_lines))
    return ranges


def read_lines(span: LineRange) -> Iterator[Line]:
    """The lines of a range."""
    pieces = ((span.url, at, span.end) for at in range(span.start, span.end, _READ_BYTES))
    return number_lines(_read_all(pieces, are_far="://" in span.url), span.first_line)


def _read_all(pieces: Iterable[tuple[str, int, int]], *, are_far: bool) -> Iterator[bytes]:
    """The _READ_BYTES from `at` of each (file, at, end), ahead of whoever takes them if a request waits for an answer."""

    def read(piece: tuple[str, int, int]) -> bytes:
        url, at, end = piece
        root, name = split_url(url)
        return bytes(open_store(root).read_range(name, at, min(at + _READ_BYTES, end)))

    return ahead(read, pieces) if are_far else map(read, pieces)


def number_lines(chunks: Iterable[bytes], first: int = 1) -> Iterator[Line]:
    """Lines of a text that comes in chunks, numbered; blank ones are left out, a byte order mark is dropped."""
    for number, data in enumerate(split_lines(chunks), first):
        if number == 1 and data is not None:
            data = data.removeprefix(b"\xef\xbb\xbf")
        if data is None or (data and not data.isspace()):
            yield Line(number, data)


def _plan_file(url: str, chunks: Iterable[bytes], lines_per_range: int) -> Iterator[LineRange]:
    at = start = 0
    line = first_line = 1
    last = b"\n"
    for chunk in chunks:
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


def split_lines(chunks: Iterable[bytes]) -> Iterator[bytes | None]:
    """The lines of a text that comes in chunks, without their ends; None for one that is longer than MAX_LINE_BYTES."""
    pieces: list[bytes] = []  # of the line that is not at its end yet
    held = 0  # its bytes so far, also those that are no longer kept since it is too long
    for chunk in chunks:
        *ends, tail = chunk.split(b"\n")
        if ends:
            held += len(ends[0])
            pieces.append(ends[0])
            yield b"".join(pieces) if held <= MAX_LINE_BYTES else None
            pieces.clear()
            held = 0
            for end in islice(ends, 1, None):
                yield end if len(end) <= MAX_LINE_BYTES else None
        held += len(tail)
        pieces.append(tail)
        if held > MAX_LINE_BYTES:
            pieces.clear()
    if held:
        yield b"".join(pieces) if held <= MAX_LINE_BYTES else None
