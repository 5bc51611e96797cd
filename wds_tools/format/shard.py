"""A shard: samples <-> the members of one tar. Sans-I/O; the caller moves the bytes.

Writing: `ShardBuilder.add(sample)` per sample, `take()` for the bytes made so far, `finish()` for the rest, the index and the
manifest row. A sample's members lie side by side, json first:

    KEY.json   KEY.vqcode_512.npy | KEY.vqcode_multi768.npy   KEY.jpg | .png | ...

Reading: `group_samples` turns members into (key, members), `sample_from_members` turns those into a Sample.
Nothing is ever unpickled: npy members are parsed here and object arrays are refused.
Cost: one CRC-32 and one SHA-256 over the bytes; memory is what was added since the last `take()` plus the index's columns.
"""

from __future__ import annotations

import hashlib
import io
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import orjson
from numpy.typing import NDArray

from wds_tools.errors import FormatError
from wds_tools.format.index import IndexBuilder, ShardIndex
from wds_tools.format.manifest import ShardRow
from wds_tools.format.schema import IMAGE_EXTENSIONS, JSON_FIELDS, Sample, validate
from wds_tools.format.tar import BLOCK, END, Member, TarReader, header, padding

_NPY_MAGIC = b"\x93NUMPY"
_MAX_NPY_HEADER_BYTES = 4096


class StoredSample(NamedTuple):
    """The members of one sample as they lie in a tar."""

    key: str
    members: dict[str, Member]
    """Suffix (without the leading dot) -> member, in file order."""

    @property
    def start(self) -> int:
        """Offset of the sample's first byte in the tar."""
        return min(member.start for member in self.members.values())

    @property
    def end(self) -> int:
        """Offset behind the sample's last byte."""
        return max(member.end for member in self.members.values())


def encode_members(sample: Sample) -> list[tuple[str, bytes]]:
    """The (suffix, payload) members of a sample, json first.

    Raises:
        FormatError: the text can't be written as UTF-8, or the provenance not as JSON.
    """
    record: dict[str, Any] = {
        "data_type": sample.data_type,
        "text": sample.text,
        "length": sample.length,
        "width": sample.width,
        "height": sample.height,
    }
    if sample.conversations is not None:
        record["conversations"] = sample.conversations
    if sample.provenance:
        record.update(sample.provenance)
    try:
        members = [("json", orjson.dumps(record))]
    except (TypeError, UnicodeEncodeError) as error:
        raise FormatError(f"{sample.key}: can't be written as JSON: {error}") from error
    for column, grid_hw in sample.codes.items():
        members.append((f"{column}.npy", npy_bytes(grid_hw)))
    if sample.image is not None:
        members.append((str(sample.image_extension), sample.image))
    return members


def sample_from_members(key: str, members: Mapping[str, bytes | memoryview]) -> Sample:
    """The sample of a key, from its members' payloads (suffix -> bytes).

    Raises:
        FormatError: a member is missing, unknown or unreadable; names the key and the member. Values are checked by `validate`.
    """
    payload = members.get("json")
    if payload is None:
        raise FormatError(f"{key}: has no .json member, only {', '.join(sorted(members)) or 'nothing'}")
    try:
        record = orjson.loads(payload)
        data_type, text, width, height = record["data_type"], record["text"], record["width"], record["height"]
    except (orjson.JSONDecodeError, KeyError, TypeError) as error:
        raise FormatError(f"{key}.json: not a sample of this schema ({type(error).__name__}: {error})") from error
    codes: dict[str, NDArray[Any]] = {}
    image: bytes | None = None
    extension: str | None = None
    for suffix, data in members.items():
        if suffix.endswith(".npy"):
            codes[suffix[:-4]] = parse_npy(data, f"{key}.{suffix}")
        elif suffix in IMAGE_EXTENSIONS and image is None:
            image, extension = bytes(data), suffix
        elif suffix != "json":
            raise FormatError(f"{key}.{suffix}: not a member of this schema; see docs/format.md")
    return Sample(
        key=key,
        data_type=data_type,
        text=text,
        width=width,
        height=height,
        codes=codes,
        image=image,
        image_extension=extension,
        conversations=record.get("conversations"),
        provenance={name: value for name, value in record.items() if name not in JSON_FIELDS},
    )


class ShardBuilder:
    """Turns samples into the bytes of one tar, its index and its manifest row."""

    def __init__(self) -> None:
        self._pending: list[bytes] = []
        self._hash = hashlib.sha256()
        self._index = IndexBuilder()
        self._data_types: Counter[str] = Counter()
        self._totals = [0, 0]  # characters, codes
        self.num_samples = 0
        self.num_bytes = 0
        """Bytes of the tar so far, without its end marker."""
        self.pending_bytes = 0
        """Bytes that the next `take()` returns."""

    def add(self, sample: Sample) -> None:
        """Append a valid sample.

        Raises:
            FormatError: the sample breaks the schema; nothing was appended.
        """
        validate(sample)
        parts: list[bytes] = []
        members: list[tuple[str, int, int]] = []
        at = 0
        for suffix, payload in encode_members(sample):
            length = len(payload)
            pad = padding(length)
            parts += (header(f"{sample.key}.{suffix}", length), payload, pad)
            members.append((suffix, at + BLOCK, length))
            at += BLOCK + length + len(pad)
        blob = b"".join(parts)
        num_codes = sample.num_codes
        self._index.add(self.num_bytes, at, members, zlib.crc32(blob), len(sample.text), num_codes)
        self._pending.append(blob)
        self._data_types[sample.data_type] += 1
        self._totals[0] += len(sample.text)
        self._totals[1] += num_codes
        self.num_samples += 1
        self.num_bytes += at
        self.pending_bytes += at

    def take(self) -> bytes:
        """The tar bytes added since the last call."""
        data = b"".join(self._pending)
        self._pending.clear()
        self.pending_bytes = 0
        self._hash.update(data)
        return data

    def finish(self, name: str) -> tuple[bytes, ShardIndex, ShardRow]:
        """The last bytes of the tar, its index, and its row for the manifest, under this name."""
        data = self.take() + END
        self._hash.update(END)
        sha256 = self._hash.hexdigest()
        tar_bytes = self.num_bytes + len(END)
        index = self._index.build(tar_bytes, sha256)
        row = ShardRow(
            name=name,
            samples=self.num_samples,
            bytes=tar_bytes,
            sha256=sha256,
            members=index.members,
            data_types=dict(sorted(self._data_types.items())),
            text_chars=self._totals[0],
            num_codes=self._totals[1],
        )
        return data, index, row


def group_samples(members: Iterable[Member], name: str = "tar") -> Iterator[StoredSample]:
    """Group adjacent members by key, as WebDataset does: the key ends at the first dot of the file's own name.

    Raises:
        FormatError: a name without a key or suffix, or the same suffix twice in one sample.
    """
    key: str | None = None
    group: dict[str, Member] = {}
    for member in members:
        member_key, suffix = split_name(member.name, f"{name}, byte {member.start}")
        if member_key != key:
            if key is not None:
                yield StoredSample(key, group)
            key, group = member_key, {}
        if suffix in group:
            raise FormatError(f"{name}: {member.name!r} at byte {member.start} stands twice in one sample")
        group[suffix] = member
    if key is not None:
        yield StoredSample(key, group)


def read_samples(archive: bytes | memoryview, name: str = "tar") -> Iterator[StoredSample]:
    """The stored samples of a complete archive in memory.

    Raises:
        FormatError: see TarReader and group_samples.
    """
    reader = TarReader(name)
    members = reader.feed(archive)
    reader.close()
    yield from group_samples(members, name)


def split_name(name: str, where: str) -> tuple[str, str]:
    """A member's name as (key, suffix): "a/b.x.npy" is ("a/b", "x.npy"). The leading "./" of some tars is dropped.

    Raises:
        FormatError: there is no key or no suffix; the message names `where`.
    """
    folder, slash, base = name.removeprefix("./").rpartition("/")
    stem, dot, suffix = base.partition(".")
    if not stem or not dot or not suffix:
        raise FormatError(f"{where}: {name!r} is not KEY.SUFFIX")
    return folder + slash + stem, suffix


def npy_bytes(grid_hw: NDArray[Any]) -> bytes:
    """An array as a version 1.0 npy file, C order."""
    return _npy_header(grid_hw.dtype.str, grid_hw.shape) + grid_hw.tobytes()


def parse_npy(data: bytes | memoryview, name: str) -> NDArray[Any]:
    """The array of an npy file, as a read-only view of `data`; C order, numbers only, never pickled objects.

    Raises:
        FormatError: not an npy file of unsigned integers in C order, or its size does not match its header.
    """
    view = memoryview(data)
    if bytes(view[:6]) != _NPY_MAGIC or len(view) < 12:
        raise FormatError(f"{name}: not an npy file")
    wide = view[6] != 1
    begin = 12 if wide else 10
    length = int.from_bytes(view[8:begin], "little")
    if length > _MAX_NPY_HEADER_BYTES:
        raise FormatError(f"{name}: an npy header of {length} bytes; at most {_MAX_NPY_HEADER_BYTES} are accepted")
    dtype, shape = _parse_npy_header(bytes(view[: begin + length]), name)
    expected = int(np.prod(shape, dtype=object)) * dtype.itemsize
    if len(view) - begin - length != expected:
        raise FormatError(f"{name}: {len(view) - begin - length} bytes of data, its header {dtype.str} {shape} needs {expected}")
    return np.frombuffer(view, dtype, offset=begin + length).reshape(shape)


@lru_cache(maxsize=1024)
def _npy_header(dtype: str, shape: tuple[int, ...]) -> bytes:
    out = io.BytesIO()
    np.lib.format.write_array_header_1_0(out, {"descr": dtype, "fortran_order": False, "shape": shape})
    return out.getvalue()


@lru_cache(maxsize=1024)
def _parse_npy_header(head: bytes, name: str) -> tuple[np.dtype[Any], tuple[int, ...]]:
    stream = io.BytesIO(head)
    try:
        version = np.lib.format.read_magic(stream)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, fortran_order, dtype = read(stream, max_header_size=_MAX_NPY_HEADER_BYTES)
    except (ValueError, SyntaxError, TypeError) as error:
        raise FormatError(f"{name}: unreadable npy header: {error}") from error
    if fortran_order or dtype.kind != "u" or dtype.hasobject:
        raise FormatError(f"{name}: expected unsigned integers in C order, got {dtype}, fortran_order={fortran_order}")
    return dtype, shape
