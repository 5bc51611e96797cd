"""What bytes look like when they are not a readable image: a name for what they are, and whether their end is missing.

Only looked at after Pillow gave up, to turn "cannot identify image file" into a reason that a person can act on. Pure
functions over bytes; nothing is decoded, no offset that the bytes contain is trusted, nothing raises. Cost: one walk
over the blocks of a PNG or JPEG, microseconds to a few milliseconds.
"""

import struct
from typing import Final

_OURS: Final = (
    (b"\xff\xd8\xff", "JPEG"),
    (b"\x89PNG\r\n\x1a\n", "PNG"),
    (b"GIF87a", "GIF"),
    (b"GIF89a", "GIF"),
    (b"II*\x00", "TIFF"),
    (b"MM\x00*", "TIFF"),
    (b"II+\x00", "TIFF"),
    (b"MM\x00+", "TIFF"),
    (b"BM", "BMP"),
)
_TGA_END: Final = b"TRUEVISION-XFILE.\0"
_OTHER_IMAGES: Final = (
    *((0, bytes((0, 0, kind, 0, 0, 0, 0, 0)), "TGA") for kind in (2, 3, 10, 11)),  # as a cursor begins, but one of no image
    (0, b"\x00\x00\x01\x00", "an ICO icon"),
    (0, b"\x00\x00\x02\x00", "a CUR cursor"),
    (4, b"ftypheic", "HEIC"),
    (4, b"ftypheix", "HEIC"),
    (4, b"ftyphevc", "HEIC"),
    (4, b"ftypmif1", "HEIF"),
    (4, b"ftypmsf1", "HEIF"),
    (4, b"jP  \r\n", "JPEG 2000"),
    (0, b"\xff\x4f\xff\x51", "JPEG 2000"),
    (0, b"\xff\x0a", "JPEG XL"),
    (4, b"JXL \r\n", "JPEG XL"),
    (0, b"8BPS", "a Photoshop file"),
    (0, b"%!PS", "PostScript"),
    (0, b"\xc5\xd0\xd3\xc6", "PostScript"),
    (0, b"\x76\x2f\x31\x01", "OpenEXR"),
    (0, b"#?RADIANCE", "Radiance HDR"),
    (0, b"qoif", "QOI"),
    (0, b"DDS ", "a DirectDraw surface"),
    *((0, b"P%d%c" % (kind, space), "a netpbm image") for kind in range(1, 8) for space in b"\n \r\t"),
)
_OTHER_FILES: Final = (
    (0, b"%PDF", "a PDF"),
    (0, b"PK\x03\x04", "a zip archive"),
    (0, b"\x1f\x8b", "gzip data"),
    (0, b"\x28\xb5\x2f\xfd", "zstandard data"),
    (4, b"ftyp", "an MP4 file or one of its kin (a video?)"),
    (0, b"\x1a\x45\xdf\xa3", "a Matroska or WebM video"),
    (0, b"RIFF", "a RIFF file (AVI, WAV), not WebP"),
)
_TIFF_TYPE_BYTES: Final = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 1, 7: 1, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8}


def format_of(data: bytes) -> str | None:
    """Pillow's name of the allowed format whose magic number the bytes begin with, or None."""
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "WEBP"
    if data[4:8] == b"ftyp" and b"avi" in data[8 : min(int.from_bytes(data[:4]), 64)]:  # avif or avis among its brands
        return "AVIF"
    return next((name for magic, name in _OURS if data.startswith(magic)), None)


def beginning_of(data: bytes) -> str | None:
    """The format whose magic number was cut: at least two bytes, all of them right, but not all there are. Or None."""
    if len(data) < 2:
        return None
    if len(data) < 12 and b"RIFF".startswith(data[:4]):
        return "WEBP"
    return next((name for magic, name in _OURS if len(data) < len(magic) and magic.startswith(data)), None)


def other_image(data: bytes) -> str | None:
    """What image that is not allowed here the bytes are, as a noun ("AVIF", "an ICO icon"), or None."""
    return "TGA" if data.endswith(_TGA_END) else _first_match(data, _OTHER_IMAGES)


def other_file(data: bytes) -> str:
    """What the bytes look like if not an image at all, as a noun: "an HTML page", "a Git LFS pointer", "text", ..."""
    if known := _first_match(data, _OTHER_FILES):
        return known
    text = _as_text(data[:1024])
    if text is None:
        return "unknown data"
    lower = text.lower()
    if lower.startswith("version https://git-lfs"):
        return "a Git LFS pointer (run `git lfs pull`)"
    if "<!doctype html" in lower or "<html" in lower or "<head>" in lower or "<body" in lower:
        return "an HTML page (a dead link or a login?)"
    if "<svg" in lower or "<!doctype svg" in lower:
        return "an SVG drawing"
    if lower.lstrip().startswith("<?xml") or "<error>" in lower:
        return "XML (an error of an object store?)"
    return "text"


def is_cut_short(data: bytes) -> bool:
    """Whether the structure of an allowed format promises bytes that are not there: its end, or a whole block."""
    match format_of(data):
        case "JPEG":
            return _jpeg_is_cut(data)
        case "PNG":
            return _png_is_cut(data)
        case "WEBP":
            return len(data) < 16 or int.from_bytes(data[4:8], "little") + 8 > len(data)
        case "GIF":
            return b";" not in data[-8:]  # the trailer, perhaps with a few bytes of padding behind it
        case "BMP":
            return len(data) < 26 or int.from_bytes(data[2:6], "little") > len(data)
        case "TIFF":
            return _tiff_is_cut(data)
        case _:
            return beginning_of(data) is not None


def _first_match(data: bytes, table: tuple[tuple[int, bytes, str], ...]) -> str | None:
    return next((noun for offset, magic, noun in table if data.startswith(magic, offset)), None)


def _as_text(head: bytes) -> str | None:
    encoding = "utf-16" if head[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig"
    text = head.decode(encoding, errors="ignore")  # the cut at 1024 may split the last character
    lost = len(head) - len(text.encode(encoding, errors="ignore"))
    odd = sum(not (c.isprintable() or c in "\r\n\t\f\ufeff") for c in text)
    return text if text and lost <= 3 and odd * 20 <= len(text) else None


def _jpeg_is_cut(data: bytes) -> bool:
    """Walk the segments up to the first scan; from there on an end marker has to come."""
    at = 2
    while at + 4 <= len(data):
        marker = data[at + 1]
        if data[at] != 0xFF or marker == 0xFF or marker == 0x00:
            at += 1  # padding or junk between segments: decoders skip it
            continue
        if marker == 0xDA:
            return data.find(b"\xff\xd9", at) < 0
        if marker == 0xD9:
            return False
        at += 2 if 0xD0 <= marker <= 0xD8 or marker == 0x01 else 2 + int.from_bytes(data[at + 2 : at + 4], "big")
    return True


def _png_is_cut(data: bytes) -> bool:
    """Walk the chunks: cut if one runs beyond the end, or if they stop without IEND."""
    at = 8
    while at + 8 <= len(data):
        length, kind = int.from_bytes(data[at : at + 4], "big"), data[at + 4 : at + 8]
        if not kind.isalpha() or kind == b"IEND":
            return False
        at += 12 + length
    return True


def _tiff_is_cut(data: bytes) -> bool:
    """Look at the first directory: cut if it, a value, a strip or a tile lies beyond the end."""
    order = "<" if data[:2] == b"II" else ">"
    if len(data) < 8:
        return True
    if data[2:4] not in (b"*\x00", b"\x00*"):  # BigTIFF: not looked into
        return False
    (at,) = struct.unpack_from(f"{order}I", data, 4)
    if at + 2 > len(data):
        return True
    (num_entries,) = struct.unpack_from(f"{order}H", data, at)
    if at + 2 + 12 * num_entries > len(data):
        return True
    values: dict[int, tuple[int, ...]] = {}
    for entry in range(at + 2, at + 2 + 12 * num_entries, 12):
        tag, kind, count = struct.unpack_from(f"{order}HHI", data, entry)
        num_bytes = _TIFF_TYPE_BYTES.get(kind, 0) * count
        start = entry + 8 if num_bytes <= 4 else struct.unpack_from(f"{order}I", data, entry + 8)[0]
        if start + num_bytes > len(data):
            return True
        if tag in (273, 279, 324, 325) and kind in (3, 4):  # offsets and byte counts of strips and tiles
            values[tag] = struct.unpack_from(f"{order}{count}{'H' if kind == 3 else 'I'}", data, start)
    return any(
        offset + num_bytes > len(data)
        for offsets, counts in ((273, 279), (324, 325))
        for offset, num_bytes in zip(values.get(offsets, ()), values.get(counts, ()), strict=False)
    )
