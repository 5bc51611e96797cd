"""Takes the time of one way to read: `python -m benchmarks.peers.NAME write|time|verify|paced FOLDER`.

A way is a module that has

    FORMAT                      its folder below FOLDER/pairs and FOLDER/documents
    write(kind_folder)          makes kind_folder/FORMAT from kind_folder/source
    samples(data_folder)        opens the dataset and yields every sample once, shuffled: (str, codes); codes are 1,024 integers
                                in whatever array or tensor the way gives cheapest, None for a document
    batches(data_folder)        the same in ready batches of 1,024, the last one short: (list of str, int32 tensor (B, 32, 32))
    remote(place)               the same batches of pairs from object storage, if it can read from there; see Remote

`time` runs on one core, with one thread for torch; the clock starts after the imports and includes opening. It stops at the end
of the epoch or after LIMIT_S, whichever comes first, so a slow way is timed on its first thousands of samples; a fast one opens
and reads again until SHORTEST_S have been measured.
`verify` reads whole epochs without a clock and proves with a sum of hashes that every sample arrived exactly once and intact.
`paced` reads pairs from the S3 server that the environment names, on one core: seconds to the first batch, and samples a second
from then on, to the end of the epoch or for PACED_LIMIT_S. Each prints one JSON line per measure.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.loader_workload import GRID, NUM_SAMPLES, digest
from benchmarks.paced_s3 import BUCKET

BATCH = 1024
LIMIT_S = 4.0
SHORTEST_S = 1.5
PACED_LIMIT_S = 8.0
MEASURES = (("pairs", "samples"), ("pairs", "batches"), ("documents", "samples"))


@dataclass(frozen=True)
class Remote:
    """A way's pairs in the bucket, and an empty folder for what it keeps of them."""

    endpoint: str
    """http://HOST:PORT; objects need no signature."""
    bucket: str
    prefix: str
    """pairs/FORMAT"""
    names: tuple[str, ...]
    """Of the files there."""
    scratch: Path

    @property
    def s3(self) -> str:
        """s3://BUCKET/PREFIX"""
        return f"s3://{self.bucket}/{self.prefix}"

    def http(self, suffix: str) -> list[str]:
        """URLs of the files whose names end so."""
        return [f"{self.endpoint}/{self.bucket}/{self.prefix}/{name}" for name in self.names if name.endswith(suffix)]


def main(way: Any) -> None:
    """What `python -m benchmarks.peers.NAME` does. `way` is that module's namespace: `main(globals())`."""
    command, folder = sys.argv[1], Path(sys.argv[2])
    if command == "write":
        for kind in NUM_SAMPLES:
            if not (made := folder / kind / way["FORMAT"]).is_dir():
                try:
                    way["write"](folder / kind)
                except BaseException:
                    shutil.rmtree(made, ignore_errors=True)  # else the next try fails for its being there
                    raise
        return
    torch.set_num_threads(1)
    if command != "verify":
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    if command == "paced":
        print(json.dumps(_paced(way, folder)), flush=True)
        return
    measure = {"time": _time, "verify": _verify}[command]
    for kind, unit in MEASURES:
        result = measure(way[unit], folder / kind / way["FORMAT"], unit)
        print(json.dumps({"kind": kind, "unit": unit, **result}), flush=True)


def stack_codes(codes: Sequence[np.ndarray]) -> torch.Tensor:
    """Arrays of 1,024 codes -> int32 tensor (B, 32, 32). Four times as fast as torch's default_collate."""
    return torch.from_numpy(np.concatenate(codes, axis=None).astype(np.int32)).view(-1, *GRID)


def _time(read: Callable[[Path], Iterator[Any]], folder: Path, unit: str) -> dict[str, float]:
    """Samples and seconds of as many passes as it takes to fill SHORTEST_S; seconds to the very first sample or batch."""
    count, seconds, first_s = _pass(read, folder, unit)
    while seconds < SHORTEST_S:
        more, lasted, _ = _pass(read, folder, unit)
        count, seconds = count + more, seconds + lasted
    return {"samples": count, "seconds": seconds, "first_s": first_s}


def _pass(read: Callable[[Path], Iterator[Any]], folder: Path, unit: str) -> tuple[int, float, float]:
    """Open and read to the end of the epoch or to LIMIT_S: samples, seconds, seconds to the first."""
    count, first_s = 0, 0.0
    stride = BATCH if unit == "samples" else 1  # looking at the clock costs as much as a sample of the fastest way
    begun = time.perf_counter()
    for texts, _ in read(folder):
        count += 1 if unit == "samples" else len(texts)
        if not first_s:
            first_s = time.perf_counter() - begun
        stride -= 1
        if not stride:
            if time.perf_counter() - begun > LIMIT_S:
                break
            stride = BATCH if unit == "samples" else 1
    return count, time.perf_counter() - begun, first_s


def _paced(way: Any, folder: Path) -> dict[str, float]:
    """{} if it reads local files alone."""
    if "remote" not in way:
        return {}
    local = folder / "pairs" / way["FORMAT"]
    names = tuple(sorted(path.name for path in local.iterdir()))
    with tempfile.TemporaryDirectory() as scratch:
        prefix = str(local.relative_to(folder))
        place = Remote(os.environ["AWS_ENDPOINT_URL"], BUCKET, prefix, names, Path(scratch))
        begun = time.perf_counter()
        steps = way["remote"](place)
        first = len(next(steps)[0])
        first_s = time.perf_counter() - begun
        count, begun, seconds = 0, time.perf_counter(), 0.0
        for texts, _ in steps:
            count, seconds = count + len(texts), time.perf_counter() - begun
            if seconds > PACED_LIMIT_S:
                break
    return {"first_s": first_s, "samples": count, "seconds": seconds, "first": first}


def _verify(read: Callable[[Path], Iterator[Any]], folder: Path, unit: str) -> dict[str, int]:
    """The sum of the digests of an epoch's samples, and their number."""
    count, total = 0, 0
    for texts, codes in read(folder):
        if unit == "samples":
            texts, codes = [texts], [codes]
        else:
            assert type(texts) is list, type(texts)
            assert codes.shape == (len(texts), *GRID), codes.shape
            assert codes.dtype == torch.int32, codes.dtype
        for text, grid in zip(texts, codes, strict=True):
            count += 1
            total += digest(text, grid)
    return {"samples": count, "checksum": total % 2**64}
