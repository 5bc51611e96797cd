"""DCLM conversion on one core, three ways: `python -m benchmarks.dclm floor|plain|ours INPUT OUTPUT` prints what it took.

floor   decompress with zstandard, parse with orjson, write nothing: no converter can be faster
plain   what one would write: zstandard, json, webdataset's TarWriter
ours    wds-tools convert dclm
"""

from __future__ import annotations

import io
import json
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import orjson
import webdataset as wds
import zstandard

from wds_tools.convert.dclm import DclmConfig, convert_dclm


def _lines(path: Path) -> Iterator[bytes]:
    tail = b""
    with path.open("rb") as file:
        reader = zstandard.ZstdDecompressor().stream_reader(file, read_size=1 << 20, read_across_frames=True)
        while data := reader.read(1 << 20):
            *lines, tail = (tail + data).split(b"\n")
            yield from lines


def floor(folder: Path, _: Path) -> int:
    """Decompress and parse, no more."""
    count = 0
    for path in sorted(folder.rglob("*.jsonl.zst")):
        for line in _lines(path):
            orjson.loads(line)
            count += 1
    return count


def plain(folder: Path, out: Path) -> int:
    """The straightforward script."""
    out.mkdir()
    count = 0
    for number, path in enumerate(sorted(folder.rglob("*.jsonl.zst"))):
        with path.open("rb") as file, wds.TarWriter(str(out / f"{number:06d}.tar")) as sink:
            stream = io.TextIOWrapper(zstandard.ZstdDecompressor().stream_reader(file, read_across_frames=True), encoding="utf-8")
            for line in stream:
                text = json.loads(line)["text"]
                record = {"data_type": "text_pretrain", "text": text, "length": len(text), "width": None, "height": None}
                sink.write({"__key__": f"{count:09d}", "json": record})
                count += 1
    return count


def ours(folder: Path, out: Path) -> int:
    """This project's converter, one worker."""
    return convert_dclm(DclmConfig(input=(str(folder),), output=str(out), quiet=True)).samples


if __name__ == "__main__":
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    way = {"floor": floor, "plain": plain, "ours": ours}[sys.argv[1]]
    begun = time.perf_counter()
    documents = way(Path(sys.argv[2]), Path(sys.argv[3]))
    print(json.dumps({"documents": documents, "seconds": time.perf_counter() - begun}))
