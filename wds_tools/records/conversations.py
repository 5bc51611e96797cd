"""A LLaVA-style record -> its turns, and the paths of its images. Pure."""

from __future__ import annotations

import posixpath
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from wds_tools.errors import Reject
from wds_tools.records.fields import required_text

MARK = "<image>"
_ROLES = {"system": "system", "human": "human", "user": "human", "gpt": "gpt", "assistant": "gpt"}
_IMAGE_FIELD = re.compile(
    r"(image|img|picture|photo|pixel|jpe?g|png|webp)s?(_?(path|url|uri|src|file|file_?name|bytes|data|values|base64))?s?", re.I
)
_IMAGE_FILE = re.compile(r"^data:image/|\.(jpe?g|png|webp|gif|bmp|tiff?|avif|heic)([?#]\S*)?$", re.I)
"""A path or URL of an image, or one in a URL."""
_OTHER_MARK = re.compile(r"<img>|<\|(image|vision)\w*\|>|<image[ _]?\d+>")
"""Marks of images in other conventions than LLaVA's."""


def turns_of(record: Mapping[str, Any]) -> list[dict[str, str]]:
    """The turns of a record: perhaps a system prompt, then human and gpt in turn, ending with gpt.

    Raises:
        Reject: "missing_field", "wrong_type" or "empty_text"; "bad_conversation": another role or another sequence of them.
    """
    found = record.get("conversations")
    if found is None:
        raise Reject("missing_field", f"no conversations; the fields are: {', '.join(list(record)[:8])[:200] or 'none'}")
    if not isinstance(found, list) or not all(isinstance(turn, dict) for turn in found):
        raise Reject("wrong_type", f"conversations is a {type(found).__name__}, expected a list of objects with from and value")
    prompts = [required_text(record, (name,)) for name in ("system", "system_prompt") if record.get(name)]
    turns = [{"from": "system", "value": prompt} for prompt in dict.fromkeys(prompts)]
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


def image_paths(record: Mapping[str, Any], turns: list[dict[str, str]], keep: Sequence[str] = ()) -> list[str]:
    """The image paths of a record, one for each mark in its turns; null, "" or [] where there is none.

    Raises:
        Reject: "wrong_type", "empty_text"; "unsupported_media": a video; "image_marks": other than one mark an image, or a mark
            in an answer; "unused_image": one in another field, unless it is to `keep`, or the mark of another convention.
    """
    for name in ("video", "videos", "audio", "audios"):
        if record.get(name):
            raise Reject("unsupported_media", f"the record has a field {name}; only images can be converted")
    paths: list[str] = []
    for name in ("image", "images"):
        value = record.get(name)
        entries = value if isinstance(value, list) else [value]
        if any(entry != "" for entry in entries):
            paths += [required_text({name: entry}, (name,)) for entry in entries if entry is not None]
    _check_unused(record, turns, paths, keep)
    if any(MARK in turn["value"] for turn in turns if turn["from"] == "gpt"):
        raise Reject("image_marks", f"an answer holds {MARK}, which stands for an image that is given")
    marks = sum(turn["value"].count(MARK) for turn in turns)
    if marks != len(paths):
        raise Reject("image_marks", f"{marks} {MARK} marks, {len(paths)} images: expected as many")
    return paths


def _check_unused(record: Mapping[str, Any], turns: list[dict[str, str]], paths: Sequence[str], keep: Sequence[str]) -> None:
    """Raise Reject for an image that would be left behind: no conversation about one becomes text alone."""
    used = {posixpath.basename(path) for path in paths}
    known = {"image", "images", "conversations", *keep}
    fields = [item for item in record.items() if item[0] not in known]
    fields += [item for turn in record["conversations"] for item in turn.items() if item[0] != "value"]
    for name, value in fields:
        files = [text for text in _strings(value) if _IMAGE_FILE.search(text) and posixpath.basename(text) not in used]
        if files or (value and not paths and _IMAGE_FIELD.fullmatch(name)):
            shown = f": {files[0][:80]!r}" if files else ""
            raise Reject("unused_image", f"{name} holds an image{shown}; those of image and images are used, --keep leaves it")
    for turn in turns:
        if mark := _OTHER_MARK.search(turn["value"]):
            raise Reject("unused_image", f"a turn holds {mark[0]}; expected {MARK}, and the path in image")


def _strings(value: Any, depth: int = 4) -> Iterator[str]:
    """The texts in a value, and in its lists and objects."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, list | dict) and depth:
        for inner in value if isinstance(value, list) else value.values():
            yield from _strings(inner, depth - 1)
