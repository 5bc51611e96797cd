"""Liquid's Hugging Face folders and jsonl files come back as shards: the same texts and codes, or a reject."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from commands import read_rejects, read_samples, tree, wds_tools, write_jsonl
from factory import image_sample, make_dataset, multi_sample, random_codes, talk_sample, text_sample
from s3 import S3Server

from wds_tools.convert import run_conversion
from wds_tools.convert.coded import CodedConfig
from wds_tools.errors import FormatError, NotFound, UsageError
from wds_tools.export.hf import export_hf
from wds_tools.export.options import ExportConfig, ParquetConfig
from wds_tools.export.parquet import export_parquet
from wds_tools.format.manifest import Manifest
from wds_tools.format.schema import Sample
from wds_tools.storage import open_store

Row = dict[str, Any]


def pair(number: int, **changes: Any) -> Row:
    """A square image as the reference's script writes it."""
    codes = random_codes(number, 32, 32).ravel().tolist()
    fields = {"data_type": "image_text", "text": f"caption {number}", "length": len(f"caption {number}") + 4 * 1024}
    return {**fields, "vqcode_512": json.dumps(codes), "vqcode_multi768": "no", "width": "no", "height": "no", **changes}


def document(number: int, **changes: Any) -> Row:
    row = pair(number, data_type="text_pretrain", text=f"Grüße {number}", length=7, vqcode_512="no")
    return {**row, **changes}


def wide(number: int, **changes: Any) -> Row:
    codes = random_codes(number, 2, 6).ravel().tolist()
    return pair(number, vqcode_512="no", vqcode_multi768=json.dumps(codes), width="96", height="32", **changes)


def talk(record: Row) -> Row:
    """A conversation with four codes."""
    turns = [{"from": "human", "value": "<image>?"}, {"from": "gpt", "value": "!"}]
    text = json.dumps({"conversations": turns, **record})
    return pair(0, data_type="visual_sft", text=text, vqcode_512="[1, 2, 3, 4]")


def save(rows: list[Row], folder: Path, num_shards: int = 1) -> Path:
    datasets.Dataset.from_list(rows).save_to_disk(str(folder), num_shards=num_shards)
    return folder


def convert(*inputs: Path | str, output: Path | str, **settings: Any) -> Manifest:
    return run_conversion(
        CodedConfig(input=tuple(map(str, inputs)), output=str(output), quiet=True, **{"max_rejects": "0", **settings})
    )


def same(found: list[Sample], expected: list[Row]) -> None:
    """That samples have the texts and codes of these rows, in their order."""
    assert [sample.text for sample in found] == [row["text"] for row in expected]
    for sample, row in zip(found, expected, strict=True):
        for column in ("vqcode_512", "vqcode_multi768"):
            codes = sample.codes[column].ravel().tolist() if column in sample.codes else None
            assert codes == (None if row[column] == "no" else json.loads(row[column]))
        assert sample.length == len(row["text"]) + 4 * sample.num_codes


ROWS = [make(number) for number in range(0, 60, 3) for make in (pair, document, wide)]


@pytest.mark.slow
def test_a_folder_of_save_to_disk_becomes_shards_in_its_order(tmp_path: Path) -> None:
    manifest = convert(save(ROWS, tmp_path / "liquid", num_shards=4), output=tmp_path / "set")
    found = read_samples(tmp_path / "set")
    same(found, ROWS)
    assert manifest.data_types == {"image_text": 20, "image_text_multi": 20, "text_pretrain": 20}
    assert (found[0].codes["vqcode_512"].shape, found[0].codes["vqcode_512"].dtype) == ((32, 32), np.dtype("<u2"))
    assert (found[2].codes["vqcode_multi768"].shape, found[2].width, found[2].height) == ((2, 6), 96, 32)
    assert manifest.codes["vqcode_512"]["tokenizer"] == "chameleon"
    assert manifest.codes["vqcode_512"]["codebook_size"] == 8192
    assert "verify: all is well" in wds_tools("verify", tmp_path / "set").stdout


def test_jsonl_files_give_the_same_samples_as_a_folder(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "temp/part-0.jsonl", ROWS[:31])
    write_jsonl(tmp_path / "temp/part-1.jsonl", ROWS[31:])
    convert(tmp_path / "temp", output=tmp_path / "a", task_lines=7)
    same(read_samples(tmp_path / "a"), ROWS)
    convert(tmp_path / "temp/part-{0,1}.jsonl", output=tmp_path / "b")
    same(read_samples(tmp_path / "b"), ROWS)


def test_codes_may_be_lists_too(tmp_path: Path) -> None:
    rows = [{**row, "vqcode_512": json.loads(row["vqcode_512"])} for row in map(pair, range(3))]
    convert(save(rows, tmp_path / "folder"), write_jsonl(tmp_path / "rows.jsonl", rows), output=tmp_path / "set")
    same(read_samples(tmp_path / "set"), [pair(number) for number in range(3)] * 2)


def contents(sample: Sample) -> tuple[Any, ...]:
    """All of a sample but its key."""
    codes = {column: (grid.dtype.str, grid.tolist()) for column, grid in sample.codes.items()}
    return sample.data_type, sample.text, sample.conversations, sample.grids, sample.width, sample.height, codes


def every_kind(number: int) -> list[Sample]:
    """Every kind of sample that can be exported, conversations with no image, one, and several; and one that has no codes."""
    talks = [talk_sample(number), talk_sample(number, (32, 32)), talk_sample(number, (2, 6), (3, 4), (32, 32))]
    one_grid = talk_sample(number, (32, 32))._replace(grids=None)
    bare = talk_sample(number)._replace(codes={}, grids=None)
    square = image_sample(number, side=32)
    both = square._replace(codes={**square.codes, "vqcode_multi768": random_codes(number, 2, 6)})
    samples = [text_sample(number), square, both, multi_sample(number), *talks, one_grid, bare]
    return [sample._replace(key=f"{number:08d}-{place}") for place, sample in enumerate(samples)]


@pytest.mark.parametrize(
    ("file_format", "codebook_size"),
    [
        ("arrow", 8192),
        ("parquet", 262_144),
        pytest.param("arrow", 262_144, marks=pytest.mark.slow),
        pytest.param("parquet", 8192, marks=pytest.mark.slow),
    ],
)
def test_what_was_exported_comes_back_the_same(tmp_path: Path, file_format: Any, codebook_size: int) -> None:
    samples = [sample for number in range(5) for sample in every_kind(number)]
    if codebook_size > 1 << 16:
        samples = [
            sample._replace(codes={name: grid.astype("<u4") + 200_000 for name, grid in sample.codes.items()})
            for sample in samples
        ]
    made = {"tokenizer": "ibq", "codebook_size": codebook_size, "stride": 16, "weights_hash": "abc"}
    make_dataset(tmp_path / "set", samples, codes=dict.fromkeys(("vqcode_512", "vqcode_multi768"), made))
    settings: dict[str, Any] = {"num_shards": 3, "format": file_format, "quiet": True}
    export_hf(ExportConfig(input=(str(tmp_path / "set"),), output=str(tmp_path / "out"), **settings))
    manifest = convert(tmp_path / "out", output=tmp_path / "back", **made)
    back = read_samples(tmp_path / "back")
    assert sorted(map(contents, back), key=str) == sorted(map(contents, samples), key=str)
    assert sum(sample.length for sample in back) == sum(sample.length for sample in samples)
    assert manifest.inputs == len(samples) == manifest.samples
    assert "left_out" not in manifest.source
    assert "verify: all is well" in wds_tools("verify", tmp_path / "back").stdout
    export_hf(  # the same tokenizer, so that old and new can be exported together
        ExportConfig(input=(str(tmp_path / "set"), str(tmp_path / "back")), output=str(tmp_path / "both"), **settings)
    )


def parquet_export(tmp_path: Path, count: int = 2500) -> Path:
    """Documents in two files."""
    make_dataset(tmp_path / "set", [text_sample(number) for number in range(count)])
    export_hf(
        ExportConfig(input=(str(tmp_path / "set"),), output=str(tmp_path / "out"), format="parquet", num_shards=2, quiet=True)
    )
    return tmp_path / "out"


def test_parquet_is_read_from_an_object_store_and_by_name_with_the_same_bytes(tmp_path: Path, s3: S3Server) -> None:
    folder = parquet_export(tmp_path)
    convert(folder, output=tmp_path / "one", workers=2, task_records=1250)
    convert(str(folder / "data/train-0000{0,1}-of-00002.parquet"), output=tmp_path / "named", task_records=1250)
    store = open_store(f"s3://{s3.bucket}/convert-parquet")
    for path in folder.rglob("*.parquet"):
        store.put(path.relative_to(folder).as_posix(), path.read_bytes())
    convert(store.url, output=tmp_path / "remote", task_records=1250)

    def shards(name: str) -> dict[str, bytes]:
        return {file: data for file, data in tree(tmp_path / name).items() if file.endswith(".tar")}

    assert len(shards("one")) == 2
    assert shards("one") == shards("named") == shards("remote")


def test_an_unfinished_parquet_export_is_refused_and_a_damaged_file_is_a_reject(tmp_path: Path) -> None:
    folder = parquet_export(tmp_path)
    first, last = sorted(folder.rglob("*.parquet"))
    whole = first.read_bytes()
    first.write_bytes(whole[: len(whole) // 2])
    manifest = convert(folder, output=tmp_path / "cut", max_rejects="1")
    assert (manifest.samples, manifest.rejects) == (1250, {"corrupt_parquet": 1})
    first.write_bytes(whole)
    last.write_bytes(b"This export is not finished: run the same command again with --overwrite.\n")
    for source in (folder, last):
        with pytest.raises(UsageError, match=r"train-00001-of-00002\.parquet is no Parquet file .*an unfinished export"):
            convert(source, output=tmp_path / "unfinished")


def codes_export(folder: Path, tokenizer: str, number: int = 0) -> Path:
    """A file of typed columns of a pair and a document."""
    made = {"tokenizer": tokenizer, "codebook_size": 8192, "stride": 16, "weights_hash": None}
    make_dataset(folder / "set", [image_sample(number, side=32), text_sample(number)], codes={"vqcode_512": made})
    export_parquet(ParquetConfig(input=(str(folder / "set"),), output=str(folder / "out"), quiet=True))
    return next((folder / "out").rglob("*.parquet"))


def test_an_export_that_was_written_again_by_others_needs_the_tokenizer_said(tmp_path: Path) -> None:
    table = pq.read_table(codes_export(tmp_path, "emu3"))
    pq.write_table(table.replace_schema_metadata({}), tmp_path / "again.parquet")
    with pytest.raises(UsageError, match="left out what made its codes: say --tokenizer, --codebook-size and --stride"):
        convert(tmp_path / "again.parquet", output=tmp_path / "back")
    manifest = convert(tmp_path / "again.parquet", output=tmp_path / "back", tokenizer="emu3")
    assert (manifest.samples, manifest.codes["vqcode_512"]["tokenizer"]) == (2, "emu3")


def test_every_exported_file_of_a_folder_is_asked_what_made_its_codes(tmp_path: Path) -> None:
    (tmp_path / "both").mkdir()
    for tokenizer in ("chameleon", "emu3"):
        codes_export(tmp_path / tokenizer, tokenizer).rename(tmp_path / f"both/{tokenizer}.parquet")
    with pytest.raises(UsageError, match=r"emu3.parquet says itself how vqcode_512 was made: convert what has other codes apart"):
        convert(tmp_path / "both", output=tmp_path / "back")


@pytest.mark.parametrize("is_ours", [True, False])
@pytest.mark.parametrize("code", [-1, 8192, 70_000])
def test_exported_rows_with_a_code_outside_the_codebook_are_rejects(tmp_path: Path, code: int, is_ours: bool) -> None:
    table = pq.read_table(codes_export(tmp_path, "chameleon"))
    rows = table.to_pylist()
    place = next(place for place, row in enumerate(rows) if row["vqcode_512"])
    rows[place]["vqcode_512"]["codes"][0] = code
    kinds = {field.name: field.type for field in table.schema.field("vqcode_512").type}
    wide = pa.field("vqcode_512", pa.struct(list({**kinds, "codes": pa.list_(pa.int64())}.items())))
    schema = table.schema.set(table.schema.get_field_index("vqcode_512"), wide)
    changed = pa.Table.from_pylist(rows, schema.with_metadata(table.schema.metadata if is_ours else None))
    pq.write_table(changed, tmp_path / "changed.parquet")
    settings = {} if is_ours else {"tokenizer": "chameleon"}
    manifest = convert(tmp_path / "changed.parquet", output=tmp_path / "back", max_rejects="1", **settings)
    assert (manifest.samples, manifest.rejects) == (1, {"bad_codes": 1})


def test_documents_alone_name_no_tokenizer(tmp_path: Path) -> None:
    assert convert(save([document(1)], tmp_path / "in"), output=tmp_path / "set").codes == {}


def test_another_stride_and_codebook_make_other_grids_and_types(tmp_path: Path) -> None:
    codes = list(range(200_000, 200_000 + 16 * 16))
    rows = [pair(0, vqcode_512=json.dumps(codes))]
    settings = {"tokenizer": "ibq", "stride": 32, "codebook_size": 262_144}
    manifest = convert(save(rows, tmp_path / "in"), output=tmp_path / "set", **settings)
    grid_hw = read_samples(tmp_path / "set")[0].codes["vqcode_512"]
    assert (grid_hw.shape, grid_hw.dtype) == ((16, 16), np.dtype("<u4"))
    assert grid_hw.ravel().tolist() == codes
    assert {name: manifest.codes["vqcode_512"][name] for name in settings} == settings


@pytest.mark.parametrize(
    ("row", "reason", "detail"),
    [
        (pair(0, vqcode_512=json.dumps([1] * 1023)), "bad_codes", "vqcode_512 has 1023 codes, expected 32 x 32 at stride 16"),
        (pair(0, vqcode_512=json.dumps([8192] * 1024)), "bad_codes", "whole numbers from 0 to 8191"),
        (pair(0, vqcode_512=json.dumps([-1] * 1024)), "bad_codes", "whole numbers from 0 to 8191"),
        (pair(0, vqcode_512=json.dumps([1.5] * 1024)), "bad_codes", "whole numbers from 0 to 8191"),
        (pair(0, vqcode_512=json.dumps([[1], *[2] * 1023])), "bad_codes", "whole numbers from 0 to 8191"),
        (pair(0, vqcode_512=json.dumps([2**80] * 1024)), "bad_codes", "whole numbers from 0 to 8191"),
        (pair(0, vqcode_512="[1, 2"), "bad_codes", "vqcode_512 is '[1, 2', expected a JSON list"),
        (pair(0, vqcode_512="7"), "bad_codes", "expected a list of codes"),
        (pair(0, vqcode_512="no"), "missing_codes", "image_text without vqcode_512"),
        ({**wide(0), "width": "no"}, "bad_codes", "needs width in pixels, got 'no'"),
        ({**wide(0), "height": "40"}, "bad_codes", "96 x 40 pixels is no whole number of codes at stride 16"),
        (pair(0, data_type="video"), "unknown_data_type", "data_type is 'video'"),
        (pair(0, data_type="visual_sft"), "bad_conversation", "text is 'caption 0', expected the JSON of a conversation"),
        (talk({"conversations": []}), "bad_conversation", "the turns are from: none"),
        (talk({"grids": {"vqcode_512": [[3, 2]]}}), "bad_codes", "has 4 codes, expected 3 x 2"),
        (talk({"grids": {"vqcode_512": [[1, 2], [1, 1]]}}), "bad_codes", "has the shape (1, 4)"),
        (talk({"grids": {"vqcode_512": [[1, -2]]}}), "bad_codes", "expected a list of [height, width]"),
        (talk({"grids": [[2, 2]]}), "bad_codes", "expected an object with the code columns"),
        (talk({}), "bad_codes", "has 4 codes, expected 32 x 32"),
        ({**talk({}), "vqcode_512": "no"}, "missing_codes", "visual_sft with <image>, without vqcode_512 and"),
        (pair(0, text=None), "missing_field", "no text"),
        (pair(0, text=""), "empty_text", "text is empty"),
        (pair(0, data_type="text_pretrain"), "unwritable_record", "text_pretrain has neither image nor codes"),
    ],
)
@pytest.mark.parametrize("kind", ["arrow", "jsonl"])
def test_a_row_that_is_not_what_it_should_be_is_a_reject_with_its_number(
    tmp_path: Path, kind: str, row: Row, reason: str, detail: str
) -> None:
    rows = [pair(1), row, pair(2)]
    source = save(rows, tmp_path / "in") if kind == "arrow" else write_jsonl(tmp_path / "in.jsonl", rows)
    manifest = convert(source, output=tmp_path / "set", max_rejects="1")
    assert (manifest.inputs, manifest.samples, manifest.rejects) == (3, 2, {reason: 1})
    (reject,) = read_rejects(tmp_path / "set")
    assert (reject["line"], reject["reason"]) == (2, reason)
    assert detail in reject["detail"]


def test_an_arrow_file_that_was_cut_off_gives_its_whole_batches_and_says_so(tmp_path: Path) -> None:
    folder = save([document(number) for number in range(2500)], tmp_path / "in")
    (path,) = folder.glob("*.arrow")
    whole = path.read_bytes()
    for name, size, reason in (("a", len(whole) - 8, "truncated_arrow"), ("b", len(whole) - 9000, "corrupt_arrow")):
        path.write_bytes(whole[:size])
        manifest = convert(folder, output=tmp_path / name, max_rejects="1")
        assert manifest.rejects == {reason: 1}
        assert manifest.samples == (2500 if name == "a" else 2000)
        assert "(behind row" in read_rejects(tmp_path / name)[0]["detail"]


def test_files_that_no_state_names_are_not_taken(tmp_path: Path) -> None:
    folder = save([pair(1)], tmp_path / "in")
    (folder / "cache-0123.arrow").write_bytes(next(folder.glob("data*.arrow")).read_bytes())
    assert convert(folder, output=tmp_path / "set").samples == 1
    (tmp_path / "other").mkdir()
    next(folder.glob("data*.arrow")).rename(tmp_path / "other/rows.arrow")
    assert convert(tmp_path / "other", output=tmp_path / "of-any-name").samples == 1


def test_a_folder_that_is_not_one_whole_dataset_is_refused_with_what_to_do(tmp_path: Path) -> None:
    rows = datasets.Dataset.from_list([pair(1), pair(2)])
    datasets.DatasetDict(train=rows, test=rows).save_to_disk(str(tmp_path / "splits"))
    with pytest.raises(UsageError, match=r"holds the splits train, test: name those that you want, as .*splits/train"):
        convert(tmp_path / "splits", output=tmp_path / "set")
    assert convert(tmp_path / "splits/train", output=tmp_path / "train").samples == 2
    folder = save([pair(1)], tmp_path / "in")
    state = json.loads((folder / "state.json").read_text())
    (folder / "state.json").write_text(json.dumps({**state, "_indices_data_files": [{"filename": "indices.arrow"}]}))
    with pytest.raises(UsageError, match="flatten_indices"):
        convert(folder, output=tmp_path / "set")
    (folder / "state.json").write_text(json.dumps({**state, "_data_files": [{"filename": "../other.arrow"}]}))
    with pytest.raises(NotFound, match=r"other.arrow is missing, though its state.json names it"):
        convert(folder, output=tmp_path / "set")
    (folder / "state.json").write_text("[]")
    with pytest.raises(FormatError, match="not what save_to_disk writes"):
        convert(folder, output=tmp_path / "set")
    (folder / "state.json").unlink()
    with pytest.raises(NotFound, match=r"an unfinished save_to_disk: there is no state\.json"):
        convert(folder, output=tmp_path / "set")


@pytest.mark.slow
def test_neither_workers_nor_where_it_lies_change_a_byte(tmp_path: Path, s3: S3Server) -> None:
    folder = save(ROWS, tmp_path / "in", num_shards=4)
    convert(folder, output=tmp_path / "one")
    convert(folder, output=tmp_path / "two", workers=2)
    assert tree(tmp_path / "one") == tree(tmp_path / "two")

    store = open_store(f"s3://{s3.bucket}/convert-hf")
    for path in folder.iterdir():
        store.put(f"in/{path.name}", path.read_bytes())
    wds_tools("convert", "coded", "--input", f"{store.url}/in", "--output", f"{store.url}/set", "--quiet")
    ours = {name: data for name, data in tree(tmp_path / "one").items() if name.endswith((".tar", ".index"))}
    assert {name: store.read(f"set/{name}") for name in ours} == ours
