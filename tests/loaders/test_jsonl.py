"""JsonlDataset reads what the conversions read: paths, captions, codes, conversations; and says which line can't be used."""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from commands import image_bytes, write_jsonl
from factory import make_dataset, text_sample
from tokens import write_tokenizer

from loaders import JsonlDataset, LoaderConfig, SequenceConfig, Source, build_loader
from wds_tools.convert import run_conversion
from wds_tools.convert.pairs import PairsConfig
from wds_tools.errors import DataError, FormatError, StorageError, UsageError
from wds_tools.export.hf import export_hf
from wds_tools.export.options import ExportConfig
from wds_tools.format.codes import CodeGrid, join_grids
from wds_tools.format.schema import Sample
from wds_tools.images import prepare
from wds_tools.storage import LocalStore

CODES = list(range(1024))
TURNS = [{"from": "human", "value": "<image> and <image>?"}, {"from": "gpt", "value": "Two."}]
Record = dict[str, Any]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with images a.jpg, b.jpg and one that is damaged."""
    for number, name in enumerate("ab"):
        (tmp_path / f"{name}.jpg").write_bytes(image_bytes(number, 60, 40))
    (tmp_path / "broken.jpg").write_bytes(image_bytes(3)[:300])
    return tmp_path


def dataset(folder: Path, *records: object, **settings: Any) -> JsonlDataset:
    return JsonlDataset(str(write_jsonl(folder / "set/small.jsonl", records)), **settings)


def pixels(path: Path, mode: Any = "cc512") -> torch.Tensor:
    return torch.from_numpy(prepare(path.read_bytes(), mode)).permute(2, 0, 1)


def test_an_image_may_be_a_data_uri(folder: Path) -> None:
    uri = "data:image/jpeg;base64," + base64.b64encode((folder / "a.jpg").read_bytes()).decode()
    assert torch.equal(dataset(folder, {"image_path": uri, "text": "t"})[0]["pixels_CHW"], pixels(folder / "a.jpg"))


@pytest.mark.parametrize("root", [None, ".", "/"])
def test_an_absolute_path_is_taken_where_the_conversion_takes_it(folder: Path, root: str | None) -> None:
    record = {"data_type": "image_text", "text": "t", "image_path": str(folder / "a.jpg")}
    image_root = None if root is None else str(folder / root)
    assert torch.equal(dataset(folder, record, image_root=image_root)[0]["pixels_CHW"], pixels(folder / "a.jpg"))


@pytest.mark.parametrize("path", ["../a.jpg", "/etc/hostname", "https://example.org/a.jpg"])
def test_a_path_that_leaves_the_image_root_is_refused_with_the_line(folder: Path, path: str) -> None:
    (folder / "root").mkdir()
    with pytest.raises(FormatError, match=r"small\.jsonl, line 1: outside_root: "):
        dataset(folder, {"image_path": path, "text": "t"}, image_root=str(folder / "root"))[0]


def test_pairs_are_read_as_convert_reads_them(folder: Path) -> None:
    records = [{"image_path": "../a.jpg", "text_prompt": "first", "text": "second"}, {"image_path": "../b.jpg", "text": "third"}]
    data = dataset(folder, *records)
    config = PairsConfig(input=(str(folder / "set/small.jsonl"),), output=str(folder / "out"), quiet=True)
    run_conversion(config)
    loader = build_loader(LoaderConfig(sources=(Source(str(folder / "out")),), batch_size=2, shuffle=False))
    (batch,) = loader
    assert [item["text"] for item in data] == batch["text"] == ["first", "third"]
    assert [item["data_type"] for item in data] == batch["data_type"]


def exported(folder: Path) -> list[Record]:
    """Rows of Liquid's columns: a square image, a wide one, a document, and a conversation about two."""
    square = np.arange(1024, dtype="<u2").reshape(32, 32)
    wide = np.arange(12, dtype="<u2").reshape(2, 6)
    codes, shapes = join_grids([square, wide], np.dtype("<u2"))
    talk = {"codes": {"vqcode_512": codes}, "grids": {"vqcode_512": shapes}, "conversations": TURNS}
    samples = [
        Sample("a", "image_text", "square", codes={"vqcode_512": square}),
        Sample("b", "image_text_multi", "wide", 96, 32, codes={"vqcode_multi768": wide}),
        text_sample(0, "document"),
        Sample("d", "visual_sft", "", **talk),
    ]
    make_dataset(folder / "in", samples)
    export_hf(ExportConfig(input=(str(folder / "in"),), output=str(folder / "rows"), format="parquet", num_shards=1, quiet=True))
    import pyarrow.parquet as pq

    rows: list[Record] = pq.read_table(folder / "rows/data").to_pylist()
    return sorted(rows, key=lambda row: str(row["data_type"]))


def test_codes_under_liquids_names_keep_their_grids_and_conversations_their_turns(tmp_path: Path) -> None:
    square, wide, document, talk = dataset(tmp_path, *exported(tmp_path))
    assert square["codes"].tolist() == np.arange(1024).reshape(32, 32).tolist()
    assert square["codes"].dtype == torch.int64
    assert (wide["codes"].tolist(), wide["width"], wide["height"]) == (np.arange(12).reshape(2, 6).tolist(), 96, 32)
    assert "codes" not in document
    assert document["text"] == "document"
    assert talk["conversations"] == TURNS
    assert [grid.shape for grid in talk["codes"]] == [(32, 32), (2, 6)]


def test_an_interleaved_document_has_its_images_or_their_codes(folder: Path) -> None:
    text = "A <image> and <image>."
    record = {"data_type": "interleaved", "text": text, "images": [str(folder / "b.jpg"), str(folder / "a.jpg")]}
    (item,) = dataset(folder, record)  # type: ignore[misc]  # a Dataset is no Iterable by its type
    assert item["text"] == text
    assert all(map(torch.equal, item["pixels_CHW"], [pixels(folder / "b.jpg"), pixels(folder / "a.jpg")]))
    codes = {"vqcode_512": [1, 2, 3, 4, 5], "grids": {"vqcode_512": [[2, 2], [1, 1]]}}
    (item,) = dataset(folder, {"data_type": "interleaved", "text": text, **codes})  # type: ignore[misc]
    assert [grid.tolist() for grid in item["codes"]] == [[[1, 2], [3, 4]], [[5]]]
    for wrong in ({**record, "text": "No mark."}, {"data_type": "interleaved", "text": "No mark.", **codes}):
        with pytest.raises(FormatError, match="line 1"):
            dataset(folder, wrong)[0]


def test_one_of_several_texts_is_drawn_by_seed_epoch_and_line(folder: Path) -> None:
    texts = {"alt": "a", "recap": "r", "none": None}
    records = [{"text": "own", "vq_code": CODES, "texts": texts}] * 40
    found = dataset(folder, *records, texts={"alt": 1, "recap": 1, "none": 5})

    def drawn() -> list[str]:
        return [found[number]["text"] for number in range(40)]

    first = drawn()
    assert {*first} == {"a", "r"}
    assert drawn() == first
    found.set_epoch(1)
    assert drawn() != first
    assert {item["text"] for item in dataset(folder, *records)} == {"own"}  # type: ignore[attr-defined]
    for record, reason in (
        ({"text": "t", "vq_code": CODES}, "unknown_text"),
        ({**records[0], "texts": {"alt": 1}}, "wrong_type"),
    ):
        with pytest.raises(FormatError, match=reason):
            dataset(folder, record, texts={"alt": 1})[0]


def test_a_conversation_has_its_images(folder: Path) -> None:
    (item,) = dataset(folder, {"conversations": TURNS, "image": ["../a.jpg", "../b.jpg"]})
    assert item["data_type"] == "visual_sft"
    assert item["conversations"] == TURNS
    for found, name in zip(item["pixels_CHW"], "ab", strict=True):
        assert torch.equal(found, pixels(folder / f"{name}.jpg"))


BAD: list[tuple[Record, str]] = [
    ({"text": "t"}, "unknown_data_type"),
    ({"data_type": "image_text", "text": "t"}, "missing_field: no image_path"),
    ({"data_type": "image_text", "image_path": "../a.jpg"}, "missing_field: no text_prompt or text"),
    ({"data_type": "text_pretrain", "text": "t", "image_path": "../a.jpg"}, "wrong_type: text_pretrain with image_path"),
    ({"data_type": "text_pretrain", "text": "t", "vqcode_512": CODES}, "wrong_type: text_pretrain with vqcode_512"),
    ({"data_type": "image_text", "text": "t", "vqcode_512": "[1, 2]"}, "bad_codes: vqcode_512 has 2 codes"),
    ({"text": "t", "image_path": "../nowhere.jpg"}, "missing_image"),
    ({"text": "t", "image_path": "../broken.jpg"}, "truncated_image"),
    ({"conversations": TURNS, "image": "../a.jpg"}, "image_marks"),
    ({"conversations": TURNS[:1], "image": "../a.jpg"}, "bad_conversation"),
]


@pytest.mark.parametrize(("record", "reason"), BAD, ids=[reason for _, reason in BAD])
def test_what_can_not_be_used_is_named_with_its_file_and_line(folder: Path, record: Record, reason: str) -> None:
    data = dataset(folder, b"", record)
    with pytest.raises(FormatError, match=re.escape(f"small.jsonl, line 2: {reason}")):
        data[0]


def test_a_storage_that_fails_is_told_by_its_own_error_with_the_line(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = dataset(folder, {"image_path": "../a.jpg", "text": "fine"})

    def read_range(*_: Any) -> None:
        raise StorageError(5, "Input/output error")

    monkeypatch.setattr(LocalStore, "read_range", read_range)
    with pytest.raises(StorageError, match=r"small\.jsonl, line 1") as caught:
        data[0]
    assert caught.value.errno == 5


def test_validate_reads_everything_and_reports_every_bad_record(folder: Path) -> None:
    good = {"image_path": "../a.jpg", "text": "fine"}
    report = dataset(folder, good, *(record for record, _ in BAD), b"{", good).validate()
    assert report["records"] == 13
    assert report["bad"] == {
        "bad_codes": 1,
        "bad_conversation": 1,
        "bad_json": 1,
        "image_marks": 1,
        "missing_field": 2,
        "missing_image": 1,
        "truncated_image": 1,
        "unknown_data_type": 1,
        "wrong_type": 2,
    }
    assert [int(said.split("line ")[1].split(":")[0]) for said in report["problems"]] == list(range(2, 13))
    assert dataset(folder, good).validate() == {"records": 1, "bad": {}, "problems": []}


@pytest.mark.parametrize("num_workers", [0, 2])
def test_bad_records_are_substituted_by_the_next_good_one_and_counted_in_all_workers(folder: Path, num_workers: int) -> None:
    good = [{"data_type": "text_pretrain", "text": f"good {number}"} for number in range(3)]
    missing, broken = {"image_path": "../no.jpg", "text": "t"}, {"image_path": "../broken.jpg", "text": "t"}
    data = dataset(folder, good[0], missing, broken, good[1], good[2], missing, on_error="substitute")
    loader = torch.utils.data.DataLoader(data, batch_size=None, num_workers=num_workers)
    assert [item["text"] for item in loader] == ["good 0", "good 1", "good 1", "good 1", "good 2", "good 0"]
    assert data.stats() == {"bad": 3, "bad_missing_image": 2, "bad_truncated_image": 1}


def test_more_bad_records_than_allowed_stop_the_run(folder: Path) -> None:
    bad, good = {"image_path": "../no.jpg", "text": "t"}, {"data_type": "text_pretrain", "text": "good"}
    data = dataset(folder, bad, good, bad, good, on_error="substitute", max_bad=1)
    assert [data[0]["text"], data[0]["text"]] == ["good", "good"]
    with pytest.raises(DataError, match=r"2 records can't be used, max_bad=1; one of them: .*line 3: missing_image"):
        data[2]


def test_a_file_of_bad_records_is_an_error_not_an_endless_search(folder: Path) -> None:
    with pytest.raises(FormatError, match="nor can any of the next 64 be used"):
        dataset(folder, {"text": "t"}, on_error="substitute")[0]


def test_size_mode_and_transform_say_what_an_image_becomes(folder: Path) -> None:
    record = {"image_path": "../a.jpg", "text": "t"}
    image = folder / "a.jpg"
    assert torch.equal(dataset(folder, record, size=24)[0]["pixels_CHW"], pixels(image, 24))
    assert dataset(folder, record, size=24)[0]["pixels_CHW"].shape == (3, 24, 24)
    assert dataset(folder, record, mode=None)[0]["pixels_CHW"].shape == (3, 40, 60)
    multi = dataset(folder, record, mode="multi768")[0]
    assert (multi["data_type"], multi["pixels_CHW"].shape) == ("image_text_multi", (3, 608, 960))

    def halved(pixels_CHW: torch.Tensor) -> torch.Tensor:
        return pixels_CHW[:, ::2, ::2] / 255

    found = dataset(folder, record, size=24, transform=halved)[0]["pixels_CHW"]
    assert torch.equal(found, pixels(image, 24)[:, ::2, ::2] / 255)


@pytest.mark.parametrize("settings", [{"size": 0}, {"size": 24, "mode": "multi768"}, {"stride": 3}, {"on_error": "skip"}])
def test_settings_that_mean_nothing_are_refused(folder: Path, settings: Record) -> None:
    with pytest.raises(UsageError):
        dataset(folder, {"data_type": "text_pretrain", "text": "t"}, **settings)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_tokenizer(tmp_path_factory.mktemp("tokens") / "tokenizer"))


def test_token_rows_are_those_that_build_loader_makes(tmp_path: Path, tokenizer: str) -> None:
    records = exported(tmp_path)
    sequences = SequenceConfig(tokenizer=tokenizer, max_length=1200, codebook_size=8192, t2i_ratio=1, unconditional_ratio=0)
    data = dataset(tmp_path, *records, sequences=sequences)
    loader = torch.utils.data.DataLoader(data, batch_size=4, collate_fn=data.collate, num_workers=1)
    (batch,) = loader
    config = LoaderConfig(sources=(Source(str(tmp_path / "in")),), batch_size=4, shuffle=False, sequences=sequences)
    (expected,) = build_loader(config)
    assert batch["__key__"] == ["1", "2", "3", "4"]
    for row, other in zip(batch["input_ids"], expected["input_ids"], strict=True):  # wordings are drawn by key
        assert set(row[row > 2000].tolist()) == set(other[other > 2000].tolist())
    assert batch.keys() == expected.keys()
    assert torch.equal(batch["labels"][3], expected["labels"][3])


def test_the_choices_of_token_rows_depend_on_seed_and_epoch(tmp_path: Path, tokenizer: str) -> None:
    records = [{"text": f"caption {number}", "vq_code": [1, 2, 3, 4]} for number in range(20)]

    def rows(seed: int, epoch: int) -> list[Any]:
        sequences = SequenceConfig(tokenizer=tokenizer, max_length=200, codebook_size=8192)
        data = dataset(tmp_path, *records, sequences=sequences, seed=seed)
        data.set_epoch(epoch)
        ids: list[Any] = data.collate(list(data))["input_ids"].tolist()
        return ids

    assert rows(1, 0) == rows(1, 0)
    assert len({json.dumps(rows(*place)) for place in ((1, 0), (1, 1), (2, 0))}) == 3


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        ({"text": "t", "vq_code": [9000]}, "code_out_of_range"),
        ({"text": "t", "vq_code": list(range(300))}, "too_long"),
        ({"text": "t", "image_path": "../a.jpg"}, "no_codes"),
    ],
)
def test_a_record_that_makes_no_token_row_is_a_bad_one(folder: Path, tokenizer: str, record: Record, reason: str) -> None:
    sequences = SequenceConfig(tokenizer=tokenizer, max_length=200, codebook_size=8192)
    data = dataset(folder, record, sequences=sequences)
    assert data.validate()["bad"] == {reason: 1}
    with pytest.raises(FormatError, match=f"line 1: {reason}"):
        data[0]


LAYOUTS = [
    (CodeGrid(layout="n", codebook_size=9), [8, 0, 3]),
    (CodeGrid(codebook_size=9), [[8, 0, 3], [1, 2, 4]]),
    (CodeGrid(layout="hwk", codebook_size=(9, 300)), [[[8, 299], [0, 9]]]),
    (CodeGrid(layout="thwk", codebook_size=9), [[[[1, 2]], [[3, 4]]], [[[5, 6]], [[7, 8]]]]),
    (CodeGrid(layout="hwd", dtype="bfloat16"), [[[0.5, -1], [2, 3.25]]]),
]


@pytest.mark.parametrize(("layout", "codes"), LAYOUTS, ids=[layout.layout for layout, _ in LAYOUTS])
def test_a_vq_code_of_any_layout_has_its_axes_and_another_is_refused(folder: Path, layout: CodeGrid, codes: Any) -> None:
    beyond = np.where(np.array(codes) == np.max(codes), 1e300 if layout.is_float else 300, codes).tolist()
    deeper = [[[[[1, 2], [3, 4]], [[1, 2], [3, 4]]]] * 2] * 2
    values = [codes, json.dumps(codes), beyond, deeper, "[[1], [2, 3]]"]
    data = dataset(folder, *({"text": "t", "vq_code": value} for value in values), layout=layout)
    for number in (0, 1):
        assert data[number]["codes"].tolist() == codes
        assert data[number]["codes"].dtype == (torch.float32 if layout.is_float else torch.int64)
    problems = [said.partition(", line ")[2][:12] for said in data.validate()["problems"]]
    assert problems == [f"{line}: bad_codes" for line in (3, 4, 5)]


def test_a_layout_that_is_a_word_is_refused(folder: Path) -> None:
    with pytest.raises(UsageError, match=r"layout='hw', expected a CodeGrid"):
        dataset(folder, {"text": "t", "vq_code": [[1]]}, layout="hw")


def test_token_rows_need_a_template_that_orders_the_layout(folder: Path, tokenizer: str) -> None:
    sequences = SequenceConfig(tokenizer=tokenizer, max_length=200, codebook_size=8192)
    rows = []
    for codes, layout in ([[[1, 2], [3, 4]], "hw"], [[1, 2, 3, 4], "n"]):
        data = dataset(folder, {"text": "t", "vq_code": codes}, sequences=sequences, layout=CodeGrid(layout=layout))
        rows.append(data.collate([data[0]])["input_ids"].tolist())
    assert rows[0] == rows[1]
    with pytest.raises(UsageError, match=r"vq_code has 16 codes \(hwk\), of which template liquid can't make the ids"):
        dataset(folder, {"text": "t"}, sequences=sequences, layout=CodeGrid(layout="hwk", codebook_size=16))


def test_collate_without_sequences_says_what_it_needs(folder: Path) -> None:
    data = dataset(folder, {"data_type": "text_pretrain", "text": "t"})
    collate: Callable[..., Any] = data.collate
    with pytest.raises(UsageError, match="sequences=SequenceConfig"):
        collate([data[0]])
