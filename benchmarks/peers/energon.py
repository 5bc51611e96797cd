"""Megatron-Energon on webdataset's tars, indexed by `energon prepare`: a cooker, a shuffle buffer of 1,000, no workers.

Its quickstart, with `max_samples_per_sequence=100`; CrudeWebdataset is its type for samples that are not one of its own kinds.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from megatron.energon import Cooker, DefaultTaskEncoder, WorkerConfig, edataclass, get_loader, get_train_dataset, stateless
from megatron.energon.flavors import Sample
from megatron.energon.task_encoder.cooking import basic_sample_keys

from benchmarks.loader_workload import Text
from benchmarks.peers import webdataset
from benchmarks.peers.measure import BATCH, Remote, main, stack_codes

FORMAT = "energon"


def write(folder: Path) -> None:
    """Webdataset's tars, linked into a folder of their own, and Energon's index of them."""
    if not (folder / webdataset.FORMAT).is_dir():
        webdataset.write(folder)
    (folder / FORMAT).mkdir()
    for tar in sorted((folder / webdataset.FORMAT).glob("*.tar")):
        os.link(tar, folder / FORMAT / tar.name)
    prepare(folder / FORMAT)


def prepare(folder: Path) -> None:
    """`energon prepare` on a folder of tars."""
    command = [str(Path(sys.executable).parent / "energon"), "prepare", str(folder), "--non-interactive", "--no-progress"]
    command += ["--split-ratio", "1,0,0", "--sample-type", "CrudeWebdataset"]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)


@edataclass
class Pair(Sample):
    """What the cooker makes of a crude sample."""

    text: str
    codes: Any


@stateless
def cook(crude: dict) -> Pair:
    """Energon has decoded json and npy already."""
    return Pair(**basic_sample_keys(crude), text=crude["json"]["text"], codes=crude.get("npy"))


class Encoder(DefaultTaskEncoder):
    """Batches as lists of (text, codes)."""

    cookers = [Cooker(cook)]  # noqa: RUF012  # as its docs have it

    @stateless
    def batch(self, samples: list[Pair]) -> list[Text]:
        """Drop what Energon carries along."""
        return [(sample.text, sample.codes) for sample in samples]


def samples(folder: Path) -> Iterator[Text]:
    """The samples of each batch, one by one: without batches, its loader collects garbage after every tenth sample."""
    for pairs in read(folder, Encoder(), BATCH):
        yield from pairs


def batches(folder: Path) -> Iterator[tuple[list[str], torch.Tensor]]:
    """One epoch in batches."""
    yield from _batches(folder)


def remote(place: Remote) -> Iterator[tuple[list[str], torch.Tensor]]:
    """The same by its client for object storage."""
    options = {"base_path": place.bucket, "endpoint_url": place.endpoint, "region_name": "us-east-1"}
    config = {"profiles": {"bench": {"storage_provider": {"type": "s3", "options": options}}}}
    file = place.scratch / "msc_config.json"
    file.write_text(json.dumps(config))
    os.environ["MSC_CONFIG"] = str(file)
    yield from _batches(f"msc://bench/{place.prefix}")


def _batches(folder: Path | str) -> Iterator[tuple[list[str], torch.Tensor]]:
    for pairs in read(folder, Encoder(), BATCH):
        texts, codes = zip(*pairs, strict=True)
        yield list(texts), stack_codes(codes)


def read(folder: Path | str, encoder: DefaultTaskEncoder, batch_size: int) -> Any:
    """Its loader of one epoch, in this process."""
    dataset = get_train_dataset(
        folder,
        batch_size=batch_size,
        shuffle_buffer_size=1000,
        max_samples_per_sequence=100,
        worker_config=WorkerConfig(rank=0, world_size=1, num_workers=0),
        task_encoder=encoder,
        repeat=False,
    )
    return get_loader(dataset)


if __name__ == "__main__":
    main(globals())
