"""Grain over the ArrayRecord files: `MapDataset.source().shuffle().map()`, read in the main process.

`num_threads=0`: with threads, which its docs advise for remote files, the same pass took longer on one core.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import grain
import torch

from benchmarks.loader_workload import Text
from benchmarks.peers.array_record import FORMAT, collate, decode, write
from benchmarks.peers.measure import BATCH, main

__all__ = ["FORMAT", "batches", "samples", "write"]


def samples(folder: Path) -> Iterator[Text]:
    """One epoch, record by record."""
    yield from _dataset(folder).to_iter_dataset(grain.ReadOptions(num_threads=0))


def batches(folder: Path) -> Iterator[tuple[list[str], torch.Tensor]]:
    """Grain's own `batch`, with a collation that stacks."""
    yield from _dataset(folder).batch(BATCH, batch_fn=collate).to_iter_dataset(grain.ReadOptions(num_threads=0))


def _dataset(folder: Path) -> grain.MapDataset:
    source = grain.sources.ArrayRecordDataSource(sorted(map(str, folder.glob("*.array_record"))))
    return grain.MapDataset.source(source).shuffle(seed=42).map(decode)


if __name__ == "__main__":
    main(globals())
