"""wds-tools: `ShardDataset`, the same shards as samples on webdataset's pipeline, and its own `batched` behind it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from benchmarks.loader_workload import Text
from benchmarks.peers.measure import BATCH, Remote, main
from loaders import ShardDataset

FORMAT = "ours"


def write(folder: Path) -> None:
    """Nothing: it reads what ours.py wrote."""


def samples(folder: Path) -> Iterator[Text]:
    """One epoch in the main process."""
    for sample in ShardDataset(str(folder), seed=42):
        yield sample["text"], sample.get("codes")


def batches(folder: Path) -> Iterator[tuple[list[str], torch.Tensor]]:
    """One epoch, batched by webdataset."""
    yield from ShardDataset(str(folder), seed=42).map(_pair).batched(BATCH)


def remote(place: Remote) -> Iterator[tuple[list[str], torch.Tensor]]:
    """The same from there."""
    yield from ShardDataset(place.s3, seed=42).map(_pair).batched(BATCH)


def _pair(sample: dict[str, Any]) -> tuple[str, torch.Tensor]:
    return sample["text"], sample["codes"]


if __name__ == "__main__":
    main(globals())
