"""Rows of the reference pipeline's Hugging Face data, and of our own exports, back into shards: nothing is encoded again.

    files (`tables`) -> rows ─┐
    ranges of lines  -> rows ─┴-> Sample(text, codes, conversations) -> shards

A row has the reference's seven fields: strings, "no" for what is absent, codes as a JSON list in a string (a list will do).
Codes get their grid back: 512 / stride on a side, or height / stride by width / stride; those of a conversation the grids that
its text, the JSON of `export.rows`, says. What the rows don't say, which tokenizer made the codes, is an argument. Rows with
other numbers of codes than their grid has, or with codes beyond the codebook, are rejects. Memory: see tables.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import orjson
from numpy.typing import NDArray

from wds_tools.convert.lines import (
    InputFile,
    Line,
    LineRange,
    check_kept_fields,
    kept_fields,
    parse_record,
    plan_lines,
    read_lines,
    required_text,
)
from wds_tools.convert.options import ConvertOptions
from wds_tools.convert.sft import turns_of
from wds_tools.convert.tables import JSONL, TableRow, files_at, load_pyarrow, table_rows
from wds_tools.dataset.write import TaskWriter
from wds_tools.errors import FormatError, Reject, UsageError
from wds_tools.format.manifest import Manifest
from wds_tools.format.schema import CODE_COLUMNS, DATA_TYPES, Codes, Sample, code_dtype, validate
from wds_tools.passes import Advance, Plan, run_pass

_ABSENT = "no"
_SIDE_512 = 512
_IMAGE_TYPES = ("image_text", "image_text_multi")


@dataclass(frozen=True, kw_only=True)
class HfConfig(ConvertOptions):
    """Convert Hugging Face data sets that hold codes, the reference pipeline's or those of `export hf`, to shards."""

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
        if self.stride < 1 or _SIDE_512 % self.stride:
            raise UsageError(f"--stride {self.stride}: expected a divisor of {_SIDE_512}")
        if self.task_lines < 1:
            raise UsageError(f"--task-lines {self.task_lines}: at least 1")
        check_kept_fields(self.keep)


def convert_hf(config: HfConfig) -> Manifest:
    """Convert; returns the manifest of the finished data set.

    Raises:
        UsageError: a folder has several splits, or a data set whose rows are reordered by an indices file.
        MissingPackage: pyarrow is not installed, and there are Arrow or Parquet files.
        Otherwise see run_pass.
    """
    files = [file for url in config.input for file in files_at(url)]
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
        source={"inputs": [{"url": file.url, "bytes": file.size} for file in files]},
    )
    return run_pass(plan, _ConvertRows(config.codebook_size, config.stride, config.keep), config)


@dataclass(frozen=True)
class _ConvertRows:
    codebook_size: int
    stride: int
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
                    writer.add(self._sample(key, parse_record(record) if isinstance(record, Line) else record))
                except Reject as cause:
                    writer.reject(cause, source=url, line=number)
                except FormatError as error:
                    writer.reject(Reject("unwritable_record", str(error)), source=url, line=number)
        except Reject as cause:  # the file itself; what came before the damage is kept
            inputs += 1
            writer.reject(cause, source=url, line=number + 1)
        return inputs

    def _sample(self, key: str, row: Mapping[str, Any]) -> Sample:
        data_type = row.get("data_type")
        if data_type not in DATA_TYPES:
            raise Reject("unknown_data_type", f"data_type is {data_type!r}, expected one of {', '.join(DATA_TYPES)}")
        if data_type == "visual_sft":
            return self._conversation(key, row)
        text = required_text(dict(row), ("text",))
        provenance = kept_fields(row, self.keep)
        codes: dict[str, Codes] = {}
        width = height = None
        if (flat := _codes(row, "vqcode_512")) is not None:
            side = _SIDE_512 // self.stride
            codes["vqcode_512"] = self._grid("vqcode_512", flat, side, side)
        if (flat := _codes(row, "vqcode_multi768")) is not None:
            width, height = _pixels(row, "width"), _pixels(row, "height")
            if width % self.stride or height % self.stride:
                raise Reject(
                    "bad_codes", f"an image of {width} x {height} pixels is no whole number of codes at stride {self.stride}"
                )
            codes["vqcode_multi768"] = self._grid("vqcode_multi768", flat, height // self.stride, width // self.stride)
            data_type = "image_text_multi" if data_type == "image_text" and len(codes) == 1 else data_type
        if data_type in _IMAGE_TYPES and not codes:
            raise Reject("missing_codes", f"{data_type} without vqcode_512 and vqcode_multi768")
        return Sample(key=key, data_type=data_type, text=text, codes=codes, width=width, height=height, provenance=provenance)

    def _conversation(self, key: str, row: Mapping[str, Any]) -> Sample:
        talk = _talk(row)
        turns, grids = turns_of(talk), talk.get("grids")
        codes: dict[str, Codes] = {}
        for column in CODE_COLUMNS:
            flat = _codes(row, column)
            if flat is None:
                continue
            if grids is None:  # one image, as everywhere else
                side = _SIDE_512 // self.stride
                codes[column] = self._grid(column, flat, side, side)
                continue
            shapes = grids.get(column) if isinstance(grids, dict) else None
            if isinstance(shapes, list) and len(shapes) == 1 and _is_shape(shapes[0]):
                codes[column] = self._grid(column, flat, *shapes[0])
            else:
                codes[column] = self._values(column, flat)[None]
        sample = Sample(
            key=key,
            data_type="visual_sft",
            text="",
            codes=codes,
            conversations=turns,
            grids=grids,
            provenance=kept_fields(row, self.keep),
        )
        try:
            validate(sample)
        except FormatError as error:
            raise Reject("bad_codes", str(error)) from error
        return sample

    def _grid(self, column: str, flat: list[int], height: int, width: int) -> Codes:
        if len(flat) != height * width:
            raise Reject("bad_codes", f"{column} has {len(flat)} codes, expected {height} x {width} at stride {self.stride}")
        return self._values(column, flat).reshape(height, width)

    def _values(self, column: str, flat: list[int]) -> Codes:
        """Codes of the type that the codebook needs, (N,)."""
        try:
            values: NDArray[Any] = np.array(flat) if flat else np.zeros(0, np.int64)
        except ValueError:  # lists among the numbers
            values = np.array([""])
        is_whole = values.dtype.kind == "i" and values.ndim == 1
        if not is_whole or values.min(initial=0) < 0 or values.max(initial=0) >= self.codebook_size:
            raise Reject("bad_codes", f"{column} is not a list of whole numbers from 0 to {self.codebook_size - 1}")
        return values.astype(code_dtype(self.codebook_size))


def _talk(row: Mapping[str, Any]) -> dict[str, Any]:
    """The record of a conversation, which is its text in JSON."""
    text = required_text(dict(row), ("text",))
    try:
        talk = orjson.loads(text)
    except orjson.JSONDecodeError as error:
        raise Reject("bad_conversation", f"text is {text[:40]!r}, expected the JSON of a conversation: {error}") from error
    if not isinstance(talk, dict):
        raise Reject("bad_conversation", f"text is {text[:40]!r}, expected an object with conversations")
    return talk


def _is_shape(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(type(side) is int and side > 0 for side in value)


def _codes(row: Mapping[str, Any], column: str) -> list[int] | None:
    value = row.get(column)
    if value is None or value == _ABSENT:
        return None
    try:
        flat = orjson.loads(value) if isinstance(value, str) else value
    except orjson.JSONDecodeError as error:
        raise Reject("bad_codes", f"{column} is {value[:40]!r}, expected a JSON list: {error}") from error
    if not isinstance(flat, list) or not (flat or row.get("data_type") == "visual_sft"):  # a conversation may have no image
        raise Reject("bad_codes", f"{column} is {str(value)[:40]!r}, expected a list of codes")
    return flat


def _pixels(row: Mapping[str, Any], name: str) -> int:
    try:
        pixels = int(row[name])
    except (KeyError, TypeError, ValueError):
        pixels = 0
    if pixels <= 0:
        raise Reject("bad_codes", f"vqcode_multi768 needs {name} in pixels, got {row.get(name)!r}")
    return pixels
