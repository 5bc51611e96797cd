"""Encoded image bytes in, an upright opaque RGB image out, or a Reject that says why not.

Invariant: for ANY bytes the outcome is an image or a Reject with a reason of REASONS: no other exception, no warning,
nothing global changed. The format is found by content, never by a name, and only those of FORMATS are tried, so that
no other Pillow plugin (EPS starts ghostscript) is ever reached. Sizes are checked after the header is read and before a
pixel is. Colour profiles are not applied, as in the reference.

Cost: probe about 0.03 ms; decode_rgb what Pillow's decoder takes, with the GIL released. Memory: the data and,
measured at the peak, 8 bytes a pixel, 13 with transparency or 16-bit samples, 16 to 20 for WebP; so max_pixels bounds
it, to 4 GiB by default.
"""

import io
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final, TypeVar

import numpy as np

from wds_tools.errors import MissingPackage, Reject, UsageError
from wds_tools.images import damage
from wds_tools.images.quiet import quietly

try:
    # The last two are named since Image.open would otherwise import every plugin there is to find TIFF and WebP.
    from PIL import Image, ImageFile, TiffImagePlugin, UnidentifiedImageError, WebPImagePlugin, features  # noqa: F401

    from wds_tools.images.jpeg import load_jpeg
except ImportError as error:
    raise MissingPackage("reading images needs Pillow: pip install 'wds-tools[convert]'") from error

# Pillow logs some damage as an error, which Python prints where nobody has set up logging; the Reject says it already.
logging.getLogger("PIL").addHandler(logging.NullHandler())

REASONS: Final = (
    "empty_image",  # zero bytes
    "not_an_image",  # an HTML page, a Git LFS pointer, SVG, text, random bytes
    "unsupported_format",  # an image, but not of FORMATS, or of a kind (float samples, ...) that has no RGB meaning
    "truncated_image",  # the end is missing
    "corrupt_image",  # damaged, or never was right
    "too_many_pixels",  # more than limits.max_pixels, or than the memory there is
    "too_small",  # a side below limits.min_side
    "too_many_bytes",  # more than limits.max_bytes, or text chunks that inflate beyond Pillow's limit
)

HAS_AVIF: Final = "avif" in features.modules and features.check("avif")
"""Whether this Pillow reads AVIF: from 11.3 on, where it was built with libavif."""
if HAS_AVIF:
    from PIL import AvifImagePlugin  # noqa: F401
# MPO is a JPEG with more behind it, and read as one
FORMATS: Final = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", *(["AVIF"] if HAS_AVIF else []))
_EXTENSIONS: Final = {"JPEG": "jpg", "PNG": "png", "WEBP": "webp", "GIF": "gif", "BMP": "bmp", "TIFF": "tif", "AVIF": "avif"}

PILLOW_MAX_PIXELS: Final = 2 * (1024**3 // 4 // 3)  # 178,956,970: twice Image.MAX_IMAGE_PIXELS as Pillow ships it
_ORIENTATION, _TILE_WIDTH, _TILE_HEIGHT, _PHOTOMETRIC, _BITS = 274, 322, 323, 262, 258  # EXIF and TIFF tags
_UPRIGHT: Final = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
Result = TypeVar("Result")


@dataclass(frozen=True, kw_only=True)
class ImageLimits:
    """What an image may be. Outside of it the image is rejected before a pixel is decoded."""

    max_pixels: int = PILLOW_MAX_PIXELS
    """Width x height. The default is the most that Pillow itself opens: half a GiB of RGB."""
    min_side: int = 16
    """Pixels of the shorter side. Below 16 there are fewer pixels than one code of a stride-16 tokenizer covers."""
    max_bytes: int = 256 * 1024**2
    """Bytes of the encoded image; no picture within max_pixels needs more, and it is held in memory."""

    def __post_init__(self) -> None:
        if not 1 <= self.max_pixels <= PILLOW_MAX_PIXELS:
            raise UsageError(
                f"max_pixels={self.max_pixels} is not within 1 and {PILLOW_MAX_PIXELS}: "
                "beyond that Pillow refuses by itself, so a larger limit would have no effect"
            )
        if self.min_side < 1 or self.max_bytes < 1:
            raise UsageError(f"min_side={self.min_side} and max_bytes={self.max_bytes} must be at least 1")


DEFAULT_LIMITS: Final = ImageLimits()


@dataclass(frozen=True)
class ImageInfo:
    """What the header of an image says."""

    format: str
    """One of FORMATS."""
    extension: str
    """The member name's end in a shard: "jpg", "png", "webp", "gif", "bmp", "tif" or "avif"."""
    width: int
    """Pixels, as displayed: after the EXIF orientation."""
    height: int
    """Pixels, as displayed."""
    orientation: int = 1
    """EXIF orientation, 1 to 8; 1 where there is none or it can't be read."""


def probe(data: bytes, limits: ImageLimits = DEFAULT_LIMITS) -> ImageInfo:
    """Read the header only; says nothing about the pixels, which may still turn out to be damaged.

    Args:
        data: the encoded image.
        limits: what the image may be.

    Returns:
        The ImageInfo. A PNG that states its orientation behind the pixels is reported as stored (orientation 1).

    Raises:
        Reject: with a reason of REASONS.
    """

    def work() -> ImageInfo:
        image = _open(data, limits)
        kind = _format(image)
        orientation = _orientation(image)
        width, height = image.size
        # Pillow's size of a TIFF is turned already if the orientation is a tag of the TIFF itself (and not in its XMP).
        if orientation >= 5 and _ORIENTATION not in _tiff_tags(image):
            width, height = height, width
        return ImageInfo(kind, _EXTENSIONS[kind], width, height, orientation)

    return _guarded(data, work)


def decode_rgb(data: bytes, limits: ImageLimits = DEFAULT_LIMITS) -> Image.Image:
    """Decode fully: first frame, turned upright, transparency blended on white, 8 bits of red, green and blue.

    Args:
        data: the encoded image.
        limits: what the image may be.

    Returns:
        A loaded image in mode RGB, of the size that is displayed.

    Raises:
        Reject: with a reason of REASONS.
        UsageError: some code set PIL.ImageFile.LOAD_TRUNCATED_IMAGES, with which damaged images pass as whole ones.
    """
    if ImageFile.LOAD_TRUNCATED_IMAGES:
        raise UsageError("PIL.ImageFile.LOAD_TRUNCATED_IMAGES is set, which fills cut images with gray: unset it")

    def work() -> Image.Image:
        image = _open(data, limits)
        if _format(image) == "JPEG":
            load_jpeg(image, data)
        else:
            image.load()
        orientation = _orientation(image)  # again, and after load: a PNG may have it behind the pixels
        depth = data[24] if image.format == "PNG" else 8
        rgb = _to_rgb(image, depth)
        return rgb.transpose(_UPRIGHT[orientation]) if orientation in _UPRIGHT else rgb

    return _guarded(data, work)


def _guarded(data: bytes, work: Callable[[], Result]) -> Result:
    """Run work without warnings, and turn whatever Pillow raises into a Reject."""
    try:
        return quietly(work)
    except Reject:
        raise
    except Exception as error:
        raise _rejection(data, error) from error


def _open(data: bytes, limits: ImageLimits) -> ImageFile.ImageFile:
    if not data:
        raise Reject("empty_image", "0 bytes")
    if len(data) > limits.max_bytes:
        raise Reject("too_many_bytes", f"{len(data):,} bytes, at most {limits.max_bytes:,} are allowed")
    image = Image.open(io.BytesIO(data), formats=FORMATS)
    # Checked here whatever another library has set Image.MAX_IMAGE_PIXELS to. A TIFF's tiles may be larger than the
    # image, and are decoded whole.
    tags = _tiff_tags(image)
    for width, height in (image.size, (tags.get(_TILE_WIDTH, 1), tags.get(_TILE_HEIGHT, 1))):
        if width * height > limits.max_pixels:
            pixels = f"{width} x {height} = {width * height:,} pixels"
            raise Reject("too_many_pixels", f"{pixels}, at most {limits.max_pixels:,} are allowed")
    if min(image.size) < limits.min_side:
        size = f"{image.size[0]} x {image.size[1]} pixels"
        raise Reject("too_small", f"{size}, at least {limits.min_side} a side are needed")
    return image


def _format(image: ImageFile.ImageFile) -> str:
    return "JPEG" if image.format == "MPO" else str(image.format)


def _tiff_tags(image: Image.Image) -> Any:
    return getattr(image, "tag_v2", {})


def _orientation(image: ImageFile.ImageFile) -> int:
    """EXIF orientation 1 to 8. A broken EXIF block is no reason to lose a picture: then 1."""
    try:
        # Image's own method, as PNG's decodes the pixels to look for EXIF behind them. After load() Pillow has turned a
        # TIFF upright, and its orientation is gone.
        value = Image.Image.getexif(image).get(_ORIENTATION, 1)
    except Warning:
        raise
    except Exception:  # noqa: BLE001  Pillow raises a dozen kinds here, depending on which byte of the block is wrong
        return 1
    return value if isinstance(value, int) and 1 <= value <= 8 else 1


def _to_rgb(image: Image.Image, depth: int) -> Image.Image:
    """Any mode Pillow reads to RGB. `depth` is a PNG's bits a sample, which its transparent colour is written in."""
    if image.mode == "F":
        raise Reject("unsupported_format", "floating-point samples: there is no agreed value for white")
    if image.mode == "I" or image.mode.startswith("I;16"):
        return _on_white(_gray16_to_la(image))
    if not image.has_transparency_data:
        return image.convert("RGB")  # 1, L, P, CMYK, YCbCr, LAB
    transparent = image.info.get("transparency")
    if image.mode in ("1", "L") and isinstance(transparent, int):
        # Pillow scales samples of 2 and 4 bits to 8, but not the transparent one.
        level = transparent * 255 // (2**depth - 1) if depth in (2, 4) else transparent
        gray = image.convert("L")
        return _on_white(Image.merge("LA", (gray, gray.point([0 if v == level else 255 for v in range(256)]))))
    if image.mode == "RGB" and isinstance(transparent, tuple) and depth == 16:
        image.info["transparency"] = tuple(v >> 8 for v in transparent)  # as Pillow does with the samples
    return _on_white(image)


def _on_white(image: Image.Image) -> Image.Image:
    rgba = image.convert("RGBA")
    white = Image.new("RGB", rgba.size, (255, 255, 255))
    white.paste(rgba, mask=rgba.getchannel("A"))
    return white


def _gray16_to_la(image: Image.Image) -> Image.Image:
    """Gray of 9 to 16 bits to the nearest of 8, with alpha where it has any; Pillow's own convert clips at 255."""
    levels_HW = np.asarray(image)
    if image.mode == "I" and (levels_HW.min() < 0 or levels_HW.max() > 65535):
        raise Reject("unsupported_format", "32-bit samples beyond 0 to 65535: there is no agreed value for white")
    tags = _tiff_tags(image)
    bits = tags.get(_BITS, (16,))[0] if image.mode != "I" else 16  # a TIFF may have 12
    white = (1 << min(max(bits, 1), 16)) - 1
    to_8bit = np.minimum((np.arange(65536) * 510 + white) // (2 * white), 255).astype(np.uint8)
    if tags.get(_PHOTOMETRIC) == 0:  # white is zero, which Pillow heeds up to 8 bits only
        to_8bit = 255 - to_8bit
    gray = Image.fromarray(to_8bit[levels_HW])
    transparent = image.info.get("transparency")
    if not isinstance(transparent, int):
        return gray
    return Image.merge("LA", (gray, Image.fromarray(np.where(levels_HW == transparent, 0, 255).astype(np.uint8))))


def _rejection(data: bytes, error: Exception) -> Reject:
    """The Reject for what Pillow raised, from its message and, where that leaves it open, from the bytes."""
    kind = damage.format_of(data)
    if kind == "AVIF" and not HAS_AVIF:
        return Reject("unsupported_format", f"AVIF, which Pillow reads from 11.3 on; readable are {', '.join(FORMATS)}")
    if kind is None:
        if cut := damage.beginning_of(data):
            return Reject("truncated_image", f"{len(data)} bytes, the beginning of a {cut}")
        if noun := damage.other_image(data):
            return Reject("unsupported_format", f"{noun}; readable are {', '.join(FORMATS)}")
        return Reject("not_an_image", f"looks like {damage.other_file(data)}")
    if isinstance(error, UnidentifiedImageError):
        error = _why_not_opened(data, kind)
    said = " ".join(str(error).split())[:200] or type(error).__name__
    lower = said.lower()
    if isinstance(error, Image.DecompressionBombError | MemoryError):
        return Reject("too_many_pixels", f"{kind}: {said}")
    if "decompressed data too large" in lower or "too much memory used in text" in lower:
        return Reject("too_many_bytes", f"{kind}: {said}")
    if "truncated" in lower or damage.is_cut_short(data):
        return Reject("truncated_image", f"{kind}, {len(data):,} bytes: {said}")
    if "unsupported" in lower or "not yet supported" in lower or "unknown pixel mode" in lower:
        return Reject("unsupported_format", f"{kind}: {said}")
    return Reject("corrupt_image", f"{kind}: {said}")


def _why_not_opened(data: bytes, kind: str) -> Exception:
    """What the format's own plugin says; Image.open keeps that to itself and names a memory address instead."""
    try:
        quietly(lambda: Image.OPEN[kind][0](io.BytesIO(data), ""))
    except Exception as error:  # noqa: BLE001  whatever it is, its message is all that is wanted
        return error
    return SyntaxError("its header can't be read")
