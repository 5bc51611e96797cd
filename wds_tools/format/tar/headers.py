"""Header blocks of a tar: what a member is called, how large it is, and where it begins.

Understood beside plain ustar: GNU long names, base-256 sizes, pax `path` and `size`. Directories are passed over; links, devices
and labels too, as webdataset does, and counted. What would lose data unseen (sparse members, data after the end) is a
FormatError with the byte offset.
Layout: POSIX.1-2017, pax, "ustar Interchange Format".
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from typing import NamedTuple

from wds_tools.errors import FormatError

BLOCK = 512
MAX_MEMBER_BYTES = (4 << 30) - 2
"""Of a member that is read: what an index can state (2**32 - 1 means absent)."""
EXTENSIONS = b"xgLK"
"""Types of the blocks that say something of the member behind them."""
_MAX_EXTENSION_BYTES = 1 << 20
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
    """Bytes of a payload that is not wanted, or larger than that: they are passed over, and `payload` is empty."""

    @property
    def end(self) -> int:
        """Offset after its padding: where the next header starts."""
        size = len(self.payload) + self.num_dropped
        return self.offset + size + -size % BLOCK


class Headers:
    """Parses the header blocks of one archive, in their order.

    Args:
        name: what error messages call the archive.
        max_member_bytes: a member larger than this is refused.
        lenient: take such a member, and names that are not UTF-8 with \\xNN in them.
    """

    def __init__(self, name: str, *, max_member_bytes: int = MAX_MEMBER_BYTES, lenient: bool = False) -> None:
        self._name = name
        self._max_member_bytes = max_member_bytes
        self._lenient = lenient
        self._start = -1  # start of a member whose extension blocks were seen, else -1
        self._long_name: str | None = None
        self._pax_size: int | None = None
        self.num_passed_over = 0
        """Links, devices and labels so far."""
        self.links: deque[str] = deque(maxlen=_MAX_LINKS)
        """Names of the links among them, until somebody takes them."""

    def kind_and_size(self, block: bytes, offset: int) -> tuple[bytes, int]:
        """The type of what a header block begins, and the bytes of payload behind it.

        Raises:
            FormatError: the block is no header, or of something that can't be represented.
        """
        stored = _octal(block[148:156])
        if stored is None or stored != sum(block) - sum(block[148:156]) + 8 * 0x20:
            what = _looks_like(block, offset)
            raise FormatError(f"{self._name}: no tar header at byte {offset} (its checksum is wrong): {what}")
        kind = block[156:157]
        if kind not in b"0\x007" + EXTENSIONS + _NO_FILES:
            what = _KINDS.get(kind, f"of the unknown type {kind!r}")
            raise FormatError(f"{self._name}: the member at byte {offset} is {what}; a shard holds regular files only")
        size = self._pax_size if self._pax_size is not None and kind in b"0\x007" else _number(block[124:136])
        if size is None or size < 0:
            raise FormatError(f"{self._name}: the header at byte {offset} has an unreadable size {block[124:136]!r}")
        if kind in _NO_PAYLOAD:
            size = 0
        limit = _MAX_EXTENSION_BYTES if kind in EXTENSIONS else self._max_member_bytes
        if size > limit and (kind in EXTENSIONS or not self._lenient):
            raise FormatError(f"{self._name}: the member at byte {offset} claims {size} bytes; at most {limit} are accepted")
        return kind, size

    def member(self, block: bytes, kind: bytes, payload: memoryview, offset: int) -> Member | None:
        """The regular file of a header block; None for what is not a file, and is kept in mind for the next.

        Raises:
            FormatError: what it says of the next member can't be represented.
        """
        if kind in EXTENSIONS:
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
            name = self._text(header_name(block), offset)
        if kind == b"\0" and name.endswith("/") and not payload:  # a directory, before POSIX gave it a type
            return None
        return Member(name, payload, start, offset + BLOCK)

    def check_end(self, block: bytes, offset: int) -> None:
        """Raise FormatError if a block behind the end of the archive has data, or the last header belongs to no member."""
        if block.strip(b"\0"):
            raise FormatError(
                f"{self._name}: data after the end of the archive at byte {offset}: "
                "concatenated tars hide their later members from most readers; join them with `tar --concatenate`"
            )
        if self._start >= 0:
            raise FormatError(f"{self._name}: a long-name or pax block at byte {self._start} has no member after it")

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


def header_name(block: bytes) -> bytes:
    """The name in a ustar header."""
    name = block[:100].split(b"\0", 1)[0]
    if block[257:263] == b"ustar\0" and block[345]:
        return block[345:500].split(b"\0", 1)[0] + b"/" + name
    return name


def pax_records(payload: bytes, where: str) -> Iterator[tuple[bytes, bytes]]:
    """The (key, value) pairs of a pax block; Headers mind those that `changes_member` names.

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


def too_short(data: bytes, name: str) -> FormatError:
    """Of a file that is no whole block."""
    return FormatError(f"{name}: {len(data)} bytes, less than one tar header: {_looks_like(data, 0)}")


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
    """What a file is that begins with this block instead of a header, and what to do; of later blocks, what became of it."""
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
