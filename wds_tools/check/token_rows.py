"""A row of tokens, as `wds-tools pack` writes it, against the length and the vocabulary that its manifest states.

Cost: one look at each id, about 20 us a row of 4,096; the bytes are in memory anyway.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from wds_tools.errors import FormatError
from wds_tools.format.schema import TOKEN_MEMBERS
from wds_tools.format.shard import parse_npy


def check_row(key: str, payloads: Mapping[str, memoryview], rows: Mapping[str, Any]) -> None:
    """Check one row.

    Args:
        key: of the row, for the message.
        payloads: its members, suffix -> bytes.
        rows: `source.rows` of the manifest.

    Raises:
        FormatError: a member is missing or has another shape, segments that don't fit the row, an id beyond the vocabulary.
    """
    if set(payloads) != set(TOKEN_MEMBERS):
        raise FormatError(f"{key}: has the members {', '.join(payloads)}, expected {', '.join(TOKEN_MEMBERS)}")
    ids, loss, segments = (parse_npy(payloads[name], f"{key}.{name}") for name in TOKEN_MEMBERS)
    length, size = rows["length"], rows["vocabulary_size"]
    bits = (length + 7) // 8
    if ids.shape != (length,) or loss.shape != (bits,) or loss.itemsize != 1:
        raise FormatError(f"{key}: tokens {ids.shape} and loss {loss.shape}, expected ({length},) and ({bits},) of bytes")
    if segments.ndim != 1 or segments.min(initial=1) < 1 or segments.sum(dtype="u8") > length:
        raise FormatError(f"{key}: segments are {segments.tolist()[:8]}, expected lengths from 1, {length} at most in all")
    highest = int(ids.max())
    if highest >= size:
        raise FormatError(f"{key}: holds the id {highest} at {int(ids.argmax())}; the vocabulary has {size} entries")
