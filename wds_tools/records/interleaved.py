"""The record of an interleaved document, in any of the layouts of this field -> text with <image> marks, and images. Pure.

    texts, images           two lists, one of which has something at each place (OBELICS, OmniCorpus)      an empty line between
    text_list, image_info   sentences, and images that say before which of them they stand (MMC4)          a space between
    content                 a list of texts, images and {type: text | image ...}                           nothing between
    text, images            a text with marks, and a list of images, or members jpg, 1.jpg ... of a tar    as it stands

Invariant: nothing is guessed and no image is left out: there are as many marks as images, and where images have places of their
own, a mark that stands in a text is a reject.
"""

from __future__ import annotations

import posixpath
import re
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any, Final, NamedTuple

from wds_tools.errors import Reject
from wds_tools.format.schema import IMAGE_MARK
from wds_tools.records.conversations import TalkReader
from wds_tools.records.field_map import IMAGE_NAMES, TEXT_NAMES, is_image, names_image
from wds_tools.records.fields import filled_text, lacks, value_of
from wds_tools.records.images import ImageFile
from wds_tools.records.parts import NOTHING, filled, given_in, part_of

_SENTENCES: Final = "text_list"
TEXT_LISTS: Final = ("texts", _SENTENCES, "interleaved", "parts")
"""Names of the field with the text, in this order; and then those of field_map.TEXT_NAMES."""
IMAGE_LISTS: Final = ("images", "image_info", "image_list")
"""Names of the field with the images, in this order; before members of a tar, and those of field_map.IMAGE_NAMES."""
_MEMBER: Final = re.compile(r"(?:(\d{1,6})\.)?(?:jpe?g|png|webp|gif|bmp|tiff?|avif)")
_PLACE: Final = "matched_text_index"
_NAMES: Final = ("bytes", "image", "image_name", "path")
"""What the object of such an image has it in."""


class Page(NamedTuple):
    """A document."""

    text: str
    images: list[Any]
    """A path, bytes, or what else an ImageReader takes, for each mark in the text."""


@dataclass(frozen=True)
class PageReader:
    """Finds the documents in records."""

    text: str | None = None
    """The field with the text. Default: the first of TEXT_LISTS and TEXT_NAMES that there is."""
    image: str | None = None
    """The field with the images. Default: see IMAGE_LISTS."""
    left_out: tuple[str, ...] = ()
    """Fields that may hold images which are not used."""

    def roles(self, record: Mapping[str, Any]) -> dict[str, str]:
        """What is used of a record: "text", and perhaps "image" -> the field, or several with commas between.

        Raises:
            Reject: "missing_field", "unused_image" or "unsupported_media".
        """
        names = (*TEXT_LISTS, *TEXT_NAMES) if self.text is None else (self.text,)
        text = next((name for name in names if value_of(record, name) not in NOTHING), None)
        if text is None:
            raise lacks(record, f"{', '.join(names[:6])} or the like", "; see --text")
        (fields, images), parts = self._images(record), [{"content": value_of(record, text)}]
        own = given_in(images)
        named = {name for image in own if (name := _member_named(record, image))}
        TalkReader(left_out=self.left_out).check_unused(record, parts, own, {text, *fields, *named})
        return {"text": text, **({"image": ", ".join(fields)} if fields else {})}

    def read(self, record: Mapping[str, Any]) -> Page:
        """The document of a record.

        Raises:
            Reject: as `roles`; "wrong_type", "empty_text" or "invalid_utf8"; "image_marks": other than one mark an image, one in
                a text beside images that have places, or lists of different lengths.
        """
        name = self.roles(record)["text"]
        texts, (_, images) = value_of(record, name), self._images(record)
        own, places = given_in(images), list[Any]()
        if isinstance(texts, str):
            places, text = [None] * texts.count(IMAGE_MARK), texts
        elif not isinstance(texts, list):
            raise Reject("wrong_type", f"{name} is a {type(texts).__name__}, expected a text, or a list of texts or parts")
        elif any(isinstance(image, dict) and _PLACE in image for image in images) or (name == _SENTENCES and not own):
            text, images = " ".join(_pieces(name, _at_sentences(name, texts, images), places)), []
        elif all(isinstance(part, str | None) for part in texts):
            text, images = "\n\n".join(_pieces(name, _at_gaps(name, texts, images), places)), []
        else:
            text = "".join(_pieces(name, texts, places))
        text = filled_text(text, name)
        named = [part for part in texts if isinstance(part, str) and names_image(part)] if isinstance(texts, list) else []
        if not places and (paths := [part for part in named if len(part.split()) == 1]):
            raise Reject(
                "unused_image", f"{name} has {paths[0][:80]!r} among its texts, and no image: give {{image: PATH}} there"
            )
        found = filled(places, given_in(images))
        return Page(text, [record.get(_member_named(record, image), image) for image in found])

    def _images(self, record: Mapping[str, Any]) -> tuple[list[str], list[Any]]:
        """The field with a list of images; or each that holds one, in their order. And the list, perhaps with gaps."""
        names = IMAGE_LISTS if self.image is None else (self.image,)
        lists = [name for name in names if name not in self.left_out and given_in(value_of(record, name))]
        members = {name: int(match[1] or 0) for name in record if (match := _MEMBER.fullmatch(name))}
        found = [name for name in sorted(members, key=members.__getitem__) if isinstance(record[name], bytes | ImageFile)]
        others = [name for name in IMAGE_NAMES if is_image(record.get(name), name)]
        fields = lists[:1] or [name for name in found or others[:1] if self.image is None and name not in self.left_out]
        values = [value_of(record, field) for field in fields]
        return fields, values[0] if len(values) == 1 and isinstance(values[0], list) else values


def _at_sentences(name: str, texts: list[Any], images: list[Any]) -> list[Any]:
    """Parts of MMC4's lists: each image before its sentence."""
    before: list[list[Any]] = [[] for _ in texts]
    for image in images:
        place = image.get(_PLACE) if isinstance(image, dict) else None
        if type(place) is not int or not 0 <= place < len(texts):
            raise Reject("image_marks", f"{_PLACE} is {place!r:.40}, expected the number of one of the {len(texts)} in {name}")
        before[place].append({"type": "image", "image": next((image[key] for key in _NAMES if image.get(key)), None)})
    return [part for own, text in zip(before, texts, strict=True) for part in (*own, text)]


def _at_gaps(name: str, texts: list[Any], images: list[Any]) -> list[Any]:
    """Parts of two lists: at each place a text or an image."""
    given = [given_in([image]) for image in images]
    if len(given) not in (0, len(texts)) or any(text and image for text, image in zip(texts, given, strict=False)):
        what = f"{name} has {len(texts)} places, its images {len(given)}"
        raise Reject("image_marks", f"{what}: expected as many, and at each a text or an image")
    return [{"type": "image", "image": image[0]} if image else text for text, image in zip_longest(texts, given)]


def _pieces(name: str, parts: list[Any], places: list[Any]) -> list[str]:
    """The text, or the mark, of each part that is not empty; `places` gets the images, None for the next of the record's own."""
    pieces = []
    for part in parts:
        text = part.get("text") if isinstance(part, dict) else part
        if isinstance(text, str):
            if IMAGE_MARK in text:
                raise Reject("image_marks", f"a text in {name} holds {IMAGE_MARK}, which stands for an image")
            pieces.append(text)
        elif part is not None:
            is_bare = not (isinstance(part, dict) and "type" in part) and is_image(part, "image")
            pieces.append(part_of({"type": "image", "image": part} if is_bare else part, places))
    return [piece for piece in pieces if piece]


def _member_named(record: Mapping[str, Any], image: Any) -> str:
    """The field of a tar's member that an image's path names, as KEY.SUFFIX or SUFFIX; "" where there is none."""
    path = image.get("image_name") if isinstance(image, dict) else image
    if not isinstance(path, str):
        return ""
    suffix = posixpath.basename(path).removeprefix(f"{posixpath.basename(str(record.get('__key__', '')))}.").lower()
    return suffix if isinstance(record.get(suffix), bytes | ImageFile) else ""
