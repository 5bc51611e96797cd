"""Fill the codes: a data set with images in, the same samples with codes (and without images) out.

    input shards, grouped into tasks -> samples -> encode_in_batches -> Sample(codes) or a reject -> output shards

A sample keeps its key, text and provenance. Pixels are decoded for the first time here, so what only that finds (a JPEG that
breaks off) is a reject of this pass; of a conversation with several images one such rejects it. Documents pass through
unchanged; a conversation without images gets an empty row of codes, so that all samples have the same members.
Cost: the tokenizer's; see docs/tokenizers.md.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property, partial
from importlib.metadata import version
from itertools import groupby
from typing import Any, Literal, NamedTuple
from urllib.parse import unquote

import torch

from wds_tools.dataset.read import read_manifest, read_shard
from wds_tools.dataset.write import TaskWriter
from wds_tools.encode.batches import Prepare, encode_in_batches
from wds_tools.errors import FormatError, Reject, UsageError
from wds_tools.format.manifest import Manifest, ShardRow, row_from_json
from wds_tools.format.schema import Codes, Sample, code_column, code_dtype, join_grids
from wds_tools.images import PREPROCESSING_VERSION, ImageLimits, Mode, prepare
from wds_tools.passes import PassOptions, Plan, group_to_limit, run_pass
from wds_tools.storage import open_store
from wds_tools.storage.base import split_scheme
from wds_tools.vq.base import ImageTokenizer
from wds_tools.vq.registry import load_tokenizer


class _Place(NamedTuple):
    """Where an image comes from."""

    shard: str
    sample: Sample


@dataclass(frozen=True, kw_only=True)
class EncodeConfig(PassOptions):
    """Fill the codes of a data set's images with an image tokenizer."""

    input: str
    """The data set to encode: a directory or URL."""
    tokenizer: str = "tiny"
    """tiny (bundled, for trials) or chameleon (needs --weights)."""
    weights: str | None = None
    """Folder of the tokenizer's weights."""
    device: str = "auto"
    """auto (a GPU if there is one), cpu, cuda or cuda:N."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """bf16 is faster and changes some codes."""
    batch_size: int = 16
    """Images per forward pass."""
    keep_images: bool = False
    """Keep the source images beside the codes."""
    sft_mode: Mode = "cc512"
    """How images of conversations are cropped: cc512 to a 512 px square, multi768 to the nearest of many shapes."""
    max_pixels: int = ImageLimits.max_pixels
    """Images with more pixels are rejected: decompression bombs."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.batch_size < 1:
            raise UsageError(f"--batch-size {self.batch_size}: at least 1")
        if _place(self.input) == _place(self.output):
            raise UsageError("--output is --input: the encoded data set needs a place of its own")

    def mode_of(self, data_type: str) -> Mode | None:
        """How an image of such a sample is cropped; None if it has none."""
        modes: dict[str, Mode] = {"image_text": "cc512", "image_text_multi": "multi768", "visual_sft": self.sft_mode}
        return modes.get(data_type)

    def column_of(self, data_type: str) -> str:
        """Where the codes of such a sample go."""
        return code_column("image_text_multi" if self.mode_of(data_type) == "multi768" else "image_text")


def encode(config: EncodeConfig) -> Manifest:
    """Run the encoding pass.

    Returns:
        The manifest of the encoded data set.

    Raises:
        UsageError: the input has no images; or see run_pass.
        TokenizerError: the tokenizer's weights can't be loaded.
    """
    store = open_store(config.input)
    manifest = read_manifest(store)
    columns = sorted({config.column_of(data_type) for data_type in manifest.data_types if config.mode_of(data_type)})
    if not columns:
        raise UsageError(f"{config.input} has no images to encode: it holds {', '.join(manifest.data_types) or 'nothing'}")
    if manifest.codes:
        raise UsageError(f"{config.input} is encoded already ({', '.join(manifest.codes)})")
    work = _FillShards(config)
    # On a cluster the devices are other machines', and this one may have none.
    tokenizer = (
        work.tokenizer if config.executor == "local" else load_tokenizer(config.tokenizer, weights=config.weights, device="cpu")
    )
    provenance = {
        "tokenizer": tokenizer.name,
        "codebook_size": tokenizer.codebook_size,
        "stride": tokenizer.stride,
        "weights_hash": tokenizer.weights_hash,
        "preprocessing_version": PREPROCESSING_VERSION,
        "precision": config.precision,
    }
    libraries = {name: version(name) for name in ("torch", "pillow", "numpy")}
    plan = Plan(
        command="encode",
        settings={
            "input": manifest.fingerprint(),
            "keep_images": config.keep_images,
            "sft_mode": config.sft_mode,
            "max_pixels": config.max_pixels,
            **provenance,
        },
        # About one output shard's samples a task: without their images, shards are small.
        tasks=[
            [asdict(row) for row in group]
            for group in group_to_limit(manifest.shards, lambda row: row.samples, config.shard_samples)
        ],
        total=manifest.samples,
        device=config.device,
        codes={column: {**provenance, "libraries": libraries} for column in columns},
        source={
            "input": {
                "url": config.input,
                "fingerprint": manifest.fingerprint(),
                "inputs": manifest.inputs,
                "rejects": manifest.rejects,
                "source": manifest.source,
            }
        },
    )
    return run_pass(plan, work, config)


def _place(url: str) -> str:
    """The same for two spellings of one place."""
    scheme, path = split_scheme(url)
    return f"{scheme}://{path.rstrip('/')}" if scheme not in ("", "file") else os.path.realpath(unquote(path) if scheme else path)


@dataclass(frozen=True)
class _FillShards:
    """The work on one group of shards; loads the tokenizer once a process."""

    config: EncodeConfig

    def __reduce__(self) -> tuple[Any, ...]:
        return _FillShards, (self.config,)  # without the tokenizer: a worker loads its own

    @cached_property
    def tokenizer(self) -> ImageTokenizer:
        config = self.config
        if config.workers > 1:
            torch.set_num_threads(max(1, (os.cpu_count() or 1) // config.workers))
        return load_tokenizer(config.tokenizer, weights=config.weights, device=config.device, precision=config.precision)

    def __call__(self, task: Sequence[dict[str, Any]], writer: TaskWriter, advance: Callable[[int], None]) -> int:
        inputs = 0
        dtype = code_dtype(self.tokenizer.codebook_size)
        jobs = self._jobs([row_from_json(row) for row in task])
        threads = self.config.remote_cpus or max(1, (os.cpu_count() or 1) // self.config.workers)
        batches = encode_in_batches(jobs, self.tokenizer, batch_size=self.config.batch_size, threads=threads)
        for _, images in groupby(batches, key=lambda image: (image[0].shard, image[0].sample.key)):
            inputs += 1
            places, outcomes = zip(*images, strict=True)
            shard, sample = places[0]
            cause = next((outcome for outcome in outcomes if isinstance(outcome, Reject)), None)
            if cause is not None:
                writer.reject(cause, source=shard, key=sample.key)
            elif self.config.mode_of(sample.data_type):
                writer.add(self._filled(sample, [outcome.astype(dtype) for outcome in outcomes if outcome is not None]))
            else:
                writer.add(sample)
            advance(1)
        return inputs

    def _jobs(self, rows: Sequence[ShardRow]) -> Iterator[tuple[_Place, Prepare | None]]:
        """Each image, in order; a sample without any comes once."""
        store = open_store(self.config.input)
        limits = ImageLimits(max_pixels=self.config.max_pixels, min_side=1, max_bytes=sys.maxsize)  # else as converted
        for row in rows:
            for sample in read_shard(store, row):
                mode = self.config.mode_of(sample.data_type)
                if mode is None or not sample.images:
                    if mode is not None and sample.data_type != "visual_sft":
                        raise FormatError(f"{row.name}: {sample.key} is {sample.data_type} but has no image")
                    yield _Place(row.name, sample), None
                    continue
                for image in sample.images:
                    yield _Place(row.name, sample), partial(prepare, image.data, mode, limits)

    def _filled(self, sample: Sample, grids: Sequence[Codes]) -> Sample:
        column = self.config.column_of(sample.data_type)
        filled = sample if self.config.keep_images else sample._replace(image=None, image_extension=None, more_images=())
        if sample.data_type == "visual_sft":
            codes, shapes = join_grids(grids, code_dtype(self.tokenizer.codebook_size))
            return filled._replace(codes={column: codes}, grids={column: shapes})
        (codes_hw,) = grids
        height, width = (side * self.tokenizer.stride for side in codes_hw.shape)
        is_multi = sample.data_type == "image_text_multi"
        return filled._replace(codes={column: codes_hw}, width=width if is_multi else None, height=height if is_multi else None)
