"""Two runs on one output: the second is refused, or finds the first dead; the bytes are those of one run, or there are none."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from commands import environment, start, tree, wait_until, wds_tools, write_documents
from s3 import S3Server

from wds_tools.dataset import lease as lease_module
from wds_tools.dataset.layout import LEASES, PLAN
from wds_tools.dataset.lease import Lease, Part
from wds_tools.errors import StorageError, UsageError
from wds_tools.storage import Store, open_store


@pytest.fixture(scope="module")
def convert(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("texts")
    for number in range(12):
        write_documents(folder / f"{number:02}.jsonl.zst", ({"text": f"{number} {i}" if i % 20 else ""} for i in range(100)))
    return ["convert", "documents", "--input", str(folder), "--task-bytes", "1"]


@pytest.fixture(scope="module")
def expected(convert: list[str], tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, bytes | None]]:
    """What one run makes, by the samples of a shard."""
    folder = tmp_path_factory.mktemp("peace")
    for samples in ("30", "50"):
        wds_tools(*convert, "--shard-samples", samples, "--output", folder / samples)
    return {samples: tree(folder / samples) for samples in ("30", "50")}


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return open_store(str(tmp_path / "out"))


def leases(store: Store) -> list[str]:
    return [entry.name for entry in store.list(LEASES)]


@pytest.mark.slow
@pytest.mark.parametrize("how", [["--resume"], ["--overwrite"], ["--part", "1/2"]])
def test_a_run_beside_a_living_one_is_refused_and_changes_nothing(
    how: list[str], convert: list[str], expected: dict[str, dict[str, bytes | None]], tmp_path: Path
) -> None:
    output = tmp_path / "out"
    words = [*convert, "--shard-samples", "50", "--output", str(output)]
    with Lease(open_store(str(output))):
        before = tree(output)
        refused = wds_tools(*words, *how, status=2)
        assert f"another run is writing there (process {os.getpid()} on " in refused.stderr
        assert len(refused.stderr.splitlines()) == 1
        assert tree(output) == before
    wds_tools(*words)
    assert tree(output) == expected["50"]


@pytest.mark.slow
def test_of_many_runs_that_begin_together_one_makes_its_bytes_and_the_others_are_refused(
    convert: list[str], expected: dict[str, dict[str, bytes | None]], tmp_path: Path
) -> None:
    output = tmp_path / "out"
    ran = {}
    for samples in ("30", "50"):
        for how in ((), ("--overwrite",), ("--resume",)):
            ran[(samples, *how)] = start(*convert, "--shard-samples", samples, "--output", str(output), *how)
    for process in ran.values():
        _, said = process.communicate(timeout=200)
        assert process.returncode in (0, 2), said
        assert process.returncode == 0 or len(said.splitlines()) == 1, said
    assert any(process.returncode == 0 for process in ran.values())
    assert tree(output) in expected.values()


def test_parts_go_together_but_not_with_themselves_or_with_parts_of_another_number(store: Store) -> None:
    with Lease(store, Part(0, 3)), Lease(store, Part(1, 3)):
        for part in (Part(0, 3), Part(1, 3), Part(0, 2), Part(2, 4), None):
            with pytest.raises(UsageError, match="another run is writing there"), Lease(store, part):
                pass
        with Lease(store, Part(2, 3)):
            assert len(leases(store)) == 3
    assert leases(store) == []


@pytest.mark.slow
@pytest.mark.parametrize("place", ["folder", "s3"])
def test_a_run_that_was_killed_holds_up_nobody_on_its_machine(
    place: str, convert: list[str], request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    url = str(tmp_path / "out")
    if place == "s3":
        s3: S3Server = request.getfixturevalue("s3")
        url = f"s3://{s3.bucket}/lease-{os.getpid()}"
    process = start(*convert, "--output", url)
    wait_until(lambda: open_store(url).exists(PLAN) or process.poll() is not None, "the run has begun")
    os.kill(process.pid, signal.SIGSTOP)
    assert process.poll() is None, "it was done before it could be stopped"
    assert "another run is writing there" in wds_tools(*convert, "--output", url, "--resume", status=2).stderr
    process.kill()
    process.communicate()
    wds_tools(*convert, "--output", url, "--resume")
    assert leases(open_store(url)) == []


@pytest.mark.parametrize("machines", ["one", "many"])
@pytest.mark.parametrize("place", ["folder", "memory", "s3"])
def test_of_runs_that_come_at_the_same_moment_exactly_one_goes_on(
    place: str, machines: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    if place == "s3":
        request.getfixturevalue("s3")
    if machines == "many":  # nobody sees the others' processes, only their leases
        monkeypatch.setattr(lease_module, "_lives", lambda found: None)  # noqa: ARG005
        monkeypatch.setattr(lease_module, "HEARTBEAT_S", 0.05)
    for number in range(2 if place == "s3" else 10):
        url = {"folder": tmp_path, "memory": "memory://leases", "s3": f"s3://tests/{os.getpid()}"}[place]
        store = open_store(f"{url}/{machines}-{number}")
        together, all_have_tried = threading.Barrier(5), threading.Barrier(5)

        def come(
            store: Store = store, together: threading.Barrier = together, all_have_tried: threading.Barrier = all_have_tried
        ) -> bool:
            mine = Lease(store)
            together.wait()
            try:
                with mine:
                    all_have_tried.wait(60)
                    return True
            except UsageError:
                pass
            all_have_tried.wait(60)
            return False

        with ThreadPoolExecutor(5) as pool:
            assert sum(future.result() for future in [pool.submit(come) for _ in range(5)]) == 1
        assert leases(store) == []


@contextlib.contextmanager
def on_machine(name: str) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lease_module, "identity", lambda pid: [name, "namespace", str(pid)])
        yield


def test_a_run_that_lives_elsewhere_is_known_by_its_beat(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease_module, "HEARTBEAT_S", 0.02)
    with on_machine("a"):
        first = Lease(store)
    with first, on_machine("b"), pytest.raises(UsageError, match="another run is writing there"), Lease(store):
        pass


def test_a_lease_from_elsewhere_that_does_not_change_is_dropped(
    store: Store, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(lease_module, "LEASE_TIMEOUT_S", 0.1)
    store.put(f"{LEASES}0123456789abcdef.json", b"by another release")
    with on_machine("a"):
        dead = Lease(store)
        dead._facts["is_held"] = True
        dead._put()
    with on_machine("b"), Lease(store) as living:
        assert len(leases(store)) == 1
        living.check()
    assert "waiting up to 0.1 s to see whether that run is alive" in capsys.readouterr().err


def test_a_run_that_was_taken_for_dead_stops(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease_module, "HEARTBEAT_S", 0.01)
    with Lease(store) as slow:
        slow.check()

        def is_found() -> bool:
            for name in leases(store):  # again, if it was just being written
                store.delete(name)
            return slow._is_lost.is_set()

        wait_until(is_found, "it finds its lease gone")
        with pytest.raises(StorageError, match="another run took over"):
            slow.check()
    assert leases(store) == []


DEAF = """
import hashlib, sys
import wds_tools.__main__ as program
from pathlib import Path
from wds_tools.dataset.writer import TaskWriter

def add(writer, sample):
    Path("begun").touch()
    hashlib.pbkdf2_hmac("sha256", b"", b"", 2**31 - 1)  # C that hears no signal

program._PATIENCE_S = 0.2
TaskWriter.add = add
sys.exit(program.start())
"""


def test_a_run_whose_main_thread_does_not_hear_a_signal_frees_its_lease_all_the_same(tmp_path: Path) -> None:
    write_documents(tmp_path / "in.jsonl.zst", [{"text": "a"}])
    words = ["convert", "documents", "--input", str(tmp_path / "in.jsonl.zst"), "--output", str(tmp_path / "out")]
    deaf = [sys.executable, "-c", DEAF, *words]
    with subprocess.Popen(deaf, cwd=tmp_path, env=environment(), stderr=subprocess.PIPE, text=True) as process:
        wait_until((tmp_path / "begun").exists, "it is in the midst")
        assert leases(open_store(str(tmp_path / "out")))
        process.send_signal(signal.SIGTERM)
        _, said = process.communicate(timeout=200)
    assert (process.returncode, said.splitlines()[-1]) == (143, "wds-tools: stopped by SIGTERM")
    assert sorted(tree(tmp_path / "out")) == ["_work", PLAN]
    wds_tools(*words, "--resume")


FINALISER = """
import os, signal, sys, time
import wds_tools.__main__ as program
from wds_tools.dataset.writer import TaskWriter

class Dies:
    def __del__(self):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(1)

def add(writer, sample):
    Dies()
    time.sleep(100)

TaskWriter.add = add
sys.exit(program.start())
"""


def test_a_signal_that_a_finaliser_swallows_ends_the_run_all_the_same(tmp_path: Path) -> None:
    write_documents(tmp_path / "in.jsonl.zst", [{"text": "a"}])
    words = ["convert", "documents", "--input", str(tmp_path / "in.jsonl.zst"), "--output", str(tmp_path / "out")]
    ended = subprocess.run(
        [sys.executable, "-c", FINALISER, *words], env=environment(), capture_output=True, text=True, timeout=200, check=False
    )
    said = ended.stderr.splitlines()
    assert (ended.returncode, said[-1]) == (143, "wds-tools: stopped by SIGTERM; run again with --resume")
    assert "Traceback" not in ended.stderr
    assert sorted(tree(tmp_path / "out")) == ["_work", PLAN]
