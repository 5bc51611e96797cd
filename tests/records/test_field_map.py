"""Which field of a record is what."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from wds_tools.errors import Reject, UsageError
from wds_tools.records.field_map import IMAGE_NAMES, TEXT_NAMES, FieldMap, is_image, parse_pairs
from wds_tools.records.fields import required_text, value_of
from wds_tools.records.images import ImageFile

JPEG = b"\xff\xd8\xff\xe0 and more"


def image_of(fields: dict[str, Any], **options: Any) -> str | None:
    """The image's field, all others looked at."""
    field_map = FieldMap(**options)
    name = field_map.image_field(fields)
    field_map.check_unused(fields, name)
    return name


@pytest.mark.parametrize("name", IMAGE_NAMES)
def test_an_image_is_found_under_any_well_known_name(name: str) -> None:
    for value in ("images/0.jpg", JPEG, {"bytes": JPEG, "path": None}, {"bytes": None, "path": "0.jpg"}, ImageFile("a/0.png")):
        assert image_of({"id": 3, "caption": "a cat", name: value, "url": "https://host/0.jpg"}) == name


@pytest.mark.parametrize(
    ("fields", "name"),
    [
        ({"image_path": "a", "image": None, "jpg": ""}, "image_path"),
        ({"path": "notes.txt", "photo": JPEG}, "photo"),
        ({"data": {"picture": {"bytes": JPEG, "path": "a.jpg"}}, "text": "x"}, "data.picture"),
        ({"scan": "data:image/png;base64,AAAA"}, "scan"),
        ({"path": "00/17", "prompt": "without a suffix"}, "path"),
        ({"images": ["a.jpg"]}, "images"),
        ({"jpg": JPEG, "json": {"caption": "x", "width": 3}, "caption": "x", "width": 3}, "jpg"),
        ({"jpg": JPEG, "file_name": "0.jpg"}, "jpg"),  # the name of that image
        ({"file_name": "train/0.jpg", "path": "x/0.jpg", "image": {"bytes": JPEG, "path": "0.jpg"}}, "image"),
        ({"image": {"bytes": None, "path": "0.jpg"}, "file_name": "train/0.jpg"}, "image"),
        ({"image_path": "train/0.jpg", "image": "./0.jpg"}, "image_path"),
        ({"image": "a.jpg", "image_url": "https://host/b.jpg", "embedding": [0.5] * 9, "cls": b"3"}, "image"),
        ({"caption": "no image"}, None),
    ],
)
def test_one_image_is_found_by_its_name_or_by_what_it_is(fields: dict[str, Any], name: str | None) -> None:
    assert image_of(fields) == name


@pytest.mark.parametrize(
    "fields",
    [
        {"jpg": JPEG, "png": b"\x89PNG and more"},
        {"image": "source/0.jpg", "image_path": "target/0.jpg"},
        {"image_path": "a.jpg", "mask": {"bytes": b"\x89PNG", "path": None}},
        {"image_path": "a.jpg", "json": {"depth": "data:image/png;base64,AAAA"}},
        {"image_path": "a.jpg", "others": [ImageFile("b.jpg")]},
        {"image_path": "a.jpg", "file_name": "b.jpg"},
    ],
    ids=str,
)
def test_a_second_image_is_a_reject_that_names_the_options_and_they_help(fields: dict[str, Any]) -> None:
    with pytest.raises(Reject, match=r"--image .* --drop ") as reject:
        image_of(fields)
    assert reject.value.reason == "unused_image"
    first = FieldMap().image_field(fields)
    second = reject.value.detail.split()[0]
    assert image_of(fields, spared=frozenset([second])) == first
    assert image_of(fields, image=second, spared=frozenset([str(first)])) == second


def test_a_document_with_an_image_is_a_reject_unless_it_is_dropped() -> None:
    with pytest.raises(Reject, match="--drop photo"):
        FieldMap().check_unused({"text": "x", "photo": JPEG}, None)
    FieldMap(spared=frozenset(["photo"])).check_unused({"text": "x", "photo": JPEG}, None)
    FieldMap().check_unused({"text": "x", "path": "src/main.c", "image": "", "img": None, "images": []}, None)


@pytest.mark.parametrize(("first", "second"), list(itertools.pairwise(TEXT_NAMES)))
def test_of_several_texts_the_documented_order_decides(first: str, second: str) -> None:
    fields = {second: "two", first: "one"}
    if "." in second:
        fields = {"Task2": {"Caption": "two"}, first: "one"}  # type: ignore[dict-item]
    assert (FieldMap().text_field(fields), FieldMap().required_text(fields)) == (first, "one")
    assert FieldMap(text=("absent", second, first)).required_text(fields) == "two"


def test_several_captions_keep_their_names_and_what_is_missing_is_null() -> None:
    field_map = FieldMap(texts=(("short", "a"), ("long", "json.b"), ("other", "c")))
    fields = {"json": {"b": "long one"}, "a": "", "text": "not asked for"}
    assert field_map.texts_of(fields) == {"short": None, "long": "long one", "other": None}
    assert FieldMap(texts=(("long", "json.b"),)).required_text(fields) == "long one"
    assert FieldMap().texts_of(fields) is None
    with pytest.raises(Reject, match="a is a list, expected a string"):
        field_map.texts_of({"a": ["x"]})


def test_a_text_with_half_a_character_is_a_reject_that_names_it() -> None:
    with pytest.raises(Reject, match=r"text has half a character, U\+D83D, as its character 3") as reject:
        required_text({"text": "ab \ud83d"}, ("text",))
    assert reject.value.reason == "invalid_utf8"
    with pytest.raises(Reject, match="half a character"):
        FieldMap(texts=(("a", "b"),)).texts_of({"b": "\udc00"})
    assert required_text({"text": "ab \U0001f600", "other": "\ud83d"}, ("text",)) == "ab \U0001f600"


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("width", "the schema's own"),
        ("text=x", "the schema's own"),
        ("__key__=x", "not safe"),
        ("=x", "expected FIELD or NAME=FIELD"),
        ("x=", "expected FIELD or NAME=FIELD"),
        ("a=b a=c", "twice"),
    ],
)
def test_a_name_that_samples_may_not_use_is_refused(value: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        parse_pairs("--keep", value.split())


def test_fields_are_kept_under_their_names_or_others() -> None:
    given = ["url", "w=width", "json.clip", "h=record.height", "record.image_width"]
    expected = (("url", "url"), ("w", "width"), ("json.clip", "json.clip"), ("h", "record.height"))
    assert parse_pairs("--keep", given) == (*expected, ("image_width", "record.image_width"))
    with pytest.raises(UsageError, match="expected NAME=FIELD"):
        parse_pairs("--texts", ["caption"], needs_name=True)


NAMES = st.sampled_from((*IMAGE_NAMES[:6], *TEXT_NAMES[:4], "bytes", "a", "a.b", "0", ""))
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.binary(max_size=12) | st.just(JPEG),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(NAMES, inner, max_size=3),
    max_leaves=12,
)


@given(st.dictionaries(NAMES, VALUES, max_size=6))
def test_of_any_record_no_image_is_left_over_in_silence(fields: dict[str, Any]) -> None:
    """What is taken is there; and whoever drops all the images that are named in turn has none left."""
    spared: set[str] = set()
    for _ in range(60):
        try:
            name = image_of(fields, spared=frozenset(spared))
            break
        except Reject as cause:
            spared.add(cause.detail.partition(" holds an image")[0])
    assert name is None or value_of(fields, name) is not None
    taken = None if name is None else value_of(fields, name)
    left = {key for key, value in fields.items() if is_image(value, key) and value != taken} - spared
    assert len(left) <= 1 or name in left


@given(st.dictionaries(NAMES, VALUES, max_size=6), st.text(alphabet="ab.0", max_size=6))
def test_a_dotted_name_finds_what_is_there_or_none(fields: dict[str, Any], name: str) -> None:
    value_of(fields, name)
    for key, value in fields.items():
        assert value_of(fields, key) is value
        if isinstance(value, dict):
            for inner, content in value.items():
                if content is not None and f"{key}.{inner}" not in fields:
                    assert value_of(fields, f"{key}.{inner}") is not None


JPEG = b"\xff\xd8\xff\xe0" + bytes(20)
BMP = b"BM\x46\0\0\0\0\0\0\0\x36\0\0\0"
HIDDEN: tuple[dict[str, Any], ...] = (
    {"pages": [{"image": {"bytes": JPEG, "path": "a"}, "n": 1}]},
    {"items": [{"n": 1}, {"image": "a.jpg"}]},
    {"images": [[JPEG]]},
    {"image": [["a.jpg"]]},
    {"content": [{"type": "image_url", "image_url": {"url": "data:image/png;base64,AA"}}]},
    {"images": [None] * 8 + ["a.jpg"]},
    {"a": {"b": {"c": {"d": {"e": {"f": JPEG}}}}}},
    {"picture": BMP},
    {"Image": "a.jpg"},
    {"x": "DATA:image/png;base64,AA"},
)


@pytest.mark.parametrize("fields", HIDDEN, ids=lambda fields: str(fields)[:40])
def test_an_image_is_found_wherever_it_hides_and_dropping_its_field_leaves_it_out(fields: dict[str, Any]) -> None:
    record = {"text": "t", "ids": [*range(100)], **fields}
    with pytest.raises(Reject) as caught:
        FieldMap().check_unused(record, None)
    assert caught.value.reason == "unused_image"
    FieldMap(spared=frozenset(fields)).check_unused(record, None)
