"""Hugging Face as a stream, codes as JSON strings: `to_iterable_dataset`, then `shuffle` with a buffer of 1,000.

Their guide's way to shuffle fast: shards in random order, rows through a buffer (its default size).
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import datasets
import torch

from benchmarks.loader_workload import Text
from benchmarks.peers.hf_map import FORMAT, collate, decode, write
from benchmarks.peers.measure import BATCH, Remote, main

__all__ = ["FORMAT", "batches", "samples", "write"]


def samples(folder: Path) -> Iterator[Text]:
    """Row by row."""
    for row in _stream(folder):
        yield decode(row)


def batches(folder: Path) -> Iterator[tuple[list[str], torch.Tensor]]:
    """`iter(batch_size)` on the stream."""
    for batch in _stream(folder).iter(batch_size=BATCH):
        yield collate(batch)


def remote(place: Remote) -> Iterator[tuple[list[str], torch.Tensor]]:
    """The Arrow files of rows by URL, not those of how they were shuffled; `load_from_disk` would copy all of them first."""
    files = [url for url in place.http(".arrow") if "/data-" in url]
    stream = datasets.load_dataset("arrow", data_files=files, split="train", streaming=True)
    for batch in stream.shuffle(seed=42, buffer_size=1000).iter(batch_size=BATCH):
        yield collate(batch)


def _stream(folder: Path) -> datasets.IterableDataset:
    return datasets.load_from_disk(folder).to_iterable_dataset(num_shards=6).shuffle(seed=42, buffer_size=1000)


if __name__ == "__main__":
    main(globals())
