"""Text files that are read whole, from start to end: compressed lines and lists, and CSV and TSV of any kind.

One that breaks off or is damaged gives the records before the damage, and one reject that says where it ends.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from wds_tools.errors import Reject, UsageError
from wds_tools.sources.containers import Unit
from wds_tools.sources.record import InputFile, Record, file_records
from wds_tools.sources.text.compression import read_pieces
from wds_tools.sources.text.delimited import read_rows
from wds_tools.sources.text.elements import split_elements
from wds_tools.sources.text.lines import number_lines
from wds_tools.sources.text.objects import fields_of
from wds_tools.storage import open_store, split_url

_SEPARATORS = {"csv": ",;\t|", "tsv": "\t"}


@dataclass(frozen=True)
class TextFiles:
    """Container of text files of one kind; a unit is a file."""

    kind: str
    """What is in it: "lines", "list", "csv" or "tsv"."""
    compression: str = ""
    """"gz", "zst" or none."""

    def units(self, files: Sequence[InputFile]) -> Iterator[Unit]:
        """See Container."""
        for file in files:
            if self.kind in _SEPARATORS:
                self._check_header(file)
            yield Unit(file.url, file.size)

    def read(self, unit: Unit) -> Iterator[Record[Mapping[str, Any]]]:
        """See Container."""
        records = file_records(unit.url, self._numbered(_Chunks(unit.url, self.compression)))
        return map(_as_element, records) if self.kind == "list" else records

    def _numbered(self, chunks: _Chunks) -> Iterator[tuple[int, Mapping[str, Any] | Reject, int]]:
        """From 1: number, fields, bytes of the file."""
        if self.kind in _SEPARATORS:
            rows = read_rows(chunks, _SEPARATORS[self.kind])
            return ((number, fields, chunks.take_new_bytes()) for number, fields in rows)
        is_list = self.kind == "list"
        lines = split_elements(chunks) if is_list else number_lines(chunks)
        return ((line.number + is_list, fields_of(line), chunks.take_new_bytes()) for line in lines)

    def _check_header(self, file: InputFile) -> None:
        try:
            next(self._numbered(_Chunks(file.url, self.compression)), None)
        except Reject as cause:
            if cause.reason == "bad_header":
                raise UsageError(f"{file.url}: {cause.detail}") from cause


def _as_element(record: Record[Any]) -> Record[Any]:
    return record._replace(line=None, element=(record.line or 1) - 1)


class _Chunks:
    """The text of a file in pieces; knows how much of the file has been read for it."""

    def __init__(self, url: str, compression: str) -> None:
        self._url, self._compression = url, compression
        self._read_bytes = self._taken_bytes = 0

    def __iter__(self) -> Iterator[bytes]:
        root, name = split_url(self._url)
        for data, read_bytes in read_pieces(lambda: open_store(root).open(name), self._compression):
            self._read_bytes = read_bytes
            if data:
                yield data

    def take_new_bytes(self) -> int:
        """Bytes of the file that have been read since this was asked last."""
        new = self._read_bytes - self._taken_bytes
        self._taken_bytes = self._read_bytes
        return new
