"""Containers into shards on one core, two ways: `python -m benchmarks.containers tars|parquet|gzip plain|ours INPUT OUTPUT`.

          plain, what nothing can do without                       ours
tars      tarfile: each member read and written to another tar     convert pairs, with the images
parquet   pyarrow's scan of two columns, a row at a time to JSON   convert documents --keep url
gzip      isal, and orjson of each line                            convert documents

Prints the records and seconds that it took. `measure` writes the inputs and has the ways take turns.
"""

from __future__ import annotations

import io
import json
import os
import random
import shutil
import statistics
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import orjson

BARS = {"tars": 0.8, "parquet": 0.5, "gzip": 0.4}
"""Of the bytes a second of the plain way, at least."""
_ROUNDS = 5


def write_tars(folder: Path, num_tars: int = 4, num_samples: int = 250) -> None:
    """Tars as img2dataset writes them, of 200 KB images."""
    import numpy as np
    from PIL import Image

    folder.mkdir(parents=True)
    noise = np.random.default_rng(0)
    images = []
    for _ in range(16):
        out = io.BytesIO()
        Image.fromarray(noise.integers(0, 256, (440, 440, 3), np.uint8)).save(out, "JPEG", quality=92)
        images.append(out.getvalue())
    for number in range(num_tars):
        with tarfile.open(folder / f"{number:05d}.tar", "w") as tar:
            for sample in range(num_samples):
                key = f"{number:05d}{sample:04d}"
                about = {"url": f"https://example.org/{key}.jpg", "caption": "a few words", "similarity": 0.3, "key": key}
                for suffix, data in (("jpg", images[sample % 16]), ("txt", b"a few words"), ("json", orjson.dumps(about))):
                    member = tarfile.TarInfo(f"{key}.{suffix}")
                    member.size = len(data)
                    tar.addfile(member, io.BytesIO(data))


def _documents(count: int) -> Iterator[dict[str, object]]:
    draw = random.Random(0)
    words = ["".join(draw.choices("abcdefghijklmnop", k=draw.randint(2, 9))) for _ in range(5000)]
    for number in range(count):
        yield {
            "text": " ".join(draw.choices(words, k=500)),
            "id": f"<urn:uuid:{number:032x}>",
            "url": f"https://example.org/{number}",
            "language": "en",
            "score": draw.random(),
        }


def write_parquet(folder: Path, count: int = 30_000) -> None:
    """Documents as FineWeb has them."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    folder.mkdir(parents=True)
    pq.write_table(pa.Table.from_pylist(list(_documents(count))), folder / "000.parquet", row_group_size=1000)


def write_gzip(folder: Path, count: int = 30_000) -> None:
    """The same documents as C4 has them."""
    import gzip

    folder.mkdir(parents=True)
    (folder / "000.jsonl.gz").write_bytes(gzip.compress(b"".join(orjson.dumps(one) + b"\n" for one in _documents(count)), 6))


def plain_tars(folder: Path, out: Path) -> int:
    """Read and write; samples have three members."""
    out.mkdir()
    count = 0
    for path in sorted(folder.iterdir()):
        with tarfile.open(path) as tar, tarfile.open(out / path.name, "w") as copy:
            for member in tar:
                data = tar.extractfile(member)
                assert data is not None
                copy.addfile(member, io.BytesIO(data.read()))
                count += 1
    return count // 3


def plain_parquet(folder: Path, _: Path) -> int:
    """Scan two columns, a JSON of each row."""
    import pyarrow.parquet as pq

    count = 0
    for batch in pq.ParquetFile(folder / "000.parquet").iter_batches(1000, columns=["text", "url"], use_threads=False):
        for row in batch.to_pylist():
            orjson.dumps(row)
            count += 1
    return count


def plain_gzip(folder: Path, _: Path) -> int:
    """Decompress and parse."""
    from isal import igzip

    with igzip.open(folder / "000.jsonl.gz", "rb") as lines:
        return sum(1 for line in lines if orjson.loads(line))


def our_pairs(folder: Path, out: Path) -> int:
    """This project's converter, one worker."""
    from wds_tools.convert import run_conversion
    from wds_tools.convert.pairs import PairsConfig

    return run_conversion(PairsConfig(input=(str(folder),), output=str(out), quiet=True)).samples


def our_documents(folder: Path, out: Path) -> int:
    """This project's converter, one worker."""
    from wds_tools.convert import run_conversion
    from wds_tools.convert.documents import DocumentsConfig

    return run_conversion(DocumentsConfig(input=(str(folder),), output=str(out), keep=("url",), quiet=True)).samples


_WRITE: dict[str, Callable[[Path], None]] = {"tars": write_tars, "parquet": write_parquet, "gzip": write_gzip}
_WAYS: dict[tuple[str, str], Callable[[Path, Path], int]] = {
    ("tars", "plain"): plain_tars,
    ("tars", "ours"): our_pairs,
    ("parquet", "plain"): plain_parquet,
    ("parquet", "ours"): our_documents,
    ("gzip", "plain"): plain_gzip,
    ("gzip", "ours"): our_documents,
}


def measure(out: Path) -> dict[str, dict[str, float]]:
    """Container -> way -> MB of input a second, median over the rounds."""
    speeds: dict[str, dict[str, float]] = {}
    for kind, write in _WRITE.items():
        write(out / kind)
        size = sum(path.stat().st_size for path in (out / kind).iterdir())
        found: dict[str, list[float]] = {"plain": [], "ours": []}
        for _ in range(_ROUNDS):
            for way, values in found.items():
                shutil.rmtree(out / "made", ignore_errors=True)
                command = [sys.executable, "-m", "benchmarks.containers", kind, way, str(out / kind), str(out / "made")]
                result = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
                values.append(size / 1e6 / result["seconds"])
        speeds[kind] = {way: statistics.median(values) for way, values in found.items()}
        shutil.rmtree(out / kind)
    return speeds


if __name__ == "__main__":
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})

    import wds_tools.convert.documents
    import wds_tools.convert.pairs  # noqa: F401  before the clock starts

    kind, way = sys.argv[1:3]
    begun = time.perf_counter()
    records = _WAYS[kind, way](Path(sys.argv[3]), Path(sys.argv[4]))
    print(json.dumps({"records": records, "seconds": time.perf_counter() - begun}))
