"""What a restart costs, what the plan of 100 million samples takes, and memory over epochs.

    first    from `build_loader` to the first batch, afresh and after restoring at 90 % of the epoch, in turns
    plan     building the plan of 10,000 shards of 10,000 samples and looking the first batch up; seconds, and bytes at the peak
    memory   VmRSS after each of three epochs

`python -m benchmarks.loader_restore first|plan|memory FOLDER` prints each as JSON. The 100 million are real files to the loader:
hard links of the small set's shards under 10,000 names, with a manifest that lists them all.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
import tracemalloc
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from loaders import LoaderConfig, Source, World, build_loader
from loaders.order.plan import SourcePlan, default_order
from wds_tools.dataset.layout import INDEX_SUFFIX, MANIFEST
from wds_tools.dataset.reader import read_manifest
from wds_tools.format import manifest as manifests
from wds_tools.storage import open_store

MANY_SAMPLES = 100_000_000
RESTORE_AT = 0.9
ROUNDS = 9
EPOCHS = 3
BATCH = 1024


def measure(dataset: Path, out: Path) -> dict[str, Any]:
    """All three. `dataset` is ours, of 60,000 pairs; `out` is made."""
    link_many(dataset, out)
    return {
        "first_60k": _run("first", dataset),
        "first_100M": _run("first", out),
        "plan_100M": _run("plan", out),
        "memory": _run("memory", dataset),
    }


def link_many(dataset: Path, out: Path) -> None:
    """A dataset of MANY_SAMPLES (or a few more): the shards of a small one, each under many names."""
    out.mkdir(parents=True)
    manifest = read_manifest(open_store(str(dataset)))
    copies = -(-MANY_SAMPLES // manifest.samples)
    rows = []
    for copy in range(copies):
        for number, row in enumerate(manifest.shards):
            name = f"shard-{copy:06d}-{number:04d}.tar"
            for suffix in ("", INDEX_SUFFIX):
                os.link(dataset / (row.name + suffix), out / (name + suffix))
            rows.append(replace(row, name=name))
    many = replace(manifest, shards=tuple(rows), inputs=copies * manifest.inputs)
    (out / MANIFEST).write_bytes(manifests.serialize_manifest(many))


def first_batch(folder: str) -> dict[str, float]:
    """Median seconds to the first batch of a fresh start and of a restore; the dataset is read from the page cache."""
    config = LoaderConfig(sources=(Source(folder),), batch_size=BATCH, seed=42)
    state = build_loader(config, World()).state_dict()
    state["position"] = int(RESTORE_AT * read_manifest(open_store(folder)).samples) // BATCH * BATCH
    seconds: dict[str, list[float]] = {"fresh_s": [], "restored_s": []}
    for number in range(ROUNDS + 1):
        for way, values in seconds.items():
            begun = time.perf_counter()
            loader = build_loader(config, World())
            if way == "restored_s":
                loader.load_state_dict(state)
            assert len(next(iter(loader))["text"]) == BATCH
            if number:  # the first round warms up
                values.append(time.perf_counter() - begun)
            del loader
    return {way: statistics.median(values) for way, values in seconds.items()}


def plan(_: str) -> dict[str, float]:
    """Seconds and peak bytes of the plan alone."""
    samples = np.full(MANY_SAMPLES // 10_000, 10_000)
    sizes = samples * 4096
    order = default_order(int(sizes.sum()), BATCH, seed=42)

    def build() -> None:
        SourcePlan(samples, sizes, 8, order).locate(0, np.arange(BATCH))

    build()
    seconds = []
    for _ in range(ROUNDS):
        begun = time.perf_counter()
        build()
        seconds.append(time.perf_counter() - begun)
    tracemalloc.start()
    build()
    return {"seconds": statistics.median(seconds), "bytes": tracemalloc.get_traced_memory()[1]}


def memory(folder: str) -> dict[str, list[int]]:
    """Resident bytes after each epoch."""
    loader = build_loader(LoaderConfig(sources=(Source(folder),), batch_size=BATCH, seed=42), World())
    resident = []
    for _ in range(EPOCHS):
        for _ in loader:
            pass
        with open("/proc/self/status") as status:
            resident.append(1024 * next(int(line.split()[1]) for line in status if line.startswith("VmRSS")))
    return {"resident_bytes": resident}


def _run(what: str, folder: Path) -> dict[str, Any]:
    """One of them in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.loader_restore", what, str(folder)]
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)


if __name__ == "__main__":
    print(json.dumps({"first": first_batch, "plan": plan, "memory": memory}[sys.argv[1]](sys.argv[2])))
