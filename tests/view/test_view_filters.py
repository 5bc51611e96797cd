"""The viewer's filter and order: what a condition chooses and a field sorts, however the work is cut, and what of it is said."""

from __future__ import annotations

import json
import urllib.parse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from commands import read_samples, tree
from factory import make_dataset, text_sample
from hypothesis import given
from hypothesis import strategies as st
from properties import tries
from viewer import ask, fetch, samples, serving

from wds_tools.dataset.layout import FIELDS
from wds_tools.dataset.reader import read_manifest
from wds_tools.dataset.samples import SampleReader
from wds_tools.errors import UsageError
from wds_tools.format.schema import Sample
from wds_tools.select.fields import Fields
from wds_tools.select.select import SelectConfig, select
from wds_tools.storage import open_store
from wds_tools.view import browse, filters
from wds_tools.view.filters import Ranking, Tables
from wds_tools.view.server import ViewServer

SCORES: list[Any] = [3, 1.5, "high", None, 2, 3, float(10**6), [1], "", -1, 1.5, True, {"a": 1}, "low", 0]
"""Of some samples: numbers, texts, and what has no order."""
CONDITIONS: dict[str, Callable[[Sample], bool]] = {
    "text_chars > 100": lambda one: sum(map(len, texts(one))) > 100,
    "num_codes and width == 96": lambda one: bool(one.codes) and one.width == 96,
    "data_type == 'text_pretrain' or 'talk' in key": lambda one: one.data_type == "text_pretrain" or "talk" in one.key,
    "not width": lambda one: not one.width,
    "key": lambda _: True,
    "bytes < 0": lambda _: False,
}


def texts(sample: Sample) -> list[str]:
    return [sample.text, *(turn["value"] for turn in sample.conversations or ())]


def reader_of(folder: Path) -> SampleReader:
    store = open_store(str(folder))
    return SampleReader(store, read_manifest(store, any_members=True))


def write_scores(folder: Path) -> Path:
    given = [
        text_sample(number)._replace(provenance={} if score is None else {"score": score}) for number, score in enumerate(SCORES)
    ]
    make_dataset(folder, given, shard_samples=4)
    return folder


@pytest.fixture(scope="module")
def scores(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_scores(tmp_path_factory.mktemp("scores") / "set")


def found(folder: Path, query: browse.Query, limit: int, budget_s: float) -> tuple[list[int], int]:
    """The numbers of all that a search finds, call by call, and how many it could not compare."""
    reader = reader_of(folder)
    tables = Tables(reader)
    numbers, wrong_type = list[int](), 0
    after: int | None = 0
    while after is not None:
        answer = browse.search(reader, tables, query, after, limit, budget_s)
        numbers += [card["number"] for card in answer["samples"]]
        wrong_type += answer["wrong_type"]
        after = answer["next"]
    reader.close()
    return numbers, wrong_type


@tries(25)
@given(
    where=st.sampled_from(list(CONDITIONS)),
    text=st.sampled_from(["", "1"]),
    data_type=st.sampled_from(["", "text_pretrain"]),
    limit=st.integers(1, 30),
    budget_s=st.sampled_from([0.0, 10.0]),
)
def test_a_condition_finds_every_match_once_however_the_search_is_cut(
    folder: Path, where: str, text: str, data_type: str, limit: int, budget_s: float
) -> None:
    expected = [
        number
        for number, one in enumerate(samples())
        if CONDITIONS[where](one) and data_type in ("", one.data_type) and any(text in each for each in texts(one))
    ]
    assert found(folder, browse.Query(where=where, text=text, data_type=data_type), limit, budget_s) == (expected, 0)


@pytest.mark.parametrize("where", ["score > 1", "score in ['high', 'low']", "not score", "score > 1 and text_chars"])
def test_the_filter_chooses_what_select_chooses(scores: Path, tmp_path: Path, where: str) -> None:
    numbers, wrong_type = found(scores, browse.Query(where=where), 3, 0.0)
    config = SelectConfig(input=(str(scores),), output=str(tmp_path / "out"), where=where, max_rejects="100%", quiet=True)
    made = select(config)[str(tmp_path / "out")]
    keys = [one.key for one in read_samples(scores)]
    assert [keys[number] for number in numbers] == [one.key for one in read_samples(tmp_path / "out")]
    assert wrong_type == made.rejects.get("wrong_type", 0)


@tries(30)
@given(
    by=st.sampled_from(["score", "-score"]),
    where=st.sampled_from(["", "sample_index != 1"]),
    budget_s=st.sampled_from([0.0, 10.0]),
)
def test_samples_are_put_in_order_by_numbers_then_texts_and_equal_ones_as_they_stand(
    scores: Path, by: str, where: str, budget_s: float
) -> None:
    reader = reader_of(scores)
    ranking = Ranking(Tables(reader), reader, by, where)
    answer = ranking.advance(budget_s)
    while answer["looked_at"] < len(reader):
        answer = ranking.advance(budget_s)
    reader.close()
    chosen = [number for number in range(len(SCORES)) if not where or number % 4 != 1]
    placed = [number for number in chosen if isinstance(SCORES[number], int | float | str)]
    placed.sort(key=lambda number: (isinstance(SCORES[number], str), SCORES[number]), reverse=by.startswith("-"))
    assert answer["numbers"] == placed
    assert (answer["chosen"], answer["without"]) == (len(chosen), len(chosen) - len(placed))


def test_only_the_first_of_an_order_are_kept(scores: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(filters, "MAX_RANKED", 3)
    reader = reader_of(scores)
    assert Ranking(Tables(reader), reader, "sample_index", "").advance(10.0)["numbers"] == [0, 4, 8]
    assert Ranking(Tables(reader), reader, "-sample_index", "").advance(10.0)["numbers"] == [3, 7, 11]
    reader.close()


def ranked(server: ViewServer, query: str) -> Any:
    answer = ask(server, f"/api/ranked?{query}")
    while answer["looked_at"] < 70:
        answer = ask(server, f"/api/ranked?{query}")
    return answer


def test_a_page_of_the_order_shows_its_cards(server: ViewServer) -> None:
    expected = sorted(range(70), key=lambda number: sum(map(len, texts(samples()[number]))), reverse=True)
    first, second = (ranked(server, f"by=-text_chars&first={first}")["samples"] for first in (0, 24))
    assert [card["number"] for card in first + second] == expected[:48]
    assert [card["key"] for card in first] == [samples()[number].key for number in expected[:24]]
    some = ranked(server, "by=text_chars&type=visual_sft&where=sample_index+%3E+11+or+width")
    assert [card["type"] for card in some["samples"]] == ["visual_sft"] * some["ranked"]
    assert some["ranked"] == sum(number % 15 > 11 for number in range(40, 45))


def test_what_can_not_be_ordered_or_chosen_is_said(server: ViewServer) -> None:
    while (answer := fetch(server, "/api/ranked?by=nothing"))[0] == 200:  # a shard a call at least
        assert json.loads(answer[2])["looked_at"] < 70
    assert "'nothing'; the fields are key, shard, sample_index" in json.loads(answer[2])["error"]
    assert "condition on fields" in ask(server, "/api/ranked?by=bytes&text=a", 404)["error"]
    for path in ("/api/search?where=", "/api/ranked?by=bytes&where="):
        assert "not an expression" in ask(server, path + "bytes+%3E", 404)["error"]
        assert "has no place in it" in ask(server, path + urllib.parse.quote("open('x')"), 404)["error"]


def test_a_field_that_no_sample_has_is_named(server: ViewServer) -> None:
    assert ask(server, "/api/search?where=aesthetic+%3E+5+and+bytes")["absent"] == ["aesthetic"]
    assert ask(server, "/api/search?where=deep.a")["absent"] == []
    assert ask(server, "/api/search?text=x")["absent"] is None
    assert ranked(server, "by=bytes&where=aesthetic")["absent"] == ["aesthetic"]
    assert {"key", "bytes", "url", "text_hash"} <= set(ask(server, "/api/fields")["names"])


def test_without_tables_small_shards_are_read_large_ones_refused_and_nothing_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_scores(tmp_path / "set")
    before = tree(folder)
    with serving(folder) as server:
        assert [card["number"] for card in ask(server, "/api/search?where=score+%3E+2.5")["samples"]] == [0, 5, 6]
    monkeypatch.setattr(filters, "SMALL_SHARD_BYTES", 0)
    with serving(folder) as server:
        for path in ("/api/search?where=score+%3E+2.5", "/api/ranked?by=score", "/api/fields"):
            assert f"`wds-tools index {folder} --fields` makes them" in ask(server, path, 404)["error"]
        assert tree(folder) == before
        Fields.make(open_store(str(folder)), read_manifest(open_store(str(folder))))
        assert [card["number"] for card in ask(server, "/api/search?where=score+%3E+2.5")["samples"]] == [0, 5, 6]


def test_tables_of_other_content_and_some_of_the_tables_are_none(tmp_path: Path) -> None:
    folder = write_scores(tmp_path / "set")
    store, manifest = open_store(str(folder)), read_manifest(open_store(str(folder)))
    Fields.make(store, manifest)
    assert Fields.find(store, manifest).home is store
    next((folder / FIELDS).rglob("*.parquet")).unlink()
    assert Fields.find(store, manifest).home is None


def test_a_damaged_table_is_an_error_that_names_it(tmp_path: Path) -> None:
    folder = write_scores(tmp_path / "set")
    Fields.make(open_store(str(folder)), read_manifest(open_store(str(folder))))
    path = min((folder / FIELDS).rglob("*.parquet"))
    path.write_bytes(path.read_bytes()[:-20])
    with serving(folder) as server:
        assert "remove the file, and it is made again" in ask(server, "/api/search?where=score", 422)["error"]


def test_a_condition_is_refused_before_anything_is_read(scores: Path) -> None:
    reader = reader_of(scores)
    with pytest.raises(UsageError, match="not an expression"):
        Tables(reader).chosen("score >", 0)
    reader.close()
