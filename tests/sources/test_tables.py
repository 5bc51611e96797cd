"""The container of Parquet and Arrow files: which columns are read, what values they give, and what damage costs."""

from __future__ import annotations

import datetime
import random
from collections.abc import Callable
from decimal import Decimal
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from s3 import S3Server

from wds_tools.errors import Reject
from wds_tools.sources import tables as tables_module
from wds_tools.sources.containers import Unit
from wds_tools.sources.record import InputFile, Record
from wds_tools.sources.tables import Tables
from wds_tools.storage import open_store, split_url

ROWS = 40
TABLE = pa.table(
    {
        "text": [f"text {number} é" for number in range(ROWS)],
        "image": [{"bytes": bytes([number]) * 50, "path": f"../{number}.jpg"} for number in range(ROWS)],
        "turns": [[{"from": "human", "value": f"{number}"}] * (number % 3) for number in range(ROWS)],
        "score": [number / 4 if number % 5 else None for number in range(ROWS)],
    }
)


def write_parquet(path: Path, table: Any = TABLE, **settings: Any) -> Path:
    pq.write_table(table, path, **{"row_group_size": 10, **settings})
    return path


def write_stream(path: Path, table: Any = TABLE) -> Path:
    with pa.ipc.new_stream(path, table.schema) as writer:
        writer.write_table(table, max_chunksize=10)
    return path


def write_file(path: Path, table: Any = TABLE) -> Path:
    with pa.ipc.new_file(path, table.schema) as writer:
        writer.write_table(table, max_chunksize=10)
    return path


WRITERS = [write_parquet, write_stream, write_file]


def units(path: Path | str) -> list[Unit]:
    root, name = split_url(str(path))
    return list(Tables().units([InputFile(str(path), open_store(root).size(name))]))


def read(path: Path | str, columns: tuple[str, ...] | None = None) -> list[Record[Any]]:
    records = []
    for unit in units(path):
        found = list(Tables(columns).read(unit))
        assert [record.number for record in found] == list(range(len(found)))
        records += found
    return records


def rows(records: list[Record[Any]]) -> list[Any]:
    return [record.fields.reason if isinstance(record.fields, Reject) else record.fields for record in records]


@pytest.mark.parametrize("write", WRITERS)
def test_rows_are_records_with_their_numbers(tmp_path: Path, write: Callable[[Path], Path]) -> None:
    records = read(write(tmp_path / "a"))
    assert rows(records) == TABLE.to_pylist()
    assert [record.line for record in records] == list(range(1, ROWS + 1))
    assert 0 < sum(record.num_units for record in records) <= (tmp_path / "a").stat().st_size


def test_a_unit_is_row_groups_and_all_units_are_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_parquet(tmp_path / "a.parquet")
    assert [unit.num_records for unit in units(path)] == [ROWS]
    monkeypatch.setattr(tables_module, "_UNIT_ROWS", 15)
    found = units(path)
    assert [unit.num_records for unit in found] == [20, 20]
    assert sum(unit.num_bytes for unit in found) == path.stat().st_size
    records = read(path)
    assert rows(records) == TABLE.to_pylist()
    assert [record.line for record in records] == list(range(1, ROWS + 1))
    assert sum(record.num_units for record in records) == path.stat().st_size
    write_parquet(path, TABLE.slice(0, 0))
    assert units(path) == []


@pytest.mark.parametrize("write", WRITERS)
def test_only_wanted_columns_are_read_and_those_that_may_hold_images(tmp_path: Path, write: Callable[[Path], Path]) -> None:
    path = write(tmp_path / "a")
    assert rows(read(path, ("text", "score", "absent"))) == TABLE.select(["text", "image", "score"]).to_pylist()
    assert rows(read(path, ())) == TABLE.select(["image"]).to_pylist()


@pytest.mark.parametrize("write", WRITERS)
def test_rows_without_a_wanted_column_are_rows_all_the_same(tmp_path: Path, write: Callable[[Path, Any], Path]) -> None:
    path = write(tmp_path / "a", TABLE.select(["score", "turns"]))
    records = read(path, ("text",))
    assert rows(records) == [{}] * ROWS
    assert [record.line for record in records] == list(range(1, ROWS + 1))


@pytest.mark.parametrize("write", WRITERS)
def test_a_column_with_an_image_inside_or_a_name_of_one_in_other_letters_is_read(
    tmp_path: Path, write: Callable[[Path, Any], Path]
) -> None:
    table = pa.table({"text": ["t"], "meta": [{"n": 1, "image": "x.jpg"}], "Image": ["y"], "all": [[{"JPG": "z"}]], "other": [1]})
    assert rows(read(write(tmp_path / "a", table), ("text",))) == table.drop_columns(["other"]).to_pylist()


def test_columns_that_are_not_wanted_are_not_fetched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    noise = random.Random(0).randbytes(50 << 10).hex()
    path = write_parquet(
        tmp_path / "a.parquet", TABLE.append_column("noise", [[noise] * ROWS]), compression="none", use_dictionary=False
    )
    fetched = []
    ranged = tables_module._Seekable._range
    monkeypatch.setattr(
        tables_module._Seekable, "_range", lambda self, start, end: (fetched.append(end - start), ranged(self, start, end))[1]
    )
    assert rows(read(path, ("text",))) == TABLE.select(["text", "image"]).to_pylist()
    assert sum(fetched) < 300 << 10 < path.stat().st_size


@pytest.mark.parametrize("write", WRITERS)
def test_values_that_json_lacks_become_some_that_it_has(tmp_path: Path, write: Callable[[Path, Any], Path]) -> None:
    moment = datetime.datetime(2024, 1, 2, 3, 4, 5)
    table = pa.table(
        {
            "when": pa.array([moment], pa.timestamp("ns")),
            "zone": pa.array([moment], pa.timestamp("us", "UTC")),
            "day": [datetime.date(2024, 1, 2)],
            "wait": [datetime.timedelta(seconds=2)],
            "price": [Decimal("1.25")],
            "kind": pa.array(["a"]).dictionary_encode(),
            "long": pa.array(["a"], pa.large_string()),
            "half": pa.array([1.5], pa.float16()),
            "nested": [[{"day": datetime.date(2024, 1, 2), "price": Decimal("0.5"), "raw": b"\xff"}]],
            "map": pa.array([[("a", 1)]], pa.map_(pa.string(), pa.int64())),
            "pair": pa.array([[1, 2]], pa.list_(pa.int8(), 2)),
        }
    )
    assert rows(read(write(tmp_path / "a", table))) == [
        {
            "when": "2024-01-02 03:04:05.000000000",
            "zone": "2024-01-02 03:04:05.000000Z",
            "day": "2024-01-02",
            "wait": 2_000_000,
            "price": 1.25,
            "kind": "a",
            "long": "a",
            "half": 1.5,
            "nested": [{"day": "2024-01-02", "price": 0.5, "raw": b"\xff"}],
            "map": {"a": 1},
            "pair": [1, 2],
        }
    ]


def test_a_text_that_is_not_utf8_costs_its_row(tmp_path: Path) -> None:
    bad = pa.array([b"a", b"\xff", b"c"], pa.binary()).view(pa.string())
    assert rows(read(write_parquet(tmp_path / "a.parquet", pa.table({"text": bad})))) == [
        {"text": "a"},
        "invalid_utf8",
        {"text": "c"},
    ]


# ---- Damage ----


@pytest.mark.parametrize("write", WRITERS)
def test_a_file_that_was_cut_gives_rows_up_to_there_and_one_reject(tmp_path: Path, write: Callable[[Path], Path]) -> None:
    whole = write(tmp_path / "a").read_bytes()
    for size in (*range(8, len(whole) - 8, len(whole) // 20), len(whole) - 1):
        (tmp_path / "a").write_bytes(whole[:size])
        found = rows(read(tmp_path / "a"))
        assert found[:-1] == TABLE.to_pylist()[: len(found) - 1]
        assert found[-1] in ("corrupt_parquet", "corrupt_arrow", "truncated_arrow")


@pytest.mark.parametrize("write", WRITERS)
def test_a_file_with_flipped_bits_is_rows_and_a_reject_at_most(tmp_path: Path, write: Callable[[Path], Path]) -> None:
    whole = write(tmp_path / "a").read_bytes()
    draw = random.Random(1)
    for _ in range(60):
        bad = bytearray(whole)
        bad[draw.randrange(len(bad))] ^= 1 << draw.randrange(8)
        (tmp_path / "a").write_bytes(bad)
        reasons = {row for row in rows(read(tmp_path / "a")) if isinstance(row, str)}
        assert reasons <= {"corrupt_parquet", "corrupt_arrow", "truncated_arrow", "invalid_utf8"}


def test_damage_in_a_row_group_leaves_the_rows_before_it(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "a.parquet", compression="zstd", write_page_checksum=True)
    group = pq.ParquetFile(path).metadata.row_group(2)
    bad = bytearray(path.read_bytes())
    bad[group.column(0).data_page_offset + 60] ^= 4
    path.write_bytes(bad)
    records = read(path)
    assert rows(records) == [*TABLE.to_pylist()[:20], "corrupt_parquet"]
    assert records[-1].line == 21
    assert "behind row 20" in str(records[-1].fields)


def test_a_row_group_that_becomes_hundreds_of_times_its_size_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tables_module, "_BOMB_BYTES", 4 << 20)
    table = pa.table({"image": pa.array([bytes(1 << 20)] * 10, pa.binary()), "n": range(10)})
    path = write_parquet(tmp_path / "a.parquet", table, compression="zstd", use_dictionary=False)
    assert rows(read(path)) == ["decompression_bomb"]


def test_two_columns_of_one_name_are_refused(tmp_path: Path) -> None:
    table = pa.Table.from_arrays([pa.array(["a"]), pa.array(["b"])], ["text", "text"])
    assert rows(read(write_parquet(tmp_path / "a.parquet", table))) == ["corrupt_parquet"]


def test_a_footer_that_claims_gigabytes_is_refused(tmp_path: Path) -> None:
    bad = bytearray(write_parquet(tmp_path / "a.parquet").read_bytes())
    bad[-8:-4] = (2 << 30).to_bytes(4, "little")
    (tmp_path / "a.parquet").write_bytes(bad)
    (record,) = read(tmp_path / "a.parquet")
    assert "its footer claims 2147483648 bytes" in str(record.fields)


# ---- Where it lies ----


@pytest.mark.parametrize("write", WRITERS)
def test_tables_are_read_from_object_storage(tmp_path: Path, s3: S3Server, write: Callable[[Path], Path]) -> None:
    path = write(tmp_path / "a")
    url = f"s3://{s3.bucket}/source-tables"
    open_store(url).put(write.__name__, path.read_bytes())
    assert rows(read(f"{url}/{write.__name__}")) == TABLE.to_pylist()


def test_a_map_is_an_object_or_its_pairs_where_that_would_lose_any(tmp_path: Path) -> None:
    maps = {
        "plain": pa.array([[("a", 1)], None], pa.map_(pa.string(), pa.int64())),
        "twice": pa.array([[("a", 1), ("a", 2)], []], pa.map_(pa.string(), pa.int64())),
        "numbers": pa.array([[(1, "v")], []], pa.map_(pa.int32(), pa.string())),
    }
    pa.parquet.write_table(pa.table(maps), tmp_path / "a.parquet")
    (unit,) = Tables().units([InputFile(str(tmp_path / "a.parquet"), (tmp_path / "a.parquet").stat().st_size)])
    assert [record.fields for record in Tables().read(unit)] == [
        {"plain": {"a": 1}, "twice": [["a", 1], ["a", 2]], "numbers": [[1, "v"]]},
        {"plain": None, "twice": {}, "numbers": {}},
    ]


@pytest.mark.parametrize("write", [write_parquet, write_file])
def test_a_column_without_a_json_type_stays_as_it_is_and_a_value_that_can_not_be_read_is_a_reject(
    write: Callable[..., Path], tmp_path: Path
) -> None:
    nowhere = pa.table({"text": ["a"], "when": pa.array([0], pa.timestamp("us", "Europe/Nowhere"))})
    (row,) = read(write(tmp_path / "a", nowhere))
    assert (row.fields.reason, row.line) == ("wrong_type", 1)
    if write is write_file:  # Parquet has no such type
        (row,) = read(
            write(tmp_path / "b", pa.table({"text": ["a"], "every": pa.array([(1, 2, 3)], pa.month_day_nano_interval())}))
        )
        assert row.fields == {"text": "a", "every": (1, 2, 3)}
