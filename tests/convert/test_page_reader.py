"""`PageReader`: an interleaved document in any layout has its images in their places; what has no place in it is a reject."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from wds_tools.errors import Reject
from wds_tools.format.schema import IMAGE_MARK
from wds_tools.records.images import ImageFile
from wds_tools.records.interleaved import Page, PageReader

Record = dict[str, Any]
STRUCT = {"bytes": b"\xff\xd8\xff\xe0", "path": None}
JPEG, PNG = b"\xff\xd8\xff\xe0", b"\x89PNG"


def at(place: Any, **image: Any) -> Record:
    return {"matched_text_index": place, **image}


PAGES: list[tuple[Record, str, list[Any]]] = [
    (
        {"texts": [None, "A.\n\nB.", None], "images": ["a.jpg", None, "b.jpg"]},
        "<image>\n\nA.\n\nB.\n\n<image>",
        ["a.jpg", "b.jpg"],
    ),
    ({"texts": ["A.", "", "B."], "images": ["", STRUCT, None]}, "A.\n\n<image>\n\nB.", [STRUCT]),
    ({"texts": ["A.", "B.", None], "images": [None, None, None]}, "A.\n\nB.", []),
    ({"texts": ["A.", "B."]}, "A.\n\nB.", []),
    (
        {"text_list": ["A.", "B."], "image_info": [at(1, image_name="a.jpg", raw_url="https://h/a.jpg"), at(0, image=STRUCT)]},
        *("<image> A. <image> B.", [STRUCT, "a.jpg"]),
    ),
    ({"text_list": ["A.", "B."], "image_info": [], "url": "https://h/"}, "A. B.", []),
    ({"content": [{"type": "text", "text": "A "}, {"type": "image", "image": "a.jpg"}, "B"]}, "A <image>B", ["a.jpg"]),
    ({"content": [{"text": "A"}, {"type": "image"}, {"type": "image"}], "images": ["a", "b"]}, "A<image><image>", ["a", "b"]),
    ({"parts": ["A", STRUCT, JPEG, None, {"image_url": {"url": "a.jpg"}}]}, "A<image><image><image>", [STRUCT, JPEG, "a.jpg"]),
    ({"text": " <image>A<image>", "images": ["a.jpg", STRUCT]}, " <image>A<image>", ["a.jpg", STRUCT]),
    ({"text": "A <image>", "image": "a.jpg"}, "A <image>", ["a.jpg"]),
    ({"text": "A <img> tag", "images": []}, "A <img> tag", []),
    ({"txt": "<image><image><image>", "2.png": PNG, "jpg": JPEG, "10.jpg": JPEG[:3]}, "<image>" * 3, [JPEG, PNG, JPEG[:3]]),
    ({"txt": "A <image>", "jpg": ImageFile("x/a.jpg")}, "A <image>", [ImageFile("x/a.jpg")]),
    (
        {"texts": ["A.", None, None], "images": [None, "k.0.jpg", "x/1.PNG"], "0.jpg": JPEG, "1.png": PNG, "__key__": "d/k"},
        *("A.\n\n<image>\n\n<image>", [JPEG, PNG]),
    ),
    ({"text_list": ["A."], "image_info": [at(0, image_name="0.jpg")], "0.jpg": JPEG}, "<image> A.", [JPEG]),
]


@pytest.mark.parametrize(("record", "text", "images"), PAGES)
def test_every_layout_gives_the_text_with_its_images_in_their_places(record: Record, text: str, images: list[Any]) -> None:
    assert PageReader().read(record) == Page(text, images)


@pytest.mark.parametrize(
    ("record", "expected"),
    [
        (
            {"images": ["a.jpg"]},
            "missing_field: no texts, text_list, interleaved, parts, text_prompt, text or the like; the fields",
        ),
        ({"text": "A", "images": ["a.jpg"]}, "image_marks: 0 <image> marks, 1 images"),
        ({"text": "A <image> and <image>", "images": ["a.jpg"]}, "image_marks: 2 <image> marks, 1 images"),
        ({"text": "The tag <image> is not HTML."}, "image_marks: 1 <image> marks, 0 images"),
        ({"texts": ["A <image>", None], "images": [None, "a.jpg"]}, "image_marks: a text in texts holds <image>"),
        ({"texts": ["A", None, None], "images": [None, "a.jpg"]}, "image_marks: texts has 3 places, its images 2: expected"),
        (
            {"texts": ["A", "B"], "images": [None, "a.jpg"]},
            "image_marks: texts has 2 places, its images 2: expected as many, and at",
        ),
        ({"text_list": ["A <image>"], "image_info": [at(0, image_name="a.jpg")]}, "image_marks: a text in text_list holds"),
        ({"text_list": ["A"], "image_info": [at(1, image_name="a.jpg")]}, "image_marks: matched_text_index is 1, expected the"),
        ({"text_list": ["A"], "image_info": [at(None, image_name="a.jpg")]}, "image_marks: matched_text_index is None"),
        ({"text_list": ["A"], "image_info": [at(0, raw_url="https://h/a.jpg")]}, "image_marks: 1 <image> marks, 0 images"),
        ({"content": [{"type": "text", "text": "<image>"}, {"type": "image", "image": "a"}]}, "image_marks: a text in content"),
        ({"content": [{"type": "image"}]}, "image_marks: 1 <image> marks, 0 images"),
        ({"content": [{"type": "video", "video": "a.mp4"}]}, "unsupported_media: a part"),
        ({"content": ["A", 5]}, "wrong_type: a part of a turn is a int"),
        ({"texts": {"a": "b"}}, "wrong_type: texts is a dict, expected a text, or a list"),
        ({"texts": [None, " "]}, "empty_text: texts is empty"),
        ({"content": ["A", "pictures/1.jpg", "B"]}, "unused_image: content has 'pictures/1.jpg' among its texts, and no image"),
        ({"texts": ["\ud83d"]}, "invalid_utf8: texts has half a character"),
        ({"text": "A", "scan": STRUCT}, "unused_image: scan holds an image that is not used"),
        ({"text": "A <image>", "images": ["a.jpg"], "cover": "b.jpg"}, "unused_image: cover holds an image that is not used"),
        ({"text": "A", "mp4": b"x"}, "unsupported_media: the record has a field mp4"),
        ({"txt": "<image>", "jpg": JPEG, "1.jpg": JPEG}, "image_marks: 1 <image> marks, 2 images"),
    ],
)
def test_what_has_no_place_in_a_document_is_a_reject(record: Record, expected: str) -> None:
    with pytest.raises(Reject) as caught:
        PageReader().read(record)
    assert f"{caught.value.reason}: {caught.value.detail}".startswith(expected)


def test_options_name_the_fields_and_what_is_left_out() -> None:
    record = {"body": {"text": "A <image>"}, "text": "other", "pictures": ["a.jpg"], "images": ["b.jpg"], "cover": "c.jpg"}
    reader = PageReader("body.text", "pictures", ("images", "cover"))
    assert reader.roles(record) == {"text": "body.text", "image": "pictures"}
    assert reader.read(record) == Page("A <image>", ["a.jpg"])


NAMES = ["texts", "text_list", "content", "text", "images", "image_info", "image", "jpg", "1.jpg", "other"]
VALUES = st.recursive(
    st.none() | st.integers() | st.floats() | st.binary(max_size=3) | st.sampled_from([IMAGE_MARK, "a.jpg", "x", "", JPEG]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["type", "text", "image", "bytes", "path", "image_name", "matched_text_index"]), inner)
    ),
    max_leaves=8,
)


@given(st.dictionaries(st.sampled_from(NAMES), VALUES))
def test_whatever_a_record_holds_it_is_a_document_with_all_its_images_or_a_reject(record: Record) -> None:
    try:
        page = PageReader().read(record)
    except Reject:
        return
    assert page.text.count(IMAGE_MARK) == len(page.images)
    assert sum(name in record and isinstance(record[name], bytes) and bool(record[name]) for name in ("jpg", "1.jpg")) <= len(
        page.images
    )
