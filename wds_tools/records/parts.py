"""What stands in a turn or a document, in any form that records have -> text with a mark for each image, and the images. Pure."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from wds_tools.errors import Reject
from wds_tools.format.schema import IMAGE_MARK
from wds_tools.records.field_map import is_image, names_image
from wds_tools.records.fields import filled_text
from wds_tools.records.images import ImageFile

NOTHING: tuple[Any, ...] = (None, "", [], {}, "[]", "{}")
"""Values of a field that has none."""
_MEDIA = re.compile(r"(input_)?(video|audio|file)s?(_url)?")
_IMAGE_PARTS = ("image", "image_url", "input_image")
_IMAGE_VALUES = ("image", "image_url", "path", "url")


def images_in(name: str, value: Any) -> list[Any]:
    """The images in a field: one or a list; none where it is null, "", [] or a struct of nulls. Raises Reject: "empty_text"."""
    given = given_in(value)
    if given and isinstance(value, list) and "" in value:
        raise Reject("empty_text", f"{name} is empty in one of its {len(value)} places")
    return given


def given_in(value: Any) -> list[Any]:
    """The images in a field; see images_in."""
    entries = map(_unwrapped, value if isinstance(value, list) else [value])
    return [entry for entry in entries if entry not in NOTHING]


def text_of(turn: Mapping[str, Any], names: Sequence[str], places: list[Any]) -> str:
    """The text of the first of these fields that is there, with a mark for each image in it; `places` gets the images."""
    name = next((name for name in names if turn.get(name) is not None), None)
    if name is None:
        raise Reject("missing_field", f"a turn has no {' or '.join(names)}; its fields are: {', '.join(turn)[:200] or 'none'}")
    value = turn[name]
    text = "".join(part_of(part, places) for part in value) if isinstance(value, list) else _marked(name, value, places)
    return filled_text(text, name)


def _marked(name: str, value: Any, places: list[Any]) -> str:
    if type(value) is not str and not (type(value) in (int, float) and math.isfinite(value)):
        raise Reject("wrong_type", f"{name} is a {type(value).__name__}, expected a string, a number or a list of parts")
    text = str(value)
    places += [None] * text.count(IMAGE_MARK)
    return text


def part_of(part: Any, places: list[Any]) -> str:
    """The text, or the mark, of one part of a turn."""
    if not isinstance(part, dict):
        raise Reject("wrong_type", f"a part of a turn is a {type(part).__name__}, expected an object with a type")
    kind = part.get("type") or next((name for name in ("text", *_IMAGE_PARTS) if part.get(name) is not None), None)
    if kind in ("text", "input_text", "output_text"):
        return _marked("text", part.get("text"), places)
    if kind not in _IMAGE_PARTS:
        reason = "unsupported_media" if isinstance(kind, str) and _MEDIA.fullmatch(kind) else "bad_conversation"
        raise Reject(reason, f"a part of a turn has the type {str(kind)[:80]!r}, expected text or {' or '.join(_IMAGE_PARTS)}")
    image = part if part.get("bytes") else next((part[name] for name in _IMAGE_VALUES if part.get(name) not in NOTHING), None)
    if image is None and type(part.get("index")) is int and part["index"] != places.count(None):
        raise Reject("image_marks", f"a part is image {part['index']}, where number {places.count(None)} is the next")
    places.append(_unwrapped(image))
    return IMAGE_MARK


def _unwrapped(image: Any) -> Any:
    """An image without OpenAI's {"url": ...} around it, and nothing for a struct of nulls."""
    if isinstance(image, dict):
        return image["url"] if "url" in image else image if any(image.values()) else None
    return image


def filled(places: list[Any], own: list[Any], hint: str = "") -> list[Any]:
    """The image of each mark: its own, or the next of the record's. Raises Reject, with the hint: "image_marks"."""
    if (marks := places.count(None)) != len(own):
        raise Reject("image_marks", f"{marks} {IMAGE_MARK} marks, {len(own)} images: expected as many{hint}")
    following = iter(own)
    return [next(following) if place is None else place for place in places]


def files_in(name: str, value: Any, depth: int = 40) -> Iterator[tuple[str, Any]]:
    """(field, image) in a value, and in its lists and objects: a path, bytes or what else is_same_image compares."""
    if isinstance(value, str):
        if names_image(value):
            yield name, value
    elif isinstance(value, bytes | ImageFile) or (isinstance(value, dict) and value.keys() <= {"bytes", "path"}):
        if is_image(value, name):
            yield name, value
    elif isinstance(value, list) and depth:
        for inner in value:
            yield from files_in(name, inner, depth - 1)
    elif isinstance(value, dict) and depth:
        for field, inner in value.items():
            yield from files_in(f"{name}.{field}", inner, depth - 1)
