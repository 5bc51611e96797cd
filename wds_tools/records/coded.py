"""A row that holds codes -> Sample(text, codes, conversations).

Of Liquid's seven fields all are strings, "no" for what is absent, codes a JSON list in a string (a list will do). Codes get their
grid back: 512 / stride on a side, or height / stride by width / stride; those of a conversation the grids that its text, the JSON
of `export.rows`, says. Codes of others are one image in a field of any name: see `records.arrays`. Pure.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import orjson
from numpy.typing import NDArray

from wds_tools.errors import FormatError, Reject, UsageError
from wds_tools.format.codes import CODE_COLUMNS, HW, CodeGrid, Codes, code_dtype, is_code_column
from wds_tools.format.schema import DATA_TYPES, IMAGE_MARK, MARKED_TYPES, Sample, SourceImage, image_fields, validate
from wds_tools.records.arrays import Shape, flat_and_shape
from wds_tools.records.conversations import turns_of
from wds_tools.records.fields import required_text

if TYPE_CHECKING:
    from wds_tools.images import Mode  # which needs Pillow, and loaders do not

COLUMNS = {
    "data_type": "string",
    "text": "string",
    "length": "int64",
    "vqcode_512": "string",
    "vqcode_multi768": "string",
    "width": "string",
    "height": "string",
}
"""Name -> Arrow type, in order."""
TYPED_FIELDS = ("key", "data_type", "text", "length", "width", "height", "texts", "conversations", "provenance")
"""Of rows of `export parquet`, beside columns of codes and images: see export.typed."""
ABSENT = "no"
IMAGE_TYPES = ("image_text", "image_text_multi")
SIDE_512 = 512
_MAX_DIGITS = 7
_MAX_RATIO = 4
"""Of the sides of an image: a longer array is rows of codes, not an image."""


@dataclass(frozen=True)
class CodedRows:
    """Reads rows whose codes are below `codebook_size`, one for `stride` pixels of a side."""

    codebook_size: int
    stride: int
    grid: Shape | None = None
    """Rows and columns of codes of any image of others. None: as the array, the fields width and height, or 512 pixels say."""
    crop: int | None = None
    """Which of several grids in an array of others is taken."""
    other: tuple[CodeGrid, Mode] | None = None
    """What the arrays of others are, where that is another layout than (h, w), and the mode that their column is named by."""

    def image(self, key: str, row: Mapping[str, Any], name: str, value: Any, text: str) -> Sample:
        """The sample of codes that are not in Liquid's columns: in vqcode_512 if their grid is that of 512 pixels.

        Args:
            key: the sample's.
            row: perhaps with width and height in pixels.
            name: of the field with the codes.
            value: of this field: a list, its JSON, or the bytes of an npy file.
            text: of the sample.

        Raises:
            Reject: "bad_codes".
        """
        if self.other is not None:
            layout, mode = self.other
            codes = {mode.column: self.array(layout, name, value)}
            return Sample(key=key, data_type=mode.data_type, text=text, codes=codes)
        flat, shape = flat_and_shape(name, value)
        height, width = self._shape_of(name, flat, shape, row)
        is_512 = (height, width) == self._shape_512
        column, data_type = CODE_COLUMNS[not is_512], IMAGE_TYPES[not is_512]
        start = height * width * (self.crop or 0)
        codes = {column: self.values(name, flat[start : start + height * width]).reshape(height, width)}
        sample = Sample(key=key, data_type=data_type, text=text, codes=codes)
        return sample if is_512 else sample._replace(width=width * self.stride, height=height * self.stride)

    def array(self, layout: CodeGrid, name: str, value: Any) -> NDArray[Any]:
        """The codes, or float32 in place of codes, of a field in another layout than (h, w). Raises Reject: "bad_codes"."""
        flat, shape = flat_and_shape(name, value, "iuf" if layout.is_float else "iu")
        shape = (*(1,) * (len(layout.layout) - len(shape)), *shape)
        if not layout.is_shape(shape):
            raise Reject("bad_codes", f"{name} has the shape {shape}, expected the axes {layout.axes}")
        with np.errstate(over="ignore"):  # infinite then, which check_values refuses
            return (flat.astype(np.float32) if layout.is_float else self.values(name, flat)).reshape(shape)

    def _shape_of(self, name: str, flat: NDArray[Any], shape: Shape, row: Mapping[str, Any]) -> Shape:
        shown = f"{name} has the shape ({', '.join(map(str, shape))})"
        if self.grid is not None:
            num_grids, rest = divmod(len(flat), math.prod(self.grid))
            wanted = " x ".join(map(str, self.grid))
            if rest or not num_grids:
                raise Reject("bad_codes", f"{shown}, which is no whole number of grids of {wanted}")
            if (num_grids > 1 and self.crop is None) or (self.crop or 0) >= num_grids:
                raise Reject("bad_codes", f"{shown}: {num_grids} grids of {wanted}; --crop N takes one of them, from 0")
            return self.grid
        if len(shape) == 2 and max(shape) <= _MAX_RATIO * min(shape):
            return shape
        if len(shape) == 1:
            stated = [str(row.get(side)) for side in ("height", "width")]
            pixels = [int(side) for side in stated if side.isdecimal() and len(side) < _MAX_DIGITS]
            sides = tuple(side // self.stride for side in pixels)
            if len(sides) == 2 and math.prod(sides) == len(flat) and not any(side % self.stride for side in pixels):
                return sides
            if math.prod(self._shape_512) == len(flat):
                return self._shape_512
        raise Reject("bad_codes", f"{shown}, which does not say rows and columns: --grid H W does, of codes")

    def sample(self, key: str, row: Mapping[str, Any]) -> Sample:
        """The sample of a row.

        Raises:
            Reject: "unknown_data_type", "missing_codes", "bad_codes", "bad_conversation", or as required_text.
        """
        data_type = row.get("data_type")
        if data_type not in DATA_TYPES:
            raise Reject("unknown_data_type", f"data_type is {data_type!r}, expected one of {', '.join(DATA_TYPES)}")
        if data_type in MARKED_TYPES:
            sample = self.page(key, row) if data_type == "interleaved" else self.conversation(key, row, talk_of(row))
            texts = [sample.text, *(turn["value"] for turn in sample.conversations or ())]
            if not sample.codes and any(IMAGE_MARK in text for text in texts):
                raise Reject("missing_codes", f"{data_type} with {IMAGE_MARK}, without {' and '.join(CODE_COLUMNS)}")
            return sample
        text = required_text(dict(row), ("text",))
        codes: dict[str, Codes] = {}
        width = height = None
        if (flat := codes_in(row, "vqcode_512")) is not None:
            codes["vqcode_512"] = self._grid("vqcode_512", flat, self._shape_512)
        if (flat := codes_in(row, "vqcode_multi768")) is not None:
            width, height = _pixels(row, "width"), _pixels(row, "height")
            if width % self.stride or height % self.stride:
                raise Reject(
                    "bad_codes", f"an image of {width} x {height} pixels is no whole number of codes at stride {self.stride}"
                )
            codes["vqcode_multi768"] = self._grid("vqcode_multi768", flat, (height // self.stride, width // self.stride))
            data_type = "image_text_multi" if data_type == "image_text" and len(codes) == 1 else data_type
        if data_type == IMAGE_TYPES[0]:  # what it has are those of its first column
            width = height = None
        if data_type in IMAGE_TYPES and not codes:
            raise Reject("missing_codes", f"{data_type} without vqcode_512 and vqcode_multi768")
        return Sample(key=key, data_type=data_type, text=text, codes=codes, width=width, height=height)

    def typed(self, key: str, row: Mapping[str, Any], made: Mapping[str, CodeGrid]) -> Sample:
        """The sample of a row of `export parquet`. Raises Reject: "bad_codes".

        Args:
            key: the sample's.
            row: with TYPED_FIELDS, columns of codes, and perhaps images.
            made: column -> what its codes are, for those of which that is known.
        """
        try:
            held = {name: value for name, value in row.items() if is_code_column(name) and value is not None}
            codes = {name: np.array(one["codes"], one["dtype"]).reshape(one["shape"]) for name, one in held.items()}
            grids = {name: one["grids"] for name, one in held.items() if one["grids"] is not None}
            images = [SourceImage(one["bytes"], one["path"].rpartition(".")[2]) for one in row.get("images") or ()]
            sample = Sample(
                key=key,
                **{name: row[name] for name in ("data_type", "text", "width", "height", "conversations")},
                codes=codes,
                **image_fields(images),
                grids=grids or None,
                texts=None if row["texts"] is None else {one["name"]: one["text"] for one in row["texts"]},
                provenance=orjson.loads(row["provenance"]),
            )
            layouts = {name: CodeGrid(layout="hwkt"[: array.ndim], dtype=array.dtype.name) for name, array in codes.items()}
            validate(sample, layouts)  # of any array: what the columns' are, is known where they are written
            for name, array in codes.items():
                made.get(name, CodeGrid(codebook_size=self.codebook_size)).check_values(name, array)
        except (FormatError, UsageError, KeyError, TypeError, ValueError, OverflowError, AttributeError) as error:
            raise Reject("bad_codes", f"not a row of export parquet: {type(error).__name__}: {error}") from error
        return sample

    def conversation(self, key: str, row: Mapping[str, Any], talk: dict[str, Any]) -> Sample:
        """The sample of a row whose turns, and perhaps grids, are in `talk`. Raises as `sample`."""
        sample = Sample(key=key, data_type="visual_sft", text="", conversations=turns_of(talk))
        return self._with_codes(sample, row, talk.get("grids"))

    def page(self, key: str, row: Mapping[str, Any]) -> Sample:
        """The sample of an interleaved row, whose grids are in a field of this name. Raises as `sample`."""
        sample = Sample(key=key, data_type="interleaved", text=required_text(dict(row), ("text",)))
        return self._with_codes(sample, row, row.get("grids"))

    def _with_codes(self, sample: Sample, row: Mapping[str, Any], grids: Any) -> Sample:
        codes: dict[str, Codes] = {}
        for column in CODE_COLUMNS:
            flat = codes_in(row, column)
            if flat is None:
                continue
            if grids is None:  # one image, as everywhere else
                codes[column] = self._grid(column, flat, self._shape_512)
                continue
            shapes = grids.get(column) if isinstance(grids, dict) else None
            if isinstance(shapes, list) and len(shapes) == 1 and HW.is_shape(shapes[0]):
                codes[column] = self._grid(column, flat, shapes[0])
            else:
                codes[column] = self.values(column, flat)[None]
        sample = sample._replace(codes=codes, grids=grids)
        try:
            validate(sample)
        except FormatError as error:
            raise Reject("bad_codes", str(error)) from error
        return sample

    @property
    def _shape_512(self) -> Shape:
        return SIDE_512 // self.stride, SIDE_512 // self.stride

    def _grid(self, column: str, flat: list[int], shape: Sequence[int]) -> Codes:
        if len(flat) != math.prod(shape):
            sides = " x ".join(map(str, shape))
            raise Reject("bad_codes", f"{column} has {len(flat)} codes, expected {sides} at stride {self.stride}")
        return self.values(column, flat).reshape(shape)

    def values(self, column: str, flat: Sequence[int] | NDArray[Any]) -> Codes:
        """Codes of the type that the codebook needs, (N,). Raises Reject: "bad_codes"."""
        try:
            values: NDArray[Any] = np.array(flat) if len(flat) else np.zeros(0, np.int64)
        except ValueError:  # lists among the numbers
            values = np.array([""])
        is_whole = values.dtype.kind in "iu" and values.ndim == 1
        if not is_whole or values.min(initial=0) < 0 or values.max(initial=0) >= self.codebook_size:
            raise Reject("bad_codes", f"{column} is not a list of whole numbers from 0 to {self.codebook_size - 1}")
        return values.astype(code_dtype(self.codebook_size))


def talk_of(row: Mapping[str, Any]) -> dict[str, Any]:
    """The record of a conversation, which is its text in JSON. Raises Reject."""
    text = required_text(dict(row), ("text",))
    try:
        talk = orjson.loads(text)
    except orjson.JSONDecodeError as error:
        raise Reject("bad_conversation", f"text is {text[:40]!r}, expected the JSON of a conversation: {error}") from error
    if not isinstance(talk, dict):
        raise Reject("bad_conversation", f"text is {text[:40]!r}, expected an object with conversations")
    return talk


def codes_in(row: Mapping[str, Any], column: str) -> list[int] | None:
    """The codes in a column, as a list or its JSON; None where there are none. Raises Reject: "bad_codes"."""
    value = row.get(column)
    if value is None or value == ABSENT:
        return None
    try:
        flat = orjson.loads(value) if isinstance(value, str) else value
    except orjson.JSONDecodeError as error:
        raise Reject("bad_codes", f"{column} is {value[:40]!r}, expected a JSON list: {error}") from error
    if not isinstance(flat, list) or not (flat or row.get("data_type") in MARKED_TYPES):  # which may have no image
        raise Reject("bad_codes", f"{column} is {str(value)[:40]!r}, expected a list of codes")
    return flat


def _pixels(row: Mapping[str, Any], name: str) -> int:
    try:
        pixels = int(row[name])
    except (KeyError, TypeError, ValueError):
        pixels = 0
    if pixels <= 0:
        raise Reject("bad_codes", f"vqcode_multi768 needs {name} in pixels, got {row.get(name)!r}")
    return pixels
