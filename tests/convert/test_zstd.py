"""Zstandard files: whole, cut at every byte, damaged, and hostile; compressed by the library and block by block by hand."""

from __future__ import annotations

import io
import tracemalloc
from collections.abc import Iterator

import pytest
import zstandard
from commands import SHARED
from hypothesis import given
from hypothesis import strategies as st
from properties import tries

from wds_tools.errors import Reject
from wds_tools.sources.text.compression import read_pieces

FOLDER = SHARED / "malformed" / "zst"
MAGIC = b"\x28\xb5\x2f\xfd"
TEXT = b"".join(b'{"text": "document %d"}\n' % n for n in range(200))
NOISE = bytes((n * n * 7919 >> 5) & 0xFF for n in range(3000))


def compress(data: bytes, *, checksum: bool, content_size: bool) -> bytes:
    compressor = zstandard.ZstdCompressor(write_checksum=checksum, write_content_size=content_size)
    if content_size:
        return compressor.compress(data)
    stream = compressor.compressobj()
    return stream.compress(data) + stream.flush()


def block(kind: int, data: bytes, size: int, *, last: bool) -> bytes:
    return (size << 3 | kind << 1 | last).to_bytes(3, "little") + data


def raw_frame(*blocks: bytes) -> bytes:
    return MAGIC + b"\x00\x58" + b"".join(blocks)  # no content size, no checksum, a window of 2 MiB


def skippable(data: bytes, number: int = 0) -> bytes:
    return (0x184D2A50 + number).to_bytes(4, "little") + len(data).to_bytes(4, "little") + data


def flushed(*parts: bytes) -> bytes:
    """One frame with a block for each part, and a checksum."""
    stream = zstandard.ZstdCompressor(write_checksum=True, write_content_size=False).compressobj()
    pieces = [stream.compress(part) + stream.flush(zstandard.COMPRESSOBJ_FLUSH_BLOCK) for part in parts]
    return b"".join(pieces) + stream.flush()


FRAMES: dict[str, tuple[bytes, bytes]] = {
    **{
        f"{what}{', checksum' * checksum}{', content size' * size}": (compress(data, checksum=checksum, content_size=size), data)
        for what, data in (("text", TEXT), ("noise", NOISE), ("run", b"x" * 300), ("empty", b""))
        for checksum in (False, True)
        for size in (False, True)
    },
    "several blocks": (flushed(TEXT[:500], TEXT[500:700], TEXT[700:]), TEXT),
    "raw block": (raw_frame(block(0, b"raw", 3, last=True)), b"raw"),
    "run block": (raw_frame(block(1, b"z", 1000, last=True)), b"z" * 1000),
    "raw, run, empty": (
        raw_frame(block(0, b"raw", 3, last=False), block(1, b"z", 9, last=False), block(0, b"", 0, last=True)),
        b"raw" + b"z" * 9,
    ),
    "skippable": (skippable(b"hello") + skippable(b"", 15), b""),
}
FILE = b"".join(frame for frame, _ in FRAMES.values())
CONTENT = b"".join(content for _, content in FRAMES.values())


def decompress(file: bytes) -> Iterator[tuple[bytes, int]]:
    return read_pieces(lambda: io.BytesIO(file), "zst")


def outcome(file: bytes) -> tuple[bytes, str | None]:
    """What comes out before the end or the damage, and the reason if there is one."""
    out = bytearray()
    try:
        for data, _ in decompress(file):
            out += data
    except Reject as cause:
        return bytes(out), cause.reason
    return bytes(out), None


@pytest.mark.parametrize(("frame", "content"), FRAMES.values(), ids=FRAMES)
def test_frames_of_every_kind_are_decompressed_alone_and_among_others(frame: bytes, content: bytes) -> None:
    assert outcome(frame) == (content, None)
    assert outcome(FILE + frame + FILE) == (CONTENT + content + CONTENT, None)


@pytest.mark.parametrize(("frame", "content"), FRAMES.values(), ids=FRAMES)
def test_a_cut_at_any_byte_is_found(frame: bytes, content: bytes) -> None:
    first = compress(b"first", checksum=True, content_size=True)
    ends = {0, len(skippable(b"hello"))} if frame == FRAMES["skippable"][0] else {0}
    for length in range(len(frame)):
        out, reason = outcome(first + frame[:length])
        assert out.startswith(b"first"), length
        assert (b"first" + content).startswith(out), length
        assert reason == (None if length in ends else "truncated_zst"), length


def test_a_cut_file_of_many_frames_gives_what_was_whole() -> None:
    whole_frames = {0}
    at = 0
    for frame, _ in FRAMES.values():
        at += len(frame)
        whole_frames.add(at)
    whole_frames.add(len(FILE) - len(skippable(b"", 15)))
    previous = b""
    for length in range(1, len(FILE) + 1):
        out, reason = outcome(FILE[:length])
        assert reason == (None if length in whole_frames else "truncated_zst"), length
        assert out.startswith(previous)
        previous = out
    assert previous == CONTENT


@given(st.lists(st.tuples(st.integers(0, len(FILE) - 1), st.integers(0, 255)), max_size=5), st.binary(max_size=40))
@tries(300)
def test_mutated_files_are_decompressed_or_rejected(changes: list[tuple[int, int]], tail: bytes) -> None:
    bad = bytearray(FILE + tail)
    for at, value in changes:
        bad[at] = value
    _, reason = outcome(bytes(bad))
    assert reason in (None, "not_zst", "truncated_zst", "corrupt_zst")


@given(st.binary(max_size=200))
@tries(200)
def test_random_bytes_behind_a_magic_number_are_decompressed_or_rejected(data: bytes) -> None:
    _, reason = outcome(MAGIC + data)
    assert reason in (None, "not_zst", "truncated_zst", "corrupt_zst")


@pytest.mark.parametrize("tail", [b"\n", b"\0", b"\0" * 40, b"garbage", MAGIC[1:], b"\x50\x2a\x4d\x19" + bytes(20)])
def test_bytes_behind_the_last_frame_are_found_after_all_its_data(tail: bytes) -> None:
    assert outcome(FILE + tail) == (CONTENT, "not_zst")


def test_every_block_before_the_damage_comes_out() -> None:
    parts = [b"a" * 400_000, NOISE * 50, TEXT]
    file = flushed(*parts)
    intact = len(flushed(*parts[:2])) - 3 - 4  # without the empty last block and the checksum
    bad = bytearray(file)
    bad[intact + 8] ^= 0xFF
    out, reason = outcome(bytes(bad))
    assert (out[: len(parts[0]) + len(parts[1])], reason) == (parts[0] + parts[1], "corrupt_zst")
    bad = bytearray(file)
    bad[-1] ^= 1
    assert outcome(bytes(bad)) == (b"".join(parts), "corrupt_zst")  # only the checksum at the end says so


def test_the_message_says_where_the_damage_is() -> None:
    good = compress(b"good", checksum=True, content_size=True)
    bad = raw_frame(block(0, b"raw", 3, last=False), block(3, b"", 0, last=True))
    with pytest.raises(Reject, match=r"behind 7 bytes of text\)"):
        list(decompress(good + bad))


def test_progress_counts_every_compressed_byte() -> None:
    *_, (_, done) = decompress(FILE)
    assert done == len(FILE)


def test_a_bomb_is_decompressed_in_constant_memory() -> None:
    chunk = bytes(1 << 20)
    stream = zstandard.ZstdCompressor(level=1).compressobj()
    bomb = b"".join(stream.compress(chunk) for _ in range(2048)) + stream.flush()
    assert len(bomb) < 200_000
    total = 0
    tracemalloc.start()
    try:
        for data, _ in decompress(bomb):
            total += len(data)
        assert tracemalloc.get_traced_memory()[1] < 48 << 20  # of 2 GiB
    finally:
        tracemalloc.stop()
    assert total == 2 << 30


def test_a_run_of_long_run_blocks_is_decompressed_in_constant_memory() -> None:
    bomb = raw_frame(block(1, b"z", 1 << 17, last=False) * 4000, block(0, b"", 0, last=True))
    assert len(bomb) < 20_000
    tracemalloc.start()
    try:
        assert sum(len(data) for data, _ in decompress(bomb)) == 4000 << 17
        assert tracemalloc.get_traced_memory()[1] < 48 << 20  # of 500 MiB
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("window", [b"\x90", b"\xb0", b"\xff"])  # 256 MiB, 4 GiB, 3.75 TiB
def test_a_window_beyond_the_limit_is_refused(window: bytes) -> None:
    with pytest.raises(Reject, match="window of more than 128 MiB: recompress it without --long"):
        list(decompress(MAGIC + b"\x00" + window + block(0, b"x", 1, last=True)))


@pytest.mark.parametrize(
    ("file", "reason", "words"),
    [
        (b"", "empty_file", "0 bytes"),
        (b"PK\x03\x04....", "not_zst", "it begins with b'PK"),
        (MAGIC, "truncated_zst", "ends at byte 4"),
    ],
)
def test_what_is_no_zstd_file_is_named(file: bytes, reason: str, words: str) -> None:
    with pytest.raises(Reject, match=words) as caught:
        list(decompress(file))
    assert caught.value.reason == reason


# --- Real malformed files ------------------------------------------------------------------------------------------

OUTCOMES: dict[str, tuple[int, str | None, str]] = {  # decompressed bytes, reason, words of the message
    "bad_checksum.jsonl.zst": (196307, "corrupt_zst", "doesn't match checksum"),
    "bad_lines.jsonl.zst": (1907751, None, ""),
    "empty_frame.jsonl.zst": (0, None, ""),
    "gzip_named.jsonl.zst": (0, "not_zst", "it begins with"),
    "needs_dictionary.jsonl.zst": (0, "corrupt_zst", "needs a dictionary"),
    "plain_text_named.jsonl.zst": (0, "not_zst", "it begins with"),
    "second_frame_bad.jsonl.zst": (196307, "truncated_zst", "ends at byte 87873 in the middle of frame 2"),
    "skippable_only.jsonl.zst": (0, None, ""),
    "trailing_garbage.jsonl.zst": (196307, "not_zst", "behind the last frame"),
    "truncated_60.jsonl.zst": (0, "truncated_zst", "ends at byte 39543"),
    "truncated_stream.jsonl.zst": (655360, "truncated_zst", "ends at byte 254428"),
}
needs_data = pytest.mark.skipif(not FOLDER.is_dir(), reason=f"the malformed files are not at {'/'.join(FOLDER.parts[-4:])}")


@needs_data
def test_every_malformed_file_has_an_expected_outcome() -> None:
    assert {path.name for path in FOLDER.glob("*.zst")} == set(OUTCOMES)


@needs_data
@pytest.mark.parametrize("name", OUTCOMES)
def test_malformed_files_give_what_is_whole_and_a_reason(name: str) -> None:
    num_bytes, reason, words = OUTCOMES[name]
    found, rejected = 0, None
    try:
        for data, _ in decompress((FOLDER / name).read_bytes()):
            found += len(data)
    except Reject as cause:
        rejected = cause
    assert (found, rejected and rejected.reason) == (num_bytes, reason)
    assert words in str(rejected)


@pytest.mark.skipif(not (SHARED / "dclm" / "open").is_dir(), reason="the DCLM files are not at shared/data/dclm/open")
@pytest.mark.parametrize(("name", "num_bytes", "num_lines"), [("shard_00000000", 6094701, 938), ("shard_00000001", 3140069, 470)])
def test_real_files_of_one_and_of_many_frames_are_decompressed(name: str, num_bytes: int, num_lines: int) -> None:
    file = (SHARED / "dclm" / "open" / f"{name}_processed.jsonl.zst").read_bytes()
    text = b"".join(data for data, _ in decompress(file))
    assert (len(text), text.count(b"\n")) == (num_bytes, num_lines)
