"""Gzip and Zstandard files as a stream of bytes that never ends early without saying so, and loses nothing before damage.

    open file -> pieces of a few bytes -> members (gzip) or frames (zstd), one after the other -> bytes of text

What a call of a decompressor had made when it met damage is lost. So a file that is damaged is read once more, and the piece
with the damage byte by byte. (Of a file that was cut off, isal holds back what its last few bytes become.) As `gzip` does, zeros
behind the last member are no damage.
Cost: that of isal and libzstd, at several hundred MB/s. Memory, also of a bomb: a piece and what comes out of it at once, 1 MiB
of gzip, of zstd 16 MiB and the window of its frame.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any, BinaryIO, NamedTuple

import zstandard
from isal import igzip_lib

from wds_tools.errors import Reject

MAX_WINDOW_BYTES = 128 << 20
"""Larger windows are refused, as the `zstd` tool does by default: a header may ask for gigabytes."""
_OUTPUT_BYTES = 1 << 20
_READ_BYTES = 1 << 20
_ERRORS: tuple[Any, ...] = (igzip_lib.IsalError, zstandard.ZstdError)
_HINTS = {
    "too much memory": f"the frame asks for a window of more than {MAX_WINDOW_BYTES >> 20} MiB: recompress it without --long",
    "Dictionary": "the frame needs a dictionary, which is not part of the file: recompress it without one",
}


class _Codec(NamedTuple):
    """How files of one compression are read."""

    part: str
    """What a file consists of."""
    magics: tuple[bytes, ...]
    """What each begins with."""
    padding: bytes
    """That may stand between them."""
    piece_bytes: int
    """Of the file, at a time: 4 bytes of zstd may become 128 KiB."""
    opened: Callable[[], Callable[[], Any]]
    """Of a file: what makes the decompressor of the next."""
    inflate: Callable[[Any, bytes], Iterator[bytes]]
    """The text of a piece."""


def _inflate_gzip(inflater: Any, piece: bytes) -> Iterator[bytes]:
    yield inflater.decompress(piece, _OUTPUT_BYTES)
    while not (inflater.needs_input or inflater.eof):
        yield inflater.decompress(b"", _OUTPUT_BYTES)


_CODECS = {
    "gz": _Codec(
        part="member",
        magics=(b"\x1f\x8b",),
        padding=b"\0",
        piece_bytes=64 << 10,
        opened=lambda: partial(igzip_lib.IgzipDecompressor, flag=igzip_lib.DECOMP_GZIP),
        inflate=_inflate_gzip,
    ),
    "zst": _Codec(
        part="frame",
        magics=(b"\x28\xb5\x2f\xfd", *(bytes((number,)) + b"\x2a\x4d\x18" for number in range(0x50, 0x60))),  # to be skipped
        padding=b"",
        piece_bytes=512,
        opened=lambda: zstandard.ZstdDecompressor(max_window_size=MAX_WINDOW_BYTES).decompressobj,
        inflate=lambda inflater, piece: iter((inflater.decompress(piece),)),
    ),
}


def compression_of(head: bytes) -> str:
    """ "gz" or "zst", by the first 4 bytes of a file; "" for others."""
    return next((name for name, codec in _CODECS.items() if head.startswith(codec.magics)), "")


def read_pieces(open_file: Callable[[], BinaryIO], compression: str) -> Iterator[tuple[bytes, int]]:
    """What is in a file, decompressed, also where it consists of several members or frames.

    Args:
        open_file: opens it; called twice if it is damaged.
        compression: "gz", "zst", or "" for none.

    Yields:
        (bytes, perhaps none; bytes of the file read so far). Whether a checksum holds is known behind its member or frame.

    Raises:
        Reject: behind all that could be decompressed: "empty_file", "not_gz", "truncated_gz", "corrupt_gz", "not_zst",
            "truncated_zst" or "corrupt_zst".
    """
    if not compression:
        with open_file() as stream:
            read_bytes = 0
            while data := stream.read(_READ_BYTES):
                read_bytes += len(data)
                yield data, read_bytes
        return
    done_bytes = read_bytes = 0
    with open_file() as stream:
        try:
            for data, read_bytes in _inflate(compression, _pieces(stream, compression)):
                done_bytes += len(data)
                yield data, read_bytes
            return
        except _ERRORS:
            pass
    with open_file() as stream:
        size = 0
        try:
            for data, fine_bytes in _inflate(compression, _pieces(stream, compression, whole_bytes=read_bytes - 1)):
                size += len(data)
                if size > done_bytes:
                    yield data[max(done_bytes - (size - len(data)), 0) :], fine_bytes
        except _ERRORS as error:
            said = re.sub(r"^(Error -?\d+|zstd decompressor error:) ", "", str(error))
            why = next((hint for word, hint in _HINTS.items() if word in said), said)
            raise Reject(f"corrupt_{compression}", f"{why} (behind {size} bytes of text)") from error


def _inflate(compression: str, pieces: Iterable[bytes]) -> Iterator[tuple[bytes, int]]:
    codec = _CODECS[compression]
    begin = codec.opened()
    inflater, num_parts, read_bytes = None, 0, 0
    for piece in pieces:
        read_bytes += len(piece)
        while piece:
            if inflater is None:
                piece = piece.lstrip(codec.padding) if num_parts else piece
                if not piece:
                    break
                if not any(magic.startswith(piece[: len(magic)]) for magic in codec.magics):
                    what = f"bytes behind the last {codec.part} that are none: trailing garbage"
                    begins = f"not a .{compression} file: it begins with {piece[:8]!r}"
                    raise Reject(f"not_{compression}", what if num_parts else begins)
                inflater = begin()
                num_parts += 1
            for data in codec.inflate(inflater, piece):
                yield data, read_bytes
            piece = inflater.unused_data if inflater.eof else b""
            if inflater.eof:
                inflater = None
    if read_bytes == 0:
        raise Reject("empty_file", "0 bytes: an interrupted download?")
    if inflater is not None:
        what = f"the file ends at byte {read_bytes} in the middle of {codec.part} {num_parts}: it was cut off"
        raise Reject(f"truncated_{compression}", what)


def _pieces(stream: BinaryIO, compression: str, whole_bytes: int | None = None) -> Iterator[bytes]:
    """A file in pieces; singly where the damage is found: behind `whole_bytes`, which was not the end of the piece before."""
    read_bytes = 0
    while piece := stream.read(_CODECS[compression].piece_bytes):
        read_bytes += len(piece)
        if whole_bytes is None or read_bytes <= whole_bytes:
            yield piece
        else:
            yield from (piece[at : at + 1] for at in range(len(piece)))
