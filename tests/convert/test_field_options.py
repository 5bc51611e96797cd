"""Which field is what, and which records are taken: --image, --text, --texts, --keep, --drop and --where."""

from __future__ import annotations

import base64
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from commands import image_bytes, read_samples, shared, tree, write_documents, write_jsonl, write_pairs

from loaders import LoaderConfig, ShardDataset, Source, World, build_loader
from wds_tools.check.verify import VerifyConfig, verify
from wds_tools.cli.main import main
from wds_tools.convert import run_conversion, survey
from wds_tools.convert.documents import DocumentsConfig
from wds_tools.convert.options import ConvertOptions
from wds_tools.convert.pairs import PairsConfig
from wds_tools.encode.encode import EncodeConfig, encode
from wds_tools.errors import TooManyRejects, UsageError
from wds_tools.format.manifest import Manifest
from wds_tools.jobs.finalize import FinalizeConfig, finalize
from wds_tools.sources.record import Record


def convert(kind: type[ConvertOptions], output: Path, source: Path, **options: Any) -> Manifest:
    manifest = run_conversion(kind(input=(str(source),), output=str(output), **{"quiet": True, **options}))
    assert manifest.inputs == manifest.samples + sum(manifest.rejects.values())
    if not options.get("part"):
        assert verify(VerifyConfig(input=str(output), quiet=True)).problems == ()
    return manifest


def texts_of(output: Path) -> list[str]:
    return [sample.text for sample in read_samples(output)]


@pytest.fixture
def scored(tmp_path: Path) -> Path:
    """Six pairs with scores: 0.0, 0.1 ... and none for the last; images of 40 x 32 pixels."""
    path = write_pairs(tmp_path / "in", 6)
    records = [json.loads(line) for line in path.read_text().splitlines()]
    for number, record in enumerate(records):
        record |= {"similarity": number / 10 if number < 5 else None, "url": f"u{number}", "meta": {"lang": "en", "width": 7}}
    return write_jsonl(path, records)


def test_records_that_where_drops_are_counted_listed_nowhere_and_no_fault(scored: Path, tmp_path: Path) -> None:
    manifest = convert(PairsConfig, tmp_path / "out", scored, where="similarity >= 0.3", max_rejects="0")
    assert (manifest.samples, manifest.rejects) == (2, {"filtered": 3, "filtered_missing": 1})
    assert not (tmp_path / "out" / "rejects").exists()
    assert texts_of(tmp_path / "out") == ["caption 3", "caption 4"]
    assert [sample.key[-1] for sample in read_samples(tmp_path / "out")] == ["3", "4"]
    assert manifest.source["plan"]["settings"]["where"] == "similarity >= 0.3"


def test_the_summary_says_what_where_dropped(scored: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    args = ["--input", scored, "--where", "similarity > 0.25", "--output", tmp_path / "out", "--quiet"]
    assert main(["convert", "pairs", *map(str, args)]) == 0
    printed = capsys.readouterr().out
    assert "4 dropped by --where, 1 of them without a field that it names" in printed
    assert "rejects      none" in printed


def test_where_and_keep_may_ask_for_the_image_that_is_displayed(scored: Path, tmp_path: Path) -> None:
    (scored.parent / "images/1.jpg").write_bytes(image_bytes(1, width=64, height=48, kind="PNG"))
    (scored.parent / "images/0.jpg").unlink()
    where = "image_width > 40 and similarity > 0.05 and image_format == 'png' and image_bytes > 60"
    keep = ("w=image_width", "image_height", "image_format", "lang=meta.lang", "u=url", "absent", "similarity")
    manifest = convert(PairsConfig, tmp_path / "out", scored, where=where, keep=keep)
    assert manifest.rejects == {"filtered": 4, "filtered_missing": 1}  # the first one's image is not asked for
    (sample,) = read_samples(tmp_path / "out")
    expected = {"w": 64, "image_height": 48, "image_format": "png", "lang": "en", "u": "u1", "similarity": 0.1}
    assert sample.provenance == expected
    with pytest.raises(UsageError, match=r"image_width: convert documents reads no images; .* record\.NAME"):
        DocumentsConfig(input=("in",), output="out", where="image_width > 3")


def test_neither_workers_nor_parts_change_what_where_keeps(scored: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {"where": "similarity >= 0.3", "keep": ("url",), "task_lines": 2}
    convert(PairsConfig, tmp_path / "one", scored, **options)
    convert(PairsConfig, tmp_path / "two", scored, workers=2, **options)
    for part in ("1/3", "2/3", "3/3"):
        convert(PairsConfig, tmp_path / "parts", scored, part=part, **options)
    finalize(FinalizeConfig(output=str(tmp_path / "parts")))
    assert tree(tmp_path / "two") == tree(tmp_path / "parts") == tree(tmp_path / "one")


def test_a_run_that_keeps_nothing_is_an_error_and_no_dataset(scored: Path, tmp_path: Path) -> None:
    with pytest.raises(TooManyRejects, match=r"none of the 6 records: 6 were dropped \(1 of them lack a field that"):
        convert(PairsConfig, tmp_path / "out", scored, where="similarity > 7")
    assert not (tmp_path / "out" / "manifest.json").exists()
    for part in ("1/2", "2/2"):
        convert(PairsConfig, tmp_path / "parts", scored, where="similarity > 7", part=part)
    with pytest.raises(TooManyRejects, match="keeps none of the 6"):
        finalize(FinalizeConfig(output=str(tmp_path / "parts")))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"where": "similarty > 0.1"}, "--where: none of the first records has a field similarty: did you mean similarity[?]"),
        ({"where": "record.image_width > 3"}, "--where: none of the first records has a field image_width"),
        ({"text": ("captoin",)}, "--text: none of the first records has a field captoin: did you mean caption[?]"),
        ({"image": "img"}, "--image: none of the first records has a field img"),
        ({"texts": ("a=meta.long",)}, r"--texts: none of the first records has a field meta\.long: did you mean meta\.lang"),
    ],
)
def test_a_field_that_no_record_has_is_refused_before_anything_is_written(
    options: dict[str, Any], message: str, scored: Path, tmp_path: Path
) -> None:
    scored.write_text(scored.read_text().replace("text_prompt", "caption"))
    with pytest.raises(UsageError, match=message):
        convert(PairsConfig, tmp_path / "out", scored, **options)
    assert not (tmp_path / "out").exists()


def test_a_field_is_looked_for_in_all_of_the_input(scored: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(survey, "NUM_RECORDS", 1)
    records = [json.loads(line) for line in scored.read_text().splitlines()]
    write_jsonl(scored, [*records[:4], records[4] | {"rare": 5}, records[5]])
    assert convert(PairsConfig, tmp_path / "out", scored, where="rare > 3 and similarity > 0", task_lines=1).samples == 1


def test_several_captions_are_kept_by_name_and_travel_to_training_and_through_encoding(tmp_path: Path) -> None:
    path = write_pairs(tmp_path / "in", 3)
    images = [json.loads(line)["image_path"] for line in path.read_text().splitlines()]
    captions = [{"short": "s0", "Task2": {"Caption": "l0"}}, {"Task2": {"Caption": "l1"}}, {"short": "s2", "Task2": None}]
    write_jsonl(path, [{"image_path": image, **fields} for image, fields in zip(images, captions, strict=True)])
    expected = [{"s": "s0", "l": "l0"}, {"s": None, "l": "l1"}, {"s": "s2", "l": None}]
    raw, coded = tmp_path / "raw", tmp_path / "coded"
    convert(PairsConfig, raw, path, texts=("s=short", "l=Task2.Caption"))
    encode(EncodeConfig(input=str(raw), output=str(coded), tokenizer="tiny", quiet=True))
    for url in (raw, coded):
        assert [sample.texts for sample in read_samples(url)] == expected
        assert texts_of(url) == ["s0", "l1", "s2"]
        assert verify(VerifyConfig(input=str(url), quiet=True)).problems == ()
        assert {sample["text"]: sample["texts"] for sample in ShardDataset(str(url))} == dict(
            zip(("s0", "l1", "s2"), expected, strict=True)
        )
    loader = build_loader(LoaderConfig(sources=(Source(str(coded)),), batch_size=3), World())
    batch = next(iter(loader))
    assert sorted(map(str, batch["texts"])) == sorted(map(str, expected))


def test_an_image_in_the_record_itself_keeps_its_size(tmp_path: Path) -> None:
    data = base64.b64encode(image_bytes(0)).decode()
    source = write_jsonl(tmp_path / "in.jsonl", [{"img": f"data:image/jpeg;base64,{data}", "caption": "a"}])
    convert(PairsConfig, tmp_path / "out", source)
    (sample,) = read_samples(tmp_path / "out")
    assert (sample.image, sample.provenance) == (image_bytes(0), {"image_width": 40, "image_height": 32})


def test_images_inside_parquet_are_found_and_keep_their_size(tmp_path: Path) -> None:
    rows = [{"photo": {"bytes": image_bytes(number), "path": None}, "caption": f"c{number}", "n": number} for number in range(3)]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "in.parquet")
    convert(PairsConfig, tmp_path / "out", tmp_path / "in.parquet", where="image_width == 40 and n > 0", keep=("n",))
    found = [(sample.text, sample.image, sample.provenance) for sample in read_samples(tmp_path / "out")]
    assert found == [(f"c{n}", image_bytes(n), {"image_width": 40, "image_height": 32, "n": n}) for n in (1, 2)]


def test_two_images_stop_a_run_before_it_writes_and_are_rejects_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_pairs(tmp_path / "in", 2)
    two = {"image_path": "images/0.jpg", "image": "images/1.jpg", "text": "x"}
    write_jsonl(path, [{"image_path": "images/0.jpg", "text": "y"}, two])
    assert main(["convert", "pairs", "--input", str(path), "--output", str(tmp_path / "out")]) == 2
    said = capsys.readouterr().err
    assert "pairs.jsonl, line 2: image holds an image beside that of image_path: --image image takes it instead" in said
    assert "--drop image leaves it out" in said
    assert not (tmp_path / "out").exists()
    assert convert(PairsConfig, tmp_path / "dropped", path, drop=("image",)).samples == 2
    assert convert(PairsConfig, tmp_path / "kept", path, keep=("other=image",)).samples == 2
    assert convert(PairsConfig, tmp_path / "chosen", path, where="text == 'y'").samples == 1
    monkeypatch.setattr(survey, "NUM_RECORDS", 1)
    assert convert(PairsConfig, tmp_path / "later", path, max_rejects="1").rejects == {"unused_image": 1}


def run_both(args: Sequence[str | Path], capsys: pytest.CaptureFixture[str]) -> str:
    assert main(list(map(str, args))) == 0
    return capsys.readouterr().err


def test_every_conversion_says_in_two_lines_what_it_reads_and_which_field_is_what(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_pairs(tmp_path / "in", 2)
    write_jsonl(path, [{"img_path": f"images/{i}.jpg", "txt": "a", "caption": "b", "alt": "c"} for i in range(2)])
    said = run_both(
        ["convert", "pairs", "--input", path, "--output", tmp_path / "out", "--texts", "a=alt", "--keep", "ult", "txt"], capsys
    )
    assert "; no ult to keep in the first records" in said
    assert "image = img_path; text = alt (caption, txt passed over); texts.a = alt" in said
    assert "wds-tools: 1 file (" in said
    said = run_both(["convert", "pairs", "--input", path, "--output", tmp_path / "two", "--quiet"], capsys)
    assert said == ""


def test_of_large_records_fewer_are_read_before_anything_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = write_jsonl(tmp_path / "in.jsonl", [{"text": "a" * 100}, {"text": "b"}, {"text": "c", "image": "c.jpg"}])
    with pytest.raises(UsageError, match="line 3: image holds an image"):
        convert(DocumentsConfig, tmp_path / "no", source)
    monkeypatch.setattr(survey, "NUM_UNITS", 100)
    assert convert(DocumentsConfig, tmp_path / "out", source, max_rejects="1").rejects == {"unused_image": 1}


def test_a_record_of_very_many_fields_is_looked_at_within_bounds() -> None:
    look = survey.Survey(lambda _fields: {})
    look.add(Record(0, {f"f{number}": "x" * 1000 for number in range(200_000)}, "in.jsonl"))
    assert len(look.fields) == len(look.examples) == 1000
    assert max(map(len, look.examples.values())) < 70


def test_documents_find_their_text_and_leave_no_image_behind(tmp_path: Path) -> None:
    records = [{"content": "a", "path": "x.c"}, {"raw_content": "b", "text": None}, {"content": "c", "text": "d", "n": 1}]
    source = write_documents(tmp_path / "in.jsonl.zst", records)
    convert(DocumentsConfig, tmp_path / "out", source)
    assert texts_of(tmp_path / "out") == ["a", "b", "d"]
    convert(DocumentsConfig, tmp_path / "other", source, text=("raw_content", "content"), where="not n")
    assert texts_of(tmp_path / "other") == ["a", "b"]
    source = write_documents(tmp_path / "images.jsonl.zst", [*records, {"text": "e", "image": "a.jpg"}])
    with pytest.raises(UsageError, match="line 4: image holds an image, which is not used: --drop image leaves it out"):
        convert(DocumentsConfig, tmp_path / "no", source)
    assert convert(DocumentsConfig, tmp_path / "yes", source, drop=("image",)).samples == 4


@pytest.mark.parametrize(("name", "text"), [("journeydb.jsonl", "a red square"), ("metadata.jsonl", "a red square")])
def test_fields_of_other_names_are_found_without_options(name: str, text: str, tmp_path: Path) -> None:
    convert(PairsConfig, tmp_path / "out", shared("cases/pairs-other-field-names") / name)
    assert texts_of(tmp_path / "out") == [text]
