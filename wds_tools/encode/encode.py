"""Fill the codes: a dataset with images in, the same samples with codes (and without images) out.

    input shards, grouped into tasks -> samples -> encode_in_batches -> Sample(codes) or a reject -> output shards

A sample keeps its key, text and provenance. Pixels are decoded for the first time here, so what only that finds (a JPEG that
breaks off) is a reject of this job; of a conversation with several images one such rejects it. Documents pass through
unchanged; a conversation without images gets an empty grid of codes, so that all samples have the same members.
Cost: the tokenizer's; see docs/tokenizers.md.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import count
from typing import Annotated, Any

from wds_tools.dataset.reader import read_manifest, read_shard
from wds_tools.encode.image_encoder import MODES, ImageEncoder
from wds_tools.encode.options import TokenizerOptions
from wds_tools.errors import UsageError
from wds_tools.format.manifest import Manifest, ancestors, shard_info_from_json
from wds_tools.format.schema import IMAGE_EXTENSIONS, MARKED_TYPES, PAIR_TYPES, Sample
from wds_tools.images import ImageLimits, parse_mode
from wds_tools.jobs import Job, JobOptions, run_job
from wds_tools.jobs.records import ConvertRecords
from wds_tools.plugins import Names
from wds_tools.sources.record import Record, group_to_limits
from wds_tools.storage import open_store
from wds_tools.terminal import say


@dataclass(frozen=True, kw_only=True)
class EncodeConfig(JobOptions, TokenizerOptions):
    """Fill the codes of a dataset's images with an image tokenizer."""

    help_group = "encoding"

    input: str
    """The dataset to encode: a directory or URL."""
    tokenizer: Annotated[str | None, Names("wds_tools.vq.registry:tokenizer_names")] = None
    """tiny (bundled, for trials; the default), or, with --weights, chameleon or another of docs/tokenizers.md."""
    keep_images: bool = False
    """Keep the source images beside the codes."""
    mode: str | None = None
    """Size of the images of pairs: see `convert pairs --mode`. Default: the mode of their conversion."""
    sft_mode: str = "cc512"
    """Size of the images of conversations and interleaved documents: ccN, multiN or fitN."""
    max_pixels: int = ImageLimits.max_pixels
    """Images with more pixels are rejected, as decompression bombs."""

    def __post_init__(self) -> None:
        JobOptions.__post_init__(self)
        TokenizerOptions.__post_init__(self)


def encode(config: EncodeConfig) -> Manifest:
    """Fill the codes of a dataset.

    Args:
        config: what is encoded, with what, and where it goes.

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
        named_tokenizer(config.tokenizer),
        config,
        workers=config.workers,
        cpus=config.remote_cpus,
        keep_images=config.keep_images,
        limits=limits,
        modes={**_pair_modes(config, manifest.source), **dict.fromkeys(MARKED_TYPES, config.sft_mode)},
    )
    has_codes = sorted({image_encoder.column_of(data_type) for data_type in types}.intersection(manifest.codes))
    if has_codes:
        raise UsageError(
            f"{config.input} is encoded already ({', '.join(has_codes)}); --code-set NAME adds another set, --mode another size"
        )
    if manifest.codes and not set(IMAGE_EXTENSIONS).intersection(manifest.members):
        raise UsageError(f"{config.input} has codes, but its images were not kept: encode its source again, with --keep-images")
    settings, codes = image_encoder.provenance(types)
    job = Job(
        command="encode",
        settings={
            "input": manifest.fingerprint(),
            "keep_images": config.keep_images,
            **({} if config.mode is None else {"mode": config.mode}),
            "sft_mode": config.sft_mode,
            "max_pixels": config.max_pixels,
            "codes": config.code_set,
            **settings,
        },
        # About one output shard's samples a task: without their images, shards are small.
        tasks=[
            [asdict(shard) for shard in group]
            for group in group_to_limits(manifest.shards, lambda shard: (shard.samples,), (config.shard_samples,))
        ],
        work=encode_shards(config.input, image_encoder),
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
    return run_job(job, replace(config, workers=image_encoder.workers))


def _pair_modes(config: EncodeConfig, source: Mapping[str, Any]) -> dict[str, str]:
    """Data type -> mode: that of --mode for all pairs; else those which the datasets that the input goes back to were made for.

    Raises:
        UsageError: some were converted for one mode, others for another of the same data type.
    """
    if config.mode is not None:
        return dict.fromkeys(PAIR_TYPES, config.mode)
    modes: dict[str, str] = {}
    for made in (source, *(parent.get("source") for parent in ancestors(source))):
        plan = made.get("plan") if isinstance(made, Mapping) and not ancestors(made) else None
        settings = plan.get("settings") if isinstance(plan, Mapping) else None
        word = settings.get("mode") if isinstance(settings, Mapping) else None
        if isinstance(word, str):
            known = modes.setdefault(parse_mode(word).data_type, word)
            if known != word:
                raise UsageError(f"{config.input}: some of it was converted for {known}, some for {word}: say which with --mode")
    return modes


def named_tokenizer(name: str | None) -> str:
    """The tokenizer of this name; of none, "tiny", and a line says so."""
    if name is not None:
        return name
    say("wds-tools: no --tokenizer is named: `tiny` encodes, which is for trials; see docs/tokenizers.md", error=True)
    return "tiny"


def encode_shards(url: str, image_encoder: ImageEncoder) -> ConvertRecords:
    """The work on a group of shards of a dataset: its samples in place of records.

    Args:
        url: the dataset.
        image_encoder: fills the codes.
    """
    return ConvertRecords(partial(_read_samples, url), _unchanged, encoder=image_encoder)


def _read_samples(url: str, shards: Sequence[Mapping[str, Any]]) -> Iterator[Record[Sample]]:
    store, index = open_store(url), count()
    for shard in map(shard_info_from_json, shards):
        for sample in read_shard(store, shard):
            yield Record(next(index), sample, shard.name, key=sample.key)


def _unchanged(key: str, sample: Sample, shard: str) -> Sample:  # noqa: ARG001  a sample keeps its key
    return sample
