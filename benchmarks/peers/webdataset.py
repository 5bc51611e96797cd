"""webdataset: a shuffle buffer of 1,000 over shuffled shards, decoded, batched in the pipeline.

As its README's pipeline has it; the buffer's size is that of its examples.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
import webdataset as wds

from benchmarks.loader_workload import SAMPLES_PER_SHARD, Text, read_source
from benchmarks.peers.measure import BATCH, Remote, main, stack_codes

FORMAT = "tars"


def write(folder: Path) -> None:
    """Tars of json and npy members; Energon and Hugging Face read the same ones."""
    (folder / FORMAT).mkdir()
    with wds.ShardWriter(str(folder / FORMAT / "%06d.tar"), maxcount=SAMPLES_PER_SHARD, verbose=0) as sink:
        for number, (text, codes) in enumerate(read_source(folder)):
            sample = {"__key__": f"{number:09d}", "json": {"text": text}}
            sink.write(sample if codes is None else {**sample, "npy": codes})


def samples(folder: Path) -> Iterator[Text]:
    """One pass in the main process."""
    yield from _pipeline(_shards(folder))


def batches(folder: Path) -> Iterator[tuple[list[str], torch.Tensor]]:
    """The pipeline's own `batched`, with a collation that stacks."""
    yield from _pipeline(_shards(folder)).batched(BATCH, collation_fn=_collate)


def remote(place: Remote) -> Iterator[tuple[list[str], torch.Tensor]]:
    """Shards by URL, which it fetches with curl, one after the other."""
    yield from _pipeline(place.http(".tar")).batched(BATCH, collation_fn=_collate)


def _shards(folder: Path) -> list[str]:
    return sorted(map(str, folder.glob("*.tar")))


def _pipeline(shards: list[str]) -> wds.WebDataset:
    return wds.WebDataset(shards, shardshuffle=len(shards), seed=42).shuffle(1000).decode().map(_pair)


def _pair(sample: dict) -> Text:
    return sample["json"]["text"], sample.get("npy")


def _collate(pairs: list[Text]) -> tuple[list[str], torch.Tensor]:
    texts, codes = zip(*pairs, strict=True)
    return list(texts), stack_codes(codes)


if __name__ == "__main__":
    main(globals())
