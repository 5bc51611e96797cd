"""The multi-ratio crop: an image's size in, the nearest of 25 target sizes and the way there out. No pixels here.

The table: sides are multiples of 32, at most 576 patches of 32 x 32 (the area of 768 x 768), longer side at most four
times the shorter. For each width the tallest height that fits; then sizes that another one contains are dropped (29 x
19 patches fits into 30 x 19). What is left are 25 sizes from 384 x 1536 over 768 x 768 to 1536 x 384, all of 560 to 576
patches, and with every size its transpose.

The choice: least |log(image ratio) - log(target ratio)|. Between two neighbours the border is the geometric mean of
their ratios, so comparing (W/H)^2 with the product of the two, crosswise in integers, is exact. No image lies on a
border (all of these means are irrational), so there are no ties, and a turned image takes the turned target. Inside the
table no image loses more than 1/12 of a side, plus a pixel of rounding. Cost: under 10 us.
"""

from itertools import pairwise
from typing import Final

from wds_tools.errors import Reject, UsageError
from wds_tools.images.crop import Crop, cover

PATCH: Final = 32  # pixels; every side is a multiple, so that strides of 8, 16 and 32 all fit
MAX_PATCHES: Final = (768 // PATCH) ** 2  # 576
MAX_ASPECT: Final = 4

# An image may be longer than 4:1 by this much and still take the 4:1 target: a 1600 x 399 picture is a 4:1 one without
# its last row. At 5 % it loses less than images inside the table do, where half a step is up to 8.7 %.
ASPECT_TOLERANCE_PERCENT: Final = 5


def _table() -> tuple[tuple[int, int], ...]:
    fits = [(w, MAX_PATCHES // w) for w in range(1, MAX_PATCHES + 1)]
    fits = [(w, h) for w, h in fits if max(w, h) <= MAX_ASPECT * min(w, h)]
    largest = [a for a in fits if not any(a != b and a[0] <= b[0] and a[1] <= b[1] for b in fits)]
    return tuple((w * PATCH, h * PATCH) for w, h in largest)


TARGETS: Final = _table()  # (width, height) in pixels, from the tallest to the widest


def nearest_target(width: int, height: int) -> tuple[int, int]:
    """The target whose aspect ratio is nearest to the image's, in log space.

    Args:
        width, height: the image as displayed, in pixels, at least 1.

    Returns:
        One of TARGETS, (width, height) in pixels.
    """
    for (low_w, low_h), (high_w, high_h) in pairwise(TARGETS):
        image, middle = width * width * low_h * high_h, height * height * low_w * high_w
        if image < middle:  # never equal
            return low_w, low_h
    return TARGETS[-1]


def multi768(width: int, height: int) -> Crop:
    """Scale to cover the nearest target size and cut that out of the centre.

    Args:
        width, height: the image as displayed, in pixels, at least 1.

    Returns:
        The Crop; its size is one of TARGETS. Small images are scaled up.

    Raises:
        Reject: reason "aspect_ratio", when the image is longer than 4.2 : 1 (4 : 1 and the tolerance).
        UsageError: a side below 1.
    """
    if min(width, height) < 1:
        raise UsageError(f"sides must be at least 1 pixel, got {width}x{height}")
    if max(width, height) * 100 > MAX_ASPECT * (100 + ASPECT_TOLERANCE_PERCENT) * min(width, height):
        raise Reject(
            "aspect_ratio",
            f"{width}x{height}: the longer side is more than {MAX_ASPECT} times the shorter one"
            f" (and the tolerance of {ASPECT_TOLERANCE_PERCENT} %)",
        )
    return cover(width, height, *nearest_target(width, height))
