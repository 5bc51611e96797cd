"""Choosing samples: `python -m benchmarks.select [--samples N] [--rows N]`, or `make bench-select`.

    fields   of N samples with codes, beside `verify` of them, in one process each
    where    over the fields of R samples, whose files are made up here: seconds, and the most memory
    write    what is chosen, beside copying the bytes of the same tars with fsync, as the writer does

Bars: fields at half of verify's speed, 10 M rows in 60 s within 1 GB, writing at half of copying. Each is a process of its own.
"""

from __future__ import annotations

import argparse
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet

from wds_tools import DatasetWriter, Sample, open_dataset
from wds_tools.check.verify import VerifyConfig, verify
from wds_tools.dataset.layout import FIELDS
from wds_tools.dataset.reader import read_manifest
from wds_tools.format.manifest import Manifest
from wds_tools.format.shards import ShardInfo
from wds_tools.records.where import Where
from wds_tools.select.choose import Judge, choose
from wds_tools.select.fields import Fields
from wds_tools.select.select import SelectConfig, select
from wds_tools.storage import open_store

SHARD = 10_000
WHERE = "aesthetic >= 5.5 and min(image_width, image_height) >= 768 and not watermark"
CODES = {"vqcode_512": {"tokenizer": "tiny", "codebook_size": 8192, "stride": 16}}


def make(folder: Path, num_samples: int) -> None:
    """A dataset of pairs with 32 x 32 codes and a few fields."""
    rng = np.random.default_rng(0)
    grids = rng.integers(0, 8192, (64, 32, 32)).astype("<u2")
    with DatasetWriter(str(folder), codes=CODES) as writer:
        for number in range(num_samples):
            facts = {"aesthetic": round(float(rng.random() * 10), 3), "image_width": 900, "image_height": 700 + number % 200}
            facts |= {"watermark": number % 7 == 0, "url": f"https://example.org/{number}.jpg"}
            text = f"a picture of the number {number}, as a caption of some length has it"
            codes = {"vqcode_512": np.roll(grids[number % 64], number)}
            writer.add(Sample(key=f"000000-{number:08d}", data_type="image_text", text=text, codes=codes, provenance=facts))


def made_up(folder: Path, num_rows: int) -> Manifest:
    """A manifest of so many samples, and their fields, without tars."""
    none = {"bytes": 512 * SHARD, "xxh128": "0" * 32, "members": ("json",), "text_chars": 0, "num_codes": 0}
    names = [f"shard-{number:06d}-0000.tar" for number in range(num_rows // SHARD)]
    shards = tuple(ShardInfo(name=name, samples=SHARD, data_types={"image_text": SHARD}, **none) for name in names)
    manifest = Manifest(shards=shards, inputs=num_rows)
    home = folder / FIELDS / manifest.fingerprint()[7:23]
    home.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for number, name in enumerate(names):
        columns = {
            "key": [f"{number:06d}-{row:08d}" for row in range(SHARD)],
            "aesthetic": rng.random(SHARD) * 10,
            "image_width": rng.integers(256, 2048, SHARD),
            "image_height": rng.integers(256, 2048, SHARD),
            "watermark": rng.random(SHARD) < 0.1,
            "text_hash": pa.array([rng.bytes(16) for _ in range(SHARD)], pa.binary(16)),
        }
        pa.parquet.write_table(pa.table(columns), home / f"{name}.parquet", compression="zstd", write_page_checksum=True)
    return manifest


def copy(source: Path, target: Path) -> None:
    """The tars, byte for byte, as a writer leaves them: flushed to the disk."""
    target.mkdir()
    for path in sorted(source.glob("*.tar")):
        with path.open("rb") as read, (target / path.name).open("wb") as write:
            while data := read.read(8 << 20):
                write.write(data)
            write.flush()
            os.fsync(write.fileno())


def main() -> None:
    """Measure, each in a fresh process, and print a line each."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--samples", type=int, default=200_000)
    parser.add_argument("--rows", type=int, default=10_000_000)
    parser.add_argument("--run", nargs=2, metavar=("WHAT", "FOLDER"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.run is None:
        with tempfile.TemporaryDirectory(prefix="bench-select-") as folder:
            make(Path(folder) / "set", args.samples)
            for what in ("verify", "fields", "copy", "write", "where", "unique"):
                command = [sys.executable, "-m", "benchmarks.select", "--rows", str(args.rows), "--run", what, folder]
                subprocess.run(command, check=True)
        return
    what, folder = args.run[0], Path(args.run[1])
    source = folder / "set"
    if what in ("where", "unique"):
        manifest = made_up(folder / what, args.rows)
        store = open_store(str(folder / what))
    begun, used = time.perf_counter(), time.process_time()
    if what == "verify":
        assert not verify(VerifyConfig(input=str(source), quiet=True)).problems
    elif what == "fields":
        Fields.make(open_store(str(source)), read_manifest(open_store(str(source))))
    elif what == "copy":
        copy(source, folder / "copied")
    elif what == "write":
        select(SelectConfig(input=(str(source),), output=str(folder / "chosen"), quiet=True))
    else:
        judge = Judge(
            fields=(Fields.make(store, manifest),), **({"where": Where(WHERE)} if what == "where" else {"unique": "text"})
        )
        fates, _ = choose(judge, [str(folder)], [manifest])
        args.samples = len(fates)
    seconds, processor = time.perf_counter() - begun, time.process_time() - used
    num_samples = args.samples if what in ("where", "unique") else len(open_dataset(str(source)))
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    size = sum(path.stat().st_size for path in source.glob("*.tar"))
    speed = f", {size / seconds / 1e6:,.0f} MB/s" if what in ("copy", "write") else ""
    print(
        f"{what:8}{num_samples:>12,} samples {seconds:8.1f} s, {processor:.1f} of a processor {memory:8,.0f} MB{speed}",
        flush=True,
    )


if __name__ == "__main__":
    main()
