"""A LLaVA-style record -> its turns, and the paths of its images. Pure."""

from __future__ import annotations

from typing import Any

from wds_tools.errors import Reject
from wds_tools.sources.fields import required_text

MARK = "<image>"
_ROLES = {"system": "system", "human": "human", "user": "human", "gpt": "gpt", "assistant": "gpt"}


def turns_of(record: dict[str, Any]) -> list[dict[str, str]]:
    """The turns of a record: perhaps a system prompt, then human and gpt in turn, ending with gpt.

    Raises:
        Reject: "missing_field", "wrong_type" or "empty_text"; "bad_conversation": another role or another sequence of them.
    """
    found = record.get("conversations")
    if found is None:
        raise Reject("missing_field", f"no conversations; the fields are: {', '.join(list(record)[:8])[:200] or 'none'}")
    if not isinstance(found, list) or not all(isinstance(turn, dict) for turn in found):
        raise Reject("wrong_type", f"conversations is a {type(found).__name__}, expected a list of objects with from and value")
    turns = []
    if record.get("system_prompt"):
        turns.append({"from": "system", "value": required_text(record, ("system_prompt",))})
    for turn in found:
        role = _ROLES.get(required_text(turn, ("from",)))
        if role is None:
            raise Reject("bad_conversation", f"a turn is from {turn['from'][:80]!r}, expected one of {', '.join(_ROLES)}")
        turns.append({"from": role, "value": required_text(turn, ("value",))})
    roles = [turn["from"] for turn in turns]
    talk = roles[1:] if roles[:1] == ["system"] else roles
    if not talk or talk != ["human", "gpt"] * (len(talk) // 2):
        shown = ", ".join(roles[:8]) or "none"
        raise Reject("bad_conversation", f"the turns are from: {shown}; expected human and gpt in turn, ending with gpt")
    return turns


def image_paths(record: dict[str, Any], turns: list[dict[str, str]]) -> list[str]:
    """The image paths of a record, one for each mark in its turns.

    Raises:
        Reject: "wrong_type", "empty_text"; "unsupported_media": a video; "image_marks": other than one mark an image, or a mark
            in an answer.
    """
    for name in ("video", "videos", "audio", "audios"):
        if record.get(name):
            raise Reject("unsupported_media", f"the record has a field {name}; only images can be converted")
    paths: list[str] = []
    for name in ("image", "images"):
        value = record.get(name)
        entries = value if isinstance(value, list) else [value]
        paths += [required_text({name: entry}, (name,)) for entry in entries if entry is not None]
    if any(MARK in turn["value"] for turn in turns if turn["from"] == "gpt"):
        raise Reject("image_marks", f"an answer holds {MARK}, which stands for an image that is given")
    marks = sum(turn["value"].count(MARK) for turn in turns)
    if marks != len(paths):
        raise Reject("image_marks", f"{marks} {MARK} marks, {len(paths)} images: expected as many")
    return paths
