"""Samples -> records -> columns -> the bytes of an Arrow or Parquet file.

    serialize_table_row(sample)  a few fixed fields, text and codes as they are: what waits in the shuffle, a third of its size
    write_part(...)   records -> batches of the seven columns -> one file

The columns are Liquid's (`sources.coded`), so that old and new datasets can be concatenated; codes are a JSON list in a string,
as json.dumps writes it. The text of a conversation
is JSON too: an object with its `conversations` and, if it has codes, the `grids` that they are cut into. Memory is
one batch.
"""

from __future__ import annotations

import io
import json
import struct
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
import orjson

from wds_tools.dataset.files import Written
from wds_tools.errors import FormatError, UsageError
from wds_tools.format.checksum import content_hash
from wds_tools.format.codes import CODE_COLUMNS
from wds_tools.format.schema import DATA_TYPES, Sample, validate
from wds_tools.records.coded import ABSENT, COLUMNS
from wds_tools.sources.arrow import load_pyarrow
from wds_tools.storage import Writer

Format = Literal["arrow", "parquet"]
Columns = Callable[[Any, Any, Sequence[Any]], list[Any]]
"""pyarrow, a schema, and records -> arrays of its columns."""
FEATURES = {name: {"dtype": dtype, "_type": "Value"} for name, dtype in COLUMNS.items()}
"""The columns, as Hugging Face datasets writes them down."""

_FIELDS = struct.Struct("<BQIIQBIBI")
"""Data type, length, width, height, bytes of text; then bytes per code (0: no codes) and number of codes, column by column."""
ROW_BYTES = _FIELDS.size
TYPED_INSTEAD = "`wds-tools export parquet` has one for everything"


class _Limits(NamedTuple):
    rows: int
    record_bytes: int


_BATCH = {"arrow": _Limits(1000, 8 << 20), "parquet": _Limits(100_000, 8 << 20)}
"""A batch closes at whichever comes first. Arrow: what save_to_disk writes at once. Parquet: a row group."""


def serialize_table_row(sample: Sample) -> bytes:
    """The record of a sample.

    Raises:
        UsageError: the seven columns have no place for it: an image without codes, another code column, an interleaved document.
        FormatError: it breaks the schema.
    """
    validate(sample)
    needs_codes = sample.data_type in ("image_text", "image_text_multi") or sample.image is not None
    if needs_codes and not sample.codes:
        raise UsageError(f"{sample.key}: {sample.data_type} without codes: run `wds-tools encode` first")
    if sample.data_type == "interleaved":
        raise UsageError(f"{sample.key} is interleaved, for which Liquid's seven columns have no place: {TYPED_INSTEAD}")
    if unknown := set(sample.codes).difference(CODE_COLUMNS):
        raise UsageError(f"{sample.key}: the columns are {', '.join(COLUMNS)}; there is none for {', '.join(sorted(unknown))}")
    if sample.data_type == "image_text_multi" and (sample.width is None or sample.height is None):
        raise FormatError(f"{sample.key}: image_text_multi with codes, but without width and height")
    text = sample.text.encode()
    if sample.conversations is not None:
        talk = {"conversations": sample.conversations, "grids": sample.grids}
        text = orjson.dumps({name: value for name, value in talk.items() if value is not None})
    grids = [sample.codes.get(column) for column in CODE_COLUMNS]
    counts = [value for grid in grids for value in ((0, 0) if grid is None else (grid.itemsize, grid.size))]
    kind = DATA_TYPES.index(sample.data_type)
    fields = _FIELDS.pack(kind, sample.length, sample.width or 0, sample.height or 0, len(text), *counts)
    return b"".join((fields, text, *(grid.tobytes() for grid in grids if grid is not None)))


def liquid_schema(pa: Any) -> Any:
    """The Arrow schema of the seven columns, with the features in its metadata."""
    metadata = {"huggingface": json.dumps({"info": {"features": FEATURES}})}
    return pa.schema([(name, getattr(pa, dtype)()) for name, dtype in COLUMNS.items()], metadata=metadata)


def write_part(
    writer: Writer, records: Iterable[Any], file_format: Format, schema: Any, columns: Columns, size: Callable[[Any], int]
) -> tuple[Written, int]:
    """Write records as one file: an Arrow IPC stream or a Parquet file.

    Args:
        writer: of the file.
        records: in their order.
        file_format: which.
        schema: of the table.
        columns: makes the arrays of its columns.
        size: the bytes that a record takes, about.

    Returns:
        What the file is, and the bytes of its columns in Arrow's memory, which Hugging Face calls num_bytes.
    """
    pa = load_pyarrow("exporting")
    sink = _Sink(writer)
    if file_format == "arrow":
        table = pa.ipc.new_stream(sink, schema)
    else:
        table = pa.parquet.ParquetWriter(sink, schema, compression="zstd")

    def write(batch: Any) -> int:  # holds none while the next is made
        table.write_batch(batch)
        return int(batch.nbytes)

    with table:
        batches = _batches(records, _BATCH[file_format], size)
        num_bytes = sum(write(pa.RecordBatch.from_arrays(columns(pa, schema, batch), schema=schema)) for batch in batches)
    return Written(sink.num_bytes, sink.digest.hexdigest()), num_bytes


def _batches(records: Iterable[Any], limits: _Limits, size_of: Callable[[Any], int]) -> Iterator[list[Any]]:
    batch: list[Any] = []
    size = 0
    for record in records:
        num_bytes = size_of(record)
        if batch and (len(batch) >= limits.rows or size + num_bytes > limits.record_bytes):
            yield batch
            batch, size = [], 0
        batch.append(record)
        size += num_bytes
    if batch:
        yield batch


def liquid_columns(pa: Any, _: Any, records: Sequence[bytes]) -> list[Any]:
    """Arrays of the seven columns."""
    columns: dict[str, list[Any]] = {name: [] for name in COLUMNS}
    for record in records:
        kind, length, width, height, text_bytes, *counts = _FIELDS.unpack_from(record)
        at = ROW_BYTES + text_bytes
        columns["data_type"].append(DATA_TYPES[kind])
        columns["text"].append(record[ROW_BYTES:at])
        columns["length"].append(length)
        columns["width"].append(str(width) if width else ABSENT)
        columns["height"].append(str(height) if height else ABSENT)
        for column, itemsize, size in zip(CODE_COLUMNS, counts[::2], counts[1::2], strict=True):
            if not itemsize:
                columns[column].append(ABSENT)
                continue
            codes = np.frombuffer(record, f"<u{itemsize}", size, at)
            at += itemsize * size
            columns[column].append(_json_list(codes))
    return [pa.array(values, type=getattr(pa, COLUMNS[name])()) for name, values in columns.items()]


def _json_list(codes: Any) -> bytes:
    """What json.dumps(codes.tolist()) gives, five times as fast."""
    return orjson.dumps(codes, option=orjson.OPT_SERIALIZE_NUMPY).replace(b",", b", ")


class _Sink(io.RawIOBase):
    """A Writer as the file object that pyarrow wants. Closing it publishes nothing."""

    def __init__(self, writer: Writer) -> None:
        self._writer = writer
        self.num_bytes = 0
        self.digest = content_hash()

    def writable(self) -> bool:
        return True

    def write(self, data: Any, /) -> int:
        view = memoryview(data).cast("B")  # pyarrow says "signed", which obstore refuses
        self.digest.update(view)
        self.num_bytes += len(view)
        return self._writer.write(view)
