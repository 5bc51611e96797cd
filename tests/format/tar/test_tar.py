"""Tars: the reader and the writer against one table, each other, CPython's tarfile, GNU tar, and archives that are broken."""

from __future__ import annotations

import hashlib
import io
import itertools
import subprocess
import tarfile
import tracemalloc
from pathlib import Path

import pytest
from commands import SHARED, tar_bytes
from factory import read_members
from hypothesis import given, settings
from hypothesis import strategies as st
from properties import tries

from wds_tools.errors import FormatError
from wds_tools.format.tar import BLOCK, END, MAX_MEMBER_BYTES, MAX_SIZE, Member, TarReader, header, padding

TARS = SHARED / "malformed" / "tars"
FORMATS = {"ustar": tarfile.USTAR_FORMAT, "gnu": tarfile.GNU_FORMAT, "pax": tarfile.PAX_FORMAT}

ARCHIVES: dict[str, list[tuple[str, bytes]]] = {
    "no member": [],
    "an empty member": [("a.json", b"")],
    "one byte": [("a.json", b"x")],
    "a payload of one block": [("a.json", b"x" * 512)],
    "a payload of one block and a byte": [("a.json", b"x" * 513)],
    "zeros, which look like the end": [("a.bin", bytes(2048)), ("b.bin", b"b")],
    "a payload that is a tar": [("a.tar", header("inner.json", 1) + b"x" + bytes(511) + END), ("b.json", b"{}")],
    "a name of 100 bytes": [("n" * 95 + ".json", b"x")],
    "a name that is split": [("f" * 60 + "/" + "n" * 95 + ".json", b"x")],
    "the longest name": [("f" * 155 + "/" + "n" * 95 + ".json", b"x")],
    "not ASCII": [("日本/ключ é.json", "日本".encode()), ("😀.json", b"x")],
    "the same name twice": [("a.json", b"1"), ("a.json", b"2")],
    "three samples": [
        (f"00000{n}.{suffix}", bytes([n]) * size) for n in range(3) for suffix, size in (("json", 90), ("npy", 2176))
    ],
}


def write_tar(members: list[tuple[str, bytes]]) -> bytes:
    return b"".join(header(name, len(data)) + data + padding(len(data)) for name, data in members) + END


def raw_tar(*members: tuple[bytes, dict[int, bytes], bytes]) -> bytes:
    """A tar from (type, header bytes to overwrite by offset, payload), with right checksums."""
    blocks = []
    for kind, fields, payload in members:
        block = bytearray(header("a.json", len(payload)))
        block[156:157] = kind
        for at, value in fields.items():
            block[at : at + len(value)] = value
        block[148:156] = b" " * 8
        block[148:156] = b"%06o\0 " % sum(block)
        blocks.append(bytes(block) + payload + padding(len(payload)))
    return b"".join(blocks) + END


def contents(members: list[Member]) -> list[tuple[str, bytes]]:
    return [(member.name, bytes(member.payload)) for member in members]


def feed(pieces: list[bytes], *, max_member_bytes: int = MAX_MEMBER_BYTES) -> list[Member]:
    reader = TarReader(max_member_bytes=max_member_bytes)
    members = [member for piece in pieces for member in reader.feed(piece)]
    reader.close()
    return members


def cut(data: bytes, cuts: list[int]) -> list[bytes]:
    places = [0, *sorted(at % (len(data) + 1) for at in cuts), len(data)]
    return [data[start:end] for start, end in itertools.pairwise(places)]


def check_places(archive: bytes, members: list[Member]) -> None:
    end = 0
    for member in members:
        assert end <= member.start < member.offset <= member.end <= len(archive)
        assert archive[member.offset : member.offset + len(member.payload)] == member.payload
        assert member.end % BLOCK == 0
        end = member.end


# --- One table for both directions ---------------------------------------------------------------------------------


@pytest.mark.parametrize("members", ARCHIVES.values(), ids=ARCHIVES)
def test_what_is_written_is_read_back_whole_byte_by_byte_and_with_a_tail(members: list[tuple[str, bytes]]) -> None:
    archive = write_tar(members)
    whole = read_members(archive)
    assert contents(whole) == members
    check_places(archive, whole)
    assert feed([archive[at : at + 1] for at in range(len(archive))]) == whole
    assert feed([archive, bytes(7), bytes(BLOCK), b"\0"]) == whole  # GNU tar fills up to 10,240 bytes
    with pytest.raises(FormatError, match=f"data after the end of the archive at byte {len(archive)}"):
        feed([archive, b"x"])
    with pytest.raises(FormatError, match="data after the end"):
        feed([archive + archive[:-1024] + b"x" * BLOCK])


@pytest.mark.parametrize("members", ARCHIVES.values(), ids=ARCHIVES)
@given(cuts=st.lists(st.integers(0, 1 << 30), max_size=12))
@settings(max_examples=20, deadline=None)
def test_any_pieces_give_the_same_members(members: list[tuple[str, bytes]], cuts: list[int]) -> None:
    archive = write_tar(members)
    assert feed(cut(archive, cuts)) == read_members(archive)


@pytest.mark.parametrize("members", ARCHIVES.values(), ids=ARCHIVES)
def test_written_tars_are_read_by_tarfile_and_by_gnu_tar(members: list[tuple[str, bytes]], tmp_path: Path) -> None:
    path = tmp_path / "shard.tar"
    path.write_bytes(write_tar(members))
    with tarfile.open(path) as archive:
        infos = archive.getmembers()
        assert [(info.name, archive.extractfile(info).read()) for info in infos] == members  # type: ignore[union-attr]
    assert all((info.mode, info.uid, info.gid, info.mtime, info.pax_headers) == (0o644, 0, 0, 0, {}) for info in infos)
    listed = subprocess.run(
        ["tar", "tvf", path, "--absolute-names", "--quoting-style=literal"], capture_output=True, text=True, check=True
    )
    assert listed.stderr == ""
    rows = [line.split(maxsplit=5) for line in listed.stdout.splitlines()]
    assert [(row[5], int(row[2])) for row in rows] == [(name, len(data)) for name, data in members]
    assert all(row[:2] == ["-rw-r--r--", "0/0"] for row in rows)


@pytest.mark.parametrize("tar_format", FORMATS.values(), ids=FORMATS)
@pytest.mark.parametrize("members", ARCHIVES.values(), ids=ARCHIVES)
def test_tars_of_tarfile_are_read(members: list[tuple[str, bytes]], tar_format: int) -> None:
    archive = tar_bytes(members, tar_format)
    found = read_members(archive)
    assert contents(found) == members
    check_places(archive, found)
    assert feed([archive[at : at + 1] for at in range(len(archive))]) == found


@pytest.mark.parametrize("tar_format", ["gnu", "pax"])
def test_names_beyond_ustar_are_read_from_gnu_and_pax_headers(tar_format: str) -> None:
    members = [("long" * 80 + ".json", b"1"), ("é" * 200 + ".npy", b"2"), ("short.json", b"3")]
    archive = tar_bytes(members, FORMATS[tar_format])
    found = read_members(archive)
    assert contents(found) == members
    assert found[0].start == 0
    assert found[0].offset > BLOCK  # the extension blocks belong to the member
    assert found[1].start == found[0].end
    assert found[2].offset == found[2].start + BLOCK


@pytest.mark.parametrize("tar_format", ["v7", "oldgnu", "gnu", "ustar", "pax"])
def test_tars_of_gnu_tar_are_read_and_folders_passed_over(tar_format: str, tmp_path: Path) -> None:
    folder = tmp_path / "set"
    folder.mkdir()
    names = ["a.json", "a.npy", "b" * 80 + ".json"]
    for name in names:
        (folder / name).write_bytes(name.encode() * 30)
    command = ["tar", f"--format={tar_format}", "--sort=name", "-cf", "-", "-C", str(tmp_path), "set"]
    archive = subprocess.run(command, capture_output=True, check=True).stdout
    assert contents(read_members(archive)) == [(f"set/{name}", name.encode() * 30) for name in names]


def test_the_header_bytes_are_pinned() -> None:
    block = header("000000-00000000.json", 123)
    assert len(block) == BLOCK
    assert hashlib.sha256(block).hexdigest() == "84e727d82ad5f613e24d11f6ee086d670b9ad75761df542544cc1e1e7fdfdd02"


@pytest.mark.parametrize(
    ("name", "size", "problem"),
    [
        ("", 1, "empty"),
        ("a\0b.json", 1, "NUL"),
        ("\ud800.json", 1, "UTF-8"),
        ("n" * 101, 1, "101 bytes"),
        ("/" + "n" * 101, 1, "102 bytes"),
        ("f" * 156 + "/" + "n" * 90, 1, "247 bytes"),
        ("n" * 100 + "/", 1, "101 bytes"),
        ("é" * 51, 1, "102 bytes"),
        ("a.json", -1, "do not fit"),
        ("a.json", MAX_SIZE + 1, "do not fit"),
    ],
)
def test_a_header_that_can_not_be_written_is_refused(name: str, size: int, problem: str) -> None:
    with pytest.raises(FormatError, match=problem):
        header(name, size)


def test_an_absolute_name_keeps_its_slash() -> None:  # CPython's tarfile writes this one without
    name = "/" + "f" * 10 + "/" + "n" * 89
    assert contents(read_members(write_tar([(name, b"x")]))) == [(name, b"x")]


@given(
    st.lists(
        st.tuples(
            st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), min_size=1, max_size=25),
            st.binary(max_size=1500),
        ),
        max_size=5,
    )
)
@tries(100)
def test_any_names_and_payloads_survive(members: list[tuple[str, bytes]]) -> None:
    assert contents(read_members(write_tar(members))) == members


# --- Cut, flipped and hostile archives -----------------------------------------------------------------------------


def test_a_cut_at_any_byte_is_found() -> None:
    archive = write_tar([("a.json", b"x" * 600), ("a.npy", b"y" * 512), ("b.json", b"")])
    first_end_block = len(archive) - BLOCK
    for length in range(len(archive)):
        if length < first_end_block:
            with pytest.raises(FormatError, match=r"cut off|less than one tar header"):
                read_members(archive[:length])
        else:  # inside the second end block: every member is there, and so is an end
            assert len(read_members(archive[:length])) == 3


def test_a_cut_at_any_byte_of_pax_and_gnu_headers_is_found() -> None:
    for tar_format in (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        archive = tar_bytes([("é" * 120 + ".json", b"x" * 10)], tar_format)
        end = read_members(archive)[-1].end
        for length in range(end + BLOCK):
            with pytest.raises(FormatError, match=r"cut off|less than one tar header"):
                read_members(archive[:length])


def test_every_changed_byte_of_a_header_is_found_or_harmless() -> None:
    """The checksum covers all bytes of the header but how it is itself written: spaces, NULs and leading zeros."""
    good = write_tar([("a.json", b"x" * 10)])
    expected = contents(read_members(good))
    harmless = set()
    for at in range(BLOCK):
        for flip in (0x01, 0x10, 0x20, 0x80, 0xFF, good[at]):
            bad = bytearray(good)
            bad[at] ^= flip
            if bad == good:
                continue
            try:
                members = read_members(bytes(bad))
            except FormatError:
                continue
            assert contents(members) == expected, at
            harmless.add(at)
    assert harmless <= set(range(148, 156)), harmless


def test_a_hole_of_zeros_in_place_of_a_header_is_not_taken_for_the_end() -> None:
    archive = bytearray(write_tar([("a.json", b"1"), ("b.json", b"2"), ("c.json", b"3")]))
    archive[2 * BLOCK : 3 * BLOCK] = bytes(BLOCK)
    with pytest.raises(FormatError, match="data after the end of the archive at byte 1536"):
        read_members(bytes(archive))


SIZE = 124
SPECIAL: dict[str, tuple[bytes, str | list[tuple[str, bytes]]]] = {
    "contiguous file": (raw_tar((b"7", {}, b"x")), [("a.json", b"x")]),
    "file of before POSIX": (raw_tar((b"\0", {257: bytes(8)}, b"x")), [("a.json", b"x")]),
    "folder of before POSIX": (raw_tar((b"\0", {0: b"folde/"}, b"")), []),
    "folder that states a size": (raw_tar((b"5", {SIZE: b"00000000777\0"}, b"")), []),
    "size in base 256": (raw_tar((b"0", {SIZE: b"\x80" + bytes(10) + b"\x05"}, b"12345")), [("a.json", b"12345")]),
    "size with spaces": (raw_tar((b"0", {SIZE: b"          5 "}, b"12345")), [("a.json", b"12345")]),
    "no size": (raw_tar((b"0", {SIZE: bytes(12)}, b"")), [("a.json", b"")]),
    "negative size in base 256": (raw_tar((b"0", {SIZE: b"\xff" * 12}, b"")), "unreadable size"),
    "size that is no octal number": (raw_tar((b"0", {SIZE: b"00000000099\0"}, b"")), "unreadable size"),
    "size of letters": (raw_tar((b"0", {SIZE: b"0x000000011\0"}, b"")), "unreadable size"),
    "signed size": (raw_tar((b"0", {SIZE: b"-0000000001\0"}, b"")), "unreadable size"),
    "2**62 bytes": (
        raw_tar((b"0", {SIZE: b"\x80\0\0\0" + (1 << 62).to_bytes(8, "big")}, b"")),
        "claims 4611686018427387904 bytes",
    ),
    "2**80 bytes": (raw_tar((b"0", {SIZE: b"\x80\x01" + bytes(10)}, b"")), "claims 1208925819614629174706176 bytes"),
    "pax size of 18 digits": (raw_tar((b"x", {}, b"27 size=999999999999999999\n"), (b"0", {}, b"")), "claims 999999999999999999"),
    "pax size beyond": (raw_tar((b"x", {}, b"29 size=99999999999999999999\n"), (b"0", {}, b"")), "not a number of bytes"),
    "pax size below zero": (raw_tar((b"x", {}, b"11 size=-1\n"), (b"0", {}, b"")), "not a number of bytes"),
    "pax size": (raw_tar((b"x", {}, b"10 size=5\n"), (b"0", {SIZE: b"00000000000\0"}, b"12345")), [("a.json", b"12345")]),
    "pax path": (raw_tar((b"x", {}, b"15 path=b.json\n"), (b"0", {}, b"1")), [("b.json", b"1")]),
    "pax path of nothing": (raw_tar((b"x", {}, b"8 path=\n"), (b"0", {}, b"1")), [("a.json", b"1")]),
    "pax path not in UTF-8": (raw_tar((b"x", {}, b"10 path=\xff\n"), (b"0", {}, b"1")), "not UTF-8"),
    "pax record longer than its block": (raw_tar((b"x", {}, b"99 path=b.json\n"), (b"0", {}, b"1")), "broken record"),
    "pax record of no length": (raw_tar((b"x", {}, b"0 path=b.json\n"), (b"0", {}, b"1")), "broken record"),
    "pax record without =": (raw_tar((b"x", {}, b"7 path\n"), (b"0", {}, b"1")), "broken record"),
    "pax record of garbage": (raw_tar((b"x", {}, b"\xff\xff\xff"), (b"0", {}, b"1")), "broken record"),
    "pax block with nothing behind it": (raw_tar((b"x", {}, b"15 path=b.json\n")), "no member after it"),
    "long name with nothing behind it": (raw_tar((b"L", {}, b"b.json\0")), "no member after it"),
    "pax block of 2 MiB": (raw_tar((b"x", {SIZE: b"00010000000\0"}, b"")), "claims 2097152 bytes"),
    "global comment": (raw_tar((b"g", {}, b"14 comment=ab\n"), (b"0", {}, b"1")), [("a.json", b"1")]),
    "global comment alone": (raw_tar((b"g", {}, b"14 comment=ab\n")), []),
    "global path": (raw_tar((b"g", {}, b"15 path=b.json\n"), (b"0", {}, b"1")), "renames every member"),
    "long link": (raw_tar((b"K", {}, b"target\0"), (b"2", {}, b"")), []),
    "hard link": (raw_tar((b"1", {}, b"")), []),
    "hard link that claims 2 GiB": (raw_tar((b"1", {SIZE: b"20000000000\0"}, b"")), []),
    "symbolic link": (raw_tar((b"2", {}, b"")), []),
    "character device": (raw_tar((b"3", {}, b"")), []),
    "block device": (raw_tar((b"4", {}, b"")), []),
    "FIFO": (raw_tar((b"6", {}, b"")), []),
    "sparse file": (raw_tar((b"S", {}, b"")), "a sparse file"),
    "sparse file of pax": (raw_tar((b"x", {}, b"22 GNU.sparse.major=1\n"), (b"0", {}, b"1")), "a sparse file"),
    "continued volume": (raw_tar((b"M", {}, b"")), "a continued volume"),
    "volume label": (raw_tar((b"V", {}, b"")), []),
    "unknown type": (raw_tar((b"Z", {}, b"")), "unknown type b'Z'"),
    "name not in UTF-8": (raw_tar((b"0", {0: b"\xff\xfe"}, b"")), "not UTF-8"),
}


@pytest.mark.parametrize(("archive", "expected"), SPECIAL.values(), ids=SPECIAL)
def test_special_members_are_read_passed_over_or_refused(archive: bytes, expected: str | list[tuple[str, bytes]]) -> None:
    for pieces in ([archive], [archive[at : at + 1] for at in range(len(archive))]):
        if isinstance(expected, list):
            assert contents(feed(pieces)) == expected
        else:
            with pytest.raises(FormatError, match=expected):
                feed(pieces)


def test_a_global_header_belongs_to_no_member() -> None:
    (member,) = read_members(raw_tar((b"g", {}, b"14 comment=ab\n"), (b"0", {}, b"1")))
    assert (member.start, member.offset) == (2 * BLOCK, 3 * BLOCK)


def test_a_member_beyond_the_readers_limit_is_refused_at_its_header() -> None:
    archive = write_tar([("a.json", b"x" * 1001)])
    assert len(feed([archive], max_member_bytes=1001)) == 1
    with pytest.raises(FormatError, match="claims 1001 bytes; at most 1000"):
        TarReader(max_member_bytes=1000).feed(archive[:BLOCK])


@given(st.binary(max_size=3000))
@tries(200)
def test_random_bytes_are_a_format_error(data: bytes) -> None:
    if not data.strip(b"\0") and len(data) >= BLOCK:
        assert read_members(data) == []
    else:
        with pytest.raises(FormatError):
            read_members(data)


FUZZED = [
    *(
        tar_bytes([("é" * 40 + "/" + "é" * 40 + ".json", b"x" * 600), ("b.npy", b"y" * 10)], tar_format)
        for tar_format in FORMATS.values()
    ),
    *(archive for archive, _ in SPECIAL.values()),
]


def checksummed(archive: bytearray) -> bytes:
    """The archive with its first header's checksum made right again, so that mutations get past it."""
    archive[148:156] = b" " * 8
    archive[148:156] = b"%06o\0 " % sum(archive[:BLOCK])
    return bytes(archive)


@given(
    st.sampled_from(FUZZED),
    st.lists(st.tuples(st.integers(0, 3 * BLOCK), st.integers(0, 255)), min_size=1, max_size=8),
    st.booleans(),
    st.lists(st.integers(0, 1 << 30), max_size=4),
)
@tries(400)
def test_mutated_archives_are_read_or_a_format_error(
    archive: bytes, changes: list[tuple[int, int]], repaired: bool, cuts: list[int]
) -> None:
    bad = bytearray(archive)
    for at, value in changes:
        bad[at % len(bad)] = value
    data = checksummed(bad) if repaired else bytes(bad)
    try:
        whole = read_members(data)
    except FormatError:
        with pytest.raises(FormatError):
            feed(cut(data, cuts))
    else:
        assert feed(cut(data, cuts)) == whole
        check_places(data, whole)


def test_a_header_that_claims_gigabytes_costs_no_memory() -> None:
    archive = raw_tar((b"0", {SIZE: b"37777777776\0"}, b""))  # 4 GiB - 2
    tracemalloc.start()
    try:
        with pytest.raises(FormatError, match="inside a member that starts at byte 0"):
            feed([archive])
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()


def test_a_stream_of_members_is_held_one_piece_at_a_time() -> None:
    member = header("a.json", 100_000) + bytes(100_000) + padding(100_000)
    tracemalloc.start()
    try:
        reader = TarReader()
        for _ in range(200):
            for start in range(0, len(member), 30_000):
                reader.feed(member[start : start + 30_000])
        reader.feed(END)
        reader.close()
        assert tracemalloc.get_traced_memory()[1] < 2 << 20
    finally:
        tracemalloc.stop()


# --- Real malformed archives ---------------------------------------------------------------------------------------

LIBARCHIVE = "native_libarchive_test_"
OUTCOMES: dict[str, int | str] = {
    "good.tar": 18,
    "trunc_at_boundary.tar": "ends at byte 148992 without the end-of-archive blocks",
    "no_end_blocks.tar": "ends at byte 156672 without the end-of-archive blocks",
    "bad_header_checksum_middle.tar": "no tar header at byte 55296",
    "concatenated.tar": "data after the end of the archive at byte 66048",
    "zero_bytes.tar": "ends at byte 0 without the end-of-archive blocks",
    "empty_archive.tar": 0,
    "html_named.tar": "HTML or XML page",
    "git_lfs_pointer.tar": "git lfs pull",
    "good.tar.gz": "this is gzip",
    "gz_named.tar": "this is gzip",
    "trunc.tar.gz": "this is gzip",
    "good.tar.bz2": "this is bzip2",
    "good.tar.zst": "this is zstd",
    "path_traversal.tar": 23,
    "duplicate_names.tar": 20,  # whether these are samples is decided in test_shard
    "duplicate_adjacent.tar": 19,
    "interleaved_keys.tar": 18,
    "dots_in_keys.tar": 20,
    "dot_slash_and_hidden.tar": 21,
    "gnu_long_names.tar": 18,
    "empty_members.tar": 18,
    "native_webdataset_compressed.tar": 3,  # tarfile counts a folder too
    "native_cpython_recursion.tar": "ends at byte 516 inside a member that starts at byte 0",
    LIBARCHIVE + "compat_plexus_archiver_tar.tar": "data after the end of the archive at byte 1536",  # a stray line end
    LIBARCHIVE + "read_format_gtar_sparse_1_17_posix10.tar": "the member at byte 0 is a sparse file",
    LIBARCHIVE + "read_format_tar_V_negative_size.tar": "no tar header at byte 0",
    LIBARCHIVE + "read_format_tar_invalid_pax_size.tar": "-19769411113659727436",
    LIBARCHIVE + "read_format_tar_mac_metadata_1.tar": 2,
    LIBARCHIVE + "read_pax_empty_val_no_nl.tar": "broken record b'4 x='",
}
needs_data = pytest.mark.skipif(not TARS.is_dir(), reason=f"the malformed archives are not at {'/'.join(TARS.parts[-4:])}")


@needs_data
def test_every_malformed_archive_has_an_expected_outcome() -> None:
    assert {path.name for path in TARS.iterdir()} == set(OUTCOMES)


@needs_data
@pytest.mark.parametrize("name", OUTCOMES)
def test_malformed_archives_lose_nothing_that_tarfile_finds(name: str) -> None:
    archive = (TARS / name).read_bytes()
    expected = OUTCOMES[name]
    if isinstance(expected, str):
        with pytest.raises(FormatError, match=expected):
            read_members(archive, name)
        with pytest.raises(FormatError, match=expected):
            feed([archive[at : at + 1] for at in range(len(archive))])
        return
    found = read_members(archive, name)
    assert len(found) == expected
    assert feed(cut(archive, [999 * n for n in range(40)])) == found
    with tarfile.open(fileobj=io.BytesIO(archive)) as plain:
        files = [(info.name, plain.extractfile(info).read()) for info in plain.getmembers() if info.isreg()]  # type: ignore[union-attr]
    assert contents(found) == files
