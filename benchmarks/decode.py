"""`make bench-decode`: JPEGs to batches of pixels, by a transform of ours, webdataset's decode and Energon's, of the same tars.

    images -> tars of json and jpg -> ways, in turns -> uint8 (B, 384, 384, 3) -> processor time an image, and ratios of pairs

Each way decodes with Pillow, one process on one thread, without workers: what is left is what a way adds to Pillow. Ratios are
those of neighbouring rounds, so that a machine whose other users come and go moves both.
"""

from __future__ import annotations

import argparse
import io
import os
import shutil
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import webdataset as wds
from megatron.energon import Cooker, DefaultTaskEncoder, SampleDecoder, stateless
from PIL import Image

from benchmarks.peers.energon import prepare, read
from loaders import LoaderConfig, Source, World, build_loader
from wds_tools.dataset.output import Output, OutputSpec
from wds_tools.dataset.writer import ShardLimits, TaskWriter
from wds_tools.format.schema import Sample
from wds_tools.storage import open_store

NUM_IMAGES, SIDE, BATCH = 512, 384, 32
ROUNDS = 7


def write(folder: Path) -> None:
    """The dataset, and links to its tars for Energon, which writes an index beside them."""
    store = open_store(str(folder / "ours"))
    output = Output(store, OutputSpec(num_tasks=1, source={"command": "benchmark"}))
    output.begin()
    rng = np.random.default_rng(1)
    with TaskWriter(store, 0, ShardLimits(samples=128)) as writer:
        for number in range(NUM_IMAGES):
            coarse = Image.fromarray(rng.integers(0, 256, (24, 24, 3), dtype=np.uint8))
            out = io.BytesIO()
            coarse.resize((SIDE, SIDE), Image.Resampling.BICUBIC).save(out, "JPEG", quality=90)
            sample = Sample(key=f"{number:08d}", data_type="image_text", text="a picture", image=out.getvalue())
            writer.add(sample._replace(image_extension="jpg"))
        writer.finish(writer.num_samples)
    output.finish(output.results())
    (folder / "energon").mkdir()
    for tar in sorted((folder / "ours").glob("*.tar")):
        os.link(tar, folder / "energon" / tar.name)
    prepare(folder / "energon")


def pixels_of(sample: dict[str, Any], _: Any) -> dict[str, Any]:
    """Our transform."""
    return {"pixels": np.asarray(Image.open(io.BytesIO(sample["image"])).convert("RGB"))}


def ours(folder: Path) -> Iterator[torch.Tensor]:
    config = LoaderConfig(sources=(Source(str(folder / "ours")),), batch_size=BATCH, transform=pixels_of)
    for batch in build_loader(config, World()):
        yield batch["pixels"]


def webdataset(folder: Path) -> Iterator[torch.Tensor]:
    shards = sorted(map(str, (folder / "ours").glob("*.tar")))
    pipeline = wds.WebDataset(shards, shardshuffle=len(shards), seed=42).shuffle(1000).decode("rgb8")
    for batch in pipeline.batched(BATCH, collation_fn=lambda samples: [sample["jpg"] for sample in samples]):
        yield torch.from_numpy(np.stack(batch))


@stateless
def cook(crude: dict) -> dict:
    """Energon has decoded the JPEG already."""
    return crude


class Encoder(DefaultTaskEncoder):
    """Batches as one tensor of pixels."""

    decoder = SampleDecoder(image_decode="rgb8")
    cookers = [Cooker(cook)]  # noqa: RUF012  # as its docs have it

    @stateless
    def batch(self, samples: list[dict]) -> torch.Tensor:
        """Stack."""
        return torch.from_numpy(np.stack([sample["jpg"] for sample in samples]))


def energon(folder: Path) -> Iterator[torch.Tensor]:
    yield from read(folder / "energon", Encoder(), BATCH)


WAYS: dict[str, Callable[[Path], Iterator[torch.Tensor]]] = {"ours": ours, "webdataset": webdataset, "energon": energon}


def cost(way: Callable[[Path], Iterator[torch.Tensor]], folder: Path) -> float:
    """Milliseconds of processor time that an image takes, opening included."""
    begun, count = time.process_time(), 0
    for pixels_BHWC in way(folder):
        assert pixels_BHWC.dtype == torch.uint8
        assert tuple(pixels_BHWC.shape[1:]) == (SIDE, SIDE, 3)
        count += len(pixels_BHWC)
    assert count == NUM_IMAGES, count
    return (time.process_time() - begun) / count * 1e3


def main() -> None:
    """Print the processor time of each way, and the ratio to ours in pairs of rounds."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("bench-out/decode"))
    folder = parser.parse_args().output
    if not (folder / "energon").is_dir():
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        write(folder)
    torch.set_num_threads(1)
    for way in WAYS.values():
        cost(way, folder)  # imports, and files into the page cache
    times: dict[str, list[float]] = {name: [] for name in WAYS}
    for _ in range(ROUNDS):
        for name, way in WAYS.items():
            times[name].append(cost(way, folder))
    print("| way | processor time an image, ms | times ours: median of pairs | least | most |\n|---|---|---|---|---|")
    for name, taken in times.items():
        ratios = sorted(other / own for other, own in zip(taken, times["ours"], strict=True))
        print(
            f"| {name} | {statistics.median(taken):.2f} | {statistics.median(ratios):.2f} | {ratios[0]:.2f} | {ratios[-1]:.2f} |"
        )


if __name__ == "__main__":
    main()
