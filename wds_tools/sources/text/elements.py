"""JSON lists -> ranges of whole elements -> the elements, numbered.

A list is cut without parsing it: one pass over the bytes finds where its elements begin and end, so memory does not grow with
the file, several workers can read one file, and every reject has the number that `jq '.[N]'` takes. An element that can't be
parsed is one reject, found later; a list without an end, or with something behind it, is refused: who knows what is missing.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice

from wds_tools.errors import FormatError, Reject
from wds_tools.sources.record import InputFile
from wds_tools.sources.text.lines import LineRange
from wds_tools.sources.text.objects import MAX_LINE_BYTES, Line
from wds_tools.storage import open_store, split_url

_READ_BYTES = 4 << 20
_RANGE_BYTES = 64 << 20
_STRING = rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"'
_TOKEN = re.compile(rb"[\s:]*+(" + _STRING + rb'|[\[\]{},]|[^\s\[\]{},:"]++|")', re.DOTALL)
"""A string, a mark, any other value; a quote alone is where a string begins that has no end yet."""
_NEAR = rb'[^"\[\]{}]{0,8}+'
_INSIDE = re.compile(
    rb"(?:" + _STRING + rb'|[^"\[\]{}]++)*+([\[{](?:' + _NEAR + rb"[\[{])*+|[\]}](?:" + _NEAR + rb'[\]}])*+|")', re.DOTALL
)
"""In an element: all up to the next brackets, as many as there are of one kind near each other; or to such a quote."""
_CLOSING = re.compile(rb"[\]}]")


@dataclass(frozen=True)
class ElementRange(LineRange):
    """Consecutive elements of a JSON list in place of lines, counted from 0; `end` is before the comma behind the last."""


def plan_list(file: InputFile, per_range: int) -> list[ElementRange]:
    """Cut a list into ranges of `per_range` elements, fewer where they are very long. Reads the file once.

    Raises:
        FormatError: the list breaks off, or there is something behind it.
    """
    root, name = split_url(file.url)
    with open_store(root).open(name) as stream:
        try:
            return list(_group(file.url, _elements(iter(lambda: stream.read(_READ_BYTES), b"")), per_range))
        except FormatError as error:
            raise FormatError(f"{file.url}: {error}") from None


def read_elements(span: ElementRange) -> Iterator[Line]:
    """The elements of a range, each as a line whose number is the element's, from 0."""
    if span.end - span.start > MAX_LINE_BYTES + _RANGE_BYTES:  # one element, or what looks like one
        yield Line(span.first_line, None)
        return
    root, name = split_url(span.url)
    data = bytes(open_store(root).read_range(name, span.start, span.end))
    for number, (start, end) in enumerate(_elements((b"[", data, b"]")), span.first_line):
        yield Line(number, data[start - 1 : end - 1] if end - start <= MAX_LINE_BYTES else None)


def split_elements(chunks: Iterable[bytes]) -> Iterator[Line]:
    """The elements of a list that comes in chunks, each as a line whose number is the element's, from 0.

    Raises:
        Reject: behind the last element, "bad_list": the list is not closed, or there is something behind it.
    """
    kept, kept_from, done = b"", 0, 0  # what is not cut out yet; its place in the text; where the last element ended

    def keep() -> Iterator[bytes]:
        nonlocal kept, kept_from
        for chunk in _join(chunks):
            rest = kept[max(done - kept_from, 0) :]
            if len(rest) > MAX_LINE_BYTES:  # of one element
                rest = b""
            kept_from += len(kept) - len(rest)
            kept = rest + chunk
            yield chunk

    try:
        for number, (start, end) in enumerate(_elements(keep())):
            is_kept = start >= kept_from and end - start <= MAX_LINE_BYTES
            yield Line(number, kept[start - kept_from : end - kept_from] if is_kept else None)
            done = end
    except FormatError as error:
        raise Reject("bad_list", str(error)) from error


def _join(chunks: Iterable[bytes]) -> Iterator[bytes]:
    """The same bytes in fewer chunks, also those before a Reject."""
    pieces: list[bytes] = []
    held = 0
    try:
        for chunk in chunks:
            pieces.append(chunk)
            held += len(chunk)
            if held >= _READ_BYTES:
                yield b"".join(pieces)
                pieces.clear()
                held = 0
    except Reject:
        if held:
            yield b"".join(pieces)
        raise
    if held:
        yield b"".join(pieces)


def _elements(chunks: Iterable[bytes]) -> Iterator[tuple[int, int]]:
    """(start, end) of each element of a JSON list, in bytes of the file.

    Raises:
        FormatError: the list has no end, or it has one and something behind it.
    """
    buffer, base = b"", 0  # base: offset of the buffer
    depth = count = begin = 0
    is_empty, is_closed = True, False
    chunks = iter(chunks)
    while True:
        at = 0
        while found := (_INSIDE if depth > 1 else _TOKEN).match(buffer, at):
            mark, start, at = found[1], found.start(1), found.end()
            if mark == b'"':
                at = start
                break
            if depth > 1:
                if mark[0] in b"[{":
                    depth += mark.count(b"[") + mark.count(b"{")
                elif (num_closed := mark.count(b"]") + mark.count(b"}")) < depth:
                    depth -= num_closed
                else:
                    at = start + next(islice(_CLOSING.finditer(mark), depth - 2, None)).end()
                    depth = 1
                continue
            if mark in b"[{" and not is_closed:
                depth += 1
                if depth == 1:
                    begin, is_empty = base + at, True
                    continue
            elif depth == 1 and mark in b",]":
                if mark == b"," or count or not is_empty:
                    yield begin, base + start
                    count += 1
                begin, is_empty = base + at, True
                is_closed = mark == b"]"
                depth -= is_closed
                continue
            is_empty = False
        else:
            at = len(buffer)
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
