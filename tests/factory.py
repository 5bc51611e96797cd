"""Small datasets for tests, made through the public writer: `make_dataset(url, samples)`, and samples to put in."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from os import PathLike, fspath
from typing import Any

import numpy as np

from wds_tools.dataset.output import Output, OutputSpec
from wds_tools.dataset.writer import ShardLimits, TaskWriter
from wds_tools.format.codes import join_grids
from wds_tools.format.manifest import Manifest, code_layouts
from wds_tools.format.schema import Sample
from wds_tools.format.tar import Member, TarReader
from wds_tools.storage import open_store

CODEBOOK_SIZE = 8192


def make_dataset(
    url: str | PathLike[str],
    samples: Iterable[Sample],
    *,
    shard_samples: int = 10_000,
    codes: Mapping[str, Mapping[str, Any]] | None = None,
) -> Manifest:
    """Write a finished dataset.

    Args:
        url: where it goes; empty or absent.
        samples: taken one by one, so any number fits.
        shard_samples: most samples of a shard.
        codes: provenance of the code columns for the manifest, if it matters.
    """
    store = open_store(fspath(url))
    output = Output(store, OutputSpec(num_tasks=1, source={"command": "test"}, codes=codes or {}))
    output.begin()
    with TaskWriter(store, 0, ShardLimits(samples=shard_samples), layouts=code_layouts(codes or {})) as writer:
        for sample in samples:
            writer.add(sample)
        writer.finish(writer.num_samples)
    return output.finish(output.results())


def text_sample(number: int, text: str | None = None) -> Sample:
    """A document."""
    return Sample(key=f"text-{number:08d}", data_type="text_pretrain", text=f"document {number}" if text is None else text)


def image_sample(number: int, *, side: int = 4) -> Sample:
    """A caption and a square of side x side codes, which differ from number to number."""
    codes = {"vqcode_512": random_codes(number, side, side)}
    return Sample(key=f"image-{number:08d}", data_type="image_text", text=f"caption {number}", codes=codes)


def multi_sample(number: int, *, height: int = 32, width: int = 96) -> Sample:
    """A caption and the codes of a height x width image at stride 16."""
    codes = {"vqcode_multi768": random_codes(number, height // 16, width // 16)}
    text = f"wide caption {number}"
    return Sample(key=f"multi-{number:08d}", data_type="image_text_multi", text=text, codes=codes, width=width, height=height)


def talk_sample(number: int, *shapes: tuple[int, int]) -> Sample:
    """A conversation about images whose grids have these shapes."""
    codes, grids = join_grids([random_codes(number + i, *shape) for i, shape in enumerate(shapes)], np.dtype("<u2"))
    turns = [{"from": "human", "value": "<image>, ".join(["Look: "] * (len(shapes) + 1))}, {"from": "gpt", "value": "Well."}]
    fields: dict[str, Any] = {"codes": {"vqcode_512": codes}, "grids": {"vqcode_512": grids}, "conversations": turns}
    return Sample(key=f"talk-{number:08d}", data_type="visual_sft", text="", **fields)


def page_sample(number: int, *shapes: tuple[int, int]) -> Sample:
    """An interleaved document, with text before and behind each of its images, whose grids have these shapes."""
    text = " <image> ".join(f"page {number}, part {part}." for part in range(len(shapes) + 1))
    talk = talk_sample(number, *shapes)
    return talk._replace(key=f"page-{number:08d}", data_type="interleaved", text=text, conversations=None)


def answer_sample(number: int, *shapes: tuple[int, int]) -> Sample:
    """A conversation whose answer is images: the first one changed, where there are several."""
    asked, answered = "<image>" * (len(shapes) > 1), "<image>" * (len(shapes) - (len(shapes) > 1))
    turns = [{"from": "human", "value": f"{asked}Draw {number}."}, {"from": "gpt", "value": f"Here:{answered}"}]
    return talk_sample(number, *shapes)._replace(key=f"answer-{number:08d}", conversations=turns)


def read_members(archive: bytes | memoryview, name: str = "tar") -> list[Member]:
    """All members of a complete archive in memory."""
    reader = TarReader(name)
    members = reader.feed(archive)
    reader.close()
    return members


def random_codes(seed: int, height: int, width: int) -> np.ndarray[Any, np.dtype[np.uint16]]:
    """A grid of codes below CODEBOOK_SIZE."""
    return np.random.default_rng(seed).integers(0, CODEBOOK_SIZE, (height, width)).astype("<u2")
