"""A line -> the JSON object in it, or why there is none. Pure."""

from __future__ import annotations

import json
import re
from typing import Any, NamedTuple

import orjson

from wds_tools.errors import Reject

MAX_LINE_BYTES = 64 << 20
_PYTHONIC = re.compile(rb"NaN|Infinity|\\u[dD][89a-fA-F]")


class Line(NamedTuple):
    """One line that is not blank. `data` is None if it is longer than MAX_LINE_BYTES."""

    number: int
    data: bytes | None


def parse_record(line: Line) -> dict[str, Any]:
    """The JSON object of a line.

    Raises:
        Reject: "line_too_long", "invalid_utf8", "bad_json" or "not_an_object".
    """
    if line.data is None:
        raise Reject("line_too_long", f"more than {MAX_LINE_BYTES} bytes")
    try:
        record = orjson.loads(line.data)
    except orjson.JSONDecodeError as error:
        try:
            line.data.decode()
        except UnicodeDecodeError as wrong:
            raise Reject(
                "invalid_utf8", f"byte {wrong.start} of the line is {line.data[wrong.start]:#04x}: {wrong.reason}"
            ) from wrong
        record = _lenient(line.data, error)
    if type(record) is not dict:
        raise Reject("not_an_object", f"a JSON {type(record).__name__}, expected an object with fields")
    return record


def _lenient(data: bytes, error: orjson.JSONDecodeError) -> Any:
    """JSON as Python's own module writes it: with NaN, Infinity and halves of surrogate pairs. Raises Reject: bad_json."""
    if _PYTHONIC.search(data):
        try:
            return json.loads(data)
        except (ValueError, RecursionError):
            pass  # what orjson said of it is as good
    raise Reject("bad_json", str(error)) from error


def fields_of(line: Line) -> dict[str, Any] | Reject:
    """The JSON object of a line, or the reason why there is none; see parse_record."""
    try:
        return parse_record(line)
    except Reject as cause:
        return cause
