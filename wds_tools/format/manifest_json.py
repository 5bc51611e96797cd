"""The text of a manifest, read and written in pieces: no more than some hundred of its shards are objects at a time.

    ManifestText(stream) -> head; shards() as columns; then document, without them, and hash
    manifest_text(document, shards) -> text

manifest_text lays a shard out on lines of its own, with four spaces before its braces. A text in JSON has no line breaks, so a
line break with these spaces and braces is where a shard ends, and what lies between such places is a list by itself. A document
that is laid out otherwise has its shards left in it.
Invariant: they are those that a parser would give of the whole. Cost: about 4 us a shard and 100 bytes.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Mapping
from typing import Any, BinaryIO

import orjson

from wds_tools.errors import FormatError
from wds_tools.format.shard_rows import BEGIN, END, rows_alike
from wds_tools.format.shards import Shards
from wds_tools.format.typed_json import MAX_BYTES

NO_HASH = "sha256:" + "0" * 64
_ZEROS = b"0" * 64
_OWN_HASH = re.compile(rb'"manifest_hash":\s*"sha256:([0-9a-f]{64})"')
_BEFORE, _BETWEEN, _END = b'\n  "shards": [', b"\n    },\n    {", b"\n    }\n  ]"
_LINES = orjson.OPT_INDENT_2 | orjson.OPT_APPEND_NEWLINE
_PIECE_BYTES = 512 << 10
_PARSED_BYTES = 64 << 10
"""At a time, of shards that are not alike: the objects fit a processor's cache, which halves the time."""


class ManifestText:
    """A manifest while it is read: first its head, then its shards, then the rest.

    Args:
        stream: its bytes.
        what: how a message begins.

    Raises:
        FormatError: it has more than MAX_BYTES; so does `shards`.
    """

    def __init__(self, stream: BinaryIO, what: str) -> None:
        self._stream, self._what, self._left = stream, what, MAX_BYTES
        text = self._read(0)
        while (at := text.find(_BEFORE + BEGIN)) < 0 and (more := self._read(len(text))):
            text += more
        match = _OWN_HASH.search(text)
        begin, end = match.span(1) if match else (0, 0)
        self._digest = hashlib.sha256(text[:begin] + _ZEROS[: end - begin] + text[end:])
        at += len(_BEFORE) if at >= 0 else len(text) + 1
        self.document, self._rest = text[:at], text[at:]

    @property
    def head(self) -> bytes:
        """What is before the shards, as a document without any."""
        return self.document + b"]}" if self._rest else self.document

    def shards(self) -> Iterator[Shards]:
        """The shards, some at a time. Raises FormatError: one is not a shard."""
        rest, count, end, more = self._rest, 0, -1, self._rest
        while more and end < 0:
            cut = rest.rfind(_BETWEEN)
            shards = rows_alike(rest[: cut + len(END) + 1]) if cut >= 0 else None
            if shards is None:
                end = rest.find(_END)
                cut = end if end >= 0 else cut
                shards = Shards.join(self._parsed(rest[: cut + len(END)], count)) if cut >= 0 else None
            if shards is not None:
                yield shards
                count += len(shards)
                rest = rest[cut + len(END) :].removeprefix(b",")
            elif end < 0:
                more = self._read_on(len(rest))
                rest += more
        while more := self._read_on(len(rest)):
            rest += more
        self.document += rest

    def _parsed(self, text: bytes, count: int) -> Iterator[Shards]:
        while text:
            cut = text.rfind(_BETWEEN, 0, _PARSED_BYTES)
            end = cut + len(END) if cut >= 0 else len(text)
            try:
                records = orjson.loads(b"[" + text[:end] + b"]")
            except orjson.JSONDecodeError as cause:
                raise FormatError(f"{self._what} (no JSON behind {count:,} shards: {cause})") from cause
            yield Shards.of_json(records, self._what, count)
            count += len(records)
            text = text[end + 1 :]

    def hash(self) -> str:
        """ "sha256:<hex>" of all that was read, with zeros in the place of its own hash."""
        return f"sha256:{self._digest.hexdigest()}"

    def _read_on(self, num_bytes: int) -> bytes:
        data = self._read(num_bytes)
        self._digest.update(data)
        return data

    def _read(self, num_bytes: int) -> bytes:
        data = self._stream.read(max(num_bytes, _PIECE_BYTES))
        self._left -= len(data)
        if self._left < 0:
            raise FormatError(f"{self._what} (it has more than {MAX_BYTES:,} bytes, the most that are read)")
        return data


def manifest_text(document: Mapping[str, Any], shards: Shards) -> bytes:
    """The text of a manifest: indented, `shards` last; its `manifest_hash`, if it has one, is NO_HASH before."""
    head = orjson.dumps({**document, "shards": []}, option=_LINES)
    pieces = []
    for first, last in shards.parts():
        rows = orjson.dumps({"shards": shards.rows(first, last)}, option=orjson.OPT_INDENT_2)
        pieces.append(rows[rows.index(BEGIN) : rows.rindex(_END) + len(END)])
    text = head.removesuffix(b"[]\n}\n") + b"[" + b",".join(pieces) + b"\n  ]\n}\n" if pieces else head
    return text.replace(_ZEROS, hashlib.sha256(text).hexdigest().encode(), 1) if "manifest_hash" in document else text
