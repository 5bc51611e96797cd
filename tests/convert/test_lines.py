"""Lines of files: every one, once, under its true number, however a file is cut into ranges; and what is no file of lines."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from commands import SHARED
from hypothesis import given
from hypothesis import strategies as st
from properties import tries

from wds_tools.errors import NotFound, Reject, UsageError
from wds_tools.records.fields import required_text
from wds_tools.sources.composite import Containers
from wds_tools.sources.inputs import by_suffix, expand_inputs
from wds_tools.sources.record import InputFile
from wds_tools.sources.text import lines, objects
from wds_tools.sources.text.lines import (
    LineRange,
    number_lines,
    plan_lines,
    read_lines,
)
from wds_tools.sources.text.objects import Line, parse_record

FOLDER = SHARED / "malformed" / "jsonl"
BOM = b"\xef\xbb\xbf"


def expected_lines(data: bytes, limit: int = 1 << 62) -> list[Line]:
    """The lines of a file, said in the plainest way."""
    found = []
    for number, line in enumerate(data.split(b"\n"), 1):
        if len(line) > limit:
            found.append(Line(number, None))
            continue
        text = line.removeprefix(BOM) if number == 1 else line
        if text.strip():
            found.append(Line(number, text))
    return found


def write(folder: Path, data: bytes, name: str = "a.jsonl") -> list[InputFile]:
    path = folder / name
    path.write_bytes(data)
    return [InputFile(str(path), len(data))]


def read_planned(files: list[InputFile], lines_per_range: int) -> tuple[list[LineRange], list[Line]]:
    ranges = plan_lines(files, lines_per_range)
    return ranges, [line for span in ranges for line in read_lines(span)]


def check_ranges(ranges: list[LineRange], data: bytes) -> None:
    at, number = 0, 1
    for span in ranges:
        assert (span.start, span.first_line) == (at, number)
        assert span.end > span.start
        assert span.num_lines >= 1
        at, number = span.end, number + span.num_lines
    assert at == len(data)
    assert number - 1 == data.count(b"\n") + (not data.endswith(b"\n") and len(data) > 0)


FILES: dict[str, bytes] = {
    "empty": b"",
    "one line": b"{}\n",
    "no line end": b"{}",
    "last line without end": b'{"a": 1}\n{"a": 2}',
    "CRLF": b'{"a": 1}\r\n\r\n{"a": 2}\r\n',
    "only CR": b'{"a": 1}\r{"a": 2}\n',
    "blank lines": b'\n\n{"a": 1}\n \t\n\n{"a": 2}\n\n\n',
    "only blank lines": b"\n \n\n",
    "byte order mark": BOM + b'{"a": 1}\n{"a": 2}\n',
    "byte order mark alone": BOM,
    "byte order mark and blank": BOM + b"\n{}\n",
    "byte order mark later": b"{}\n" + BOM + b"{}\n",
    "line separators that are data": '{"a": "x\u2028y\u2029z\x85\v\f\x1c"}\n{}\n'.encode(),
    "NUL": b'{"a": "x\0y"}\n{}\n',
    "not UTF-8": b'{"a": "\xff\xfe"}\n{}\n',
    "a long line among short": b"{}\n" + b"x" * 5000 + b"\n{}\n",
}


@pytest.mark.parametrize("data", FILES.values(), ids=FILES)
@pytest.mark.parametrize("lines_per_range", [1, 2, 3, 1000])
def test_planned_ranges_give_every_line_once_under_its_number(data: bytes, lines_per_range: int, tmp_path: Path) -> None:
    ranges, found = read_planned(write(tmp_path, data), lines_per_range)
    check_ranges(ranges, data)
    assert found == expected_lines(data)
    assert all(span.num_lines == lines_per_range for span in ranges[:-1])


PARTS = [b"{}", b"\n", b"\r\n", b" ", BOM, b"\0", b'{"text": "\xe2\x80\xa8"}', b"x" * 40, b"\n\n\n"]


@given(
    parts=st.lists(st.sampled_from(PARTS), max_size=30),
    lines_per_range=st.integers(1, 12),
    sizes=st.tuples(st.integers(1, 30), st.integers(1, 60), st.integers(1, 50)),
)
@tries(300)
def test_any_file_any_range_and_any_read_size_give_the_same_lines(
    tmp_path_factory: pytest.TempPathFactory, parts: list[bytes], lines_per_range: int, sizes: tuple[int, int, int]
) -> None:
    read_bytes, range_bytes, limit = sizes
    data = b"{}\n" + b"".join(parts)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lines, "_READ_BYTES", read_bytes)
        patch.setattr(lines, "_RANGE_BYTES", range_bytes)
        patch.setattr(lines, "MAX_LINE_BYTES", limit)
        ranges, found = read_planned(write(tmp_path_factory.getbasetemp(), data), lines_per_range)
    check_ranges(ranges, data)
    assert found == expected_lines(data, limit)
    assert all(span.num_lines <= lines_per_range for span in ranges)


def test_ranges_of_long_lines_close_early_but_hold_a_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(lines, "_RANGE_BYTES", 1000)
    data = (b"x" * 399 + b"\n") * 10 + b"y" * 5000 + b"\n" + b"z\n" * 3
    ranges, found = read_planned(write(tmp_path, data), 100)
    check_ranges(ranges, data)
    assert found == expected_lines(data)
    assert all(span.end - span.start <= 1000 + 5001 for span in ranges)
    assert len(ranges) >= 4


@pytest.mark.parametrize("read_bytes", [1, 7, 64, 1 << 20])
def test_a_line_is_too_long_by_its_length_alone(read_bytes: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for module in (lines, objects):
        monkeypatch.setattr(module, "MAX_LINE_BYTES", 100)
    monkeypatch.setattr(lines, "_READ_BYTES", read_bytes)
    data = b"a" * 100 + b"\n" + b"b" * 101 + b"\n" + b"c" * 300 + b"\n{}\n" + b"d" * 101
    _, found = read_planned(write(tmp_path, data), 2)
    assert found == [Line(1, b"a" * 100), Line(2, None), Line(3, None), Line(4, b"{}"), Line(5, None)]
    with pytest.raises(Reject, match="more than 100 bytes") as caught:
        parse_record(found[1])
    assert caught.value.reason == "line_too_long"


def test_several_files_are_planned_one_after_the_other(tmp_path: Path) -> None:
    files = [*write(tmp_path, b"1\n2\n3\n", "a.jsonl"), *write(tmp_path, b"", "b.jsonl"), *write(tmp_path, b"4", "c.jsonl")]
    ranges, found = read_planned(files, 2)
    assert [(Path(span.url).name, span.first_line, span.num_lines) for span in ranges] == [
        ("a.jsonl", 1, 2),
        ("a.jsonl", 3, 1),
        ("c.jsonl", 1, 1),
    ]
    assert [line.data for line in found] == [b"1", b"2", b"3", b"4"]


@given(st.lists(st.binary(max_size=20), max_size=8))
@tries(100)
def test_chunks_of_any_size_are_numbered_alike(chunks: list[bytes]) -> None:
    assert list(number_lines(chunks)) == expected_lines(b"".join(chunks))


@pytest.mark.parametrize("lines_per_range", [0, -1])
def test_a_range_of_no_lines_is_refused(lines_per_range: int, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="at least one line"):
        plan_lines(write(tmp_path, b"{}\n"), lines_per_range)


# --- Files of something else ---------------------------------------------------------------------------------------


SOURCE = Containers(task_lines=2, task_records=2, task_bytes=1 << 20, quiet=True)


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-32-be"])
def test_utf16_is_refused(encoding: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"a\.jsonl is UTF-16: convert it first, with `iconv"):
        SOURCE.plan(write(tmp_path, '{"text": "x"}\n'.encode(encoding)))


@pytest.mark.parametrize(
    "array",
    [
        json.dumps([{"a": 1}, {"b": 2}]),
        json.dumps([{"a": 1}, {"b": 2}], indent=2),
        "[ \n{}]",
        '  \n[{"a": 1},\n {"b": 2}]\n',
        "\ufeff" + json.dumps([{"a": 1}], indent=1),
        json.dumps([{"a": 1}], indent=1).replace("\n", "\r\n"),
        json.dumps([{"a": "x" * 100_000}]),
    ],
)
def test_a_list_of_objects_is_one_whatever_its_name(array: str, tmp_path: Path) -> None:
    tasks, _ = SOURCE.plan(write(tmp_path, array.encode()))
    found = [(record.element, record.fields) for task in tasks for record in SOURCE.read(task)]
    assert found == list(enumerate(json.loads(array.removeprefix("\ufeff"))))


@pytest.mark.parametrize("first", ["[1, 2]", '["{"]', "[]", '[[{"a": 1}]]', "[oops"])
def test_a_first_line_that_is_merely_wrong_is_left_to_its_reject(first: str, tmp_path: Path) -> None:
    _, found = read_planned(write(tmp_path, first.encode() + b"\n{}\n"), 10)
    assert [line.number for line in found] == [1, 2]
    assert [type(task) for task in SOURCE.plan(write(tmp_path, first.encode() + b"\n{}\n"))[0]] == [LineRange]
    with pytest.raises(Reject, match=r"not_an_object|bad_json"):
        parse_record(found[0])


def test_a_missing_file_is_not_found(tmp_path: Path) -> None:
    with pytest.raises(NotFound, match="nothing"):
        plan_lines([InputFile(str(tmp_path / "nothing.jsonl"), 9)], 10)


# --- Inputs --------------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("b.jsonl", "a.jsonl", "sub/c.jsonl", "part-0.jsonl", "part-1.jsonl", "notes.txt", "x{1,2}.jsonl"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"{}\n")
    return tmp_path


def expand(*inputs: str | Path) -> list[InputFile]:
    return expand_inputs([str(pattern) for pattern in inputs], by_suffix(".jsonl")).files


def names(found: list[InputFile], folder: Path) -> list[str]:
    assert all(file.size == 3 for file in found)
    return [os.path.relpath(file.url, folder) for file in found]


@pytest.mark.parametrize(
    ("inputs", "expected"),
    [
        (["a.jsonl"], ["a.jsonl"]),
        (["notes.txt"], ["notes.txt"]),
        (["b.jsonl", "sub/../a.jsonl", "b.jsonl", "a.jsonl"], ["b.jsonl", "a.jsonl"]),
        (["*.jsonl"], ["a.jsonl", "b.jsonl", "part-0.jsonl", "part-1.jsonl", "x{1,2}.jsonl"]),
        (["**/?.jsonl"], ["a.jsonl", "b.jsonl", "sub/c.jsonl"]),
        (["s*"], ["sub/c.jsonl"]),
        (["**"], ["a.jsonl", "b.jsonl", "notes.txt", "part-0.jsonl", "part-1.jsonl", "sub/c.jsonl", "x{1,2}.jsonl"]),
        (["part-{1,0}*"], ["part-1.jsonl", "part-0.jsonl"]),
        (["part-{0..1}.jsonl"], ["part-0.jsonl", "part-1.jsonl"]),
        (["{b,a}.jsonl"], ["b.jsonl", "a.jsonl"]),
        (["sub"], ["sub/c.jsonl"]),
        (["sub/"], ["sub/c.jsonl"]),
        (["{sub,part-0.jsonl}"], ["sub/c.jsonl", "part-0.jsonl"]),
        (["x{1,2}.jsonl"], ["x{1,2}.jsonl"]),  # a file of that very name
        (["."], ["a.jsonl", "b.jsonl", "part-0.jsonl", "part-1.jsonl", "sub/c.jsonl", "x{1,2}.jsonl"]),
    ],
)
def test_files_folders_and_patterns_are_expanded(inputs: list[str], expected: list[str], folder: Path) -> None:
    assert names(expand(*(folder / pattern for pattern in inputs)), folder) == expected


def test_urls_are_expanded_too(folder: Path) -> None:
    found = expand(f"file://{folder}/part-{{0..1}}.jsonl")
    assert [file.size for file in found] == [3, 3]
    assert [line.number for span in plan_lines(found, 5) for line in read_lines(span)] == [1, 1]


def test_the_files_of_a_folder_can_be_read(folder: Path) -> None:
    _, found = read_planned(expand(folder), 10)
    assert found == [Line(1, b"{}")] * 6


@pytest.mark.parametrize(
    ("pattern", "error", "words"),
    [
        ("nothing.jsonl", NotFound, "nothing.jsonl"),
        ("part-{0..2}.jsonl", NotFound, r"part-2\.jsonl"),
        ("z*.jsonl", NotFound, r"z\*\.jsonl: no such file, and nothing that this pattern stands for"),
        ("empty", NotFound, r"no such file, and no \*\.jsonl under a folder"),
        ("part-{0..1.jsonl", UsageError, "unbalanced braces"),
    ],
)
def test_inputs_that_are_not_there_are_named(pattern: str, error: type[Exception], words: str, folder: Path) -> None:
    (folder / "empty").mkdir()
    with pytest.raises(error, match=words):
        expand(folder / pattern)


@pytest.mark.parametrize("inputs", [[], [""], ["a\0b"]])
def test_no_input_is_refused(inputs: list[str]) -> None:
    with pytest.raises(UsageError):
        expand(*inputs)


# --- Records -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"{", "bad_json"),
        (b"{'a': 1}", "bad_json"),
        (b'{"a": NaN', "bad_json"),
        (b'{"a": NaN, "b": ' + b"[" * 5_000_000 + b"]" * 5_000_000 + b"}", "bad_json"),
        (b"[" * 100_000, "bad_json"),
        (b"\0", "bad_json"),
        (b"{}{}", "bad_json"),
        (b'{"a": "\xff"}', "invalid_utf8"),
        (b"[]", "not_an_object"),
        (b'"x"', "not_an_object"),
        (b"null", "not_an_object"),
        (b"1", "not_an_object"),
    ],
)
def test_a_line_that_is_no_record_is_rejected_with_its_reason(data: bytes, reason: str) -> None:
    with pytest.raises(Reject) as caught:
        parse_record(Line(1, data))
    assert caught.value.reason == reason


def test_json_as_python_writes_it_is_a_record() -> None:
    record = parse_record(Line(1, b'{"a": [NaN, -Infinity], "b": "\\ud83d", "c": 123456789012345678901234567890}'))
    assert json.dumps(record["a"]) == "[NaN, -Infinity]"
    assert record["b"] == "\ud83d"
    assert record["c"] == 123456789012345678901234567890
    with pytest.raises(Reject, match=r"invalid_utf8: b has half a character, U\+D83D"):
        required_text(record, ("b",))


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        ({}, "missing_field"),
        ({"other": "x"}, "missing_field"),
        ({"text": None}, "missing_field"),
        ({"text": 5, "caption": "x"}, "wrong_type"),
        ({"text": ["x"]}, "wrong_type"),
        ({"text": ""}, "empty_text"),
        ({"text": " \n\u3000"}, "empty_text"),
    ],
)
def test_a_record_without_text_is_rejected_with_its_reason(record: dict[str, object], reason: str) -> None:
    with pytest.raises(Reject) as caught:
        required_text(record, ("text", "caption"))
    assert caught.value.reason == reason


def test_the_first_field_that_is_there_is_the_text() -> None:
    assert required_text({"text": None, "caption": " x "}, ("text", "caption")) == " x "


# --- Real files ----------------------------------------------------------------------------------------------------

needs_data = pytest.mark.skipif(not FOLDER.is_dir(), reason=f"the malformed files are not at {'/'.join(FOLDER.parts[-4:])}")


@needs_data
@pytest.mark.parametrize(
    ("name", "num_records"), [("pairs_bom.jsonl", 4), ("pairs_crlf.jsonl", 4), ("pairs_u2028.jsonl", 3), ("pairs_empty.jsonl", 0)]
)
def test_odd_but_valid_files_give_all_their_records(name: str, num_records: int) -> None:
    found = [parse_record(line) for line in read_planned(expand(FOLDER / name), 2)[1]]
    assert len(found) == num_records
    assert all(required_text(record, ("text_prompt",)) for record in found)


@needs_data
def test_real_utf_16_is_refused_and_a_real_list_read() -> None:
    with pytest.raises(UsageError, match="is UTF-16"):
        SOURCE.plan(expand(FOLDER / "pairs_utf16.jsonl"))
    tasks, _ = SOURCE.plan(expand(FOLDER / "pairs_array.json"))
    records = [record.fields for task in tasks for record in SOURCE.read(task)]
    assert records == json.loads((FOLDER / "pairs_array.json").read_text())


BAD_LINES = {
    "cut JSON": "bad_json",
    "text_prompt missing": "missing_field",
    "text_prompt null": "missing_field",
    "text_prompt is a number": "wrong_type",
    "text_prompt empty (policy decides)": "empty_text",
    "text_prompt only white space (policy decides)": "empty_text",
    "invalid UTF-8 in the caption": "invalid_utf8",
    "array instead of object": "not_an_object",
    "string instead of object": "not_an_object",
    "null": "not_an_object",
    "lone surrogate escape in the caption (valid JSON, cannot be encoded as UTF-8)": "invalid_utf8",
    "200000 open brackets (RecursionError in json)": "bad_json",
    "6000-digit integer (ValueError in CPython json)": "bad_json",
}


@needs_data
@pytest.mark.parametrize("lines_per_range", [1, 7, 1000])
def test_the_bad_lines_of_a_real_file_are_found_under_their_numbers(lines_per_range: int) -> None:
    expected = json.loads((FOLDER / "pairs_bad.expect.json").read_text())
    _, found = read_planned(expand(FOLDER / "pairs_bad.jsonl"), lines_per_range)
    case_of = {entry["line"]: entry["case"] for entry in expected}
    reasons = {}
    for line in found:
        try:
            required_text(parse_record(line), ("text_prompt",))
        except Reject as cause:
            reasons[case_of[line.number]] = cause.reason
    assert set(case_of) - {line.number for line in found} == {
        number for number, case in case_of.items() if case in ("blank line", "white-space line")
    }
    assert reasons == BAD_LINES
