"""relabel: texts and fields from tables, and what found no partner."""

from __future__ import annotations

import csv
import json
from itertools import count
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from commands import read_samples, write_jsonl
from factory import image_sample, make_dataset, talk_sample, text_sample
from hypothesis import given, settings
from hypothesis import strategies as st

from wds_tools import Manifest, Sample
from wds_tools.check.verify import VerifyConfig, verify
from wds_tools.cli.main import main
from wds_tools.dataset.reader import read_manifest
from wds_tools.errors import UsageError
from wds_tools.jobs.finalize import FinalizeConfig, finalize
from wds_tools.select.relabel import RelabelConfig, relabel
from wds_tools.storage import open_store

COUNTER = count()
NAMES = st.text("abc", min_size=1, max_size=2)


def sample(number: int) -> Sample:
    return image_sample(number)._replace(provenance={"url": f"u{number // 2}", "number": number})


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """12 samples in shards of 5."""
    folder = tmp_path_factory.mktemp("source") / "set"
    made = {"vqcode_512": {"tokenizer": "tiny", "codebook_size": 8192}}
    make_dataset(folder, map(sample, range(12)), shard_samples=5, codes=made)
    return folder


def put(source: Path | str, output: Path | str, *labels: Path | str, **options: Any) -> Manifest:
    return relabel(RelabelConfig(input=str(source), output=str(output), labels=tuple(map(str, labels)), quiet=True, **options))


def test_texts_and_fields_come_to_the_samples_of_their_keys_and_nothing_else_changes(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{"key": sample(n).key, "caption": f"better {n}", "score": n / 2} for n in (11, 3, 4, 99)]
    rows += [{"key": sample(3).key, "caption": "second", "score": 1.0}, {"key": sample(5).key, "caption": "", "score": None}]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    options: dict[str, Any] = {"texts": ("recap=caption",), "fields": ("aesthetic=score",), "shard_samples": 4}
    made = put(source, tmp_path / "out", tmp_path / "a.parquet", **options)
    assert verify(VerifyConfig(input=str(tmp_path / "out"), quiet=True)).problems == ()
    before, after = read_samples(source), read_samples(tmp_path / "out")
    for old, new in zip(before, after, strict=True):
        number = int(new.key[-8:])
        recap = f"better {number}" if number in (11, 3, 4) else None
        assert new.texts == {"text": old.text, "recap": recap}
        assert new.text == (recap or old.text)
        assert new.provenance == {**old.provenance, **({"aesthetic": number / 2} if recap else {})}
        assert (new.codes["vqcode_512"] == old.codes["vqcode_512"]).all()
    assert made.source["labels"] == {
        "files": [str(tmp_path / "a.parquet")],
        "rows": 6,
        "rows_of_an_earlier_value": 1,
        "rows_without_sample": 1,
        "samples": 12,
        "samples_without_row": 8,
    }
    said = capsys.readouterr().err
    assert "4 of 12 samples (33.3%) get a row of 6" in said
    assert "rows of an earlier value: 1, such as image-00000003" in said
    assert "rows without sample: 1, such as image-00000099" in said
    assert "samples without row: 8, such as image-000000" in said
    assert not (tmp_path / "out/_work").exists()
    write_jsonl(tmp_path / "a.jsonl", rows)
    assert put(source, tmp_path / "again", tmp_path / "a.jsonl", **options).shards == made.shards
    assert put(source, tmp_path / "again", tmp_path / "a.jsonl", resume=True, **options).shards == made.shards
    rows[0]["caption"] = "other"
    write_jsonl(tmp_path / "a.jsonl", rows)
    with pytest.raises(UsageError, match="was begun with other inputs or settings: inputs_sha256"):
        put(source, tmp_path / "again", tmp_path / "a.jsonl", resume=True, **options)


def test_rows_of_a_csv_come_by_the_value_of_a_field_and_a_second_run_keeps_the_texts_of_the_first(
    source: Path, tmp_path: Path
) -> None:
    with (tmp_path / "a.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("link", "long", "id"), ("u1", "of url 1", 5), ("u9", "of nothing", 6), ("", "of none", 7)])
    made = put(source, tmp_path / "one", tmp_path / "a.csv", on="url=link", texts=("long=long",))
    assert [sample.text for sample in read_samples(tmp_path / "one")][1:5] == ["caption 1", "of url 1", "of url 1", "caption 4"]
    assert made.source["labels"]["rows_without_sample"] == 2
    put(tmp_path / "one", tmp_path / "two", tmp_path / "a.csv", on="number=id", texts=("short=link",), fields=("line=id",))
    found = read_samples(tmp_path / "two")
    assert found[5].texts == {"text": "caption 5", "long": None, "short": "u1"}
    assert found[2].texts == {"text": "caption 2", "long": "of url 1", "short": None}
    assert (found[5].provenance["line"], found[7].text, found[7].provenance["line"]) == ("5", "caption 7", "7")


def test_parts_and_overwritten_outputs_have_their_labels(source: Path, tmp_path: Path) -> None:
    write_jsonl(tmp_path / "a.jsonl", [{"key": sample(n).key, "caption": "new"} for n in range(12)])
    options: dict[str, Any] = {"texts": ("recap=caption",), "shard_samples": 5}
    whole = put(source, tmp_path / "whole", tmp_path / "a.jsonl", **options)
    assert put(source, tmp_path / "whole", tmp_path / "a.jsonl", overwrite=True, **options).shards == whole.shards
    for number in (1, 0):
        put(source, tmp_path / "parts", tmp_path / "a.jsonl", part=f"{number}/2", **options)
    finalize(FinalizeConfig(output=str(tmp_path / "parts")))
    assert read_manifest(open_store(str(tmp_path / "parts"))).shards == whole.shards


def test_a_value_that_says_nothing_changes_nothing_and_keys_that_are_no_text_are_refused(source: Path, tmp_path: Path) -> None:
    keys = [sample(number).key for number in range(4)]
    table = {"key": keys, "caption": [" \n", "new", None, ""], "score": [float("nan"), 2.5, None, 7.0]}
    pq.write_table(pa.table(table), tmp_path / "a.parquet")
    put(source, tmp_path / "out", tmp_path / "a.parquet", texts=("recap=caption",), fields=("number=score",))
    found = read_samples(tmp_path / "out")[:4]
    assert [one.text for one in found] == ["caption 0", "new", "caption 2", "caption 3"]
    assert [one.texts["recap"] for one in found if one.texts] == [None, "new", None, None]
    assert [one.provenance["number"] for one in found] == [0, 2.5, 2, 7]
    pq.write_table(pa.table({"key": [key.encode() for key in keys], "score": [1, 2, 3, 4]}), tmp_path / "b.parquet")
    with pytest.raises(UsageError, match=r"b.parquet, line 1: a value can't be written as JSON.*bytes"):
        put(source, tmp_path / "no", tmp_path / "b.parquet", fields=("number=score",))
    write_jsonl(tmp_path / "c.jsonl", [{"key": 1 << 70, "score": 1}])
    with pytest.raises(
        UsageError, match=r"c.jsonl, line 1: key is 1.18059e\+21, and numbers of that size are not exact: write texts"
    ):
        put(source, tmp_path / "no", tmp_path / "c.jsonl", fields=("number=score",))


@settings(max_examples=10, deadline=None)
@given(values=st.lists(NAMES, max_size=8), rows=st.lists(st.tuples(NAMES, st.text(max_size=3)), max_size=8))
def test_every_sample_has_the_first_row_of_its_value(values: list[str], rows: list[tuple[str, str]]) -> None:
    place = f"memory://relabel/{next(COUNTER)}"
    samples = [text_sample(n)._replace(provenance={"value": value}) for n, value in enumerate(values)]
    records = [{"value": value, "x": x} for value, x in [*rows, ("none", "x")]]
    open_store(place).put("a.jsonl", b"".join(json.dumps(record).encode() + b"\n" for record in records))
    make_dataset(f"{place}/set", samples or [text_sample(0)._replace(provenance={"value": "x"})])
    first = dict(reversed(rows))
    if first.keys().isdisjoint(values):
        with pytest.raises(UsageError, match="is of any sample"):
            put(f"{place}/set", f"{place}/out", f"{place}/a.jsonl", on="value", fields=("x",))
        return
    put(f"{place}/set", f"{place}/out", f"{place}/a.jsonl", on="value", fields=("x",))
    for number, sample in enumerate(read_samples(f"{place}/out")):
        expected = first.get(values[number], "") if values else ""
        assert sample.provenance.get("x") == (expected if expected.strip() else None)


@pytest.mark.parametrize(
    ("row", "options", "message"),
    [
        (b"{", {}, "--with .*a.jsonl, line 1: bad_json.*: mend it, or take it out"),
        ({"key": "a", "caption": 5}, {}, "line 1: caption is a int, expected a text"),
        ({"key": "a"}, {}, "none of the 1 rows has the column caption"),
        ({"caption": "a"}, {}, "none of the 1 rows has the column key"),
        ({"key": "a", "caption": "b"}, {}, "none of 1 row is of any sample: the rows have a, the samples image-0000"),
        ({"key": "a", "caption": "a", "href": "b"}, {"on": "href"}, "has no field href in the json of its samples"),
        ({}, {"texts": ("caption",)}, "--texts caption: expected NAME=FIELD"),
        ({}, {"texts": (), "fields": ("text=caption",)}, "--fields text: these names are the schema's own"),
        ({}, {"texts": ()}, "at least one says what is put into the samples"),
    ],
)
def test_what_cannot_be_put_in_is_refused(source: Path, tmp_path: Path, row: Any, options: dict[str, Any], message: str) -> None:
    write_jsonl(tmp_path / "a.jsonl", [row])
    with pytest.raises(UsageError, match=message):
        put(source, tmp_path / "out", tmp_path / "a.jsonl", **{"texts": ("recap=caption",), **options})
    assert not (tmp_path / "out").exists()


def test_conversations_get_fields_and_the_command_says_what_came_of_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_dataset(tmp_path / "set", [talk_sample(0, (2, 3), (4, 4))], codes={"vqcode_512": {"codebook_size": 8192}})
    write_jsonl(tmp_path / "a.jsonl", [{"key": talk_sample(0).key, "quality": 5}])
    args = ["relabel", "--input", "set", "--with", "a.jsonl", "--fields", "quality", "--quiet", "--output", "out"]
    assert main([str(tmp_path / word) if word in ("set", "a.jsonl", "out") else word for word in args]) == 0
    said = capsys.readouterr()
    assert "1 of 1 samples (100.0%) get a row of 1" in said.err
    assert "1 of 1 inputs" in said.out
    (found,) = read_samples(tmp_path / "out")
    assert found.provenance == {"quality": 5}
    assert found.conversations == talk_sample(0, (2, 3), (4, 4)).conversations
