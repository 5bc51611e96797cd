"""Rows of Liquid's Hugging Face data, and of our own exports, back into shards: nothing is encoded again.

    files (`tables`) -> rows ─┐
    ranges of lines  -> rows ─┴-> Sample(text, codes, conversations) -> shards

What a row holds, `sources.coded` says. Which tokenizer made the codes, the rows don't say: it is an argument. Rows
with other numbers of codes than their grid has, or with codes beyond the codebook, are rejects. Memory: see tables.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from wds_tools.convert.lines import (
    InputFile,
    LineRange,
    check_kept_fields,
    expand_inputs,
    kept_fields,
    plan_lines,
    read_lines,
)
from wds_tools.convert.options import ConvertOptions
from wds_tools.convert.tables import JSONL, TableRow, check_files, data_files, load_pyarrow, table_rows
from wds_tools.dataset.writer import TaskWriter
from wds_tools.errors import FormatError, Reject, UsageError
from wds_tools.format.codes import CODE_COLUMNS
from wds_tools.format.manifest import Manifest
from wds_tools.jobs.job import Advance, Plan, run_job
from wds_tools.sources.coded import SIDE_512, CodedRows
from wds_tools.sources.fields import Line, parse_record


@dataclass(frozen=True, kw_only=True)
class HfConfig(ConvertOptions):
    """Convert Hugging Face datasets that hold codes, Liquid's or those of `export hf`, to shards."""

    input: tuple[str, ...]
    """Folders written by save_to_disk, .parquet or .jsonl files of the same seven fields, or folders of any; paths or URLs."""
    tokenizer: str = "chameleon"
    """Name of the tokenizer that made the codes. The rows don't say; it is written into the manifest."""
    codebook_size: int = 8192
    """Entries of its codebook; a row with a code beyond is rejected."""
    stride: int = 16
    """Pixels of an image on a side for each code."""
    weights_hash: str | None = None
    """Hash of its weights, as the manifest of a set that was encoded here has it: only then can the two be exported together."""
    keep: tuple[str, ...] = ()
    """Further fields of the rows to keep as provenance."""
    task_lines: int = 10_000
    """Of a jsonl, a worker, and a resumed run, takes this many lines at a time; of a Hugging Face folder one file."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.codebook_size <= 1 << 32:
            raise UsageError(f"--codebook-size {self.codebook_size}: expected 1 to 2**32")
        if self.stride < 1 or SIDE_512 % self.stride:
            raise UsageError(f"--stride {self.stride}: expected a divisor of {SIDE_512}")
        if self.task_lines < 1:
            raise UsageError(f"--task-lines {self.task_lines}: at least 1")
        check_kept_fields(self.keep)


def convert_hf(config: HfConfig) -> Manifest:
    """Convert; returns the manifest of the finished dataset.

    Raises:
        UsageError: a folder has several splits, or a dataset whose rows are reordered by an indices file.
        MissingPackage: pyarrow is not installed, and there are Arrow or Parquet files.
        Otherwise see run_job.
    """
    inputs = expand_inputs(config, data_files)
    files = check_files(inputs.files)
    tables = [file for file in files if not file.url.endswith(JSONL)]
    if tables:
        load_pyarrow()
    lines = [file for file in files if file.url.endswith(JSONL)]
    ranges = plan_lines(lines, config.task_lines, quiet=config.quiet)
    fields = {"tokenizer": config.tokenizer, "codebook_size": config.codebook_size, "stride": config.stride}
    provenance = {**fields, "weights_hash": config.weights_hash, "precision": "unknown", "imported": True}
    plan = Plan(
        key_prefix=config.key_prefix,
        command="convert hf",
        settings={**fields, "weights_hash": config.weights_hash, "keep": config.keep},
        tasks=[*map(tuple, tables), *ranges],
        total=sum(file.size for file in tables) + sum(span.end - span.start for span in ranges),
        codes=dict.fromkeys(CODE_COLUMNS, provenance),
        source=inputs.source,
    )
    return run_job(plan, _ConvertRows(CodedRows(config.codebook_size, config.stride), config.keep), config)


@dataclass(frozen=True)
class _ConvertRows:
    rows: CodedRows
    keep: tuple[str, ...]

    def __call__(self, task: LineRange | tuple[str, int], writer: TaskWriter, advance: Advance) -> int:
        if isinstance(task, LineRange):
            url = task.url
            rows: Iterator[TableRow] = (TableRow(line.number, line, len(line.data or b"") + 1) for line in read_lines(task))
        else:
            url = task[0]
            rows = table_rows(InputFile(*task))
        inputs = number = 0
        try:
            for number, record, num_bytes in rows:
                key = writer.key(inputs)
                inputs += 1
                advance(num_bytes)
                try:
                    row = parse_record(record) if isinstance(record, Line) else record
                    writer.add(self.rows.sample(key, row)._replace(provenance=kept_fields(row, self.keep)))
                except Reject as cause:
                    writer.reject(cause, source=url, line=number)
                except FormatError as error:
                    writer.reject(Reject("unwritable_record", str(error)), source=url, line=number)
        except Reject as cause:  # the file itself; what came before the damage is kept
            inputs += 1
            writer.reject(cause, source=url, line=number + 1)
        return inputs
