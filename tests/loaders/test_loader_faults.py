"""Training from a real S3 server whose answers break, stall, or stop coming: the sequence is that of an undisturbed local run."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import obstore
import pytest
import torch
from commands import environment
from factory import image_sample, make_dataset, text_sample
from faults import FaultProxy, Faults, Request, reset, stall, status, truncate
from obstore.store import S3Store
from s3 import S3Server

from loaders import Loader, LoaderConfig, ShardDataset, Source, World, build_loader
from wds_tools.errors import FormatError, NotFound, StorageError
from wds_tools.storage import join, open_store

COUNT = 240
SHARD_SAMPLES = 50
BATCH = 8
TIGHT = 110_000
"""Memory of a process that is less than its open blocks take: pieces are dropped and fetched again."""
AMPLE = 600_000
"""Enough for all pieces, too little to keep the dataset whole."""
Row = tuple[str, str, Any]


def storm(seed: int, rate: float) -> Faults:
    """That share of the reads breaks, in every way there is; a stall lasts until the client hangs up."""
    quarter = rate / 4
    return Faults(reset=quarter, truncate=quarter, unavailable=quarter, stall=quarter, stall_s=20, statuses=(500, 503), seed=seed)


ONE_OF_EACH = reset(400), truncate(300), status(503), stall(20, after=200)


def sample(number: int) -> Any:
    """Three captions with codes, and a document."""
    return image_sample(number, side=16) if number % 4 else text_sample(number, f"document {number} " * (number % 90))


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("local") / "set"
    make_dataset(folder, map(sample, range(COUNT)), shard_samples=SHARD_SAMPLES)
    return str(folder)


@pytest.fixture
def proxy(s3: S3Server, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultProxy]:
    """A proxy before the S3 server, with the environment pointing at it: a minute of patience, 0.3 s for a stall."""
    with FaultProxy(s3.endpoint) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
        monkeypatch.setenv("WDS_TOOLS_RETRY_S", "60")
        monkeypatch.setenv("WDS_TOOLS_STALL_S", "0.3")
        yield proxy


@pytest.fixture
def remote(local: str, proxy: FaultProxy) -> str:
    """The same dataset on S3."""
    url = f"s3://tests/{uuid.uuid4().hex}"
    store = open_store(url)
    for path in Path(local).rglob("*"):
        if path.is_file():
            store.put(str(path.relative_to(local)), path.read_bytes())
    proxy.requests.clear()
    return url


@pytest.fixture
def in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Read this small dataset as a large one is: in blocks of a few samples, each for itself."""
    monkeypatch.setattr("loaders.order.plan.SMALL_BYTES", 0)
    monkeypatch.setattr("loaders.reading.planner.SMALL_BYTES", 0)
    monkeypatch.setattr("loaders.order.plan.MIN_BLOCK_BYTES", 12_000)
    monkeypatch.setattr("loaders.order.plan._LANES_PER_SAMPLE", (2,))
    monkeypatch.setattr("loaders.shards._BATCH", BATCH)


def loader(url: str, **settings: Any) -> Loader:
    settings = {"batch_size": BATCH, "last_batch": "short", "scarce_memory": True, **settings}
    config = LoaderConfig(sources=(Source(url),), **settings)
    return build_loader(config, World())


def rows(batches: Iterable[dict[str, Any]]) -> list[Row]:
    """(key, text, codes) of all samples."""
    found: list[Row] = []
    for batch in batches:
        grids = batch.get("codes", [None] * len(batch["__key__"]))
        codes = [None if grid is None else grid.tolist() for grid in grids]
        found += zip(batch["__key__"], batch["text"], codes, strict=True)
    return found


def sample_rows(samples: Iterable[dict[str, Any]]) -> list[Row]:
    return [(one["__key__"], one["text"], one["codes"].tolist() if "codes" in one else None) for one in samples]


def streamed(dataset: ShardDataset, num_workers: int) -> list[Row]:
    return sample_rows(torch.utils.data.DataLoader(dataset, batch_size=None, num_workers=num_workers))


def collect(batches: Iterable[dict[str, Any]], found: list[Row]) -> None:
    """Add what comes to `found`, so that it is there when an error follows."""
    for batch in batches:
        found += rows([batch])


def assert_whole(found: list[Row]) -> None:
    assert sorted(key for key, _, _ in found) == sorted(sample(number).key for number in range(COUNT))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:num_workers=", "ignore:This DataLoader will create")
@pytest.mark.parametrize("what", ["memory", "workers", "ahead", "cache", "latency", "requests"])
def test_the_samples_of_each_batch_are_the_same_in_ten_settings_of_whatever_reads(
    local: str, remote: str, proxy: FaultProxy, tmp_path: Path, in_pieces: None, what: str
) -> None:
    expected = [rows([batch]) for batch in loader(local)]
    for number in range(10):
        settings = {
            "memory": {"memory_bytes": TIGHT + 60_000 * number},
            "workers": {"num_workers": number},
            "ahead": {"num_workers": 2, "prefetch_factor": number + 1},
            "cache": {"cache_dir": str(tmp_path / "cache"), "cache_bytes": 40_000 * (10 - number)},
            "latency": {"memory_bytes": AMPLE},
            "requests": {"memory_bytes": AMPLE, "max_requests": 2**number},
        }[what]
        proxy.latency_s = 0.004 * number if what == "latency" else 0.0
        made = loader(remote, **settings)
        assert [rows([batch]) for batch in made] == expected, settings
        made.close()


@pytest.mark.parametrize(
    ("num_workers", "memory_bytes", "rate", "latency_s", "check_crc"),
    [
        (0, 2 << 30, 0.4, 0.02, False),
        (2, AMPLE, 0.2, 0.02, False),
        (0, TIGHT, 0.03, 0, True),
        pytest.param(2, 2 << 30, 0.6, 0, True, marks=pytest.mark.slow),
        pytest.param(0, AMPLE, 0.4, 0.1, False, marks=pytest.mark.slow),
        pytest.param(2, TIGHT, 0.2, 0.1, False, marks=pytest.mark.slow),
    ],
)
def test_an_epoch_through_a_storm_is_that_of_an_undisturbed_local_run(
    local: str,
    remote: str,
    proxy: FaultProxy,
    in_pieces: None,
    num_workers: int,
    memory_bytes: int,
    rate: float,
    latency_s: float,
    check_crc: bool,
) -> None:
    """By the indices, which a CRC-32 needs, and without any index."""
    expected = rows(loader(local))
    assert_whole(expected)
    proxy.faults, proxy.latency_s = storm(1, rate), latency_s
    made = loader(remote, num_workers=num_workers, memory_bytes=memory_bytes, check_crc=check_crc)
    proxy.once(*ONE_OF_EACH)
    assert rows(made) == expected
    made.close()
    assert [request for request in proxy.requests if request.fault]
    assert bool(proxy.reads(".index")) == check_crc


@pytest.mark.parametrize("num_workers", [0, 2])
def test_samples_through_a_storm_are_those_of_an_undisturbed_local_run(
    local: str, remote: str, proxy: FaultProxy, in_pieces: None, num_workers: int
) -> None:
    expected = streamed(ShardDataset(local), 0)
    assert_whole(expected)
    proxy.faults = storm(2, 0.2)
    dataset = ShardDataset(remote, memory_bytes=TIGHT, scarce_memory=True)
    proxy.once(*ONE_OF_EACH)
    assert streamed(dataset, num_workers) == expected
    assert [request for request in proxy.requests if request.fault]


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(6))
def test_many_storms_change_nothing_over_two_epochs(
    local: str, remote: str, proxy: FaultProxy, in_pieces: None, seed: int
) -> None:
    quiet = loader(local)
    expected = [rows(quiet) for _ in range(2)]
    proxy.faults = storm(seed, 0.5)
    made = loader(remote, num_workers=seed % 3, memory_bytes=(2 << 30, AMPLE, TIGHT)[seed % 4 % 3])
    assert [rows(made) for _ in range(2)] == expected
    made.close()


SECOND_PROCESS = """
import sys
from loaders import LoaderConfig, Source, World, build_loader
url, cache, out = sys.argv[1:]
config = LoaderConfig(sources=(Source(url),), batch_size=8, last_batch="short", cache_dir=cache)
made = build_loader(config, World())
with open(out, "w") as file:
    file.writelines(f"{key}\\n" for batch in made for key in batch["__key__"])
"""


@pytest.mark.slow
def test_a_cache_serves_the_second_epoch_the_workers_and_a_second_process(
    local: str, remote: str, proxy: FaultProxy, tmp_path: Path
) -> None:
    cache = str(tmp_path / "cache")
    quiet = loader(local)
    expected = [rows(quiet) for _ in range(2)]
    made = loader(remote, cache_dir=cache, memory_bytes=TIGHT)
    first = rows(made)
    assert len(proxy.reads(".tar")) > 0
    proxy.requests.clear()
    assert [first, rows(made)] == expected
    assert proxy.reads(".tar") == []
    workers = loader(remote, cache_dir=cache, num_workers=2)
    assert rows(workers) == expected[0]
    workers.close()
    assert proxy.reads(".tar") == []
    assert workers.stats()["cache_hits"] > 0
    keys = tmp_path / "keys"
    script = [sys.executable, "-c", SECOND_PROCESS, remote, cache, str(keys)]
    subprocess.run(script, env=environment(), check=True, timeout=200)
    assert keys.read_text().split() == [key for key, _, _ in expected[0]]
    assert proxy.reads(".tar") == []
    assert proxy.reads("manifest.json") != []


def test_samples_come_from_the_cache_too(local: str, remote: str, proxy: FaultProxy, tmp_path: Path) -> None:
    expected = streamed(ShardDataset(local), 0)
    cache = str(tmp_path / "cache")
    assert streamed(ShardDataset(remote, cache_dir=cache), 2) == expected
    proxy.requests.clear()
    assert streamed(ShardDataset(remote, cache_dir=cache), 2) == expected
    assert proxy.reads(".tar") == []


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def swap(path: Path) -> None:
    other = next(one for one in sorted(path.parents[1].rglob("*-*-*")) if one.stat().st_size > 0 and one != path)
    path.write_bytes(other.read_bytes())


@pytest.mark.parametrize("damage", [flip, cut, swap, Path.unlink])
def test_a_damaged_cache_changes_nothing(
    local: str, remote: str, proxy: FaultProxy, tmp_path: Path, damage: Callable[[Path], None]
) -> None:
    cache = tmp_path / "cache"
    expected = rows(loader(local))
    first = loader(remote, cache_dir=str(cache))
    batches = iter(first)
    begun = rows([next(batches)])
    blocks = [path for path in sorted(cache.rglob("*-*-*")) if path.is_file()]
    assert blocks
    for path in blocks:
        damage(path)
    proxy.requests.clear()
    assert rows(loader(remote, cache_dir=str(cache))) == expected  # another process begins
    assert proxy.reads(".tar") != []
    assert begun + rows(batches) == expected  # and the one at work goes on


def test_what_a_cache_kept_of_a_damaged_shard_is_fetched_anew_once_it_is_repaired(tmp_path: Path) -> None:
    url = f"memory://repaired/{uuid.uuid4().hex}"
    make_dataset(url, map(sample, range(COUNT)), shard_samples=SHARD_SAMPLES)
    store, cache = open_store(url), str(tmp_path / "cache")
    name = "shard-000000-0001.tar"
    good = store.read(name)
    expected = rows(loader(url))
    store.put(name, bytes(byte ^ (at % 700 == 600) for at, byte in enumerate(good)))
    with pytest.raises(FormatError, match=name):
        rows(loader(url, cache_dir=cache, check_crc=True))
    store.put(name, good)
    repaired = loader(url, cache_dir=cache, check_crc=True)
    assert rows(repaired) == expected
    assert repaired.stats()["requests"] <= 12  # it is not fetched again for every sample
    assert rows(loader(url, cache_dir=cache, check_crc=True)) == expected


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_server_gone_for_good_ends_the_run_with_the_position_to_resume_from(
    local: str, remote: str, proxy: FaultProxy, in_pieces: None, monkeypatch: pytest.MonkeyPatch, num_workers: int
) -> None:
    monkeypatch.setenv("WDS_TOOLS_RETRY_S", "1")
    expected = rows(loader(local))
    made = loader(remote, num_workers=num_workers, memory_bytes=TIGHT, prefetch_factor=1)
    batches = iter(made)
    found = rows(islice(batches, 3))
    proxy.leave()
    gone = time.monotonic()
    with pytest.raises(StorageError) as caught:
        collect(batches, found)
    assert time.monotonic() - gone < 40  # 1 s of trying, and room for a slow machine
    assert BATCH * 3 <= len(found) < COUNT
    assert made.position == len(found)
    assert f"epoch 0, position {len(found)}" in "".join(caught.value.__notes__)
    assert re.search(rf"{remote}/shard-\S+\.tar", str(caught.value))
    state = json.loads(json.dumps(made.state_dict()))
    proxy.come_back()
    resumed = loader(remote, num_workers=2 - num_workers, memory_bytes=TIGHT)
    resumed.load_state_dict(state)
    assert found + rows(resumed) == expected
    resumed.close()
    assert found + rows(made) == expected  # so does the loader that met the error
    made.close()


def test_samples_end_with_an_error_too_and_go_on_from_the_state(
    local: str, remote: str, proxy: FaultProxy, in_pieces: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WDS_TOOLS_RETRY_S", "1")
    monkeypatch.setattr("loaders.shards._READ_TOGETHER", 16)
    expected = streamed(ShardDataset(local), 0)
    dataset = ShardDataset(remote, memory_bytes=TIGHT, scarce_memory=True)
    samples = iter(dataset)
    found = sample_rows(islice(samples, 20))
    proxy.leave()
    with pytest.raises(StorageError, match=rf"{remote}/shard-\S+\.tar"):
        found.extend(row for one in samples for row in sample_rows([one]))
    assert 20 <= len(found) < COUNT
    proxy.come_back()
    resumed = ShardDataset(remote)
    resumed.load_state_dict(dataset.state_dict())
    assert found + sample_rows(resumed) == expected


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_missing_shard_is_said_at_once_with_its_url(remote: str, proxy: FaultProxy, in_pieces: None, num_workers: int) -> None:
    made = loader(remote, num_workers=num_workers)
    name = "shard-000000-0002.tar"
    open_store(remote).delete(name)
    with pytest.raises(NotFound, match=rf"{remote}/{name}.*\n.*epoch 0, position \d+"):
        rows(made)
    asked = proxy.reads(name)
    assert asked
    assert max(request.turn for request in asked) <= made.config.prefetch_factor  # no batch asks twice
    made.close()


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_refusal_in_the_middle_is_said_at_once_with_the_url(
    remote: str, proxy: FaultProxy, in_pieces: None, num_workers: int
) -> None:
    made = loader(remote, num_workers=num_workers)
    proxy.faults = lambda request: status(403) if request.path.endswith("2.tar") else None
    with pytest.raises(StorageError, match=rf"{remote}/shard-000000-0002\.tar.*access denied.*\n.*epoch 0, position \d+"):
        rows(made)
    assert max(request.turn for request in proxy.reads("2.tar")) <= made.config.prefetch_factor
    made.close()


def test_a_wrong_key_is_said_before_anything_is_read(remote: str, proxy: FaultProxy, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    with pytest.raises(StorageError, match=rf"{remote}.*the secret is not that of the key"):
        loader(remote)
    assert len(proxy.requests) == 1


def bucket_of(s3: S3Server) -> S3Store:
    """A client that goes past the proxy."""
    return S3Store(
        s3.bucket,
        endpoint=s3.endpoint,
        access_key_id=s3.access_key,
        secret_access_key=s3.secret_key,
        region="us-east-1",
        client_options={"allow_http": True},
    )


def other_bytes(data: bytes) -> bytes:
    """The shard with other texts and codes: of the same size and layout."""
    return data.replace(b"caption", b"CAPTION").replace(b"document", b"DOCUMENT")


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_shard_replaced_by_another_of_its_size_is_found_by_the_crc(
    remote: str, proxy: FaultProxy, in_pieces: None, num_workers: int
) -> None:
    store, name = open_store(remote), "shard-000000-0002.tar"
    made = loader(remote, check_crc=True, memory_bytes=TIGHT, prefetch_factor=1, num_workers=num_workers)
    found = rows(islice(made, 1))
    store.put(name, other_bytes(store.read(name)))
    epochs = (batch for _ in range(4) for batch in made)  # what was read ahead is still the old shard
    with pytest.raises(FormatError, match=rf"{remote}/{name}, sample \d+ at byte \d+.* CRC-32.*\n.*epoch \d, position \d+"):
        collect(epochs, found)
    assert made.epoch * COUNT + made.position == len(found)
    assert not [text for _, text, _ in found if "CAPTION" in text or "DOCUMENT" in text]
    made.close()


def test_a_shard_that_became_shorter_is_named(remote: str, proxy: FaultProxy, in_pieces: None) -> None:
    store, name = open_store(remote), "shard-000000-0002.tar"
    made = loader(remote, memory_bytes=TIGHT)
    rows(islice(made, 1))
    store.put(name, store.read(name)[: -20 * 1024])
    with pytest.raises(StorageError, match=rf"{remote}/{name}: .* cut off or replaced"):
        rows(batch for _ in range(4) for batch in made)


def test_a_shard_replaced_while_a_piece_of_it_is_on_its_way_is_named(
    remote: str, proxy: FaultProxy, s3: S3Server, in_pieces: None
) -> None:
    name = "shard-000000-0002.tar"
    bucket, key = bucket_of(s3), join(remote, name).removeprefix("s3://tests/")
    changed: list[Request] = []

    def replace_in_mid_body(request: Request) -> Any:
        if not request.path.endswith(name) or changed[1:] or (changed and request.end != changed[0].end):
            return None
        changed.append(request)
        if changed[1:]:  # the piece is asked for again, from the byte reached
            obstore.put(bucket, key, other_bytes(bytes(obstore.get(bucket, key).bytes())))
            return None
        return truncate(request.num_bytes // 2)

    made = loader(remote, memory_bytes=TIGHT)
    proxy.faults = replace_in_mid_body
    with pytest.raises(StorageError, match=rf"{remote}/{name} was replaced while it was read.*\n.*position \d+"):
        rows(made)
    assert len(changed) == 2


def test_an_index_replaced_by_that_of_another_shard_is_named(remote: str, proxy: FaultProxy) -> None:
    store = open_store(remote)
    store.put("shard-000000-0002.tar.index", store.read("shard-000000-0001.tar.index"))
    with pytest.raises(FormatError, match=rf"{remote}/shard-000000-0002\.tar\.index: the index is stale"):
        rows(loader(remote, check_crc=True))


def test_a_shard_replaced_by_one_of_another_size_is_noticed_without_a_crc(remote: str, in_pieces: None) -> None:
    store, name = open_store(remote), "shard-000000-0002.tar"
    store.put(name, other_bytes(store.read(name)) + bytes(10240))
    with pytest.raises((FormatError, StorageError), match=rf"{remote}/{name}.*replaced"):
        rows(loader(remote, memory_bytes=TIGHT))


@pytest.mark.slow
def test_a_cache_too_small_for_the_data_is_shared_by_several_readers_at_once(
    local: str, remote: str, proxy: FaultProxy, tmp_path: Path
) -> None:
    cache = str(tmp_path / "cache")
    plain = loader(local)
    expected = [rows(plain) for _ in range(3)]
    settings = {"cache_dir": cache, "cache_bytes": 260_000, "memory_bytes": TIGHT}
    here, workers = loader(remote, **settings), loader(remote, num_workers=2, **settings)
    for epoch in range(3):
        assert rows(workers) == expected[epoch]
        assert rows(here) == expected[epoch]
    workers.close()
    assert here.stats()["cache_evicted"] + workers.stats()["cache_evicted"] > 0
    assert sum(path.stat().st_size for path in Path(cache).rglob("*-*-*")) <= 260_000


INTERRUPTED = """
import sys, time
import loaders.order.plan, loaders.reading.fetches, loaders.reading.planner
loaders.order.plan.SMALL_BYTES = loaders.reading.planner.SMALL_BYTES = 0
loaders.order.plan.MIN_BLOCK_BYTES = 6000
from loaders import LoaderConfig, Source, World, build_loader
config = LoaderConfig(sources=(Source(sys.argv[1]),), batch_size=2, last_batch="short", max_requests=2)
for batch in build_loader(config, World(rank=0, world_size=2)):
    print("a batch", flush=True)
    time.sleep(100)
"""


@pytest.mark.slow
def test_an_interrupted_run_does_not_fetch_all_that_it_had_planned(remote: str, proxy: FaultProxy) -> None:
    proxy.latency_s = 0.05
    script = [sys.executable, "-c", INTERRUPTED, remote]
    with subprocess.Popen(script, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == b"a batch\n"
            process.send_signal(signal.SIGINT)
            begun = len(proxy.reads(".tar"))
            process.wait(60)
        finally:
            process.kill()
    assert len(proxy.reads(".tar")) <= begun + 8
