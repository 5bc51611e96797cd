"""Memory of a conversion does not grow with its input: 100 MB and 2 GB of each container, in processes of their own."""

from __future__ import annotations

import gzip
import io
import json
import os
import shutil
import sys
import tarfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from memory import grown_mb
from PIL import Image

SMALL_MB, LARGE_MB = 100, 2000
GROWTH_MB = 58
"""Of the peak in MiB, from one to the other: what a listing of twenty times as many files, and the allocator, take."""
LIMIT_MB = 380
"""Of the peak above that of a bare Python, 10 MiB."""


def photograph() -> bytes:
    """A JPEG of about 200 KB."""
    out = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (440, 440, 3), np.uint8)).save(out, "JPEG", quality=92)
    return out.getvalue()


IMAGE = photograph()
TEXT = " ".join(str(number) for number in np.random.default_rng(0).integers(0, 10**6, 3000))


def texts(megabytes: int) -> range:
    return range(megabytes * 10**6 // len(TEXT))


def images(megabytes: int) -> range:
    return range(megabytes * 10**6 // len(IMAGE))


def write_lines(opened: Callable[[Path], Any], name: str) -> Callable[[Path, int], None]:
    def write(folder: Path, megabytes: int) -> None:
        with opened(folder / name) as file:
            for number in texts(megabytes):
                file.write(json.dumps({"text": TEXT, "n": number}).encode() + b"\n")

    return write


def write_list(folder: Path, megabytes: int) -> None:
    with (folder / "all.json").open("wb") as file:
        for number in texts(megabytes):
            file.write((b",\n" if number else b"[") + json.dumps({"text": TEXT, "n": number}).encode())
        file.write(b"]")


def write_csv(folder: Path, megabytes: int) -> None:
    with (folder / "all.csv").open("w") as file:
        file.write("n,text\n")
        file.writelines(f"{number},{TEXT}\n" for number in texts(megabytes))


def batches(megabytes: int) -> Iterator[pa.RecordBatch]:
    numbers = texts(megabytes)
    for first in range(0, len(numbers), 500):
        yield pa.RecordBatch.from_pylist([{"text": TEXT + str(number), "n": number} for number in numbers[first : first + 500]])


def write_parquet(folder: Path, megabytes: int) -> None:
    schema = next(batches(1)).schema
    with pq.ParquetWriter(folder / "all.parquet", schema, use_dictionary=False, compression="none") as file:
        for batch in batches(megabytes):
            file.write_batch(batch)


def write_arrow(folder: Path, megabytes: int) -> None:
    with pa.ipc.new_stream(str(folder / "all.arrow"), next(batches(1)).schema) as file:
        for batch in batches(megabytes):
            file.write_batch(batch)


def add_pairs(file: Any, megabytes: int) -> None:
    with tarfile.open(fileobj=file, mode="w|") as archive:
        for number in images(megabytes):
            for suffix, data in (("jpg", IMAGE), ("txt", b"a few words")):
                member = tarfile.TarInfo(f"{number:06d}.{suffix}")
                member.size = len(data)
                archive.addfile(member, io.BytesIO(data))


def write_tar(folder: Path, megabytes: int) -> None:
    with (folder / "all.tar").open("wb") as file:
        add_pairs(file, megabytes)


def write_packed_tar(folder: Path, megabytes: int) -> None:
    with gzip.open(folder / "all.tar.gz", "wb", 1) as file:
        add_pairs(file, megabytes)


def write_pictures(folder: Path, megabytes: int) -> None:
    (folder / "first.jpg").write_bytes(IMAGE)
    (folder / "first.txt").write_text("a few words")
    for number in images(megabytes):
        os.link(folder / "first.jpg", folder / f"{number:06d}.jpg")
        os.link(folder / "first.txt", folder / f"{number:06d}.txt")


INPUTS: dict[str, tuple[str, Callable[[Path, int], None]]] = {
    "lines": ("documents", write_lines(partial(Path.open, mode="wb"), "all.jsonl")),
    "lines.gz": ("documents", write_lines(partial(gzip.open, mode="wb", compresslevel=1), "all.jsonl.gz")),
    "lines.zst": ("documents", write_lines(partial(zstandard.open, mode="wb"), "all.jsonl.zst")),
    "list": ("documents", write_list),
    "csv": ("documents", write_csv),
    "parquet": ("documents", write_parquet),
    "arrow": ("documents", write_arrow),
    "tar": ("pairs", write_tar),
    "tar.gz": ("pairs", write_packed_tar),
    "pictures": ("pairs", write_pictures),
}


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc; ru_maxrss would count the parent too")
@pytest.mark.parametrize("container", INPUTS)
def test_memory_does_not_grow_with_the_input(container: str, tmp_path: Path) -> None:
    kind, write = INPUTS[container]
    peaks = []
    for megabytes in (SMALL_MB, LARGE_MB):
        (tmp_path / "in").mkdir()
        write(tmp_path / "in", megabytes)
        words = ["convert", kind, "--input", str(tmp_path / "in"), "--output", str(tmp_path / "out"), "--quiet"]
        peaks.append(grown_mb("", f"from wds_tools.cli.main import main\nassert main({words!r}) == 0"))
        for name in ("in", "out"):
            shutil.rmtree(tmp_path / name)
    assert peaks[1] < LIMIT_MB, peaks
    assert peaks[1] < peaks[0] + GROWTH_MB, peaks
