"""Killed at any moment and run again, the bytes are those of an undisturbed run, and nothing is left behind."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
from commands import (
    disturb,
    image_bytes,
    last_line,
    session,
    start,
    tree,
    wait_until,
    wds_tools,
    workers_of,
    write_documents,
    write_jsonl,
    write_pairs,
)

SEED = 20261122
NUM_FILES = 4
PAIRS_PER_FILE = 30


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of several jsonl files; every tenth line is unusable."""
    folder = tmp_path_factory.mktemp("pairs")
    for file in range(NUM_FILES):
        path = write_pairs(folder / str(file), PAIRS_PER_FILE)
        lines = path.read_bytes().splitlines()
        lines[::10] = [b'{"image_path": "nowhere.jpg", "text_prompt": "x"}'] * len(lines[::10])
        write_jsonl(path, lines)
    return folder


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of many small .jsonl.zst files."""
    folder = tmp_path_factory.mktemp("texts")
    rng = random.Random(SEED)
    for file in range(30):
        words = ("".join(rng.choices("abcdefgh ", k=60)) for _ in range(200))
        write_documents(folder / f"{file:03d}.jsonl.zst", ({"text": word if i % 20 else ""} for i, word in enumerate(words)))
    return folder


def convert_pairs(pairs: Path) -> list[str]:
    return ["convert", "pairs", "--input", str(pairs), "--task-lines", "6", "--shard-samples", "4"]


def convert_documents(texts: Path) -> list[str]:
    return ["convert", "documents", "--input", str(texts), "--task-bytes", "1", "--shard-samples", "70"]


@pytest.fixture(scope="module")
def raw(pairs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dataset to encode, of many shards, with one image that does not decode."""
    folder = tmp_path_factory.mktemp("raw")
    path = write_pairs(folder / "in", 40)
    (folder / "in/images/7.jpg").write_bytes(image_bytes(7, 200, 150)[:2000])
    wds_tools("convert", "pairs", "--input", path, "--output", folder / "out", "--task-lines", "4", "--workers", "2")
    return folder / "out"


def encode(raw: Path, device: str = "cpu") -> list[str]:
    return ["encode", "--input", str(raw), "--device", device, "--shard-samples", "4"]


def encode_straight(pairs: Path, device: str = "cpu") -> list[str]:
    return [*convert_pairs(pairs), "--encode", "tiny", "--device", device]


@pytest.fixture(scope="module")
def peace(tmp_path_factory: pytest.TempPathFactory) -> Callable[[list[str]], tuple[dict[str, bytes | None], float]]:
    """What a command makes when nobody disturbs it, and how long it works at most; run once."""
    known: dict[tuple[str, ...], tuple[dict[str, bytes | None], float]] = {}

    def run(args: list[str]) -> tuple[dict[str, bytes | None], float]:
        if tuple(args) not in known:
            output = tmp_path_factory.mktemp("peace") / "out"
            begun = time.monotonic()
            wds_tools(*args, "--output", output)
            known[tuple(args)] = (tree(output), time.monotonic() - begun)
            assert not [name for name in tree(output) if name.startswith(("_work", ".tmp"))]
        return known[tuple(args)]

    return run


Peace = Callable[[list[str]], tuple[dict[str, bytes | None], float]]


def check_kills(
    args: list[str],
    peace: Peace,
    tmp_path: Path,
    *,
    workers: int,
    num_kills: int = 2,
    rounds: int = 1,
    like: list[str] | None = None,
) -> None:
    """What is left of a run that was killed, once it has gone on to its end, is what `like` (`args` itself) makes in peace."""
    expected, work_s = peace(like or args)
    print("seed of the kills:", SEED)
    rng = random.Random(f"{SEED} {args[1]} {workers}")
    for number in range(rounds):
        output = tmp_path / f"killed-{number}"
        disturb(args, output, workers=workers, num_kills=num_kills, work_s=work_s, rng=rng)
        found = tree(output)
        assert list(found) == list(expected)
        assert found == expected


@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 2])
def test_a_killed_conversion_of_pairs_resumes_to_the_same_bytes(pairs: Path, peace: Peace, tmp_path: Path, workers: int) -> None:
    check_kills(convert_pairs(pairs), peace, tmp_path, workers=workers)


@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 2])
def test_a_killed_conversion_of_documents_resumes_to_the_same_bytes(
    texts: Path, peace: Peace, tmp_path: Path, workers: int
) -> None:
    check_kills(convert_documents(texts), peace, tmp_path, workers=workers)


@pytest.mark.slow
def test_a_killed_encoding_resumes_to_the_same_bytes(raw: Path, peace: Peace, tmp_path: Path) -> None:
    check_kills(encode(raw), peace, tmp_path, workers=2, num_kills=1)


@pytest.mark.slow
def test_a_killed_encoding_on_two_devices_resumes_to_the_bytes_of_one(raw: Path, peace: Peace, tmp_path: Path) -> None:
    check_kills(encode(raw, "cpu,cpu"), peace, tmp_path, workers=2, num_kills=1, like=encode(raw))


@pytest.mark.slow
def test_a_killed_conversion_that_encodes_resumes_to_the_same_bytes(pairs: Path, peace: Peace, tmp_path: Path) -> None:
    args = encode_straight(pairs, "cpu,cpu")
    check_kills(args, peace, tmp_path, workers=2, num_kills=1, like=encode_straight(pairs))


@pytest.mark.slow
def test_a_part_that_was_killed_and_started_again_gives_its_share_of_the_same_bytes(
    raw: Path, peace: Peace, tmp_path: Path
) -> None:
    expected, work_s = peace(encode(raw))
    output = tmp_path / "out"
    disturb([*encode(raw), "--part", "1/2"], output, workers=2, num_kills=1, work_s=work_s / 2, rng=random.Random(SEED))
    wds_tools(*encode(raw), "--output", output, "--part", "2/2")
    wds_tools("finalize", "--output", output)
    assert tree(output) == expected


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("workers", [1, 2])
def test_many_kills_of_every_command_resume_to_the_same_bytes(
    pairs: Path, texts: Path, raw: Path, peace: Peace, tmp_path: Path, workers: int
) -> None:
    check_kills(convert_pairs(pairs), peace, tmp_path / "pairs", workers=workers, rounds=8)
    check_kills(convert_documents(texts), peace, tmp_path / "dclm", workers=workers, rounds=8)
    check_kills(encode(raw), peace, tmp_path / "encode", workers=workers, rounds=4)
    check_kills(encode(raw, "cpu,cpu"), peace, tmp_path / "devices", workers=workers, rounds=2, like=encode(raw))
    check_kills(encode_straight(pairs), peace, tmp_path / "straight", workers=workers, rounds=4)


@pytest.mark.slow
@pytest.mark.parametrize("again", ["the command", "finalize"])
def test_a_run_killed_after_its_manifest_leaves_no_working_files_behind(
    texts: Path, peace: Peace, tmp_path: Path, again: str
) -> None:
    expected, _ = peace(convert_documents(texts))
    output = tmp_path / "out"
    wds_tools(*convert_documents(texts), "--output", output)
    (output / "_work").mkdir()
    (output / "_work/task-000003.json").write_bytes(b"{}")
    (output / ".tmp").mkdir()
    (output / ".tmp/0123").write_bytes(b"half a file")
    wds_tools(*(["finalize"] if again == "finalize" else [*convert_documents(texts), "--resume"]), "--output", output)
    assert tree(output) == expected


@pytest.mark.slow
def test_a_resumed_run_first_removes_what_a_killed_writer_left(texts: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    process = begin(convert_documents(texts), output, 1)
    process.kill()
    go_on(process)
    process.communicate()
    (output / ".tmp").mkdir(exist_ok=True)
    (output / ".tmp/0123").write_bytes(b"half a file")
    wds_tools(*convert_documents(texts), "--output", output, "--resume")
    assert not (output / ".tmp").exists()


@pytest.mark.slow
def test_resume_of_a_complete_set_does_nothing(texts: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    first = wds_tools(*convert_documents(texts), "--output", output)
    times = {path: path.stat().st_mtime_ns for path in output.rglob("*")}
    again = wds_tools(*convert_documents(texts), "--output", output, "--resume")
    assert again.stdout == first.stdout
    assert {path: path.stat().st_mtime_ns for path in output.rglob("*")} == times


@pytest.mark.slow
@pytest.mark.parametrize("is_complete", [True, False])
@pytest.mark.parametrize(
    ("changed", "named"),
    [
        (["--shard-samples", "5"], "shard_samples was 70, is now 5"),
        (["--keep", "url"], 'keep was [], is now ["url"]'),
        (["--task-bytes", "100000000"], "num_tasks was 30, is now 1"),
    ],
)
def test_resume_with_other_settings_is_refused_and_names_them(
    texts: Path, tmp_path: Path, is_complete: bool, changed: list[str], named: str
) -> None:
    output = tmp_path / "out"
    budget = "100%" if is_complete else "0"
    wds_tools(*convert_documents(texts), "--output", output, "--max-rejects", budget, status=0 if is_complete else 1)
    before = tree(output)
    refused = wds_tools(*convert_documents(texts), *changed, "--output", output, "--resume", status=2)
    assert named in refused.stderr
    assert len(refused.stderr.splitlines()) == 1
    assert tree(output) == before


@pytest.mark.slow
def test_resume_with_other_inputs_is_refused(tmp_path: Path) -> None:
    path = write_documents(tmp_path / "a.jsonl.zst", [{"text": "a"}, {"text": ""}])
    args = ["convert", "documents", "--input", str(path), "--output", str(tmp_path / "out")]
    wds_tools(*args, status=1)
    write_documents(path, [{"text": "abcdefgh"}, {"text": ""}])
    refused = wds_tools(*args, "--resume", status=2)
    assert "inputs_sha256 was" in refused.stderr


def begin(args: Sequence[str], output: Path, num_done: int) -> subprocess.Popen[str]:
    """Start a run, and hold it still (all its processes) when so many of its tasks are done; `go_on` lets it move again."""
    for _ in range(5):
        process = start(*args, "--output", str(output))
        wait_until(lambda: len(list(output.glob("_work/task-*"))) >= num_done or process.poll() is not None, "tasks")  # noqa: B023
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGSTOP)
            if not (output / "manifest.json").exists():
                return process
            go_on(process)
        process.communicate()
        shutil.rmtree(output)
    raise AssertionError("each time it was done before it could be disturbed")


def go_on(process: subprocess.Popen[str]) -> None:
    os.killpg(process.pid, signal.SIGCONT)


@pytest.mark.slow
def test_a_killed_worker_ends_the_run_with_one_line(texts: Path, peace: Peace, tmp_path: Path) -> None:
    args, output = [*convert_documents(texts), "--workers", "2", "--quiet"], tmp_path / "out"
    process = begin(args, output, 2)
    os.kill(workers_of(process)[0], signal.SIGKILL)
    go_on(process)
    _, said = process.communicate(timeout=200)
    assert process.returncode == 1, said
    assert "a worker process ended without a word" in last_line(said)
    assert "--resume" in last_line(said)
    assert len(said.splitlines()) == 1, said
    wait_until(lambda: not session(process.pid), "no process is left")
    wds_tools(*args, "--output", output, "--resume")
    assert tree(output) == peace(convert_documents(texts))[0]


def test_workers_end_when_their_parent_is_killed(texts: Path, tmp_path: Path) -> None:
    process = begin([*convert_documents(texts), "--workers", "2"], tmp_path / "out", 1)
    assert len(workers_of(process)) == 2
    process.kill()
    go_on(process)
    process.communicate()
    wait_until(lambda: not session(process.pid), "no process is left")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("workers", "number", "kill"),
    [
        pytest.param("1", signal.SIGINT, os.killpg, id="Ctrl-C, which a terminal sends to all processes"),
        pytest.param("2", signal.SIGINT, os.killpg, id="Ctrl-C with workers"),
        pytest.param("1", signal.SIGTERM, os.kill, id="a container that is stopped"),
        pytest.param("2", signal.SIGTERM, os.kill, id="a container that is stopped, with workers"),
        pytest.param("2", signal.SIGTERM, os.killpg, id="a batch job at its time limit"),
        pytest.param("2", signal.SIGHUP, os.killpg, id="a terminal that is closed"),
    ],
)
def test_whatever_stops_a_run_one_line_says_so_and_nothing_is_left_but_what_is_finished(
    texts: Path, peace: Peace, tmp_path: Path, workers: str, number: signal.Signals, kill: Callable[[int, int], None]
) -> None:
    args, output = [*convert_documents(texts), "--workers", workers, "--quiet"], tmp_path / "out"
    process = begin(args, output, 1)
    kill(process.pid, number)
    go_on(process)
    _, said = process.communicate(timeout=200)
    assert process.returncode == 128 + number, said
    what = "interrupted" if number == signal.SIGINT else f"stopped by {number.name}"
    assert said.splitlines() == [f"wds-tools: {what}; run again with --resume"]
    wait_until(lambda: not session(process.pid), "no process is left")
    assert not (output / "manifest.json").exists()
    assert not (output / ".tmp").exists()
    assert list(output.glob("_work/run-*")) == []  # so that a rerun on another machine need not wait
    wds_tools(*args, "--output", output, "--resume")
    assert tree(output) == peace(convert_documents(texts))[0]


def test_ctrl_c_while_the_workers_start_says_one_line_too(texts: Path, tmp_path: Path) -> None:
    process = start(*convert_documents(texts), "--output", str(tmp_path / "out"), "--workers", "4", "--quiet")
    wait_until(lambda: workers_of(process) or process.poll() is not None, "workers start")
    os.killpg(process.pid, signal.SIGINT)
    _, said = process.communicate(timeout=200)
    assert process.returncode == 130, said
    assert len(said.splitlines()) == 1, said
    wait_until(lambda: not session(process.pid), "no process is left")


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 256 KiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(folder)], capture_output=True, check=False)
    if mounted.returncode:
        pytest.skip(f"mounting a small disk is not permitted here: {mounted.stderr.decode().strip()}")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.mark.slow
@pytest.mark.parametrize("workers", ["1", "2"])
def test_a_full_disk_is_one_line_and_the_run_goes_on_when_there_is_space(
    texts: Path, peace: Peace, small_disk: Path, workers: str
) -> None:
    args, output = [*convert_documents(texts), "--workers", workers, "--quiet"], small_disk / "out"
    full = wds_tools(*args, "--output", output, status=1)
    assert "the disk is full" in full.stderr
    assert len(full.stderr.splitlines()) == 1, full.stderr
    assert not (output / "manifest.json").exists()
    subprocess.run(["mount", "-o", "remount,size=64m", str(small_disk)], check=True)
    wds_tools(*args, "--output", output, "--resume")
    assert tree(output) == peace(convert_documents(texts))[0]
