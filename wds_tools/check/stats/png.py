"""Pixels -> PNG, by zlib: pictures need no Pillow, and inside HTML they take less than a rectangle a pixel would."""

from __future__ import annotations

import struct
import zlib

import numpy as np
from numpy.typing import NDArray


def png_bytes(pixels_HW3: NDArray[np.uint8]) -> bytes:
    """An 8-bit RGB PNG file (ISO/IEC 15948): each line after a filter byte 0, deflated at its fastest."""
    H, W, _ = pixels_HW3.shape
    lines = np.zeros((H, 1 + 3 * W), np.uint8)
    lines[:, 1:] = pixels_HW3.reshape(H, 3 * W)
    chunks = (
        (b"IHDR", struct.pack(">IIBBBBB", W, H, 8, 2, 0, 0, 0)),
        (b"IDAT", zlib.compress(lines.data, 1)),
        (b"IEND", b""),
    )
    packed = (struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data)) for name, data in chunks)
    return b"\x89PNG\r\n\x1a\n" + b"".join(packed)
