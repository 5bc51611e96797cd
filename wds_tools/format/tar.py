"""Tar archives as bytes: headers out, members in. No files, no network, no `tarfile`.

Writing: `header(name, size)` + payload + `padding(size)` per member, `END` after the last. Ustar, mode 0644, owner and time
zero, so equal input gives equal bytes.
Reading: `TarReader.feed(bytes)` returns the members completed so far, however the bytes were cut; `close()` refuses an archive
that simply stops. (CPython's tarfile reports no error for a tar that was cut at a header; here the end marker is required.)
Understood beside plain ustar: GNU long names, base-256 sizes, pax `path` and `size`. Directories are passed over; links, devices
and labels too, as webdataset does, and counted. What would lose data unseen (sparse members, data after the end) is a
FormatError with the byte offset.
Cost: one pass; only bytes of a member that was cut are copied, a few times at most. Memory is what was fed plus one incomplete
member, bounded by `max_member_bytes`.
Layout: POSIX.1-2017, pax, "ustar Interchange Format".
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from typing import NamedTuple

from wds_tools.errors import FormatError

BLOCK = 512
END = bytes(2 * BLOCK)
MAX_SIZE = 8**11 - 1
MAX_MEMBER_BYTES = (4 << 30) - 2
"""Of a member that is read: what an index can state (2**32 - 1 means absent)."""
_MAX_EXTENSION_BYTES = 1 << 20
_RECORD = 21 * BLOCK
"""More than the zeros that tar writes behind the end."""

_MODE_UID_GID = b"0000644\x00" + b"0000000\x00" * 2
_MTIME = b"\x00" + b"00000000000\x00"
_TYPE_TO_DEVICES = b"0" + bytes(100) + b"ustar\x0000" + bytes(64) + b"0000000\x00" * 2
_NAME_PADS = tuple(bytes(100 - n) for n in range(101))
_PREFIX_PADS = tuple(bytes(BLOCK - 345 - n) for n in range(156))
_CONSTANT_SUM = sum(_MODE_UID_GID + _MTIME + _TYPE_TO_DEVICES) + 8 * 0x20
_PADS = tuple(bytes(-n % BLOCK) for n in range(BLOCK))
_KINDS = {b"S": "a sparse file", b"M": "a continued volume"}
_NO_PAYLOAD = b"123456"
"""Links, devices, folders and FIFOs: whatever size they state, no bytes follow."""
_MAX_LINKS = 100_000
_NO_FILES = _NO_PAYLOAD + b"V"


class Member(NamedTuple):
    """One regular file of a tar."""

    name: str
    payload: memoryview
    start: int
    """Offset of its first header block (a long-name or pax block, if it has one), in bytes from the archive's start."""
    offset: int
    """Offset of its payload."""
    num_dropped: int = 0
    """Bytes of a payload that is larger than wanted: they are passed over, and `payload` is empty."""

    @property
    def end(self) -> int:
        """Offset after its padding: where the next header starts."""
        size = len(self.payload) + self.num_dropped
        return self.offset + size + -size % BLOCK


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
    prefix = b""
    if len(name_bytes) > 100:
        name_bytes, prefix = _split_name(name_bytes)
    if not 0 <= size <= MAX_SIZE:
        raise FormatError(f"{name}: {size} bytes do not fit a ustar member (at most {MAX_SIZE})")
    digits = b"%011o" % size
    checksum = b"%06o\x00 " % (_CONSTANT_SUM + sum(name_bytes) + sum(digits) + sum(prefix))
    pads = _NAME_PADS[len(name_bytes)], _PREFIX_PADS[len(prefix)]
    return b"".join((name_bytes, pads[0], _MODE_UID_GID, digits, _MTIME, checksum, _TYPE_TO_DEVICES, prefix, pads[1]))


def _split_name(name: bytes) -> tuple[bytes, bytes]:
    cut = name.find(b"/", max(1, len(name) - 101))
    if cut < 1 or cut > 155 or cut == len(name) - 1:
        raise FormatError(f"{name.decode()!r} is {len(name)} bytes: a ustar name has at most 100 after its last usable '/'")
    return name[cut + 1 :], name[:cut]


class TarReader:
    """Members of an archive that arrives in pieces.

    Args:
        name: what error messages call the archive.
        max_member_bytes: a member larger than this is refused: a header may claim anything.
        lenient: give such a member without its payload instead, and names that are not UTF-8 with \\xNN in them.
    """

    def __init__(self, name: str = "tar", *, max_member_bytes: int = MAX_MEMBER_BYTES, lenient: bool = False) -> None:
        self._name = name
        self._max_member_bytes = max_member_bytes
        self._lenient = lenient
        self._to_drop = 0  # bytes that come next, of a member that is too large
        self._pieces: list[bytes | memoryview] = []
        self._held = 0
        self._needed = BLOCK
        self._base = 0  # offset in the archive of the first held byte
        self._start = -1  # start of a member whose extension blocks were seen, else -1
        self._long_name: str | None = None
        self._pax_size: int | None = None
        self._ended = False
        self._fault: FormatError | None = None
        self.num_passed_over = 0
        """Links, devices and labels so far."""
        self.links: deque[str] = deque(maxlen=_MAX_LINKS)
        """Names of the links among them, until somebody takes them."""

    @property
    def at_end(self) -> bool:
        """True once the end marker has begun: what was fed are whole members."""
        return self._ended

    def feed(self, data: bytes | memoryview) -> list[Member]:
        """Take the next bytes; return the members they complete (payloads are views of what was fed).

        Raises:
            FormatError: the archive is broken at a named byte, or holds a member that can't be represented. Members before
                that byte are returned first; the next call raises.
        """
        if self._fault is not None:
            raise self._fault
        if self._to_drop:
            num_bytes = min(self._to_drop, len(data))
            self._to_drop -= num_bytes
            self._base += num_bytes
            data = memoryview(data)[num_bytes:]
        if not data:
            return []
        if self._held and self._held + len(data) > self._needed:  # only what completes a member that was cut is copied
            return self._feed_apart(memoryview(data), self._needed - self._held)
        self._pieces.append(data)
        self._held += len(data)
        if self._held < self._needed:
            return []
        buffer = memoryview(self._pieces[0] if len(self._pieces) == 1 else b"".join(self._pieces))
        members: list[Member] = []
        try:
            offset = self._consume(buffer, members)
        except FormatError as fault:
            if not members:
                raise
            self._fault, offset = fault, len(buffer)
        rest = buffer[offset:]
        self._base += offset
        self._pieces = [rest] if len(rest) else []
        self._held = len(rest)
        return members

    def _feed_apart(self, data: memoryview, first_bytes: int) -> list[Member]:
        members = self.feed(data[:first_bytes])
        if self._fault is None:
            try:
                members += self.feed(data[first_bytes:])
            except FormatError as fault:
                if not members:
                    raise
                self._fault = fault
        return members

    def close(self) -> None:
        """Say that no more bytes follow.

        Raises:
            FormatError: the archive was cut: it lacks its end marker or part of a member.
        """
        if self._fault is not None:
            raise self._fault
        rest = b"".join(self._pieces)
        offset = self._base + len(rest)
        if self._ended:
            self._after_end(rest, self._base)
        elif not (rest.strip(b"\0") or self._to_drop):
            raise FormatError(
                f"{self._name}: ends at byte {offset} without the end-of-archive blocks: it was cut off or never finished"
            )
        elif offset < BLOCK:
            raise FormatError(f"{self._name}: {offset} bytes, less than one tar header: {_looks_like(rest, 0)}")
        else:
            where = f"inside a member that starts at byte {self._base}"
            raise FormatError(f"{self._name}: ends at byte {offset} {where}: it was cut off")

    def _consume(self, buffer: memoryview, members: list[Member]) -> int:
        offset, size = 0, len(buffer)
        self._needed = BLOCK
        while size - offset >= BLOCK:
            block = bytes(buffer[offset : offset + BLOCK])
            if self._ended or not block.strip(b"\0"):
                self._after_end(block, self._base + offset)
                offset += BLOCK
                continue
            kind, length = self._parse_kind_and_size(block, self._base + offset)
            self._needed = BLOCK + length + -length % BLOCK
            num_dropped = 0
            if length > self._max_member_bytes and kind not in b"xgLK":
                num_dropped, length, self._to_drop, self._needed = length, 0, self._needed - BLOCK, BLOCK
            if size - offset < self._needed:
                return offset
            payload = buffer[offset + BLOCK : offset + BLOCK + length]
            member = self._member(block, kind, payload, self._base + offset)
            if member is not None:
                members.append(member._replace(num_dropped=num_dropped) if num_dropped else member)
            offset += self._needed
            self._needed = BLOCK
            if self._to_drop:
                num_bytes = min(self._to_drop, size - offset)
                self._to_drop -= num_bytes
                offset += num_bytes
        return offset

    def _after_end(self, block: bytes, offset: int) -> None:
        if block.strip(b"\0"):
            raise FormatError(
                f"{self._name}: data after the end of the archive at byte {offset}: "
                "concatenated tars hide their later members from most readers; join them with `tar --concatenate`"
            )
        if self._start >= 0:
            raise FormatError(f"{self._name}: a long-name or pax block at byte {self._start} has no member after it")
        self._ended = True

    def _parse_kind_and_size(self, block: bytes, offset: int) -> tuple[bytes, int]:
        stored = _octal(block[148:156])
        if stored is None or stored != sum(block) - sum(block[148:156]) + 8 * 0x20:
            what = _looks_like(block, offset)
            raise FormatError(f"{self._name}: no tar header at byte {offset} (its checksum is wrong): {what}")
        kind = block[156:157]
        if kind not in b"0\x007xgLK" + _NO_FILES:
            what = _KINDS.get(kind, f"of the unknown type {kind!r}")
            raise FormatError(f"{self._name}: the member at byte {offset} is {what}; a shard holds regular files only")
        size = self._pax_size if self._pax_size is not None and kind in b"0\x007" else _number(block[124:136])
        if size is None or size < 0:
            raise FormatError(f"{self._name}: the header at byte {offset} has an unreadable size {block[124:136]!r}")
        if kind in _NO_PAYLOAD:
            size = 0
        limit = _MAX_EXTENSION_BYTES if kind in b"xgLK" else self._max_member_bytes
        if size > limit and (kind in b"xgLK" or not self._lenient):
            raise FormatError(f"{self._name}: the member at byte {offset} claims {size} bytes; at most {limit} are accepted")
        return kind, size

    def _member(self, block: bytes, kind: bytes, payload: memoryview, offset: int) -> Member | None:
        if kind in b"xgLK":
            if kind == b"x":
                self._take_pax(payload, offset)
            elif kind == b"g" and any(key in (b"path", b"size") for key, _ in self._pax_records(payload, offset)):
                raise FormatError(f"{self._name}: a global pax header at byte {offset} renames every member: not supported")
            elif kind == b"L":
                self._long_name = self._text(bytes(payload).rstrip(b"\0"), offset)
            if self._start < 0 and kind != b"g":
                self._start = offset
            return None
        start = offset if self._start < 0 else self._start
        name = self._long_name
        self._start, self._long_name, self._pax_size = -1, None, None
        if kind in _NO_FILES:
            self.num_passed_over += kind != b"5"
            if kind in b"12":
                self.links.append(name or block[:100].split(b"\0", 1)[0].decode(errors="replace"))
            return None
        if name is None:
            name_bytes = block[:100].split(b"\0", 1)[0]
            if block[257:263] == b"ustar\0" and block[345] != 0:
                name_bytes = block[345:500].split(b"\0", 1)[0] + b"/" + name_bytes
            name = self._text(name_bytes, offset)
        if kind == b"\0" and name.endswith("/") and not payload:  # a directory, before POSIX gave it a type
            return None
        return Member(name, payload, start, offset + BLOCK)

    def _take_pax(self, payload: memoryview, offset: int) -> None:
        for key, value in self._pax_records(payload, offset):
            if key == b"path":
                self._long_name = self._text(value, offset) or None
            elif key == b"size":
                if not value.isdigit() or len(value) > 18:
                    raise FormatError(
                        f"{self._name}: the pax block at byte {offset} has the size {value[:40]!r}: not a number of bytes"
                    )
                self._pax_size = int(value)
            elif key.startswith(b"GNU.sparse"):
                raise FormatError(f"{self._name}: the member at byte {offset} is a sparse file; a shard holds regular files only")

    def _pax_records(self, payload: memoryview, offset: int) -> Iterator[tuple[bytes, bytes]]:
        return pax_records(bytes(payload), f"{self._name}: the pax block at byte {offset}")

    def _text(self, name: bytes, offset: int) -> str:
        try:
            return name.decode()
        except UnicodeDecodeError as error:
            if self._lenient:
                return name.decode(errors="backslashreplace")
            raise FormatError(f"{self._name}: the member name {name!r} at byte {offset} is not UTF-8") from error


class MemberPlace(NamedTuple):
    """Where one regular file of a tar lies."""

    name: str
    start: int
    """Offset of its first header block, as Member.start."""
    offset: int
    """Offset of its payload."""
    num_bytes: int
    """Of its payload."""


def member_places(read: Callable[[int, int], bytes | memoryview], size: int, name: str = "tar") -> Iterator[MemberPlace]:
    """The regular files of an archive, by its headers alone; names that are not UTF-8 have \\xNN in them.

    Args:
        read: (start, end) -> these bytes of the archive.
        size: of the archive, in bytes.
        name: what error messages call it.

    Raises:
        FormatError: as TarReader, when all members before the fault are out.
    """
    reader = TarReader(name, lenient=True)
    offset = 0
    if size < BLOCK:
        reader.feed(read(0, size))
        reader.close()
    while offset + BLOCK <= size:
        block = bytes(read(offset, offset + BLOCK))
        if not block.strip(b"\0"):
            reader._after_end(bytes(read(offset, min(offset + _RECORD, size))), offset)
            return
        kind, num_bytes = reader._parse_kind_and_size(block, offset)
        end = offset + BLOCK + num_bytes
        if end > size:
            break
        payload = memoryview(read(offset + BLOCK, end) if kind in b"xgLK" else b"")
        member = reader._member(block, kind, payload, offset)
        if member is not None:
            yield MemberPlace(member.name, member.start, member.offset, num_bytes)
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
    reader = TarReader(name, lenient=True)
    reader._base = offset
    reader.feed(blocks[:-BLOCK])
    block = bytes(blocks[-BLOCK:])
    begin = offset + max(len(blocks) - BLOCK, 0)
    kind, _ = reader._parse_kind_and_size(block.ljust(BLOCK, b"\0"), begin)
    member = None if reader._held else reader._member(block, kind, memoryview(b""), begin)
    if member is None:
        raise FormatError(f"{name}: no regular file at byte {begin}")
    return member.name


def pax_records(payload: bytes, where: str) -> Iterator[tuple[bytes, bytes]]:
    """The (key, value) pairs of a pax block; TarReader minds those that `changes_member` names.

    Raises:
        FormatError: a record is broken; the message begins with `where`.
    """
    while payload:
        digits, _, _ = payload.partition(b" ")
        length = int(digits) if digits.isdigit() and len(digits) < 8 else 0
        record = payload[len(digits) + 1 : length]
        if length > len(payload) or not record.endswith(b"\n") or b"=" not in record:
            raise FormatError(f"{where} has a broken record {payload[:40]!r}")
        key, _, value = record[:-1].partition(b"=")
        yield key, value
        payload = payload[length:]


def changes_member(pax_key: bytes) -> bool:
    """Whether a pax record of this key says something of its member that a reader may not pass over."""
    return pax_key in (b"path", b"size") or pax_key.startswith(b"GNU.sparse")


def _octal(field: bytes) -> int | None:
    digits = field.split(b"\0", 1)[0].strip()
    if not digits:
        return 0
    try:
        return int(digits, 8) if digits.isdigit() else None
    except ValueError:
        return None


def _number(field: bytes) -> int | None:
    """A numeric header field: octal digits, or GNU's base-256 when the top bit is set (0xff: negative)."""
    if field[0] & 0x80:
        return None if field[0] == 0xFF else int.from_bytes(bytes([field[0] & 0x7F]) + field[1:], "big")
    return _octal(field)


def _looks_like(block: bytes, offset: int) -> str:
    if offset:
        return "the archive is damaged there or was cut and joined"
    for magic, what in (
        (b"\x1f\x8b", "this is gzip: unpack it first (gunzip); a shard is an uncompressed tar"),
        (b"BZh", "this is bzip2: unpack it first (bunzip2); a shard is an uncompressed tar"),
        (b"\xfd7zXZ\0", "this is xz: unpack it first (unxz); a shard is an uncompressed tar"),
        (b"\x28\xb5\x2f\xfd", "this is zstd: unpack it first (unzstd); a shard is an uncompressed tar"),
        (b"version https://git-lfs", "this is a Git LFS pointer: fetch the file itself with `git lfs pull`"),
    ):
        if block.startswith(magic):
            return what
    if block.lstrip()[:1] == b"<":
        return "this looks like an HTML or XML page: the download failed"
    return "this is not a tar, or only the first bytes of one"
