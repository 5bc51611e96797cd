"""Tables -> rows: Parquet by row groups, Arrow files and streams, and the folders of save_to_disk.

An Arrow file that was cut off gives its rows up to there, a Parquet file its rows up to the damage (none, if its footer is gone),
and either one reject. Memory: one Arrow batch, or one Parquet row group.
"""

from __future__ import annotations

import io
import posixpath
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import dataclass
from typing import Any

from wds_tools.errors import NotFound, Reject, StorageError, UsageError, in_one_line
from wds_tools.format.codes import is_code_column
from wds_tools.format.typed_json import read_json, shape
from wds_tools.records.coded import TYPED_FIELDS
from wds_tools.records.field_map import IMAGE_NAMES
from wds_tools.sources.arrow import load_pyarrow
from wds_tools.sources.containers import Unit
from wds_tools.sources.record import InputFile, Record
from wds_tools.storage import Store, join, open_store, split_url

ARROW, PARQUET = ".arrow", ".parquet"
MADE = "wds-tools.codes"
"""In the metadata of a file of `export parquet`: column -> provenance, as the manifests have it, in JSON."""
_READING = "reading Parquet and Arrow files"
_STATE, _SPLITS = "state.json", "dataset_dict.json"
_NOT_SAVED = "is not what save_to_disk writes"
_END_OF_STREAM = b"\xff\xff\xff\xff\0\0\0\0"
_PARQUET_MAGIC = b"PAR1"
_ARROW_MAGIC = b"ARROW1"
_UNIT_ROWS, _UNIT_BYTES = 2500, 64 << 20
_PARALLEL_FOOTERS = 16
_TAIL_BYTES = 64 << 10
_MAX_FOOTER_BYTES = 64 << 20
_BATCH_ROWS, _BATCH_BYTES = 1000, 16 << 20
_BUFFER_BYTES, _BUFFERS_BYTES = 8 << 20, 64 << 20
"""Of a column, and of all that are read, at most (if there are less than 1,000)."""
_STREAM_BYTES = 1 << 20
_BOMB_BYTES, _BOMB_RATIO = 1 << 30, 200
"""A row group that becomes so many bytes, and so many times the file's, is refused."""

_Row = tuple[dict[str, Any] | Reject, int]
"""Fields, and bytes of the file that are done with it."""


@dataclass(frozen=True)
class _Splits:
    splits: tuple[str, ...]


@dataclass(frozen=True)
class _File:
    filename: str


def saved_files(url: str, sizes: Mapping[str, int]) -> dict[str, list[str]]:
    """The Arrow files of each save_to_disk folder below a folder, by the names of their state.json, in the order of their rows.

    Raises:
        UsageError: a folder has several splits, or a dataset whose rows are reordered by an indices file.
        NotFound: one that is named is missing.
        FormatError: a state.json is none.
    """
    for name in sizes:
        if posixpath.basename(name) == _SPLITS:
            splits = read_json(_Splits, open_store(url).read(name), f"{join(url, name)} {_NOT_SAVED}").splits
            folder = join(url, posixpath.dirname(name)).rstrip("/")
            example = f"{folder}/{(*splits, 'SPLIT')[0]}"
            raise UsageError(f"{folder} holds the splits {', '.join(splits)}: name those that you want, as {example}")
    saved = {name: _data_files(url, name) for name in sizes if posixpath.basename(name) == _STATE}
    for names in saved.values():
        for name in names:
            if name not in sizes:
                raise NotFound(f"{join(url, name)} is missing, though its {_STATE} names it: copy the folder again")
    return saved


@dataclass(frozen=True)
class Tables:
    """Container of Parquet and Arrow files; a unit is some row groups of a Parquet file, or an Arrow file.

    A record's line is the number of its row in the file, from 1.
    """

    columns: tuple[str, ...] | None = None
    """Names of the columns that are wanted; None: all. Those that a file lacks are no fields of its records.

    Columns that may hold an image (of bytes, or with a well-known name) are read too: no image is passed over in silence.
    """

    def units(self, files: Sequence[InputFile]) -> Iterator[Unit]:
        """See Container. Reads the ends of the files, some at a time; one that is damaged there is a unit, and then a reject.

        Raises:
            MissingPackage: pyarrow is not installed.
        """
        load_pyarrow(_READING)
        with ThreadPoolExecutor(_PARALLEL_FOOTERS, "footer") as pool:
            for units in pool.map(_units_of, files):
                yield from units

    def read(self, unit: Unit) -> Iterator[Record[Mapping[str, Any]]]:
        """See Container."""
        pa = load_pyarrow(_READING)
        root, name = split_url(unit.url)
        with closing(_Seekable(open_store(root), name)) as file:
            is_parquet = file.head == _PARQUET_MAGIC
            rows = _parquet_rows(pa, file, unit, self.columns) if is_parquet else _arrow_rows(pa, file, self.columns)
            number, line = -1, unit.place[2] if unit.place else 0
            try:
                for number, (fields, num_bytes) in enumerate(rows):
                    line += 1
                    yield Record(number, fields, unit.url, line, None, None, num_bytes)
            except Reject as cause:
                yield Record(
                    number + 1, Reject(cause.reason, f"{cause.detail} (behind row {line})"), unit.url, line=line + 1, num_units=0
                )


def exported_codes(url: str, size: int | None = None) -> Mapping[str, Mapping[str, Any]] | None:
    """Column -> provenance of the codes in a file of `export parquet`; none of any other.

    Args:
        url, size: of the file; None: it is asked for.

    Returns:
        None for one that has columns of codes as such a file, but was written again by something that left out what made them.

    Raises:
        FormatError: what it says of them is no JSON.
    """
    pa = load_pyarrow(_READING)
    root, name = split_url(url)
    with closing(_Seekable(open_store(root), name, size)) as stream:
        try:
            schema = _parquet_file(pa, stream).schema_arrow
        except Reject:  # which its rows will be
            return {}
    data = (schema.metadata or {}).get(MADE.encode())
    if data is None:
        is_export = {*TYPED_FIELDS} <= {*schema.names} and any(map(is_code_column, schema.names))
        return None if is_export else {}
    return read_json(dict[str, dict[str, Any]], data, f"{url}: not the metadata of an export")


def _data_files(url: str, state_name: str) -> list[str]:
    where = join(url, state_name)
    state = read_json(dict[str, Any], open_store(url).read(state_name), f"{where} {_NOT_SAVED}")
    files = shape(list[_File], state.get("_data_files"), f"{where} {_NOT_SAVED}: _data_files")
    if state.get("_indices_data_files"):
        raise UsageError(f"{where}: its rows are reordered by an indices file: `.flatten_indices()` and save it again")
    return [posixpath.join(posixpath.dirname(state_name), file.filename) for file in files]


def _units_of(file: InputFile) -> list[Unit]:
    """Row groups of a Parquet file, until they have _UNIT_ROWS or _UNIT_BYTES; or the file."""
    pa = load_pyarrow(_READING)
    root, name = split_url(file.url)
    units: list[Unit] = []
    with closing(_Seekable(open_store(root), name, file.size)) as stream:
        if not stream.ends_with(_PARQUET_MAGIC):
            return [Unit(file.url, file.size)]
        try:
            groups = _group_rows(_parquet_file(pa, stream).metadata)
        except Reject:
            return [Unit(file.url, file.size)]
    total = max(sum(groups), 1)
    first = first_row = rows = 0
    for group, num_rows in enumerate(groups, 1):
        rows += num_rows
        num_bytes = file.size * (first_row + rows) // total - file.size * first_row // total
        if rows and (group == len(groups) or rows >= _UNIT_ROWS or num_bytes >= _UNIT_BYTES):
            units.append(Unit(file.url, num_bytes, rows, (first, group, first_row)))
            first, first_row, rows = group, first_row + rows, 0
    return units


def _parquet_file(pa: Any, stream: _Seekable, **options: Any) -> Any:
    """Opened; only its footer is read."""
    with _rejecting(pa, "corrupt_parquet"):
        if (footer_bytes := stream.footer_bytes) > _MAX_FOOTER_BYTES:
            raise Reject("corrupt_parquet", f"its footer claims {footer_bytes} bytes, at most {_MAX_FOOTER_BYTES} are accepted")
        table = pa.parquet.ParquetFile(stream, pre_buffer=False, page_checksum_verification=True, **options)
        names = table.schema_arrow.names
        if len(set(names)) < len(names):
            raise Reject("corrupt_parquet", "two of its columns have one name")
        return table


def _group_rows(metadata: Any) -> list[int]:
    """Rows of each row group."""
    rows = [metadata.row_group(number).num_rows for number in range(metadata.num_row_groups)]
    if min(rows, default=0) < 0 or sum(rows) != metadata.num_rows:
        raise Reject("corrupt_parquet", f"its footer says {metadata.num_rows} rows, and {sum(rows)} over its row groups")
    return rows


def _parquet_rows(pa: Any, stream: _Seekable, unit: Unit, columns: Sequence[str] | None) -> Iterator[_Row]:
    metadata = _parquet_file(pa, stream).metadata
    rows = _group_rows(metadata)
    first, last, _ = unit.place or (0, len(rows), 0)
    num_bytes = 0
    for group in range(first, last):  # never its columns: pyarrow 26 aborts the process if what it finds there is damaged
        group_bytes = metadata.row_group(group).total_byte_size
        if group_bytes > max(_BOMB_BYTES, _BOMB_RATIO * stream.size):
            raise Reject("decompression_bomb", f"row group {group} of {stream.size} bytes becomes {group_bytes}")
        num_bytes += group_bytes
    num_rows = max(sum(rows[first:last]), 1)
    buffer_bytes = min(_BUFFER_BYTES, max(_BUFFERS_BYTES // max(metadata.num_columns, 1), 1 << 16))
    table = _parquet_file(pa, stream, metadata=metadata, buffer_size=buffer_bytes)
    size = _rows_at_a_time(num_rows, num_bytes)
    done = counted = 0
    with _rejecting(pa, "corrupt_parquet"):
        names = _wanted(pa, table.schema_arrow, columns)
        for group in range(first, last):  # one by one, since a batch that ends in a damaged one would be lost
            for batch in table.iter_batches(size, row_groups=[group], columns=names, use_threads=False):
                for fields in _fields(pa, batch):
                    done += 1
                    counted, before = unit.num_bytes * done // num_rows, counted
                    yield fields, counted - before
    if done != sum(rows[first:last]):
        raise Reject("corrupt_parquet", f"{done} rows where its footer says {sum(rows[first:last])}")


def _arrow_rows(pa: Any, stream: _Seekable, columns: Sequence[str] | None) -> Iterator[_Row]:
    with _rejecting(pa, "corrupt_arrow"):
        if is_file := stream.head == _ARROW_MAGIC[:4]:
            file = pa.ipc.open_file(stream)
            batches = map(file.get_batch, range(file.num_record_batches))
        else:
            batches = pa.ipc.open_stream(io.BufferedReader(stream, _STREAM_BYTES))
        at = 0
        for batch in batches:
            batch.validate(full=True)  # nothing else looks at offsets before they are followed
            batch = batch.select(_wanted(pa, batch.schema, columns))
            size = _rows_at_a_time(len(batch), batch.nbytes)
            for start in range(0, len(batch), size):
                for fields in _fields(pa, batch.slice(start, size)):
                    yield fields, max(stream.tell() - at, 0)
                    at = max(stream.tell(), at)
    if not (is_file or stream.ends_with(_END_OF_STREAM)):
        raise Reject("truncated_arrow", f"the file ends at byte {stream.size} without the end marker: it was cut off")


def _wanted(pa: Any, schema: Any, columns: Sequence[str] | None) -> list[str]:
    """The columns that are read."""
    return [
        column.name
        for column in schema
        if columns is None or column.name in columns or _may_hold_image(pa, column.name, column.type)
    ]


def _may_hold_image(pa: Any, name: str, kind: Any) -> bool:
    """By its name, or since it holds bytes; or something in it may."""
    types = pa.types
    if name.lower() in IMAGE_NAMES or types.is_binary(kind) or types.is_large_binary(kind):
        return True
    if types.is_binary_view(kind) or types.is_fixed_size_binary(kind):
        return True
    if types.is_struct(kind):
        return any(_may_hold_image(pa, field.name, field.type) for field in kind)
    return hasattr(kind, "value_type") and _may_hold_image(pa, "", kind.value_type)


def _rows_at_a_time(num_rows: int, num_bytes: int) -> int:
    """Rows that become Python objects at a time."""
    return min(max(_BATCH_BYTES * num_rows // max(num_bytes, 1), 1), _BATCH_ROWS)


def _fields(pa: Any, batch: Any) -> list[dict[str, Any] | Reject]:
    """Rows as JSON values and bytes; a column that has no such type stays as it is."""
    if not batch.num_columns:  # none of them is wanted; a batch that is made of no columns has no rows
        return [{} for _ in range(batch.num_rows)]
    batch = pa.RecordBatch.from_arrays([_as_json(pa, column) for column in batch.columns], names=batch.schema.names)
    try:
        rows: list[dict[str, Any] | Reject] = batch.to_pylist()
    except (ValueError, LookupError, ArithmeticError) as error:
        if len(batch) > 1:
            return [row for number in range(len(batch)) for row in _fields(pa, batch.slice(number, 1))]
        if isinstance(error, UnicodeDecodeError):
            what = f"byte {error.start} of a text is {error.object[error.start]:#04x}: {error.reason}"
            return [Reject("invalid_utf8", what)]
        return [Reject("wrong_type", f"a value of the row can't be read: {in_one_line(error)}")]
    for name in [field.name for field in batch.schema if pa.types.is_map(field.type)]:
        for row in rows:
            assert not isinstance(row, Reject)
            row[name] = _object(row[name])
    return rows


def _object(entries: list[tuple[Any, Any]] | None) -> Any:
    """A map as an object, or as its pairs where that would lose any."""
    if entries is None:
        return None
    keys = {key for key, _ in entries if isinstance(key, str)}
    return dict(entries) if len(keys) == len(entries) else [list(entry) for entry in entries]


def _as_json(pa: Any, column: Any) -> Any:
    kind = _json_type(pa, column.type)
    try:
        return column if kind == column.type else column.cast(kind)
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError):
        return column


def _json_type(pa: Any, kind: Any) -> Any:
    """The type whose values are the JSON values of this one: times as text, decimals as numbers."""
    types = pa.types
    if types.is_duration(kind):
        return pa.int64()
    if types.is_temporal(kind):
        return pa.string()
    if types.is_decimal(kind):
        return pa.float64()
    if types.is_float16(kind):
        return pa.float32()
    if types.is_dictionary(kind):
        return _json_type(pa, kind.value_type)
    if isinstance(kind, pa.BaseExtensionType):
        return _json_type(pa, kind.storage_type)
    if types.is_struct(kind):
        return pa.struct([field.with_type(_json_type(pa, field.type)) for field in kind])
    if types.is_fixed_size_list(kind):
        return pa.list_(_json_type(pa, kind.value_type), kind.list_size)
    if types.is_large_list(kind):
        return pa.large_list(_json_type(pa, kind.value_type))
    return pa.list_(_json_type(pa, kind.value_type)) if types.is_list(kind) else kind


@contextmanager
def _rejecting(pa: Any, reason: str) -> Iterator[None]:
    """What pyarrow says of a file becomes a reject; what the storage says stays."""
    try:
        yield
    except (StorageError, Reject):
        raise
    except (pa.ArrowException, OSError, ValueError, OverflowError, MemoryError) as error:
        raise Reject(reason, " ".join(str(error).split())[:300]) from error


class _Seekable(io.RawIOBase):
    """A file of a store as pyarrow wants it, read by range; its end is read at once, since a footer lies there."""

    def __init__(self, store: Store, name: str, size: int | None = None) -> None:
        self._store, self._name = store, name
        self.size = store.size(name) if size is None else size
        self._tail_at = max(self.size - _TAIL_BYTES, 0)
        self._tail = bytes(store.read_range(name, self._tail_at, self.size))
        self._at = 0

    @property
    def head(self) -> bytes:
        """The first four bytes, and of Parquet the last too."""
        return self._range(0, min(4, self.size))

    @property
    def footer_bytes(self) -> int:
        """As a Parquet file states them."""
        return int.from_bytes(self._tail[-8:-4], "little")

    def ends_with(self, data: bytes) -> bool:
        """Whether these are its last bytes."""
        return self._tail.endswith(data)

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET, /) -> int:
        self._at = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self.size}[whence]
        return self._at

    def read(self, size: int = -1, /) -> bytes:
        end = self.size if size < 0 else min(self._at + size, self.size)
        data = self._range(self._at, end) if self._at < end else b""
        self._at += len(data)
        return data

    def readinto(self, buffer: Any, /) -> int:
        data = self.read(len(buffer))
        buffer[: len(data)] = data
        return len(data)

    def _range(self, start: int, end: int) -> bytes:
        if start >= self._tail_at:
            return self._tail[start - self._tail_at : end - self._tail_at]
        return bytes(self._store.read_range(self._name, start, end))
