"""A dataset is read from S3 through a proxy that breaks what passes: what comes is right, or there is a StorageError in time."""

from __future__ import annotations

import os
import random
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from factory import image_sample, make_dataset, text_sample
from faults import FaultProxy, Faults
from s3 import BUCKET
from tokens import PROVENANCE

from loaders import LoaderConfig, ShardDataset, Source, build_loader
from wds_tools.check.verify import VerifyConfig, verify
from wds_tools.dataset.reader import read_manifest, read_shard
from wds_tools.errors import StorageError
from wds_tools.storage import open_store

SET = f"s3://{BUCKET}/chaos-set"
NUM_SHARDS = 6
HOPELESS_S, RETRY_S, STALL_S = 8.0, 30.0, 0.5
"""How long it is tried where nothing passes, and where every third try of a byte does, on a busy machine."""
LIMIT_S = 60.0 + NUM_SHARDS * 2 * RETRY_S
"""Of a whole case: each file of the set may be given up once, and there is time for the machine to be busy."""
STATUSES = (429, 500, 502, 503, 504)


class Network:
    """See the module."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._upstream = os.environ.get("AWS_ENDPOINT_URL")
        if self._upstream is None:
            return
        os.environ.update(WDS_TOOLS_RETRY_S=str(RETRY_S), WDS_TOOLS_STALL_S=str(STALL_S))
        samples = [image_sample(n, side=32) if n % 2 else text_sample(n, f"document {n} " * 700) for n in range(10 * NUM_SHARDS)]
        make_dataset(SET, samples, shard_samples=10, codes=PROVENANCE)
        self._expected = {name: read(folder) for name, read in READS.items()}

    def plan(self, rng: random.Random, number: int) -> tuple[str, Callable[[], None]]:
        name = list(READS)[number % len(READS)]
        is_hopeless = rng.random() < 0.1
        chances = [rng.random() * rng.choice((0, 1)) for _ in range(5)]
        total = max(sum(chances), 1e-9)
        kinds = ("reset", "truncate", "unavailable", "stall")
        faults = Faults(
            **{kind: chance / total for kind, chance in zip(kinds, chances, strict=False)},
            stall_s=rng.choice((0.2, 2.0)),
            statuses=STATUSES,
            seed=rng.randrange(1 << 30),
        )
        latency_s, bytes_per_s = rng.choice((0.0, 0.0, 0.05)), rng.choice((0.0, 0.0, 500_000.0, 2e6))
        what = f"{name}, {faults}, {latency_s=}, {bytes_per_s=}, {is_hopeless=}"
        if self._upstream is None:
            return f"{name} (skipped)", lambda: None
        return what, lambda: self._check(name, faults, latency_s, bytes_per_s, is_hopeless)

    def _check(self, name: str, faults: Faults, latency_s: float, bytes_per_s: float, is_hopeless: bool) -> None:
        assert self._upstream is not None
        in_a_row = 1 << 30 if is_hopeless else 2
        outcome: list[Any] = []
        with FaultProxy(self._upstream, in_a_row) as proxy, tempfile.TemporaryDirectory(dir=self._folder.parent) as cache:
            proxy.faults, proxy.latency_s, proxy.bytes_per_s = faults, latency_s, bytes_per_s
            os.environ.update(AWS_ENDPOINT_URL=proxy.endpoint, WDS_TOOLS_RETRY_S=str(HOPELESS_S if is_hopeless else RETRY_S))

            def run() -> None:
                try:
                    outcome.append(READS[name](Path(cache)))
                except BaseException as error:  # noqa: BLE001 - it is looked at below
                    outcome.append(error)

            try:
                thread = threading.Thread(target=run, daemon=True)
                thread.start()
                thread.join(LIMIT_S)
                assert outcome, f"it hangs: nothing after {LIMIT_S:g} s"
            finally:
                os.environ["AWS_ENDPOINT_URL"] = self._upstream
        (found,) = outcome
        if isinstance(found, StorageError) and is_hopeless:
            return
        if isinstance(found, BaseException):
            raise AssertionError(f"{type(found).__name__} in place of what is there") from found
        if is_hopeless and name == "verify":  # which goes on behind a shard that can't be read, and names it
            assert all(SET in problem for problem in found), found
            return
        assert found == self._expected[name], found if name == "verify" else "other data"


def _read(_: Path) -> Any:
    store = open_store(SET)
    return [(entry.name, bytes(store.read(entry.name))) for entry in store.list()]


def _samples(_: Path) -> Any:
    store = open_store(SET)
    return [(sample.key, sample.text) for row in read_manifest(store).shards for sample in read_shard(store, row)]


def _verify(_: Path) -> Any:
    return verify(VerifyConfig(input=SET, quiet=True)).problems


def _stream(cache: Path, **options: Any) -> Any:
    loader = build_loader(LoaderConfig(sources=(Source(SET),), batch_size=4, seed=1, check_crc=True, **options))
    try:
        batches = [(batch["__key__"], batch["text"], batch.get("codes", ())) for batch in loader]
        return [[None if grid is None else grid.tolist() for grid in codes] for _, _, codes in batches], [b[:2] for b in batches]
    finally:
        loader.close()


def _cached(cache: Path) -> Any:
    return _stream(cache, cache_dir=str(cache))


def _shards(_: Path) -> Any:
    return [(sample["__key__"], sample["text"]) for sample in ShardDataset(SET, seed=1)]


READS: dict[str, Callable[[Path], Any]] = {
    "read": _read,
    "samples": _samples,
    "verify": _verify,
    "stream": _stream,
    "stream with a cache": _cached,
    "ShardDataset": _shards,
}
