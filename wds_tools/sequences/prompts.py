"""The wordings between texts, codes and turns, ours or those of a file.

They are joined to the texts beside them and tokenized together. They may contain special tokens by name; samples' texts may not.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from wds_tools.errors import UsageError
from wds_tools.format.typed_json import read_json

Turn = tuple[str, str]
"""What stands before and behind a turn's words."""


@dataclass(frozen=True, kw_only=True)
class Prompts:
    """Wordings."""

    draw: tuple[str, ...] = (
        "\nPaint what this says.",
        "\nNow show it as a picture.",
        "\nPlease make an image of it.",
        "\nTurn the words above into an image.",
        "\nA picture that fits this text:",
        "\nWhat would that look like? Show me.",
        "\nProduce the matching picture.",
        "\nIllustrate this.",
    )
    """Behind the text, before the image: text to image."""
    describe: tuple[str, ...] = (
        "Say what is to be seen here.\n",
        "What does this picture show?\n",
        "Put this image into words.\n",
        "Write a caption for it.\n",
        "Tell me about the picture.\n",
        "A short description of this image:\n",
        "What is going on here?\n",
        "Describe the image above.\n",
    )
    """Behind the image, before the text: captions."""
    size: str = "\nThe picture is {width} pixels wide and {height} pixels high."
    """Before a draw prompt, for images of many shapes."""
    system: Turn = ("", "\n")
    """Around the words of "system" in a conversation."""
    human: Turn = ("User: ", "\n")
    """Around those of "human"."""
    gpt: Turn = ("Assistant: ", "")
    """Around those of "gpt"; EOS follows them at once, and belongs to them. Only these words and EOS are trained."""


def read_prompts(path: str | None, ours: Prompts | None = None) -> Prompts:
    """A template's wordings, with those of a JSON file in their place.

    Args:
        path: a JSON object of some of the fields of Prompts.
        ours: the template's.

    Raises:
        UsageError: the file can't be read, or has other fields or values.
    """
    ours = ours or Prompts()
    if path is None:
        return ours
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        raise UsageError(f"prompts: {path} can't be read: {error}") from error
    record = read_json(dict[str, Any], data, f"prompts: {path} holds no JSON object", UsageError)
    names = [field.name for field in fields(Prompts)]
    if unknown := sorted(record.keys() - set(names)):
        raise UsageError(f"prompts: {path} has {', '.join(unknown)}: known are {', '.join(names)}")
    for name, value in record.items():
        if name == "size":
            _check_size(value, path)
        elif not isinstance(value, list) or not value or not all(isinstance(text, str) for text in value):
            raise UsageError(f"prompts: {name} in {path} is {value!r}, expected a list of strings")
        elif name not in ("draw", "describe") and len(value) != 2:
            raise UsageError(f"prompts: {name} in {path} has {len(value)} strings, expected two: before and behind the words")
    values: dict[str, Any] = {name: value if isinstance(value, str) else tuple(value) for name, value in record.items()}
    return replace(ours, **values)


def _check_size(value: Any, path: str) -> None:
    try:
        str.format(value, width=1, height=1)  # a TypeError, unless it is a string
    except (TypeError, KeyError, IndexError, ValueError, AttributeError) as error:
        raise UsageError(f"prompts: size in {path} is {value!r}, expected a string with {{width}} and {{height}}") from error
