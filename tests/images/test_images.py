"""Images: bytes in, pixels or a Reject out. Real photographs, real damage, and small pictures made here."""

import io
import json
import math
import random
import re
import struct
import subprocess
import sys
import threading
import warnings
import zlib
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from commands import SHARED
from hypothesis import given, settings
from hypothesis import strategies as st
from memory import grown_mb
from PIL import Image, ImageFile
from properties import tries

from wds_tools.errors import Reject, UsageError
from wds_tools.images import (
    FORMATS,
    REASONS,
    ImageInfo,
    ImageLimits,
    check_ratio,
    decode,
    decode_rgb,
    parse_mode,
    prepare,
    probe,
    shapes,
)
from wds_tools.images.crop import cover
from wds_tools.images.decode import HAS_AVIF

TARGETS = shapes(768)
cc512, multi768 = (parse_mode(word).crop_for for word in ("cc512", "multi768"))
REPOSITORY = Path(__file__).parents[2]
PAIRS = SHARED / "pairs" / "open"
MALFORMED = SHARED / "malformed" / "images"

needs_pairs = pytest.mark.skipif(not PAIRS.is_dir(), reason="the real image-text pairs are not beside this checkout")
needs_malformed = pytest.mark.skipif(not MALFORMED.is_dir(), reason="the malformed images are not beside this checkout")

# What decode_rgb says of each malformed file; the ones not named here decode.
KNOWN_REASONS = {
    "bad_idat_crc.png": "corrupt_image",
    "bitflips.jpg": "corrupt_image",
    "bomb_header_100000x100000.png": "too_many_pixels",
    "bomb_valid_30000x30000_1bit.png": "too_many_pixels",
    "header_zero_width.png": "corrupt_image",
    "one_byte.png": "not_an_image",
    "random.jpg": "not_an_image",
    "sof_65500x65500.jpg": "too_many_pixels",
    "trunc.gif": "truncated_image",
    "trunc.tif": "truncated_image",
    "trunc.webp": "truncated_image",
    "trunc_50.jpg": "truncated_image",
    "trunc_50.png": "truncated_image",
    "trunc_header.jpg": "truncated_image",
    "trunc_no_eoi.jpg": "truncated_image",
    "zero_bytes.jpg": "empty_image",
    "badheadersize.bmp": "unsupported_format",
    "badwidth.bmp": "too_many_pixels",
    "broken.png": "corrupt_image",
    "broken_data_stream.png": "corrupt_image",
    "crash-86214e58da443d2b80820cff9677a38a33dcbbca.tif": "truncated_image",
    "decompression_bomb.gif": "too_many_pixels",
    "decompression_bomb.ico": "unsupported_format",
    "empty_gps_ifd.jpg": "too_small",
    "git_lfs_pointer.jpg": "not_an_image",
    "html_error_page.jpg": "not_an_image",
    "icc-after-SOF.jpg": "too_small",
    "oom-225817ca0f8c663be7ab4b9e717b02c661e66834.tif": "truncated_image",
    "png_decompression_dos.png": "too_many_bytes",
    "skimage_truncated.jpg": "truncated_image",
    "svg_as.png": "not_an_image",
}


def encoded(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def picture(width: int = 48, height: int = 32) -> Image.Image:
    """Every corner another colour, so that no turn or mirror looks like another."""
    pixels_HWC = np.zeros((height, width, 3), np.uint8)
    half_h, half_w = height // 2, width // 2
    pixels_HWC[:half_h, :half_w] = (250, 10, 10)
    pixels_HWC[:half_h, half_w:] = (10, 250, 10)
    pixels_HWC[half_h:, :half_w] = (10, 10, 250)
    pixels_HWC[half_h:, half_w:] = (240, 240, 10)
    return Image.fromarray(pixels_HWC)


def reason_of(data: bytes, read: Callable[..., object] = decode_rgb, **limits: int) -> str:
    with pytest.raises(Reject) as caught:
        read(data, ImageLimits(**limits))
    assert caught.value.reason in REASONS
    assert caught.value.detail
    assert "\n" not in caught.value.detail
    assert " at 0x" not in caught.value.detail  # no memory address: rejects are the same bytes on a rerun
    return caught.value.reason


def outcome(data: bytes, read: Callable[[bytes], object]) -> str:
    """ "ok" or a reason; anything but an image or a Reject of REASONS fails the test."""
    try:
        result = read(data)
    except Reject as reject:
        reason = reject.reason
        if reason not in REASONS:
            pytest.fail(f"{reason} is not one of REASONS")
        return reason
    if isinstance(result, Image.Image):
        assert result.mode == "RGB"
        assert min(result.size) >= 16
    else:
        assert isinstance(result, ImageInfo)
        assert result.format in FORMATS
    return "ok"


# --- real files ---


@needs_malformed
@pytest.mark.parametrize("path", sorted(MALFORMED.rglob("*.*")), ids=lambda path: path.name)
def test_a_malformed_file_gives_an_image_or_the_reason_in_the_table_and_no_warning(path: Path) -> None:
    data = path.read_bytes()
    assert outcome(data, decode_rgb) == KNOWN_REASONS.get(path.name, "ok")
    assert outcome(data, probe) in ("ok", KNOWN_REASONS.get(path.name, "ok"))


@needs_malformed
def test_probe_and_decode_agree_on_the_size_of_everything_that_decodes() -> None:
    for path in sorted(MALFORMED.rglob("*.*")):
        if path.name not in KNOWN_REASONS:
            info = probe(path.read_bytes())
            assert decode_rgb(path.read_bytes()).size == (info.width, info.height), path.name


@needs_malformed
def test_all_malformed_files_together_stay_within_200_mb() -> None:
    setup = "import pathlib\nfrom wds_tools.errors import Reject\nfrom wds_tools.images import decode_rgb, probe"
    code = f"""
for path in sorted(pathlib.Path({str(MALFORMED)!r}).rglob("*.*")):
    for read in (probe, decode_rgb):
        try:
            read(path.read_bytes())
        except Reject:
            pass
"""
    assert grown_mb(setup, code) < 200


@pytest.mark.slow
@needs_pairs
def test_all_170_real_images_come_out_in_the_expected_size_or_are_rejected_for_their_ratio() -> None:
    rows = [json.loads(line) for line in (PAIRS / "provenance.jsonl").read_text().splitlines()]
    assert len(rows) == 170
    prepared = {"cc512": 0, "multi768": 0}
    for row in rows:
        data = (PAIRS / row["image_path"]).read_bytes()
        width, height = row["width"], row["height"]
        if (row["exif_orientation"] or 1) >= 5:
            width, height = height, width
        if min(width, height) < 16:
            assert reason_of(data, probe) == reason_of(data) == "too_small"
            continue
        info = probe(data)
        assert (info.format, info.width, info.height) == (row["format"], width, height)
        ratio = max(width, height) / min(width, height)
        for mode, limit in (("cc512", 2.0), ("multi768", 4.2)):
            if ratio > limit:
                with pytest.raises(Reject, match="aspect_ratio"):
                    prepare(data, mode)  # type: ignore[arg-type]
                continue
            pixels_HWC = prepare(data, mode)  # type: ignore[arg-type]
            expected = (512, 512) if mode == "cc512" else multi768(width, height).size
            assert pixels_HWC.shape == (expected[1], expected[0], 3)
            assert pixels_HWC.dtype == np.uint8
            assert pixels_HWC.flags.writeable
            assert pixels_HWC.flags.c_contiguous
            prepared[mode] += 1
    assert prepared["cc512"] >= 145
    assert prepared["multi768"] >= 160


@needs_pairs
def test_prepared_pixels_are_those_of_a_full_decode_one_resize_and_one_crop() -> None:
    for path in sorted((PAIRS / "images" / "coco").glob("*.jpg"))[:12]:
        image = Image.open(path).convert("RGB")
        image.load()
        for mode, plan in (("cc512", cc512), ("multi768", multi768)):
            crop = plan(*image.size)
            plain = image.resize(crop.resize, Image.Resampling.LANCZOS).crop(crop.box)
            np.testing.assert_array_equal(prepare(path.read_bytes(), mode), np.asarray(plain))  # type: ignore[arg-type]


# --- orientation, transparency, modes, frames ---


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_the_eight_exif_orientations_of_a_picture_all_give_the_same_picture(kind: str) -> None:
    upright = picture()
    turned_back = {
        1: None,
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }
    options: dict[str, Any] = {"quality": 95, "subsampling": 0} if kind == "JPEG" else {"lossless": True}
    options = options if kind in ("JPEG", "WEBP") else {}
    for orientation, turn in turned_back.items():
        exif = Image.Exif()
        exif[274] = orientation
        stored = upright if turn is None else upright.transpose(turn)
        data = encoded(stored, kind, exif=exif, **options)
        info = probe(data)
        assert (info.format, info.width, info.height, info.orientation) == (kind, 48, 32, orientation)
        difference = np.abs(np.asarray(decode_rgb(data), int) - np.asarray(upright, int))
        assert difference.max() <= (12 if kind == "JPEG" else 0), (kind, orientation)


def test_probe_does_not_decode_the_pixels_of_a_png() -> None:
    data = encoded(picture())
    idat = data.index(b"IDAT")
    broken = data[: idat + 6] + b"\xff" * 20 + data[idat + 26 :]
    assert probe(broken) == ImageInfo("PNG", "png", 48, 32)
    assert reason_of(broken) == "corrupt_image"


def test_the_content_decides_on_the_format_and_names_the_member() -> None:
    extensions = {"JPEG": "jpg", "PNG": "png", "WEBP": "webp", "GIF": "gif", "BMP": "bmp", "TIFF": "tif"}
    if HAS_AVIF:
        extensions["AVIF"] = "avif"
    assert tuple(extensions) == FORMATS
    for kind, extension in extensions.items():
        assert probe(encoded(picture(), kind)) == ImageInfo(kind, extension, 48, 32)


def test_a_stereo_photograph_is_read_as_the_jpeg_that_it_begins_with() -> None:
    second = picture().transpose(Image.Transpose.ROTATE_180)
    data = encoded(picture(), "MPO", save_all=True, append_images=[second], quality=95)
    assert Image.open(io.BytesIO(data)).format == "MPO"
    assert probe(data) == ImageInfo("JPEG", "jpg", 48, 32)
    assert decode_rgb(data).getpixel((4, 4))[0] > 200  # type: ignore[index]


def with_alpha(mode: str) -> Image.Image:
    """A picture in (0, 0, 0) or black, the left half opaque, the right half transparent."""
    alpha = Image.new("L", (32, 16), 255)
    alpha.paste(0, (16, 0, 32, 16))
    return Image.merge("RGBA", [Image.new("L", (32, 16), 0)] * 3 + [alpha]).convert(mode)


def png_by_hand(depth: int, levels_HW: "np.ndarray[Any, Any]", transparent: int | None, colour: int = 0) -> bytes:
    """A PNG by hand: Pillow doesn't write every depth with a transparent colour."""
    height, width = levels_HW.shape[0], levels_HW.shape[1] // (3 if colour else 1)
    if depth == 16:
        rows = [b"\0" + row.astype(">u2").tobytes() for row in levels_HW]
    else:
        bits = [np.unpackbits(row.astype(np.uint8)[:, None], axis=1)[:, -depth:].reshape(-1) for row in levels_HW]
        rows = [b"\0" + np.packbits(row).tobytes() for row in bits]
    chunks = [(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0))]
    if transparent is not None:
        chunks.append((b"tRNS", struct.pack(">H", transparent) * (3 if colour else 1)))
    chunks += [(b"IDAT", zlib.compress(b"".join(rows))), (b"IEND", b"")]
    body = b"".join(
        struct.pack(">I", len(payload)) + name + payload + struct.pack(">I", zlib.crc32(name + payload))
        for name, payload in chunks
    )
    return b"\x89PNG\r\n\x1a\n" + body


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_transparency_is_blended_on_white(kind: str, mode: str) -> None:
    options = {"lossless": True} if kind == "WEBP" else {}
    rgb = decode_rgb(encoded(with_alpha(mode), kind, **options))
    assert rgb.getpixel((4, 4)) == (0, 0, 0)
    assert rgb.getpixel((28, 4)) == (255, 255, 255)


def test_half_transparent_pixels_are_mixed_with_white() -> None:
    data = encoded(Image.new("RGBA", (16, 16), (200, 100, 0, 51)))  # a fifth
    assert decode_rgb(data).getpixel((0, 0)) == (244, 224, 204)


@pytest.mark.parametrize("transparency", [1, b"\xff\x00"])
def test_a_transparent_palette_entry_becomes_white(transparency: int | bytes) -> None:
    image = Image.new("P", (16, 16), 0)
    image.putpalette([9, 8, 7, 1, 2, 3])
    image.paste(1, (8, 0, 16, 16))
    for kind in ("PNG", "GIF") if isinstance(transparency, int) else ("PNG",):
        rgb = decode_rgb(encoded(image, kind, transparency=transparency))
        assert rgb.getpixel((2, 2)) == (9, 8, 7)
        assert rgb.getpixel((12, 2)) == (255, 255, 255)


@pytest.mark.parametrize("depth", [1, 2, 4, 8, 16])
def test_a_transparent_gray_level_becomes_white_at_every_depth(depth: int) -> None:
    most = 2**depth - 1
    for transparent, kept in ((0, most), (most, 0), (most // 3, 0)):
        levels_HW = np.full((16, 16), kept)
        levels_HW[:, 8:] = transparent
        rgb = decode_rgb(png_by_hand(depth, levels_HW, transparent))
        assert rgb.getpixel((12, 2)) == (255, 255, 255), transparent
        if transparent != kept:
            assert rgb.getpixel((2, 2)) == ((255,) * 3 if kept else (0,) * 3)


@pytest.mark.parametrize(("depth", "value"), [(8, 77), (16, 0x4D21)])
def test_a_transparent_colour_becomes_white(depth: int, value: int) -> None:
    levels_HWC = np.full((16, 16, 3), value)
    levels_HWC[:, :8, 0] = 0
    rgb = decode_rgb(png_by_hand(depth, levels_HWC.reshape(16, 48), value, colour=2))
    assert rgb.size == (16, 16)
    assert rgb.getpixel((2, 2)) == (0, 77, 77)
    assert rgb.getpixel((12, 2)) == (255, 255, 255)


def test_cmyk_becomes_rgb_with_the_right_colours() -> None:
    rgb = decode_rgb(encoded(picture().convert("CMYK"), "JPEG", quality=95, subsampling=0))
    assert np.abs(np.asarray(rgb, int) - np.asarray(picture(), int)).max() <= 12


def test_sixteen_bit_gray_is_scaled_and_not_clipped() -> None:
    ramp_HW = np.linspace(0, 65535, 32 * 32).astype(np.uint16).reshape(32, 32)
    expected_HW = np.round(ramp_HW / 257).astype(np.uint8)
    of_32_bits = Image.fromarray(ramp_HW.astype(np.int32))
    assert of_32_bits.mode == "I"
    for data in (
        png_by_hand(16, ramp_HW, None),
        encoded(Image.fromarray(ramp_HW), "TIFF"),
        encoded(Image.fromarray(ramp_HW), "TIFF", compression="tiff_lzw"),
        encoded(of_32_bits, "TIFF"),
    ):
        rgb_HWC = np.asarray(decode_rgb(data))
        for channel in range(3):
            np.testing.assert_array_equal(rgb_HWC[..., channel], expected_HW)


def test_samples_without_an_agreed_white_are_unsupported() -> None:
    assert reason_of(encoded(Image.new("F", (32, 32), 0.5), "TIFF")) == "unsupported_format"
    assert reason_of(encoded(Image.new("I", (32, 32), 70_000), "TIFF")) == "unsupported_format"


def test_one_bit_images_are_black_and_white() -> None:
    image = Image.new("1", (32, 16), 0)
    image.paste(1, (16, 0, 32, 16))
    for kind in ("PNG", "BMP", "TIFF", "GIF"):
        rgb = decode_rgb(encoded(image, kind))
        assert (rgb.getpixel((2, 2)), rgb.getpixel((30, 2))) == ((0, 0, 0), (255, 255, 255)), kind


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG", "TIFF"])
def test_the_first_frame_of_an_animation_is_taken(kind: str) -> None:
    frames = [Image.new("RGB", (20, 18), colour) for colour in ((255, 0, 0), (0, 255, 0), (0, 0, 255))]
    options = {"lossless": True} if kind == "WEBP" else {}
    data = encoded(frames[0], kind, save_all=True, append_images=frames[1:], **options)
    assert Image.open(io.BytesIO(data)).n_frames == 3  # type: ignore[attr-defined]
    assert decode_rgb(data).getcolors() == [(360, (255, 0, 0))]


@pytest.mark.skipif(not HAS_AVIF, reason="this Pillow does not read AVIF")
def test_avif_is_read_upright_on_white_its_first_frame_and_damage_is_named() -> None:
    exif = Image.Exif()
    exif[274] = 6
    turned = encoded(picture().transpose(Image.Transpose.ROTATE_90), "AVIF", exif=exif, quality=95)
    assert (probe(turned).width, probe(turned).height, probe(turned).orientation) == (48, 32, 6)
    difference = np.abs(np.asarray(decode_rgb(turned), int) - np.asarray(picture(), int))
    assert difference[4:12, 4:20].max() <= 12  # in a corner, away from its colour's edges
    clear = decode_rgb(encoded(with_alpha("RGBA"), "AVIF", quality=100))
    assert clear.getpixel((30, 8)) == (255, 255, 255)
    frames = [Image.new("RGB", (20, 18), colour) for colour in ((255, 0, 0), (0, 255, 0))]
    moving = decode_rgb(encoded(frames[0], "AVIF", save_all=True, append_images=frames[1:]))
    assert moving.getpixel((9, 9))[0] > 240  # type: ignore[index]
    data = encoded(picture(), "AVIF")
    for end in (20, 60, len(data) // 2, len(data) - 1):
        assert reason_of(data[:end]) in ("truncated_image", "corrupt_image")
    assert reason_of(data, probe, max_pixels=48 * 32 - 1) == "too_many_pixels"


def test_avif_is_refused_by_name_where_pillow_does_not_read_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decode, "HAS_AVIF", False)
    monkeypatch.setattr(decode, "FORMATS", FORMATS[:6])
    with pytest.raises(Reject, match=r"unsupported_format: AVIF, which Pillow reads from 11\.3 on; readable are JPEG, PNG"):
        probe(b"\0\0\0\x1cftypavif\0\0\0\0avifmif1miaf")


# --- rejects and limits ---


@pytest.mark.parametrize(
    ("data", "reason", "says"),
    [
        (b"", "empty_image", "0 bytes"),
        (b"<!DOCTYPE html><html><body>404</body></html>", "not_an_image", "HTML"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\n", "not_an_image", "Git LFS"),
        (b'<?xml version="1.0"?>\n<svg xmlns="http://www.w3.org/2000/svg"/>', "not_an_image", "SVG"),
        (b"<?xml version='1.0'?><Error><Code>AccessDenied</Code></Error>", "not_an_image", "XML"),
        ("Größe".encode(), "not_an_image", "text"),
        (b"%PDF-1.7\n", "not_an_image", "PDF"),
        (random.Random(1).randbytes(5000), "not_an_image", "unknown data"),
        (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic", "unsupported_format", "HEIC; readable are JPEG, PNG"),
        (b"\0\0\0\x18ftypmif1\0\0\0\0mif1heic", "unsupported_format", "HEIF"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "unsupported_format", "PostScript"),
        (b"P6\n20 20\n255\n" + bytes(1200), "unsupported_format", "netpbm"),
        (b"\x89PNG\r\n", "truncated_image", "beginning of a PNG"),
    ],
)
def test_what_is_no_readable_image_is_named_for_what_it_is(data: bytes, reason: str, says: str) -> None:
    for read in (probe, decode_rgb):
        with pytest.raises(Reject) as caught:
            read(data)
        assert caught.value.reason == reason
        assert says in caught.value.detail


def test_a_one_pixel_image_is_too_small_and_sixteen_pixels_are_enough() -> None:
    assert reason_of(encoded(Image.new("RGB", (1, 1)))) == "too_small"
    assert reason_of(encoded(Image.new("RGB", (400, 15))), probe) == "too_small"
    assert decode_rgb(encoded(Image.new("RGB", (16, 16)))).size == (16, 16)
    assert decode_rgb(encoded(Image.new("RGB", (1, 1))), ImageLimits(min_side=1)).size == (1, 1)


def test_limits_are_inclusive_and_hold_for_probe_and_decode() -> None:
    data = encoded(picture())
    for read in (probe, decode_rgb):
        read(data, ImageLimits(max_pixels=48 * 32, max_bytes=len(data)))
        assert reason_of(data, read, max_pixels=48 * 32 - 1) == "too_many_pixels"
        assert reason_of(data, read, max_bytes=len(data) - 1) == "too_many_bytes"


def test_limits_that_could_have_no_effect_are_refused() -> None:
    for wrong in ({"max_pixels": 200_000_000}, {"max_pixels": 0}, {"min_side": 0}, {"max_bytes": 0}):
        with pytest.raises(UsageError, match=next(iter(wrong))):
            ImageLimits(**wrong)


def test_a_size_where_pillow_would_only_warn_is_rejected_before_it_is_decoded() -> None:
    header = struct.pack(">IIBBBBB", 12_000, 10_000, 1, 0, 0, 0, 0)
    data = b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(payload)) + name + payload + struct.pack(">I", zlib.crc32(name + payload))
        for name, payload in ((b"IHDR", header), (b"IDAT", b""), (b"IEND", b""))
    )
    with pytest.warns(Image.DecompressionBombWarning):
        Image.open(io.BytesIO(data))
    assert probe(data).width == 12_000
    for read in (probe, decode_rgb):
        assert reason_of(data, read, max_pixels=100_000_000) == "too_many_pixels"


def test_a_pillow_whose_limit_was_taken_away_does_not_let_bombs_through(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    data = bytearray(png_by_hand(1, np.zeros((16, 16)), None))
    data[16:24] = struct.pack(">II", 30_000, 30_000)
    data[29:33] = struct.pack(">I", zlib.crc32(data[12:29]))
    assert reason_of(bytes(data), probe) == reason_of(bytes(data)) == "too_many_pixels"


def test_a_pillow_told_to_accept_cut_images_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    with pytest.raises(UsageError, match="LOAD_TRUNCATED_IMAGES"):
        decode_rgb(encoded(picture()))


def test_a_missing_pillow_names_the_line_that_brings_it_and_nothing_global_changes_at_import() -> None:
    code = """
import sys, warnings
import numpy  # adds filters of its own
sys.modules["PIL"] = None
from wds_tools.errors import MissingPackage
try:
    import wds_tools.images
except MissingPackage as error:
    print(error)
del sys.modules["PIL"]
before = list(warnings.filters)
import wds_tools.images
from PIL import Image, ImageFile
assert warnings.filters == before and not ImageFile.LOAD_TRUNCATED_IMAGES and Image.MAX_IMAGE_PIXELS == 89478485
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=REPOSITORY, timeout=200)
    assert done.returncode == 0, done.stderr
    assert "pip install 'wds-tools[convert]'" in done.stdout


# --- warnings ---


def odd_apng() -> bytes:
    """A fine PNG that Pillow warns about: its animation has zero frames."""
    data = encoded(picture())
    chunk = b"acTL" + struct.pack(">II", 0, 0)
    return data[:33] + struct.pack(">I", 8) + chunk + struct.pack(">I", zlib.crc32(chunk)) + data[33:]


def test_pillows_warnings_stay_inside_and_those_of_others_come_through() -> None:
    with pytest.warns(UserWarning, match="Invalid APNG"):
        Image.open(io.BytesIO(odd_apng()))
    assert decode_rgb(odd_apng()).size == (48, 32)  # with warnings as errors, as in all of these tests
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        decode_rgb(odd_apng())
        warnings.warn("ours to see", UserWarning, stacklevel=1)
    assert [str(warning.message) for warning in seen] == ["ours to see"]


def test_threads_decode_quietly_while_another_thread_sees_its_own_warnings() -> None:
    stop = threading.Event()
    failures: list[BaseException] = []

    def decode() -> None:
        try:
            while not stop.is_set():
                decode_rgb(odd_apng())
        except BaseException as error:  # noqa: BLE001  handed to the test
            failures.append(error)

    decode_rgb(odd_apng())
    threads = [threading.Thread(target=decode) for _ in range(3)]
    for thread in threads:
        thread.start()
    for _ in range(300):
        with pytest.raises(UserWarning, match="must be seen"):
            warnings.warn("must be seen", UserWarning, stacklevel=1)
        warnings.filterwarnings("error", message=r".*APNG")  # somebody pushes in front of our filter, again and again
    stop.set()
    for thread in threads:
        thread.join(timeout=30)
    assert failures == []


# --- geometry ---

sides = st.integers(1, 70_000)


@given(sides, sides)
def test_the_square_crop_is_inside_the_resized_image_whose_shorter_side_is_exactly_512(width: int, height: int) -> None:
    crop = cover(width, height, 512, 512)
    left, top, right, bottom = crop.box
    assert min(crop.resize) == 512
    assert (right - left, bottom - top) == crop.size == (512, 512)
    assert 0 <= left <= right <= crop.resize[0]
    assert 0 <= top <= bottom <= crop.resize[1]
    assert left == (crop.resize[0] - 512) // 2
    assert top == (crop.resize[1] - 512) // 2


@given(sides, sides)
def test_the_resized_size_is_the_references_formula_without_floats(width: int, height: int) -> None:
    factor = min(width, height) / 512
    assert cover(width, height, 512, 512).resize == (int(width / factor), int(height / factor))


def test_no_side_up_to_20000_is_scaled_to_511() -> None:
    assert all(cc512(side, side).resize == (512, 512) for side in range(1, 20_001))
    assert int(49 * (512 / 49)) == 511  # the trap: with the factor rounded first


def test_exactly_two_to_one_passes_and_one_pixel_more_does_not() -> None:
    check_ratio(1000, 500)
    check_ratio(500, 1000)
    for width, height in ((1001, 500), (500, 1001)):
        with pytest.raises(Reject, match=re.escape(f"aspect_ratio: {width}x{height}")):
            check_ratio(width, height)
    assert prepare(encoded(Image.new("RGB", (64, 32), "red")), "cc512").shape == (512, 512, 3)


def test_prepare_refuses_a_mode_it_does_not_know() -> None:
    with pytest.raises(UsageError, match="cc5130"):
        prepare(encoded(picture()), "cc5130")  # type: ignore[arg-type]


def test_a_side_below_one_is_the_callers_mistake() -> None:
    for plan in (cc512, multi768):
        with pytest.raises(UsageError, match="at least 1"):
            plan(0, 5)


def test_the_table_of_targets_has_25_sizes_on_a_grid_of_32_within_the_area_and_aspect_4() -> None:
    assert len(TARGETS) == len(set(TARGETS)) == 25
    assert (768, 768) in TARGETS
    assert TARGETS[0] == (384, 1536)
    assert {(height, width) for width, height in TARGETS} == set(TARGETS)
    for width, height in TARGETS:
        assert width % 32 == height % 32 == 0
        assert 560 <= width * height // 1024 <= 576
        assert max(width, height) <= 4 * min(width, height)
        assert not any(w >= width and h >= height for w, h in TARGETS if (w, h) != (width, height))
    assert list(TARGETS) == sorted(TARGETS)


def shape_within_aspect_4() -> st.SearchStrategy[tuple[int, int]]:
    return st.tuples(st.integers(1, 9_000), st.integers(1, 9_000)).filter(lambda s: max(s) <= 4 * min(s))


@given(shape_within_aspect_4())
def test_the_chosen_target_is_the_nearest_in_log_space_and_covered(shape: tuple[int, int]) -> None:
    width, height = shape
    crop = multi768(width, height)
    assert crop.size in TARGETS

    def distance(target: tuple[int, int]) -> float:
        return abs(math.log(width / height) - math.log(target[0] / target[1]))

    assert distance(crop.size) <= min(distance(target) for target in TARGETS) + 1e-12
    left, top, right, bottom = crop.box
    assert 0 <= left <= right <= crop.resize[0]
    assert 0 <= top <= bottom <= crop.resize[1]
    assert crop.resize[0] == crop.size[0] or crop.resize[1] == crop.size[1]
    assert crop.size[0] * crop.size[1] > 0.91 * crop.resize[0] * crop.resize[1]


@given(shape_within_aspect_4())
def test_a_turned_image_takes_the_turned_target(shape: tuple[int, int]) -> None:
    width, height = shape
    assert multi768(height, width).size == multi768(width, height).size[::-1]


def test_no_image_lies_on_the_border_between_two_targets() -> None:
    for (low_w, low_h), (high_w, high_h) in pairwise(TARGETS):
        product = low_w * high_w * low_h * high_h
        assert math.isqrt(product) ** 2 != product  # (W/H)^2 = product / (low_h * high_h)^2 has no solution


def test_images_beyond_aspect_4_pass_within_5_percent_and_are_rejected_after() -> None:
    assert multi768(1600, 399).size == (1536, 384)
    assert multi768(420, 100).size == (1536, 384)
    for width, height in ((421, 100), (100, 421), (5000, 20)):
        with pytest.raises(Reject, match="aspect_ratio"):
            multi768(width, height)


# --- fuzz ---


def seeds() -> list[bytes]:
    shades = Image.effect_noise((40, 30), 50).convert("RGB")
    exif = Image.Exif()
    exif[274], exif[306] = 6, "2020:01:01 00:00:00"
    return [
        encoded(shades, "JPEG", exif=exif),
        encoded(shades, "JPEG", progressive=True),
        encoded(shades.convert("CMYK"), "JPEG"),
        encoded(shades, "PNG", exif=exif),
        encoded(shades.quantize(16), "PNG", transparency=3),
        encoded(shades, "WEBP", exif=exif),
        encoded(shades.convert("RGBA"), "WEBP", lossless=True),
        encoded(shades, "GIF", save_all=True, append_images=[shades.rotate(90)]),
        encoded(shades, "BMP"),
        encoded(shades, "TIFF", exif=exif),
        encoded(shades, "TIFF", compression="tiff_lzw"),
        encoded(shades.convert("L").convert("I;16"), "TIFF"),
        odd_apng(),
    ]


SEEDS = seeds()


@pytest.mark.slow
@tries(1500)
@given(st.data())
def test_flipped_and_cut_bytes_never_raise_anything_but_a_reject(choose: st.DataObject) -> None:
    data = bytearray(choose.draw(st.sampled_from(SEEDS)))
    early = choose.draw(st.booleans())  # most of what can go wrong stands in the first bytes
    for position in choose.draw(st.lists(st.integers(0, 200 if early else len(data) - 1), max_size=6)):
        data[position % len(data)] = choose.draw(st.integers(0, 255))
    if choose.draw(st.booleans()):
        del data[choose.draw(st.integers(0, len(data))) :]
    for read in (probe, decode_rgb):
        outcome(bytes(data), read)


@settings(deadline=None)
@given(st.binary(max_size=200), st.sampled_from([b"", *(seed[:12] for seed in SEEDS)]))
def test_arbitrary_bytes_behind_a_magic_number_never_raise_anything_but_a_reject(tail: bytes, magic: bytes) -> None:
    for read in (probe, decode_rgb):
        outcome(magic + tail, read)


def test_every_cut_of_an_image_is_reported_as_cut_until_nothing_tells_its_format() -> None:
    for seed in (SEEDS[0], SEEDS[3], SEEDS[5], SEEDS[8]):
        for length in range(16, len(seed) - 40, 37):
            assert reason_of(seed[:length]) == "truncated_image", (seed[:4], length)
