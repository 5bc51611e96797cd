"""What a dataset of very many shards costs a rank and its workers: `python -m benchmarks.manifest [SHARDS] [FOLDER]`.

A manifest of a million shards of 41 MB (41 TB; its shards are never read) is written once. Then, each in a process of its own:

    build    CPU seconds of build_loader, and MB of memory that it adds, at the end and at its peak; the same for a pass over a
             loop of plain Python, so that a busy machine shows
    workers  seconds from starting two worker processes by spawn until each has the order of the first batch, and MB of each that
             are its own
"""

from __future__ import annotations

import json
import multiprocessing
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from loaders import LoaderConfig, Source, World, build_loader
from wds_tools.dataset.layout import MANIFEST
from wds_tools.format.manifest import Manifest, serialize_manifest
from wds_tools.format.shards import ShardInfo, Shards
from wds_tools.run.by_file import ByFile

NUM_SHARDS = 1_000_000
SHARD_SAMPLES = 10_000
BATCH = 1024


def write(folder: Path, num_shards: int) -> None:
    """The manifest."""
    rng = np.random.default_rng(0)
    shards = Shards.of(
        ShardInfo(
            name=f"shard-{number // 50:06d}-{number % 50:04d}.tar",
            samples=SHARD_SAMPLES,
            bytes=4096 * SHARD_SAMPLES + 1024,
            xxh128=rng.bytes(16).hex(),
            members=("json", "vqcode_512.npy"),
            data_types={"image_text": SHARD_SAMPLES},
            text_chars=100 * SHARD_SAMPLES,
            num_codes=1024 * SHARD_SAMPLES,
        )
        for number in range(num_shards)
    )
    folder.mkdir(parents=True, exist_ok=True)
    (folder / MANIFEST).write_bytes(serialize_manifest(Manifest(shards=shards, inputs=num_shards * SHARD_SAMPLES)))


def memory_mb(name: str) -> int:
    """A figure of this process, such as "RssAnon": what is its own alone."""
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith(name)) >> 10


def build(folder: str) -> dict[str, float]:
    """See the module."""
    before, begun = memory_mb("VmRSS"), time.process_time()
    loader = build_loader(LoaderConfig(sources=(Source(folder),), batch_size=BATCH), World())
    cpu_s, added, peak = time.process_time() - begun, memory_mb("VmRSS") - before, memory_mb("VmHWM") - before
    begun = time.process_time()
    sum(number * number for number in range(2_000_000))
    assert loader.num_samples
    return {"cpu_s": cpu_s, "added_mb": added, "peak_mb": peak, "loop_s": time.process_time() - begun}


def _locate(order: Any, queue: Any) -> None:
    before = memory_mb("RssAnon")
    order.locate(0, np.arange(BATCH))
    queue.put((time.monotonic(), time.process_time(), before))


def workers(folder: str) -> dict[str, Any]:
    """See the module."""
    order = build_loader(LoaderConfig(sources=(Source(folder),), batch_size=BATCH), World())._order
    order.locate(0, np.arange(1))
    context = multiprocessing.get_context("spawn")
    queue, by_file, begun = context.SimpleQueue(), ByFile(order), time.monotonic()
    processes = [context.Process(target=_locate, args=(by_file, queue)) for _ in range(2)]
    for process in processes:
        process.start()
    found = [queue.get() for _ in processes]
    for process in processes:
        process.join()
    return {
        "seconds": [at - begun for at, _, _ in found],
        "cpu_s": [cpu_s for _, cpu_s, _ in found],
        "own_mb": [own for _, _, own in found],
    }


if __name__ == "__main__":
    if sys.argv[1:2] in (["build"], ["workers"]):
        print(json.dumps({"build": build, "workers": workers}[sys.argv[1]](sys.argv[2])))
    else:
        num_shards, folder = int((sys.argv[1:2] or [NUM_SHARDS])[0]), Path((sys.argv[2:3] or ["bench-out/manifest"])[0])
        if not (folder / MANIFEST).exists():
            write(folder, num_shards)
        for what in ("build", "workers"):
            subprocess.run([sys.executable, "-m", "benchmarks.manifest", what, str(folder)], check=True)
        print(f"load {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores")
