"""Whole conversions of tars, tables and image folders: the same bytes on any number of workers and after a kill."""

from __future__ import annotations

import gzip
import io
import json
import os
import signal
import tarfile
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from commands import image_bytes, read_rejects, read_samples, start, tree, wait_until, wds_tools

from wds_tools.convert import run_conversion
from wds_tools.convert.documents import DocumentsConfig
from wds_tools.convert.pairs import PairsConfig
from wds_tools.errors import UsageError
from wds_tools.format.manifest import Manifest


def img2dataset_tar(first: int, count: int) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as archive:
        for number in range(first, first + count):
            about = json.dumps({"url": f"http://x/{number}", "similarity": number / 100}).encode()
            files = {"jpg": image_bytes(number), "txt": f"caption {number}".encode(), "json": about}
            for name, data in [(f"._{number}.jpg", b"mac"), *((f"{number}.{suffix}", data) for suffix, data in files.items())]:
                member = tarfile.TarInfo(name)
                member.size = len(data)
                archive.addfile(member, io.BytesIO(data))
    return out.getvalue()


@pytest.fixture
def inputs(tmp_path: Path) -> Path:
    """40 pairs in tars, one of them cut off behind its fifth, 30 in a Parquet file, and 10 in a folder."""
    folder = tmp_path / "in"
    for name in ("tars", "table", "photos"):
        (folder / name).mkdir(parents=True)
    for number in range(3):
        (folder / f"tars/{number}.tar").write_bytes(img2dataset_tar(10 * number, 10))
    whole = img2dataset_tar(30, 10)
    (folder / "tars/3.tar").write_bytes(whole[: len(whole) // 2])
    (folder / "tars/4.tar.gz").write_bytes(gzip.compress(img2dataset_tar(40, 10)))
    rows = [{"image": {"bytes": image_bytes(n), "path": "../../a.jpg"}, "text": f"caption {n}"} for n in range(50, 80)]
    pq.write_table(pa.Table.from_pylist(rows), folder / "table/rows.parquet", row_group_size=10)
    for number in range(80, 90):
        (folder / f"photos/{number}.jpg").write_bytes(image_bytes(number))
        (folder / f"photos/{number}.txt").write_text(f"caption {number}")
    return folder


def names(folder: Path) -> list[str]:
    return [str(folder / name) for name in ("tars", "table", "photos")]


def convert(inputs: list[str], output: Path, **settings: Any) -> Manifest:
    settings = {"task_records": 10, "task_bytes": 1, "max_rejects": "1", "quiet": True, **settings}
    return run_conversion(PairsConfig(input=tuple(inputs), output=str(output), **settings))


def test_every_record_is_a_sample_or_a_reject_and_workers_change_no_byte(inputs: Path, tmp_path: Path) -> None:
    manifest = convert(names(inputs), tmp_path / "one")
    texts = [sample.text for sample in read_samples(tmp_path / "one")]
    cut = [number for number in range(30, 40) if f"caption {number}" not in texts]
    assert texts == [f"caption {number}" for number in range(90) if number not in cut]
    assert 4 <= len(cut) <= 6
    assert manifest.inputs == len(texts) + 1
    (reject,) = read_rejects(tmp_path / "one")
    assert (reject["source"], reject["key"]) == (str(inputs / "tars/3.tar"), str(cut[0]))
    assert reject["reason"] == "truncated_tar"
    assert 44 <= manifest.source["counts"]["members_passed_over"] <= 46
    convert(names(inputs), tmp_path / "two", workers=2)
    assert tree(tmp_path / "two") == tree(tmp_path / "one")


@pytest.mark.slow
def test_a_killed_conversion_of_containers_resumes_to_the_same_bytes(inputs: Path, tmp_path: Path) -> None:
    options = ["--task-records", "10", "--task-bytes", "1", "--max-rejects", "1", "--quiet", "--output"]
    words = ["convert", "pairs", "--input", *names(inputs), *options]
    wds_tools(*words, tmp_path / "peace")
    out = tmp_path / "out"
    process = start(*words, out)
    wait_until(lambda: list(out.glob("_work/task-*.json")) or process.poll() is not None, "a task is done")
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    wds_tools(*words, out, "--resume")
    assert tree(out) == tree(tmp_path / "peace")


def test_of_a_table_documents_reads_what_it_needs_and_sees_every_image(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    rows = [{"raw_content": f"text {n}", "meta": {"url": f"u{n}"}, "score": n, "noise": "x" * 99} for n in range(9)]
    pq.write_table(pa.Table.from_pylist(rows), path)
    where = "score < 5 and len(noise) == 99"
    out = str(tmp_path / "out")
    run_conversion(DocumentsConfig(input=(str(path),), output=out, keep=("url=meta.url",), where=where, quiet=True))
    assert [(one.text, one.provenance) for one in read_samples(tmp_path / "out")] == [
        (f"text {n}", {"url": f"u{n}"}) for n in range(5)
    ]
    pq.write_table(pa.Table.from_pylist([{**row, "picture": image_bytes(0)} for row in rows]), path)
    with pytest.raises(UsageError, match="picture holds an image"):
        run_conversion(DocumentsConfig(input=(str(path),), output=str(tmp_path / "refused"), quiet=True))


def test_a_path_in_a_table_does_not_lead_out_of_the_image_root(tmp_path: Path) -> None:
    (tmp_path / "root").mkdir()
    (tmp_path / "secret.jpg").write_bytes(image_bytes(0))
    paths = ["../secret.jpg", str(tmp_path / "secret.jpg"), "x/../../secret.jpg"]
    table = pa.table({"image": [{"bytes": None, "path": path} for path in paths], "text": ["a"] * 3})
    pq.write_table(table, tmp_path / "a.parquet")
    manifest = convert([str(tmp_path / "a.parquet")], tmp_path / "out", image_root=(str(tmp_path / "root"),), max_rejects="3")
    assert (manifest.samples, manifest.rejects) == (0, {"outside_root": 3})
