"""`convert documents`: each is a sample or a reject; damage costs what lies behind it in its file, and is written down."""

from __future__ import annotations

import base64
import gzip
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from commands import (
    captions,
    documents,
    image_bytes,
    read_rejects,
    read_samples,
    shared,
    tree,
    write_documents,
)

from wds_tools.check.verify import VerifyConfig, verify
from wds_tools.convert import run_conversion
from wds_tools.convert.documents import DocumentsConfig
from wds_tools.errors import NotFound, UsageError
from wds_tools.format.manifest import Manifest


def convert(output: Path | str, *inputs: Path | str, **settings: Any) -> Manifest:
    settings = {"max_rejects": "100%", "quiet": True, **settings}
    manifest = run_conversion(DocumentsConfig(output=str(output), input=tuple(map(str, inputs)), **settings))
    assert manifest.inputs == manifest.samples + sum(manifest.rejects.values())
    assert verify(VerifyConfig(input=str(output), quiet=True)).problems == ()
    return manifest


def frame(*records: object, **options: Any) -> bytes:
    """Lines of JSON as one zstd frame."""
    lines = b"".join(json.dumps(record).encode() + b"\n" for record in records)
    return zstandard.ZstdCompressor(**options).compress(lines)


def test_a_document_becomes_a_text_sample(tmp_path: Path) -> None:
    texts = ["one", "zwei\n\u2028\x85 drei", "\U0001f600 \0 nul", " padded "]
    path = write_documents(tmp_path / "a.jsonl.zst", ({"url": "u", "text": text} for text in texts))
    manifest = convert(tmp_path / "out", path, keep=("url",))
    samples = read_samples(tmp_path / "out")
    assert captions(samples) == texts
    assert {(s.data_type, s.image, s.width, s.height, s.num_codes) for s in samples} == {("text_pretrain", None, None, None, 0)}
    assert [sample.provenance for sample in samples] == [{"url": "u"}] * 4
    assert manifest.data_types == {"text_pretrain": 4}
    assert sum(row.text_chars for row in manifest.shards) == sum(map(len, texts))


def test_folders_are_searched_below_and_in_order_and_other_files_left_alone(tmp_path: Path) -> None:
    for name in ("b/1.jsonl.zst", "a.jsonl.zst", "b/0/x.jsonl.zst"):
        write_documents(tmp_path / "in" / name, [{"text": name}])
    (tmp_path / "in/notes.txt").write_text("no")
    convert(tmp_path / "out", tmp_path / "in")
    assert captions(read_samples(tmp_path / "out")) == ["a.jsonl.zst", "b/0/x.jsonl.zst", "b/1.jsonl.zst"]


def test_brace_patterns_and_several_inputs_keep_their_order(tmp_path: Path) -> None:
    for name in "abc":
        write_documents(tmp_path / f"{name}.jsonl.zst", [{"text": name}])
    convert(tmp_path / "out", tmp_path / "c.jsonl.zst", tmp_path / "{b,a}.jsonl.zst")
    assert captions(read_samples(tmp_path / "out")) == ["c", "b", "a"]


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        (b"{}", "missing_field"),
        (b'{"text": null}', "missing_field"),
        (b'{"text": 5}', "wrong_type"),
        (b'{"text": ["a"]}', "wrong_type"),
        (b'{"text": ""}', "empty_text"),
        (b'{"text": " \\u00a0\\n"}', "empty_text"),
        (b'{"text": "a"', "bad_json"),
        (b'{"text": "\\ud800"}', "invalid_utf8"),
        (b'{"text": "\xff"}', "invalid_utf8"),
        (b"[]", "not_an_object"),
        (b'{"text": "a", "url": ' + b"[" * 400 + b"]" * 400 + b"}", "unwritable_record"),
    ],
)
def test_an_unusable_record_is_a_reject_with_its_line(tmp_path: Path, record: bytes, reason: str) -> None:
    path = tmp_path / "a.jsonl.zst"
    path.write_bytes(zstandard.compress(b'{"text": "first"}\n\n' + record + b'\n{"text": "last"}'))
    convert(tmp_path / "out", path, keep=("url",))
    assert captions(read_samples(tmp_path / "out")) == ["first", "last"]
    (reject,) = read_rejects(tmp_path / "out")
    assert (reject["source"], reject["line"], reject["reason"]) == (str(path), 3, reason)
    assert reject["detail"]


DAMAGE = {
    "empty_file": b"",
    "truncated_zst": frame({"text": "kept"}) + frame({"text": "lost " * 50})[:-9],
    "corrupt_zst": frame({"text": "kept"}) + frame({"text": "lost"}, write_checksum=True)[:-4] + b"\0\0\0\0",
    "not_zst": frame({"text": "kept"}) + b"garbage behind the last frame",
}


@pytest.mark.parametrize("reason", DAMAGE)
def test_damage_keeps_what_comes_before_it_and_the_other_files(tmp_path: Path, reason: str) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in/a.jsonl.zst").write_bytes(DAMAGE[reason])
    write_documents(tmp_path / "in/b.jsonl.zst", [{"text": "other"}])
    manifest = convert(tmp_path / "out", tmp_path / "in")
    kept = captions(read_samples(tmp_path / "out"))
    assert kept[-1] == "other"
    assert kept[:-1] == ([] if reason == "empty_file" else ["kept", "lost"] if reason == "corrupt_zst" else ["kept"])
    assert manifest.rejects == {reason: 1}
    (reject,) = read_rejects(tmp_path / "out")
    assert (Path(reject["source"]).name, reject["line"]) == ("a.jsonl.zst", len(kept))


@pytest.mark.parametrize("data", [gzip.compress(b'{"text": "a"}\n', mtime=0), b'{"text": "a"}\n'])
def test_a_file_that_is_no_zstd_is_read_as_what_it_is(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "a.jsonl.zst").write_bytes(data)
    convert(tmp_path / "out", tmp_path / "a.jsonl.zst")
    assert captions(read_samples(tmp_path / "out")) == ["a"]


def test_no_inputs_are_named(tmp_path: Path) -> None:
    with pytest.raises(NotFound, match="nowhere"):
        convert(tmp_path / "out", tmp_path / "nowhere")
    (tmp_path / "in").mkdir()
    (tmp_path / "in/notes.md").write_text("no")
    with pytest.raises(NotFound, match=r"one without images, \*\.jsonl, .*what is there: 1 other file, such as notes\.md"):
        convert(tmp_path / "out", tmp_path / "in")
    with pytest.raises(UsageError):
        convert(tmp_path / "out")


def test_shards_close_at_a_count_and_at_a_size_and_keys_go_on(tmp_path: Path) -> None:
    path = write_documents(tmp_path / "a.jsonl.zst", ({"text": str(i)} for i in range(10)))
    by_count = convert(tmp_path / "count", path, shard_samples=4)
    assert [row.samples for row in by_count.shards] == [4, 4, 2]
    by_size = convert(tmp_path / "size", path, shard_bytes=3000)
    assert [row.samples for row in by_size.shards] == [3, 3, 3, 1]
    assert all(row.bytes < 3000 + 1024 + 1024 for row in by_size.shards)
    for name in ("count", "size"):
        assert [sample.key for sample in read_samples(tmp_path / name)] == [f"000000-{i:08d}" for i in range(10)]


def test_workers_and_task_size_decide_on_speed_and_shards_but_not_on_samples(tmp_path: Path) -> None:
    for file in range(6):
        write_documents(tmp_path / f"in/{file}.jsonl.zst", ({"text": f"{file} {i}"} for i in range(20)))
    one = convert(tmp_path / "one", tmp_path / "in", task_bytes=1)
    convert(tmp_path / "two", tmp_path / "in", task_bytes=1, workers=2)
    together = convert(tmp_path / "together", tmp_path / "in")
    assert tree(tmp_path / "one") == tree(tmp_path / "two")
    assert (len(one.shards), len(together.shards)) == (6, 1)
    assert captions(read_samples(tmp_path / "one")) == captions(read_samples(tmp_path / "together"))


# ---- real inputs ----


def test_the_real_documents_come_through_character_for_character(tmp_path: Path) -> None:
    folder = shared("dclm/open")
    manifest = convert(tmp_path / "out", folder / "*.zst", workers=2, task_bytes=1)
    texts = [record["text"] for path in sorted(folder.glob("*.jsonl.zst")) for record in documents(path)]
    assert len(texts) == 1408
    expected = [text for text in texts if text.strip()]
    assert (manifest.samples, manifest.rejects) == (1392, {"empty_text": 16})
    assert captions(read_samples(tmp_path / "out")) == expected


# By file: samples that come out of it, and the reason of the reject that stands for the rest of the file.
BAD_FILES = {
    "bad_checksum": (59, "corrupt_zst"),
    "empty_frame": (0, None),
    "gzip_named": (59, None),
    "needs_dictionary": (0, "corrupt_zst"),
    "plain_text_named": (59, None),
    "second_frame_bad": (59, "truncated_zst"),
    "skippable_only": (0, None),
    "trailing_garbage": (59, "not_zst"),
    "truncated_60": (0, "truncated_zst"),
    "truncated_stream": (85, "truncated_zst"),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_every_damaged_file_has_its_reason_and_keeps_what_comes_before(tmp_path: Path, name: str) -> None:
    manifest = convert(tmp_path / "out", shared(f"malformed/zst/{name}.jsonl.zst"))
    num_samples, reason = BAD_FILES[name]
    assert manifest.samples == num_samples
    of_records = {"empty_text": 1} if num_samples else {}  # each of these files has one
    assert manifest.rejects == of_records | ({reason: 1} if reason else {})


def test_every_bad_line_has_the_outcome_that_it_should(tmp_path: Path) -> None:
    path = shared("malformed/zst") / "bad_lines.jsonl.zst"
    expected = json.loads((path.parent / "bad_lines.expect.json").read_text())
    convert(tmp_path / "out", path)
    by_line = {reject["line"]: reject["reason"] for reject in read_rejects(tmp_path / "out")}
    for case in expected:
        if case["usable"] is not None:
            assert (case["line"] not in by_line) == case["usable"], case
    assert by_line == {
        2: "bad_json",
        3: "missing_field",
        4: "missing_field",
        5: "wrong_type",
        6: "empty_text",
        7: "empty_text",
        12: "invalid_utf8",
        14: "not_an_object",
        16: "invalid_utf8",
    }


def test_a_text_that_begins_with_an_image_is_a_text_and_one_that_is_an_image_is_not(tmp_path: Path) -> None:
    """As a page in Markdown may, that shows a picture in line."""
    image = f"data:image/png;base64,{base64.b64encode(image_bytes(0)).decode()}"
    path = write_documents(tmp_path / "in/a.jsonl.zst", [{"text": "A text."}, {"text": f"{image}) is shown here."}])
    assert convert(tmp_path / "out", path).samples == 2
    path = write_documents(tmp_path / "images/a.jsonl.zst", [{"text": "A text."}, {"text": image}])
    with pytest.raises(UsageError, match="text holds an image"):
        convert(tmp_path / "others", path)


def test_a_field_in_a_column_whose_name_has_a_dot_is_found_in_tables_too(tmp_path: Path) -> None:
    rows = [{"meta.info": {"lang": lang, "body": f"text {number}"}} for number, lang in enumerate(("en", "fr") * 600)]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    chosen = {"text": ("meta.info.body",), "keep": ("lang=meta.info.lang",), "where": 'record["meta.info"].lang == "en"'}
    manifest = convert(tmp_path / "out", tmp_path / "a.parquet", **chosen)
    assert (manifest.samples, manifest.rejects) == (600, {"filtered": 600})
    assert {sample.provenance["lang"] for sample in read_samples(tmp_path / "out")} == {"en"}


def test_a_table_without_any_field_that_is_read_is_rejects_row_by_row(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    pq.write_table(pa.table({"text": ["t"] * 3}), tmp_path / "in/0.parquet")
    pq.write_table(pa.table({"body": ["b"] * 2000}), tmp_path / "in/1.parquet")
    manifest = convert(tmp_path / "out", tmp_path / "in")
    assert (manifest.samples, manifest.rejects) == (3, {"missing_field": 2000})
