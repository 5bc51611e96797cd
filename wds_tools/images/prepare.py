"""Encoded image bytes in, the pixels that a tokenizer sees out: decode, scale with LANCZOS, crop.

Invariant: the same bytes give the same pixels, on any machine with the same Pillow: nothing is random, and no shortcut
is taken that changes a pixel (each is named below, with what it changes). PREPROCESSING_VERSION goes into the manifest
and changes whenever pixels do. Cost: a 640 x 480 JPEG about 9 ms on one core, a quarter of it decoding; the
GIL is released in either part, so threads scale.
"""

from typing import Final

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from wds_tools.images.crop import Crop
from wds_tools.images.decode import DEFAULT_LIMITS, ImageLimits, decode_rgb
from wds_tools.images.mode import Mode, parse_mode

PREPROCESSING_VERSION: Final = "1"


def prepare(data: bytes, mode: Mode | str | int | None, limits: ImageLimits = DEFAULT_LIMITS) -> NDArray[np.uint8]:
    """Decode an image and bring it to the size that its codes are made from.

    Args:
        data: the encoded image, of a format of `FORMATS`.
        mode: a Mode, or its word, such as "cc512"; a number: a centre square of so many pixels a side, from 1 on, as cc is; None:
            the whole image as it is.
        limits: what the image may be.

    Returns:
        Pixels (H, W, 3), uint8, RGB, contiguous and writable.

    Raises:
        Reject: reason "aspect_ratio", or one of REASONS.
        UsageError: an unknown mode.
    """
    # No draft(): libjpeg then decodes at 1/2, 1/4 or 1/8, faster for large photographs, but its box filter with LANCZOS
    # behind it does not give the pixels that LANCZOS gives on the whole image.
    image = decode_rgb(data, limits)
    # np.array, not asarray: a copy, as asarray's is read-only and torch.from_numpy warns about that.
    return np.array(image if mode is None else _resize_and_crop(image, crop_for(mode, *image.size)))


def crop_for(mode: Mode | str | int, width: int, height: int) -> Crop:
    """How a mode, as `prepare` takes it, brings an image of this size to its final one. Raises as `Mode.crop_for`."""
    mode = Mode("cc", mode) if isinstance(mode, int) else mode
    return (parse_mode(mode) if isinstance(mode, str) else mode).crop_for(width, height)


def _resize_and_crop(image: Image.Image, crop: Crop) -> Image.Image:
    # Pillow filters along the rows, rounds to 8 bits, then filters along the columns. So columns that the crop takes
    # away can go in between: the same pixels as one resize and one crop (a test compares them), in a tenth less time.
    # No resize(box=...) of the kept part: that shifts the filter, and real photographs differ by up to 14 levels.
    # No reducing_gap: it averages first, which is another filter.
    left, top, right, bottom = crop.box
    image = image.resize((crop.resize[0], image.height), Image.Resampling.LANCZOS)
    image = image.crop((left, 0, right, image.height))
    image = image.resize((right - left, crop.resize[1]), Image.Resampling.LANCZOS)
    return image.crop((0, top, right - left, bottom))
