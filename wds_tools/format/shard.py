"""A shard: samples <-> the members of one tar. Sans-I/O; the caller moves the bytes.

Writing: `ShardBuilder.add(sample)` gives the bytes of a sample, `finish()` those after the last, the index and the
manifest row. A sample's members lie side by side, json first:

    KEY.json   KEY.vqcode_512.npy | KEY.vqcode_multi768.npy   KEY.jpg | .png | ...   KEY.1.jpg   KEY.2.png   ...

Reading: `group_samples` turns members into (key, members), `sample_from_members` turns those into a Sample.
Nothing is ever unpickled: npy members are parsed here and object arrays are refused.
Cost: one CRC-32 and one XXH3-128 over the bytes; memory is one sample and the index's columns.
"""

from __future__ import annotations

import io
import math
import re
from collections import Counter
from collections.abc import Hashable, Iterable, Iterator, Mapping
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import orjson
from numpy.typing import NDArray

from wds_tools.errors import FormatError
from wds_tools.format.checksum import content_hash, crc32
from wds_tools.format.codes import NO_LAYOUTS, CodeGrid
from wds_tools.format.index import IndexBuilder, ShardIndex
from wds_tools.format.schema import (
    IMAGE_EXTENSIONS,
    JSON_FIELDS,
    MARKED_TYPES,
    Sample,
    SourceImage,
    image_fields,
    is_reserved,
    validate,
)
from wds_tools.format.shards import ShardInfo
from wds_tools.format.tar import BLOCK, END, Member, header, padding

_PIXELS = {int, type(None)}
_IMAGE_SUFFIX = re.compile(rf"(?:([1-9]\d{{0,5}})\.)?(?:{'|'.join(IMAGE_EXTENSIONS)})", re.ASCII)
_RARE_FIELDS = {"conversations", "grids", "texts"}
NPY = b"\x93NUMPY"
"""How any npy file begins."""
_NPY_1 = NPY + b"\x01\x00"
_NPY_BEGIN = {_NPY_1: 10, NPY + b"\x02\x00": 12, NPY + b"\x03\x00": 12}
_MAX_NPY_HEADER_BYTES = 4096
_USUAL_NPY_BEGIN = 128
"""Where numpy lets the data of an array with few dimensions begin."""
_NPY_HEADER = re.compile(
    rb"\{(?=.*'descr': *'([^']*)')(?=.*'fortran_order': *(True|False))"
    rb"(?=.*'shape': *\(((?:\d{1,18}, *){0,31}\d{0,18})\) *[,}]).*\} *\n?"
)
"""Keys in any order; (descr, fortran_order, shape). Matched, never evaluated: a header may be anything."""
IDS, OF_OTHERS, IN_COLUMNS = "unsigned integers", "integers", "unsigned integers or floats"
_UNSIGNED = ("|u1", "<u2", "<u4", "<u8")
_NPY_DTYPES = {IDS: _UNSIGNED, OF_OTHERS: (*_UNSIGNED, "|i1", "<i2", "<i4", "<i8"), IN_COLUMNS: (*_UNSIGNED, "<f2", "<f4")}
"""What an npy file may hold, in words -> the types: ids of tokens, codes in files of others, what our code columns may have."""


class StoredSample(NamedTuple):
    """The members of one sample as they lie in a tar."""

    key: str
    members: dict[str, Member]
    """Suffix (without the leading dot) -> member, in file order."""

    @property
    def payloads(self) -> dict[str, memoryview]:
        """Suffix -> payload, as sample_from_members takes them."""
        return {suffix: member.payload for suffix, member in self.members.items()}

    @property
    def start(self) -> int:
        """Offset of the sample's first byte in the tar."""
        return min(member.start for member in self.members.values())

    @property
    def end(self) -> int:
        """Offset after the sample's last byte."""
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
    if sample.grids is not None:
        record["grids"] = sample.grids
    if sample.texts is not None:
        record["texts"] = sample.texts
    record.update(sample.provenance)
    try:
        members = [("json", orjson.dumps(record))]
    except (TypeError, UnicodeEncodeError) as error:
        raise FormatError(f"{sample.key}: can't be written as JSON: {error}") from error
    for column, grid_hw in sample.codes.items():
        members.append((f"{column}.npy", npy_bytes(grid_hw)))
    for number, image in enumerate(sample.images) if sample.image is not None else ():
        members.append((f"{number}.{image.extension}" if number else image.extension, image.data))
    return members


def image_number(suffix: str) -> int | None:
    """Which image of its sample a member is: 0 for "jpg", 1 for "1.jpg"; None if it is no image."""
    match = _IMAGE_SUFFIX.fullmatch(suffix)
    return int(match[1] or 0) if match else None


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
    images: list[SourceImage] = []
    for suffix, data in members.items():
        if suffix.endswith(".npy"):
            codes[suffix[:-4]] = parse_npy(data, f"{key}.{suffix}", IN_COLUMNS)
        elif image_number(suffix) == len(images):
            images.append(SourceImage(bytes(data), suffix.rpartition(".")[2]))
        elif suffix != "json":
            raise FormatError(f"{key}.{suffix}: not a member of this schema; see docs/format.md")
    return Sample(
        key=key,
        data_type=data_type,
        text=text,
        width=width,
        height=height,
        codes=codes,
        **image_fields(images),
        conversations=record.get("conversations"),
        grids=record.get("grids"),
        texts=record.get("texts"),
        provenance={name: value for name, value in record.items() if name not in JSON_FIELDS},
    )


def form_of(members: Mapping[str, bytes | memoryview]) -> tuple[Hashable, str] | None:
    """All that decides whether a sample is valid, but for its key; several times cheaper than to parse and validate it.

    Invariant: of two samples of equal form, sample_from_members and validate accept both or neither, if the keys are valid, and
    their numbers of codes are equal.

    Returns:
        The form and the text; None for what is rare or may be invalid: turns, texts, another npy version, a long npy header.
    """
    try:
        record = orjson.loads(members["json"])
        data_type, text, width, height = record["data_type"], record["text"], record["width"], record["height"]
    except (orjson.JSONDecodeError, KeyError, TypeError):
        return None
    if not (type(data_type) is type(text) is str and {type(width), type(height)} <= _PIXELS) or _RARE_FIELDS & record.keys():
        return None
    if data_type in MARKED_TYPES:  # what is valid depends on the text
        return None
    form: list[Hashable] = [data_type, width, height, len(record), *record]
    for suffix, payload in members.items():
        form.append(suffix)
        if suffix.endswith(".npy"):
            head = bytes(payload[:_USUAL_NPY_BEGIN])
            if len(head) < _USUAL_NPY_BEGIN or not head.startswith(_NPY_1) or head[8] + 256 * head[9] > _USUAL_NPY_BEGIN - 10:
                return None
            form += (head, len(payload))
    return tuple(form), text


class ShardBuilder:
    """Turns samples into the bytes of one tar, its index and its manifest row.

    Args:
        layouts: see `validate`.
    """

    def __init__(self, layouts: Mapping[str, CodeGrid] = NO_LAYOUTS) -> None:
        self._layouts = layouts
        self._hash = content_hash()
        self._index = IndexBuilder()
        self._data_types: Counter[str] = Counter()
        self.num_samples = 0
        self.num_bytes = 0
        """Bytes of the tar so far, without its end marker."""

    def add(self, sample: Sample) -> bytes:
        """Append a valid sample.

        Returns:
            Its bytes in the tar, to be written next.

        Raises:
            FormatError: the sample breaks the schema; nothing was appended.
        """
        validate(sample, self._layouts)
        return self.add_members(sample.key, encode_members(sample), sample)

    def add_members(self, key: str, payloads: Iterable[tuple[str, bytes | memoryview]], sample: Sample | None = None) -> bytes:
        """Append a sample of any members, (suffix, payload) each; returns its bytes in the tar.

        Args:
            key, payloads: what is written.
            sample: what they hold, if that is of this project's schema, and valid.
        """
        parts: list[bytes | memoryview] = []
        members: list[tuple[str, int, int]] = []
        offset = 0
        for suffix, payload in payloads:
            length = len(payload)
            pad = padding(length)
            parts += (header(f"{key}.{suffix}", length), payload, pad)
            members.append((suffix, offset + BLOCK, length))
            offset += BLOCK + length + len(pad)
        data = b"".join(parts)
        self._hash.update(data)
        facts = (sample.text_chars, sample.num_codes) if sample else (0, 0)
        self._index.add(self.num_bytes, offset, members, crc32(data), *facts)
        if sample:
            self._data_types[sample.data_type] += 1
        self.num_samples += 1
        self.num_bytes += offset
        return data

    def add_stored(self, data: bytes, index: ShardIndex, data_types: Iterable[str]) -> bytes:
        """Append samples as they lie in another tar, end to end.

        Args:
            data: their bytes; returned.
            index: theirs.
            data_types: of each; none where the schema is not this project's.
        """
        self._hash.update(data)
        self._index.extend(self.num_bytes, index)
        self._data_types.update(data_types)
        self.num_samples += len(index)
        self.num_bytes += len(data)
        return data

    def finish(self, name: str) -> tuple[bytes, ShardIndex, ShardInfo]:
        """The end marker to be written last, the index, and the row for the manifest, under this name."""
        self._hash.update(END)
        xxh128 = self._hash.hexdigest()
        tar_bytes = self.num_bytes + len(END)
        index = self._index.build(tar_bytes, xxh128)
        row = ShardInfo(
            name=name,
            samples=self.num_samples,
            bytes=tar_bytes,
            xxh128=xxh128,
            members=index.members,
            data_types=dict(sorted(self._data_types.items())),
            text_chars=int(index.text_chars.sum(dtype="u8")),
            num_codes=int(index.num_codes.sum(dtype="u8")),
        )
        return END, index, row


def group_samples(members: Iterable[Member], name: str = "tar") -> Iterator[StoredSample]:
    """Group adjacent members by key, as WebDataset does: the key ends at the first dot of the file's own name.

    Members that are no part of a sample (see is_stray) are passed over.

    Raises:
        FormatError: the same suffix twice in one sample, or a key that comes back after other samples.
    """
    key: str | None = None
    group: dict[str, Member] = {}
    seen: set[str] = set()
    for member in members:
        if is_stray(member.name):
            continue
        member_key, suffix = split_name(member.name, f"{name}, byte {member.start}")
        if member_key != key:
            if key is not None:
                yield StoredSample(key, group)
            if member_key in seen:
                raise FormatError(
                    f"{name}: {member.name!r} at byte {member.start} comes after other samples than the rest of {member_key!r}: "
                    "the members of a sample lie side by side, and keys are unique"
                )
            seen.add(member_key)
            key, group = member_key, {}
        if suffix in group:
            raise FormatError(f"{name}: {member.name!r} at byte {member.start} stands twice in one sample")
        group[suffix] = member
    if key is not None:
        yield StoredSample(key, group)


def is_stray(name: str) -> bool:
    """Whether a member is no part of a sample, by its name: hidden (.DS_Store, macOS's ._a.jpg), or no suffix (LICENSE)."""
    return not all(cut_name(name))


def cut_name(name: str) -> tuple[str, str]:
    """A member's name as (key, suffix), either of them empty if there is none; see split_name."""
    folder, slash, base = name.removeprefix("./").rpartition("/")
    stem, _, suffix = base.partition(".")
    return (folder + slash + stem if stem else ""), suffix


def split_name(name: str, where: str) -> tuple[str, str]:
    """A member's name as (key, suffix): "a/b.x.npy" is ("a/b", "x.npy"). The leading "./" of some tars is dropped.

    Raises:
        FormatError: there is no key or no suffix, or it would replace what loaders say of a sample; the message names `where`.
    """
    key, suffix = cut_name(name)
    if not (key and suffix):
        raise FormatError(f"{where}: {name!r} is not KEY.SUFFIX")
    if is_reserved(suffix):
        raise FormatError(f"{where}: {name!r} would replace the sample's own {suffix}: rename the member, or leave it out")
    return key, suffix


def npy_bytes(grid_hw: NDArray[Any]) -> bytes:
    """An array as a version 1.0 npy file, C order."""
    return _npy_header(grid_hw.dtype.str, grid_hw.shape) + grid_hw.tobytes()


def parse_npy(data: bytes | memoryview, name: str, takes: str = IDS) -> NDArray[Any]:
    """The array of an npy file, as a read-only view of `data`; C order, numbers only, never pickled objects.

    Args:
        data: the file.
        name: what a message calls it.
        takes: IDS, OF_OTHERS or IN_COLUMNS.

    Raises:
        FormatError: not an npy file of such little-endian numbers in C order, or its size does not match its header.
    """
    view = memoryview(data).toreadonly()
    begin = _NPY_BEGIN.get(bytes(view[:8]))
    if begin is None or len(view) < begin:
        raise FormatError(f"{name}: not an npy file")
    offset = begin + int.from_bytes(view[8:begin], "little")
    if offset - begin > _MAX_NPY_HEADER_BYTES:
        raise FormatError(f"{name}: an npy header of {offset - begin} bytes; at most {_MAX_NPY_HEADER_BYTES} are accepted")
    try:
        dtype, shape, expected = _parse_npy_header(bytes(view[begin:offset]), takes)
    except FormatError as error:
        raise FormatError(f"{name}: {error}") from None
    num_bytes = len(view) - offset
    if num_bytes != expected or (not expected and max(shape, default=0) > len(view)):
        raise FormatError(f"{name}: {max(num_bytes, 0)} bytes of data, its header {dtype.str} {shape} needs {expected}")
    return np.ndarray(shape, dtype, view, offset)


@lru_cache(maxsize=1024)
def _npy_header(dtype: str, shape: tuple[int, ...]) -> bytes:
    out = io.BytesIO()
    np.lib.format.write_array_header_1_0(out, {"descr": dtype, "fortran_order": False, "shape": shape})
    return out.getvalue()


@lru_cache(maxsize=1024)
def _parse_npy_header(head: bytes, takes: str) -> tuple[np.dtype[Any], tuple[int, ...], int]:
    """The dtype and the shape that it states, and the bytes that these take."""
    match = _NPY_HEADER.fullmatch(head)
    if match is None:
        raise FormatError(f"unreadable npy header {head[:80]!r}")
    descr, fortran_order, shape = (group.decode("latin-1") for group in match.groups())
    if descr not in _NPY_DTYPES[takes] or fortran_order != "False":
        raise FormatError(f"expected little-endian {takes} in C order, got {descr[:40]!r}, fortran_order={fortran_order}")
    dtype, sizes = np.dtype(descr), tuple(int(size) for size in shape.split(",") if size.strip())
    return dtype, sizes, math.prod(sizes) * dtype.itemsize
