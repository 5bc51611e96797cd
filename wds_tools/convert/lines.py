"""Input files -> lines, with their numbers, in constant memory.

What lies in an input folder is taken, or counted and named: on standard error, in the manifest, and in the summary.

Lines end at b"\\n" alone (U+2028 and friends are data). Blank lines are no records. `plan_lines` cuts big files into ranges that
begin and end at a line, so that several workers can read one file and every reject still has its true line number.
"""

from __future__ import annotations

import os
import posixpath
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import orjson
from braceexpand import braceexpand

from wds_tools.convert.options import ConvertOptions
from wds_tools.dataset.layout import IS_REJECTS_FILE
from wds_tools.errors import NotFound, StorageError, UsageError
from wds_tools.format.schema import taken_names
from wds_tools.run.progress import Advance, Progress
from wds_tools.sources.fields import MAX_LINE_BYTES, Line
from wds_tools.storage import join, open_store, split_url
from wds_tools.storage.base import split_scheme
from wds_tools.terminal import say

_READ_BYTES = 4 << 20
_RANGE_BYTES = 64 << 20
_NAMED_FILES = 8
_NO_DATA = ("state.json", "dataset_info.json")
"""Of save_to_disk, beside the data."""

Choice = Callable[[str, Mapping[str, int]], Sequence[str]]
"""URL of a folder, and the names and sizes of the files below it -> the names of those that are inputs."""


class InputFile(NamedTuple):
    """One file to read."""

    url: str
    size: int


@dataclass(frozen=True)
class LineRange:
    """Consecutive lines of one file: bytes start ... end, which hold whole lines."""

    url: str
    start: int
    end: int
    first_line: int
    """Number of the first line, from 1."""
    num_lines: int


class Inputs(NamedTuple):
    """The files of a conversion, and the URLs of what lies in its folders and is left out."""

    files: list[InputFile]
    left_out: list[str]

    @property
    def source(self) -> dict[str, Any]:
        """For the manifest."""
        record: dict[str, Any] = {"inputs": [{"url": file.url, "bytes": file.size} for file in self.files]}
        if self.left_out:
            one_of_each: dict[str, str] = {}
            for url in self.left_out:
                one_of_each.setdefault(posixpath.splitext(url)[1].lower(), url)
            names = ", ".join(list(one_of_each.values())[:_NAMED_FILES]).encode(errors="replace").decode()
            record["left_out"] = {"files": len(self.left_out), "such_as": names}
        return record


def by_suffix(*suffixes: str) -> Choice:
    """Files whose names end so, in upper or lower case."""

    def choose(url: str, sizes: Mapping[str, int]) -> Sequence[str]:
        names = [name for name in sizes if name.lower().endswith(suffixes) and not IS_REJECTS_FILE.search(name)]
        if not names:
            others = f"; there are {len(sizes)} other files, such as {min(sizes)}" if sizes else ""
            raise NotFound(f"{url}: no such file, and no *{' or *'.join(suffixes)} under a folder of that name{others}")
        return names

    return choose


def expand_inputs(options: ConvertOptions, choose: Choice) -> Inputs:
    """The files that are meant; says on standard error what is left out.

    Args:
        options: `input` has files, folders (of which `choose` takes what it wants) and brace patterns, as part-{000..127}.jsonl.
        choose: such as `by_suffix(".jsonl")`.

    Raises:
        UsageError: no inputs, or a broken pattern.
        NotFound: something does not exist, or a folder has no such file.
    """
    found = Inputs([], [])
    for pattern in options.input:
        for url in _expand_braces(pattern):
            _add_files(found, url, options, choose)
    if not found.files:
        raise UsageError("no input: pass --input with files or folders")
    if found.left_out:
        left_out = found.source["left_out"]
        what = f"{left_out['files']:,} files of the input folders are not read as records, such as {left_out['such_as']}"
        say(f"wds-tools: {what}", error=True)
    return found


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


def check_kept_fields(keep: Sequence[str]) -> None:
    """Raise UsageError if a field can't be kept under its own name."""
    if taken := taken_names(keep):
        raise UsageError(f"--keep {', '.join(sorted(taken))}: these names are the schema's own, or not safe for readers")


def kept_fields(record: Mapping[str, Any], keep: Sequence[str]) -> dict[str, Any]:
    """The fields of a record that are kept."""
    return {name: record[name] for name in keep if name in record}


def _expand_braces(pattern: str) -> list[str]:
    if os.path.lexists(pattern):
        return [pattern]
    try:
        return list(braceexpand(pattern, escape=False))
    except ValueError as error:
        raise UsageError(f"--input {pattern!r}: unbalanced braces") from error


def _add_files(found: Inputs, url: str, options: ConvertOptions, choose: Choice) -> None:
    try:
        root, name = split_url(url)
        found.files.append(InputFile(url, open_store(root).size(name)))
        return
    except (UsageError, StorageError):
        if split_scheme(url)[0] in ("http", "https"):
            raise  # there are no folders
        # a bucket, or a folder: what is wrong with it shows when it is listed
    sizes = dict(open_store(url).list())
    allowed = {name for name, _ in open_store(url, strict_links=True).list()} if options.strict_links else sizes.keys()
    chosen = choose(url, {name: size for name, size in sizes.items() if name in allowed})
    for name in chosen:
        found.files.append(InputFile(join(url, name), sizes[name] or open_store(url).size(name)))  # raises for a link to nothing
    left_out = sorted(sizes.keys() - set(chosen))
    found.left_out.extend(join(url, name) for name in left_out if posixpath.basename(name) not in _NO_DATA)


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
