"""What the codes of an image are: the array that holds them, its type, and the columns that it is stored in.

    provenance of a column ── CodeGrid ──▶ axes, types and ranges that its arrays have
    (h, w) of each image ── join_grids ──▶ (1, sum of h x w) and [h, w] of each ── split_grids ──▶ (h, w) of each image

A column declares its layout, a letter for each axis: "hw" (where it says nothing), "n" for codes in one dimension, "hwk" for
several codebooks a position, any other of one to four axes. Codes are raw codebook indices, never shifted into a text
tokenizer's ids, uint16 or uint32 as the codebook needs unless the column declares another type; in place of codes there may be
floats. A column is named by the mode of its images, and by its code set where it has one: "vqcode_512-emu3". Invariant: no other
module knows the axes of a layout, or which types codes have. No torch, no I/O.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, groupby
from typing import Annotated, Any, Literal, TypeVar, get_args

import numpy as np
from numpy.typing import NDArray

from wds_tools.errors import FormatError, UsageError

CODE_COLUMNS = ("vqcode_512", "vqcode_multi768")
"""Those of Liquid's rows. Others are named by their mode too: "vqcode_256", "vqcode_fit720"; a dataset's are in its manifest."""
_COLUMN = "vqcode_"
MAX_COLUMN_BYTES = 31
"""With a key, two dots and "npy" 100 bytes: what fits the name of a ustar header."""
NAME_ALPHABET = frozenset("0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ_-")
"""Characters of keys and of code columns."""

_SIZES = range(1, (1 << 32) + 1)
_Size = Annotated[int, _SIZES]
_Dtype = Literal["uint8", "uint16", "uint32", "uint64", "bfloat16", "float16", "float32"]
_NPY_DTYPES = dict(zip(get_args(_Dtype), ("|u1", "<u2", "<u4", "<u8", "<u2", "<f2", "<f4"), strict=True))
_AXES = {"h": "height", "w": "width", "k": "codebook", "n": "number", "t": "frame"}
Codes = NDArray[np.unsignedinteger[Any]]
Shape = tuple[int, ...]
_Value = TypeVar("_Value")


@dataclass(frozen=True, kw_only=True)
class CodeGrid:
    """How the codes of one image lie in an array, and those of several images in one: what a column's provenance declares.

    Raises:
        UsageError: a layout of other than one to four different lower-case letters; a dtype that codes can't have;
            floats with a codebook, an empty list, or a codebook of no entries or more than 2**32.
    """

    layout: str = "hw"
    """A letter for each axis of an image's array, the first axis first."""
    codebook_size: _Size | tuple[_Size, ...] | None = None
    """Entries of the codebook; a tuple: those of each, along the last axis. None: it is not known, or there is none."""
    dtype: _Dtype | None = None
    """Type of the numbers, of bfloat16 the bit patterns as uint16. None: uint16 or uint32, as the codebook needs."""

    def __post_init__(self) -> None:
        if not re.fullmatch("[a-z]{1,4}", self.layout) or len({*self.layout}) < len(self.layout):
            raise UsageError(f"layout {self.layout[:40]!r}: expected 1 to 4 different letters, one an axis, as hw, n or hwk")
        if self.dtype is not None and self.dtype not in _NPY_DTYPES:
            raise UsageError(f"dtype={self.dtype!r:.40}, expected one of {', '.join(_NPY_DTYPES)}")
        if self.codebook_size == () or (self.sizes and self.is_float):
            raise UsageError(f"codebook_size={self.codebook_size!r}: expected one or more with codes, and none with floats")
        if not all(isinstance(size, int) and size in _SIZES for size in self.sizes):
            raise UsageError(f"codebook_size={self.codebook_size!r:.40}, expected 1 to 2**32 entries, or several such numbers")

    def __str__(self) -> str:
        runs = [(size, len(list(run))) for size, run in groupby(self.sizes)]
        size = " + ".join(f"{number} x {size:,}" if number > 1 else f"{size:,}" for size, number in runs)
        what = f"{size} codes" if size else self.dtype or "codes of unknown number"
        return what if self.layout == HW.layout else f"{what} ({self.layout})"

    @property
    def axes(self) -> str:
        """Names of its axes."""
        return ", ".join(_AXES.get(letter, letter) for letter in self.layout)

    @property
    def sizes(self) -> tuple[int, ...]:
        """Entries of each codebook; none if it is not known, or there is none."""
        size = self.codebook_size
        return size if isinstance(size, tuple) else () if size is None else (size,)

    @property
    def is_float(self) -> bool:
        """Whether it is floats in place of codes."""
        return self.dtype in ("bfloat16", "float16", "float32")

    @property
    def is_sequence(self) -> bool:
        """Whether codes have one order in which they can be ids of a text: raster, or as they stand."""
        return self.layout in ("hw", "n") and not self.is_float

    @property
    def has_sides(self) -> bool:
        """Whether the first two axes are height and width, so that a stride says how many pixels they are."""
        return self.layout.startswith("hw")

    @property
    def declared(self) -> dict[str, str]:
        """What provenance says of it beside its codebook; nothing of what all columns were once."""
        return {name: value for name in ("layout", "dtype") if (value := getattr(self, name)) != getattr(HW, name)}

    @property
    def schema_version(self) -> int:
        """The schema of samples that knows such arrays."""
        return 2 if self.declared or isinstance(self.codebook_size, tuple) else 1

    @property
    def npy_dtype(self) -> np.dtype[Any]:
        """Type of the arrays as they are written."""
        return np.dtype(_NPY_DTYPES[self.dtype]) if self.dtype else code_dtype(max(self.sizes, default=1))

    def check(self, column: str, codes: NDArray[Any], *, is_joined: bool) -> None:
        """Raise FormatError unless this may be the array of a code column.

        Args:
            column: what the message names.
            codes: the array.
            is_joined: whether it holds the grids of several images, which may be none: see `check_shapes`.
        """
        types = (_NPY_DTYPES[self.dtype],) if self.dtype else ("<u2", "<u4")
        num_axes = len(self.layout)
        if not (codes.ndim == num_axes if is_joined else self.is_shape(codes.shape)) or codes.dtype.str not in types:
            several = f" with {len(self.sizes)} codebooks on its last axis" if len(self.sizes) > 1 else ""
            raise FormatError(
                f"{column} is {codes.dtype.str} {codes.shape}, expected a non-empty {num_axes}-D grid of "
                f"{' or '.join(types)}{several}"
            )

    def check_values(self, name: str, codes: NDArray[Any]) -> None:
        """Raise FormatError, which begins with `name`, if a code is not an index of its codebook, or a float no number."""
        for called, codes_N, size in self.by_codebook(name, codes):
            if size is not None:
                check_range(called, codes_N, size)
        if num_bad := codes.size - int(self.are_numbers(codes).sum()):
            raise FormatError(f"{name}: {num_bad} of {codes.size} {self.dtype} numbers are NaN or infinite")

    def are_numbers(self, codes: NDArray[Any]) -> NDArray[np.bool_]:
        """Which are neither NaN nor infinite, of an array as it is stored."""
        return np.asarray((codes & 0x7F80) != 0x7F80 if self.dtype == "bfloat16" else np.isfinite(codes))

    def by_codebook(self, name: str, codes: NDArray[Any]) -> Iterator[tuple[str, Codes, int | None]]:
        """The codes of each codebook: what to call it, (N,) codes as a view, and its size. Nothing of numbers without one."""
        sizes = self.sizes or ((None,) if self.dtype is None else ())
        for number, size in enumerate(sizes):
            called = f"{name} codebook {number}" if len(sizes) > 1 else name
            yield called, codes.reshape(-1, len(sizes))[:, number], size

    def cells(self, codes: NDArray[Any]) -> Codes:
        """The codes of one image as rows and columns, to be drawn: the first axis as rows, all others side by side; of one axis
        one row. Raises FormatError: they are floats."""
        if self.is_float:
            raise FormatError(f"{' x '.join(map(str, codes.shape))} numbers of {self}: no codes, so they are not drawn")
        return codes.reshape(1 if codes.ndim == 1 else codes.shape[0], -1)

    def check_shapes(self, column: str, codes: NDArray[Any], shapes: Any) -> None:
        """Raise FormatError unless an array holds the grids of several images of these shapes, which come from JSON."""
        if not isinstance(shapes, list | tuple) or not all(map(self.is_shape, shapes)):
            raise FormatError(f"the grids of {column} are {shapes!r}, expected a list of [{self.axes}]")
        expected = self.joined_shape(shapes)
        if codes.shape != expected:
            raise FormatError(f"{column} has the shape {codes.shape}, its {len(shapes)} grids {shapes!r} need {expected}")

    def shapes_of(self, column: str, codes: NDArray[Any], shapes: Any) -> list[Shape]:
        """The shape of each grid in an array. Raises FormatError.

        Args:
            column: what the message names.
            codes: the array; of any unsigned type if the column declares nothing.
            shapes: see `check_shapes`; None: the array is one grid.
        """
        if codes.dtype.kind == "f" or self.schema_version > 1:
            self.check(column, codes, is_joined=shapes is not None)
        if shapes is None:
            if codes.ndim != len(self.layout):
                raise FormatError(f"{column} has the shape {codes.shape}, expected ({self.axes})")
            return [codes.shape]
        self.check_shapes(column, codes, shapes)
        return list(map(tuple, shapes))

    def joined_shape(self, shapes: Sequence[Sequence[int]]) -> Shape:
        """The shape of the array that holds several images' grids: that of the only one, else one line of them end to end."""
        return tuple(shapes[0]) if len(shapes) == 1 else (*(1,) * (len(self.layout) - 1), sum(map(math.prod, shapes)))

    def is_shape(self, value: Any) -> bool:
        """Whether a value of JSON is the shape of a grid."""
        is_list = isinstance(value, list | tuple) and len(value) == len(self.layout)
        has_codebooks = len(self.sizes) < 2 or (is_list and value[-1] == len(self.sizes))
        return is_list and has_codebooks and all(type(side) is int and side > 0 for side in value)


HW = CodeGrid()
"""What a column is that declares nothing."""
NO_LAYOUTS: Mapping[str, CodeGrid] = {}  # a plain dict: it goes to worker processes


def join_grids(grids: Sequence[Codes], dtype: np.dtype[Any], layout: CodeGrid = HW) -> tuple[Codes, list[list[int]]]:
    """The codes of several images as a sample holds them, and the shape of each: see Sample.grids."""
    shapes = [list(grid.shape) for grid in grids]
    flat = np.concatenate([np.empty(0, dtype), *(grid.reshape(-1) for grid in grids)])
    return flat.reshape(layout.joined_shape(shapes)), shapes


def split_grids(codes: Codes, shapes: Sequence[Sequence[int]]) -> list[Codes]:
    """Grids that lie end to end, apart again, as views: see Sample.grids."""
    flat = codes.reshape(-1)
    ends = accumulate(map(math.prod, shapes))
    return [flat[end - math.prod(shape) : end].reshape(shape) for end, shape in zip(ends, shapes, strict=True)]


def code_dtype(codebook_size: int) -> np.dtype[np.unsignedinteger[Any]]:
    """The on-disk dtype of codes in [0, codebook_size): uint16 up to 65,536 entries, uint32 above (little-endian)."""
    if not 0 < codebook_size <= 1 << 32:
        raise FormatError(f"codebook_size={codebook_size} is not in 1 ... 2**32")
    return np.dtype("<u2" if codebook_size <= 1 << 16 else "<u4")


def check_range(name: str, codes: Codes, codebook_size: int) -> None:
    """Raise FormatError, which begins with `name`, if a code is not an index of the codebook."""
    if (highest := int(codes.max(initial=0))) >= codebook_size:
        raise FormatError(f"{name} holds the code {highest}; the codebook has {codebook_size} entries")


def is_code_column(name: str) -> bool:
    """Whether a member (without ".npy") or field of this name holds codes."""
    return name.startswith(_COLUMN)


def check_column(column: str) -> None:
    """Raise FormatError unless this can be the name of a code column."""
    if not is_code_column(column) or len(column) > MAX_COLUMN_BYTES or not NAME_ALPHABET.issuperset(column):
        raise FormatError(
            f"code column {column[:80]!r}: expected 'vqcode_' and letters, digits, '_' or '-', at most {MAX_COLUMN_BYTES} in all"
        )


def named_column(column: str, code_set: str) -> str:
    """A column in a code set: "vqcode_512" in "emu3" is "vqcode_512-emu3", and in "" itself.

    Raises:
        FormatError: the name is too long, or has other characters than letters, digits, '_' and '-'.
    """
    if not code_set:
        return column
    longest = MAX_COLUMN_BYTES - max(map(len, (column, *CODE_COLUMNS))) - 1
    if len(code_set) > longest or not NAME_ALPHABET.issuperset(code_set) or is_code_column(code_set):
        raise FormatError(
            f"{code_set!r} can't name a code set beside {column}: expected at most {longest} letters, digits, '_' or '-', and "
            f"another beginning than {_COLUMN}"
        )
    return f"{column}-{code_set}"


def codes_named(codes: Mapping[str, _Value], choice: str) -> dict[str, _Value]:
    """`chosen_codes`, under the columns' plain names."""
    return {column.partition("-")[0]: value for column, value in chosen_codes(codes, choice).items()}


def chosen_codes(codes: Mapping[str, _Value], choice: str | None) -> dict[str, _Value]:
    """Of values by column those that were chosen.

    Args:
        codes: the values.
        choice: a code set, "" or "emu3"; or columns, "vqcode_256" or "vqcode_512,vqcode_fit720-emu3"; None: the set of the first
            column.
    """
    if choice is not None and is_code_column(choice):
        wanted = choice.split(",")
        return {column: value for column, value in codes.items() if column in wanted}
    if choice is None:
        choice = next(iter(codes), "").partition("-")[2]
    return {column: value for column, value in codes.items() if column.partition("-")[2] == choice}


def is_square(column: str) -> bool:
    """Whether images of this column are squares of one size, as its name says: "vqcode_512-emu3"."""
    return column.partition("-")[0].removeprefix(_COLUMN).isdecimal()
