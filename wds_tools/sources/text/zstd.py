"""Zstandard files as a stream of bytes that never ends early without saying so, and loses nothing before damage.

python-zstandard's `stream_reader` ends the data of a frame that was cut off with no error, and drops what it had decompressed
of a read in which it meets one. So the compressed bytes are walked on their way in: `FrameWalker` follows frame and block
headers and cuts the file behind each block. It knows at the end of the file whether a frame ends there, and the decompressor
gets one block at a time, so that every whole block before the damage comes out.
Layout: RFC 8878, section 3.1. Cost: a few microseconds a block (128 KiB of output at most); memory is one read buffer, one
block and the frame's window.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import BinaryIO

import zstandard

from wds_tools.errors import Reject

MAX_WINDOW_BYTES = 128 << 20
"""Larger windows are refused, as the `zstd` tool does by default: a header may ask for gigabytes."""
_READ_BYTES = 1 << 20
_MAGIC = b"\x28\xb5\x2f\xfd"
_SKIPPABLE_TAIL = b"\x2a\x4d\x18"
"""A skippable frame begins with one of 0x50 ... 0x5f and these."""


class FrameWalker:
    """Follows the frames of a zstd file through its bytes, fed in any pieces, without decompressing."""

    def __init__(self) -> None:
        self._rest = b""
        self._skip = 0
        self._in_frame = False
        self._has_checksum = False
        self.num_frames = 0
        """Data frames begun."""

    @property
    def at_frame_end(self) -> bool:
        """True if the bytes so far are whole frames."""
        return not (self._rest or self._skip or self._in_frame)

    def feed(self, data: bytes) -> Iterator[bytes]:
        """Take the next bytes of the file.

        Yields:
            The same bytes, cut behind each frame header, block and checksum; a header that is not complete yet stays back.

        Raises:
            Reject: "not_zst": no frame begins where one should. All bytes before that place have been yielded.
        """
        data = self._rest + data
        at = 0
        while step := self._skip or self._step(data, at):
            piece = data[at : at + step]
            at += len(piece)
            self._skip = step - len(piece)
            if not piece:
                break
            yield piece
        self._rest = data[at:]

    def _step(self, data: bytes, at: int) -> int:
        """Bytes from `at` to the next cut, or 0 if too few are there to tell."""
        head = data[at : at + 18]  # the longest frame header
        if not self._in_frame:
            if self._has_checksum:
                self._has_checksum = False
                return 4
            return self._begin_frame(head) if head else 0
        if len(head) < 3:
            return 0
        bits = int.from_bytes(head[:3], "little")
        is_last, kind, size = bits & 1, bits >> 1 & 3, bits >> 3
        if is_last:
            self._in_frame = False
        return 3 + (1 if kind == 1 else size)

    def _begin_frame(self, head: bytes) -> int:
        if head[0] & 0xF0 == 0x50 and _SKIPPABLE_TAIL.startswith(head[1:4]):
            return 8 + int.from_bytes(head[4:8], "little") if len(head) >= 8 else 0
        if not _MAGIC.startswith(head[:4]):
            raise Reject("not_zst", _not_zstd(head, first=self.num_frames == 0))
        if len(head) < 5:
            return 0
        descriptor = head[4]
        single_segment = descriptor >> 5 & 1
        content_size_bytes = (single_segment, 2, 4, 8)[descriptor >> 6]
        size = 5 + (0 if single_segment else 1) + (0, 1, 2, 4)[descriptor & 3] + content_size_bytes
        if len(head) < size:
            return 0
        self.num_frames += 1
        self._in_frame = True
        self._has_checksum = bool(descriptor & 4)
        return size


def is_zstd(head: bytes) -> bool:
    """Whether a file begins with a frame, perhaps one that is to be skipped."""
    return head.startswith(_MAGIC) or (head[:1] != b"" and head[0] & 0xF0 == 0x50 and head[1:4] == _SKIPPABLE_TAIL)


def decompress(stream: BinaryIO) -> Iterator[tuple[bytes, int]]:
    """Decompress a .zst file of one or more frames.

    Args:
        stream: the compressed file.

    Yields:
        (decompressed bytes, compressed bytes read so far). A frame's checksum is known to hold only when the next frame begins
        or the iteration ends.

    Raises:
        Reject: behind all that could be decompressed: "empty_file", "not_zst", "truncated_zst" or "corrupt_zst".
    """
    walker = FrameWalker()
    decompressor = zstandard.ZstdDecompressor(max_window_size=MAX_WINDOW_BYTES).decompressobj(read_across_frames=True)
    read_bytes = done_bytes = 0
    while chunk := stream.read(_READ_BYTES):
        read_bytes += len(chunk)
        for piece in walker.feed(chunk):
            try:
                data = decompressor.decompress(piece)
            except zstandard.ZstdError as error:
                raise Reject("corrupt_zst", f"{_reason(error)} (frame {walker.num_frames}, at byte {done_bytes})") from error
            done_bytes += len(piece)
            if data:
                yield data, read_bytes
    if read_bytes == 0:
        raise Reject("empty_file", "0 bytes: an interrupted download?")
    if not walker.at_frame_end:
        raise Reject(
            "truncated_zst", f"the file ends at byte {read_bytes} in the middle of frame {walker.num_frames}: it was cut off"
        )


def _reason(error: zstandard.ZstdError) -> str:
    text = str(error).removeprefix("zstd decompressor error: ")
    if "too much memory" in text:
        return f"the frame asks for a window of more than {MAX_WINDOW_BYTES >> 20} MiB: recompress it without --long"
    if "Dictionary" in text:
        return "the frame needs a dictionary, which is not part of the file: recompress it without one"
    return text


def _not_zstd(head: bytes, *, first: bool) -> str:
    if not first:
        return "bytes behind the last frame that are no frame: trailing garbage"
    if head.startswith(b"\x1f\x8b"):
        return "a gzip file, not zstd: `gunzip < FILE | zstd`"
    if head.lstrip()[:1] in (b"{", b"["):
        return "plain JSON, not compressed: `zstd FILE`"
    return f"not a zstd file: it begins with {head[:8]!r}"
