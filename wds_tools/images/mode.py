"""What an image is brought to before it is tokenized: the modes `ccN`, `multiN` and `fitN`, of N = 64 ... 4096 pixels.

    word ── parse_mode ──▶ Mode ── at (stride) ──▶ crop_for (width, height) ──▶ Crop

| family | size | shapes that it takes | data type of a pair |
|---|---|---|---|
| cc | the centre square of N x N | up to 2 : 1 | image_text |
| multi | the nearest of the shapes of about N x N pixels (`ratio`) | up to 4.2 : 1 | image_text_multi |
| fit | its own, at most N x N pixels of area (`fit`) | the same | image_text_multi |

Which images a family takes depends on their shape alone, so a converter needs no tokenizer. Invariant: a mode is read from its
word here, and the name of its column made of it here, and nowhere else; sides are multiples of the stride. No pixels.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Final, Literal, TypeAlias, cast

from wds_tools.errors import UsageError, meant
from wds_tools.images.crop import Crop, check_ratio, cover
from wds_tools.images.fit import LEAST_STRIDES, fit
from wds_tools.images.ratio import nearest_shape, patch_of, shapes

Family: TypeAlias = Literal["cc", "multi", "fit"]
LEAST_SIDE, MOST_SIDE = 64, 4096
DEFAULT_STRIDE: Final = 16
_DATA_TYPES: Final[Mapping[Family, str]] = {"cc": "image_text", "multi": "image_text_multi", "fit": "image_text_multi"}
# An image may be 5 % longer than the 4:1 of the longest shapes: a 1600 x 399 picture is a 4:1 one without its last row. It then
# loses less than images inside the table of 768 do, where half a step is up to 8.7 %. What one of the two takes, the other does.
MAX_RATIO: Final[Mapping[Family, float]] = {"cc": 2.0, "multi": 4.2, "fit": 4.2}
_WORD = re.compile("(cc|multi|fit)([1-9][0-9]{1,3})")
_COLUMN = "vqcode_"


@dataclass(frozen=True)
class Mode:
    """How images are brought to the size that their codes are made from."""

    family: Family
    side: int
    """N, in pixels."""
    stride: int = DEFAULT_STRIDE
    """Of the tokenizer: pixels of a side for each code."""
    min_pixels: int = 0
    """With fit: smaller images are enlarged to this area."""

    def __str__(self) -> str:
        return f"{self.family}{self.side}"

    @property
    def data_type(self) -> str:
        """Of a pair whose image is brought to its size so."""
        return _DATA_TYPES[self.family]

    @property
    def column(self) -> str:
        """Where its codes go: "vqcode_512", "vqcode_multi768"."""
        return f"{_COLUMN}{'' if self.family == 'cc' else self.family}{self.side}"

    def at(self, tokenizer: str, stride: int, min_pixels: int = 0) -> Mode:
        """This mode for a tokenizer.

        Raises:
            UsageError: the tokenizer can't take these sizes, or min_pixels has no place in them.
        """
        if self.side % stride:
            raise UsageError(
                f"mode {self}: {self.side} px is not a multiple of {stride}, the stride of tokenizer {tokenizer}: "
                f"take {self.family}{self.side // stride * stride} or {self.family}{-(-self.side // stride) * stride}"
            )
        least = {"cc": stride, "multi": patch_of(stride), "fit": LEAST_STRIDES * stride}[self.family]
        if self.side < least:
            raise UsageError(
                f"mode {self}: {self.family} takes {least} px at least with stride {stride}, of tokenizer {tokenizer}"
            )
        if not 0 <= min_pixels <= self.side**2:
            raise UsageError(f"--min-pixels {min_pixels}: expected 0 to {self.side**2} with {self}")
        return replace(self, stride=stride, min_pixels=min_pixels)

    def crop_for(self, width: int, height: int) -> Crop:
        """How it brings an image of this size, as displayed, to its final one. Small images are scaled up, if need be.

        Raises:
            Reject: reason "aspect_ratio": the family does not take images of this shape.
            UsageError: a side below 1.
        """
        if min(width, height) < 1:
            raise UsageError(f"sides must be at least 1 pixel, got {width}x{height}")
        check_ratio(width, height, MAX_RATIO[self.family])
        match self.family:
            case "cc":
                target = self.side, self.side
            case "multi":
                target = nearest_shape(width, height, shapes(self.side, patch_of(self.stride)))
            case "fit":
                target = fit(width, height, self.side, self.stride, self.min_pixels)
        return cover(width, height, *target)


def parse_mode(word: str) -> Mode:
    """The mode that a word names, for any tokenizer yet: see `Mode.at`.

    Raises:
        UsageError: it names none.
    """
    match = _WORD.fullmatch(word)
    if match is None or not LEAST_SIDE <= int(match[2]) <= MOST_SIDE:
        size = re.sub("[^0-9]", "", word).lstrip("0")[:4]
        fits = size.isdecimal() and LEAST_SIDE <= int(size) <= MOST_SIDE
        close = meant(word[:40], (f"{family}{size}" for family in MAX_RATIO)) if fits else ""
        sizes = f"{LEAST_SIDE} to {MOST_SIDE} pixels"
        raise UsageError(f"mode {word[:40]!r}: {close}expected cc, multi or fit with {sizes}, as cc512, multi768 or fit720")
    return Mode(cast(Family, match[1]), int(match[2]))


def mode_of_column(column: str) -> Mode:
    """The mode that a code column is named by, whatever its code set. Raises UsageError if it is none."""
    word = column.partition("-")[0].removeprefix(_COLUMN)
    return parse_mode(f"cc{word}" if word.isdecimal() else word)
