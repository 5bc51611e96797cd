"""MosaicML Streaming: MDS shards, `StreamingDataset(shuffle=True)` with its default algorithm, py1e.

The codes are an `ndarray:uint16` of fixed shape, its leanest encoding for them; `batch_size` is given, as its docs ask.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from streaming import MDSWriter, StreamingDataLoader, StreamingDataset

from benchmarks.loader_workload import GRID, Text, read_source
from benchmarks.peers.measure import BATCH, Remote, main, stack_codes

FORMAT = "mds"


def write(folder: Path) -> None:
    """Shards of 64 MB, the default."""
    height, width = GRID
    columns = {"text": "str"} | ({"codes": f"ndarray:uint16:{height},{width}"} if folder.name == "pairs" else {})
    with MDSWriter(out=str(folder / FORMAT), columns=columns) as sink:
        for text, codes in read_source(folder):
            sink.write({"text": text} if codes is None else {"text": text, "codes": codes})


def samples(folder: Path) -> Iterator[Text]:
    """One pass in the main process."""
    for sample in _dataset(local=str(folder)):
        yield sample["text"], sample.get("codes")


def batches(folder: Path) -> Iterator[tuple[list[str], torch.Tensor]]:
    """Its own DataLoader in the main process."""
    yield from StreamingDataLoader(_dataset(local=str(folder)), batch_size=BATCH, collate_fn=_collate)


def remote(place: Remote) -> Iterator[tuple[list[str], torch.Tensor]]:
    """The same through its local copy of the shards."""
    dataset = _dataset(remote=place.s3, local=str(place.scratch))
    yield from StreamingDataLoader(dataset, batch_size=BATCH, collate_fn=_collate)


def _dataset(**where: str) -> StreamingDataset:
    return StreamingDataset(**where, batch_size=BATCH, shuffle=True, shuffle_seed=42)


def _collate(samples: list[dict]) -> tuple[list[str], torch.Tensor]:
    return [sample["text"] for sample in samples], stack_codes([sample["codes"] for sample in samples])


if __name__ == "__main__":
    main(globals())
