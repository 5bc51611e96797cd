"""The text of a manifest, read and written in pieces: no more than some hundred of its shards are objects at a time.

    ManifestText(stream) -> head; shards() as columns; then document, without them, and hash
    manifest_text(document, shards) -> text

manifest_text lays a shard out on lines of its own, with four spaces before its braces. A text in JSON has no line breaks, so a
line break with these spaces and braces is where a shard ends, and what lies between such places is a list by itself. A document
that is laid out otherwise has its shards left in it.
Rows that are alike need no parser: the first, written again with zeros for its values, is what every row has to have between its
values, and line breaks say where these end. Names without escapes are taken so, and numbers of at most 15 digits.
Invariant: they are those that a parser would give of the whole. Cost: 1 us a shard, 5 if it is parsed, and 100 bytes.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Mapping
from typing import Any, BinaryIO

import numpy as np
import orjson
from numpy.typing import NDArray

from wds_tools.errors import FormatError
from wds_tools.format.shards import FIELDS, Ints, Ragged, Shards, spread
from wds_tools.format.typed_json import MAX_BYTES

NO_HASH = "sha256:" + "0" * 64
_ZEROS = b"0" * 64
_OWN_HASH = re.compile(rb'"manifest_hash":\s*"sha256:([0-9a-f]{64})"')
_BEGIN, _END = b"\n    {", b"\n    }"
"""Of a shard."""
_BEFORE, _BETWEEN, _LAST = b'\n  "shards": [', _END + b"," + _BEGIN, _END + b"\n  ]"
_LINES = orjson.OPT_INDENT_2 | orjson.OPT_APPEND_NEWLINE
_PIECE_BYTES = 512 << 10
_PARSED_BYTES = 64 << 10
"""At a time, of shards that are not alike: the objects fit a processor's cache, which halves the time."""
_POWERS = np.array([10**place for place in range(15)], np.float64)
"""Of the digits of a number, the last first: sums of so many are exact."""
_NAME, _HASH = 0, 3
"""Of the values of a row: name, samples, bytes, xxh128, samples of each data type, text_chars, num_codes."""


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
        while (at := text.find(_BEFORE + _BEGIN)) < 0 and (more := self._read(len(text))):
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
            shards = rows_alike(rest[: cut + len(_END) + 1]) if cut >= 0 else None
            if shards is None:
                end = rest.find(_LAST)
                cut = end if end >= 0 else cut
                shards = Shards.join(self._parsed(rest[: cut + len(_END)], count)) if cut >= 0 else None
            if shards is not None:
                yield shards
                count += len(shards)
                rest = rest[cut + len(_END) :].removeprefix(b",")
            elif end < 0:
                more = self._read_on(len(rest))
                rest += more
        while more := self._read_on(len(rest)):
            rest += more
        self.document += rest

    def _parsed(self, text: bytes, count: int) -> Iterator[Shards]:
        while text:
            cut = text.rfind(_BETWEEN, 0, _PARSED_BYTES)
            end = cut + len(_END) if cut >= 0 else len(text)
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
        pieces.append(rows[rows.index(_BEGIN) : rows.rindex(_LAST) + len(_END)])
    text = head.removesuffix(b"[]\n}\n") + b"[" + b",".join(pieces) + b"\n  ]\n}\n" if pieces else head
    return text.replace(_ZEROS, hashlib.sha256(text).hexdigest().encode(), 1) if "manifest_hash" in document else text


def rows_alike(text: bytes) -> Shards | None:
    """The shards of rows, each with a comma behind it; None if their members or data types differ, or `manifest_text` would lay
    them out otherwise."""
    try:
        return _rows_as(Shards.of_json([orjson.loads(text[: text.index(_END) + len(_END)])], "the first row", 0), text)
    except (ValueError, IndexError, FormatError):
        return None


def _rows_as(first: Shards, text: bytes) -> Shards | None:
    """Those of rows that are as the first is. Raises IndexError, ValueError: they are not."""
    before, last = _between(first)
    data = np.frombuffer(text, np.uint8)
    breaks_RL = np.flatnonzero(data == ord("\n")).reshape(-1, b"".join((*before, last)).count(b"\n"))
    at, line, begins, lengths = breaks_RL[:, 0], -1, [], []
    for constant, behind in zip(before, [*before[1:], last], strict=True):
        _check(text, at, constant)
        begins.append(at + len(constant))
        line += constant.count(b"\n")
        at = breaks_RL[:, line + 1] - behind.index(b"\n")
        lengths.append(at - begins[-1])
    _check(text, at, last)
    if at[-1] + len(last) != len(text) or (at[:-1] + len(last) != breaks_RL[1:, 0]).any() or (lengths[_HASH] != 32).any():
        return None
    names = data[spread(begins[_NAME], lengths[_NAME])]
    hashes = bytes.fromhex(digits := _at(text, begins[_HASH], 32).tobytes().decode("ascii"))
    written = names.tobytes()
    is_plain = written.isascii() and names.min(initial=ord(" ")) >= ord(" ") and b'"' not in written and b"\\" not in written
    samples, num_bytes, *counts, text_chars, num_codes = (
        _numbers(text, *each) for number, each in enumerate(zip(begins, lengths, strict=True)) if number not in (_NAME, _HASH)
    )
    if hashes.hex() != digits or not is_plain or samples.max() >= 1 << 32:
        return None
    return Shards(
        names=Ragged.of(names, lengths[_NAME]),
        num_samples=samples,
        num_bytes=num_bytes,
        hashes=np.frombuffer(hashes, np.uint8).reshape(-1, 16),
        text_chars=text_chars,
        num_codes=num_codes,
        kind=np.zeros(len(samples), np.int32),
        kinds=first.kinds,
        counts=Ragged.of(np.array(counts, np.int64).T.reshape(-1), np.full(len(samples), len(counts))),
    )


def _between(first: Shards) -> tuple[list[bytes], bytes]:
    """What stands before each value of such a row, and what after the last. Raises ValueError: a name looks like a value."""
    ((members, types),) = first.kinds
    row: dict[str, Any] = dict.fromkeys(FIELDS, 0)
    row |= {"members": members, "data_types": dict.fromkeys(types, 0)}
    zeros = orjson.dumps({"shards": [row]}, option=orjson.OPT_INDENT_2)
    *before, last = zeros[zeros.index(_BEGIN) : zeros.rindex(_END) + len(_END)].split(b'": 0')
    if len(before) != 6 + len(types):
        raise ValueError("a name looks like a value")
    before = [each + b'": ' for each in before]
    for string in _NAME, _HASH:
        before[string], before[string + 1] = before[string] + b'"', b'"' + before[string + 1]
    return before, last + b","


def _numbers(text: bytes, begins: Ints, lengths: Ints) -> Ints:
    """The numbers whose digits lie there. Raises ValueError: they do not, or are too many."""
    if lengths.min() < 1 or (most := int(lengths.max())) > len(_POWERS):
        raise ValueError("no digits, or too many")
    digits = _at(text, begins + lengths - most, most).view(np.uint8).reshape(-1, most) - np.uint8(ord("0"))
    if (lengths != most).any():
        digits[np.arange(most) < most - lengths[:, None]] = 0
    numbers = digits @ _POWERS[most - 1 :: -1]
    if digits.max() > 9 or (numbers < _POWERS[lengths - 1])[lengths > 1].any():
        raise ValueError("other characters, or a zero before the digits")
    return numbers.astype(np.int64)


def _check(text: bytes, begins: Ints, constant: bytes) -> None:
    if _at(text, begins, len(constant)).tobytes() != constant * len(begins):
        raise ValueError("the rows are not alike")


def _at(text: bytes, begins: Ints, num_bytes: int) -> NDArray[np.void]:
    """So many bytes of the text from each place on. Raises IndexError: it ends before."""
    return np.ndarray(max(len(text) - num_bytes + 1, 0), f"V{num_bytes}", text, strides=1)[begins]
