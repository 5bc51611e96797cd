"""Shards as columns: the rows that they were made of, and manifests that are read in pieces."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from properties import tries

from wds_tools.errors import FormatError
from wds_tools.format import manifest_json
from wds_tools.format.manifest import Manifest, parse_manifest, serialize_manifest
from wds_tools.format.shards import ShardInfo, Shards

NAMES = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
COUNTS = st.integers(0, (1 << 53) - 1)
ROWS = st.builds(
    ShardInfo,
    name=NAMES,
    samples=st.integers(0, (1 << 32) - 1),
    bytes=COUNTS,
    xxh128=st.text("0123456789abcdef", min_size=32, max_size=32),
    members=st.lists(NAMES, max_size=3).map(tuple),
    data_types=st.dictionaries(NAMES, COUNTS, max_size=3),
    text_chars=COUNTS,
    num_codes=COUNTS,
)


@given(st.lists(ROWS, max_size=6), st.lists(ROWS, max_size=3), st.integers(-7, 7), st.integers(-7, 7))
@tries(100)
def test_columns_give_the_rows_that_they_were_made_of(rows: list[ShardInfo], more: list[ShardInfo], low: int, high: int) -> None:
    shards = Shards.join([Shards.of(rows), Shards.of(more)])
    rows = rows + more
    assert shards == rows
    assert list(shards) == [shards[number] for number in range(len(shards))] == rows
    assert shards[low:high] == rows[low:high]
    assert shards[:high] == rows[:high]
    assert shards[:high].kinds == Shards.of(rows[:high]).kinds
    assert shards[::-1] == rows[::-1]
    assert [shards.name(number) for number in range(len(rows))] == [row.name for row in rows]
    types = {name for row in rows for name in row.data_types}
    assert shards.data_types() == {name: sum(row.data_types.get(name, 0) for row in rows) for name in sorted(types)}


def row(number: int) -> ShardInfo:
    kinds: list[dict[str, int]] = [{"image_text": 5}, {"image_text": 2, "text_pretrain": 3}, {}]
    return ShardInfo(
        name=f'a/{number:04d} é".tar' if number % 7 == 3 else f"a/{number:04d}.tar",
        samples=5,
        bytes=1 << 20,
        xxh128=f"{number:032x}",
        members=("json",) if number % 5 else ("json", '    },\n    {"'),
        data_types=kinds[number % 3],
        text_chars=number,
        num_codes=0,
    )


MANIFEST = Manifest(shards=Shards.of(map(row, range(200))), inputs=1000, source={"shards": [{}, {"name": 1}]})


@pytest.mark.parametrize("piece_bytes", [1, 100, 4096, 1 << 20])
def test_a_manifest_is_the_same_in_pieces_of_any_size(piece_bytes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(manifest_json, "_PIECE_BYTES", piece_bytes)
    text = serialize_manifest(MANIFEST)
    assert text == json.dumps(json.loads(text), indent=2, ensure_ascii=False).encode() + b"\n"
    found = parse_manifest(io.BytesIO(text))
    assert found == MANIFEST
    assert found.fingerprint() == MANIFEST.fingerprint()
    assert serialize_manifest(found) == text


LAYOUTS: dict[str, Callable[[Any], bytes]] = {
    "on one line": lambda record: json.dumps(record).encode(),
    "with other spaces": lambda record: json.dumps(record, indent=4).encode(),
    "with a field behind the shards": lambda record: json.dumps(record | {"added": [1]}, indent=2).encode(),
    "with a field more in each shard": lambda record: json.dumps(
        record | {"shards": [each | {"added": {"a": 1}} for each in record["shards"]]}, indent=2
    ).encode(),
    "with the shards first": lambda record: json.dumps({"shards": record["shards"]} | record, indent=2).encode(),
}


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_a_manifest_that_is_laid_out_otherwise_has_the_same_shards(layout: Callable[[Any], bytes]) -> None:
    record = json.loads(serialize_manifest(MANIFEST))
    del record["manifest_hash"], record["rejects_hash"]
    found = parse_manifest(layout(record))
    assert found.shards == MANIFEST.shards
    assert found.fingerprint() == MANIFEST.fingerprint()


@pytest.mark.parametrize("number", [0, 150, 199])
@pytest.mark.parametrize("indent", [None, 2])
def test_the_shard_that_is_wrong_is_named_by_its_number(number: int, indent: int | None) -> None:
    record = json.loads(serialize_manifest(MANIFEST))
    record["shards"][number]["samples"] = True
    with pytest.raises(FormatError, match=rf"^m\.json: not a manifest .*\(shards\[{number}\]\.samples is True, expected a whole"):
        parse_manifest(json.dumps(record, indent=indent).encode(), "m.json")


def test_what_is_wrong_with_a_whole_manifest_is_said_before_its_shards() -> None:
    record = json.loads(serialize_manifest(MANIFEST)) | {"schema_version": 9}
    record["shards"][5] = None
    with pytest.raises(FormatError, match="schema_version is 9"):
        parse_manifest(json.dumps(record, indent=2).encode())


@pytest.mark.parametrize("place", ["before", "inside another"])
def test_a_manifest_with_shards_in_two_places_is_refused(place: str) -> None:
    text = serialize_manifest(MANIFEST).decode()
    head, shards = text.split('\n  "shards": [\n', 1)
    if place == "before":
        odd = f'{head}\n  "shards": [\n{shards[: shards.rindex("]") + 1]},\n  "shards": [{{}}]\n}}\n'
    else:
        odd = head.replace('"source": {', f'"source": {{\n  "shards": [\n{shards[: shards.rindex("]") + 1]},', 1)
        odd += '"shards": [{}]}'
    assert json.loads(odd)["shards"] == [{}]
    with pytest.raises(FormatError, match="shards in two places"):
        parse_manifest(odd.encode())


def test_a_manifest_that_is_cut_off_anywhere_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(manifest_json, "_PIECE_BYTES", 512)
    text = serialize_manifest(MANIFEST)
    for size in range(0, len(text) - 1, 997):
        with pytest.raises(FormatError, match="no JSON"):
            parse_manifest(text[:size])


def test_no_more_than_a_piece_is_read_before_its_shards_are_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(manifest_json, "_PIECE_BYTES", 4096)
    stream = io.BytesIO(serialize_manifest(MANIFEST))
    taken = [(len(part), stream.tell()) for part in manifest_json.ManifestText(stream, "m").shards()]
    assert sum(count for count, _ in taken) == 200
    assert len(taken) > 10
    assert [place for _, place in taken][:3] == [4096, 8192, 12288]
