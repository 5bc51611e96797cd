"""The crop: an image's size and a target in, the size to scale it to and the box to keep of that out. No pixels here.

Integers only. Invariant: `box` has the target's size and lies inside `resize`, centred with offsets rounded down. For a square
the shorter side of `resize` is exactly its side, the longer one floor(long * side / short). That is what int(long / (short /
512)) gives for every side up to 65,535 (tried one by one), without the route over floats: 512 / short, rounded first,
yields 511 for one side in seven (49, 98, 103, ...), and the crop then ends in a black line.
"""

from typing import NamedTuple

from wds_tools.errors import Reject, UsageError


class Crop(NamedTuple):
    """How to bring one image to its final size: scale the whole of it to `resize`, then keep `box`.

    Args:
        resize: (width, height) in pixels after scaling.
        box: (left, top, right, bottom) in pixels of the scaled image; right and bottom are exclusive.
    """

    resize: tuple[int, int]
    box: tuple[int, int, int, int]

    @property
    def size(self) -> tuple[int, int]:
        """(width, height) in pixels of what is left after the crop."""
        left, top, right, bottom = self.box
        return right - left, bottom - top

    def enlarges(self, width: int, height: int) -> bool:
        """Whether it scales an image of this size, in pixels, up."""
        return self.resize[0] > width or self.resize[1] > height


def cover(width: int, height: int, target_width: int, target_height: int) -> Crop:
    """Scale an image until it just covers a target, and cut the target out of its centre.

    Args:
        width, height: the image, in pixels, at least 1.
        target_width, target_height: what to end with, in pixels, at least 1.

    Returns:
        The Crop: one side of `resize` equals the target's, the other is at least the target's and rounded down.

    Raises:
        UsageError: a side below 1.
    """
    if min(width, height, target_width, target_height) < 1:
        raise UsageError(f"sides must be at least 1 pixel, got {width}x{height} for {target_width}x{target_height}")
    if width * target_height >= height * target_width:  # wider than the target: the heights meet
        resize = (width * target_height // height, target_height)
    else:
        resize = (target_width, height * target_width // width)
    left = (resize[0] - target_width) // 2
    top = (resize[1] - target_height) // 2
    return Crop(resize, (left, top, left + target_width, top + target_height))


def check_ratio(width: int, height: int, limit: float = 2.0) -> None:
    """Refuse an image that is too long for its width; one that is exactly at the limit passes.

    Args:
        width, height: the image as displayed, in pixels.
        limit: the longer side may be this many times the shorter one.

    Raises:
        Reject: reason "aspect_ratio".
    """
    long, short = max(width, height), min(width, height)
    if long > limit * short:
        raise Reject("aspect_ratio", f"{width}x{height}: the longer side is more than {limit:g} times the shorter one")
