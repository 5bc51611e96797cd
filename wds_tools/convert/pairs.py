"""Image-caption pairs (jsonl) -> image_text or image_text_multi samples that carry the source image.

    lines, cut into ranges -> record -> fetch the image's bytes -> look at its header -> Sample(text, image) -> shards

Only headers are looked at here: format, size, aspect ratio. Pixels are first decoded by the encoding pass, and what only that
finds is a reject there; or here, if an `ImageEncoder` is handed in, which fills the codes on the way. Images are fetched a few at
a time ahead of their turn; the order of the lines is kept.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from types import MappingProxyType
from typing import Any, NamedTuple, Protocol

from wds_tools.convert.lines import (
    LineRange,
    by_suffix,
    check_kept_fields,
    expand_inputs,
    kept_fields,
    plan_lines,
    read_lines,
)
from wds_tools.convert.options import ConvertOptions
from wds_tools.errors import FormatError, Reject, UsageError
from wds_tools.format.manifest import Manifest
from wds_tools.format.schema import Sample
from wds_tools.images import ImageLimits, Mode, crop_for, probe
from wds_tools.jobs import Advance, Job, Report, TaskWriter, run_job
from wds_tools.sources.fields import CAPTION, Line, parse_record, required_text
from wds_tools.sources.images import FETCH_AHEAD, ImageSource, in_order

_DATA_TYPES = {"cc512": "image_text", "multi768": "image_text_multi"}


@dataclass(frozen=True, kw_only=True)
class ImagePairsConfig(ConvertOptions):
    """Convert image-caption pairs to shards; the images go in byte for byte, codes come with `wds-tools encode`."""

    input: tuple[str, ...]
    """.jsonl files, folders of them or brace patterns; one object a line with image_path and text_prompt (or text)."""
    mode: Mode = "cc512"
    """cc512: 512 px centre crop, for images up to 2:1. multi768: nearest of many shapes of about 768 x 768 pixels, up to 4:1."""
    image_root: str | None = None
    """Folder that image paths are relative to, and may not leave. Default: the jsonl's folder, which they may leave."""
    max_pixels: int = ImageLimits.max_pixels
    """Images with more pixels are rejected: decompression bombs."""
    max_image_bytes: int = ImageLimits.max_bytes
    """Image files with more bytes are rejected."""
    min_side: int = ImageLimits.min_side
    """Images with a shorter side than this, in pixels, are rejected."""
    keep: tuple[str, ...] = ()
    """Fields of the record to keep as provenance, such as url."""
    task_lines: int = 2000
    """A worker, and a resumed run, takes this many lines at a time; a shard holds no more."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.task_lines < 1:
            raise UsageError(f"--task-lines {self.task_lines}: at least 1")
        check_kept_fields(self.keep)

    @property
    def limits(self) -> ImageLimits:
        """What an image may be."""
        return ImageLimits(max_pixels=self.max_pixels, max_bytes=self.max_image_bytes, min_side=self.min_side)


class ImageEncoder(Protocol):
    """What fills the codes of samples on the way; see wds_tools.encode.image_encoder."""

    workers: int
    runs_on: str

    @property
    def device(self) -> Any:
        """What encodes in this process; knows how long it waited."""
        ...

    def provenance(self, column_types: Iterable[str]) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
        """What decides on the codes, and the provenance of each code column."""
        ...

    def fill(self, samples: Iterable[tuple[int, Sample | Reject]]) -> Iterator[tuple[int, Sample | Reject]]:
        """The same samples with codes, or why not."""
        ...


def convert_image_pairs(config: ImagePairsConfig, image_encoder: ImageEncoder | None = None) -> Manifest:
    """Convert, and fill the codes with an image_encoder; returns the manifest of the finished dataset. Raises: see run_job."""
    inputs = expand_inputs(config, by_suffix(".jsonl"))
    ranges = plan_lines(inputs.files, config.task_lines, quiet=config.quiet)
    root = {"image_root": config.image_root, "strict_links": config.strict_links}
    settings = {"mode": config.mode, **root, "keep": config.keep, **asdict(config.limits)}
    codes: dict[str, dict[str, Any]] = {}
    if image_encoder is not None:
        decides, codes = image_encoder.provenance([_DATA_TYPES[config.mode]])
        settings["encode"] = decides
    job = Job(
        key_prefix=config.key_prefix,
        command="convert image-pairs",
        settings=settings,
        tasks=ranges,
        total=sum(span.num_lines for span in ranges),
        codes=codes,
        device="cpu" if image_encoder is None else image_encoder.runs_on,
        source=inputs.source,
        work=_ConvertLines(config.mode, root, config.limits, config.keep, image_encoder),
    )
    return run_job(job, config if image_encoder is None else replace(config, workers=image_encoder.workers))


class _Fetched(NamedTuple):
    """One line, its record, and the image that it names, or why not."""

    line: Line
    text: str = ""
    record: Mapping[str, Any] = MappingProxyType({})
    image: bytes = b""
    extension: str = ""
    cause: Reject | None = None


@dataclass(frozen=True)
class _ConvertLines:
    mode: Mode
    root: Mapping[str, Any]
    limits: ImageLimits
    keep: tuple[str, ...]
    image_encoder: ImageEncoder | None = None

    def __call__(self, task: LineRange, writer: TaskWriter, report: Report) -> int:
        inputs = 0
        samples = self._samples(task, writer)
        for line, sample in samples if self.image_encoder is None else self.image_encoder.fill(samples):
            inputs += 1
            report(Advance(units=1) + (Advance() if self.image_encoder is None else self.image_encoder.device.new_use()))
            if isinstance(sample, Reject):
                writer.reject(sample, source=task.url, line=line)
                continue
            try:
                writer.add(sample)
            except FormatError as error:  # a kept field that is nested too deep to be written
                writer.reject(Reject("unwritable_record", str(error)), source=task.url, line=line)
        return inputs

    def _samples(self, task: LineRange, writer: TaskWriter) -> Iterator[tuple[int, Sample | Reject]]:
        """(line, what it is) in the order of the lines."""
        source = ImageSource(task.url, **self.root)
        with ThreadPoolExecutor(FETCH_AHEAD) as pool:
            for fetched in in_order(pool, lambda line: self._fetch(line, source), read_lines(task)):
                if fetched.cause is not None:
                    yield fetched.line.number, fetched.cause
                    continue
                yield (
                    fetched.line.number,
                    Sample(
                        key=writer.key(fetched.line.number - task.first_line),
                        data_type=_DATA_TYPES[self.mode],
                        text=fetched.text,
                        image=fetched.image,
                        image_extension=fetched.extension,
                        provenance=kept_fields(fetched.record, self.keep),
                    ),
                )

    def _fetch(self, line: Line, source: ImageSource) -> _Fetched:
        try:
            record = parse_record(line)
            text = required_text(record, CAPTION)
            image = source.read(required_text(record, ("image_path",)), self.limits.max_bytes)
            info = probe(image, self.limits)
            crop_for(self.mode, info.width, info.height)
        except Reject as cause:
            return _Fetched(line, cause=cause)
        return _Fetched(line, text, record, image, info.extension)
