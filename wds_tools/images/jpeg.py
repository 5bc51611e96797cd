"""The pixels of a JPEG, and whether all of them were in the file.

libjpeg fills what a scan lacks with gray, and only warns, which Pillow does not pass on. But Pillow's decoder says how many of
the bytes that it was given are used up. So the file is given in parts, with some zeros before its end marker:

    ... the last scan | zeros, one at a time | end marker ...

A decoder that has all blocks is done, or looks for a marker and uses up each zero at once; one that lacks some goes on when it
has several bytes, and leaves zeros for a while. A whole file gives the same pixels as ever. Where a scan ends in many zeros by
itself, as in files of which only the beginning was ever written, the same is asked before them, and before the last of them. The
scans of a progressive file have to be there, too. Cost: one search for markers, a few per cent of decoding.
"""

from __future__ import annotations

import re
from typing import Any, Final, NamedTuple

from PIL import Image, ImageFile

from wds_tools.errors import Reject

_MARKER: Final = re.compile(rb"\xff[^\x00\xff\xd0-\xd7]")
_FRAMES: Final = (0xC0, 0xC1, 0xC2)
"""Huffman-coded, sequential or progressive; others can't be decoded piece by piece."""
_PROGRESSIVE, _START, _END, _SCAN = 0xC2, 0xD8, 0xD9, 0xDA
_ALL: Final = (1 << 64) - 1
_AHEAD: Final = 8
"""Bytes that libjpeg wants to see before it needs them."""
_ASK_BYTES: Final = 2 * _AHEAD
_MANY_ZEROS: Final = 64
"""More than any file has for padding where the decoder has no use for them."""


class _Scans(NamedTuple):
    """What the markers of a file say."""

    end: int | None
    """Where its end marker is."""
    at_once: bool
    """One scan has everything, so that blocks become pixels as they are read."""
    is_whole: bool
    """Each coefficient of each component is in a scan, to its last bit."""


def load_jpeg(image: ImageFile.ImageFile, data: bytes) -> None:
    """Decode a JPEG as image.load() does.

    Args:
        image: opened, with nothing decoded.
        data: its file.

    Raises:
        Reject: "truncated_image": blocks are missing, whatever stands in their place.
        OSError: the decoder fails.
    """
    scans = _scans_of(data)
    if scans is None or len(image.tile) != 1:
        image.load()
        return
    image.load_prepare()
    codec, box, offset, args = image.tile[0]
    stream = _Stream(Image._getdecoder(image.mode, codec, args, image.decoderconfig), scans.at_once)
    try:
        stream.decoder.setimage(image.im, box)
        end = len(data) if scans.end is None else scans.end
        scan = data[offset:end].rstrip(b"\0")
        num_zeros = end - offset - len(scan)
        stream.feed(scan)
        lacks = stream.lacks_blocks() if scans.end is not None or num_zeros >= _ASK_BYTES else not stream.is_done
        if lacks and num_zeros and scans.end is not None:
            stream.feed(bytes(num_zeros - 2 * _ASK_BYTES if num_zeros > _MANY_ZEROS else num_zeros))
            if num_zeros > _MANY_ZEROS and not stream.lacks_blocks():
                what = f"the last {num_zeros:,} bytes of its scan are zeros, more than its blocks need"
                raise Reject("truncated_image", f"JPEG, {len(data):,} bytes: {what}")
            lacks = stream.lacks_blocks()
        if lacks or not scans.is_whole:
            raise Reject("truncated_image", f"JPEG, {len(data):,} bytes: a scan ends before its last block, or scans are missing")
        stream.feed(data[end:])
        if not stream.is_done:
            raise OSError("image file is truncated")
    finally:
        stream.decoder.cleanup()
    image.tile = []


class _Stream:
    """A decoder, and what it has left of the bytes that it was given."""

    def __init__(self, decoder: Any, at_once: bool) -> None:
        self.decoder = decoder
        self.is_done = False
        self._at_once = at_once
        self._left = b""

    def feed(self, data: bytes) -> None:
        if not self.is_done and data:
            self._left += data
            num_used, status = self.decoder.decode(self._left)
            if status < 0:
                raise OSError(f"{ImageFile.ERRORS.get(status, 'decoder error')} when reading image file")
            self.is_done = num_used < 0
            self._left = b"" if self.is_done else self._left[num_used:]

    def lacks_blocks(self) -> bool:
        """Give it zeros; whether it takes them for blocks."""
        self.feed(bytes(_AHEAD))
        num_left = 0
        for _ in range(_ASK_BYTES - _AHEAD):
            self.feed(b"\0")
            num_left += len(self._left)
        return not self.is_done and (self._at_once or num_left > 0)


def _scans_of(data: bytes) -> _Scans | None:
    """Walk the markers; None if this is no file that can be decoded in parts."""
    present: dict[int, int] = {}
    num_scans, is_progressive, end = 0, False, None
    offset = 2
    while found := _MARKER.search(data, offset):
        offset = found.end()
        marker, segment = data[offset - 1], data[offset : offset + 40]
        if marker == _END:
            end = found.start()
            break
        if marker in _FRAMES:
            is_progressive = marker == _PROGRESSIVE
            present = dict.fromkeys(segment[8 : 8 + 3 * int.from_bytes(segment[7:8]) : 3], 0)
        elif marker == _SCAN:
            num_scans += 1
            band = 3 + 2 * int.from_bytes(segment[2:3])
            first, last, bits = (*segment[band : band + 3], 0, 0, 0)[:3]
            covered = (2 << min(last, 63)) - (1 << min(first, 63)) if is_progressive else _ALL
            for component in segment[3:band:2] if not is_progressive or not bits & 15 else ():
                present[component] = present.get(component, 0) | covered
        offset += 0 if marker in (_START, 0x01) else int.from_bytes(segment[:2])
    if not num_scans or not present:
        return None
    return _Scans(end, num_scans == 1 and not is_progressive, all(bands == _ALL for bands in present.values()))
