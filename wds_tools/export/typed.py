"""Samples -> a table that has all of them: any kind, all texts, all sets of codes, source images, every field, each typed.

    Sample ── typed_columns ──▶ a batch of columns ── `rows.write_part` ──▶ Parquet ── records.coded ──▶ the same Sample

A code column is a struct: `codes`, the numbers of its array in a row; `shape` of the array; `dtype` as numpy names it; and of a
sample with any number of images `grids`, the shape of each (see Sample.grids). What the manifests say of the columns is in the
file's metadata, from where `convert coded` has it. Memory is one batch.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import orjson

from wds_tools.errors import FormatError
from wds_tools.format.codes import HW, is_code_column
from wds_tools.format.manifest import Manifest, code_layouts
from wds_tools.format.schema import IMAGE_EXTENSIONS, Sample
from wds_tools.records.coded import TYPED_FIELDS
from wds_tools.sources.tables import MADE


def typed_schema(pa: Any, manifests: Sequence[Manifest]) -> Any:
    """The Arrow schema of a table of these datasets."""
    members = dict.fromkeys(member for manifest in manifests for member in manifest.members)
    made = {column: provenance for manifest in manifests for column, provenance in manifest.codes.items()}
    layouts = code_layouts(made)
    text, shape = pa.string(), pa.list_(pa.int32())
    types = dict.fromkeys(TYPED_FIELDS, text)
    types |= {"length": pa.int64(), "width": pa.int32(), "height": pa.int32()}
    types["texts"] = pa.list_(pa.struct({"name": text, "text": text}))
    types["conversations"] = pa.list_(pa.struct({"from": text, "value": text}))
    for column in (member.removesuffix(".npy") for member in members if is_code_column(member)):
        layout = layouts.get(column, HW)
        numbers = pa.uint32() if not layout.sizes and layout.dtype is None else pa.from_numpy_dtype(layout.npy_dtype)
        types[column] = pa.struct({"codes": pa.list_(numbers), "shape": shape, "dtype": text, "grids": pa.list_(shape)})
    if not {*IMAGE_EXTENSIONS}.isdisjoint(members):
        types["images"] = pa.list_(pa.struct({"bytes": pa.binary(), "path": text}))
    return pa.schema(types, metadata={MADE: orjson.dumps(made)})


def typed_columns(pa: Any, schema: Any, samples: Sequence[Sample]) -> list[Any]:
    """Arrays of the columns of a schema."""
    rows = list(map(_row, samples))
    return [pa.array([row.get(field.name) for row in rows], type=field.type) for field in schema]


def size_of(sample: Sample) -> int:
    """The bytes that a sample takes in memory, about."""
    return sample.length + sum(len(image.data) for image in sample.images)


def _row(sample: Sample) -> dict[str, Any]:
    if any(turn.keys() > {"from", "value"} for turn in sample.conversations or ()):
        raise FormatError(f"{sample.key}: a turn has other fields than from and value, for which there is no column")
    texts = None if sample.texts is None else [{"name": name, "text": text} for name, text in sample.texts.items()]
    images = [
        {"bytes": image.data, "path": f"{sample.key}.{f'{number}.' if number else ''}{image.extension}"}
        for number, image in enumerate(sample.images)
    ]
    fields = {name: getattr(sample, name) for name in ("key", "data_type", "text", "length", "width", "height", "conversations")}
    grids: Mapping[str, Iterable[Any]] = sample.grids or {}
    codes = {
        column: {"codes": array.reshape(-1), "shape": array.shape, "dtype": array.dtype.name, "grids": grids.get(column)}
        for column, array in sample.codes.items()
    }
    return {
        **fields,
        **codes,
        "texts": texts,
        "images": images or None,
        "provenance": orjson.dumps(dict(sample.provenance)).decode(),
    }
