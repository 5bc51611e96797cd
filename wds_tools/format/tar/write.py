"""Members into a tar: `header(name, size)` + payload + `padding(size)` each, and `END` after the last.

Ustar, mode 0644, owner and time zero, so equal input gives equal bytes.
"""

from __future__ import annotations

from wds_tools.errors import FormatError
from wds_tools.format.tar.headers import BLOCK

END = bytes(2 * BLOCK)
MAX_SIZE = 8**11 - 1

_MODE_UID_GID = b"0000644\x00" + b"0000000\x00" * 2
_MTIME = b"\x00" + b"00000000000\x00"
_TYPE_TO_DEVICES = b"0" + bytes(100) + b"ustar\x0000" + bytes(64) + b"0000000\x00" * 2
_BEHIND_CHECKSUM = _TYPE_TO_DEVICES + bytes(BLOCK - 345)
"""To the end of the block, where there is no prefix."""
_CONSTANT_SUM = sum(_MODE_UID_GID + _MTIME + _TYPE_TO_DEVICES) + 8 * 0x20
_PADS = tuple(bytes(-n % BLOCK) for n in range(BLOCK))


def padding(size: int) -> bytes:
    """The zero bytes that fill `size` payload bytes up to a whole block."""
    return _PADS[size % BLOCK]


def header(name: str, size: int) -> bytes:
    """The 512-byte ustar header of a regular file.

    Args:
        name: up to 100 bytes of UTF-8, or up to 255 if it can be split at a '/'.
        size: payload bytes, 0 to 8 GiB - 1.

    Raises:
        FormatError: the name or the size does not fit a ustar header.
    """
    if not name or "\0" in name:
        raise FormatError(f"the member name {name!r} is empty or has a NUL")
    try:
        name_bytes = name.encode()
    except UnicodeEncodeError as error:
        raise FormatError(f"the member name {name!r} can't be written as UTF-8") from error
    prefix, behind = b"", _BEHIND_CHECKSUM
    if len(name_bytes) > 100:
        name_bytes, prefix = _split_name(name_bytes)
        behind = _TYPE_TO_DEVICES + prefix.ljust(BLOCK - 345, b"\0")
    if not 0 <= size <= MAX_SIZE:
        raise FormatError(f"{name}: {size} bytes do not fit a ustar member (at most {MAX_SIZE})")
    digits = b"%011o" % size
    checksum = b"%06o\x00 " % (_CONSTANT_SUM + sum(name_bytes + prefix + digits))
    return b"".join((name_bytes.ljust(100, b"\0"), _MODE_UID_GID, digits, _MTIME, checksum, behind))


def _split_name(name: bytes) -> tuple[bytes, bytes]:
    cut = name.find(b"/", max(1, len(name) - 101))
    if cut < 1 or cut > 155 or cut == len(name) - 1:
        raise FormatError(f"{name.decode()!r} is {len(name)} bytes: a ustar name has at most 100 after its last usable '/'")
    return name[cut + 1 :], name[:cut]
