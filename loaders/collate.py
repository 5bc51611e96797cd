"""Rows in memory -> columns of a batch, all rows at a time.

The JSON of all rows is joined and parsed in one call, and so are the codes, since per-sample calls are what makes a loader slow.
A batch is a dict of columns: lists, and tensors where shapes agree. Between processes its codes travel as one flat tensor,
whatever their shapes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import orjson
import torch
from numpy.typing import NDArray

from loaders.read import LoadedRows
from wds_tools.errors import FormatError
from wds_tools.format.checksum import crc32
from wds_tools.format.index import ABSENT
from wds_tools.format.schema import IMAGE_EXTENSIONS
from wds_tools.format.shard import parse_npy
from wds_tools.format.tar import BLOCK, TarReader

Batch = dict[str, Any]
Sample = dict[str, Any]
_NAME_BYTES = 100
_CACHE_BYTES = 256 << 10
_PLAIN_FIELDS = 5
"""data_type, text, length, width, height."""


class Codes(NamedTuple):
    """Code grids of several rows, end to end."""

    flat: torch.Tensor
    """(sum of h * w,) uint16 or uint32, as stored: what travels between processes is half of int32."""
    shapes: list[tuple[int, int] | None] | tuple[int, int]
    """(h, w) of each row, None for a row without codes; one (h, w) if it is that of all."""

    def unpack(self) -> torch.Tensor | list[torch.Tensor | None]:
        """(B, h, w) int32 if every row has the same grid, else a list of (h, w), None for a row without codes."""
        flat = torch.from_numpy(self.flat.numpy().astype(np.int32))  # torch would wake its threads for it
        if isinstance(self.shapes, tuple):
            return flat.view(-1, *self.shapes)
        sizes = [shape[0] * shape[1] if shape else 0 for shape in self.shapes]
        parts = torch.split(flat, sizes)
        return [part.view(shape) if shape else None for part, shape in zip(parts, self.shapes, strict=True)]

    def arrays(self) -> list[NDArray[np.unsignedinteger[Any]] | None]:
        """The grids one by one, as stored."""
        flat = self.flat.numpy()
        if isinstance(self.shapes, tuple):
            return list(flat.reshape(-1, *self.shapes))
        bounds = np.cumsum([0, *(shape[0] * shape[1] if shape else 0 for shape in self.shapes)]).tolist()
        return [
            flat[begin:end].reshape(shape) if shape else None
            for shape, begin, end in zip(self.shapes, bounds, bounds[1:], strict=False)
        ]


class Columns(NamedTuple):
    """A batch as columns."""

    lists: dict[str, list[Any]]
    """Name -> a value of each row. With our schema `__key__`, `data_type`, `text`, and, of sources that have any, `conversations`
    and `image` (encoded bytes); without it `__key__` and the members' bytes by suffix. None where a row has none."""
    codes: Codes | None
    """None if no row has codes."""
    tensors: dict[str, torch.Tensor] = {}  # noqa: RUF012
    """Of token rows: see docs/training.md."""


def check_crc(rows: Sequence[LoadedRows], numbers: Sequence[int]) -> None:
    """Raise FormatError for the first of these rows whose bytes are not those of the index."""
    for held, row in zip(rows, numbers, strict=True):
        number = row - held.first
        start, end = held.start[number], held.end[number]
        if crc32(held.data[start:end]) != held.index.crc32[number]:
            raise FormatError(f"{held.where(row)} is damaged: its bytes have another CRC-32 than the index says")


def read_columns(rows: Sequence[LoadedRows], numbers: Sequence[int]) -> Columns:
    """Parse rows of sources that all follow our schema, or all do not.

    Args:
        rows: what holds each row.
        numbers: the row in its shard.

    Raises:
        FormatError, or what a parser raises: one of them can't be read.
    """
    if not rows:
        return Columns({"__key__": [], "data_type": [], "text": []}, None)
    if not rows[0].reader.has_schema:
        samples = [read_members(held, row) for held, row in zip(rows, numbers, strict=True)]
        names = dict.fromkeys(name for sample in samples for name in sample)
        return Columns({name: [sample.get(name) for sample in samples] for name in names}, None)
    readers = {held.reader for held in rows}
    keys, records, codes = read_records(rows, numbers)
    lists: dict[str, list[Any]] = {
        "__key__": keys,
        "data_type": [record["data_type"] for record in records],
        "text": [record["text"] for record in records],
    }
    if any(reader.has_conversations for reader in readers):
        lists["conversations"] = [record.get("conversations") for record in records]
    if any(reader.has_images for reader in readers):
        lists["image"] = [_image(held, row) for held, row in zip(rows, numbers, strict=True)]
    return Columns(lists, codes)


def read_samples(rows: Sequence[LoadedRows], numbers: Sequence[int]) -> list[Sample]:
    """The same rows as samples: dicts with `__key__`, `__url__` and the fields that each has. See ShardDataset."""
    if not rows:
        return []
    if not rows[0].reader.has_schema:
        return [read_members(held, row) | {"__url__": held.url} for held, row in zip(rows, numbers, strict=True)]
    keys, records, codes = read_records(rows, numbers)
    samples = []
    for held, row, key, record in zip(rows, numbers, keys, records, strict=True):
        sample: Sample = {"__key__": key, "__url__": held.url, "data_type": record["data_type"], "text": record["text"]}
        if len(record) > _PLAIN_FIELDS or record["width"] is not None or record["height"] is not None:
            extra = {name: value for name, value in record.items() if name not in ("data_type", "text", "length")}
            sample.update((name, value) for name, value in extra.items() if value is not None)
        if held.reader.has_images and (image := _image(held, row)) is not None:
            sample["image"] = image
        samples.append(sample)
    if codes is not None:
        for sample, grid_hw in zip(samples, codes.unpack(), strict=True):
            if grid_hw is not None:
                sample["codes"] = grid_hw
    return samples


def read_records(rows: Sequence[LoadedRows], numbers: Sequence[int]) -> tuple[list[str], list[dict[str, Any]], Codes | None]:
    """The keys, the parsed json, and the codes of rows that follow our schema. Raises as read_columns."""
    places = [(held, row - held.first) for held, row in zip(rows, numbers, strict=True)]
    headers = [held.data[held.json[n] - BLOCK : held.json[n] - BLOCK + _NAME_BYTES] for held, n in places]
    json = [held.data[held.json[n] : held.json_end[n]] for held, n in places]
    codes = [held.data[held.codes[n] : held.codes_end[n]] for held, n in places]
    records: list[dict[str, Any]] = []
    for own in _in_cache(json):
        records += orjson.loads(b"[%b]" % b",".join(own))
    if len(records) != len(rows):
        raise FormatError("a json member is not one object")
    return _keys(headers), records, _codes(codes)


def _image(held: LoadedRows, row: int) -> bytes | None:
    """The encoded image of a row, if it has one."""
    number = row - held.first
    for column, suffix in enumerate(held.index.members):
        length = int(held.index.lengths[number, column])
        if suffix in IMAGE_EXTENSIONS and length != ABSENT:
            at = held.start[number] + int(held.index.offsets[number, column])
            return bytes(held.data[at : at + length])
    return None


def read_members(held: LoadedRows, row: int) -> dict[str, Any]:
    """A row of a source without our schema: `__key__` and, by suffix, the members' bytes."""
    number = row - held.first
    index = held.index
    start = held.start[number]
    sample: dict[str, Any] = {"__key__": ""}
    for column, suffix in enumerate(index.members):
        length = int(index.lengths[number, column])
        if length == ABSENT:
            continue
        at = start + int(index.offsets[number, column])
        if not sample["__key__"]:
            sample["__key__"] = _member_name(held, row, at).removesuffix(f".{suffix}")
        sample[suffix] = bytes(held.data[at : at + length])
    return sample


def _in_cache(members: Sequence[memoryview]) -> Iterator[Sequence[memoryview]]:
    """The members in runs that are joined without leaving the processor's cache."""
    size = max(_CACHE_BYTES * len(members) // max(sum(map(len, members)), 1), 1)
    for start in range(0, len(members), size):
        yield members[start : start + size]


def _keys(headers: Sequence[memoryview]) -> list[str]:
    """The keys in tar headers of json members: up to the first dot. Our schema's keys are ASCII without dots."""
    joined = b"".join(headers)
    names = np.frombuffer(joined, np.uint8).reshape(len(headers), _NAME_BYTES)
    ends = (names == ord(".")).argmax(1)
    if not ends.all():  # "./KEY.json", as `tar c .` writes
        return [bytes(header).removeprefix(b"./").partition(b".")[0].decode("ascii", "replace") for header in headers]
    text = joined.decode("latin-1")
    starts = range(0, len(joined), _NAME_BYTES)
    return [text[start : start + end] for start, end in zip(starts, ends.tolist(), strict=True)]


def _codes(members: Sequence[memoryview]) -> Codes | None:
    lengths = set(map(len, members))
    if lengths == {0}:
        return None
    if len(lengths) == 1:
        first = parse_npy(members[0], "codes")
        skip = len(members[0]) - first.nbytes
        head = np.frombuffer(members[0], np.uint8, skip)
        grids_BM = np.empty((len(members), first.nbytes), np.uint8)
        done, same = 0, first.ndim == 2
        for own in _in_cache(members):
            raw_BM = np.frombuffer(b"".join(own), np.uint8).reshape(len(own), -1)
            same = same and bool((raw_BM[:, :skip] == head).all())
            grids_BM[done : done + len(own)] = raw_BM[:, skip:]
            done += len(own)
        if same:
            return Codes(_tensor(grids_BM.reshape(-1).view(first.dtype)), (first.shape[0], first.shape[1]))
    grids_hw = [parse_npy(member, "codes") if len(member) else None for member in members]
    if any(grid is not None and grid.ndim != 2 for grid in grids_hw):
        raise FormatError("codes are not a 2-D grid")
    flat = np.concatenate([grid.reshape(-1) for grid in grids_hw if grid is not None])
    shapes = [(grid.shape[0], grid.shape[1]) if grid is not None else None for grid in grids_hw]
    return Codes(_tensor(flat), shapes[0] if shapes[0] and len(set(shapes)) == 1 else shapes)


def _tensor(flat: NDArray[Any]) -> torch.Tensor:
    if flat.dtype.itemsize > 2 and flat.size and int(flat.max()) >= 1 << 31:
        raise FormatError(f"the code {int(flat.max())} does not fit the int32 of a batch")
    return torch.from_numpy(flat if flat.dtype.itemsize > 1 else flat.astype(np.uint16))


def _member_name(held: LoadedRows, row: int, at: int) -> str:
    """The full name of the member whose payload begins at `at`."""
    start = held.start[row - held.first]
    if at - start > BLOCK:  # a pax or long-name header stands before it
        blocks = bytes(held.data[start:at])
        if b"path=" in blocks or blocks[156:157] == b"L":
            members = TarReader(held.where(row)).feed(bytes(held.data[start : held.end[row - held.first]]))
            return members[0].name.removeprefix("./")
    header = bytes(held.data[at - BLOCK : at])
    name = header[:_NAME_BYTES].split(b"\0", 1)[0]
    if header[257:263] == b"ustar\0" and header[345]:
        name = header[345:500].split(b"\0", 1)[0] + b"/" + name
    return name.decode("utf-8", "replace").removeprefix("./")
