"""Bytes per second from S3: the loader against bare GETs. SeaweedFS on loopback, 1.2 GB, nothing cached on the client.

    ours      a whole epoch of batches, from opening to the last; bytes and requests as `loader.stats()` counts them
    ranges    obstore GETs of the very ranges that the loader asked for, in that order, 64 in flight, bytes thrown away
    objects   obstore streams of whole objects, 64 in flight, bytes thrown away

Each runs in a fresh process, in turns; the server has read everything once before, so its disk plays no part. Client and server
share the machine's cores.
`python -m benchmarks.loader_s3 ours|ranges|objects|trace URL RANGES` prints JSON; `trace` reads an epoch and writes RANGES.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import obstore
from obstore.store import S3Store

from benchmarks.loader_workload import CODEBOOK_SIZE, GRID
from loaders import LoaderConfig, Source, World, build_loader
from tests.s3 import BUCKET, serve_s3
from wds_tools.dataset.output import Output, OutputSpec
from wds_tools.dataset.writer import ShardLimits, TaskWriter
from wds_tools.format.schema import Sample
from wds_tools.storage import open_store
from wds_tools.storage.objects import ObjectStore

NUM_SAMPLES = 300_000
NUM_TASKS = 30
IN_FLIGHT = 64
STREAM_BYTES = 8 << 20
PREFIX = "pairs"
URL = f"s3://{BUCKET}/{PREFIX}"


def measure(out: Path, rounds: int) -> dict[str, Any]:
    """Median bytes per second of each way, and the loader's bytes and requests. `out` is made."""
    ranges = out / "ranges.json"
    with serve_s3(out / "server") as server:
        env = {**os.environ, **server.env}
        _run(env, "write", ranges)
        _run(env, "trace", ranges)
        _run(env, "objects", ranges)
        results: dict[str, list[dict[str, float]]] = {"ours": [], "ranges": [], "objects": []}
        for _ in range(rounds):
            for way, measured in results.items():
                measured.append(_run(env, way, ranges))
    rates = {way: statistics.median(one["bytes"] / one["seconds"] for one in measured) for way, measured in results.items()}
    return {"bytes_per_s": rates, "bytes": results["ours"][0]["bytes"], "requests": results["ours"][0]["requests"]}


def write(_: Path) -> dict[str, float]:
    """The dataset: captions of 40 words and random codes, about 4.1 KB a sample, written by all cores."""
    store = open_store(URL)
    output = Output(store, OutputSpec(num_tasks=NUM_TASKS, source={"command": "benchmark"}))
    output.begin()
    with ProcessPoolExecutor() as pool:
        list(pool.map(_write_task, range(NUM_TASKS)))
    manifest = output.finish(output.results())
    return {"bytes": manifest.bytes}


def _write_task(task: int) -> None:
    rng = np.random.default_rng(task)
    caption = "a dog leaping to catch a frisbee " * 7
    with TaskWriter(open_store(URL), task, ShardLimits()) as writer:
        for number in range(NUM_SAMPLES // NUM_TASKS):
            codes = {"vqcode_512": rng.integers(0, CODEBOOK_SIZE, GRID, dtype="<u2")}
            writer.add(Sample(key=f"{task:06d}-{number:08d}", data_type="image_text", text=caption, codes=codes))
        writer.finish(writer.num_samples)


def ours(_: Path) -> dict[str, float]:
    """An epoch through the loader, in the main process."""
    begun = time.perf_counter()
    config = LoaderConfig(sources=(Source(URL),), batch_size=1024, seed=42, last_batch="short")
    loader = build_loader(config, World())
    count = sum(len(batch["text"]) for batch in loader)
    seconds = time.perf_counter() - begun
    assert count == NUM_SAMPLES, count
    stats = loader.stats()
    return {"seconds": seconds, "bytes": stats["bytes"], "requests": stats["requests"]}


def trace(file: Path) -> dict[str, float]:
    """An epoch through the loader that notes (key, start, end) of every ranged request."""
    read_range = ObjectStore.read_range
    asked: list[tuple[str, int, int]] = []

    def noted(store: ObjectStore, name: str, start: int, end: int, size: int | None = None) -> Any:
        asked.append((f"{PREFIX}/{name}", start, end))
        return read_range(store, name, start, end, size)

    ObjectStore.read_range = noted  # type: ignore[method-assign]
    ours(file)
    assert asked, "the loader no longer reads through ObjectStore.read_range: trace what it reads through now"
    file.write_text(json.dumps(asked))
    return {"bytes": sum(end - start for _, start, end in asked), "requests": len(asked)}


def ranges(file: Path) -> dict[str, float]:
    """The same ranges by bare GETs."""
    store = _client()
    return _clock(lambda one: len(obstore.get_range(store, one[0], start=one[1], end=one[2])), json.loads(file.read_text()))


def objects(_: Path) -> dict[str, float]:
    """All shards as streams."""
    store = _client()
    keys = [meta["path"] for page in obstore.list(store, PREFIX) for meta in page if meta["path"].endswith(".tar")]
    return _clock(lambda key: sum(map(len, obstore.get(store, key).stream(min_chunk_size=STREAM_BYTES))), keys)


def _client() -> S3Store:
    return S3Store(BUCKET, client_options={"allow_http": True})


def _clock(get: Callable[[Any], int], wanted: Sequence[Any]) -> dict[str, float]:
    """Seconds and bytes of getting everything, IN_FLIGHT at a time."""
    begun = time.perf_counter()
    with ThreadPoolExecutor(IN_FLIGHT) as pool:
        num_bytes = sum(pool.map(get, wanted))
    return {"seconds": time.perf_counter() - begun, "bytes": num_bytes}


def _run(env: dict[str, str], what: str, file: Path) -> dict[str, Any]:
    command = [sys.executable, "-m", "benchmarks.loader_s3", what, str(file)]
    return json.loads(subprocess.run(command, env=env, check=True, stdout=subprocess.PIPE, text=True).stdout)


if __name__ == "__main__":
    commands = {"write": write, "trace": trace, "ours": ours, "ranges": ranges, "objects": objects}
    print(json.dumps(commands[sys.argv[1]](Path(sys.argv[2]))))
