"""DCLM documents (`*.jsonl.zst`, `*.json.zst`, `*.zstd`) -> text_pretrain samples.

    files, grouped into tasks -> decompress -> lines -> records -> Sample(text) -> shards

A file that breaks off or is damaged gives the documents before the damage, and one reject that says where it stopped.
Memory does not grow with the input. Cost: see benchmarks/; about half the time is decompression and JSON parsing.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, BinaryIO

from wds_tools.convert.lines import by_suffix, check_kept_fields, expand_inputs, kept_fields, number_lines
from wds_tools.convert.options import ConvertOptions
from wds_tools.convert.zstd import decompress
from wds_tools.errors import FormatError, Reject, UsageError
from wds_tools.format.manifest import Manifest
from wds_tools.format.schema import Sample
from wds_tools.jobs import Advance, Job, Report, TaskWriter, run_job
from wds_tools.jobs.job import group_to_limit
from wds_tools.sources.fields import Line, parse_record, required_text
from wds_tools.storage import open_store, split_url


@dataclass(frozen=True, kw_only=True)
class DclmConfig(ConvertOptions):
    """Convert DCLM-style documents to shards."""

    input: tuple[str, ...]
    """Folders (searched for *.jsonl.zst, *.json.zst and *.zstd of both), files or brace patterns; local paths or URLs."""
    keep: tuple[str, ...] = ()
    """Fields of the record to keep as provenance, such as url."""
    task_bytes: int = 16 << 20
    """Small input files are taken together up to this many compressed bytes; a worker, and a resumed run, takes them whole."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.task_bytes < 1:
            raise UsageError(f"--task-bytes {self.task_bytes}: at least 1")
        check_kept_fields(self.keep)


def convert_dclm(config: DclmConfig) -> Manifest:
    """Convert; returns the manifest of the finished dataset. Raises: see run_job."""
    inputs = expand_inputs(config, by_suffix(".jsonl.zst", ".json.zst", ".jsonl.zstd", ".json.zstd"))
    job = Job[Any](
        key_prefix=config.key_prefix,
        command="convert dclm",
        settings={"keep": config.keep},
        tasks=[list(map(tuple, group)) for group in group_to_limit(inputs.files, lambda file: file.size, config.task_bytes)],
        total=sum(file.size for file in inputs.files),
        source=inputs.source,
        work=_ConvertFiles(config.keep),
    )
    return run_job(job, config)


@dataclass(frozen=True)
class _ConvertFiles:
    keep: tuple[str, ...]

    def __call__(self, task: Sequence[tuple[str, int]], writer: TaskWriter, report: Report) -> int:
        inputs = 0
        for url, _ in task:
            line = Line(0, b"")
            try:
                for line in _read_documents(url, report):
                    key = writer.key(inputs)
                    inputs += 1
                    try:
                        record = parse_record(line)
                        text = required_text(record, ("text",))
                    except Reject as cause:
                        writer.reject(cause, source=url, line=line.number)
                        continue
                    provenance = kept_fields(record, self.keep) if self.keep else {}
                    sample = Sample(key=key, data_type="text_pretrain", text=text, provenance=provenance)
                    try:
                        writer.add(sample)
                    except FormatError as error:  # a kept field that is nested too deep to be written
                        writer.reject(Reject("unwritable_record", str(error)), source=url, line=line.number)
            except Reject as cause:  # the file itself; what came before the damage is kept
                inputs += 1
                writer.reject(cause, source=url, line=line.number + 1)
        return inputs


def _read_documents(url: str, report: Report) -> Iterator[Line]:
    root, name = split_url(url)
    with open_store(root).open(name) as stream:
        yield from number_lines(_chunks(stream, report))


def _chunks(stream: BinaryIO, report: Report) -> Iterator[bytes]:
    seen_bytes = 0
    for data, read_bytes in decompress(stream):
        if read_bytes != seen_bytes:
            report(Advance(units=read_bytes - seen_bytes))
            seen_bytes = read_bytes
        yield data
