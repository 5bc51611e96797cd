"""Which field of a record is what: names that are well known, and options that say otherwise. Pure.

    fields -> FieldMap.text, .image, .texts -> names of fields; .check_unused: nothing that shows an image is left over

Invariant: of several texts the documented order decides; of several images nothing does, and none is dropped: such a record is a
reject that names the options, and the survey stops a run for it before anything is written (`wds_tools.convert.survey`).
"""

from __future__ import annotations

import posixpath
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import Any, Final

from wds_tools.errors import Reject, UsageError
from wds_tools.format.schema import taken_names
from wds_tools.records.fields import check_text, required_text, value_of
from wds_tools.records.images import ImageFile, is_base64
from wds_tools.records.where import RECORD

TEXT_NAMES: Final = (
    *("text_prompt", "text", "caption", "txt", "prompt", "content", "recaption", "long_caption", "short_caption"),
    *("description", "captions", "alt_text", "raw_content", "document", "Task2.Caption"),
)
"""Fields in which a text is looked for, in this order."""
IMAGE_NAMES: Final = (
    *("image_path", "image", "img_path", "file_name", "path", "jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff", "avif"),
    *("img", "images", "image_file", "image_bytes", "filename", "filepath", "file_path"),
)
"""Fields in which an image is looked for, in this order; those of a tar by their suffix."""
_FILE_NAMES: Final = {"file_name", "path", "filename", "filepath", "file_path"}
"""Of these, names of any file: an image if the value looks like one, and beside an image that is in the record its name."""
_IMAGE_FILE: Final = re.compile(r"\.(jpe?g|png|webp|gif|bmp|tiff?|avif|heic)([?#]\S*)?$", re.I)
_MAGIC: Final = re.compile(
    rb"\xff\xd8\xff|\xff\x0a|\x89PNG|GIF8|RIFF....WEBP|II[*+]\0|MM\0[*+]|BM....\0\0\0\0"
    rb"|....(ftyp(avi[fs]|he[iv][csx]|mif1|msf1)|JXL |jP  )",
    re.DOTALL,
)
_DATA_URI: Final = "data:image/"
_DATA_HEAD: Final = 64
"""Characters of it in which a space may stand, before the data."""
_PLAIN: Final = frozenset((int, float, bool, type(None)))
_IMAGE_NAMES: Final = frozenset(IMAGE_NAMES)
_MAX_DEPTH: Final = 40
Pairs = tuple[tuple[str, str], ...]


def parse_pairs(option: str, values: Sequence[str], *, needs_name: bool = False) -> Pairs:
    """((name, field), ...) of values as [NAME=]FIELD.

    Args:
        option: for messages, such as "--keep".
        values: as they were given; without a name the field's is taken.
        needs_name: the name may not be left out.

    Raises:
        UsageError: no field, no name, a name twice, or one that samples may not use.
    """
    pairs = []
    for value in values:
        name, equals, field = value.rpartition("=")
        name = name if equals else field.removeprefix(RECORD)
        if not name or not field or (needs_name and not equals):
            raise UsageError(f"{option} {value}: expected {'NAME=FIELD' if needs_name else 'FIELD or NAME=FIELD'}")
        pairs.append((name, field))
    names = [name for name, _ in pairs]
    if taken := taken_names(names):
        how = "these names are the schema's own, or not safe for readers: give another, as NAME=FIELD"
        raise UsageError(f"{option} {', '.join(sorted(taken))}: {how}")
    if len(set(names)) < len(names):
        raise UsageError(f"{option} {' '.join(values)}: a name is given twice")
    return tuple(pairs)


def is_image(value: Any, name: str, depth: int = _MAX_DEPTH) -> bool:
    """Whether the value of a field of this name is an image, several, or the path of one."""
    if isinstance(value, str):
        is_named = name.lower() in _IMAGE_NAMES and bool(value)
        return _is_data(value) or (is_named and (name.lower() not in _FILE_NAMES or bool(_IMAGE_FILE.search(value))))
    if isinstance(value, bytes):
        return bool(value) and (name in _IMAGE_NAMES or bool(_MAGIC.match(value)))
    if isinstance(value, dict):
        is_struct = 0 < len(value) <= 2 and value.keys() <= {"bytes", "path"}
        return is_struct and (is_image(value.get("bytes"), name) or is_image(value.get("path"), "path"))
    if isinstance(value, ImageFile):
        return True
    if not isinstance(value, list) or _PLAIN.issuperset(map(type, value)):
        return False
    return depth > 0 and any(is_image(each, name, depth - 1) for each in value)


@dataclass(frozen=True, kw_only=True)
class FieldMap:
    """The fields that a converter reads."""

    image: str | None = None
    """Field with the image. None: the well-known one."""
    text: tuple[str, ...] = ()
    """Fields with the text: the first that is there. None: `texts`, else the well-known ones."""
    texts: Pairs = ()
    """(name, field) of captions that are all kept."""
    spared: frozenset[str] = frozenset()
    """Fields that are kept or dropped: an image in them is no fault."""

    @cached_property
    def text_names(self) -> Sequence[str]:
        """Fields in which the text is looked for, in order."""
        return self.text or [field for _, field in self.texts] or TEXT_NAMES

    def text_field(self, fields: Mapping[str, Any]) -> str | None:
        """The field with the text."""
        return next((name for name in self.text_names if value_of(fields, name) is not None), None)

    def required_text(self, fields: Mapping[str, Any]) -> str:
        """The text. Raises as records.fields.required_text."""
        return required_text(fields, self.text_names)

    def texts_of(self, fields: Mapping[str, Any]) -> dict[str, str | None] | None:
        """The captions by name, None for one that is missing, null or empty; None if none are asked for. Raises Reject."""
        if not self.texts:
            return None
        texts = {}
        for name, field in self.texts:
            texts[name] = text = value_of(fields, field) or None
            if not isinstance(text, str | None):
                raise Reject("wrong_type", f"{field} is a {type(text).__name__}, expected a string")
            check_text(text or "", field)
        return texts

    def image_field(self, fields: Mapping[str, Any]) -> str | None:
        """The field with the image: the first well-known one that has one, any other that has one, or a well-known one at all."""
        if self.image is not None:
            return None if value_of(fields, self.image) is None else self.image
        names = [name for name in IMAGE_NAMES if fields.get(name) is not None and name not in self.spared]
        images = [name for name in names if is_image(fields[name], name)]
        names = [name for name in names if name not in _FILE_NAMES or not posixpath.splitext(str(fields[name]))[1]]
        images.sort(key=lambda name: name in _FILE_NAMES)  # which may be the name of another
        if not images and (others := [name for name, _ in images_within(fields) if name not in self.spared]):
            images = others
        return next(iter(images or names), None)

    def check_unused(self, fields: Mapping[str, Any], used: str | None) -> None:
        """Raise Reject ("unused_image") for an image in a field that is neither used nor spared, unless it is the same one."""
        if not (images := images_within(fields)):
            return
        value = None if used is None else value_of(fields, used)
        is_inside = value is not None and (not isinstance(value, str) or _is_data(value))
        for name, other in images:
            steps = name.removeprefix("json.").split(".")
            if name == used or not self.spared.isdisjoint((name, *accumulate(steps, "{}.{}".format))):
                continue
            if is_same_image(other, value) or (is_inside and name in _FILE_NAMES and isinstance(other, str)):
                continue
            if used is None:
                raise Reject("unused_image", f"{name} holds an image, which is not used: --drop {name} leaves it out")
            how = f"--image {name} takes it instead, --drop {name} leaves it out"
            raise Reject("unused_image", f"{name} holds an image beside that of {used}: {how}")


def images_within(fields: Mapping[str, Any] | Sequence[Any], depth: int = _MAX_DEPTH) -> list[tuple[str, Any]]:
    """(name, value) of the fields that hold images, also inside objects and lists; one that is nested deeper than anybody can
    look counts as such."""
    images: list[tuple[str, Any]] = []
    for name, value in fields.items() if type(fields) is dict or isinstance(fields, Mapping) else enumerate(fields):
        kind = type(value)
        if kind in _PLAIN or (kind is str and value[:1] not in "dD/iRU" and str(name).lower() not in _IMAGE_NAMES):
            continue  # as nearly all do: without a call
        name = str(name)
        if is_image(value, name):
            images.append((name, value))
        elif kind is dict or (kind is list and not _PLAIN.issuperset(map(type, value))):
            inside = images_within(value, depth - 1) if depth else [("", value)]
            images += [(f"{name}.{inner}".rstrip("."), image) for inner, image in inside]
    return images


def names_image(text: str) -> bool:
    """Whether a text is the path or URL of an image, or one in a URL."""
    return _is_data(text) or bool(_IMAGE_FILE.search(text))


def _is_data(text: str) -> bool:
    """Whether a text is an image, and does not only begin with one, as a page may that shows one."""
    if text[: len(_DATA_URI)].lower() != _DATA_URI:
        return is_base64(text)
    return ";base64," not in text[:_DATA_HEAD].lower() or text.find(" ", _DATA_HEAD) < 0


def is_same_image(value: Any, other: Any) -> bool:
    """Whether two values are one image: equal; or a path and the end of it, as where a record says where its image is from. Two
    that bring their bytes are the same if these are."""
    if value is not None and value == other:
        return True
    if (data := _data_in(value)) and (others := _data_in(other)):
        return bool(data == others)
    path, end = sorted((path_of(value), path_of(other)), key=len, reverse=True)
    return bool(end) and f"/{path}".endswith(f"/{end.removeprefix('./')}")


def path_of(value: Any) -> str:
    """The path or URL of an image; "" if it has none."""
    path = value.get("path") if isinstance(value, dict) else value.url if isinstance(value, ImageFile) else value
    return path if isinstance(path, str) and not _is_data(path) else ""


def _data_in(value: Any) -> Any:
    data = value.get("bytes") if isinstance(value, dict) else value
    return data if isinstance(data, bytes) or (isinstance(data, str) and _is_data(data)) else None
