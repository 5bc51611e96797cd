"""`--executor ray` on a cluster of two nodes: the bytes are those of a local run, though a node dies and the driver is killed."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import threading
from collections import Counter
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from commands import (
    ROOT,
    environment,
    image_bytes,
    last_line,
    start,
    tree,
    wait_until,
    wds_tools,
    write_documents,
    write_jsonl,
    write_pairs,
)
from factory import image_sample, make_dataset
from tokens import PROVENANCE, write_small_sets

from wds_tools.convert import run_conversion
from wds_tools.convert.pairs import PairsConfig
from wds_tools.errors import UsageError
from wds_tools.export.hf import export_hf
from wds_tools.export.options import ExportConfig
from wds_tools.jobs.job import Job, run_job
from wds_tools.jobs.options import JobOptions
from wds_tools.run.progress import Advance
from wds_tools.run.ray_cluster import _Board

pytest.importorskip("ray", reason="needs pip install 'wds-tools[ray]'")

pytestmark = pytest.mark.timeout(600)  # a cluster of two nodes on a busy machine

NUM_FILES = 6


class Cluster:
    """The cluster of ray_nodes.py."""

    def __init__(self) -> None:
        pipe = subprocess.PIPE
        script = str(ROOT / "tests/ray_nodes.py")
        self._process = subprocess.Popen([sys.executable, script], stdin=pipe, stdout=pipe, text=True, env=environment())
        self.address = self._answer()

    def _answer(self) -> str:
        assert self._process.stdout is not None
        return next((line.strip() for line in self._process.stdout if line.strip()), "")

    def remove_a_node(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write("remove\n")
        self._process.stdin.flush()
        assert self._answer() == "removed"

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            self._process.wait(30)
        finally:
            self._process.kill()
            assert self._process.stdout is not None
            self._process.stdout.close()


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.setenv("RAY_AUTH_MODE", "disabled")
        patch.setenv("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")  # all servers on 127.0.0.1, as Ray does it on those systems
        patch.setenv("PYTHONUNBUFFERED", "1")
        nodes = Cluster()
        yield nodes
        nodes.close()


class Gate:
    """Serves a folder over HTTP; a file's bytes wait until they are let through, so that a run is in the middle for certain.

    What is looked at before a run has begun its output is neither held back nor counted."""

    def __init__(self, folder: Path) -> None:
        self.asked: Counter[str] = Counter()
        self._plan = folder
        self._open = threading.Event()
        self._free: set[str] = set()
        gate = self

        class Handler(BaseHTTPRequestHandler):
            def do_HEAD(self) -> None:
                self._answer(b"", (folder / self.path[1:]).stat().st_size)

            def do_GET(self) -> None:
                name = self.path[1:]
                if gate._plan.exists():
                    gate.asked[name] += 1
                    if name not in gate._free:
                        gate._open.wait(60)
                data = (folder / name).read_bytes()
                with contextlib.suppress(ConnectionError):
                    self._answer(data, len(data))

            def _answer(self, data: bytes, size: int) -> None:
                self.send_response(200)
                self.send_header("Content-Length", str(size))
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *_: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def close_but_for(self, *names: str, output: Path) -> None:
        self._plan = output / "_work/plan.json"
        self.asked.clear()
        self._free = set(names)
        self._open.clear()

    def open(self) -> None:
        self._open.set()

    def stop(self) -> None:
        self.open()
        self._server.shutdown()
        self._server.server_close()


@pytest.fixture(scope="module")
def gate(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gate]:
    folder = tmp_path_factory.mktemp("served")
    for number in range(NUM_FILES):
        records = ({"text": f"document {number} {i}" if i % 50 else ""} for i in range(400))
        write_documents(folder / f"{number}.jsonl.zst", records)
    served = Gate(folder)
    yield served
    served.stop()


@pytest.fixture(scope="module")
def convert(gate: Gate) -> list[str]:
    return ["convert", "documents", "--input", f"{gate.url}/{{0..{NUM_FILES - 1}}}.jsonl.zst", "--task-bytes", "1"]


@pytest.fixture(scope="module")
def expected(convert: list[str], gate: Gate, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes | None]:
    """What a local run makes."""
    gate.open()
    output = tmp_path_factory.mktemp("local") / "out"
    wds_tools(*convert, "--output", output)
    return tree(output)


def on(cluster: Cluster) -> list[str]:
    return ["--executor", "ray", "--ray-address", cluster.address]


def finish(process: subprocess.Popen[str]) -> str:
    out, err = process.communicate(timeout=200)
    assert process.returncode == 0, out + err
    assert "Traceback" not in err, err
    return out


@pytest.fixture(scope="module")
def passes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str | Path]]:
    """A command line of the other passes, with input for several tasks."""
    folder = tmp_path_factory.mktemp("passes")
    run_conversion(PairsConfig(input=(str(write_pairs(folder, 4)),), output=str(folder / "raw"), task_lines=2, quiet=True))
    turns = [{"from": "human", "value": "<image>What?"}, {"from": "gpt", "value": "That."}]
    talks = write_jsonl(folder / "talks.jsonl", ({"image": f"images/{i}.jpg", "conversations": turns} for i in range(6)))
    square = [image_sample(i, side=32) for i in range(9)]
    make_dataset(folder / "square", square, shard_samples=2, codes=PROVENANCE)
    export_hf(ExportConfig(input=(str(folder / "square"),), output=str(folder / "hf"), num_shards=3, quiet=True))
    (folder / "labels.jsonl").write_text("".join(f'{{"key": "{sample.key}", "score": 1}}\n' for sample in square[::2]))
    write_small_sets(folder)
    sets, small = [folder / "pairs", folder / "texts"], ("--shard-samples", "2")
    return {
        "sft": ["convert", "conversations", "--input", talks, "--task-lines", "2", "--max-rejects", "50%"],
        "hf": ["convert", "coded", "--input", folder / "hf", "--task-bytes", "1"],
        "encode": ["encode", "--input", folder / "raw", "--device", "cpu", "--shard-samples", "2"],
        "pack": ["pack", "--input", *sets, "--tokenizer", folder / "tokenizer", "--max-length", "128", "--task-samples", "20"],
        "select": ["select", "--input", folder / "square", "--unique", "codes", *small],
        "relabel": ["relabel", "--input", folder / "square", "--with", folder / "labels.jsonl", "--fields", "score", *small],
    }


def test_pairs_of_every_container_have_the_bytes_of_a_local_run(cluster: Cluster, tmp_path: Path) -> None:
    lines = write_pairs(tmp_path / "lines", 4)
    for name in ("tars", "table", "photos"):
        (tmp_path / name).mkdir()
    for number in range(2):
        with tarfile.open(tmp_path / f"tars/{number}.tar", "w") as tar:
            for image in (tmp_path / "lines/images").iterdir():
                tar.add(image, f"{number}{image.name}")
                tar.addfile(tarfile.TarInfo(f"{number}{image.stem}.txt"))
                shutil.copy(image, tmp_path / f"photos/{number}{image.name}")
                (tmp_path / f"photos/{number}{image.stem}.txt").write_text(f"photo {number}")
        rows = [{"image": {"bytes": image_bytes(row), "path": "a.jpg"}, "text": f"row {row}"} for row in range(3)]
        pq.write_table(pa.Table.from_pylist(rows), tmp_path / f"table/{number}.parquet", row_group_size=2)
    inputs = [lines, *(tmp_path / name for name in ("tars", "table", "photos"))]
    how = ["--task-lines", "2", "--task-bytes", "1", "--max-rejects", "8"]
    assert_the_bytes_are_those_of_a_local_run(["convert", "pairs", "--input", *inputs, *how], cluster, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sft", "hf", "encode", "pack", "select", "relabel"])
def test_each_pass_gives_the_bytes_of_a_local_run(
    name: str, cluster: Cluster, passes: dict[str, list[str | Path]], tmp_path: Path
) -> None:
    assert_the_bytes_are_those_of_a_local_run(passes[name], cluster, tmp_path)


def assert_the_bytes_are_those_of_a_local_run(words: list[str | Path], cluster: Cluster, tmp_path: Path) -> None:
    local = wds_tools(*words, "--output", tmp_path / "local", "--quiet")
    made = wds_tools(*words, "--output", tmp_path / "ray", *on(cluster), "--quiet")
    assert made.stderr == local.stderr.replace("/local", "/ray"), "Ray says nothing"
    assert tree(tmp_path / "ray") == tree(tmp_path / "local")
    assert len(list((tmp_path / "ray").glob("*.tar"))) > 1, "one task would prove little"


@pytest.mark.slow
def test_a_driver_that_is_killed_goes_on_with_resume(
    cluster: Cluster, gate: Gate, convert: list[str], expected: dict[str, bytes | None], tmp_path: Path
) -> None:
    gate.close_but_for("0.jsonl.zst", "1.jsonl.zst", output=tmp_path / "out")
    process = start(*convert, "--output", tmp_path / "out", *on(cluster))
    wait_until(lambda: len(gate.asked) == 4 and len(list((tmp_path / "out/_work").glob("task-*"))) == 2, "two tasks are done")
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    gate.open()
    done = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("shard-00000[01]-*")}
    wds_tools(*convert, "--output", tmp_path / "out", *on(cluster), "--resume")
    assert tree(tmp_path / "out") == expected
    assert len(done) == 4, "tasks 0 and 1 with their indices"
    assert {path: path.stat().st_mtime_ns for path in done} == done, "a finished task was done again"


SCRIPT = """
import sys
from wds_tools.errors import UsageError
from wds_tools.run import ray_cluster
from wds_tools.run.progress import Advance

ray_cluster._RETRIES = 1
out = sys.stdout

def work(task, report):
    import os
    for _ in range(3):
        report(Advance(units=1, samples=2))
    if task == "bad":
        raise UsageError("this is what is wrong")
    if task == "dead":
        os._exit(1)
    return task * 2

reports = []
where = {"cpus": 1, "gpus": None, "device": "auto"}
with ray_cluster.on_cluster(sys.argv[1]):
    print(sorted(ray_cluster.run_on_ray(work, range(30), **where, on_report=reports.append)), file=out)
    print(sum(reports, Advance()), file=out)
    for task in ("bad", "dead"):
        try:
            list(ray_cluster.run_on_ray(work, [task], **where, on_report=lambda new: None))
        except Exception as error:
            print(type(error).__name__, error, file=out)
"""


@pytest.mark.slow
def test_results_reports_and_errors_arrive_as_they_do_from_local_workers(cluster: Cluster) -> None:
    run = [sys.executable, "-c", SCRIPT, cluster.address]
    result = subprocess.run(run, env=environment(), capture_output=True, text=True, timeout=200, check=True)
    assert len(result.stdout.splitlines()) == 4, result.stdout
    results, told, bad, dead = result.stdout.splitlines()
    assert results == str([2 * task for task in range(30)])
    assert told == str(Advance(units=3 * 30, samples=6 * 30))
    assert bad == "UsageError this is what is wrong"
    assert dead.startswith("WorkerDied task 0 lost its worker or its node 2 times")


@pytest.mark.slow
def test_a_node_that_is_removed_in_mid_run_changes_no_byte(
    cluster: Cluster, gate: Gate, convert: list[str], expected: dict[str, bytes | None], tmp_path: Path
) -> None:
    gate.close_but_for("0.jsonl.zst", "1.jsonl.zst", output=tmp_path / "out")
    process = start(*convert, "--output", tmp_path / "out", *on(cluster))
    # One CPU a node: two tasks wait for their input, one on each node.
    wait_until(lambda: len(gate.asked) == 4, "each node has a task that can't end")
    cluster.remove_a_node()
    lost = gate.asked.copy()
    gate.open()
    assert "1,968 of 2,400" not in (out := finish(process))
    assert "2,352 of 2,400 inputs" in out
    assert tree(tmp_path / "out") == expected
    assert any(gate.asked[name] > lost[name] for name in lost), "no task was started again"


@pytest.mark.slow
@pytest.mark.parametrize("is_variable", [False, True])
def test_an_address_where_nobody_answers_is_refused_at_once_and_nothing_is_written(
    is_variable: bool, convert: list[str], gate: Gate, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    named = ["--ray-address", "127.0.0.1:1"]
    if is_variable:
        monkeypatch.setenv("RAY_ADDRESS", named.pop())
        named = []
    failed = wds_tools(*convert, "--output", tmp_path / "out", "--executor", "ray", *named, status=2)
    said = "RAY_ADDRESS" if is_variable else "--ray-address"
    assert f"{said} 127.0.0.1:1: no Ray cluster answers there" in last_line(failed.stderr)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"executor": "ray", "workers": 2}, "--workers is for --executor local"),
        ({"ray_address": "127.0.0.1:1"}, "need --executor ray"),
        ({"task_gpus": 1}, "need --executor ray"),
        ({"executor": "ray", "task_cpus": -1}, "at least 0"),
    ],
)
def test_options_that_would_have_no_effect_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        JobOptions(output="out", **options)


def test_a_device_by_number_is_refused_since_ray_deals_them_out(tmp_path: Path) -> None:
    options = JobOptions(output=str(tmp_path / "out"), executor="ray")
    with pytest.raises(UsageError, match="each task gets a GPU of its own, so give --device cuda"):
        run_job(Job(command="x", settings={}, tasks=[], total=0, device="cuda:1", work=lambda *_: 0), options)
    assert not (tmp_path / "out").exists()


def test_what_a_lost_task_had_reported_is_taken_back() -> None:
    board = _Board()
    board.tell(0, Advance(10, 9, 1))
    board.tell(1, Advance(5, 5))
    assert board.total() == Advance(15, 14, 1)
    board.tell(0, Advance(4, 4))  # its worker died, another began again
    assert board.total() == Advance(9, 9)
    board.tell(0, Advance(20, 18, 2))
    assert board.total() == Advance(25, 23, 2)
