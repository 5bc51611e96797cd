"""Hugging Face datasets as they lie on disk -> their files -> rows.

    a folder of save_to_disk   the Arrow files that its state.json names
    Parquet                    the files below a folder, or those that are named: what `export hf --format parquet` writes

An Arrow file that was cut off gives its rows up to there, a Parquet file its rows up to the damage (none, if its footer is gone),
and either one reject. Memory: one Arrow batch, or one Parquet row group.
"""

from __future__ import annotations

import io
import posixpath
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from wds_tools.errors import NotFound, Reject, StorageError, UsageError
from wds_tools.format.typed_json import read_json, shape
from wds_tools.sources.arrow import load_pyarrow
from wds_tools.sources.containers import Unit
from wds_tools.sources.record import InputFile, Record, file_records
from wds_tools.storage import Store, join, open_store, split_url

ARROW, PARQUET = ".arrow", ".parquet"
_READING = "reading Hugging Face datasets"
_STATE, _SPLITS = "state.json", "dataset_dict.json"
_NOT_SAVED = "is not what save_to_disk writes"
_BATCH_ROWS = 1000
_END_OF_STREAM = b"\xff\xff\xff\xff\0\0\0\0"


@dataclass(frozen=True)
class _Splits:
    splits: tuple[str, ...]


@dataclass(frozen=True)
class _File:
    filename: str


NumberedFields = tuple[int, dict[str, Any], int]
"""Number in its file from 1, fields, and bytes read, of a table row."""


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
    """Container of Parquet and Arrow files; a unit is a file."""

    def units(self, files: Sequence[InputFile]) -> Iterator[Unit]:
        """See Container."""
        load_pyarrow(_READING)
        return (Unit(file.url, file.size) for file in files)

    def read(self, unit: Unit) -> Iterator[Record[Mapping[str, Any]]]:
        """See Container."""
        return file_records(unit.url, table_rows(InputFile(unit.url, unit.num_bytes)))


def table_rows(file: InputFile) -> Iterator[NumberedFields]:
    """The rows of an Arrow or Parquet file.

    Raises:
        Reject: behind the last row that can be read: "truncated_arrow", "corrupt_arrow" or "corrupt_parquet".
    """
    yield from (_parquet_rows if file.url.endswith(PARQUET) else _arrow_rows)(*file)


def _data_files(url: str, state_name: str) -> list[str]:
    where = join(url, state_name)
    state = read_json(dict[str, Any], open_store(url).read(state_name), f"{where} {_NOT_SAVED}")
    files = shape(list[_File], state.get("_data_files"), f"{where} {_NOT_SAVED}: _data_files")
    if state.get("_indices_data_files"):
        raise UsageError(f"{where}: its rows are reordered by an indices file: `.flatten_indices()` and save it again")
    return [posixpath.join(posixpath.dirname(state_name), file.filename) for file in files]


def _arrow_rows(url: str, size: int) -> Iterator[NumberedFields]:
    pa = load_pyarrow(_READING)
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
                        yield number, row, num_bytes
                        num_bytes = 0
        except (pa.ArrowException, OSError) as error:
            if isinstance(error, StorageError):
                raise
            raise Reject("corrupt_arrow", f"{error} (behind row {number})") from error
    if bytes(store.read_range(name, max(size - len(_END_OF_STREAM), 0), size)) != _END_OF_STREAM:
        raise Reject(
            "truncated_arrow", f"the file ends at byte {size} without the end marker (behind row {number}): it was cut off"
        )


def _parquet_rows(url: str, size: int) -> Iterator[NumberedFields]:
    pa = load_pyarrow(_READING)
    root, name = split_url(url)
    number = 0
    try:
        table = pa.parquet.ParquetFile(_Seekable(open_store(root), name, size))
        each = size // max(table.metadata.num_rows, 1)
        for batch in table.iter_batches(batch_size=_BATCH_ROWS):
            for row in batch.to_pylist():
                number += 1
                yield number, row, each
    except (pa.ArrowException, OSError) as error:
        if isinstance(error, StorageError):
            raise
        raise Reject("corrupt_parquet", f"{error} (behind row {number})") from error


class _Seekable(io.RawIOBase):
    """A file of a store as pyarrow wants it, read by range."""

    def __init__(self, store: Store, name: str, size: int) -> None:
        self._store, self._name, self._size = store, name, size
        self._at = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET, /) -> int:
        self._at = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._size}[whence]
        return self._at

    def read(self, size: int = -1, /) -> bytes:
        end = self._size if size < 0 else min(self._at + size, self._size)
        data = bytes(self._store.read_range(self._name, self._at, end)) if self._at < end else b""
        self._at += len(data)
        return data
