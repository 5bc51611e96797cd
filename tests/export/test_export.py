"""Exports to Hugging Face: the rows, their order, what the real libraries read, what is refused, and what a kill leaves."""

from __future__ import annotations

import json
import pickle
import re
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import datasets
import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from commands import wds_tools
from factory import image_sample, make_dataset, multi_sample, random_codes, text_sample
from hypothesis import given
from hypothesis import strategies as st

from wds_tools.dataset import external_sort
from wds_tools.dataset.external_sort import ExternalSort
from wds_tools.errors import FormatError, MissingPackage, NotFound, OutOfSpace, UsageError
from wds_tools.export import hf, output
from wds_tools.export.hf import export_hf
from wds_tools.export.options import ExportConfig, ExportSummary
from wds_tools.export.shuffle import SortedRows, keys_from
from wds_tools.format.manifest import serialize_manifest
from wds_tools.format.schema import Sample
from wds_tools.format.shards import Shards
from wds_tools.run.local import run_tasks
from wds_tools.storage import open_store

NUM_SAMPLES = 60
SCHEMA = {
    "data_type": datasets.Value("string"),
    "text": datasets.Value("string"),
    "length": datasets.Value("int64"),
    "vqcode_512": datasets.Value("string"),
    "vqcode_multi768": datasets.Value("string"),
    "width": datasets.Value("string"),
    "height": datasets.Value("string"),
}
Row = dict[str, Any]


def samples(count: int = NUM_SAMPLES) -> list[Sample]:
    """Documents, square and wide images, in turn."""
    makers = (text_sample, image_sample, multi_sample)
    return [makers[number % 3](number) for number in range(count)]


TURNS = [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "hello"}]


def conversation(**fields: Any) -> Sample:
    return Sample(key="talk", data_type="visual_sft", text="", conversations=TURNS, **fields)


def row(sample: Sample) -> Row:
    """The row that a sample must become, put together in the plainest way."""
    grids = {column: json.dumps(grid.ravel().tolist()) for column, grid in sample.codes.items()}
    return {
        "data_type": sample.data_type,
        "text": sample.text,
        "length": len(sample.text) + 4 * sum(grid.size for grid in sample.codes.values()),
        "vqcode_512": grids.get("vqcode_512", "no"),
        "vqcode_multi768": grids.get("vqcode_multi768", "no"),
        "width": "no" if sample.width is None else str(sample.width),
        "height": "no" if sample.height is None else str(sample.height),
    }


def multiset(rows: list[Row]) -> Counter[tuple[Any, ...]]:
    return Counter(tuple(row.values()) for row in rows)


def export(source: Path | tuple[Path, ...], output: Path | str, **settings: Any) -> ExportSummary:
    inputs = source if isinstance(source, tuple) else (source,)
    defaults = {"num_shards": 4, "quiet": True}
    return export_hf(ExportConfig(input=tuple(map(str, inputs)), output=str(output), **{**defaults, **settings}))


def load(output: Path) -> list[Row]:
    return list(datasets.load_from_disk(str(output)))


def files(folder: Path) -> dict[str, bytes]:
    """Everything in a folder, hidden files too."""
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def in_order(rows: list[Row]) -> list[str]:
    return [row["text"] for row in rows]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("source")
    make_dataset(folder, samples(), shard_samples=7)
    return folder


# The rows


def test_the_features_are_the_references_seven_in_its_order(source: Path, tmp_path: Path) -> None:
    export(source, tmp_path / "out")
    features = datasets.load_from_disk(str(tmp_path / "out")).features
    assert features == datasets.Features(SCHEMA)
    assert list(features) == list(SCHEMA)


@pytest.mark.parametrize(
    ("sample", "expected"),
    [
        (
            text_sample(0, "Grüße, 世界 \0 🙂\n"),
            {"data_type": "text_pretrain", "text": "Grüße, 世界 \0 🙂\n", "length": 14},
        ),
        (text_sample(0, ""), {"data_type": "text_pretrain", "text": "", "length": 0}),
        (
            image_sample(0)._replace(text="a cat", codes={"vqcode_512": np.array([[1, 2], [3, 8191]], "<u2")}),
            {"data_type": "image_text", "text": "a cat", "length": 21, "vqcode_512": "[1, 2, 3, 8191]"},
        ),
        (
            image_sample(0)._replace(text="a cat", codes={"vqcode_512": np.array([[65_536, 262_143]], "<u4")}),
            {"data_type": "image_text", "text": "a cat", "length": 13, "vqcode_512": "[65536, 262143]"},
        ),
        (
            multi_sample(0)._replace(text="far", width=768, height=32, codes={"vqcode_multi768": np.array([[7]], "<u2")}),
            {
                "data_type": "image_text_multi",
                "text": "far",
                "length": 7,
                "vqcode_multi768": "[7]",
                "width": "768",
                "height": "32",
            },
        ),
        (
            image_sample(0)._replace(
                text="kept", codes={"vqcode_512": np.array([[5]], "<u2")}, image=b"...", image_extension="jpg"
            ),
            {"data_type": "image_text", "text": "kept", "length": 8, "vqcode_512": "[5]"},
        ),
        (
            conversation(codes={"vqcode_512": np.array([[1, 2, 3]], "<u2")}, grids={"vqcode_512": [[2, 1], [1, 1]]}),
            {
                "data_type": "visual_sft",
                "text": json.dumps({"conversations": TURNS, "grids": {"vqcode_512": [[2, 1], [1, 1]]}}, separators=(",", ":")),
                "length": 2 + 5 + 12,
                "vqcode_512": "[1, 2, 3]",
            },
        ),
        (
            conversation(),
            {"data_type": "visual_sft", "text": json.dumps({"conversations": TURNS}, separators=(",", ":")), "length": 7},
        ),
    ],
    ids=[
        "document",
        "empty-text",
        "square-image",
        "large-codebook",
        "wide-image",
        "image-beside-its-codes",
        "two-images",
        "conversation",
    ],
)
def test_a_sample_becomes_exactly_this_row_and_what_it_lacks_is_the_word_no(
    sample: Sample, expected: Row, tmp_path: Path
) -> None:
    make_dataset(tmp_path / "in", [sample])
    export(tmp_path / "in", tmp_path / "out")
    missing = dict.fromkeys(("vqcode_512", "vqcode_multi768", "width", "height"), "no")
    assert load(tmp_path / "out") == [{**missing, **expected}]


def test_every_sample_is_in_once_and_the_summary_counts_them(source: Path, tmp_path: Path) -> None:
    summary = export(source, tmp_path / "out")
    assert multiset(load(tmp_path / "out")) == multiset([row(sample) for sample in samples()])
    kinds = {"image_text": 20, "image_text_multi": 20, "text_pretrain": 20}
    assert summary == ExportSummary(rows=NUM_SAMPLES, files=4, data_types=kinds, left_out={})


# Liquid's own trainer


@pytest.mark.slow
def test_what_liquids_trainer_would_take_for_plain_text_is_told_in_the_card_and_on_the_command_line(
    source: Path, tmp_path: Path
) -> None:
    said = wds_tools("export", "hf", "--input", source, "--output", tmp_path / "out", "--num-shards", "2", "--quiet")
    assert said.stderr.startswith("wds-tools: Liquid's own trainer would take 20 image_text_multi rows for plain text")
    assert "--for liquid" in said.stderr
    assert "the others (20 image_text_multi) for plain text" in (tmp_path / "out/README.md").read_text()


@pytest.mark.slow
def test_for_liquid_they_are_left_out_and_counted(source: Path, tmp_path: Path) -> None:
    make_dataset(tmp_path / "talk", [conversation(image=b"...", image_extension="jpg")])  # nothing that has to be encoded first
    inputs = [source, tmp_path / "talk"]
    said = wds_tools("export", "hf", "--input", *inputs, "--output", tmp_path / "out", "--for", "liquid", "--quiet", "--json")
    assert said.stderr == ""
    summary = json.loads(said.stdout)
    assert summary["left_out"] == {"image_text_multi": 20, "visual_sft": 1}
    assert summary["rows"] == 40
    expected = [row(sample) for sample in samples() if sample.data_type != "image_text_multi"]
    assert multiset(load(tmp_path / "out")) == multiset(expected)
    assert "left out: 20 image_text_multi, 1 visual_sft." in (tmp_path / "out/README.md").read_text()
    with pytest.raises(UsageError, match="another export"):
        export(source, tmp_path / "out", resume=True)


def test_an_export_for_liquid_without_any_row_for_it_is_refused(tmp_path: Path) -> None:
    make_dataset(tmp_path / "in", [multi_sample(0)])
    with pytest.raises(UsageError, match="none can be exported for liquid"):
        export(tmp_path / "in", tmp_path / "out", reader="liquid")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("num_pairs", [1, 3, 5])
def test_a_manifest_that_says_of_what_types_samples_are_and_lies_is_refused(tmp_path: Path, num_pairs: int) -> None:
    manifest = make_dataset(tmp_path / "in", [*map(image_sample, range(2)), *map(multi_sample, range(3))])
    types = {"image_text": num_pairs} | ({"image_text_multi": 5 - num_pairs} if num_pairs < 5 else {})
    lied = replace(manifest, shards=Shards.of([replace(manifest.shards[0], data_types=types)]))
    (tmp_path / "in/manifest.json").write_bytes(serialize_manifest(lied))
    with pytest.raises(FormatError, match=f"2 samples of the data types to export, the manifest says {num_pairs}"):
        export(tmp_path / "in", tmp_path / "out", reader="liquid")


# The order


def test_the_order_differs_from_the_inputs_and_from_seed_to_seed(source: Path, tmp_path: Path) -> None:
    orders = [[sample.text for sample in samples()]]
    for seed in (42, 43):
        export(source, tmp_path / str(seed), seed=seed)
        orders.append(in_order(load(tmp_path / str(seed))))
    assert orders[0] != orders[1] != orders[2] != orders[0]


def test_the_order_of_seed_42_is_forever_this_one(tmp_path: Path) -> None:
    make_dataset(tmp_path / "in", [text_sample(number, str(number)) for number in range(12)])
    export(tmp_path / "in", tmp_path / "out", seed=42)
    assert in_order(load(tmp_path / "out")) == ["11", "7", "1", "6", "10", "4", "3", "5", "9", "0", "2", "8"]


@pytest.mark.parametrize("file_format", ["arrow", "parquet"])
def test_the_same_inputs_and_seed_give_the_same_bytes(source: Path, tmp_path: Path, file_format: str) -> None:
    for name in ("one", "two"):
        export(source, tmp_path / name, format=file_format)
    assert files(tmp_path / "one") == files(tmp_path / "two")


def test_neither_format_nor_number_of_files_nor_size_of_buckets_changes_the_order(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    export(source, tmp_path / "arrow")
    expected = load(tmp_path / "arrow")
    monkeypatch.setattr("wds_tools.dataset.external_sort.BUCKET_BYTES", 500)
    monkeypatch.setattr("wds_tools.dataset.external_sort.BUFFER_BYTES", 300)
    export(source, tmp_path / "small", num_shards=7)
    assert load(tmp_path / "small") == expected
    export(source, tmp_path / "parquet", format="parquet", num_shards=3)
    assert pd.read_parquet(tmp_path / "parquet/data").to_dict("records") == expected


def test_several_inputs_are_mixed_through_and_through(tmp_path: Path) -> None:
    make_dataset(tmp_path / "text", [text_sample(number) for number in range(100)])
    make_dataset(tmp_path / "image", [image_sample(number) for number in range(100)])
    export((tmp_path / "text", tmp_path / "image"), tmp_path / "out", num_shards=4)
    kinds = [row["data_type"] for row in load(tmp_path / "out")]
    for begin in range(0, 200, 50):
        assert 10 < kinds[begin : begin + 50].count("image_text") < 40


def test_an_input_named_twice_is_in_twice(source: Path, tmp_path: Path) -> None:
    export((source, source), tmp_path / "out")
    assert multiset(load(tmp_path / "out")) == multiset([row(sample) for sample in samples()] * 2)


# Workers


@pytest.mark.parametrize("reader", ["any", "liquid"])
@pytest.mark.parametrize("file_format", ["arrow", "parquet"])
def test_neither_shares_nor_rounds_nor_buckets_change_a_byte(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, file_format: str, reader: str
) -> None:
    make_dataset(tmp_path / "more", [sample._replace(provenance={"url": "x"}) for sample in samples(30)], shard_samples=4)
    both = (source, tmp_path / "more")
    plain = export(both, tmp_path / "out", num_shards=5, format=file_format, reader=reader)
    before = files(tmp_path / "out")
    read: list[int] = []

    def in_turn(fn: Any, tasks: Sequence[Any], *, workers: int, on_report: Any) -> Iterator[Any]:
        assert workers == 3
        again = pickle.loads(pickle.dumps(fn))  # noqa: S301
        read.append(len(tasks))
        return run_tasks(again, tasks, workers=1, on_report=on_report)

    monkeypatch.setattr(hf, "run_tasks", in_turn)
    monkeypatch.setattr(output, "run_tasks", in_turn)
    monkeypatch.setattr(external_sort, "BUCKET_BYTES", 4000)
    monkeypatch.setattr(external_sort, "BUFFER_BYTES", 1000)
    monkeypatch.setattr(hf, "ROUND_BYTES", 1000)
    shared = export(both, tmp_path / "out", num_shards=5, format=file_format, reader=reader, workers=3, overwrite=True)
    assert files(tmp_path / "out") == before
    assert read == [6, 1] * 4  # four rounds: the shards in six shares, then the files but for the last
    assert shared == plain
    assert plain.passed_over == {"provenance": 30 if reader == "any" else 20}


@pytest.mark.slow
def test_worker_processes_write_the_same_bytes(source: Path, tmp_path: Path) -> None:
    for workers in ("1", "2"):
        wds_tools("export", "hf", "--input", source, "--output", tmp_path / workers, "--num-shards", "5", "--workers", workers)
    assert files(tmp_path / "1") == files(tmp_path / "2")


def test_rounds_are_as_many_as_the_free_disk_asks_for(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    peaks: list[int] = []

    class Watched(SortedRows):
        def __call__(self, low: int, high: int) -> Iterator[bytes]:
            peaks.append(sum(path.stat().st_size for path in (tmp_path / "out/.tmp").rglob("bucket-*")))
            return super().__call__(low, high)

    monkeypatch.setattr(hf, "SortedRows", Watched)
    monkeypatch.setattr(external_sort, "BUCKET_BYTES", 1000)
    export(source, tmp_path / "out", num_shards=10)
    whole, before = peaks[0], files(tmp_path / "out")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=whole))
    peaks.clear()
    export(source, tmp_path / "out", num_shards=10, overwrite=True)
    assert files(tmp_path / "out") == before
    assert max(peaks) < 0.6 * whole


# The shuffle alone


def shuffled(records: list[bytes], *, seed: int = 42, num_buckets: int = 3, buffer_bytes: int = 1 << 20) -> list[bytes]:
    with tempfile.TemporaryDirectory() as folder, mock.patch.object(external_sort, "BUFFER_BYTES", buffer_bytes):
        sort = ExternalSort(Path(folder) / "sort", (num_buckets - 1) * external_sort.BUCKET_BYTES)
        for key, record in zip(keys_from(seed, 0, len(records)).tolist(), records, strict=True):
            sort.add(key, record)
        out = [record for _, record in sort.drain()]
        assert not list(Path(folder).glob("sort/*"))
    return out


@given(
    records=st.lists(st.binary(max_size=40), max_size=80),
    seed=st.integers(0, 2**64 - 1),
    num_buckets=st.integers(1, 50),
    buffer_bytes=st.integers(1, 2000),
)
def test_what_comes_out_is_what_went_in_sorted_by_random_keys(
    records: list[bytes], seed: int, num_buckets: int, buffer_bytes: int
) -> None:
    out = shuffled(records, seed=seed, num_buckets=num_buckets, buffer_bytes=buffer_bytes)
    keys = np.random.Philox(key=seed).random_raw(len(records)) if records else np.zeros(0, np.uint64)
    assert out == [records[place] for place in np.argsort(keys, kind="stable")]
    assert Counter(out) == Counter(records)


def test_each_permutation_of_four_is_about_equally_frequent() -> None:
    records = [b"a", b"b", b"c", b"d"]
    found = Counter(tuple(shuffled(records, seed=seed)) for seed in range(600))
    assert len(found) == 24
    chi_square = sum((count - 25) ** 2 / 25 for count in found.values())
    assert chi_square < 49.7  # 23 degrees of freedom: exceeded once in a thousand


def test_records_that_outgrow_a_batch_of_keys_are_all_there() -> None:
    records = [number.to_bytes(4, "little") for number in range(20_000)]
    out = shuffled(records, num_buckets=16, buffer_bytes=10_000)
    assert out != records
    assert sorted(out) == sorted(records)


def test_a_full_disk_is_named_as_such(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if not Path("/dev/full").exists():
        pytest.skip("needs /dev/full")
    monkeypatch.setattr(external_sort, "BUFFER_BYTES", 1)
    sort = ExternalSort(tmp_path / "sort", 0)
    (tmp_path / "sort/bucket-000000").symlink_to("/dev/full")
    with pytest.raises(OutOfSpace, match="bucket-000000"):
        sort.add(0, b"x")


# What the libraries read


def test_the_files_beside_the_data_are_those_that_save_to_disk_writes(source: Path, tmp_path: Path) -> None:
    rows = [row(sample) for sample in samples()]
    datasets.Dataset.from_list(rows, features=datasets.Features(SCHEMA)).save_to_disk(str(tmp_path / "theirs"), num_shards=4)
    export(source, tmp_path / "ours")
    ours, theirs = files(tmp_path / "ours"), files(tmp_path / "theirs")
    assert "wds-tools" in ours.pop("README.md").decode()
    assert set(json.loads(ours.pop("export.json"))) == set(ours) - {"dataset_info.json"}
    assert sorted(ours) == sorted(theirs)
    assert ours["dataset_info.json"] == theirs["dataset_info.json"]
    our_state, their_state = json.loads(ours["state.json"]), json.loads(theirs["state.json"])
    assert re.fullmatch("[0-9a-f]{16}", our_state.pop("_fingerprint"))
    their_state.pop("_fingerprint")
    assert our_state == their_state
    part = "data-00001-of-00004.arrow"
    our_schema, their_schema = (pa.ipc.open_stream(side[part]).schema for side in (ours, theirs))
    assert our_schema.equals(their_schema, check_metadata=True)


def test_two_exports_are_concatenated_as_the_reference_trainer_does(tmp_path: Path) -> None:
    make_dataset(tmp_path / "text", [text_sample(number) for number in range(10)])
    make_dataset(tmp_path / "image", [image_sample(number) for number in range(10)])
    parts = []
    for name in ("text", "image"):
        export(tmp_path / name, tmp_path / f"{name}-out")
        parts.append(datasets.load_from_disk(str(tmp_path / f"{name}-out")).select(range(5)))
    both = datasets.concatenate_datasets(parts).shuffle(seed=1)
    assert Counter(both["data_type"]) == {"text_pretrain": 5, "image_text": 5}
    assert parts[0]._fingerprint != parts[1]._fingerprint


def test_parquet_is_read_by_pandas_and_load_dataset_and_comes_alone(source: Path, tmp_path: Path) -> None:
    export(source, tmp_path / "out", format="parquet")
    parts = [f"data/train-0000{number}-of-00004.parquet" for number in range(4)]
    assert sorted(files(tmp_path / "out")) == ["README.md", *parts, "export.json"]
    expected = multiset([row(sample) for sample in samples()])
    assert multiset(pd.read_parquet(tmp_path / "out" / "data").to_dict("records")) == expected
    cache = str(tmp_path / "cache")
    by_files = datasets.load_dataset("parquet", data_files=str(tmp_path / "out/data/*.parquet"), split="train", cache_dir=cache)
    assert multiset(list(by_files)) == expected
    assert by_files.features == datasets.Features(SCHEMA)
    by_folder = datasets.load_dataset(str(tmp_path / "out"), cache_dir=cache)
    assert by_folder.num_rows == {"train": NUM_SAMPLES}


def test_files_have_equal_shares_and_are_never_empty(source: Path, tmp_path: Path) -> None:
    assert export(source, tmp_path / "seven", num_shards=7).files == 7
    counts = [len(pa.ipc.open_stream(path).read_all()) for path in sorted((tmp_path / "seven").glob("*.arrow"))]
    assert counts == [9, 9, 9, 9, 8, 8, 8]
    make_dataset(tmp_path / "three", samples(3))
    assert export(tmp_path / "three", tmp_path / "few", num_shards=256).files == 3
    assert sorted(files(tmp_path / "few"))[1:4] == [f"data-0000{number}-of-00003.arrow" for number in range(3)]
    assert len(load(tmp_path / "few")) == 3
    assert export(tmp_path / "three", tmp_path / "small", num_shards=None).files == 1  # less than 256 MiB


def test_many_rows_are_cut_into_batches_and_none_is_lost(tmp_path: Path) -> None:
    make_dataset(tmp_path / "in", [text_sample(number) for number in range(2500)])
    export(tmp_path / "in", tmp_path / "out", num_shards=1)
    table = pa.ipc.open_stream(tmp_path / "out" / "data-00000-of-00001.arrow").read_all()
    assert [len(batch) for batch in table.to_batches()] == [1000, 1000, 500]
    assert len(set(table["text"].to_pylist())) == 2500


@pytest.mark.parametrize("kind", ["memory", "s3"])
def test_an_object_store_gets_the_same_bytes_and_the_temporary_folder_is_emptied(
    kind: str, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    url = f"s3://{request.getfixturevalue('s3').bucket}/exports/one" if kind == "s3" else "memory://exports/one"
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(scratch))
    export(source, url)
    export(source, tmp_path / "out")
    store = open_store(url)
    assert {entry.name: store.read(entry.name) for entry in store.list()} == files(tmp_path / "out")
    assert not list(scratch.iterdir())


# What is refused


def unencoded(number: int) -> Sample:
    return image_sample(number)._replace(codes={}, image=b"...", image_extension="png")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([], "no samples"),
        ([text_sample(0), conversation(image=b"...", image_extension="png")], "without codes: run"),
        ([unencoded(0)], "without codes: run `wds-tools encode` first"),
        ([image_sample(0), unencoded(1)], "image-00000001: .*without codes"),
        (
            [image_sample(0)._replace(codes={"vqcode_1024": random_codes(0, 2, 2)})],
            "without a name .* but vqcode_1024",
        ),
    ],
    ids=["nothing", "images-of-conversations", "images", "some-images", "another-column"],
)
def test_samples_without_a_place_in_the_columns_are_refused(content: list[Sample], message: str, tmp_path: Path) -> None:
    make_dataset(tmp_path / "in", content)
    with pytest.raises(UsageError, match=message):
        export(tmp_path / "in", tmp_path / "out")
    assert not (tmp_path / "out" / "state.json").exists()
    assert not (tmp_path / "out" / ".tmp").exists()


def test_a_wide_image_without_its_size_is_refused(tmp_path: Path) -> None:
    make_dataset(tmp_path / "in", [multi_sample(3)._replace(width=None)])
    with pytest.raises(FormatError, match=r"multi-00000003: .*without width and height"):
        export(tmp_path / "in", tmp_path / "out")


def test_codes_of_different_tokenizers_are_not_mixed(tmp_path: Path) -> None:
    for name in ("one", "two"):
        make_dataset(tmp_path / name, [image_sample(0)], codes={"vqcode_512": {"tokenizer": name, "codebook_size": 8192}})
    with pytest.raises(UsageError, match="different image tokenizers"):
        export((tmp_path / "one", tmp_path / "two"), tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "settings",
    [{"input": ()}, {"format": "csv"}, {"num_shards": 0}, {"num_shards": 100_000}, {"seed": -1}, {"seed": 1 << 64}],
    ids=str,
)
def test_a_setting_that_makes_no_sense_is_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match=f"--{next(iter(settings)).replace('_', '-')}"):
        ExportConfig(**{"input": ("a",), "output": "b", **settings})


def test_an_input_that_is_no_dataset_is_refused_before_the_output_is_touched(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    with pytest.raises(NotFound, match="no such folder"):
        export(tmp_path / "in", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_output_that_is_not_empty_is_refused_and_with_overwrite_replaced(source: Path, tmp_path: Path) -> None:
    export(source, tmp_path / "out", format="parquet", num_shards=8)
    before = files(tmp_path / "out")
    with pytest.raises(UsageError, match="--overwrite"):
        export(source, tmp_path / "out")
    assert files(tmp_path / "out") == before
    export(source, tmp_path / "out", overwrite=True)
    export(source, tmp_path / "fresh")
    assert files(tmp_path / "out") == files(tmp_path / "fresh")


@pytest.mark.parametrize("name", ["notes.txt", "data-00000-of-00004.arrow.bak", "data/train.parquet"])
def test_files_of_any_other_kind_are_never_removed(source: Path, tmp_path: Path, name: str) -> None:
    export(source, tmp_path / "out")
    (tmp_path / "out" / name).parent.mkdir(exist_ok=True)
    (tmp_path / "out" / name).write_bytes(b"precious")
    before = files(tmp_path / "out")
    with pytest.raises(UsageError, match=re.escape(name)):
        export(source, tmp_path / "out", overwrite=True)
    assert files(tmp_path / "out") == before


def test_without_pyarrow_the_message_has_the_pip_line(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(MissingPackage, match=r"pip install 'wds-tools\[convert\]'"):
        export(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()


# What a failure leaves


@pytest.mark.parametrize("output", ["folder", "remote"])
def test_a_failure_leaves_no_temporary_files_and_nothing_that_looks_complete(
    output: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(scratch))
    monkeypatch.setattr("wds_tools.dataset.external_sort.BUFFER_BYTES", 100)
    manifest = make_dataset(tmp_path / "in", samples(), shard_samples=20)
    shard = tmp_path / "in" / manifest.shards[-1].name
    shard.write_bytes(shard.read_bytes()[:5000])
    url = str(tmp_path / "out") if output == "folder" else "memory://exports/failed"
    with pytest.raises(FormatError):
        export(tmp_path / "in", url)
    assert not list(scratch.iterdir())
    assert not (tmp_path / "out" / ".tmp").exists()
    assert [entry.name for entry in open_store(url).list()] == ["README.md", "dataset_info.json"]


KILLED = """
import os, signal, sys
from wds_tools.export import hf, output
from wds_tools.export.hf import export_hf
from wds_tools.export.options import ExportConfig
from wds_tools.storage.local import LocalStore

write, written = LocalStore.write, []

def write_or_die(store, name):
    written.append(name)
    if name.endswith("2-of-00004." + sys.argv[3]):
        os.kill(os.getpid(), signal.SIGKILL)
    return write(store, name)

LocalStore.write = write_or_die
export_hf(ExportConfig(input=(sys.argv[1],), output=sys.argv[2], format=sys.argv[3], num_shards=4, quiet=True))
"""


@pytest.mark.parametrize(
    ("file_format", "read"),
    [
        ("arrow", datasets.load_from_disk),
        ("parquet", partial(datasets.load_dataset, download_mode="force_redownload")),
        ("parquet", lambda out: pd.read_parquet(f"{out}/data")),
    ],
    ids=["load_from_disk", "load_dataset", "pandas"],
)
def test_a_killed_export_cannot_be_read_and_is_repeated_with_overwrite(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, file_format: str, read: Callable[[str], Any]
) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    out = tmp_path / "out"
    ended = subprocess.run([sys.executable, "-c", KILLED, str(source), str(out), file_format], check=False)
    assert ended.returncode == -9
    assert any("1-of-00004" in name for name in files(out))
    with pytest.raises((FileNotFoundError, datasets.exceptions.DatasetGenerationError, pa.ArrowInvalid)):
        read(str(out))
    with pytest.raises(UsageError, match="--overwrite"):
        export(source, out, format=file_format)
    export(source, out, format=file_format, overwrite=True)
    export(source, tmp_path / "undisturbed", format=file_format)
    assert files(out) == files(tmp_path / "undisturbed")


# What it costs

MEASURED = """
import sys
from pathlib import Path
from types import SimpleNamespace
from wds_tools.dataset import external_sort
from wds_tools.export import hf, output
from wds_tools.export.hf import export_hf
from wds_tools.export.options import ExportConfig

external_sort.BUCKET_BYTES = external_sort.BUFFER_BYTES = 4 << 20
export_hf(ExportConfig(input=(sys.argv[1],), output=sys.argv[2], format=sys.argv[3], num_shards=2, quiet=True))
status = Path("/proc/self/status").read_text()  # not ru_maxrss, which a child inherits from whoever started it
print(next(line for line in status.splitlines() if line.startswith("VmHWM")).split()[1])
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc")
@pytest.mark.parametrize("file_format", ["arrow", "parquet"])
def test_memory_does_not_grow_with_the_number_of_rows(tmp_path: Path, file_format: str) -> None:
    def peak_mb(times: int) -> float:
        pages = [f"page {number} " * 1500 for number in range(50)]
        documents = [text_sample(number, pages[number % 50]) for number in range(1500 * times)]
        images = [image_sample(number % 50, side=32)._replace(key=f"i{number}") for number in range(300 * times)]
        make_dataset(tmp_path / f"in-{times}", documents + images, shard_samples=400)
        command = [sys.executable, "-c", MEASURED, *(str(tmp_path / f"{name}-{times}") for name in ("in", "out")), file_format]
        return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout) / 1024

    some, three_times = peak_mb(4), peak_mb(12)
    assert three_times - some < 12, f"{some:.0f} MB for 80 MB of rows, {three_times:.0f} MB for 240 MB"


def test_the_command_line_can_import_the_configuration_without_the_heavy_packages() -> None:
    code = "import sys, wds_tools.export.hf; sys.exit(bool({'pyarrow', 'datasets', 'pandas', 'torch'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
