"""What a sample is, and what makes one valid.

A `Sample` is the one record that flows through the system: image-text pairs, documents and conversations share it. On disk it
is a few tar members (see `format.shard`); here it is a value. Codes are raw codebook indices, never shifted into a text
tokenizer's ids, and every grid keeps its (h, w): in the shape of its array, or, for a conversation with any number of images,
in `grids`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from itertools import accumulate
from types import MappingProxyType
from typing import Any, NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from wds_tools.errors import FormatError

SCHEMA_VERSION = 1
ANY_MEMBERS = 0
"""The schema version of indexed third-party tars: WebDataset samples of any members, which only the loaders can use."""
DATA_TYPES = ("image_text", "image_text_multi", "text_pretrain", "visual_sft")
CODE_COLUMNS = ("vqcode_512", "vqcode_multi768")
IMAGE_EXTENSIONS = ("jpg", "png", "webp", "gif", "bmp", "tif")
JSON_FIELDS = ("data_type", "text", "length", "width", "height", "conversations", "grids")
TOKEN_MEMBERS = ("tokens.npy", "loss.npy", "segments.npy")
"""Members of a row of tokens: ids, which are trained, lengths of segments; see `sequences.rows`."""
RESERVED_FIELDS = frozenset((*JSON_FIELDS, *CODE_COLUMNS, "cls", "id", "index", "inx"))
"""Names that provenance may not use: the schema's own, and those that Hugging Face casts to integers."""
CHARACTERS_PER_CODE = 4
"""`length` counts a code as this many characters, as Liquid does."""
MAX_KEY_BYTES = 64
MAX_COLUMN_BYTES = 31
"""With a key, two dots and "npy" 100 bytes: what fits the name of a ustar header."""
_KEY_ALPHABET = frozenset("0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ_-")
_NOTHING: Mapping[str, Any] = MappingProxyType({})

Codes = NDArray[np.unsignedinteger[Any]]
_Value = TypeVar("_Value")


class SourceImage(NamedTuple):
    """An encoded image, byte for byte."""

    data: bytes
    extension: str
    """One of IMAGE_EXTENSIONS."""


class Sample(NamedTuple):
    """One training example. A named tuple, since millions are made; give its fields by name."""

    key: str
    """Unique over the dataset: letters, digits, '_' and '-', at most 64."""
    data_type: str
    """One of DATA_TYPES."""
    text: str
    """The caption or the document; empty for a conversation."""
    width: int | None = None
    """Width in pixels of the cropped image, for multi-ratio samples that are encoded; else None."""
    height: int | None = None
    codes: Mapping[str, Codes] = _NOTHING
    """Column name -> (h, w) grid of codebook indices, uint16 or uint32, row-major; see `grids` for several images."""
    image: bytes | None = None
    """The source image, byte for byte; of a conversation the first."""
    image_extension: str | None = None
    """One of IMAGE_EXTENSIONS; set exactly when `image` is."""
    conversations: list[dict[str, str]] | None = None
    """For visual_sft: [{"from": "system" | "human" | "gpt", "value": ...}, ...]; each "<image>" in a value is the next image."""
    more_images: tuple[SourceImage, ...] = ()
    """For visual_sft: the images behind the first."""
    grids: Mapping[str, list[list[int]]] | None = None
    """For visual_sft with codes: column -> [h, w] of each image. Unless that is one image, the column's codes are one row
    (1, sum of h x w) of all grids end to end. None: each column is one grid."""
    provenance: Mapping[str, Any] = _NOTHING
    """Further JSON fields, such as a document's url."""

    @property
    def num_codes(self) -> int:
        """Codes over all columns."""
        return sum(grid_hw.size for grid_hw in self.codes.values()) if self.codes else 0

    @property
    def text_chars(self) -> int:
        """Characters of text; of a conversation, also those of its turns."""
        return len(self.text) + sum(len(turn["value"]) for turn in self.conversations or ())

    @property
    def length(self) -> int:
        """Characters of text + 4 x number of codes: Liquid's measure of a sample."""
        return self.text_chars + CHARACTERS_PER_CODE * self.num_codes

    @property
    def images(self) -> tuple[SourceImage, ...]:
        """All source images, in order."""
        if self.image is None or self.image_extension is None:
            return ()
        return SourceImage(self.image, self.image_extension), *self.more_images

    def grids_of(self, column: str) -> list[Codes]:
        """The (h, w) grids of a code column, one an image, as views."""
        codes = self.codes[column]
        return [codes] if self.grids is None else split_grids(codes, self.grids[column])


def join_grids(grids: Sequence[Codes], dtype: np.dtype[Any]) -> tuple[Codes, list[list[int]]]:
    """The codes of a conversation's images as a sample holds them, and the [h, w] of each: see Sample.grids."""
    shapes = [list(grid_hw.shape) for grid_hw in grids]
    if len(grids) == 1:
        return grids[0], shapes
    return np.concatenate([np.empty(0, dtype), *(grid_hw.reshape(-1) for grid_hw in grids)])[None], shapes


def split_grids(codes: Codes, grids: Sequence[Sequence[int]]) -> list[Codes]:
    """Grids that lie end to end, apart again: see Sample.grids."""
    flat = codes.reshape(-1)
    ends = list(accumulate(height * width for height, width in grids))
    return [flat[end - h * w : end].reshape(h, w) for end, (h, w) in zip(ends, grids, strict=True)]


def code_dtype(codebook_size: int) -> np.dtype[np.unsignedinteger[Any]]:
    """The on-disk dtype of codes in [0, codebook_size): uint16 up to 65,536 entries, uint32 above (little-endian)."""
    if not 0 < codebook_size <= 1 << 32:
        raise FormatError(f"codebook_size={codebook_size} is not in 1 ... 2**32")
    return np.dtype("<u2" if codebook_size <= 1 << 16 else "<u4")


def code_column(data_type: str, name: str = "") -> str:
    """The column that the codes of this kind of image sample go to.

    Args:
        data_type: one of DATA_TYPES.
        name: of the set of codes, where a dataset has several.

    Raises:
        FormatError: the data type has no image, or the name can't be one.
    """
    match data_type:
        case "image_text" | "visual_sft":
            return named_column("vqcode_512", name)
        case "image_text_multi":
            return named_column("vqcode_multi768", name)
        case _:
            raise FormatError(f"data_type={data_type!r} has no codes: expected image_text, image_text_multi or visual_sft")


def named_column(column: str, name: str) -> str:
    """One of CODE_COLUMNS in the set of codes of this name: "vqcode_512" in "emu3" is "vqcode_512-emu3".

    Raises:
        FormatError: the name is too long, or has other characters than letters, digits, '_' and '-'.
    """
    if not name:
        return column
    longest = MAX_COLUMN_BYTES - max(map(len, CODE_COLUMNS)) - 1
    if len(name) > longest or not _KEY_ALPHABET.issuperset(name):
        raise FormatError(f"{name!r} can't name codes: expected at most {longest} letters, digits, '_' or '-'")
    return f"{column}-{name}"


def codes_named(codes: Mapping[str, _Value], name: str) -> dict[str, _Value]:
    """Of values by column those in the set of codes of this name, under the columns' plain names."""
    wanted = {named_column(column, name): column for column in CODE_COLUMNS}
    return {wanted[column]: value for column, value in codes.items() if column in wanted}


def one_set(codes: Mapping[str, _Value], name: str | None) -> dict[str, _Value]:
    """Of values by column those in the set of codes of this name; None: in the set that the first column belongs to."""
    if name is None:
        name = next(iter(codes), "").partition("-")[2]
    return {column: value for column, value in codes.items() if column.partition("-")[2] == name}


def is_reserved(suffix: str) -> bool:
    """Whether loaders, or webdataset, could take a member of this suffix for what they say of a sample themselves: `__key__`."""
    return suffix.startswith("__") and suffix.endswith("__")


def taken_names(names: Iterable[str]) -> list[str]:
    """Those of these names that provenance may not use."""
    return [name for name in names if name in RESERVED_FIELDS or is_reserved(str(name))]


def check_key(key: str) -> None:
    """Raise FormatError unless `key` can name a sample (see Sample.key)."""
    if not key or len(key) > MAX_KEY_BYTES or not _KEY_ALPHABET.issuperset(key):
        raise FormatError(f"key {key[:80]!r}: expected 1 to {MAX_KEY_BYTES} letters, digits, '_' or '-'")


def validate(sample: Sample) -> None:
    """Check everything about a sample that its fields' types do not say.

    Raises:
        FormatError: names the key, the field, what was got and what is expected.
    """
    check_key(sample.key)
    if sample.data_type not in DATA_TYPES:
        raise FormatError(f"{sample.key}: data_type={sample.data_type!r} is not one of {', '.join(DATA_TYPES)}")
    if not isinstance(sample.text, str):
        raise FormatError(f"{sample.key}: text is a {type(sample.text).__name__}, expected a string")
    for pixels in (sample.width, sample.height):
        if pixels is not None and (type(pixels) is not int or pixels <= 0):
            raise FormatError(f"{sample.key}: width={sample.width!r}, height={sample.height!r}: not a positive number of pixels")
    for column, grid_hw in sample.codes.items() if sample.codes else ():
        if not column.startswith("vqcode_") or len(column) > MAX_COLUMN_BYTES or not _KEY_ALPHABET.issuperset(column):
            raise FormatError(
                f"{sample.key}: code column {column[:80]!r}: expected 'vqcode_' and letters, digits, '_' or '-', "
                f"at most {MAX_COLUMN_BYTES} in all"
            )
        is_empty = grid_hw.size == 0 and sample.grids is None
        if grid_hw.ndim != 2 or is_empty or grid_hw.dtype.str not in ("<u2", "<u4"):
            raise FormatError(
                f"{sample.key}: {column} is {grid_hw.dtype.str} {grid_hw.shape}, expected a non-empty 2-D grid of <u2 or <u4"
            )
    if sample.grids is not None:
        _check_grids(sample)
    if (sample.image is None) != (sample.image_extension is None):
        raise FormatError(f"{sample.key}: image and image_extension must be given together")
    if sample.more_images and (sample.image is None or sample.data_type != "visual_sft"):
        raise FormatError(f"{sample.key}: more_images stand behind the first image of visual_sft, and nowhere else")
    for image in sample.images:
        if image.extension not in IMAGE_EXTENSIONS:
            raise FormatError(f"{sample.key}: image_extension={image.extension!r} is not one of {', '.join(IMAGE_EXTENSIONS)}")
    if (sample.data_type == "visual_sft") != (sample.conversations is not None):
        raise FormatError(f"{sample.key}: conversations belong to visual_sft, and to nothing else")
    if sample.conversations is not None and not _are_turns(sample.conversations):
        raise FormatError(f"{sample.key}: conversations are not a list of turns with a string 'from' and a string 'value'")
    if sample.data_type == "text_pretrain" and (sample.codes or sample.image is not None):
        raise FormatError(f"{sample.key}: text_pretrain has neither image nor codes")
    if sample.provenance and (taken := taken_names(sample.provenance)):
        raise FormatError(f"{sample.key}: provenance may not use the reserved names {', '.join(sorted(taken))}")


def _check_grids(sample: Sample) -> None:
    """Raise FormatError unless the grids of a conversation fit its codes."""
    grids: Any = sample.grids
    if sample.data_type != "visual_sft":
        raise FormatError(f"{sample.key}: grids belong to visual_sft, and to nothing else")
    if not isinstance(grids, Mapping) or set(grids) != set(sample.codes):
        raise FormatError(f"{sample.key}: grids={grids!r}, expected an object with the code columns {', '.join(sample.codes)}")
    for column, codes in sample.codes.items():
        shapes = grids[column]
        if not isinstance(shapes, list | tuple) or not all(map(_is_shape, shapes)):
            raise FormatError(f"{sample.key}: the grids of {column} are {shapes!r}, expected a list of [height, width]")
        expected = tuple(shapes[0]) if len(shapes) == 1 else (1, sum(map(math.prod, shapes)))
        if codes.shape != expected:
            raise FormatError(
                f"{sample.key}: {column} has the shape {codes.shape}, its {len(shapes)} grids {shapes!r} need {expected}"
            )


def _is_shape(value: Any) -> bool:
    return isinstance(value, list | tuple) and len(value) == 2 and all(type(side) is int and side > 0 for side in value)


def _are_turns(turns: Any) -> bool:
    return isinstance(turns, list) and all(
        isinstance(turn, dict) and isinstance(turn.get("from"), str) and isinstance(turn.get("value"), str) for turn in turns
    )
