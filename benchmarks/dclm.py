"""DCLM conversion on one core, three ways: `python -m benchmarks.dclm floor|plain|ours INPUT OUTPUT` prints what it took.

floor   decompress with zstandard, parse with orjson, write nothing: no converter can be faster
plain   what one would write: zstandard, json, webdataset's TarWriter
ours    wds-tools convert documents

Each way imports only what it needs: torch, which webdataset brings, makes every garbage collection of its process longer.
"""

from __future__ import annotations

import importlib
import io
import json
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import orjson
import zstandard


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
    import webdataset as wds

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
    from wds_tools.convert import run_conversion
    from wds_tools.convert.documents import DocumentsConfig

    return run_conversion(DocumentsConfig(input=(str(folder),), output=str(out), quiet=True)).samples


if __name__ == "__main__":
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    way, package = {"floor": (floor, "orjson"), "plain": (plain, "webdataset"), "ours": (ours, "wds_tools.convert.documents")}[
        sys.argv[1]
    ]
    importlib.import_module(package)  # before the clock starts
    begun = time.perf_counter()
    documents = way(Path(sys.argv[2]), Path(sys.argv[3]))
    print(json.dumps({"documents": documents, "seconds": time.perf_counter() - begun}))
