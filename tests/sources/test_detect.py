"""What a file is, is seen in its first bytes, and said in one line before anything is read or written."""

from __future__ import annotations

import gzip
import json
import pickle
import zipfile
from pathlib import Path

import pytest
import zstandard
from commands import image_bytes, write_documents, write_jsonl, write_pairs
from s3 import S3Server

from wds_tools.convert import run_conversion
from wds_tools.convert.documents import DocumentsConfig
from wds_tools.convert.pairs import PairsConfig
from wds_tools.errors import UsageError
from wds_tools.sources.composite import Containers
from wds_tools.sources.detect import Kind, detect
from wds_tools.sources.inputs import expand_inputs
from wds_tools.sources.record import InputFile
from wds_tools.storage import open_store

SOURCE = Containers(task_lines=10, task_records=10, task_bytes=1 << 20, quiet=True)
OBJECT = b'{"text": "a"}\n'


def kind(path: Path, data: bytes) -> Kind:
    path.write_bytes(data)
    (found,) = detect([InputFile(str(path), len(data))])
    return found


def zipped(folder: Path) -> bytes:
    with zipfile.ZipFile(folder / "x", "w") as file:
        file.writestr("a", "b")
    return (folder / "x").read_bytes()


REFUSED = [
    ("a.jsonl", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", "a Git LFS pointer.*`git lfs pull`"),
    ("a.parquet", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", "a Git LFS pointer"),
    ("a.json.gz", b"<!DOCTYPE html><html>404", "an HTML page"),
    ("a.tar", b"<?xml version='1.0'?><Error>", "XML"),
    ("a.pkl", pickle.dumps([1, 2]), "a pickle, which can run code"),
    ("a.idx", b"MMIDIDX\0\0" + bytes(99), "an index of Megatron-LM"),
    ("a.bin", bytes(range(200)) * 9, "of no kind that is known"),
    ("a.jsonl.xz", b"\xfd7zXZ\0" + bytes(9), "compressed by xz"),
    ("a.mp4", b"\0\0\0\x18ftypisom" + bytes(99), "MP4.*video"),
    ("a.txt", b"once upon a time\n", "text, but no JSON"),
    ("a.parquet", b"an unfinished export", "no Parquet file but text"),
    ("a.tar", b"", "empty"),
    ("a.parquet.gz", gzip.compress(b"PAR1" + bytes(99), mtime=0), "a compressed parquet file"),
    (
        "a.json",
        b'{\n  "a": 1\n}\n',
        "one object; expected a list of records, or one record a line: `jq -c .` writes",
    ),
]


@pytest.mark.parametrize(("name", "data", "message"), REFUSED)
def test_what_is_given_where_something_else_was_meant_is_said(name: str, data: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(data)
    with pytest.raises(UsageError, match=rf"{name} is .*{message}"):
        SOURCE.plan([InputFile(str(tmp_path / name), len(data))])


def test_zips_are_refused_and_images_are_images(tmp_path: Path) -> None:
    assert "zip archive" in kind(tmp_path / "a.npz", zipped(tmp_path)).problem
    assert kind(tmp_path / "noname", image_bytes(1)) == Kind("image")


@pytest.mark.parametrize(
    ("name", "data", "expected"),
    [
        ("a", OBJECT, Kind("lines")),
        ("a.gz", gzip.compress(OBJECT, mtime=0), Kind("lines", "gz")),
        ("a.jsonl", zstandard.compress(OBJECT), Kind("lines", "zst")),
        ("a.jsonl.zst", b"\0\1\2\3damaged", Kind("lines", "zst")),
        ("a.jsonl.gz", b"", Kind("lines", "gz")),
        ("a.json", b'[{"a": 1}]', Kind("list")),
        ("a.json.zst", zstandard.compress(b'[{"a": 1}]'), Kind("list", "zst")),
        ("a.csv", b"a,b\n1,2\n", Kind("csv")),
        ("a.tsv.gz", gzip.compress(b"a\tb\n", mtime=0), Kind("tsv", "gz")),
        ("a.csv", OBJECT, Kind("lines")),
        ("a.jsonl", b"broken\n" + OBJECT, Kind("lines")),
        ("a.json", json.dumps({"messages": [{"role": "user"}]}).encode(), Kind("lines")),
        ("a.json", b'{"broken\n' + OBJECT, Kind("lines")),
        ("a.json", b'{"long": "' + b"x" * 100_000 + b'"}\n', Kind("lines")),
        ("a", b"PAR1" + bytes(99), Kind("parquet")),
        ("a.tgz", gzip.compress(bytes(257) + b"ustar" + bytes(250), mtime=0), Kind("tar", "gz")),
        ("a", b"ARROW1\0\0" + bytes(99), Kind("arrow")),
    ],
)
def test_content_decides_and_the_name_where_it_leaves_open(name: str, data: bytes, expected: Kind, tmp_path: Path) -> None:
    assert kind(tmp_path / name, data) == expected


def test_of_a_folder_what_is_no_data_is_left_out_and_named_and_what_was_meant_as_data_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "in"
    write_jsonl(folder / "a.jsonl", [{"text": "a"}])
    (folder / "b.json.gz").write_bytes(gzip.compress(b'{"text": "b"}\n', mtime=0))
    for name, data in {
        "info.json": b'{\n "x": 1}',
        ".hidden.jsonl": OBJECT,
        "x.gz": gzip.compress(b"read me", mtime=0),
        "c.md": b"c",
    }.items():
        (folder / name).write_bytes(data)
    inputs = expand_inputs([str(folder), str(folder / "*.jsonl")], SOURCE.choose)
    assert [Path(file.url).name for file in inputs.files] == ["a.jsonl", "b.json.gz"]
    assert sorted(Path(url).name for url in inputs.left_out) == [".hidden.jsonl", "c.md", "info.json", "x.gz"]
    assert inputs.source["named_twice"] == {"files": 1, "such_as": str(folder / "a.jsonl")}
    said = capsys.readouterr().err
    assert "4 files of the input folders are not read as records" in said
    assert "1 input is named twice, and read once" in said
    (folder / "z.jsonl").write_bytes(b"<html>dead link")
    with pytest.raises(UsageError, match=r"z\.jsonl is an HTML page"):
        SOURCE.plan(expand_inputs([str(folder)], SOURCE.choose).files)


def test_a_dataset_of_ours_is_no_input_and_below_one_it_is_left_out(tmp_path: Path) -> None:
    write_pairs(tmp_path / "in", 2)
    run_conversion(PairsConfig(input=(str(tmp_path / "in"),), output=str(tmp_path / "out"), quiet=True))
    (tmp_path / "out").rename(tmp_path / "in/out")
    with pytest.raises(UsageError, match=r"in/out is a dataset of wds-tools: it goes into `wds-tools encode`"):
        expand_inputs([str(tmp_path / "in/out")], SOURCE.choose)
    inputs = expand_inputs([str(tmp_path / "in")], SOURCE.choose)
    assert [Path(file.url).name for file in inputs.files] == ["pairs.jsonl"]
    assert any(url.endswith("out/manifest.json") for url in inputs.left_out)


@pytest.mark.parametrize("named", [["in"], ["in/*"]])
def test_what_img2dataset_writes_beside_tars_is_left_out_and_named(
    named: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "in").mkdir()
    tar = bytes(257) + b"ustar" + bytes(10_000)
    for name, data in {"0.tar": tar, "0.parquet": b"PAR1" + bytes(9), "0_stats.json": b'{"count": 1}'}.items():
        (tmp_path / "in" / name).write_bytes(data)
    inputs = expand_inputs(named, SOURCE.choose)
    assert [file.url for file in inputs.files] == ["in/0.tar"]
    assert inputs.left_out == ["in/0.parquet", "in/0_stats.json"]
    inputs = expand_inputs(["in/0.tar", "in/0.parquet"], SOURCE.choose)  # what is named by itself is read
    assert ([file.url for file in inputs.files], inputs.left_out) == (["in/0.tar", "in/0.parquet"], [])


def test_patterns_and_kinds_are_found_in_object_stores(s3: S3Server, tmp_path: Path) -> None:
    store = open_store(f"s3://{s3.bucket}/detect")
    documents = write_documents(tmp_path / "a.zst", [{"text": "c"}]).read_bytes()
    for name, data in {
        "x/a.jsonl": OBJECT,
        "x/y/b.json.gz": gzip.compress(b'[{"text": "b"}]', mtime=0),
        "x/c.zst": documents,
    }.items():
        store.put(name, data)
    inputs = expand_inputs([f"{store.url}/**/*.json*", f"{store.url}/x/c*"], SOURCE.choose)
    tasks, _ = SOURCE.plan(inputs.files)
    assert [record.fields for task in tasks for record in SOURCE.read(task)] == [{"text": text} for text in "abc"]
    manifest = run_conversion(DocumentsConfig(input=(f"{store.url}/x",), output=str(tmp_path / "out"), quiet=True))
    assert manifest.samples == 3
