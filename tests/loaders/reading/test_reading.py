"""Reading shards: more of them than files may be open, shards that are cut meanwhile, and many threads that want the same."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from commands import WAIT_S, environment
from factory import image_sample, make_dataset, text_sample

from loaders import Loader, LoaderConfig, Source, World, build_loader
from loaders.order.samples import open_source
from loaders.reading.cache import BlockCache
from loaders.reading.source import SourceReader
from wds_tools.dataset.layout import OFFSETS
from wds_tools.dataset.reader import read_manifest
from wds_tools.dataset.samples import SampleReader, is_small
from wds_tools.errors import FormatError, StorageError, WorkerDied
from wds_tools.storage.objects import ObjectStore
from wds_tools.storage.recent import Recent, SingleFlight

NUM_SHARDS = 120
SHARD = "shard-000000-0000.tar"
FEW_FILES = """
import resource, sys
import torch
from loaders import LoaderConfig, ShardDataset, Source, TarDataset, World, build_loader
from wds_tools.dataset.samples import SampleReader, is_small
from wds_tools.cli.main import main
from wds_tools.dataset.reader import read_manifest
from wds_tools.storage import open_store

url = sys.argv[1]
resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))
config = LoaderConfig(sources=(Source(url), Source(url, name="again")), batch_size=60, last_batch="short", num_workers=0)
loader = build_loader(config, World())
for _ in range(2):
    print(sum(len(batch["__key__"]) for batch in loader))
print(sum(1 for _ in ShardDataset(url)), sum(1 for _ in TarDataset(url)))
samples = SampleReader(open_store(url), read_manifest(open_store(url)))
print(len(samples.page(0, len(samples), is_small, max_member_bytes=1 << 20)))
samples.close()
sys.exit(main(["verify", url, "--quiet"]))
"""


def loader(url: str, **settings: Any) -> Loader:
    return build_loader(LoaderConfig(sources=(Source(url),), batch_size=10, last_batch="short", **settings), World())


@pytest.mark.slow
def test_more_shards_than_files_may_be_open_are_read_by_whatever_reads(tmp_path: Path) -> None:
    make_dataset(tmp_path / "set", (text_sample(number) for number in range(NUM_SHARDS)), shard_samples=1)
    done = subprocess.run(
        [sys.executable, "-c", FEW_FILES, str(tmp_path / "set")],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.split()[:5] == ["240", "240", "120", "120", "120"]


@pytest.fixture
def url(tmp_path: Path) -> str:
    """Two shards of 40 samples."""
    make_dataset(tmp_path / "set", (image_sample(number) for number in range(80)), shard_samples=40)
    return str(tmp_path / "set")


def cut(url: str, made: Loader) -> str:
    """Leave the first half of the second shard, while the worker, if there is one, has nothing to do but keep its second batch;
    says which it is."""
    workers = made._pool._workers
    while workers is not None and workers._iterator._data_queue.empty():
        time.sleep(0.01)
    path = sorted(Path(url).glob("*.tar"))[1]
    os.truncate(path, path.stat().st_size // 2)
    return str(path)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_shard_that_is_cut_while_it_is_read_is_named(url: str, num_workers: int) -> None:
    made = loader(url, num_workers=num_workers, prefetch_factor=1)
    batches = iter(made)
    next(batches)
    shard = cut(url, made)
    with pytest.raises(FormatError, match=r"sample \d+ at byte \d+: .* cut off or replaced") as caught:
        list(batches)
    assert shard in str(caught.value)
    assert any(f"Everything before epoch 0, position {made.position} was handed over" in note for note in caught.value.__notes__)
    made.close()


@pytest.mark.parametrize("num_workers", [0, 1])
def test_what_was_cut_off_is_replaced_and_counted_if_that_was_asked_for(url: str, num_workers: int) -> None:
    made = loader(url, num_workers=num_workers, prefetch_factor=1, on_error="substitute")
    batches = iter(made)
    seen = Counter(next(batches)["__key__"])
    cut(url, made)
    for batch in batches:
        seen.update(batch["__key__"])
    made.close()
    bad = int(made.stats()["bad"])
    assert seen.total() == 80
    assert 0 < bad == 80 - len(seen) <= 21
    assert made.stats()["bad_format"] == bad


def test_a_worker_that_met_a_bus_error_is_told_of_with_the_shard_that_was_cut(url: str) -> None:
    made = loader(url, num_workers=1, prefetch_factor=1)
    batches = iter(made)
    next(batches)
    shard = cut(url, made)
    (worker,) = multiprocessing.active_children()
    assert worker.pid is not None
    os.kill(worker.pid, signal.SIGBUS)
    with pytest.raises((WorkerDied, FormatError), match="the manifest says") as caught:
        list(batches)
    assert shard in str(caught.value)
    made.close()


def at_once(count: int, what: Callable[[int], Any]) -> list[Any]:
    """What came of so many threads that began together: values or errors."""
    barrier = threading.Barrier(count)

    def run(number: int) -> Any:
        barrier.wait()
        try:
            return what(number)
        except StorageError as error:
            return error

    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(run, range(count)))


@pytest.fixture
def others_wait(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Call it where a value is made: it returns when so many other threads wait for one, however busy the machine is."""
    arrived = threading.Semaphore(0)

    class Awaited(Future[Any]):
        def result(self, timeout: float | None = None) -> Any:
            arrived.release()
            return super().result(timeout)

    def until(count: int) -> None:
        assert all(arrived.acquire(timeout=WAIT_S) for _ in range(count))

    monkeypatch.setattr("wds_tools.storage.recent.Future", Awaited)
    return until


@pytest.mark.parametrize("shared", [SingleFlight(), Recent(2)])
def test_threads_that_want_one_thing_at_the_same_time_have_it_made_once(
    shared: SingleFlight[str, object], others_wait: Callable[[int], None]
) -> None:
    made: list[str] = []

    def make(key: str) -> object:
        if key not in made:
            others_wait(15)
        made.append(key)
        if key == "bad":
            raise StorageError("no answer")
        return object()

    assert len(set(map(id, at_once(16, lambda _: shared.get("good", make))))) == 1
    (error,) = set(at_once(16, lambda _: shared.get("bad", make)))
    assert isinstance(error, StorageError)
    assert Counter(made) == {"good": 1, "bad": 1}
    with pytest.raises(StorageError):
        shared.get("bad", make)
    assert made.count("bad") == 2


def test_what_was_used_last_is_kept_within_the_size() -> None:
    made: list[int] = []
    recent: Recent[int, int] = Recent(10, lambda value: value)

    def get(value: int) -> None:
        recent.get(value, lambda key: made.append(key) or key)  # type: ignore[func-returns-value]

    for value in (4, 5, 4, 3, 4, 5, 20, 20, 4):
        get(value)
    assert made == [4, 5, 3, 5, 20, 4]


def slowly(monkeypatch: pytest.MonkeyPatch, way: str) -> list[tuple[Any, ...]]:
    """Makes a way of reading objects slow enough that threads meet; what it was asked for."""
    asked: list[tuple[Any, ...]] = []
    original = getattr(ObjectStore, way)

    def slow(store: ObjectStore, *arguments: Any) -> Any:
        asked.append(arguments)
        time.sleep(0.1)
        return original(store, *arguments)

    monkeypatch.setattr(ObjectStore, way, slow)
    return asked


def test_an_index_that_many_threads_want_is_fetched_once(monkeypatch: pytest.MonkeyPatch) -> None:
    make_dataset("memory://reading/index", (image_sample(number) for number in range(100)))
    opened = open_source(Source("memory://reading/index"))
    samples = SampleReader(opened.store, read_manifest(opened.store))
    asked = slowly(monkeypatch, "read")
    reader = SourceReader(opened, check_crc=True)
    at_once(16, lambda number: reader.load(0, number, number + 1))
    assert len(asked) == 1
    assert reader.num_requests == 17
    at_once(16, lambda number: samples.sample(number, is_small))
    assert len(asked) == 2
    samples.close()


def test_a_region_of_the_cache_that_many_threads_want_is_fetched_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_dataset("memory://reading/region", (image_sample(number) for number in range(100)))
    asked = slowly(monkeypatch, "read_range")
    reader = SourceReader(open_source(Source("memory://reading/region")), BlockCache(str(tmp_path), 1 << 20))
    at_once(16, lambda number: reader.load(0, number, number + 1))
    assert sorted(name for name, *_ in asked) == [OFFSETS, SHARD]
    found = at_once(4, lambda number: reader.load(0, number, number + 1, again=True))
    assert sorted(name for name, *_ in asked) == [OFFSETS, SHARD, SHARD]
    assert len({len(held.data) for held in found if held.data is not None}) == 1
