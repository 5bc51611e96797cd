"""LLaVA-style conversations (JSON lists, or one object a line) -> visual_sft samples that carry their source images.

    records, cut into ranges -> record -> turns and image paths -> fetch the images -> look at their headers -> Sample -> shards

Roles become system, human and gpt, a system prompt the first turn. A conversation is taken whole or not at all: its turns
alternate and end with an answer, and the `<image>` marks of its questions are as many as its images. Nothing is guessed and no
text is changed. As for pairs, pixels are first decoded by the encoding pass.
"""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

from wds_tools.convert.lines import LineRange, by_suffix, check_kept_fields, expand_inputs, kept_fields
from wds_tools.convert.options import ConvertOptions
from wds_tools.convert.records import ElementRange, plan_records, read_records
from wds_tools.errors import FormatError, Reject, UsageError
from wds_tools.format.manifest import Manifest
from wds_tools.format.schema import Sample, SourceImage
from wds_tools.images import ImageLimits, probe
from wds_tools.jobs import Advance, Job, Report, TaskWriter, run_job
from wds_tools.sources.conversations import image_paths, turns_of
from wds_tools.sources.fields import Line, parse_record
from wds_tools.sources.images import FETCH_AHEAD, ImageSource, in_order

_SOURCE_ID = "source_id"


@dataclass(frozen=True, kw_only=True)
class SftConfig(ConvertOptions):
    """Convert conversations about images to shards; the images go in byte for byte, codes come with `wds-tools encode`."""

    input: tuple[str, ...]
    """.json or .jsonl files, folders of them, or brace patterns; records with conversations, and paths in image."""
    image_root: str | None = None
    """Folder that image paths are relative to, and may not leave. Default: the file's folder, which they may leave."""
    max_pixels: int = ImageLimits.max_pixels
    """Conversations about images with more pixels are rejected: decompression bombs."""
    max_image_bytes: int = ImageLimits.max_bytes
    """Conversations about image files with more bytes are rejected."""
    min_side: int = ImageLimits.min_side
    """Conversations about images with a shorter side than this, in pixels, are rejected."""
    keep: tuple[str, ...] = ()
    """Fields of the record to keep as provenance. Its id is kept always, as source_id."""
    task_records: int = 2000
    """A worker, and a resumed run, takes this many records at a time; a shard holds no more."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.task_records < 1:
            raise UsageError(f"--task-records {self.task_records}: at least 1")
        check_kept_fields(self.keep)

    @property
    def limits(self) -> ImageLimits:
        """What an image may be."""
        return ImageLimits(max_pixels=self.max_pixels, max_bytes=self.max_image_bytes, min_side=self.min_side)


def convert_sft(config: SftConfig) -> Manifest:
    """Convert; returns the manifest of the finished dataset. Raises: see run_job, plan_records."""
    inputs = expand_inputs(config, by_suffix(".json", ".jsonl"))
    ranges = plan_records(inputs.files, config.task_records)
    root = {"image_root": config.image_root, "strict_links": config.strict_links}
    job = Job(
        key_prefix=config.key_prefix,
        command="convert sft",
        settings={**root, "keep": config.keep, **asdict(config.limits)},
        tasks=ranges,
        total=sum(span.num_lines for span in ranges),
        source=inputs.source,
        work=_ConvertRecords(root, config.limits, config.keep),
    )
    return run_job(job, config)


class _Fetched(NamedTuple):
    """One record with its images, or why it can't be used."""

    line: Line
    turns: list[dict[str, str]]
    images: list[SourceImage]
    provenance: Mapping[str, Any]
    cause: Reject | None = None


@dataclass(frozen=True)
class _ConvertRecords:
    root: Mapping[str, Any]
    limits: ImageLimits
    keep: tuple[str, ...]

    def __call__(self, task: LineRange, writer: TaskWriter, report: Report) -> int:
        source = ImageSource(task.url, **self.root)
        is_list = isinstance(task, ElementRange)
        inputs = 0
        with ThreadPoolExecutor(FETCH_AHEAD) as pool:
            for fetched in in_order(pool, lambda line: self._fetch(line, source), read_records(task)):
                inputs += 1
                report(Advance(units=1))
                key = writer.key(fetched.line.number - task.first_line)
                cause = fetched.cause
                if cause is None:
                    try:
                        writer.add(_sample(key, fetched))
                    except FormatError as error:  # a kept field that is nested too deep to be written
                        cause = Reject("unwritable_record", str(error))
                if cause is not None:
                    number = fetched.line.number
                    writer.reject(cause, source=task.url, line=None if is_list else number, element=number if is_list else None)
        return inputs

    def _fetch(self, line: Line, source: ImageSource) -> _Fetched:
        try:
            record = parse_record(line)
            turns = turns_of(record)
            images = []
            paths = image_paths(record, turns, self.keep)
            for number, path in enumerate(paths, 1):
                try:
                    data = source.read(path, self.limits.max_bytes)
                    images.append(SourceImage(data, probe(data, self.limits).extension))
                except Reject as cause:
                    raise Reject(cause.reason, f"image {number} of {len(paths)}: {cause.detail}") from cause
        except Reject as cause:
            return _Fetched(line, [], [], {}, cause)
        source_id = record.get("id")
        provenance = {_SOURCE_ID: None if source_id is None else str(source_id)[:300], **kept_fields(record, self.keep)}
        return _Fetched(line, turns, images, provenance)


def _sample(key: str, fetched: _Fetched) -> Sample:
    first = fetched.images[0] if fetched.images else None
    return Sample(
        key=key,
        data_type="visual_sft",
        text="",
        conversations=fetched.turns,
        image=first and first.data,
        image_extension=first and first.extension,
        more_images=tuple(fetched.images[1:]),
        provenance=fetched.provenance,
    )
