"""What the codes of an image are: the array that holds them, its type, and the columns that it is stored in.

    (h, w) of each image ── join_grids ──▶ (1, sum of h x w) and [h, w] of each ── split_grids ──▶ (h, w) of each image

Codes are raw codebook indices in row-major order, uint16 or uint32 as the codebook needs, never shifted into a text tokenizer's
ids. A column is named by the mode of its images, and by its code set where it has one: "vqcode_512-emu3". Invariant: no other
module knows the axes of a layout, or which types codes have; a layout is an entry of LAYOUTS. No torch, no I/O.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from wds_tools.errors import FormatError

CODE_COLUMNS = ("vqcode_512", "vqcode_multi768")
"""Those of Liquid's rows. Others are named by their mode too: "vqcode_256", "vqcode_fit720"; a dataset's are in its manifest."""
_COLUMN = "vqcode_"
MAX_COLUMN_BYTES = 31
"""With a key, two dots and "npy" 100 bytes: what fits the name of a ustar header."""
NAME_ALPHABET = frozenset("0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ_-")
"""Characters of keys and of code columns."""

Codes = NDArray[np.unsignedinteger[Any]]
Shape = tuple[int, ...]
_Value = TypeVar("_Value")


@dataclass(frozen=True)
class CodeGrid:
    """How the codes of one image lie in an array, and those of a conversation's images in one."""

    axes: tuple[str, ...]
    """Names of the dimensions of a grid."""
    dtypes: tuple[str, ...]
    """Types that codes may have on disk."""

    def check(self, column: str, codes: NDArray[Any], *, is_joined: bool) -> None:
        """Raise FormatError unless this may be the array of a code column.

        Args:
            column: what the message names.
            codes: the array.
            is_joined: whether it holds a conversation's grids, which may be none: see `check_shapes`.
        """
        num_axes = len(self.axes)
        if codes.ndim != num_axes or (codes.size == 0 and not is_joined) or codes.dtype.str not in self.dtypes:
            raise FormatError(
                f"{column} is {codes.dtype.str} {codes.shape}, expected a non-empty {num_axes}-D grid of "
                f"{' or '.join(self.dtypes)}"
            )

    def check_shapes(self, column: str, codes: NDArray[Any], shapes: Any) -> None:
        """Raise FormatError unless an array holds a conversation's grids of these shapes, which come from JSON."""
        if not isinstance(shapes, list | tuple) or not all(map(self.is_shape, shapes)):
            raise FormatError(f"the grids of {column} are {shapes!r}, expected a list of [{', '.join(self.axes)}]")
        expected = self.joined_shape(shapes)
        if codes.shape != expected:
            raise FormatError(f"{column} has the shape {codes.shape}, its {len(shapes)} grids {shapes!r} need {expected}")

    def shapes_of(self, column: str, codes: NDArray[Any], shapes: Any) -> list[Shape]:
        """The shape of each grid in an array. Raises FormatError.

        Args:
            column: what the message names.
            codes: the array, of any unsigned type.
            shapes: see `check_shapes`; None: the array is one grid.
        """
        if shapes is None:
            if codes.ndim != len(self.axes):
                raise FormatError(f"{column} has the shape {codes.shape}, expected ({', '.join(self.axes)})")
            return [codes.shape]
        self.check_shapes(column, codes, shapes)
        return list(map(tuple, shapes))

    def joined_shape(self, shapes: Sequence[Sequence[int]]) -> Shape:
        """The shape of the array that holds a conversation's grids: that of the only one, else one line of them end to end."""
        return tuple(shapes[0]) if len(shapes) == 1 else (*(1,) * (len(self.axes) - 1), sum(map(math.prod, shapes)))

    def is_shape(self, value: Any) -> bool:
        """Whether a value of JSON is the shape of a grid."""
        is_list = isinstance(value, list | tuple) and len(value) == len(self.axes)
        return is_list and all(type(side) is int and side > 0 for side in value)


LAYOUTS = {"hw": CodeGrid(("height", "width"), ("<u2", "<u4"))}
"""Layout -> what it is. Columns do not say yet which they have: all are HW."""
HW = LAYOUTS["hw"]


def join_grids(grids: Sequence[Codes], dtype: np.dtype[Any], layout: CodeGrid = HW) -> tuple[Codes, list[list[int]]]:
    """The codes of a conversation's images as a sample holds them, and the shape of each: see Sample.grids."""
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
