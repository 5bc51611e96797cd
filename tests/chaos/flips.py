"""One bit of a dataset is another: verify says so, whatever file it is in."""

from __future__ import annotations

import os
import random
from collections.abc import Callable
from pathlib import Path

import webdataset as wds
from factory import CODEBOOK_SIZE, image_sample, multi_sample, talk_sample, text_sample
from tokens import write_small_sets

from wds_tools.check.verify import VerifyConfig, verify
from wds_tools.dataset.output import Output, OutputSpec
from wds_tools.dataset.writer import ShardLimits, TaskWriter
from wds_tools.errors import Reject, WdsToolsError
from wds_tools.jobs.index_tars import index_tars
from wds_tools.pack.rows import PackConfig, pack
from wds_tools.storage import open_store

KINDS = {".tar": "tar", ".index": "index", ".json": "manifest", ".jsonl": "rejects", ".safetensors": "offsets"}
"""Suffix -> what a file of a dataset is."""


class Flips:
    """See the module."""

    def __init__(self, folder: Path) -> None:
        self._files: dict[str, list[tuple[Path, Path]]] = {kind: [] for kind in KINDS.values()}
        write_samples(folder / "samples")
        write_small_sets(folder / "small")
        inputs = str(folder / "small/pairs"), str(folder / "small/texts")
        words = {"tokenizer": str(folder / "small/tokenizer"), "max_length": 1280, "quiet": True}
        pack(PackConfig(input=inputs, output=str(folder / "rows"), **words))
        (folder / "tars").mkdir()
        for number in range(2):
            with wds.TarWriter(str(folder / f"tars/{number}.tar")) as writer:
                writer.write({"__key__": "a", "txt": "caption", "cls": 5})
        index_tars(open_store(str(folder / "tars")))
        for root in (folder / "samples", folder / "rows", folder / "tars"):
            assert problems(root) == (), "a set is good before a bit of it is flipped"
            for path in sorted(path for path in root.rglob("*") if path.is_file()):
                self._files[KINDS[path.suffix]].append((root, path))

    def plan(self, rng: random.Random, number: int) -> tuple[str, Callable[[], None]]:
        kind = [*self._files][number % len(KINDS)]
        root, path = rng.choice(self._files[kind])
        at, bit = rng.randrange(path.stat().st_size), rng.randrange(8)
        return f"{kind}, {path.relative_to(root.parent)}, byte {at}, bit {bit}", lambda: check_flip(root, path, at, bit)


def check_flip(root: Path, path: Path, at: int, bit: int) -> None:
    """Flip a bit, in place, since files are mapped; look whether that is noticed; flip it back."""
    descriptor = os.open(path, os.O_RDWR)
    try:
        was = os.pread(descriptor, 1, at)
        os.pwrite(descriptor, bytes([was[0] ^ 1 << bit]), at)
        try:
            assert problems(root), "verify says that all is well"
        except WdsToolsError:
            pass  # no manifest that can be read
        finally:
            os.pwrite(descriptor, was, at)
    finally:
        os.close(descriptor)


def problems(root: Path) -> tuple[str, ...]:
    return verify(VerifyConfig(input=str(root), quiet=True)).problems


def write_samples(folder: Path) -> None:
    """Shards of every kind of sample, from two tasks, both with rejects."""
    store = open_store(str(folder))
    made = {"codebook_size": CODEBOOK_SIZE, "tokenizer": "test", "precision": "fp32"}
    source = {"command": "test", "counts": {"tokens": 7}}
    output = Output(store, OutputSpec(num_tasks=2, source=source, codes={"vqcode_512": made, "vqcode_multi768": made}))
    output.begin()
    for task in range(2):
        with TaskWriter(store, task, ShardLimits(samples=4)) as writer:
            for number in range(10 * task, 10 * task + 8):
                make = (text_sample, image_sample, multi_sample, lambda n: talk_sample(n, (4, 4), (2, 3)))[number % 4]
                writer.add(make(number))
            writer.reject(Reject("bad_json", "broken"), source="a.jsonl", line=3)
            writer.reject(Reject("empty_text", "nothing"), source="a.jsonl", line=4)
            writer.finish(10)
    output.finish(output.results())
