"""Rows in memory -> columns of a batch, all rows at a time.

The JSON of all rows is joined and parsed in one call, and so are the codes, since per-sample calls are what makes a loader slow.
A batch is a dict of columns: lists, and tensors where shapes agree. Between processes its codes travel as one flat tensor,
whatever their shapes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import orjson
import torch
from numpy.typing import NDArray

from loaders.reading.source import LoadedRows
from wds_tools.errors import FormatError
from wds_tools.format.checksum import crc32
from wds_tools.format.codes import HW, Shape, split_grids
from wds_tools.format.index import ABSENT
from wds_tools.format.shard import image_number, parse_npy
from wds_tools.format.tar import BLOCK, TarReader
from wds_tools.sequences.rows import TokenBatch

Batch = dict[str, Any]
Sample = dict[str, Any]
NAME_BYTES = 100
_BEHIND_NAME = BLOCK - NAME_BYTES
_CACHE_BYTES = 256 << 10
_PLAIN_FIELDS = 5
"""data_type, text, length, width, height."""
_OTHERWISE_GIVEN = ("data_type", "text", "length", "grids")
Data = Sequence[memoryview]
"""The bytes of each row; see read.bytes_of."""


class Codes(NamedTuple):
    """Code grids of several rows, end to end."""

    flat: torch.Tensor
    """(sum of h * w,) uint16 or uint32, as stored: what travels between processes is half of int32."""
    shapes: list[Shape | list[Shape] | None] | Shape
    """(h, w) of each row, those of its images if it is a conversation, None for a row without codes; one (h, w) if it is that of
    all."""

    def unpack(self) -> torch.Tensor | list[Any]:
        """(B, h, w) int32 if every row has the same grid, else a list: (h, w), for a conversation a list of (h, w), one an image,
        for a row without codes None."""
        flat = torch.from_numpy(self.flat.numpy().astype(np.int32))  # torch would wake its threads for it
        if isinstance(self.shapes, tuple):
            return flat.view(-1, *self.shapes)
        sizes = [math.prod(shape) for row in self.shapes for shape in ([row] if isinstance(row, tuple) else row or ())]
        grids = iter(torch.split(flat, sizes))
        return [
            next(grids).view(row) if isinstance(row, tuple) else row and [next(grids).view(shape) for shape in row]
            for row in self.shapes
        ]

    def arrays(self) -> list[list[NDArray[np.unsignedinteger[Any]]]]:
        """The grids of each row, as stored: one, or one an image of a conversation; none for a row without codes."""
        flat = self.flat.numpy()
        if isinstance(self.shapes, tuple):
            return [[grid_hw] for grid_hw in flat.reshape(-1, *self.shapes)]
        rows = [[row] if isinstance(row, tuple) else row or [] for row in self.shapes]
        grids = iter(split_grids(flat, [shape for row in rows for shape in row]))
        return [[next(grids) for _ in row] for row in rows]


class TokenTensors(NamedTuple):
    """A TokenBatch that travels between processes."""

    numbers: torch.Tensor
    """See TokenBatch."""
    cu_seqlens: NDArray[np.int32] | None

    @classmethod
    def of(cls, batch: TokenBatch) -> TokenTensors:
        """The same memory."""
        return cls(torch.from_numpy(batch.numbers), batch.cu_seqlens)

    def unpack(self) -> dict[str, torch.Tensor]:
        """TokenBatch.arrays as tensors."""
        arrays = TokenBatch(self.numbers.numpy(), self.cu_seqlens).arrays()
        return {name: torch.from_numpy(array) for name, array in arrays.items()}


class Columns(NamedTuple):
    """A batch as columns."""

    lists: dict[str, list[Any]]
    """Name -> a value of each row. With our schema `__key__`, `data_type`, `text`, and, of sources that have any, `conversations`
    and `image` (encoded bytes, a list of them if it is a conversation); without it `__key__` and the members' bytes by suffix.
    None where a row has none."""
    codes: Codes | None
    """None if no row has codes."""
    tokens: TokenTensors | None = None
    """Of token rows: see docs/training.md."""


def check_crc(rows: Sequence[LoadedRows], numbers: Sequence[int], data: Data) -> None:
    """Raise FormatError for the first of these rows whose bytes are not those of the index."""
    for held, row, sample in zip(rows, numbers, data, strict=True):
        if crc32(sample) != held.index.crc32[row - held.first]:
            raise FormatError("it is damaged: its bytes have another CRC-32 than the index says")


def read_columns(rows: Sequence[LoadedRows], numbers: Sequence[int], data: Data) -> Columns:
    """Parse rows of sources that all follow our schema, or all do not.

    Args:
        rows: what holds each row; at least one.
        numbers: the row in its shard.
        data: its bytes.

    Raises:
        FormatError, or what a parser raises: one of them can't be read.
    """
    if not rows[0].reader.has_schema:
        samples = list(map(_members, rows, numbers, data))
        names = dict.fromkeys(name for sample in samples for name in sample)
        return Columns({name: [sample.get(name) for sample in samples] for name in names}, None)
    readers = {held.reader for held in rows}
    keys, records, codes = read_records(rows, numbers, data)
    lists: dict[str, list[Any]] = {
        "__key__": keys,
        "data_type": [record["data_type"] for record in records],
        "text": [record["text"] for record in records],
    }
    if any(reader.has_conversations for reader in readers):
        lists["conversations"] = [record.get("conversations") for record in records]
    if any(reader.has_images for reader in readers):
        lists["image"] = list(map(_image, rows, numbers, data, records))
    return Columns(lists, codes)


def read_samples(rows: Sequence[LoadedRows], numbers: Sequence[int], data: Data) -> list[Sample]:
    """The same rows as samples: dicts with `__key__`, `__url__` and the fields that each has. See ShardDataset."""
    if not rows[0].reader.has_schema:
        return [_members(held, row, own) | {"__url__": held.url} for held, row, own in zip(rows, numbers, data, strict=True)]
    keys, records, codes = read_records(rows, numbers, data)
    samples = []
    for held, row, own, key, record in zip(rows, numbers, data, keys, records, strict=True):
        sample: Sample = {"__key__": key, "__url__": held.url, "data_type": record["data_type"], "text": record["text"]}
        if len(record) > _PLAIN_FIELDS or record["width"] is not None or record["height"] is not None:
            extra = {name: value for name, value in record.items() if name not in _OTHERWISE_GIVEN}
            sample.update((name, value) for name, value in extra.items() if value is not None and name not in sample)
        if held.reader.has_images and (image := _image(held, row, own, record)) is not None:
            sample["image"] = image
        samples.append(sample)
    if codes is not None:
        for sample, grid_hw in zip(samples, codes.unpack(), strict=True):
            if grid_hw is not None:
                sample["codes"] = grid_hw
    return samples


def read_records(
    rows: Sequence[LoadedRows], numbers: Sequence[int], data: Data
) -> tuple[list[str], list[dict[str, Any]], Codes | None]:
    """The keys, the parsed json, and the codes of rows that follow our schema. Raises as read_columns."""
    headers: list[memoryview] = []
    json: list[memoryview] = []
    codes: list[memoryview] = []
    for held, row, sample in zip(rows, numbers, data, strict=True):
        number = row - held.first
        json_at, json_end, codes_at, codes_end = held.places
        at = json_at[number]
        headers.append(sample[at - BLOCK : at - _BEHIND_NAME])
        json.append(sample[at : json_end[number]])
        codes.append(sample[codes_at[number] : codes_end[number]])
    records: list[dict[str, Any]] = []
    for own in _in_cache(json):
        records += orjson.loads(b"[%b]" % b",".join(own))
    if len(records) != len(rows):
        raise FormatError("a json member is not one object")
    grids = [None] * len(rows)
    if any(reader.has_conversations for reader in {held.reader for held in rows}):
        grids = [_grids(held, row, record) for held, row, record in zip(rows, numbers, records, strict=True)]
    return read_keys(headers), records, _codes(codes, grids)


def _image(held: LoadedRows, row: int, data: memoryview, record: dict[str, Any]) -> bytes | list[bytes] | None:
    """The encoded image of a row, if it has one; of a conversation the list of its images."""
    images = {}
    for suffix, at, end in _payloads(held, row):
        number = image_number(suffix)
        if number is not None:
            images[number] = bytes(data[at:end])
    if record["data_type"] == "visual_sft":
        return [images[number] for number in sorted(images)] or None
    return images.get(0)


def _grids(held: LoadedRows, row: int, record: dict[str, Any]) -> Any:
    """The shape of each image's codes in a conversation, as its json says; None if the codes are one grid."""
    if record.get("grids") is None:
        return None
    column = next((suffix for suffix, _, _ in _payloads(held, row) if suffix in held.reader.code_members), "no codes")
    return record["grids"][column.removesuffix(".npy")] or []


def _payloads(held: LoadedRows, row: int) -> Iterator[tuple[str, int, int]]:
    """(suffix, begin, end in its bytes) of each payload of a row."""
    number = row - held.first
    offsets = held.index.offsets[number].tolist()
    for suffix, offset, length in zip(held.index.members, offsets, held.index.lengths[number].tolist(), strict=True):
        if length != ABSENT:
            yield suffix, offset, offset + length


def _members(held: LoadedRows, row: int, data: memoryview) -> dict[str, Any]:
    """A row of a source without our schema: `__key__` and, by suffix, the members' bytes."""
    sample: dict[str, Any] = {"__key__": ""}
    for suffix, at, end in _payloads(held, row):
        if not sample["__key__"]:
            sample["__key__"] = _member_name(held, row, data, at).removesuffix(f".{suffix}")
        sample[suffix] = bytes(data[at:end])
    return sample


def _in_cache(members: Data) -> Iterator[Data]:
    """The members in runs that are joined without leaving the processor's cache."""
    size = max(_CACHE_BYTES * len(members) // max(sum(map(len, members)), 1), 1)
    for start in range(0, len(members), size):
        yield members[start : start + size]


def read_keys(headers: Data) -> list[str]:
    """The keys in tar headers of json members: up to the first dot. Our schema's keys are ASCII without dots."""
    joined = b"".join(headers)
    names = np.frombuffer(joined, np.uint8).reshape(len(headers), NAME_BYTES)
    ends = (names == ord(".")).argmax(1)
    if not ends.all():  # "./KEY.json", as `tar c .` writes
        return [bytes(header).removeprefix(b"./").partition(b".")[0].decode("ascii", "replace") for header in headers]
    text = joined.decode("latin-1")
    starts = range(0, len(joined), NAME_BYTES)
    return [text[start : start + end] for start, end in zip(starts, ends.tolist(), strict=True)]


def _codes(members: Data, grids: Sequence[Any]) -> Codes | None:
    lengths = set(map(len, members))
    if lengths == {0}:
        return None
    stacked_BHW = stack_npy(members) if grids.count(None) == len(grids) else None
    if stacked_BHW is not None:
        (shape,) = HW.shapes_of("codes", stacked_BHW[0], None)
        return Codes(_tensor(stacked_BHW.reshape(-1)), shape)
    arrays = [parse_npy(member, "codes") if len(member) else None for member in members]
    shapes: list[Shape | list[Shape] | None] = []
    for array, of_images in zip(arrays, grids, strict=True):
        found = None if array is None else HW.shapes_of("codes", array, of_images)
        shapes.append(found if found is None or of_images is not None else found[0])
    flat = np.concatenate([array.reshape(-1) for array in arrays if array is not None])
    first = shapes[0]
    return Codes(_tensor(flat), first if isinstance(first, tuple) and shapes.count(first) == len(shapes) else shapes)


def stack_npy(members: Data) -> NDArray[Any] | None:
    """The arrays of npy members, side by side in a first dimension; None if they differ in type or shape."""
    if len(set(map(len, members))) > 1:
        return None
    first = parse_npy(members[0], "an npy member")
    skip = len(members[0]) - first.nbytes
    head = np.frombuffer(members[0], np.uint8, skip)
    stacked_BM = np.empty((len(members), first.nbytes), np.uint8)
    done, same = 0, True
    for own in _in_cache(members):
        raw_BM = np.frombuffer(b"".join(own), np.uint8).reshape(len(own), -1)
        same = same and bool((raw_BM[:, :skip] == head).all())
        stacked_BM[done : done + len(own)] = raw_BM[:, skip:]
        done += len(own)
    return stacked_BM.reshape(-1).view(first.dtype).reshape(len(members), *first.shape) if same else None


def _tensor(flat: NDArray[Any]) -> torch.Tensor:
    if flat.dtype.itemsize > 2 and flat.size and int(flat.max()) >= 1 << 31:
        raise FormatError(f"the code {int(flat.max())} does not fit the int32 of a batch")
    return torch.from_numpy(flat if flat.dtype.itemsize > 1 else flat.astype(np.uint16))


def _member_name(held: LoadedRows, row: int, data: memoryview, at: int) -> str:
    """The full name of the member whose payload begins at `at`."""
    if at > BLOCK:  # a pax or long-name header stands before it
        blocks = bytes(data[:at])
        if b"path=" in blocks or blocks[156:157] == b"L":
            members = TarReader(held.where(row)).feed(data)
            return members[0].name.removeprefix("./")
    header = bytes(data[at - BLOCK : at])
    name = header[:NAME_BYTES].split(b"\0", 1)[0]
    if header[257:263] == b"ustar\0" and header[345]:
        name = header[345:500].split(b"\0", 1)[0] + b"/" + name
    return name.decode("utf-8", "replace").removeprefix("./")
