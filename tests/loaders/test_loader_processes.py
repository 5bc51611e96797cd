"""What becomes of a loader's processes: killed, interrupted, left, kept over epochs, started in every way; and of its memory."""

from __future__ import annotations

import copy
import gc
import json
import os
import pickle
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import chain, islice
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import environment, session, wait_until
from factory import image_sample, make_dataset, text_sample

from loaders import Loader, LoaderConfig, ShardDataset, Source, World, build_loader
from wds_tools.dataset.reader import read_manifest
from wds_tools.errors import UsageError, WorkerDied
from wds_tools.format.manifest import serialize_manifest
from wds_tools.format.schema import Sample
from wds_tools.storage import LocalStore, open_store
from wds_tools.storage.objects import ObjectStore

COUNT = 300
WATCHDOG_S = 120.0
"""torch's workers look every 5 s whether their parent lives (every second in SCRIPT); room for a slow machine."""


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("processes") / "set"
    make_dataset(folder, (image_sample(n) if n % 3 else text_sample(n) for n in range(COUNT)), shard_samples=40)
    return str(folder)


def loader(url: str, **settings: Any) -> Loader:
    config = LoaderConfig(**{"sources": (Source(url),), "batch_size": 4, "last_batch": "short", "num_workers": 2, **settings})
    return build_loader(config, World())


def keys(batches: Iterable[dict[str, Any]]) -> list[str]:
    return [key for batch in batches for key in batch["__key__"]]


def children(pid: int) -> set[int]:
    """Living child processes."""
    found = set()
    for folder in Path("/proc").iterdir():
        try:
            fields = (folder / "stat").read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if folder.name.isdigit() and fields[1] == str(pid) and fields[0] != "Z":
            found.add(int(folder.name))
    return found


@contextmanager
def new_children() -> Iterator[set[int]]:
    """The children that this process has started since, once the block ends; they must have ended before the test does."""
    before, new = children(os.getpid()), set[int]()
    yield new
    new |= children(os.getpid()) - before


def ended(pids: Iterable[int]) -> bool:
    return not children(os.getpid()) & set(pids)


def shared_memory(pids: Iterable[int]) -> list[str]:
    """What torch has left there for these processes; others may be at work on this machine."""
    return [entry.name for entry in Path("/dev/shm").iterdir() if any(f"_{pid}_" in entry.name for pid in pids)]


SCRIPT = """
import json, os, sys, time
import torch.utils.data._utils.worker
from loaders import LoaderConfig, Source, World, build_loader

torch.utils.data._utils.worker.MP_STATUS_CHECK_INTERVAL = 1.0  # how often a worker looks whether its parent lives

def main():
    url, how = sys.argv[1:]
    config = LoaderConfig(sources=(Source(url),), batch_size=4, last_batch="short", num_workers=2, start_method=how)
    made = build_loader(config, World())
    for number, batch in enumerate(made):
        print(json.dumps([made.state_dict(), batch["__key__"]]), flush=True)
        if number == 20:
            time.sleep(100)

if __name__ == "__main__":
    main()
"""


@pytest.fixture
def script(tmp_path: Path) -> Path:
    path = tmp_path / "train.py"
    path.write_text(SCRIPT)
    return path


@contextmanager
def started(script: Path, url: str, how: str, temp: Path) -> Iterator[subprocess.Popen[str]]:
    """A training run in a session of its own, with a folder of its own for temporary files; killed at last."""
    temp.mkdir(exist_ok=True)
    pipe = subprocess.PIPE
    with subprocess.Popen(
        [sys.executable, str(script), url, how],
        env=environment() | {"TMPDIR": str(temp)},
        stdout=pipe,
        stderr=pipe,
        text=True,
        start_new_session=True,
    ) as process:
        try:
            yield process
        finally:
            for pid in (process.pid, *session(process.pid)):
                if pid != process.pid or process.poll() is None:
                    os.kill(pid, signal.SIGKILL)


def lines_of(process: subprocess.Popen[str], count: int) -> list[Any]:
    """(state, keys) of that many batches."""
    assert process.stdout is not None
    return [json.loads(line) for line in islice(process.stdout, count)]


@pytest.fixture
def short_folder() -> Iterator[Path]:
    """For TMPDIR: a path below pytest's is too long for the sockets of multiprocessing."""
    with tempfile.TemporaryDirectory(prefix="wds-", dir="/tmp") as folder:
        yield Path(folder)


@contextmanager
def closing(made: Loader) -> Iterator[Loader]:
    """Its workers end, whatever comes."""
    try:
        yield made
    finally:
        made.close()


def kill(pids: Iterable[int]) -> None:
    """End them, and wait: of a trainer's code that does something else nothing is interrupted."""
    for pid in pids:
        os.kill(pid, signal.SIGKILL)
    wait_until(lambda: ended(pids), "killed processes end")


@pytest.mark.parametrize("read_ahead_s", [0, 1], ids=["while a batch is awaited", "with a batch of theirs on its way"])
def test_killed_workers_are_said_with_the_position_and_the_run_goes_on_exactly(url: str, read_ahead_s: float) -> None:
    whole = keys(loader(url, num_workers=0))
    with closing(loader(url, prefetch_factor=1)) as made:
        batches = iter(made)
        with new_children() as workers:
            found = keys(islice(batches, 3))
        assert len(workers) == 2
        time.sleep(read_ahead_s)
        kill(workers)
        with pytest.raises(WorkerDied) as caught:
            collect(batches, found)
        assert made.position == len(found) < COUNT
        assert f"epoch 0, position {len(found)}" in "".join(caught.value.__notes__)
    with closing(loader(url, num_workers=1)) as resumed:
        resumed.load_state_dict(json.loads(json.dumps(made.state_dict())))
        assert found + keys(resumed) == whole
    with closing(made):
        assert found + keys(made) == whole  # so does the loader itself, with new workers


def collect(batches: Iterable[dict[str, Any]], found: list[str]) -> None:
    for batch in batches:
        found += batch["__key__"]


def test_a_worker_that_is_killed_while_the_loader_closes_does_not_disturb_it(url: str) -> None:
    made = loader(url)
    with new_children() as workers:
        found = keys(islice(made, 3))
    for pid in workers:
        os.kill(pid, signal.SIGSTOP)  # so that closing waits for them

    def kill_once_it_closes() -> None:
        wait_until(lambda: made._pool._workers is None, "the loader closes")
        time.sleep(0.2)
        for pid in workers:
            os.kill(pid, signal.SIGKILL)

    killer = threading.Thread(target=kill_once_it_closes)
    killer.start()
    made.close()
    killer.join()
    assert ended(workers)
    assert found + keys(made) == keys(loader(url, num_workers=0))
    made.close()


def test_a_worker_that_was_killed_with_the_lock_of_their_end_in_its_hand_is_not_waited_for(url: str) -> None:
    made = loader(url)
    with new_children() as workers:
        next(iter(made))
    lock = made._pool._workers._iterator._workers_done_event._cond
    holder = threading.Thread(target=lock.acquire)
    holder.start()
    holder.join()
    kill(list(workers)[:1])
    made.close()
    assert ended(workers)


@pytest.mark.slow
@pytest.mark.parametrize("turn", range(20))
def test_a_worker_that_is_killed_at_any_moment_is_said(url: str, turn: int) -> None:
    with closing(loader(url, prefetch_factor=1)) as made:
        batches = iter(made)
        with new_children() as workers:
            found = keys(islice(batches, 3 + turn))
        with pytest.raises(WorkerDied):
            kill_and_go_on(sorted(workers)[turn % 2], batches, found)
        made.close()
        assert made.position == len(found)
        assert found + keys(made) == keys(loader(url, num_workers=0))


def kill_and_go_on(pid: int, batches: Iterator[dict[str, Any]], found: list[str]) -> None:
    os.kill(pid, signal.SIGKILL)
    collect(batches, found)


@pytest.mark.slow
def test_a_worker_that_dies_between_epochs_is_said_too(url: str) -> None:
    with closing(loader(url)) as made:
        with new_children() as workers:
            first = keys(made)
        assert len(first) == COUNT
        kill(list(workers)[:1])
        with pytest.raises(WorkerDied, match="epoch 1, position 0"):
            keys(made)
        made.close()
        assert keys(made) == keys(loader_at(url, 1))


def loader_at(url: str, epoch: int) -> Loader:
    made = loader(url, num_workers=0)
    made.load_state_dict({**made.state_dict(), "position": epoch * made.num_samples})
    return made


@pytest.mark.parametrize("how", ["fork", pytest.param("spawn", marks=pytest.mark.slow)])
def test_workers_of_a_killed_run_end_by_themselves_and_leave_nothing(
    url: str, script: Path, short_folder: Path, how: str
) -> None:
    temp = short_folder / "tmp"
    with started(script, url, how, temp) as process:
        lines = lines_of(process, 10)
        workers = session(process.pid)
        assert len(workers) >= 2
        process.kill()
        process.wait()
        wait_until(lambda: not session(process.pid), "the workers end", WATCHDOG_S)
    assert shared_memory([process.pid, *workers]) == []
    assert list(temp.rglob("*")) == []
    state, seen = lines[-1][0], [key for _, batch in lines for key in batch]
    following = loader(url)
    following.load_state_dict(state)
    assert seen + keys(following) == keys(loader(url, num_workers=0))
    following.close()


LONG = """
import signal, sys, time
import loaders.reading.fetches
from loaders import LoaderConfig, ShardDataset, Source, World, build_loader
from torch.utils.data import DataLoader

loaders.reading.fetches._GRACE_S = 0.5
if sys.argv[2] == "its own DataLoader":
    made = DataLoader(ShardDataset(sys.argv[1]), batch_size=None, num_workers=2)
else:
    made = build_loader(LoaderConfig(sources=(Source(sys.argv[1]),), batch_size=4, num_workers=2), World())
if sys.argv[2] == "a handler":
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
batches = iter(made)
next(batches)
time.sleep(0.5)  # workers have more on their way by now than a pipe holds
print("reading", flush=True)
time.sleep(100)
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "how", "status"),
    [
        (signal.SIGKILL, "nothing", -signal.SIGKILL),
        (signal.SIGTERM, "nothing", -signal.SIGTERM),
        (signal.SIGTERM, "a handler", 143),
        (signal.SIGTERM, "its own DataLoader", -signal.SIGTERM),
    ],
)
def test_workers_end_with_their_trainer_also_if_nobody_takes_what_they_have(
    tmp_path: Path, short_folder: Path, number: signal.Signals, how: str, status: int
) -> None:
    make_dataset(tmp_path / "set", (text_sample(n)._replace(text="x" * 300_000) for n in range(40)), shard_samples=20)
    script = tmp_path / "train.py"
    script.write_text(LONG)
    with started(script, str(tmp_path / "set"), how, short_folder / "tmp") as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "reading\n"
        assert len(session(process.pid)) >= 2
        process.send_signal(number)
        assert process.wait(WATCHDOG_S) == status
        wait_until(lambda: not session(process.pid), "the workers end", WATCHDOG_S)


@pytest.mark.parametrize(
    ("sleeping", "to_all"),
    [
        pytest.param(False, False, id="busy"),
        pytest.param(False, True, id="busy, and its workers too, as Ctrl-C does", marks=pytest.mark.slow),
        pytest.param(True, True, id="in the training step, and its workers too", marks=pytest.mark.slow),
        pytest.param(True, False, id="in the training step", marks=pytest.mark.slow),
    ],
)
def test_an_interrupt_ends_the_run_and_its_workers(
    url: str, script: Path, short_folder: Path, sleeping: bool, to_all: bool
) -> None:
    temp = short_folder / "tmp"
    with started(script, url, "fork", temp) as process:
        lines_of(process, 21 if sleeping else 5)
        workers = session(process.pid)
        assert len(workers) >= 2
        if to_all:
            os.killpg(process.pid, signal.SIGINT)
        else:
            process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=WATCHDOG_S)
        assert process.returncode in (130, -signal.SIGINT), err
        assert "\nKeyboardInterrupt" in err
        in_workers = re.search(r'workers/steps\.py", line \d+, in (?!to_batch)', err)
        assert not in_workers, err  # multiprocessing may tell of a broken connection
        wait_until(lambda: not session(process.pid), "the workers end", WATCHDOG_S)
    assert shared_memory([process.pid, *workers]) == []
    # A worker that is too slow to end by itself is killed, and leaves the folder of multiprocessing's socket.
    assert [path for path in temp.iterdir() if not path.name.startswith("pymp-")] == []


def test_the_workers_of_a_loader_that_is_dropped_end(url: str) -> None:
    made = loader(url)
    with new_children() as workers:
        for batch in made:
            assert batch["__key__"]
            break
    assert len(workers) == 2
    del made, batch
    gc.collect()
    wait_until(lambda: ended(workers), "the workers end", WATCHDOG_S)


def test_close_ends_the_workers_and_the_loader_can_be_used_again(url: str) -> None:
    whole = keys(loader(url, num_workers=0))
    made = loader(url)
    with new_children() as workers:
        found = keys(islice(made, 5))
    made.close()
    assert ended(workers)
    made.close()
    assert found + keys(made) == whole
    made.close()


def test_workers_are_kept_over_the_epochs(url: str) -> None:
    made, plain = loader(url), loader(url, num_workers=0)
    pids = []
    before = children(os.getpid())
    for _ in range(3):
        assert keys(made) == keys(plain)
        pids.append(children(os.getpid()) - before)
    assert len(pids[0]) == 2
    assert pids[0] == pids[1] == pids[2]
    made.close()


@pytest.mark.parametrize(
    ("how", "num_workers"),
    [("fork", 2), ("forkserver", 1), *(pytest.param(how, 2, marks=pytest.mark.slow) for how in ("spawn", "forkserver"))],
)
def test_workers_read_one_sequence_however_they_are_started(url: str, how: Any, num_workers: int) -> None:
    plain = loader(url, num_workers=0, batch_size=32)
    made = loader(url, start_method=how, num_workers=num_workers, batch_size=32)
    assert [keys(made), keys(made)] == [keys(plain), keys(plain)]
    made.close()


WITHOUT_GUARD = """
import sys
from loaders import LoaderConfig, Source, build_loader

for batch in build_loader(LoaderConfig(sources=(Source(sys.argv[1]),), batch_size=8, num_workers=1, start_method=sys.argv[2])):
    print(batch["__key__"])
"""


@pytest.mark.slow
@pytest.mark.parametrize("how", ["spawn", "forkserver"])
def test_a_script_without_a_guard_ends_with_what_it_lacks(url: str, how: str, tmp_path: Path) -> None:
    (tmp_path / "train.py").write_text(WITHOUT_GUARD)
    command = [sys.executable, str(tmp_path / "train.py"), url, how]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, check=False, timeout=200)
    assert (done.returncode, done.stdout) == (1, "")
    assert "UsageError: this process imports the script that started it, which reads at once" in done.stderr
    assert "WorkerDied: a worker process ended" in done.stderr
    last = done.stderr.strip().splitlines()[-2:]
    assert f"where workers are started by {how}, a script puts what it does below `if __name__ == '__main__':`" in "".join(last)


@pytest.mark.parametrize("how", ["fork", pytest.param("spawn", marks=pytest.mark.slow)])
def test_workers_read_a_store_that_their_parent_has_used(url: str, how: Any, request: pytest.FixtureRequest) -> None:
    s3 = request.getfixturevalue("s3")
    assert s3.endpoint
    remote = f"s3://tests/processes-{how}"
    store = open_store(remote)
    for path in Path(url).rglob("*"):
        if path.is_file():
            store.put(str(path.relative_to(url)), path.read_bytes())
    whole = keys(loader(url, num_workers=0, batch_size=32))
    here = loader(remote, num_workers=0, batch_size=32)
    found = keys(islice(here, 3))
    made = loader(remote, start_method=how, batch_size=32)
    assert keys(made) == whole
    made.close()
    assert found + keys(here) == whole  # the parent's own connections still work


def test_two_loaders_in_one_process_do_not_know_of_each_other(url: str) -> None:
    one, two = loader(url, seed=1), loader(url, seed=2, num_workers=1, batch_size=6)
    found: tuple[list[str], list[str]] = [], []
    for second, first in zip(two, one, strict=False):
        found[0].extend(first["__key__"])
        found[1].extend(second["__key__"])
    rest = keys(one)
    assert found[0] + rest == keys(loader(url, num_workers=0, seed=1))
    assert found[1] == keys(loader(url, num_workers=0, seed=2, batch_size=6))
    one.close()
    two.close()


def linked_set(folder: Path, num_shards: int) -> str:
    """A dataset of so many shards that are all one file of 400 samples."""
    make_dataset(folder, (image_sample(n, side=8) for n in range(400)))
    (tar,) = folder.glob("*.tar")
    store = open_store(str(folder))
    manifest = read_manifest(store)
    rows = [replace(manifest.shards[0], name=f"shard-{number:06d}-0000.tar") for number in range(num_shards)]
    for row in rows:
        if row.name != tar.name:
            os.link(tar, folder / row.name)
            os.link(f"{tar}.index", folder / f"{row.name}.index")
    store.put("manifest.json", serialize_manifest(replace(manifest, shards=tuple(rows), inputs=400 * num_shards)))
    return str(folder)


def reads_before_the_first_batch(url: str, position: float, monkeypatch: pytest.MonkeyPatch) -> tuple[int, Counter[str]]:
    """Samples of the set, and how often each way of reading a local file is gone."""
    counts: Counter[str] = Counter()
    with monkeypatch.context() as patch:
        for way in ("read", "map", "read_range"):
            patch.setattr(LocalStore, way, counting(counts, way))
        made = loader(url, batch_size=64, num_workers=0)
        made.load_state_dict({**made.state_dict(), "position": int(position * made.num_samples)})
        next(iter(made))
    return made.num_samples, counts


def counting(counts: Counter[str], way: str) -> Callable[..., Any]:
    original = getattr(LocalStore, way)

    def counted(*arguments: Any) -> Any:
        counts[way] += 1
        return original(*arguments)

    return counted


def test_what_is_read_before_the_first_batch_does_not_grow_with_the_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small, large = linked_set(tmp_path / "small", 1000), linked_set(tmp_path / "large", 5000)
    few, of_few = reads_before_the_first_batch(small, 0, monkeypatch)
    many, of_many = reads_before_the_first_batch(large, 0, monkeypatch)
    _, resumed = reads_before_the_first_batch(large, 0.9, monkeypatch)
    assert (few, many) == (400_000, 2_000_000)
    assert of_few.total() > 0
    assert of_many.total() <= of_few.total() + 64
    assert resumed.total() <= of_few.total() + 64


MEMORY = """
import os, sys
from pathlib import Path
from loaders import LoaderConfig, Source, World, build_loader

def children():
    out = []
    for task in Path("/proc/self/task").iterdir():
        out += map(int, (task / "children").read_text().split())
    return out

def resident_kb(pid):
    return int(next(line for line in Path(f"/proc/{pid}/status").read_text().splitlines() if line.startswith("VmRSS")).split()[1])

url, num_workers, epochs = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
made = build_loader(LoaderConfig(sources=(Source(url),), batch_size=16, last_batch="short", num_workers=num_workers), World())
for epoch in range(epochs):
    for batch in made:
        pass
    del batch
    print(*(resident_kb(pid) for pid in ("self", *sorted(children()))), flush=True)
made.close()
"""


@pytest.mark.slow
@pytest.mark.parametrize("num_workers", [1, pytest.param(0, marks=pytest.mark.slow)])
def test_resident_memory_is_flat_over_many_epochs(tmp_path: Path, num_workers: int) -> None:
    make_dataset(tmp_path / "set", (image_sample(n, side=16) for n in range(1000)), shard_samples=300)
    done = subprocess.run(
        [sys.executable, "-c", MEMORY, str(tmp_path / "set"), str(num_workers), "12"],
        env=environment(),
        capture_output=True,
        text=True,
        check=True,
        timeout=200,
    )
    epochs = [list(map(int, line.split())) for line in done.stdout.splitlines()]
    assert len(epochs) == 12
    assert len(epochs[1]) == 1 + num_workers
    for early, late in zip(epochs[3], epochs[-1], strict=True):
        assert late <= 1.05 * early, epochs


def test_what_is_read_ahead_of_large_samples_stays_within_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []
    read_range = ObjectStore.read_range

    def counted(store: ObjectStore, name: str, start: int, end: int, size: int | None = None) -> Any:
        sizes.append(end - start)
        return read_range(store, name, start, end, size)

    monkeypatch.setattr(ObjectStore, "read_range", counted)
    images = (
        Sample(key=f"k{number}", data_type="image_text", text="a", image=bytes(400_000), image_extension="jpg")
        for number in range(120)
    )
    make_dataset("memory://processes/large", images, shard_samples=30)
    made = loader("memory://processes/large", num_workers=0, batch_size=8, memory_bytes=8 << 20)
    next(iter(made))
    before = -1
    while before != len(sizes):  # until nothing more is fetched
        before = len(sizes)
        time.sleep(0.3)
    assert sum(sizes) < (8 << 20) + 16 * 402_000  # and what is in flight


def test_shards_of_very_different_samples_are_fetched_about_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("loaders.order.plan.SMALL_BYTES", 0)
    monkeypatch.setattr("loaders.reading.planner.SMALL_BYTES", 0)
    texts = (text_sample(number) for number in range(4000))
    images = (
        Sample(key=f"k{number}", data_type="image_text", text="a", image=bytes(600_000), image_extension="jpg")
        for number in range(32)
    )
    make_dataset("memory://processes/different", chain(texts, images), shard_samples=2000)
    made = loader("memory://processes/different", num_workers=0, batch_size=8, memory_bytes=16 << 20)
    assert len(keys(made)) == 4032
    assert made.stats()["bytes"] < 2.5 * made._order.total_bytes  # the next epoch is read ahead


def test_a_loader_that_goes_over_to_its_workers_is_small(url: str) -> None:
    made = loader(url)
    keys(islice(made, 2))
    made.close()
    dataset = pickle.loads(pickle.dumps(made._pool._dataset))  # noqa: S301
    assert len(pickle.dumps(dataset)) < 100_000
    assert made.state_dict() == pickle.loads(pickle.dumps(made.state_dict()))  # noqa: S301


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_loader_that_was_begun_is_not_copied_but_says_what_can_be(url: str, num_workers: int) -> None:
    made = loader(url, num_workers=num_workers)
    assert keys(pickle.loads(pickle.dumps(made))) == keys(made)  # noqa: S301
    for copied in (pickle.dumps, copy.deepcopy):
        with pytest.raises(UsageError, match=r"begun can't be copied or sent: its config and state_dict\(\) can"):
            copied(made)
    made.close()


@pytest.mark.parametrize("how", ["fork", pytest.param("spawn", marks=pytest.mark.slow)])
def test_samples_through_worker_processes_are_each_once_however_they_are_started(url: str, how: str) -> None:
    dataset = ShardDataset(url)
    stock = torch.utils.data.DataLoader(dataset, batch_size=None, num_workers=2, multiprocessing_context=how)
    assert [sample["__key__"] for sample in stock] == [sample["__key__"] for sample in ShardDataset(url)]
