"""Rows of shards, as the text of a manifest has them, to columns without a parser: bytes are compared, digits are summed.

    rows_alike(text) -> Shards, or None: a parser has to be asked

The first row is parsed. Written again with zeros for its values, it is what every row has to have between its values, and line
breaks say where these end. Names without escapes are taken, and numbers of at most 15 digits.
Invariant: what is returned is what a parser would give. Cost: 1 us a shard.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import orjson
from numpy.typing import NDArray

from wds_tools.errors import FormatError
from wds_tools.format.shards import FIELDS, Ints, Ragged, Shards, spread

BEGIN, END = b"\n    {", b"\n    }"
_POWERS = np.array([10**place for place in range(15)], np.float64)
"""Of the digits of a number, the last first: sums of so many are exact."""
_NAME, _HASH = 0, 3
"""Of the values of a row: name, samples, bytes, xxh128, samples of each data type, text_chars, num_codes."""


def rows_alike(text: bytes) -> Shards | None:
    """The shards of rows, each with a comma behind it; None if their members or data types differ, or `manifest_text` would lay
    them out otherwise."""
    try:
        return _rows_as(Shards.of_json([orjson.loads(text[: text.index(END) + len(END)])], "the first row", 0), text)
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
    *before, last = zeros[zeros.index(BEGIN) : zeros.rindex(END) + len(END)].split(b'": 0')
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
