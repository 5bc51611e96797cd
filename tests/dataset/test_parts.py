"""`--part I/N` and `finalize`: parts know nothing of each other, and together they are the dataset that one run makes."""

from __future__ import annotations

import json
import os
import signal
from dataclasses import replace
from pathlib import Path

import pytest
from commands import last_line, start, tree, wait_until, wds_tools, write_documents, write_jsonl, write_pairs
from s3 import S3Server

from wds_tools.convert import run_conversion
from wds_tools.convert.pairs import PairsConfig
from wds_tools.dataset.lease import Part
from wds_tools.dataset.output import Output, OutputSpec
from wds_tools.encode.encode import EncodeConfig, encode
from wds_tools.storage import open_store

NUM_FILES = 7


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("texts")
    for number in range(NUM_FILES):
        records = ({"text": f"document {number} {i}" if i % 20 else ""} for i in range(100))
        write_documents(folder / f"{number}.jsonl.zst", records)
    return folder


@pytest.fixture(scope="module")
def convert(texts: Path) -> list[str]:
    return ["convert", "documents", "--input", str(texts), "--task-bytes", "1"]


@pytest.fixture(scope="module")
def expected(convert: list[str], tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes | None]:
    output = tmp_path_factory.mktemp("whole") / "out"
    wds_tools(*convert, "--output", output)
    return tree(output)


def finalize(output: Path | str, *options: str, status: int = 0) -> str:
    result = wds_tools("finalize", "--output", output, *options, status=status)
    return last_line(result.stderr) if status else result.stdout


@pytest.mark.slow
def test_parts_in_any_order_and_on_any_number_of_workers_make_the_bytes_of_one_run(
    convert: list[str], expected: dict[str, bytes | None], tmp_path: Path
) -> None:
    output = tmp_path / "out"
    said = finalize(tmp_path / "out", status=1)
    assert "no unfinished dataset" in said
    for part, workers in (("2/3", "1"), ("3/3", "2")):
        out = wds_tools(*convert, "--output", output, "--part", part, "--workers", workers).stdout
        assert f"part     {part}" in out
        assert "fingerprint" not in out
    missing = finalize(output, status=1)
    assert "2 of 7 tasks are not done (task 1, 4); they belong to part 1/3: run these again" in missing
    assert not (output / "manifest.json").exists()
    wds_tools(*convert, "--output", output, "--part", "1/3")
    assert "665 of 700 inputs" in finalize(output)
    assert tree(output) == expected
    assert "665 of 700 inputs" in finalize(output)  # again, and nothing happens
    assert "complete" not in wds_tools(*convert, "--output", output, "--part", "1/3").stderr
    assert tree(output) == expected


@pytest.mark.slow
def test_parts_that_begin_at_the_same_moment_join(convert: list[str], expected: dict[str, bytes | None], tmp_path: Path) -> None:
    parts = [start(*convert, "--output", tmp_path / "out", "--part", f"{part}/4") for part in range(4)]
    for process in parts:
        out, err = process.communicate(timeout=200)
        assert process.returncode == 0, out + err
    finalize(tmp_path / "out")
    assert tree(tmp_path / "out") == expected


def test_a_part_that_finds_the_plan_only_after_it_saw_files_joins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = open_store(str(tmp_path))
    output = Output(store, OutputSpec(num_tasks=1, source={}, parts=2), part=Part(0, 2))
    output.begin()
    (tmp_path / "shard-000000-0000.tar").write_bytes(b"")
    exists = store.exists
    asked: list[str] = []

    def claimed_a_moment_later(name: str) -> bool:
        asked.append(name)
        return asked.count(name) > 1 and exists(name)

    monkeypatch.setattr(store, "exists", claimed_a_moment_later)
    assert output.begin() is None
    assert asked.count("_work/plan.json") == 2


@pytest.mark.slow
def test_a_part_leaves_alone_what_others_are_writing(
    convert: list[str], expected: dict[str, bytes | None], tmp_path: Path
) -> None:
    output = tmp_path / "out"
    wds_tools(*convert, "--output", output, "--part", "1/2")
    (output / ".tmp").mkdir()
    (output / ".tmp/half-a-shard").write_bytes(b"of part 2")
    wds_tools(*convert, "--output", output, "--part", "1/2")
    assert (output / ".tmp/half-a-shard").exists()
    wds_tools(*convert, "--output", output, "--part", "2/2")
    finalize(output)
    assert tree(output) == expected


@pytest.mark.slow
def test_a_part_that_was_killed_is_simply_started_again(
    convert: list[str], expected: dict[str, bytes | None], tmp_path: Path
) -> None:
    output = tmp_path / "out"
    process = start(*convert, "--output", output, "--part", "0/1")
    wait_until(lambda: list((output / "_work").glob("task-*")) or process.poll() is not None, "a task is done")
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    wds_tools(*convert, "--output", output, "--part", "0/1")
    finalize(output)
    assert tree(output) == expected


@pytest.mark.slow
def test_a_run_without_parts_can_do_the_rest(convert: list[str], expected: dict[str, bytes | None], tmp_path: Path) -> None:
    wds_tools(*convert, "--output", tmp_path / "out", "--part", "1/3")
    wds_tools(*convert, "--output", tmp_path / "out", "--resume")
    assert tree(tmp_path / "out") == expected


@pytest.mark.slow
def test_a_part_of_something_else_is_refused(convert: list[str], tmp_path: Path) -> None:
    wds_tools(*convert, "--output", tmp_path / "out", "--part", "1/3")
    failed = wds_tools(*convert, "--output", tmp_path / "out", "--part", "2/3", "--keep", "url", status=2)
    assert 'keep was [], is now ["url"]' in failed.stderr


@pytest.mark.parametrize("part", ["4/3", "1", "1/0", "-1/3", "a/b", "1/3/5", "1.5/3"])
def test_a_part_that_can_not_be_meant_is_refused(part: str, convert: list[str], tmp_path: Path) -> None:
    failed = wds_tools(*convert, "--output", tmp_path / "out", f"--part={part}", status=2)
    assert f"--part {part}: expected I/N, such as 3/64" in failed.stderr
    assert not (tmp_path / "out").exists()


def test_overwriting_is_not_for_parts(convert: list[str], tmp_path: Path) -> None:
    failed = wds_tools(*convert, "--output", tmp_path / "out", "--part", "1/3", "--overwrite", status=2)
    assert "exclude each other" in failed.stderr


@pytest.mark.slow
def test_rejects_are_judged_over_all_parts(tmp_path: Path) -> None:
    good = write_documents(tmp_path / "in/0.jsonl.zst", ({"text": "good"} for _ in range(90)))
    write_documents(tmp_path / "in/1.jsonl.zst", ({"text": ""} for _ in range(20)))
    convert = ["convert", "documents", "--input", str(good.parent), "--output", str(tmp_path / "out"), "--task-bytes", "1"]
    for part in ("0/2", "1/2"):
        wds_tools(*convert, "--part", part, "--max-rejects", "100%")
    assert "20 of 110 inputs can't be used, allowed are 10%" in finalize(tmp_path / "out", status=1)
    assert "90 of 110 inputs" in finalize(tmp_path / "out", "--max-rejects", "20%")


@pytest.mark.slow
def test_more_parts_than_tasks_leave_some_with_nothing_to_do(tmp_path: Path) -> None:
    write_pairs(tmp_path, 2)
    convert = ["convert", "pairs", "--input", str(tmp_path / "pairs.jsonl"), "--output", str(tmp_path / "out")]
    assert "samples  0 of 0 inputs" in wds_tools(*convert, "--part", "2/3").stdout
    for part in ("0/3", "1/3"):
        wds_tools(*convert, "--part", part)
    finalize(tmp_path / "out")
    wds_tools("verify", tmp_path / "out")


def test_codes_of_parts_have_their_provenance(tmp_path: Path) -> None:
    pairs, raw = write_pairs(tmp_path, 4), str(tmp_path / "raw")
    run_conversion(PairsConfig(input=(str(pairs),), output=raw, task_lines=2, quiet=True))
    config = EncodeConfig(input=raw, output=str(tmp_path / "whole"), device="cpu", shard_samples=2, quiet=True)
    encode(config)
    for part in ("0/2", "1/2"):
        encode(replace(config, output=str(tmp_path / "parts"), part=part))
    assert "tiny, 4,096 codes, fp32" in finalize(tmp_path / "parts")
    assert tree(tmp_path / "parts") == tree(tmp_path / "whole")


@pytest.mark.slow
def test_parts_meet_in_an_object_store(s3: S3Server, convert: list[str], expected: dict[str, bytes | None]) -> None:
    url = f"s3://{s3.bucket}/parts-{os.getpid()}"
    for part in (0, 1):
        wds_tools(*convert, "--output", url, "--part", f"{part}/2")
    finalize(url)
    store = open_store(url)
    assert {entry.name: store.read(entry.name) for entry in store.list()} == {
        name: data for name, data in expected.items() if data is not None
    }


@pytest.mark.slow
def test_what_another_release_began_is_refused(convert: list[str], tmp_path: Path) -> None:
    write_jsonl(tmp_path / "out/_work/plan.json", [{"command": "convert documents"}])
    assert "written by another release" in finalize(tmp_path / "out", status=1)
    assert "written by another release" in wds_tools(*convert, "--output", tmp_path / "out", "--resume", status=1).stderr
    assert json.loads((tmp_path / "out/_work/plan.json").read_text()) == {"command": "convert documents"}
