"""The record of a conversation, in any of the conventions of this field -> its turns, and its images in their order. Pure.

    field   conversations | messages | conversation: turns of from and value, or of role and content; texts: {user, assistant}
    role    see ROLES, in any case        -> system | human | gpt
    text    a string, a number, or a list of parts {type: text | image | image_url ...}        -> a string with <image> marks
    images  in their parts, or the next of the record's own for each mark, be it in a question or in an answer
    edits   records without turns that have an edited image: see `records.edits`

Invariant: nothing is guessed, and no text is changed: what does not fit is a reject, above all an image that would be left out.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, Literal, NamedTuple

import orjson

from wds_tools.errors import Reject
from wds_tools.format.schema import IMAGE_MARK
from wds_tools.records.edits import EDITED, INSTRUCTIONS, SOURCES, edit_turns
from wds_tools.records.field_map import IMAGE_NAMES, TEXT_NAMES, images_within, is_image, is_same_image, path_of
from wds_tools.records.fields import lacks, value_of
from wds_tools.records.parts import NOTHING, files_in, filled, given_in, images_in, text_of

FIELDS = ("conversations", "messages", "conversation", "texts")
"""Names of the field with the turns."""
IMAGE_FIELDS = ("image", "images", *(name for name in IMAGE_NAMES if name not in ("image", "images")))
"""Names of the field with the images, in this order; before them one that holds an image itself, not its path."""
ROLES = {
    "system": ("system", "developer"),
    "human": ("human", "user", "prompter"),
    "gpt": ("gpt", "assistant", "chatgpt", "gpt4", "bing", "bard", "model", "bot", "ai"),
}
"""Role of a turn -> what others call it, in upper or lower case."""
_ROLE_OF = {name: role for role, names in ROLES.items() for name in names}
_MEDIA_FIELD = re.compile(
    r"(video|audio)s?(_?(path|url|id|file|name|file_?name|bytes))?s?|mp4|webm|mkv|mov|avi|mp3|wav|flac|ogg|m4a"
)
_IMAGE_FIELD = re.compile(
    r"(image|img|picture|photo|pixel|jpe?g|png|webp)s?"
    r"(_?(path|url|uri|src|file|file_?name|bytes|data|values|base64|b64))?(_?str)?s?",
    re.I,
)
_OTHER_MARK = re.compile(
    r"(?!(?-i:<image>))(<img>|<\|(image|vision)\w*\|>|<image(here|[ _]?\d+|[ _]?placeholder)?>"
    r"|\[img\]|!\[[^\]]*\]\(data:image/)",
    re.I,
)
"""Marks of images in other conventions than LLaVA's."""
_MEDIA_MARK = re.compile(r"\s*<(video|audio)>(?!.*</\1>)", re.DOTALL)
"""At the beginning of a turn, and no element of a page."""
_SPEAKERS = ("from", "role")
_TEXTS = ("value", "content")
_OF_A_TURN = (*_SPEAKERS, "user", "assistant")
PROMPTS = ("system", "system_prompt")
"""Fields with a prompt of the system."""
Turn = dict[str, str]


class Talk(NamedTuple):
    """A conversation."""

    turns: list[Turn]
    """Perhaps a system prompt, then human and gpt in turn, ending with gpt; a mark for each image, also in answers."""
    images: list[Any]
    """A path, bytes, or what else an ImageReader takes, for each mark in the turns."""
    first_answer: str | None = None
    """What gpt said before anybody asked. LLaVA's trainers leave such a turn out, and so do the turns here."""


@dataclass(frozen=True)
class TalkReader:
    """Finds the conversations in records."""

    field: str | None = None
    """The field with the turns. Default: the one of FIELDS that there is."""
    image: str | None = None
    """The field with the images. Default: IMAGE_FIELDS."""
    marks: Literal["written", "first"] = "written"
    """first: images of a record without any mark come before its first question."""
    left_out: tuple[str, ...] = ()
    """Fields that may hold images or tools which are not used."""
    instruction: str | None = None
    """Of edits, the field with the instruction. Default: the first of edits.INSTRUCTIONS, or well-known text, that there is."""
    edited: str | None = None
    """Of edits, the field with the edited image; `image` has the source. Default: the first of edits.EDITED that there is."""

    def roles(self, record: Mapping[str, Any]) -> dict[str, str]:
        """What is used of a record: "conversations", and perhaps "system", "image" and "edited" -> the field.

        Raises:
            Reject: "missing_field", "ambiguous_fields", "unused_image", "unsupported_media" or "unsupported_tools".
        """
        names = [name for name in FIELDS if name not in self.left_out] if self.field is None else [self.field]
        there = [name for name in names if value_of(record, name) is not None]
        found = [name for name in there if value_of(record, name) not in NOTHING] or there[:1]
        if edit := {} if self.edited is None and (found or self.field) else self._edit_roles(record):
            found = [edit["conversations"]]
        if not found:
            raise lacks(record, " or ".join(names), "; see --conversations, or --edited")
        if len(found) > 1:
            options = " or ".join(f"--conversations {name}" for name in found)
            raise Reject("ambiguous_fields", f"{' and '.join(found)} hold conversations: say {options}")
        if record.get("tools") not in NOTHING and "tools" not in self.left_out:
            raise Reject("unsupported_tools", "the record has tools, for which turns have no place: --keep tools keeps them")
        name = found[0]
        roles = {"conversations": name, **edit}
        prompts = [prompt for prompt in PROMPTS if not _is_blank(record.get(prompt))]
        for role, field in (("system", next(iter(prompts), None)), ("image", None if edit else self._image_field(record))):
            roles |= {} if field is None else {role: field}
        turns = [] if edit else _objects(name, value_of(record, name))
        self.check_unused(record, turns, _own(record, roles), {*roles.values(), *PROMPTS})
        return roles

    def read(self, record: Mapping[str, Any]) -> Talk:
        """The conversation of a record.

        Raises:
            Reject: as `roles`; "wrong_type" or "empty_text"; "bad_conversation": another role or another sequence of them;
                "image_marks": other than one mark an image; "unused_image": another convention's mark.
        """
        roles = self.roles(record)
        name = roles["conversations"]
        places: list[Any] = []
        own = _own(record, roles)
        if "edited" in roles:
            _check_no_gaps(record, roles)
            num_sources = len(_own(record, {"image": roles["image"]})) if "image" in roles else min(len(own) - 1, 1)
            found = edit_turns(name, value_of(record, name), num_sources, len(own) - num_sources)
        else:
            found = _objects(name, value_of(record, name))
        turns = _turns(record, found, places)
        at = int(bool(turns) and turns[0]["from"] == "system")
        first_answer = turns.pop(at)["value"] if len(turns) > at and turns[at]["from"] == "gpt" else None
        _check_roles(turns)
        for turn in turns:
            if mark := _OTHER_MARK.search(turn["value"]):
                raise Reject("unused_image", f"a turn holds {mark[0]}; expected {IMAGE_MARK}, and the path in image")
            if mark := _MEDIA_MARK.match(turn["value"]):
                raise Reject("unsupported_media", f"a turn begins with {mark[0].strip()}; only images can be converted")
        if IMAGE_MARK in (first_answer or ""):
            raise Reject("image_marks", f"gpt begins, with {IMAGE_MARK}: what it says before anybody asked is left out")
        if own and not places and (self.marks == "first" or name == "texts"):
            turns[at]["value"] = IMAGE_MARK * len(own) + turns[at]["value"]
            return Talk(turns, own, first_answer)
        hint = "" if places else "; --image-marks first puts them before the first question"
        return Talk(turns, own if places == own else filled(places, own, hint), first_answer)

    def _edit_roles(self, record: Mapping[str, Any]) -> dict[str, str]:
        """What is used of an edit; {} if the record is none."""

        def first(named: str | None, names: Iterable[str]) -> str | None:
            names = [name for name in names if name not in self.left_out] if named is None else [named]
            return next((name for name in names if value_of(record, name) not in NOTHING), None)

        edited, text = first(self.edited, EDITED), first(self.instruction, (*INSTRUCTIONS, *TEXT_NAMES))
        source = first(self.image, SOURCES) or self._image_field(record)
        if not (edited and text):
            return {}
        return {"conversations": text, "edited": edited, **({"image": source} if source not in (None, edited) else {})}

    def _image_field(self, record: Mapping[str, Any]) -> str | None:
        if self.image is not None:
            return self.image if images_in(self.image, value_of(record, self.image)) else None
        there = [name for name in IMAGE_FIELDS if record.get(name) is not None and name not in self.left_out]
        names = [name for name in there if name in IMAGE_FIELDS[:2] or is_image(record[name], name)]
        names = [name for name in names if images_in(name, record[name])]
        return min(names, key=lambda name: isinstance(images_in(name, record[name])[0], str), default=None)

    def check_unused(
        self, record: Mapping[str, Any], turns: list[dict[str, Any]], own: Sequence[Any], used_fields: Iterable[str]
    ) -> None:
        """Raise Reject for an image that would be left behind: what is about one never becomes text alone.

        Args:
            record: to be looked through.
            turns: with what they say in `value` or `content`, whose parts may hold images.
            own: images of the record that are used.
            used_fields: where texts and images come from.
        """
        for name, value in record.items():
            if _MEDIA_FIELD.fullmatch(name) and name not in self.left_out and value not in NOTHING:
                raise Reject("unsupported_media", f"the record has a field {name}; only images can be converted")
        said = [next((name for name in _TEXTS if turn.get(name) is not None), "") for turn in turns]
        contents = [turn[name] for turn, name in zip(turns, said, strict=True) if isinstance(turn.get(name), list)]
        parts = [part for content in contents for part in content if isinstance(part, dict)]
        images = [*(part for part in parts if part.get("text") is None), *own]
        used = [image for _, image in files_in("", images)]
        known = {*used_fields, *self.left_out}
        fields = [(field, value, known) for field, value in record.items() if field not in known]
        spared = {*self.left_out}
        for turn, name in zip(turns, said, strict=True):
            fields += [(field, value, spared) for field, value in turn.items() if field not in (name, *_OF_A_TURN)]
        for part in parts:
            if part.get("text") is not None:
                fields += [(field, value, spared) for field, value in part.items() if field != "text"]
        for field, value, spared in fields:
            is_left = not images and ((_IMAGE_FIELD.fullmatch(field) and given_in(value)) or images_within({field: value}))
            for name, image in (*files_in(field, value), *([(field, "")] if is_left else [])):
                steps = name.removeprefix("json.").split(".")
                if spared.isdisjoint(accumulate(steps, "{}.{}".format)) and not any(_is_same(image, each) for each in used):
                    path = path_of(image)
                    shown, kept = f": {path[:80]!r}" if path else "", f"--keep {name} or " if isinstance(image, str) else ""
                    how = f"--image {name} uses it, {kept}--drop {name} leaves it out"
                    raise Reject("unused_image", f"{name} holds an image that is not used{shown}; {how}")


def _is_same(image: Any, used: Any) -> bool:
    """Whether an image is one that is used, or the URL that this one is from, by its name."""
    path = path_of(image)
    if "://" in path and path.rpartition("/")[2] == path_of(used).rpartition("/")[2]:
        return True
    return is_same_image(image, used)


def _own(record: Mapping[str, Any], roles: Mapping[str, str]) -> list[Any]:
    """The images that a record has beside its turns: those that are given, then those that were made. Raises as images_in."""
    fields = [roles[role] for role in ("image", "edited") if role in roles]
    return [image for field in fields for image in images_in(field, value_of(record, field))]


def _check_no_gaps(record: Mapping[str, Any], roles: Mapping[str, str]) -> None:
    """Raise Reject where an image of an edit is null: the next one would pass for it."""
    for field in (roles[role] for role in ("image", "edited") if role in roles):
        value = value_of(record, field)
        if isinstance(value, list) and (num_images := len(given_in(value))) < len(value):
            raise Reject("image_marks", f"{field} has {len(value)} places, and an image at {num_images} of them")


def turns_of(record: Mapping[str, Any]) -> list[Turn]:
    """The turns of a record whose images are codes. Raises Reject: as TalkReader.read, but for images; gpt may not begin."""
    name = TalkReader().roles(record)["conversations"]
    turns = _turns(record, _objects(name, value_of(record, name)), [])
    _check_roles(turns)
    return turns


def _objects(name: str, found: Any) -> list[dict[str, Any]]:
    """The turns as a field has them: a list of objects, its JSON, or an object of lists as older Parquet files have."""
    if isinstance(found, str):
        try:
            found = orjson.loads(found)
        except orjson.JSONDecodeError:
            raise Reject("wrong_type", f"{name} is {found[:40]!r}, expected a list of turns, or its JSON") from None
    columns = list(found.values()) if isinstance(found, dict) else []
    if columns and all(isinstance(column, list) and len(column) == len(columns[0]) for column in columns):
        found = [dict(zip(found, turn, strict=True)) for turn in zip(*columns, strict=True)]
    if not isinstance(found, list) or not all(isinstance(turn, dict) for turn in found):
        what = "from and value, or role and content"
        raise Reject("wrong_type", f"{name} is a {type(found).__name__}, expected a list of objects with {what}")
    return found


def _turns(record: Mapping[str, Any], found: list[dict[str, Any]], places: list[Any]) -> list[Turn]:
    """The turns, with the prompts of the record before them, and without empty ones of the system.

    Args:
        record: of the conversation.
        found: its turns.
        places: gets the image of each mark; None for the next of the record's own.
    """
    prompts = [text_of({name: record[name]}, (name,), places) for name in PROMPTS if not _is_blank(record.get(name))]
    turns = [("system", prompt) for prompt in prompts]
    for turn in found:
        if turn.get("tool_calls") not in NOTHING:
            raise Reject("unsupported_tools", "a turn has tool_calls, which have no place in a conversation")
        if "user" in turn and "assistant" in turn:
            turns += [("human", text_of(turn, ("user",), places)), ("gpt", text_of(turn, ("assistant",), places))]
            continue
        said = next((turn[name] for name in _SPEAKERS if turn.get(name) is not None), None)
        role = _ROLE_OF.get(said.strip().lower()) if isinstance(said, str) else None
        if role is None:
            raise Reject("bad_conversation", f"a turn is from {str(said)[:80]!r}, expected one of {', '.join(_ROLE_OF)}")
        if role != "system" or not all(_is_blank(turn.get(name)) for name in _TEXTS):
            turns.append((role, text_of(turn, _TEXTS, places)))
    said_again = {at for at in range(1, len(turns)) if turns[at][0] == "system" and turns[at] == turns[at - 1]}
    return [{"from": role, "value": text} for at, (role, text) in enumerate(turns) if at not in said_again]


def _check_roles(turns: list[Turn]) -> None:
    roles = [turn["from"] for turn in turns]
    talk = roles[1:] if roles[:1] == ["system"] else roles
    if not talk or talk != ["human", "gpt"] * (len(talk) // 2):
        shown = ", ".join(roles[:8]) or "none"
        raise Reject("bad_conversation", f"the turns are from: {shown}; expected human and gpt in turn, ending with gpt")


def _is_blank(value: Any) -> bool:
    return value in NOTHING or (isinstance(value, str) and value.isspace())
