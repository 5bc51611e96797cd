"""The multi-ratio crop: an image's size in, the nearest of the shapes of about N x N pixels out. No pixels here.

The table: sides are multiples of a patch, at most (N // patch)^2 of them, longer side at most four times the
shorter. For each width the tallest height that fits; then sizes that another one contains are dropped (29 x 19 patches fits into
30 x 19). With every size its transpose is left. For 768 these are 25 sizes from 384 x 1536 over 768 x 768 to 1536 x 384, all of
560 to 576 patches of 32 x 32 pixels.

The choice: least |log(image ratio) - log(target ratio)|. Between two neighbours the border is the geometric mean of
their ratios, so comparing (W/H)^2 with the product of the two, crosswise in integers, is exact. An image on a border, which 768
does not have, takes the squarer of the two, so a turned image takes the turned target. Inside the table of 768 no image loses
more than 1/12 of a side, plus a pixel of rounding. Cost: under 10 us, and a table once.
"""

from functools import cache
from itertools import pairwise
from typing import Final

PATCH: Final = 32
MAX_ASPECT: Final = 4

Shapes = tuple[tuple[int, int], ...]


def patch_of(stride: int) -> int:
    """Pixels of which sides are multiples, for a tokenizer of this stride: 32, so that strides of 8, 16 and 32 share a table."""
    return PATCH if PATCH % stride == 0 else 2 * stride


@cache
def shapes(side: int, patch: int = PATCH) -> Shapes:
    """The table.

    Args:
        side: N, in pixels, at least a patch.
        patch: what sides are multiples of, in pixels.

    Returns:
        (width, height) in pixels, from the tallest to the widest.
    """
    n = side // patch
    fits = [(w, h) for w in range(1, 2 * n + 1) if max(w, h := n * n // w) <= MAX_ASPECT * min(w, h)]
    return tuple((w * patch, h * patch) for (w, h), (_, next_h) in pairwise([*fits, (0, 0)]) if h != next_h)


def nearest_shape(width: int, height: int, table: Shapes) -> tuple[int, int]:
    """The shape whose aspect ratio is nearest to the image's, in log space.

    Args:
        width, height: the image as displayed, in pixels, at least 1.
        table: of `shapes`.

    Returns:
        (width, height) in pixels.
    """
    for (low_w, low_h), (high_w, high_h) in pairwise(table):
        image, middle = width * width * low_h * high_h, height * height * low_w * high_w
        if image < middle or (image == middle and low_w >= low_h):
            return low_w, low_h
    return table[-1]
