"""Conditions on records: --where."""

from __future__ import annotations

import pickle
import time
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from wds_tools.errors import Reject, UsageError
from wds_tools.records.where import FACTS, Where

RECORD = {
    "similarity": 0.3,
    "width": 640,
    "nsfw": False,
    "watermark": None,
    "lang": "en",
    "caption": "A Cat on a mat",
    "tags": ["cat", "mat"],
    "json": {"punsafe": 0.1, "a b": {"c": [5, 6]}},
    "image_width": "a field of this name",
    "min": 3,
}


def keeps(text: str, fields: dict[str, Any] | None = None, facts: dict[str, Any] | None = None) -> str:
    """ "kept", or the reason why not."""
    where = pickle.loads(pickle.dumps(Where(text)))  # noqa: S301  as it goes to workers
    fields = RECORD if fields is None else fields
    try:
        where.check(fields)
        where.check(fields, facts or {})
    except Reject as cause:
        return cause.reason
    return "kept"


@pytest.mark.parametrize(
    "text",
    [
        "similarity >= 0.28",
        "similarity >= 0.28 and width >= 256",
        "similarity > 1 or lang == 'en'",
        "not nsfw",
        "not watermark",
        "not missing",
        "not missing > 3",
        "not (missing + 1 > 3)",
        "0 < similarity < 1 <= width",
        "lang in ['en', 'de'] and lang not in ('fr',) and 'cat' in tags",
        "min(width, 700) == 640 and max(width, 700) == 700 and abs(-3) == 3",
        "len(caption) == 14 and len(tags) == 2",
        "lower(caption) == 'a cat on a mat' and upper(lang) == 'EN'",
        "startswith(caption, 'A') and endswith(caption, 'mat') and contains(caption, 'Cat')",
        "matches(caption, 'A * on ? mat') and not matches(caption, 'a*') and not matches(caption, '[A]*')",
        "width / 4 * 3 - 80 == 400 and width // 7 % 2 == 1 and -width < +width",
        'json.punsafe < 0.5 and record.width == 640 and json["a b"].c[1] == 6 and json["a b"]["c"]["0"] == 5',
        "record.image_width == 'a field of this name'",
        "min == 3",
        "float('0.5') < 1",
        "len(missing or caption) > 3",
        " similarity\n> 0",
        "True",
    ],
)
def test_what_is_true_keeps_a_record(text: str) -> None:
    assert keeps(text) == "kept"


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("similarity < 0.28", "filtered"),
        ("nsfw", "filtered"),
        ("similarity > 1 and missing", "filtered_missing"),
        ("missing", "filtered_missing"),
        ("watermark", "filtered_missing"),
        ("watermark < 1", "filtered_missing"),
        ("watermark >= 1", "filtered_missing"),
        ("watermark != 1", "filtered_missing"),
        ("missing == missing", "filtered_missing"),
        ("missing in [1]", "filtered_missing"),
        ("missing not in [1]", "filtered_missing"),
        ("'a' not in missing", "filtered_missing"),
        ("missing + 1 < 5", "filtered_missing"),
        ("min(missing, 1) < 5", "filtered_missing"),
        ("len(missing) < 5", "filtered_missing"),
        ("0 < missing < 5", "filtered_missing"),
        ("width / 0 < 5", "filtered"),
        ("float(caption) < 5", "filtered"),
        ("min([]) < 5", "filtered"),
        ("lang < 3", "wrong_type"),
        ("3 in width", "wrong_type"),
        ("caption * 3 == ''", "wrong_type"),
        ("caption + 'x' == ''", "wrong_type"),
        ("caption % 3 == ''", "wrong_type"),
        ("tags + tags == tags", "wrong_type"),
        ("lower(width) == ''", "wrong_type"),
        ("len(width) > 3", "wrong_type"),
        ("matches(width, '*')", "wrong_type"),
    ],
)
def test_what_is_false_missing_or_of_another_type_says_which(text: str, reason: str) -> None:
    assert keeps(text) == reason


def test_facts_of_the_image_are_looked_at_last_whatever_stands_first() -> None:
    where = Where("min(image_width, image_height) >= 256 and similarity >= 0.28 and image_format == 'jpeg'")
    assert (where.names, where.facts) == ({"similarity"}, {"image_width", "image_height", "image_format"})
    where.check({"similarity": 0.5})
    with pytest.raises(Reject, match="filtered"):
        where.check({"similarity": 0.1})
    where.check({"similarity": 0.5}, {"image_width": 300, "image_height": 256, "image_format": "jpeg"})
    with pytest.raises(Reject, match="filtered"):
        where.check({"similarity": 0.5}, {"image_width": 300, "image_height": 255, "image_format": "jpeg"})
    with pytest.raises(Reject, match="filtered"):
        where.check({"similarity": 0.5, **dict.fromkeys(FACTS, 999)}, {})


@pytest.mark.parametrize(
    "text",
    [
        "",
        "9**9**9",
        "2 ** width",
        "1 << 9999999",
        "lambda: 1",
        "[x for x in tags]",
        "f'{width}'",
        "open('/etc/passwd')",
        "__import__('os').system('true')",
        "caption.upper()",
        "().__class__.__bases__",
        "min.__self__()",
        "len(*tags)",
        "min(1, key=len)",
        "width if nsfw else 1",
        "(x := 3)",
        "{'a': 1}",
        "{1}",
        "tags[0:1]",
        "tags[width]",
        "width is None",
        "watermark == None",
        "b'a' in caption",
        "3j == width",
        "...",
        "width; width",
        "width = 3",
        "matches(caption, lang)",
        "matches(caption)",
        "lower(caption, lang)",
        "unknown(caption)",
        "~width",
        "not " * 60 + "width",
        "(" * 500 + "width" + ")" * 500,
        "-" * 3900 + "1",
        "x" * 5000,
        "9" * 3000 + " < width and 9" + "9" * 2000,
        "wid\0th",
        "width >= 3 and",
        "await width",
        "'a'.join(tags)",
    ],
)
def test_what_is_no_condition_or_could_take_long_is_refused_in_one_line(text: str) -> None:
    with pytest.raises(UsageError, match=r"--where ['\"]") as refused:
        Where(text)
    assert "\n" not in str(refused.value)
    assert len(str(refused.value)) < 1000


def test_nothing_that_a_condition_works_out_grows() -> None:
    fields = {"a": 10**4000, "text": "a" * 100_000}
    began = time.perf_counter()
    assert keeps("*".join(["a"] * 40) + " > 0", fields) == "filtered"
    assert keeps("'a' * 10 * 10 == text", fields) == "wrong_type"
    assert keeps(f"matches(text, '{'*a' * 30}b')", fields) == "filtered"
    assert keeps("a / 3 > 0", fields) == "filtered"  # no float is so large
    assert time.perf_counter() - began < 20  # each of them alone would be minutes, or never


NAMES = ("a", "b", "c")
VALUES = st.one_of(st.integers(-3, 3), st.floats(-3, 3, allow_nan=False), st.booleans())
ATOMS = st.one_of(st.sampled_from(NAMES), VALUES.map(lambda value: f"({value!r})"))
NUMBERS = st.recursive(
    ATOMS,
    lambda inner: st.one_of(
        st.tuples(inner, st.sampled_from(("+", "-", "*")), inner).map(lambda parts: f"({' '.join(parts)})"),
        st.tuples(st.sampled_from(("min", "max")), inner, inner).map(lambda parts: f"{parts[0]}({parts[1]}, {parts[2]})"),
        inner.map(lambda part: f"abs(-{part})"),
    ),
    max_leaves=5,
)
COMPARISONS = st.lists(st.tuples(st.sampled_from(("<", "<=", ">", ">=", "==", "!=")), NUMBERS), min_size=1, max_size=3)
CONDITIONS = st.recursive(
    st.tuples(NUMBERS, COMPARISONS).map(lambda parts: " ".join([parts[0], *(" ".join(pair) for pair in parts[1])])),
    lambda inner: st.one_of(
        st.tuples(inner, st.sampled_from(("and", "or")), inner).map(lambda parts: f"({' '.join(parts)})"),
        inner.map(lambda part: f"(not {part})"),
    ),
    max_leaves=6,
)


@given(CONDITIONS, st.fixed_dictionaries(dict.fromkeys(NAMES, VALUES)))
def test_with_all_fields_there_it_means_what_python_means(text: str, fields: dict[str, Any]) -> None:
    expected = eval(text, {"min": min, "max": max, "abs": abs}, fields)  # noqa: S307
    assert keeps(text, fields) == ("kept" if expected else "filtered")


@given(
    st.text(max_size=60) | st.lists(st.sampled_from([*"().[]*<'", "a", "__class__", " and ", "not ", "9", "len"])).map("".join)
)
def test_any_text_is_a_condition_or_refused(text: str) -> None:
    try:
        where = Where(text)
    except UsageError:
        return
    assert keeps(text, {"a": 1}) in ("kept", "filtered", "filtered_missing", "wrong_type")
    assert len(where.names) <= len(text)
