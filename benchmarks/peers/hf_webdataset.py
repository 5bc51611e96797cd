"""Hugging Face over the webdataset tars: `load_dataset("webdataset", streaming=True)`, shuffled with a buffer of 1,000."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import datasets
import torch

from benchmarks.loader_workload import Text
from benchmarks.peers.measure import BATCH, Remote, main, stack_codes
from benchmarks.peers.webdataset import FORMAT, write

__all__ = ["FORMAT", "batches", "samples", "write"]


def samples(folder: Path) -> Iterator[Text]:
    """Row by row; the reader decodes json and npy itself."""
    for row in _stream(str(folder / "*.tar")):
        yield row["json"]["text"], row.get("npy")


def batches(folder: Path) -> Iterator[tuple[list[str], torch.Tensor]]:
    """`iter(batch_size)` on the stream."""
    yield from _batches(str(folder / "*.tar"))


def remote(place: Remote) -> Iterator[tuple[list[str], torch.Tensor]]:
    """Shards by URL."""
    yield from _batches(place.http(".tar"))


def _batches(files: str | list[str]) -> Iterator[tuple[list[str], torch.Tensor]]:
    for batch in _stream(files).iter(batch_size=BATCH):
        yield [record["text"] for record in batch["json"]], stack_codes(batch["npy"])


def _stream(files: str | list[str]) -> datasets.IterableDataset:
    stream = datasets.load_dataset("webdataset", data_files=files, split="train", streaming=True)
    return stream.shuffle(seed=42, buffer_size=1000)


if __name__ == "__main__":
    main(globals())
