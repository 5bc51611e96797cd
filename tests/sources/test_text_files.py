"""Text files of any kind and packing: the same records, what a damaged one still gives, and what hostile ones can't do."""

from __future__ import annotations

import csv
import gzip
import io
import json
import tracemalloc
import zlib
from collections.abc import Callable, Iterable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import zstandard
from commands import tree
from hypothesis import given
from hypothesis import strategies as st
from properties import tries

from wds_tools.convert import run_conversion
from wds_tools.convert.documents import DocumentsConfig
from wds_tools.errors import Reject, UsageError
from wds_tools.sources.composite import Containers
from wds_tools.sources.record import InputFile
from wds_tools.sources.text import delimited, objects
from wds_tools.sources.text.compression import read_pieces
from wds_tools.sources.text.delimited import read_rows

SOURCE = Containers(task_lines=1000, task_records=1000, task_bytes=1 << 30, quiet=True)
RECORDS = [{"text": f'{number} "quoted", and\nbroken\n\nlines\té'} for number in range(40)]


def as_table(separator: str) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, ["text"], delimiter=separator)
    writer.writeheader()
    writer.writerows(RECORDS)
    return "\ufeff" + text.getvalue()


TEXTS = {
    "jsonl": "".join(json.dumps(record) + "\n" for record in RECORDS),
    "json": json.dumps(RECORDS, indent=1),
    "csv": as_table(","),
    "tsv": as_table("\t"),
}
PACKERS: dict[str, Callable[[bytes], bytes]] = {
    "": bytes,
    ".gz": lambda data: gzip.compress(data[:99], mtime=0) + gzip.compress(data[99:], mtime=0) + bytes(512),
    ".zst": zstandard.compress,
}


def records(path: Path) -> list[Any]:
    tasks, _ = SOURCE.plan([InputFile(str(path), path.stat().st_size)])
    return [record for task in tasks for record in SOURCE.read(task)]


def write(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


@pytest.mark.parametrize("packing", PACKERS)
@pytest.mark.parametrize("suffix", TEXTS)
def test_all_kinds_and_packings_give_the_same_records_whatever_they_are_called(suffix: str, packing: str, tmp_path: Path) -> None:
    path = write(tmp_path / f"a.{suffix}{packing}", PACKERS[packing](TEXTS[suffix].encode()))
    found = records(path)
    assert [record.fields for record in found] == RECORDS
    assert [record.number for record in found] == list(range(40))
    numbers = [record.element if suffix == "json" else record.line for record in found]
    lines = {"json": range(40), "jsonl": range(1, 41)}.get(suffix, range(2, 161, 4))
    assert numbers == list(lines)
    if suffix == "jsonl":
        assert [record.fields for record in records(path.rename(tmp_path / "part-00000"))] == RECORDS


@pytest.mark.parametrize(
    "suffix", ["jsonl.gz", "json", "tsv.zst", *(pytest.param(one, marks=pytest.mark.slow) for one in ("json.gz", "csv"))]
)
def test_workers_change_no_byte(suffix: str, tmp_path: Path) -> None:
    kind, _, packing = suffix.partition(".")
    (tmp_path / "in").mkdir()
    for number in range(3):
        data = PACKERS["." + packing if packing else ""](TEXTS[kind].encode())
        write(tmp_path / f"in/{number}.{suffix}", data)
    for workers in (1, 2):
        options: dict[str, Any] = {"task_bytes": 1, "task_records": 15, "workers": workers, "quiet": True}
        run_conversion(DocumentsConfig(input=(str(tmp_path / "in"),), output=str(tmp_path / f"out{workers}"), **options))
    assert tree(tmp_path / "out1") == tree(tmp_path / "out2")


# ---- damage ----


def inflated(data: bytes) -> tuple[bytes, str | None]:
    text = b""
    try:
        for piece, _ in read_pieces(lambda: io.BytesIO(data), "gz"):
            text += piece
    except Reject as cause:
        return text, cause.reason
    return text, None


LINES = b"".join(b"%d %d\n" % (number, number * 7919 % 1009) for number in range(30_000))


@given(
    members=st.lists(st.integers(0, len(LINES)), max_size=3),
    end=st.integers(0, 1 << 17),
    flip=st.none() | st.integers(0, 1 << 17),
)
@tries(60)
def test_of_a_cut_or_damaged_gzip_nothing_before_the_damage_is_lost(members: list[int], end: int, flip: int | None) -> None:
    places = [0, *sorted(members), len(LINES)]
    data = b"".join(gzip.compress(LINES[a:b], mtime=0) for a, b in pairwise(places))
    assert inflated(data) == (LINES, None)
    damaged = bytearray(data[: max(end, 1)])
    if flip is not None:
        damaged[flip % len(damaged)] ^= 0x10
    text, reason = inflated(bytes(damaged))
    assert reason is not None or text == LINES or flip is not None
    if flip is None:
        inflater, rest, expected = zlib.decompressobj(31), bytes(damaged), b""
        while rest:
            expected += inflater.decompress(rest)
            rest, inflater = (inflater.unused_data, zlib.decompressobj(31)) if inflater.eof else (b"", inflater)
        assert expected.startswith(text)
        assert len(expected) - len(text) < 600  # what isal holds back for the bytes that are not there


@pytest.mark.parametrize(
    ("data", "reason", "kept"),
    [
        (gzip.compress(LINES, mtime=0)[:-9], "truncated_gz", len(LINES)),
        (gzip.compress(LINES, mtime=0)[:-8] + bytes(8), "corrupt_gz", len(LINES)),
        (gzip.compress(LINES, mtime=0) + b"garbage", "not_gz", len(LINES)),
        (gzip.compress(b"a\n", mtime=0) + gzip.compress(LINES, mtime=0)[:10] + b"\xff" * 99, "corrupt_gz", 2),
        (b"", "empty_file", 0),
    ],
)
def test_what_is_wrong_with_a_gzip_is_its_reason(data: bytes, reason: str, kept: int) -> None:
    text, found = inflated(data)
    assert (found, len(text)) == (reason, kept)


@pytest.mark.parametrize("suffix", ["jsonl", "json", "csv"])
def test_a_cut_file_gives_the_records_before_the_cut_and_one_reject(suffix: str, tmp_path: Path) -> None:
    data = TEXTS[suffix].encode()
    packed = zlib.compressobj(wbits=31)
    path = write(tmp_path / f"a.{suffix}.gz", packed.compress(data[: len(data) // 2]) + packed.flush(zlib.Z_SYNC_FLUSH))
    *found, last = records(path)
    assert 15 < len(found) < 25
    assert [record.fields for record in found] == RECORDS[: len(found)]
    assert last.fields.reason == "truncated_gz"
    assert last.element == len(found) if suffix == "json" else last.line == found[-1].line + 1


def test_a_compressed_list_that_is_not_closed_gives_its_elements_and_one_reject(tmp_path: Path) -> None:
    path = write(tmp_path / "a.json.gz", gzip.compress(b'[{"text": "a"}, {"text": "b"}, {"te'))
    assert [record.fields for record in records(path)[:-1]] == [{"text": "a"}, {"text": "b"}]
    assert records(path)[-1].fields.reason == "bad_list"


def rows(text: bytes, size: int = 7) -> list[Any]:
    return list(read_rows((text[at : at + size] for at in range(0, len(text), size)), ","))


def test_rows_that_are_not_as_the_header_says_are_rejects_with_the_line_where_they_begin() -> None:
    found = rows(b'a,b\n1,2\n\n"x\ny",3\n4\n5,6,7\n"8"9,0\n\xff,1\nlast,"row"')
    assert [(line, fields if isinstance(fields, dict) else fields.reason) for line, fields in found] == [
        (2, {"a": "1", "b": "2"}),
        (4, {"a": "x\ny", "b": "3"}),
        (6, "bad_csv"),
        (7, "bad_csv"),
        (8, "bad_csv"),
        (9, "invalid_utf8"),
        (10, {"a": "last", "b": "row"}),
    ]


@pytest.mark.parametrize("separator", [",", ";", "\t", "|"])
def test_the_separator_of_a_csv_is_the_one_that_its_first_line_has_most_often(separator: str, tmp_path: Path) -> None:
    lines = ['"a, b; c|d"', "e", "f"], ["x", '"1,2;3|4"', "5"]
    text = "".join(separator.join(line) + "\n" for line in lines)
    assert [row.fields for row in records(write(tmp_path / "a.csv", text.encode()))] == [
        {"a, b; c|d": "x", "e": "1,2;3|4", "f": "5"}
    ]


def test_a_quote_that_is_not_closed_costs_what_it_swallows_and_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    assert [fields.reason for _, fields in rows(b'a,b\n"1,2\n3,4\n')] == ["bad_csv"]
    monkeypatch.setattr(delimited, "MAX_ROW_BYTES", 100)
    found = rows(b'a,b\n"1,2\n' + b"x,y\n" * 60)
    assert found[0][1].reason == "line_too_long"
    assert found[-1][1] == {"a": "x", "b": "y"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (",".join(f"c{number}" for number in range(50_000)), "50000 fields, at most 10000"),
        ("," * 2_000_000, "it can't be read"),
        ("a,b,a\n", "two fields are named 'a'"),
        ('"a\n', "it can't be read"),
    ],
)
@pytest.mark.parametrize("packing", PACKERS)
def test_a_header_that_is_none_is_one_line_before_anything_is_written(
    text: str, message: str, packing: str, tmp_path: Path
) -> None:
    path = write(tmp_path / f"a.csv{packing}", PACKERS[packing](text.encode()))
    with pytest.raises(UsageError, match=message):
        SOURCE.plan([InputFile(str(path), path.stat().st_size)])
    with pytest.raises(Reject) as caught:
        list(rows(text.encode()))
    assert caught.value.reason == "bad_header"


# ---- bombs ----


@pytest.mark.slow
@pytest.mark.parametrize(("suffix", "begin"), [("jsonl", b'{"text": "'), ("json", b'[{"text": "'), ("csv", b'text\n"')])
def test_what_a_bomb_becomes_is_bounded_in_memory(
    suffix: str, begin: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (objects, delimited):
        monkeypatch.setattr(module, "MAX_LINE_BYTES" if module is objects else "MAX_ROW_BYTES", 1 << 20)
    monkeypatch.setattr("wds_tools.sources.text.lines.MAX_LINE_BYTES", 1 << 20)
    monkeypatch.setattr("wds_tools.sources.text.elements.MAX_LINE_BYTES", 1 << 20)
    path = write(tmp_path / f"a.{suffix}.gz", gzip.compress(begin + b"a" * (64 << 20)))
    tracemalloc.start()
    found = records(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert {record.fields.reason for record in found} <= {"line_too_long", "bad_list", "bad_csv"}
    assert peak < 40 << 20


@pytest.mark.slow
def test_ten_megabytes_of_nested_json_are_a_reject(tmp_path: Path) -> None:
    deep = b"[" * 5_000_000 + b"]" * 5_000_000
    lines = [b'{"text": "a"}', b'{"text": "x", "deep": ' + deep + b"}", b'{"text": NaN, "deep": ' + deep + b"}", b'{"text": "b"}']
    for name, data in {"a.jsonl": b"\n".join(lines), "b.json": b"[" + b",".join(lines) + b"]"}.items():
        found = [record.fields for record in records(write(tmp_path / name, data))]
        assert [fields if isinstance(fields, dict) else fields.reason for fields in found] == [
            {"text": "a"},
            "bad_json",
            "bad_json",
            {"text": "b"},
        ]


def test_units_are_grouped_by_what_comes_first(tmp_path: Path) -> None:
    packed = gzip.compress(b'{"text": "a"}\n')
    paths = [write(tmp_path / f"{number}.jsonl.gz", packed) for number in range(5)]

    def tasks(task_bytes: int, files: Iterable[Path] = paths) -> list[int]:
        source = Containers(task_lines=1, task_records=9, task_bytes=task_bytes, quiet=True)
        return [len(task.units) for task in source.plan([InputFile(str(file), len(packed)) for file in files])[0]]  # type: ignore[union-attr]

    assert tasks(2 * len(packed)) == [2, 2, 1]
    assert tasks(1) == [1] * 5
    assert tasks(1 << 30) == [5]
