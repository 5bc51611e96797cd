"""The fields of a record -> its values and texts, or why not. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from wds_tools.errors import Reject

CAPTION = ("text_prompt", "text")
"""Fields of a jsonl that a caption is looked for in."""
_SHOWN_NAMES, _KNOWN_NAMES = 4, 8


def value_of(record: Mapping[str, Any], name: str) -> Any:
    """The value of a field, or inside one: `Task2.Caption`, `captions.0`. None where there is none."""
    value = record.get(name)
    if value is not None or "." not in name:
        return value
    steps = name.split(".")
    for length in range(len(steps) - 1, 0, -1):  # a name may have dots itself
        inner = record.get(".".join(steps[:length]))
        if isinstance(inner, list):
            inner = {step: inner[int(step)]} if (step := steps[length]).isdecimal() and int(step) < len(inner) else None
        if isinstance(inner, Mapping) and (value := value_of(inner, ".".join(steps[length:]))) is not None:
            return value
    return None


def required_text(record: Mapping[str, Any], names: Sequence[str]) -> str:
    """The first of these fields that is there and not null: a string with more than white space.

    Raises:
        Reject: "missing_field", "wrong_type", "empty_text", or "invalid_utf8": half a character, which JSON can hold.
    """
    for name in names:
        text = value_of(record, name)
        if text is None:
            continue
        if type(text) is not str:
            hint = f"; --text {name}.0 takes its first" if isinstance(text, list) and text and isinstance(text[0], str) else ""
            raise Reject("wrong_type", f"{name} is a {type(text).__name__}, expected a string{hint}")
        return filled_text(text, name)
    raise lacks(record, " or ".join(names[:_SHOWN_NAMES]) + (" ..." if len(names) > _SHOWN_NAMES else ""))


def lacks(record: Mapping[str, Any], what: str, hint: str = "", reason: str = "missing_field") -> Reject:
    """For a record without what is needed of it: says which fields it has, then the hint."""
    known = ", ".join(list(record)[:_KNOWN_NAMES])[:200] or "none"
    return Reject(reason, f"no {what}; the fields are: {known}{hint}")


def filled_text(text: str, name: str) -> str:
    """The text, or Reject: "empty_text" if it is nothing but white space, or as check_text."""
    if not text or text.isspace():
        raise Reject("empty_text", f"{name} is empty")
    check_text(text, name)
    return text


def check_text(text: str, name: str) -> None:
    """Raise Reject for half a character (a lone surrogate, such as U+D83D) in a text: no file can hold it."""
    try:
        if not text.isascii():
            text.encode()
    except UnicodeEncodeError as error:
        half = ord(text[error.start])
        raise Reject("invalid_utf8", f"{name} has half a character, U+{half:04X}, as its character {error.start}") from error
