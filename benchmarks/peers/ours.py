"""wds-tools: `build_loader`, whose batches are taken apart for single samples; plain tars that anyone can read."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import repeat
from pathlib import Path

import torch

from benchmarks.loader_workload import SAMPLES_PER_SHARD, Text, read_source
from benchmarks.peers.measure import BATCH, Remote, main
from loaders import Loader, LoaderConfig, Source, World, build_loader
from wds_tools.dataset.output import Output, OutputSpec
from wds_tools.dataset.writer import ShardLimits, TaskWriter
from wds_tools.format.schema import Sample
from wds_tools.storage import open_store

FORMAT = "ours"


def write(folder: Path) -> None:
    """A finished dataset, as `wds-tools convert` and `encode` leave it."""
    store = open_store(str(folder / FORMAT))
    output = Output(store, OutputSpec(num_tasks=1, source={"command": "benchmark"}))
    output.begin()
    with TaskWriter(store, 0, ShardLimits(samples=SAMPLES_PER_SHARD)) as writer:
        for number, (text, codes) in enumerate(read_source(folder)):
            key = f"000000-{number:08d}"
            if codes is None:
                writer.add(Sample(key=key, data_type="text_pretrain", text=text))
            else:
                writer.add(Sample(key=key, data_type="image_text", text=text, codes={"vqcode_512": codes}))
        writer.finish(writer.num_samples)
    output.finish(output.results())


def samples(folder: Path) -> Iterator[Text]:
    """One epoch in the main process."""
    for batch in _loader(str(folder)):
        codes = batch["codes"].numpy() if "codes" in batch else repeat(None)
        yield from zip(batch["text"], codes, strict=False)


def batches(folder: Path) -> Iterator[tuple[list[str], torch.Tensor]]:
    """One epoch of batches in the main process."""
    yield from _batches(str(folder))


def remote(place: Remote) -> Iterator[tuple[list[str], torch.Tensor]]:
    """The same from there."""
    yield from _batches(place.s3)


def _batches(url: str) -> Iterator[tuple[list[str], torch.Tensor]]:
    for batch in _loader(url):
        yield batch["text"], batch["codes"]


def _loader(url: str) -> Loader:
    config = LoaderConfig(sources=(Source(url),), batch_size=BATCH, seed=42, num_workers=0, last_batch="short")
    return build_loader(config, World(rank=0, world_size=1))


if __name__ == "__main__":
    main(globals())
