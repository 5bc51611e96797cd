"""Gzip files as a stream of bytes that never ends early without saying so, and loses nothing before damage.

What a call of the decompressor had made when it met damage is lost. Files are fed by 64 KiB, so when one is damaged it is read
once more, and that piece by bytes. As `gzip` does, zeros behind the last member are no damage.
Cost: that of isal, at several hundred MB/s; memory is one piece and at most 1 MiB of what comes out, also of a gzip bomb.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import BinaryIO

from isal import igzip_lib

from wds_tools.errors import Reject

_PIECE_BYTES = 64 << 10
_OUTPUT_BYTES = 1 << 20
MAGIC = b"\x1f\x8b"


def decompress_gzip(open_file: Callable[[], BinaryIO]) -> Iterator[tuple[bytes, int]]:
    """Decompress a .gz file of one or more members.

    Args:
        open_file: opens the compressed file; called twice if it is damaged.

    Yields:
        (decompressed bytes, compressed bytes read so far). Whether a member's checksum holds is known behind its last bytes.

    Raises:
        Reject: behind all that could be decompressed: "empty_file", "not_gz", "truncated_gz" or "corrupt_gz".
    """
    done_bytes = read_bytes = 0
    with open_file() as stream:
        try:
            for data, read_bytes in _inflate(iter(lambda: stream.read(_PIECE_BYTES), b"")):
                done_bytes += len(data)
                yield data, read_bytes
            return
        except igzip_lib.IsalError:
            pass
    with open_file() as stream:
        size = 0
        try:
            for data, fine_bytes in _inflate(_fine_pieces(stream, read_bytes - 1)):
                size += len(data)
                if size > done_bytes:
                    yield data[max(done_bytes - (size - len(data)), 0) :], fine_bytes
        except igzip_lib.IsalError as error:
            reason = str(error).partition(" ")[2].partition(" ")[2]
            raise Reject("corrupt_gz", f"{reason} (behind {size} bytes of text)") from error


def _inflate(pieces: Iterable[bytes]) -> Iterator[tuple[bytes, int]]:
    inflater, num_members, read_bytes = None, 0, 0
    for piece in pieces:
        read_bytes += len(piece)
        while piece:
            if inflater is None:
                if num_members:
                    piece = piece.lstrip(b"\0")
                    if not piece:
                        break
                if not MAGIC.startswith(piece[:2]):
                    raise Reject("not_gz", _not_gzip(piece, first=num_members == 0))
                inflater = igzip_lib.IgzipDecompressor(flag=igzip_lib.DECOMP_GZIP)
                num_members += 1
            yield inflater.decompress(piece, _OUTPUT_BYTES), read_bytes
            while not (inflater.needs_input or inflater.eof):
                yield inflater.decompress(b"", _OUTPUT_BYTES), read_bytes
            piece = inflater.unused_data if inflater.eof else b""
            if inflater.eof:
                inflater = None
    if read_bytes == 0:
        raise Reject("empty_file", "0 bytes: an interrupted download?")
    if inflater is not None:
        raise Reject("truncated_gz", f"the file ends at byte {read_bytes} in the middle of member {num_members}: it was cut off")


def _fine_pieces(stream: BinaryIO, whole_bytes: int) -> Iterator[bytes]:
    """The same bytes, singly where the damage is found: behind `whole_bytes`, which was not the end of the piece before."""
    read_bytes = 0
    while piece := stream.read(_PIECE_BYTES):
        read_bytes += len(piece)
        if read_bytes <= whole_bytes:
            yield piece
        else:
            yield from (piece[at : at + 1] for at in range(len(piece)))


def _not_gzip(head: bytes, *, first: bool) -> str:
    if not first:
        return "bytes behind the last member that are no gzip: trailing garbage"
    return f"not a gzip file: it begins with {head[:8]!r}"
