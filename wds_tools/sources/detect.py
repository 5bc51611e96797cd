"""What a file is, by its first bytes; by its name only where they leave it open, as for CSV and for damaged files.

What is given where something else was meant (a Git LFS pointer, the HTML page of a dead link, a pickle) is named in one line with
what to do, before anything is read or written. Cost: one read of 8 KiB a file, of compressed ones a second of 256 KiB.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any, NamedTuple

from wds_tools.dataset.layout import IS_REJECTS_FILE
from wds_tools.errors import Reject
from wds_tools.sources.record import InputFile
from wds_tools.sources.text.compression import compression_of, read_pieces
from wds_tools.sources.text.objects import Line, parse_record
from wds_tools.storage import open_store, split_url
from wds_tools.storage.base import split_scheme

_HEAD_BYTES, _COMPRESSED_BYTES, _FIRST_LINE_BYTES = 8 << 10, 256 << 10, 4 << 20
_NUM_THREADS = 16
COMPRESSIONS = {".gz": "gz", ".zst": "zst", ".zstd": "zst"}
SUFFIXES = {
    ".jsonl": "lines",
    ".ndjson": "lines",
    ".json": "lines",
    ".csv": "csv",
    ".tsv": "tsv",
    ".parquet": "parquet",
    ".arrow": "arrow",
    ".tar": "tar",
    ".tgz": "tar",
}
"""Kinds by the ends of names; what is compressed has one more, see COMPRESSIONS."""
TEXT_KINDS = ("lines", "list", "csv", "tsv")
_MAGIC = (
    (0, b"PAR1", "parquet"),
    (0, b"ARROW1\0\0", "arrow"),
    (0, b"\xff\xff\xff\xff", "arrow"),
    (257, b"ustar", "tar"),
)
_PICKLE = "a pickle, which can run code when it is opened: convert it where it was made, to Parquet or to .npy"
_REFUSED = (
    (0, b"7z\xbc\xaf\x27\x1c", "a 7z archive: unpack it, or pack its files as .tar"),
    (0, b"Rar!", "a RAR archive: unpack it, or pack its files as .tar"),
    (0, b"PK\x03\x04", "a zip archive (so are .npz and torch.save): unpack it, or pack its files as .tar"),
    (0, b"BZh", "compressed by bzip2: `bunzip2`, or compress it again by zstd"),
    (0, b"\xfd7zXZ\0", "compressed by xz: `unxz`, or compress it again by zstd"),
    (0, b"\x04\x22\x4d\x18", "compressed by lz4: `unlz4`, or compress it again by zstd"),
    (0, b"MMIDIDX\0\0", "an index of Megatron-LM: it holds tokens of a text, and no text; convert what they were made of"),
    (0, b"\x93NUMPY", "an array of NumPy: codes in .npy are read as members of tars"),
    (0, b"\x89HDF\r\n", "an HDF5 file: convert it to Parquet"),
    (0, b"SQLite format 3\0", "an SQLite database: export its table as CSV"),
    *((0, bytes((0x80, version)), _PICKLE) for version in (2, 3, 4, 5)),
    *((0, magic, "audio") for magic in (b"ID3", b"OggS", b"fLaC")),
)
_UTF16 = "UTF-16: convert it first, with `iconv -f UTF-16 -t UTF-8`"


class Kind(NamedTuple):
    """What a file is."""

    name: str = ""
    """A container: "lines", "list" (of JSON), "csv", "tsv", "parquet", "arrow", "tar", or "image"; "" for what can't be read."""
    compression: str = ""
    """Of text and of tars: "gz" or "zst"."""
    problem: str = ""
    """Of what can't be read: what it is, and what to do, to stand behind "FILE is "."""
    is_other: bool = False
    """It can't be read and is nothing that is meant to be, such as one JSON object; in a folder it is left out, and named."""


def detect(files: Sequence[InputFile], known: Mapping[str, Kind] | None = None) -> list[Kind]:
    """The kinds of files, in their order; those of the URLs in `known` are not looked at."""
    known = known or {}
    with ThreadPoolExecutor(_NUM_THREADS) as pool:
        return list(pool.map(lambda file: known.get(file.url) or _detect(file), files))


def is_candidate(name: str) -> bool:
    """Whether a file of a folder may hold records, by its name."""
    return any(suffix_of(name)) and not IS_REJECTS_FILE.search(name)


def suffix_of(name: str) -> tuple[str, str]:
    """(kind, compression) that the end of a name promises, "" where it promises none."""
    name = name.lower()
    compression = ""
    for suffix, known in COMPRESSIONS.items():
        if name.endswith(suffix):
            name, compression = name.removesuffix(suffix), known
    return next((kind for suffix, kind in SUFFIXES.items() if name.endswith(suffix)), ""), compression


def _detect(file: InputFile) -> Kind:
    named, compression = suffix_of(file.url)
    head = _read(file, _HEAD_BYTES)
    packed = compression_of(head)
    if not packed and compression and not _is_text(head):
        packed = compression  # damaged, or empty: the reject says so
    if packed:
        with suppress(Reject):
            head = _decompressed(_read(file, _COMPRESSED_BYTES), packed)
    elif file.url.lower().endswith(".json") and b"\n" not in head[3:]:
        head = _read(file, _FIRST_LINE_BYTES)
    kind = kind_of(head, named, is_whole=not packed and len(head) >= file.size, is_json=file.url.lower().endswith(".json"))
    if packed and kind.name in (*TEXT_KINDS, "tar"):
        return kind._replace(compression=packed)
    if packed and kind.name in ("parquet", "arrow"):
        return Kind(problem=f"a compressed {kind.name} file: unpack it, it is compressed inside already")
    return kind


def kind_of(head: bytes, named: str, *, is_whole: bool = False, is_json: bool = False) -> Kind:
    """What begins so. Pure.

    Args:
        head: the first bytes of the file, decompressed.
        named: the kind that its name promises, or "".
        is_whole: they are all there are.
        is_json: it is a .json, which may be one object over several lines.
    """
    if not head:
        return Kind(named or "lines") if named in ("", *TEXT_KINDS, "arrow") else Kind(problem="empty: an interrupted download?")
    for offset, magic, name in _MAGIC:
        if head.startswith(magic, offset):
            return Kind(name)
    if refused := next((what for offset, magic, what in _REFUSED if head.startswith(magic, offset)), ""):
        return Kind(problem=refused)
    if head.startswith((b"\xff\xfe", b"\xfe\xff")) or (b"\0" in head[:2] and named in TEXT_KINDS):
        return Kind(problem=_UTF16)
    if not _is_text(head):
        return _binary(head, named)
    return _text(head.removeprefix(b"\xef\xbb\xbf").lstrip(), named, is_whole, is_json)


def _text(text: bytes, named: str, is_whole: bool, is_json: bool) -> Kind:
    lower = text[:200].lower()
    if lower.startswith(b"version https://git-lfs"):
        return Kind(problem="a Git LFS pointer, not the data: run `git lfs pull`")
    if lower.startswith((b"<!doctype html", b"<html", b"<head")):
        return Kind(problem="an HTML page: a dead link, or a login?")
    if lower.startswith(b"<?xml"):
        return Kind(problem="XML: an error of an object store?")
    first, _, rest = text.partition(b"\n")
    if text.startswith(b"[") and named not in ("csv", "tsv") and (is_json or _is_list(first, rest)):
        return Kind("list")
    if text.startswith(b"{") and named in ("", "csv", "tsv", *TEXT_KINDS):
        problem = _one_object(first, rest, is_whole) if is_json else ""
        return Kind(problem=problem, is_other=True) if problem else Kind("lines")
    if named in TEXT_KINDS:
        return Kind(named)
    if named:
        return Kind(problem=f"no {named.capitalize()} file but text: cut off, or an unfinished export: finish it first")
    return Kind(problem="text, but no JSON: expected one object a line, a list of objects, or .csv or .tsv", is_other=True)


def _binary(head: bytes, named: str) -> Kind:
    with suppress(ImportError):
        from wds_tools.images import damage

        if damage.format_of(head) or damage.other_image(head[:64]):
            return Kind("image")
        if (what := damage.other_file(head)) not in ("unknown data", "text"):
            return Kind(problem=what)
    return Kind(named) if named else Kind(problem="of no kind that is known here", is_other=True)


def _is_text(head: bytes) -> bool:
    return bool(head) and b"\0" not in head and sum(byte < 32 and byte not in b"\t\n\r\f\v\b\x1b" for byte in head[:1024]) < 16


def _is_list(first: bytes, rest: bytes) -> bool:
    """Whether text that begins with a bracket is a list of objects, and no line that is a list by mistake."""
    first = first.strip()
    with suppress(Reject):
        parse_record(Line(1, b'{"":' + first + b"}"))
        return any(type(item) is dict for item in parse_record(Line(1, b'{"":' + first + b"}"))[""])
    return first == b"[" or b"{" in first or (not rest and first.startswith(b"[{"))


def _one_object(first: bytes, rest: bytes, is_whole: bool) -> str:
    """What is wrong if it is one object in place of one a line, or ""."""
    lists: list[Any] = []
    try:
        record = parse_record(Line(1, first.strip()))
        if rest.strip() or not is_whole:
            return ""
        known = ("conversations", "messages", "texts", "images")
        lists = [name for name, value in record.items() if isinstance(value, list) and value and isinstance(value[0], dict)]
        if not lists or any(name in known for name in lists):
            return ""
    except Reject:
        if not rest and not is_whole:  # its first line goes on
            return ""
        with suppress(Reject):
            parse_record(Line(2, rest.lstrip().partition(b"\n")[0].strip()))
            return ""
    how = f"take the list out with `jq '.{lists[0]}'`" if lists else "`jq -c .` writes each on a line"
    return f"one object; expected a list of records, or one record a line: {how}"


def _decompressed(head: bytes, compression: str) -> bytes:
    pieces = []
    with suppress(Reject):
        for data, _ in read_pieces(lambda: io.BytesIO(head), compression):
            pieces.append(data)
            if sum(map(len, pieces)) >= _COMPRESSED_BYTES:
                break
    return b"".join(pieces)


def _read(file: InputFile, num_bytes: int) -> bytes:
    root, name = split_url(file.url)
    store = open_store(root)
    if split_scheme(file.url)[0] in ("http", "https"):  # some of these know no ranges
        with store.open(name) as stream:
            return stream.read(min(num_bytes, file.size))
    return bytes(store.read_range(name, 0, min(num_bytes, file.size)))
