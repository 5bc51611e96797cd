"""Hugging Face datasets as they lie on disk -> their files -> rows.

    a folder of save_to_disk   the Arrow files that its state.json names
    Parquet                    the files below a folder, or those that are named: what `export hf --format parquet` writes
    jsonl                      the same; its lines are read by `lines`

An Arrow file that was cut off gives its rows up to there, a Parquet file its rows up to the damage (none, if its footer is gone),
and either one reject. Memory: one Arrow batch, or one Parquet row group.
"""

from __future__ import annotations

import io
import posixpath
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from wds_tools.dataset.layout import REJECTS
from wds_tools.errors import FormatError, NotFound, Reject, StorageError, UsageError
from wds_tools.format.typed_json import read_json, shape
from wds_tools.sources.arrow import load_pyarrow
from wds_tools.sources.record import InputFile, Record, file_records
from wds_tools.sources.text.lines import LineRange, plan_lines, read_lines
from wds_tools.sources.text.objects import fields_of
from wds_tools.storage import Store, join, open_store, split_url

ARROW, JSONL, PARQUET = ".arrow", ".jsonl", ".parquet"
_READING = "reading Hugging Face datasets"
_STATE, _SPLITS = "state.json", "dataset_dict.json"
_NOT_SAVED = "is not what save_to_disk writes"
_BATCH_ROWS = 1000
_END_OF_STREAM = b"\xff\xff\xff\xff\0\0\0\0"
_PARQUET_MAGIC = b"PAR1"
_LEAST_PARQUET_BYTES = 200
"""Any Parquet file with these columns is larger; what is smaller is looked into."""


@dataclass(frozen=True)
class _Splits:
    splits: tuple[str, ...]


@dataclass(frozen=True)
class _File:
    filename: str


NumberedFields = tuple[int, dict[str, Any], int]
"""Number in its file from 1, fields, and bytes read, of a table row."""


def data_files(url: str, sizes: Mapping[str, int]) -> Sequence[str]:
    """The files of a folder that are inputs: jsonl and Parquet files, and the Arrow files that its state.json names. See Choice.

    Raises:
        UsageError: a folder has several splits, or a dataset whose rows are reordered by an indices file.
        NotFound: there are none, or one that is named is missing.
        FormatError: a state.json is none.
    """
    for name in sizes:
        if posixpath.basename(name) == _SPLITS:
            splits = read_json(_Splits, open_store(url).read(name), f"{join(url, name)} {_NOT_SAVED}").splits
            folder = join(url, posixpath.dirname(name)).rstrip("/")
            example = f"{folder}/{(*splits, 'SPLIT')[0]}"
            raise UsageError(f"{folder} holds the splits {', '.join(splits)}: name those that you want, as {example}")
    names = [name for name in sizes if name.endswith((JSONL, PARQUET)) and REJECTS not in name]
    for name in sizes:
        if posixpath.basename(name) == _STATE:
            names += _data_files(url, name)
    if not names:
        what = (
            "an unfinished save_to_disk: there is no state.json"
            if any(name.endswith(ARROW) for name in sizes)
            else "no .jsonl and no .parquet"
        )
        raise NotFound(f"{url}: no folder of save_to_disk and {what}")
    for name in names:
        if name not in sizes:
            raise NotFound(f"{join(url, name)} is missing, though its {_STATE} names it: copy the folder again")
    return names


@dataclass(frozen=True)
class Tables:
    """Source of what Hugging Face datasets leaves on a disk; a task is a file, or a range of lines of a jsonl."""

    task_lines: int
    quiet: bool
    choose = staticmethod(data_files)

    def plan(self, files: Sequence[InputFile]) -> tuple[Sequence[Any], int]:
        """Files, then ranges of lines; and bytes over all of them. Raises as check_files, load_pyarrow and plan_lines."""
        check_files(files)
        tables = [file for file in files if not file.url.endswith(JSONL)]
        if tables:
            load_pyarrow(_READING)
        lines = [file for file in files if file.url.endswith(JSONL)]
        ranges = plan_lines(lines, self.task_lines, quiet=self.quiet)
        total = sum(file.size for file in tables) + sum(span.end - span.start for span in ranges)
        return [*map(tuple, tables), *ranges], total

    def read(self, task: LineRange | tuple[str, int]) -> Iterator[Record[Mapping[str, Any]]]:
        """The records of a file, or of a range."""
        if isinstance(task, LineRange):
            lines = read_lines(task)
            return file_records(task.url, ((line.number, fields_of(line), len(line.data or b"") + 1) for line in lines))
        return file_records(task[0], table_rows(InputFile(*task)))


def table_rows(file: InputFile) -> Iterator[NumberedFields]:
    """The rows of an Arrow or Parquet file.

    Raises:
        Reject: behind the last row that can be read: "truncated_arrow", "corrupt_arrow" or "corrupt_parquet".
    """
    yield from (_parquet_rows if file.url.endswith(PARQUET) else _arrow_rows)(*file)


def check_files(files: Sequence[InputFile]) -> None:
    """Refuse what is not a table.

    Raises:
        UsageError: one that was named is none of these.
        FormatError: a Parquet file is the note that stands in the last one's place while an export runs.
    """
    for url, size in files:
        if not url.endswith((JSONL, ARROW, PARQUET)):
            raise UsageError(f"{url}: expected a folder of save_to_disk, or {JSONL}, {ARROW} or {PARQUET} files")
        if url.endswith(PARQUET) and size < _LEAST_PARQUET_BYTES:
            root, name = split_url(url)
            if bytes(open_store(root).read(name))[:4] != _PARQUET_MAGIC:
                raise FormatError(
                    f"{url} is no Parquet file but {size} bytes of something else: an unfinished export: finish it first"
                )


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
