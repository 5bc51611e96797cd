"""Samples in memory -> columns of a batch, all samples at a time.

The JSON of all samples is joined and parsed in one call, and so are the codes, since per-sample calls are what makes a loader
slow. A batch is a dict of columns: lists, and tensors where shapes agree. Between processes its codes travel as one flat tensor,
whatever their shapes.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from operator import itemgetter
from typing import Any, NamedTuple

import numpy as np
import orjson
import torch
from numpy.typing import NDArray

from loaders.order.plan import Ints
from loaders.reading.source import LoadedSamples, SampleBytes
from wds_tools.errors import FormatError
from wds_tools.format.checksum import crc32
from wds_tools.format.codes import HW, CodeGrid, Shape, split_grids
from wds_tools.format.index import ABSENT
from wds_tools.format.schema import MARKED_TYPES, PAIR_TYPES, pair_fields
from wds_tools.format.shard import IDS, IN_COLUMNS, cut_name, image_number, parse_npy
from wds_tools.format.tar import BLOCK, first_name, header_name
from wds_tools.sequences.choices import Weights, check_texts, choose_text
from wds_tools.sequences.rows import TokenBatch

Batch = dict[str, Any]
Sample = dict[str, Any]
NAME_BYTES = 100
_AFTER_NAME_BYTES = BLOCK - NAME_BYTES
_CACHE_BYTES = 256 << 10
_LONG_JSON_BYTES = 1 << 10
"""Of a sample on average, from which one call each is cheaper than to join them first."""
_PLAIN_FIELDS = 5
"""data_type, text, length, width, height."""
_FIELDS_OF_COLUMNS = ("data_type", "text", "length", "grids")


class Codes(NamedTuple):
    """Code grids of several samples, end to end.

    >>> flat = torch.tensor([1, 2, 3, 4, 5, 6], dtype=torch.uint16)
    >>> Codes(flat, (1, 3)).to_tensors()  # two grids of one size
    tensor([[[1, 2, 3]],
    <BLANKLINE>
            [[4, 5, 6]]], dtype=torch.int32)
    >>> Codes(flat, [(2, 2), None, [(1, 1), (1, 1)]]).to_tensors()[1:]  # a sample without codes, and a conversation
    [None, [tensor([[5]], dtype=torch.int32), tensor([[6]], dtype=torch.int32)]]
    """

    flat: torch.Tensor
    """(number of codes,) as stored: uint16 or uint32, so that what travels between processes is half of int32; or floats."""
    shapes: list[Shape | list[Shape] | None] | Shape
    """(h, w), or the shape in another layout, of each sample, those of its images if it is a conversation or interleaved, None
    for a sample without codes; one shape if it is that of all."""

    def to_tensors(self) -> torch.Tensor | list[Any]:
        """(B, h, w) int32 if every sample has the same grid, else a list: (h, w), for a conversation a list of (h, w), one an
        image, for a sample without codes None. In another layout its shape in place of (h, w); floats stay as they are."""
        is_float = self.flat.is_floating_point()
        flat = self.flat if is_float else torch.from_numpy(self.flat.numpy().astype(np.int32))  # torch would wake its threads
        if isinstance(self.shapes, tuple):
            return flat.view(-1, *self.shapes)
        sizes = [math.prod(shape) for shapes in self.shapes for shape in _grids_of(shapes)]
        grids = iter(torch.split(flat, sizes))
        return [
            next(grids).view(shapes) if isinstance(shapes, tuple) else shapes and [next(grids).view(shape) for shape in shapes]
            for shapes in self.shapes
        ]

    def to_arrays(self) -> list[list[NDArray[np.unsignedinteger[Any]]]]:
        """The grids of each sample, as stored: one, or one an image of a conversation; none for a sample without codes."""
        flat = (self.flat.view(torch.uint16) if self.flat.dtype == torch.bfloat16 else self.flat).numpy()
        if isinstance(self.shapes, tuple):
            return [[grid_HW] for grid_HW in flat.reshape(-1, *self.shapes)]
        shapes = list(map(_grids_of, self.shapes))
        grids = iter(split_grids(flat, [shape for of_sample in shapes for shape in of_sample]))
        return [[next(grids) for _ in of_sample] for of_sample in shapes]


def _grids_of(shapes: Shape | list[Shape] | None) -> list[Shape]:
    return [shapes] if isinstance(shapes, tuple) else shapes or []


class TokenTensors(NamedTuple):
    """A TokenBatch that travels between processes."""

    numbers: torch.Tensor
    """(3, B, L) int64; see TokenBatch."""
    cu_seqlens: NDArray[np.int32] | None
    """Where the segments of packed rows begin; see TokenBatch."""

    @classmethod
    def of(cls, batch: TokenBatch) -> TokenTensors:
        """The same memory."""
        return cls(torch.from_numpy(batch.numbers), batch.cu_seqlens)

    def to_columns(self) -> dict[str, torch.Tensor]:
        """TokenBatch.arrays as tensors."""
        arrays = TokenBatch(self.numbers.numpy(), self.cu_seqlens).arrays()
        return {name: torch.from_numpy(array) for name, array in arrays.items()}


class Columns(NamedTuple):
    """A batch as columns."""

    lists: dict[str, list[Any]]
    """Name -> a value of each sample. With our schema `__key__`, `data_type`, `text`, and, of sources that have any,
    `conversations`, `texts` (captions by name) and `image` (encoded bytes, of a conversation a list); without it
    `__key__` and the members' bytes by suffix. None where a sample has none."""
    codes: Codes | None
    """The codes; None if no sample has any."""
    tokens: TokenTensors | None = None
    """Token rows, instead of samples: see docs/training.md."""
    made: Batch | None = None
    """What transform and collate made of the samples."""


def chosen_texts(
    weights: Sequence[Weights], seed: int, epochs: Ints, sources: Sequence[int], samples: Iterable[tuple[str, str, Any]]
) -> list[str]:
    """The text of each sample that Source(texts=...) chooses.

    Args:
        weights: of each source.
        seed: of the run.
        epochs: (B,) that the samples are in of their source.
        sources: number of the source of each.
        samples: (key, text, texts) of each.
    """
    return [
        choose_text(seed, epoch, *sample, weights[source])
        for epoch, source, sample in zip(epochs.tolist(), sources, samples, strict=True)
    ]


def check_crc(loaded: Sequence[LoadedSamples], sample_indices: Sequence[int], data: SampleBytes) -> None:
    """Raise FormatError for the first of these samples whose bytes are not those of the index."""
    for samples, sample_index, sample_data in zip(loaded, sample_indices, data.samples(), strict=True):
        if crc32(sample_data) != samples.index.crc32[sample_index - samples.first]:
            raise FormatError("it is damaged: its bytes have another CRC-32 than the index says")


def read_columns(loaded: Sequence[LoadedSamples], sample_indices: Sequence[int], data: SampleBytes) -> Columns:
    """Parse samples of sources that all follow our schema, or all do not.

    Args:
        loaded: what holds each sample; at least one.
        sample_indices: number of each sample in its shard.
        data: their bytes.

    Returns:
        A value of each sample in every column, in the order given.

    Raises:
        FormatError, or what a parser raises: one of them can't be read; Reject: it lacks a text that is chosen from.
    """
    if not loaded[0].reader.has_schema:
        members = list(map(_members, loaded, sample_indices, data.samples()))
        names = dict.fromkeys(name for sample in members for name in sample)
        return Columns({name: [sample.get(name) for sample in members] for name in names}, None)
    keys, records, codes = read_records(loaded, sample_indices, data)
    data_types, texts = map(list, zip(*map(itemgetter("data_type", "text"), records), strict=True))  # one look at each
    lists: dict[str, list[Any]] = {"__key__": keys, "data_type": data_types, "text": texts}
    if any("visual_sft" in reader.data_types for reader in data.readers):
        lists["conversations"] = [record.get("conversations") for record in records]
    if max(map(len, records)) > _PLAIN_FIELDS and any("texts" in record for record in records):
        lists["texts"] = [record.get("texts") for record in records]
    if any(reader.has_images for reader in data.readers):
        lists["image"] = list(map(_image, loaded, sample_indices, data.samples(), records))
    return Columns(lists, codes)


def read_samples(loaded: Sequence[LoadedSamples], sample_indices: Sequence[int], data: SampleBytes) -> list[Sample]:
    """The same samples as dicts with `__key__`, `__url__` and the fields that each has. See ShardDataset and read_columns."""
    if not loaded[0].reader.has_schema:
        members = map(_members, loaded, sample_indices, data.samples())
        return [sample | {"__url__": samples.url} for sample, samples in zip(members, loaded, strict=True)]
    keys, records, codes = read_records(loaded, sample_indices, data)
    result = []
    samples_data = data.samples()
    for samples, sample_index, sample_data, key, record in zip(loaded, sample_indices, samples_data, keys, records, strict=True):
        sample: Sample = {"__key__": key, "__url__": samples.url, "data_type": record["data_type"], "text": record["text"]}
        if len(record) > _PLAIN_FIELDS or record["width"] is not None or record["height"] is not None:
            extra = {name: value for name, value in record.items() if name not in _FIELDS_OF_COLUMNS}
            sample.update((name, value) for name, value in extra.items() if value is not None and name not in sample)
        if samples.reader.has_images and (image := _image(samples, sample_index, sample_data, record)) is not None:
            sample["image"] = image
        result.append(sample)
    if codes is not None:
        for sample, grid_HW in zip(result, codes.to_tensors(), strict=True):
            if grid_HW is not None:
                sample["codes"] = grid_HW
    return result


def read_records(
    loaded: Sequence[LoadedSamples], sample_indices: Sequence[int], data: SampleBytes
) -> tuple[list[str], list[dict[str, Any]], Codes | None]:
    """The keys, the parsed json, and the codes of samples that follow our schema. Args and Raises as read_columns."""
    records = _parse_json(data.members(0))
    grids: list[Any] = []
    if any(not reader.data_types.isdisjoint(MARKED_TYPES) for reader in data.readers):
        grids = list(map(_grids, loaded, sample_indices, records))
    (layout, *others) = {reader.layout for reader in data.readers}
    layouts = [layout] if layout and not others else list(map(_layout, loaded, sample_indices))
    stacked = _codes(data.members(1), grids, layouts)
    if stacked is not None and any(reader.made for reader in data.readers):
        shapes = [stacked.shapes] * len(records) if isinstance(stacked.shapes, tuple) else stacked.shapes
        for samples, sample_index, record, shape in zip(loaded, sample_indices, records, shapes, strict=True):
            if samples.reader.made and isinstance(shape, tuple) and record["data_type"] in PAIR_TYPES:
                column = _code_column(samples, sample_index)
                record.update(pair_fields(column, shape, samples.reader.made.get(column, {}).get("stride")))
    header = data.spans[:, 2] - BLOCK
    keys = read_keys(data.cut(header, header + NAME_BYTES))
    if any(reader.opened.texts for reader in data.readers):
        for samples, key, record in zip(loaded, keys, records, strict=True):
            if weights := samples.reader.opened.texts:
                check_texts(key, record["data_type"], record.get("texts"), weights)
    return keys, records, stacked


def _parse_json(members: Sequence[memoryview]) -> list[dict[str, Any]]:
    """The object of each json member. Raises FormatError, JSONDecodeError."""
    if sum(map(len, members)) >= _LONG_JSON_BYTES * len(members):
        return list(map(orjson.loads, members))
    records: list[dict[str, Any]] = []
    for together in _in_cache(members):
        records += orjson.loads(b",".join((b"[0", *together, b"0]")))[1:-1]
    if len(records) != len(members):
        raise FormatError("a json member is not one object")
    return records


def _image(samples: LoadedSamples, sample_index: int, data: memoryview, record: dict[str, Any]) -> bytes | list[bytes] | None:
    """The encoded image of a sample, if it has one; of a conversation or an interleaved document the list of its images."""
    images = {}
    for suffix, begin, end in _payloads(samples, sample_index):
        number = image_number(suffix)
        if number is not None:
            images[number] = bytes(data[begin:end])
    if record["data_type"] in MARKED_TYPES:
        return [images[number] for number in sorted(images)] or None
    return images.get(0)


def _grids(samples: LoadedSamples, sample_index: int, record: dict[str, Any]) -> Any:
    """The shape of each image's codes, where a sample has any number of images; None if the codes are one grid."""
    if record.get("grids") is None:
        return None
    return record["grids"][_code_column(samples, sample_index)] or []


def _code_column(samples: LoadedSamples, sample_index: int) -> str:
    """The column that the codes of a sample are read from."""
    members = (suffix for suffix, _, _ in _payloads(samples, sample_index) if suffix in samples.reader.code_members)
    return next(members, "no codes").removesuffix(".npy")


def _layout(samples: LoadedSamples, sample_index: int) -> CodeGrid:
    """What the codes of a sample are."""
    return samples.reader.layout or samples.reader.opened.manifest.layout(_code_column(samples, sample_index))


def _payloads(samples: LoadedSamples, sample_index: int) -> Iterator[tuple[str, int, int]]:
    """(suffix, begin, end in its bytes) of each payload of a sample."""
    index, number = samples.index, sample_index - samples.first
    for suffix, begin, length in zip(index.members, index.offsets[number].tolist(), index.lengths[number].tolist(), strict=True):
        if length != ABSENT:
            yield suffix, begin, begin + length


def _members(samples: LoadedSamples, sample_index: int, data: memoryview) -> Sample:
    """A sample of a source without our schema: `__key__` and, by suffix, the members' bytes."""
    payloads = list(_payloads(samples, sample_index))
    blocks = bytes(data[: min(begin for _, begin, _ in payloads)])
    if len(blocks) > BLOCK and (b"path=" in blocks or blocks[156:157] == b"L"):  # other pax blocks say nothing of names
        name = first_name(blocks, samples.where(sample_index), 0)
    else:
        name = header_name(blocks[-BLOCK:]).decode("utf-8", "replace")
    return {"__key__": cut_name(name)[0], **{suffix: bytes(data[begin:end]) for suffix, begin, end in payloads}}


def _in_cache(members: Sequence[memoryview]) -> Iterator[Sequence[memoryview]]:
    """The members in runs that are joined without leaving the processor's cache."""
    size = max(_CACHE_BYTES * len(members) // max(sum(map(len, members)), 1), 1)
    for start in range(0, len(members), size):
        yield members[start : start + size]


def read_keys(headers: Sequence[memoryview]) -> list[str]:
    """The keys in tar headers of json members: up to the first dot. Our schema's keys are ASCII without dots."""
    joined = b"".join(headers)
    names = np.frombuffer(joined, np.uint8).reshape(len(headers), NAME_BYTES)
    ends = (names == ord(".")).argmax(1)
    if not ends.all():  # "./KEY.json", as `tar c .` writes
        return [bytes(header).removeprefix(b"./").partition(b".")[0].decode("ascii", "replace") for header in headers]
    text = joined.decode("latin-1")
    starts = range(0, len(joined), NAME_BYTES)
    return [text[start : start + end] for start, end in zip(starts, ends.tolist(), strict=True)]


def _codes(members: Sequence[memoryview], grids: Sequence[Any], layouts: Sequence[CodeGrid]) -> Codes | None:
    """The codes of samples.

    Args:
        members: the npy file of each, perhaps empty.
        grids: shapes of the images of each; [] where no sample has several.
        layouts: of each, or one of all.
    """
    lengths = set(map(len, members))
    if lengths == {0}:
        return None
    is_alike = grids.count(None) == len(grids) and layouts.count(layouts[0]) == len(layouts)
    if is_alike and (stacked_B := stack_npy(members, IN_COLUMNS)) is not None:
        (shape,) = layouts[0].shapes_of("codes", stacked_B[0], None)
        return Codes(_tensor(stacked_B.reshape(-1), layouts[0]), shape)
    arrays = [parse_npy(member, "codes", IN_COLUMNS) if len(member) else None for member in members]
    shapes: list[Shape | list[Shape] | None] = []
    grids, layouts = grids or [None] * len(arrays), layouts if len(layouts) > 1 else [layouts[0]] * len(arrays)
    for array, of_images, layout in zip(arrays, grids, layouts, strict=True):
        found = None if array is None else layout.shapes_of("codes", array, of_images)
        shapes.append(found if found is None or of_images is not None else found[0])
    held = {layout.dtype if layout.is_float else "codes": layout for layout, shape in zip(layouts, shapes, strict=True) if shape}
    if len(held) > 1:
        raise FormatError(f"a batch can't hold {' and '.join(map(str, held))}: make a loader of each")
    flat = np.concatenate([array.reshape(-1) for array in arrays if array is not None])
    first = shapes[0]
    return Codes(
        _tensor(flat, next(iter(held.values()), HW)),
        first if isinstance(first, tuple) and shapes.count(first) == len(shapes) else shapes,
    )


def stack_npy(members: Sequence[memoryview], takes: str = IDS) -> NDArray[Any] | None:
    """The arrays of npy members, side by side in a first dimension; None if they differ in type or shape.

    >>> from wds_tools.format.shard import npy_bytes
    >>> members = [memoryview(npy_bytes(np.array([codes], np.uint16))) for codes in ([1, 2], [3, 4])]
    >>> stack_npy(members).tolist()
    [[[1, 2]], [[3, 4]]]
    """
    if len(set(map(len, members))) > 1:
        return None
    first = parse_npy(members[0], "an npy member", takes)
    skip = len(members[0]) - first.nbytes
    head = bytes(members[0][:skip])
    stacked_BM = np.empty((len(members), first.nbytes), np.uint8)
    done, same = 0, True
    for together in _in_cache(members):
        raw_BM = np.frombuffer(b"".join(together), np.uint8).reshape(len(together), -1)
        same = same and raw_BM[:, :skip].tobytes() == head * len(together)
        stacked_BM[done : done + len(together)] = raw_BM[:, skip:]
        done += len(together)
    return stacked_BM.reshape(-1).view(first.dtype).reshape(len(members), *first.shape) if same else None


def _tensor(flat: NDArray[Any], layout: CodeGrid) -> torch.Tensor:
    if layout.is_float:
        return torch.from_numpy(flat).view(getattr(torch, str(layout.dtype)))
    if flat.dtype.itemsize > 2 and flat.size and int(flat.max()) >= 1 << 31:
        raise FormatError(f"the code {int(flat.max())} does not fit the int32 of a batch")
    return torch.from_numpy(flat if flat.dtype.itemsize > 1 else flat.astype(np.uint16))
