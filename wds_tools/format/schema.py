"""What a sample is, and what makes one valid.

A `Sample` is the one record that flows through the system: image-text pairs, documents and conversations share it. On disk it
is a few tar members (see `format.shard`); here it is a value. What its codes are, `format.codes` says.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from types import MappingProxyType
from typing import Any, NamedTuple

from wds_tools.errors import FormatError
from wds_tools.format.codes import (
    HW,
    NO_LAYOUTS,
    CodeGrid,
    Codes,
    check_column,
    is_code_column,
    is_square,
    split_grids,
)

SCHEMA_VERSION = 1
"""Of datasets that every release can read; one with a sample that needs more has that one's: see Sample.schema_version."""
ANY_MEMBERS = 0
"""The schema version of indexed third-party tars: WebDataset samples of any members, which only the loaders can use."""
DATA_TYPES = ("image_text", "image_text_multi", "text_pretrain", "visual_sft", "interleaved")
PAIR_TYPES = DATA_TYPES[:2]
MARKED_TYPES = DATA_TYPES[3:]
"""Those with any number of images: each IMAGE_MARK in their turns, or in their text, is the next one."""
IMAGE_MARK = "<image>"
IMAGE_EXTENSIONS = ("jpg", "png", "webp", "gif", "bmp", "tif", "avif")
JSON_FIELDS = ("data_type", "text", "length", "width", "height", "conversations", "grids", "texts")
TOKEN_MEMBERS = ("tokens.npy", "loss.npy", "segments.npy")
"""Members of a row of tokens: ids, which are trained, lengths of segments; see `sequences.rows`."""
RESERVED_FIELDS = frozenset((*JSON_FIELDS, "cls", "id", "index", "inx"))
"""Names that provenance may not use: the schema's own, and those that Hugging Face casts to integers; nor code columns."""
CHARACTERS_PER_CODE = 4
"""`length` counts a code as this many characters, as Liquid does."""
MAX_KEY_BYTES = 64
_KEY = re.compile(f"[0-9A-Za-z_-]{{1,{MAX_KEY_BYTES}}}")
_NOTHING: Mapping[str, Any] = MappingProxyType({})


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
    """The caption or the document, with a mark for each image if it is interleaved; empty for a conversation."""
    width: int | None = None
    """Width in pixels of the cropped image, for multi-ratio samples that are encoded, else None. With several code columns it is
    that of the first."""
    height: int | None = None
    """Its height."""
    codes: Mapping[str, Codes] = _NOTHING
    """Code column -> (h, w) grid of codebook indices, or an array of the column's own layout (see CodeGrid); see `grids` for
    several images."""
    image: bytes | None = None
    """The source image, byte for byte; of several the first."""
    image_extension: str | None = None
    """One of IMAGE_EXTENSIONS; set exactly when `image` is."""
    conversations: list[dict[str, str]] | None = None
    """For visual_sft: [{"from": "system" | "human" | "gpt", "value": ...}, ...]; each "<image>" in a value, also of
    "gpt", is the next image."""
    more_images: tuple[SourceImage, ...] = ()
    """For MARKED_TYPES: the images after the first."""
    grids: Mapping[str, list[list[int]]] | None = None
    """For MARKED_TYPES with codes: column -> [h, w] of each image. Unless that is one image, the column's codes are one row
    (1, sum of h x w) of all grids end to end. None: each column is one grid."""
    texts: Mapping[str, str | None] | None = None
    """Several captions by name, the same names in every sample of a dataset; None for one that this sample has not."""
    provenance: Mapping[str, Any] = _NOTHING
    """Further JSON fields, such as a document's url."""
    num_enlarged: int = 0
    """Images that are smaller than what they are scaled to: to be counted where the sample is made, and stored nowhere."""

    @property
    def num_codes(self) -> int:
        """Codes over all columns."""
        return sum(grid_hw.size for grid_hw in self.codes.values()) if self.codes else 0

    @property
    def text_chars(self) -> int:
        """Characters of text; of a conversation, also those of its turns."""
        turns = self.conversations
        return len(self.text) + (sum(len(turn["value"]) for turn in turns) if turns else 0)

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

    @property
    def num_images(self) -> int:
        """Images, be it source images or their codes."""
        return len(self.images) or max((1 if self.grids is None else len(self.grids[column]) for column in self.codes), default=0)

    @property
    def schema_version(self) -> int:
        """The schema that says what this is: 2 for interleaved documents and for images in answers, which 1 had not."""
        if self.conversations is None:
            return 2 if self.data_type == "interleaved" else SCHEMA_VERSION
        answers = (turn["value"] for turn in self.conversations if turn["from"] == "gpt")
        return 2 if any(IMAGE_MARK in answer for answer in answers) else SCHEMA_VERSION

    def grids_of(self, column: str) -> list[Codes]:
        """The grids of a code column, one an image, as views.

        Args:
            column: one of `codes`.
        """
        codes = self.codes[column]
        return [codes] if self.grids is None else split_grids(codes, self.grids[column])

    def with_provenance(self, provenance: Mapping[str, Any]) -> Sample:
        """The sample with these provenance fields; four times as fast as `_replace`.

        Args:
            provenance: by name, values that JSON can hold.
        """
        return Sample._make((*self[:_AT_PROVENANCE], provenance, *self[_AT_PROVENANCE + 1 :]))

    def with_codes(self, columns: Sequence[str], provenance: Mapping[str, Mapping[str, Any]]) -> Sample:
        """The sample with these code columns only. A pair that had others too gets what goes with the first of these: see
        `pair_fields`.

        Args:
            columns: of those that it has.
            provenance: of the columns, as the manifest has it.
        """
        grids = None if self.grids is None else {column: self.grids[column] for column in columns}
        sample = self._replace(codes={column: self.codes[column] for column in columns}, grids=grids)
        if self.data_type not in PAIR_TYPES or len(columns) in (0, len(self.codes)):
            return sample
        stride = provenance.get(columns[0], {}).get("stride")
        return sample._replace(**pair_fields(columns[0], sample.codes[columns[0]].shape, stride))


_AT_PROVENANCE = Sample._fields.index("provenance")
_BEHIND_TEXT = slice(Sample._fields.index("text") + 1, _AT_PROVENANCE)
_ONLY_TEXT = Sample(key="", data_type="", text="")[_BEHIND_TEXT]
"""What a document has between its text and its provenance, as nearly all have: nothing to be checked."""


def pair_fields(column: str, shape: Sequence[int], stride: Any) -> dict[str, Any]:
    """The data type, width and height of a pair that has these codes, of an (h, w), for its only ones.

    Width and height are None where the stride is unknown or there is none, and for a square.
    """
    is_known = not is_square(column) and isinstance(stride, int)
    height, width = (side * stride for side in shape[:2]) if is_known else (None, None)
    return {"data_type": PAIR_TYPES[not is_square(column)], "width": width, "height": height}


def image_fields(images: Sequence[SourceImage]) -> dict[str, Any]:
    """The fields of a sample that hold these source images."""
    if not images:
        return {}
    (data, extension), *others = images
    return {"image": data, "image_extension": extension, "more_images": tuple(others)}


def is_reserved(suffix: str) -> bool:
    """Whether loaders, or webdataset, could take a member of this suffix for what they say of a sample themselves: `__key__`."""
    return suffix.startswith("__") and suffix.endswith("__")


def taken_names(names: Iterable[str]) -> list[str]:
    """Those of these names that provenance may not use."""
    return [name for name in names if name in RESERVED_FIELDS or is_reserved(str(name)) or is_code_column(str(name))]


_taken_of = lru_cache(maxsize=256)(taken_names)
"""The same of a tuple: nearly all samples of a dataset have the same names."""


def check_key(key: str) -> None:
    """Raise FormatError unless `key` can name a sample (see Sample.key)."""
    if not _KEY.fullmatch(key):
        raise FormatError(f"key {key[:80]!r}: expected 1 to {MAX_KEY_BYTES} letters, digits, '_' or '-'")


def validate(sample: Sample, layouts: Mapping[str, CodeGrid] = NO_LAYOUTS) -> None:
    """Check everything about a sample that its fields' types do not say.

    Args:
        sample: to be checked.
        layouts: code column -> what its arrays are, where that is another than (h, w).

    Raises:
        FormatError: names the key, the field, what was got and what is expected.
    """
    check_key(sample.key)
    if not (sample.data_type == "text_pretrain" and type(sample.text) is str and sample[_BEHIND_TEXT] == _ONLY_TEXT):
        _check_fields(sample, layouts)
    if sample.provenance and (taken := _taken_of(tuple(sample.provenance))):
        raise FormatError(f"{sample.key}: provenance may not use the reserved names {', '.join(sorted(taken))}")


def _check_fields(sample: Sample, layouts: Mapping[str, CodeGrid]) -> None:
    if sample.data_type not in DATA_TYPES:
        raise FormatError(f"{sample.key}: data_type={sample.data_type!r} is not one of {', '.join(DATA_TYPES)}")
    if not isinstance(sample.text, str):
        raise FormatError(f"{sample.key}: text is a {type(sample.text).__name__}, expected a string")
    for pixels in (sample.width, sample.height):
        if pixels is not None and (type(pixels) is not int or pixels <= 0):
            raise FormatError(f"{sample.key}: width={sample.width!r}, height={sample.height!r}: not a positive number of pixels")
    if sample.codes or sample.grids is not None:
        _check_codes(sample, layouts)
    if (sample.image is None) != (sample.image_extension is None):
        raise FormatError(f"{sample.key}: image and image_extension must be given together")
    if sample.image is not None or sample.more_images:
        _check_images(sample)
    if (sample.data_type == "visual_sft") != (sample.conversations is not None):
        raise FormatError(f"{sample.key}: conversations belong to visual_sft, and to nothing else")
    if sample.conversations is not None and not _are_turns(sample.conversations):
        raise FormatError(f"{sample.key}: conversations are not a list of turns with a string 'from' and a string 'value'")
    if sample.data_type == "interleaved" and (num_marks := sample.text.count(IMAGE_MARK)) != sample.num_images:
        raise FormatError(f"{sample.key}: {num_marks} {IMAGE_MARK} marks, {sample.num_images} images: expected as many")
    if sample.data_type == "text_pretrain" and (sample.codes or sample.image is not None):
        raise FormatError(f"{sample.key}: text_pretrain has neither image nor codes")
    if sample.texts is not None and not _are_texts(sample.texts):
        raise FormatError(f"{sample.key}: texts are not an object of strings, or null, by name")


def _check_images(sample: Sample) -> None:
    if sample.more_images and (sample.image is None or sample.data_type not in MARKED_TYPES):
        raise FormatError(f"{sample.key}: more_images stand behind the first of {' or '.join(MARKED_TYPES)}, and nowhere else")
    for image in sample.images:
        if image.extension not in IMAGE_EXTENSIONS:
            raise FormatError(f"{sample.key}: image_extension={image.extension!r} is not one of {', '.join(IMAGE_EXTENSIONS)}")


def _check_codes(sample: Sample, layouts: Mapping[str, CodeGrid]) -> None:
    grids: Any = sample.grids
    try:
        for column, codes in sample.codes.items():
            check_column(column)
            layouts.get(column, HW).check(column, codes, is_joined=grids is not None)
        if grids is None:
            return
        if sample.data_type not in MARKED_TYPES:
            raise FormatError(f"grids belong to {' and '.join(MARKED_TYPES)}, and to nothing else")
        if not isinstance(grids, Mapping) or set(grids) != set(sample.codes):
            raise FormatError(f"grids={grids!r}, expected an object with the code columns {', '.join(sample.codes)}")
        for column, codes in sample.codes.items():
            layouts.get(column, HW).check_shapes(column, codes, grids[column])
    except FormatError as error:
        raise FormatError(f"{sample.key}: {error}") from None


def _are_texts(texts: Any) -> bool:
    return isinstance(texts, Mapping) and all(isinstance(text, str | None) for text in texts.values())


def _are_turns(turns: Any) -> bool:
    return isinstance(turns, list) and all(
        isinstance(turn, dict) and isinstance(turn.get("from"), str) and isinstance(turn.get("value"), str) for turn in turns
    )
