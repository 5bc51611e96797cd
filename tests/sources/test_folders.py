"""Folders of images with texts beside them: which files are records, and what these hold."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from s3 import S3Server

from wds_tools.errors import Reject
from wds_tools.records.images import ImageFile
from wds_tools.sources import folders as folders_module
from wds_tools.sources.containers import Unit
from wds_tools.sources.folders import Folders, companions, named_by_records, pictures_of
from wds_tools.sources.record import InputFile, Record
from wds_tools.storage import join, open_store

FILES = {
    "b.JPG": b"1",
    "b.txt": b"caption b",
    "set/a.v1.png": b"22",
    "set/a.v1.caption": b"caption a",
    "set/a.v1.json": json.dumps({"url": "http://x", "png": "of json"}).encode(),
    "set/c.webp": b"333",
    "set/c.webp.txt": b"caption c",
    "set/d.jpeg": b"4",
}


def write(url: str, files: Mapping[str, bytes]) -> list[InputFile]:
    for name, content in files.items():
        open_store(url).put(name, content)
    return [InputFile(join(url, name), len(content)) for name, content in files.items()]


def read(files: list[InputFile]) -> list[Record[Any]]:
    records: list[Record[Any]] = []
    for unit in Folders().units(files):
        found = list(Folders().read(Unit(unit.url, unit.num_bytes, unit.num_records, tuple(json.loads(json.dumps(unit.place))))))
        assert [record.number for record in found] == list(range(unit.num_records or 0))
        assert sum(record.num_units for record in found) == unit.num_bytes
        records += found
    assert sum(record.num_units for record in records) == sum(file.size for file in files)
    return records


def check(url: str) -> None:
    records = read(write(url, FILES))
    assert [record.key for record in records] == ["b", "set/a.v1", "set/c", "set/d"]
    assert [record.source for record in records] == [
        join(url, name) for name in ("b.JPG", "set/a.v1.caption", "set/c.webp", "set/d.jpeg")
    ]
    assert [record.fields for record in records] == [
        {"jpg": ImageFile(join(url, "b.JPG")), "txt": "caption b"},
        {
            "png": ImageFile(join(url, "set/a.v1.png")),
            "caption": "caption a",
            "json": {"url": "http://x", "png": "of json"},
            "url": "http://x",
        },
        {"webp": ImageFile(join(url, "set/c.webp")), "txt": "caption c"},
        {"jpeg": ImageFile(join(url, "set/d.jpeg"))},
    ]


def test_an_image_and_what_lies_beside_it_is_a_record(tmp_path: Path) -> None:
    check(str(tmp_path))


def test_folders_are_read_from_object_storage(s3: S3Server) -> None:
    check(f"s3://{s3.bucket}/source-folders")


def test_units_are_runs_of_samples_whatever_the_order_of_the_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = write(str(tmp_path), FILES)
    monkeypatch.setattr(folders_module, "_UNIT_RECORDS", 2)
    units = list(Folders().units(files))
    assert units == list(Folders().units(files[::-1]))
    assert [unit.place for unit in units] == [
        (("b.JPG", "b.txt"), ("set/a.v1.caption", "set/a.v1.json", "set/a.v1.png")),
        (("c.webp", "c.webp.txt"), ("d.jpeg",)),
    ]
    assert [unit.url for unit in units] == [str(tmp_path), str(tmp_path / "set")]
    monkeypatch.setattr(folders_module, "_UNIT_BYTES", 1)
    assert [unit.num_records for unit in Folders().units(files)] == [1, 1, 1, 1]


def test_a_sidecar_that_cannot_be_used_is_a_reject(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(folders_module, "_MAX_SIDECAR_BYTES", 100)
    texts = {
        "a.txt": b"\xff",
        "b.json": b"{",
        "c.json": b"[1]",
        "d.txt": b"x" * 101,
        "e.TXT": b"",
        "e.txt": b"",
        "f.txt": b"fine",
    }
    images = {f"{name[0]}.jpg": b"1" for name in texts}
    records = read(write(str(tmp_path), {**texts, **images}))
    found = [record.fields.reason if isinstance(record.fields, Reject) else record.key for record in records]
    assert found == ["invalid_utf8", "bad_json", "not_an_object", "sample_too_large", "duplicate_member", "f"]


def test_images_with_their_sidecars_are_taken_and_nothing_else() -> None:
    others = ["x.txt", "notes/readme.txt", ".hidden.jpg", "._b.JPG", "set/e.mp4", "captions.json"]
    assert pictures_of([*FILES, *others]) == {*FILES}
    assert pictures_of(["/a/b.jpg", "/a/b.txt"]) == {"/a/b.jpg", "/a/b.txt"}


def test_tars_name_no_pictures_and_what_is_about_a_folder_of_them_is_not_read() -> None:
    assert named_by_records(["a.jpg", "a.txt"], ["0.tar", "1.TGZ", "2.tar.gz"]) == set()
    pictures = ["x/00000/1.jpg", "x/00001/2.jpg", "train/3.jpg"]
    about = ["x/00000.parquet", "x/00000_stats.json", "y.parquet", "y_stats.json"]
    assert companions([*pictures, *about, "y.tar", "x/00001.parquet", "train.parquet"], pictures) == {*about}


@pytest.mark.parametrize("metadata", ["metadata.jsonl", "metadata.csv", "metadata.parquet", "captions.json"])
def test_images_below_a_folder_with_records_are_those_of_the_records(metadata: str) -> None:
    names = ["other/a.jpg", "other/a.txt", "train/a.jpg", "train/x/b.png", "train/x/b.json", "train2/c.jpg"]
    assert pictures_of([*names, f"train/{metadata}"]) == {*names}
    assert named_by_records(names, [f"train/{metadata}"]) == {"train/a.jpg", "train/x/b.json", "train/x/b.png"}
