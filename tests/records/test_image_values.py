"""What a record may have for an image, and what each of these gives: the bytes, or a reject that says what was there."""

from __future__ import annotations

import base64
from pathlib import Path
from textwrap import wrap
from typing import Any

import pytest
from commands import image_bytes

from wds_tools.convert.images.reader import ImageReader
from wds_tools.convert.pairs import PairsConfig
from wds_tools.errors import Reject
from wds_tools.records.images import ImageFile

PNG = image_bytes(1, kind="PNG")
TEXT = base64.b64encode(PNG).decode()
URI = f"data:image/png;base64,{TEXT}"


@pytest.fixture
def records(tmp_path: Path) -> str:
    (tmp_path / "a.png").write_bytes(PNG)
    return str(tmp_path / "records.jsonl")


def read(records: str, value: Any, **settings: Any) -> bytes:
    reader = ImageReader(PairsConfig(input=("a",), output="out", **settings))
    data, info = reader.read(records, value)
    assert (info.format, info.width, info.height) == ("PNG", 40, 32)
    return data


def reject(records: str, value: Any, **settings: Any) -> Reject:
    with pytest.raises(Reject) as caught:
        read(records, value, **settings)
    assert len(caught.value.detail) < 500
    return caught.value


@pytest.mark.parametrize(
    "value",
    [
        "a.png",
        PNG,
        {"bytes": PNG, "path": None},
        {"bytes": PNG, "path": "nowhere.png"},
        {"bytes": None, "path": "a.png"},
        {"path": "a.png"},
        {"bytes": PNG},
        URI,
        URI.replace("data:image/png;base64", "DATA:;Base64"),
        {"bytes": URI},
        TEXT,
        "\n".join([*wrap(TEXT, 76), ""]),
        {"bytes": TEXT, "path": None},
    ],
)
def test_a_path_bytes_a_struct_and_a_data_uri_give_the_same_image(records: str, value: Any) -> None:
    assert read(records, value) == PNG


def test_a_file_that_the_source_found_is_read_whatever_the_image_root_is(records: str, tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    found = ImageFile(str(tmp_path / "a.png"))
    assert read(records, found, image_root=(str(tmp_path / "other"),)) == PNG
    assert reject(records, ImageFile(str(tmp_path / "gone.png"))).reason == "missing_image"
    assert reject(records, ImageFile(str(tmp_path / "a\\b.png"))).reason == "outside_root"


@pytest.mark.parametrize(
    ("value", "reason", "detail"),
    [
        (7, "wrong_type", "an image is a int"),
        (None, "wrong_type", "an image is a NoneType"),
        ([PNG], "wrong_type", "an image is a list"),
        ({}, "wrong_type", "an object of nothing"),
        ({"bytes": None, "path": None}, "wrong_type", "an object of bytes, path"),
        ({"url": "http://a"}, "wrong_type", "an object of url"),
        ({"bytes": {"bytes": PNG}}, "wrong_type", "an object of bytes"),
        ({"bytes": [1, 2, 3]}, "wrong_type", "an image is a list"),
        ({"path": 5}, "wrong_type", "an image is a int"),
        ({"bytes": b"", "path": "a.png"}, "empty_image", "0 bytes"),
        ("", "empty_text", "the path of an image is empty"),
        (b"", "empty_image", "0 bytes"),
        (b"<svg xmlns=''/>", "not_an_image", "SVG"),
        ("data:image/png;base64," + TEXT[:-2], "corrupt_image", "is broken"),
        ("data:image/png;base64," + TEXT[:40] + "*" + TEXT[41:], "corrupt_image", "is broken"),
        (TEXT[:-2], "corrupt_image", "is broken"),
        ("data:image/png;base64,", "empty_image", "0 bytes"),
        ("data:image/png;base64", "unsupported_format", "not in base64"),
        ("data:image/svg+xml;utf8,<svg/>", "unsupported_format", "not in base64"),
        ("data:image/svg+xml;base64," + base64.b64encode(b"<svg/>").decode(), "not_an_image", "SVG"),
        ("data:" + "a" * 10_000_000, "unsupported_format", "not in base64"),
        ("data:image/png;base64," + "A" * 10_000_000, "not_an_image", "unknown data"),
    ],
)
def test_anything_else_is_a_reject_that_says_what_was_there(records: str, value: Any, reason: str, detail: str) -> None:
    cause = reject(records, value)
    assert (cause.reason, detail in cause.detail) == (reason, True), cause.detail


def test_the_limit_of_bytes_holds_for_all_of_them_and_before_a_data_uri_is_decoded(
    records: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("binascii.a2b_base64", None)
    for value in ("a.png", PNG, {"bytes": PNG}, URI):
        assert reject(records, value, max_image_bytes=len(PNG) - 4).reason == "too_many_bytes"
    monkeypatch.undo()
    for value in ("a.png", PNG, {"bytes": PNG}, URI):
        assert reject(records, value, max_image_bytes=len(PNG) - 1).reason == "too_many_bytes"
        assert read(records, value, max_image_bytes=len(PNG)) == PNG
