"""Fill the codes: a dataset with images in, the same samples with codes (and without images) out.

    input shards, grouped into tasks -> samples -> encode_in_batches -> Sample(codes) or a reject -> output shards

A sample keeps its key, text and provenance. Pixels are decoded for the first time here, so what only that finds (a JPEG that
breaks off) is a reject of this pass; of a conversation with several images one such rejects it. Documents pass through
unchanged; a conversation without images gets an empty row of codes, so that all samples have the same members.
Cost: the tokenizer's; see docs/tokenizers.md.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from wds_tools.dataset.reader import read_manifest, read_shard
from wds_tools.dataset.writer import TaskWriter
from wds_tools.encode.image_encoder import MODES, ImageEncoder
from wds_tools.encode.options import TokenizerOptions
from wds_tools.errors import Reject, UsageError
from wds_tools.format.manifest import Manifest, ShardInfo, shard_info_from_json
from wds_tools.format.schema import IMAGE_EXTENSIONS, Sample
from wds_tools.images import ImageLimits, Mode
from wds_tools.jobs.job import Advance, JobOptions, Plan, group_to_limit, run_job
from wds_tools.storage import open_store


@dataclass(frozen=True, kw_only=True)
class EncodeConfig(JobOptions, TokenizerOptions):
    """Fill the codes of a dataset's images with an image tokenizer."""

    input: str
    """The dataset to encode: a directory or URL."""
    tokenizer: str = "tiny"
    """tiny (bundled, for trials), chameleon, or one of the others in docs/tokenizers.md; these need --weights."""
    keep_images: bool = False
    """Keep the source images beside the codes."""
    sft_mode: Mode = "cc512"
    """How images of conversations are cropped: cc512 to a 512 px square, multi768 to the nearest of many shapes."""
    max_pixels: int = ImageLimits.max_pixels
    """Images with more pixels are rejected: decompression bombs."""

    def __post_init__(self) -> None:
        JobOptions.__post_init__(self)
        TokenizerOptions.__post_init__(self)


def encode(config: EncodeConfig) -> Manifest:
    """Run the encoding pass.

    Returns:
        The manifest of the encoded dataset.

    Raises:
        UsageError: the input has no images; or see run_job.
        TokenizerError: the tokenizer's weights can't be loaded.
    """
    store = open_store(config.input)
    manifest = read_manifest(store, instead_of_rows="encode the images first, then pack")
    types = [data_type for data_type in manifest.data_types if data_type in MODES]
    if not types:
        raise UsageError(f"{config.input} has no images to encode: it holds {', '.join(manifest.data_types) or 'nothing'}")
    limits = ImageLimits(max_pixels=config.max_pixels, min_side=1, max_bytes=sys.maxsize)  # else as converted
    image_encoder = ImageEncoder(
        config.tokenizer,
        config,
        workers=config.workers,
        cpus=config.remote_cpus,
        keep_images=config.keep_images,
        limits=limits,
        sft_mode=config.sft_mode,
    )
    has_codes = sorted({image_encoder.column_of(data_type) for data_type in types}.intersection(manifest.codes))
    if has_codes:
        raise UsageError(f"{config.input} is encoded already ({', '.join(has_codes)}); --code-set NAME adds another set")
    if manifest.codes and not set(IMAGE_EXTENSIONS).intersection(manifest.members):
        raise UsageError(f"{config.input} has codes, but its images were not kept: encode its source again, with --keep-images")
    settings, codes = image_encoder.provenance(types)
    plan = Plan(
        command="encode",
        settings={
            "input": manifest.fingerprint(),
            "keep_images": config.keep_images,
            "sft_mode": config.sft_mode,
            "max_pixels": config.max_pixels,
            "code_set": config.code_set,
            **settings,
        },
        # About one output shard's samples a task: without their images, shards are small.
        tasks=[
            [asdict(row) for row in group]
            for group in group_to_limit(manifest.shards, lambda row: row.samples, config.shard_samples)
        ],
        total=manifest.samples,
        device=config.device,
        codes={**manifest.codes, **codes},
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
    return run_job(plan, FillShards(config.input, image_encoder), replace(config, workers=image_encoder.workers))


@dataclass(frozen=True)
class FillShards:
    """The work on one group of shards."""

    input: str
    image_encoder: ImageEncoder

    def __call__(self, task: Sequence[dict[str, Any]], writer: TaskWriter, advance: Advance) -> int:
        inputs = 0
        for (shard, key), filled in self.image_encoder.fill(self._samples([shard_info_from_json(row) for row in task])):
            inputs += 1
            if isinstance(filled, Reject):
                writer.reject(filled, source=shard, key=key)
            else:
                writer.add(filled)
            advance(1, *self.image_encoder.device.new_use())
        return inputs

    def _samples(self, rows: Sequence[ShardInfo]) -> Iterator[tuple[tuple[str, str], Sample]]:
        store = open_store(self.input)
        for row in rows:
            for sample in read_shard(store, row):
                yield (row.name, sample.key), sample
