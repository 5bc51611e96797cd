"""Where the members of a tar lie, and what they are called, by header blocks alone: payloads are not read."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from wds_tools.errors import FormatError
from wds_tools.format.tar.headers import BLOCK, EXTENSIONS, Headers, Member, too_short

_RECORD = 21 * BLOCK
"""More than the zeros that tar writes behind the end."""


def member_places(read: Callable[[int, int], bytes | memoryview], size: int, name: str = "tar") -> Iterator[Member]:
    """The regular files of an archive without their payloads, by its headers alone; names that are not UTF-8 have \\xNN in them.

    Args:
        read: (start, end) -> these bytes of the archive.
        size: of the archive, in bytes.
        name: what error messages call it.

    Raises:
        FormatError: as TarReader, when all members before the fault are out.
    """
    headers = Headers(name, lenient=True)
    offset = 0
    if size < BLOCK and (data := bytes(read(0, size))).strip(b"\0"):
        raise too_short(data, name)
    while offset + BLOCK <= size:
        block = bytes(read(offset, offset + BLOCK))
        if not block.strip(b"\0"):
            headers.check_end(bytes(read(offset, min(offset + _RECORD, size))), offset)
            return
        kind, num_bytes = headers.kind_and_size(block, offset)
        end = offset + BLOCK + num_bytes
        if end > size:
            break
        payload = memoryview(read(offset + BLOCK, end) if kind in EXTENSIONS else b"")
        member = headers.member(block, kind, payload, offset)
        if member is not None:
            yield member._replace(num_dropped=num_bytes)
        offset = end + -num_bytes % BLOCK
    raise FormatError(f"{name}: ends at byte {size}, where a member or the end-of-archive blocks are missing: it was cut off")


def first_name(blocks: bytes | memoryview, name: str, offset: int) -> str:
    """The name of a regular file, from its header blocks alone: long-name and pax blocks, if it has any, and its header.

    Args:
        blocks: these blocks, whole.
        name, offset: the archive and the byte in it where they begin, for messages.

    Raises:
        FormatError: they are not that.
    """
    headers = Headers(name, lenient=True)
    begin = 0
    while True:
        block = bytes(blocks[begin : begin + BLOCK]).ljust(BLOCK, b"\0")
        kind, num_bytes = headers.kind_and_size(block, offset + begin)
        end = begin + BLOCK + num_bytes
        if kind not in EXTENSIONS or end >= len(blocks):
            break
        headers.member(block, kind, memoryview(blocks)[begin + BLOCK : end], offset + begin)
        begin = end + -num_bytes % BLOCK
    member = headers.member(block, kind, memoryview(b""), offset + begin) if len(blocks) == begin + BLOCK else None
    if member is None:
        raise FormatError(f"{name}: no regular file at byte {offset + begin}")
    return member.name
