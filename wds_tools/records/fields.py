"""The fields of a record -> its texts, or why not. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from wds_tools.errors import Reject

CAPTION = ("text_prompt", "text")
"""Fields that a caption is looked for in."""


def required_text(record: Mapping[str, Any], names: Sequence[str]) -> str:
    """The first of these fields that is there and not null: a string with more than white space.

    Raises:
        Reject: "missing_field", "wrong_type" or "empty_text".
    """
    for name in names:
        text = record.get(name)
        if text is None:
            continue
        if type(text) is not str:
            raise Reject("wrong_type", f"{name} is a {type(text).__name__}, expected a string")
        if not text or text.isspace():
            raise Reject("empty_text", f"{name} is empty")
        return text
    known = ", ".join(list(record)[:8]) or "none"
    raise Reject("missing_field", f"no {' or '.join(names)}; the fields are: {known[:200]}")
