"""The reference pipeline's data, as it is on disk, back into shards: nothing has to be encoded again.

    folders of save_to_disk -> files of state.json -> Arrow batches -> rows ─┐
    jsonl files             -> ranges of lines     -> records ─────────────┴-> Sample(text, codes) -> shards

A row has the reference's seven fields: strings, "no" for what is absent, codes as a JSON list in a string (a list will do).
Codes get their grid back: 512 / stride on a side, or height / stride by width / stride. What the rows don't say, which tokenizer
made the codes, is an argument. Rows with other numbers of codes than their grid has, or with codes beyond the codebook, are
rejects. An Arrow file that was cut off gives its rows up to there and one reject. Memory: one batch of rows.
"""

from __future__ import annotations

import posixpath
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import orjson

from wds_tools.convert.lines import (
    InputFile,
    Line,
    LineRange,
    check_kept_fields,
    expand_inputs,
    kept_fields,
    parse_record,
    plan_lines,
    read_lines,
    required_text,
)
from wds_tools.dataset.write import REJECTS, TaskWriter
from wds_tools.errors import FormatError, MissingPackage, NotFound, Reject, StorageError, UsageError
from wds_tools.format.manifest import Manifest
from wds_tools.format.schema import Codes, Sample, code_dtype
from wds_tools.passes import Advance, PassOptions, Plan, run_pass
from wds_tools.storage import join, open_store, split_url

_ABSENT = "no"
_ARROW, _JSONL = ".arrow", ".jsonl"
_STATE, _SPLITS = "state.json", "dataset_dict.json"
_BATCH_ROWS = 1000
_END_OF_STREAM = b"\xff\xff\xff\xff\0\0\0\0"
_SIDE_512 = 512
_IMAGE_TYPES = ("image_text", "image_text_multi")


@dataclass(frozen=True, kw_only=True)
class HfConfig(PassOptions):
    """Convert the reference pipeline's Hugging Face folders and jsonl files, which hold codes, to shards."""

    input: tuple[str, ...]
    """Folders written by save_to_disk, .jsonl files of the same seven fields, or folders of either; local paths or URLs."""
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
        MissingPackage: pyarrow is not installed, and there are Arrow files.
        Otherwise see run_pass.
    """
    files = [file for url in config.input for file in _files_at(url)]
    arrow = [file for file in files if file.url.endswith(_ARROW)]
    if arrow:
        _load_pyarrow()
    lines = [file for file in files if not file.url.endswith(_ARROW)]
    ranges = plan_lines(lines, config.task_lines, quiet=config.quiet)
    fields = {"tokenizer": config.tokenizer, "codebook_size": config.codebook_size, "stride": config.stride}
    provenance = {**fields, "weights_hash": config.weights_hash, "precision": "unknown", "imported": True}
    plan = Plan(
        command="convert hf",
        settings={**fields, "weights_hash": config.weights_hash, "keep": config.keep},
        tasks=[*map(tuple, arrow), *ranges],
        total=sum(file.size for file in arrow) + sum(span.end - span.start for span in ranges),
        codes=dict.fromkeys(("vqcode_512", "vqcode_multi768"), provenance),
        source={"inputs": [{"url": file.url, "bytes": file.size} for file in files]},
    )
    return run_pass(plan, _ConvertRows(config.codebook_size, config.stride, config.keep), config)


def _files_at(url: str) -> Iterator[InputFile]:
    """The Arrow files of a folder as its state.json has them, and its jsonl files; or the jsonl files that are named."""
    if url.endswith((_JSONL, _ARROW)):
        yield from expand_inputs([url], _JSONL)
        return
    entries = {entry.name: entry for entry in open_store(url).list()}
    for name in entries:
        if posixpath.basename(name) == _SPLITS:
            splits = orjson.loads(open_store(url).read(name)).get("splits", [])
            folder = join(url, posixpath.dirname(name)).rstrip("/")
            raise UsageError(f"{folder} holds the splits {', '.join(splits)}: name those that you want, as {folder}/{splits[0]}")
    found = [name for name in entries if name.endswith(_JSONL) and REJECTS not in name]
    for name in entries:
        if posixpath.basename(name) == _STATE:
            found += _data_files(url, name)
    if not found:
        what = (
            "an unfinished save_to_disk: there is no state.json"
            if any(name.endswith(_ARROW) for name in entries)
            else "no .jsonl"
        )
        raise NotFound(f"{url}: no folder of save_to_disk and {what}")
    for name in found:
        if name not in entries:
            raise NotFound(f"{join(url, name)} is missing, though its {_STATE} names it: copy the folder again")
        yield InputFile(join(url, name), entries[name].size)


def _data_files(url: str, state_name: str) -> list[str]:
    where = join(url, state_name)
    try:
        state = orjson.loads(open_store(url).read(state_name))
        names = [file["filename"] for file in state["_data_files"]]
    except (orjson.JSONDecodeError, KeyError, TypeError) as error:
        raise FormatError(f"{where} is not what save_to_disk writes: {error}") from error
    if state.get("_indices_data_files"):
        raise UsageError(f"{where}: its rows are reordered by an indices file: `.flatten_indices()` and save it again")
    return [posixpath.join(posixpath.dirname(state_name), name) for name in names]


class _Row(NamedTuple):
    number: int
    """From 1; of a line, that of the line."""
    record: Line | dict[str, Any]
    num_bytes: int
    """What it adds to the bytes read."""


@dataclass(frozen=True)
class _ConvertRows:
    codebook_size: int
    stride: int
    keep: tuple[str, ...]

    def __call__(self, task: LineRange | tuple[str, int], writer: TaskWriter, advance: Advance) -> int:
        if isinstance(task, LineRange):
            url = task.url
            rows: Iterator[_Row] = (_Row(line.number, line, len(line.data or b"") + 1) for line in read_lines(task))
        else:
            url, size = task
            rows = _arrow_rows(url, size)
        inputs = number = 0
        try:
            for number, record, num_bytes in rows:
                key = f"{writer.task:06d}-{inputs:08d}"
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
        if data_type not in (*_IMAGE_TYPES, "text_pretrain"):
            raise Reject(
                "unknown_data_type", f"data_type is {data_type!r}, expected image_text, image_text_multi or text_pretrain"
            )
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

    def _grid(self, column: str, flat: list[int], height: int, width: int) -> Codes:
        if len(flat) != height * width:
            raise Reject("bad_codes", f"{column} has {len(flat)} codes, expected {height} x {width} at stride {self.stride}")
        try:
            values = np.array(flat)
        except ValueError:  # lists among the numbers
            values = np.array([""])
        if values.dtype.kind != "i" or values.min() < 0 or values.max() >= self.codebook_size:
            raise Reject("bad_codes", f"{column} is not a list of whole numbers from 0 to {self.codebook_size - 1}")
        return values.astype(code_dtype(self.codebook_size)).reshape(height, width)


def _codes(row: Mapping[str, Any], column: str) -> list[int] | None:
    value = row.get(column)
    if value is None or value == _ABSENT:
        return None
    try:
        flat = orjson.loads(value) if isinstance(value, str) else value
    except orjson.JSONDecodeError as error:
        raise Reject("bad_codes", f"{column} is {value[:40]!r}, expected a JSON list: {error}") from error
    if not isinstance(flat, list) or not flat:
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


def _arrow_rows(url: str, size: int) -> Iterator[_Row]:
    """The rows of an Arrow file.

    Raises:
        Reject: behind the last whole batch: "truncated_arrow" or "corrupt_arrow".
    """
    pa = _load_pyarrow()
    root, name = split_url(url)
    store = open_store(root)
    number = 0
    with store.open(name) as stream:
        try:
            for batch in pa.ipc.open_stream(stream):
                num_bytes = batch.nbytes
                for start in range(0, len(batch), _BATCH_ROWS):
                    for row in batch.slice(start, _BATCH_ROWS).to_pylist():
                        number += 1
                        yield _Row(number, row, num_bytes)
                        num_bytes = 0
        except (pa.ArrowException, OSError) as error:
            if isinstance(error, StorageError):
                raise
            raise Reject("corrupt_arrow", f"{error} (behind row {number})") from error
    if bytes(store.read_range(name, max(size - len(_END_OF_STREAM), 0), size)) != _END_OF_STREAM:
        raise Reject(
            "truncated_arrow", f"the file ends at byte {size} without the end marker (behind row {number}): it was cut off"
        )


def _load_pyarrow() -> Any:
    """The package. Raises MissingPackage."""
    try:
        import pyarrow
    except ImportError as error:
        raise MissingPackage("reading Hugging Face folders needs pyarrow: pip install 'wds-tools[convert]'") from error
    return pyarrow
