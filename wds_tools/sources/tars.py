"""WebDataset tars -> records: img2dataset's and any other, plain or compressed, read once from start to end.

    chunks -> TarReader -> members -> those that lie side by side and have one key -> {suffix: value}

What is no part of a sample (links, hidden files such as macOS's ._a.jpg, files without a suffix) is passed over, and counted.
Where a tar was cut or is damaged, what follows is one reject, with the sample that was not at its end yet.
Memory: one sample, which has MAX_SAMPLE_BYTES at most, and one chunk.
"""

from __future__ import annotations

import posixpath
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from wds_tools.errors import FormatError, Reject
from wds_tools.format.shard import cut_name
from wds_tools.format.tar import BLOCK, Member, TarReader
from wds_tools.sources.containers import Unit
from wds_tools.sources.record import InputFile, Record
from wds_tools.sources.text.compression import read_pieces
from wds_tools.sources.text.objects import Line, parse_record
from wds_tools.storage import open_store, split_url

MAX_SAMPLE_BYTES = 64 << 20
_TEXT_SUFFIXES = frozenset(("txt", "text", "caption", "transcript", "cls", "cls2", "count", "index", "inx", "id"))
"""Suffixes that webdataset decodes as text or numbers, and `caption`."""


@dataclass(frozen=True)
class Tars:
    """Container of WebDataset tars; a unit is a tar. A record's key is that of its sample in the tar."""

    compression: str = ""
    """"gz", "zst" or none."""

    def units(self, files: Sequence[InputFile]) -> Iterator[Unit]:
        """See Container."""
        return (Unit(file.url, file.size) for file in files)

    def read(self, unit: Unit) -> Iterator[Record[Mapping[str, Any]]]:
        """See Container."""
        root, name = split_url(unit.url)
        reader = TarReader(posixpath.basename(unit.url), max_member_bytes=MAX_SAMPLE_BYTES, lenient=True)
        records = _Records(unit.url, reader)
        damage: Reject | None = None
        try:
            for data, records.read_bytes in read_pieces(lambda: open_store(root).open(name), self.compression):
                for member in reader.feed(data):
                    yield from records.add(member)
            reader.feed(b"")  # damage behind the last member is said now
        except FormatError as error:
            damage = Reject("corrupt_tar", str(error))
        except Reject as cause:
            damage = cause
        if damage is None:
            try:
                reader.close()
            except FormatError as error:
                damage = Reject("corrupt_tar" if reader.at_end else "truncated_tar", str(error))
        yield from records.end(damage)


class _Records:
    """Members in, records out, one sample later."""

    def __init__(self, url: str, reader: TarReader) -> None:
        self._url, self._reader = url, reader
        self._key: str | None = None
        """Of the sample whose members these are."""
        self._members: dict[str, bytes] = {}
        self._num_bytes = 0
        self._fault: Reject | None = None
        self._number = 0
        self._num_stray = 0
        self._linked: set[str] = set()
        self._told_bytes = self._told_strays = 0
        self.read_bytes = 0
        """Of the file, so far."""

    def add(self, member: Member) -> Iterator[Record[Mapping[str, Any]]]:
        """Take the next member; gives the sample before it, if this one is of another. Of a sample too large nothing is kept."""
        key, suffix = cut_name(member.name)
        if not (key and suffix):
            self._num_stray += 1
            return
        if key != self._key:
            yield from self._flush()
            self._key, self._members, self._num_bytes, self._fault = key, {}, 0, None
        suffix = suffix.lower()
        self._num_bytes += BLOCK + len(member.payload) + member.num_dropped
        if suffix in self._members:
            self._fault = Reject("duplicate_member", f"two members with the suffix {suffix}: {member.name[:300]}")
        elif self._num_bytes > MAX_SAMPLE_BYTES:
            self._fault = Reject("sample_too_large", f"more than {MAX_SAMPLE_BYTES} bytes with {member.name[:300]}")
            self._members.clear()
        if self._fault is None:
            self._members[suffix] = bytes(member.payload)

    def end(self, damage: Reject | None) -> Iterator[Record[Mapping[str, Any]]]:
        """The last sample, and what is wrong behind it."""
        if damage is None or self._reader.at_end:
            yield from self._flush()
        if damage is None and self._number == 0 and self._num_stray + self._reader.num_passed_over:
            damage = Reject("no_samples", "none of its members is named KEY.SUFFIX")
        if damage is not None:
            yield self._record(damage)

    def _flush(self) -> Iterator[Record[Mapping[str, Any]]]:
        self._linked.update(cut_name(name)[0] for name in self._reader.links)
        self._reader.links.clear()
        if self._key in self._linked:  # it lacks what the link stands for
            self._fault = Reject("link_member", "a member of it is a link, whose file is not looked for in the tar")
        if self._key is not None:
            yield self._record(self._fault or sample_fields(self._members))
            self._key = None

    def _record(self, fields: Mapping[str, Any] | Reject) -> Record[Mapping[str, Any]]:
        strays = self._num_stray + self._reader.num_passed_over
        num_units, num_passed_over = self.read_bytes - self._told_bytes, strays - self._told_strays
        self._told_bytes, self._told_strays = self.read_bytes, strays
        self._number += 1
        return Record(self._number - 1, fields, self._url, key=self._key, num_units=num_units, num_passed_over=num_passed_over)


def sample_fields(members: Mapping[str, Any]) -> dict[str, Any] | Reject:
    """Text, parsed JSON and bytes of a sample's members; and the fields of `json`, where no member has that name.

    Args:
        members: lower-cased suffix -> bytes; other values stay as they are.
    """
    try:
        fields = {suffix: _value(suffix, value) if isinstance(value, bytes) else value for suffix, value in members.items()}
    except Reject as cause:
        return cause
    record = fields.get("json")
    return {**record, **fields} if record else fields


def _value(suffix: str, payload: bytes) -> Any:
    kind = suffix.rpartition(".")[2]
    if kind == "json":
        try:
            return parse_record(Line(1, payload))
        except Reject as cause:
            raise Reject(cause.reason, f"{suffix}: {cause.detail}") from cause
    if kind not in _TEXT_SUFFIXES:
        return payload
    try:
        return payload.decode().removesuffix("\n").removesuffix("\r")  # an editor's; it is no part of a caption
    except UnicodeDecodeError as error:
        raise Reject("invalid_utf8", f"{suffix}: byte {error.start} is {payload[error.start]:#04x}: {error.reason}") from error
