"""Hugging Face over the webdataset tars: `load_dataset("webdataset", streaming=True)`, shuffled with a buffer of 1,000."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import datasets
import torch

from benchmarks.loader_workload import Text
from benchmarks.peers.measure import BATCH, main, stack_codes
from benchmarks.peers.webdataset import FORMAT, write

__all__ = ["FORMAT", "batches", "samples", "write"]


def samples(folder: Path) -> Iterator[Text]:
    """Row by row; the reader decodes json and npy itself."""
    for row in _stream(folder):
        yield row["json"]["text"], row.get("npy")


def batches(folder: Path) -> Iterator[tuple[list[str], torch.Tensor]]:
    """`iter(batch_size)` on the stream."""
    for batch in _stream(folder).iter(batch_size=BATCH):
        yield [record["text"] for record in batch["json"]], stack_codes(batch["npy"])


def _stream(folder: Path) -> datasets.IterableDataset:
    stream = datasets.load_dataset("webdataset", data_files=str(folder / "*.tar"), split="train", streaming=True)
    return stream.shuffle(seed=42, buffer_size=1000)


if __name__ == "__main__":
    main(globals())
