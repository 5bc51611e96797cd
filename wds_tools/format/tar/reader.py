"""Tar archives that arrive in pieces: bytes in, members out. No files, no network, no `tarfile`.

`TarReader.feed(bytes)` returns the members completed so far, however the bytes were cut; `close()` refuses an archive that simply
stops. (CPython's tarfile reports no error for a tar that was cut at a header; here the end marker is required.)
Cost: one pass; only bytes of a member that was cut are copied, a few times at most. Memory is what was fed plus one incomplete
member, bounded by `max_member_bytes`.
"""

from __future__ import annotations

from collections import deque

from wds_tools.errors import FormatError
from wds_tools.format.tar.headers import BLOCK, EXTENSIONS, MAX_MEMBER_BYTES, Headers, Member, too_short


class TarReader:
    """Members of an archive that arrives in pieces.

    Args:
        name: what error messages call the archive.
        max_member_bytes: a member larger than this is refused: a header may claim anything.
        lenient: give such a member without its payload instead, and names that are not UTF-8 with \\xNN in them.
    """

    def __init__(self, name: str = "tar", *, max_member_bytes: int = MAX_MEMBER_BYTES, lenient: bool = False) -> None:
        self._name = name
        self._headers = Headers(name, max_member_bytes=max_member_bytes, lenient=lenient)
        self._max_member_bytes = max_member_bytes
        self._to_drop = 0  # bytes that come next, of a member that is too large
        self._pieces: list[bytes | memoryview] = []
        self._held = 0
        self._needed = BLOCK
        self._base = 0  # offset in the archive of the first held byte
        self._ended = False
        self._fault: FormatError | None = None

    @property
    def num_passed_over(self) -> int:
        """Links, devices and labels so far."""
        return self._headers.num_passed_over

    @property
    def links(self) -> deque[str]:
        """Names of the links among them, until somebody takes them."""
        return self._headers.links

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
            self._headers.check_end(rest, self._base)
        elif not (rest.strip(b"\0") or self._to_drop):
            raise FormatError(
                f"{self._name}: ends at byte {offset} without the end-of-archive blocks: it was cut off or never finished"
            )
        elif offset < BLOCK:
            raise too_short(rest, self._name)
        else:
            where = f"inside a member that starts at byte {self._base}"
            raise FormatError(f"{self._name}: ends at byte {offset} {where}: it was cut off")

    def _consume(self, buffer: memoryview, members: list[Member]) -> int:
        offset, size = 0, len(buffer)
        self._needed = BLOCK
        while size - offset >= BLOCK:
            block = bytes(buffer[offset : offset + BLOCK])
            if self._ended or not block.strip(b"\0"):
                self._headers.check_end(block, self._base + offset)
                self._ended = True
                offset += BLOCK
                continue
            kind, length = self._headers.kind_and_size(block, self._base + offset)
            self._needed = BLOCK + length + -length % BLOCK
            num_dropped = 0
            if length > self._max_member_bytes and kind not in EXTENSIONS:
                num_dropped, length, self._to_drop, self._needed = length, 0, self._needed - BLOCK, BLOCK
            if size - offset < self._needed:
                return offset
            payload = buffer[offset + BLOCK : offset + BLOCK + length]
            member = self._headers.member(block, kind, payload, self._base + offset)
            if member is not None:
                members.append(member._replace(num_dropped=num_dropped) if num_dropped else member)
            offset += self._needed
            self._needed = BLOCK
            if self._to_drop:
                num_bytes = min(self._to_drop, size - offset)
                self._to_drop -= num_bytes
                offset += num_bytes
        return offset
