"""The scanner against the reader it stands for: the same samples or the same error, for every writer and after every damage."""

from __future__ import annotations

import io
import re
import subprocess
import tarfile
import zlib
from collections.abc import Callable, Iterable
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xxhash
from commands import SHARED
from factory import image_sample, read_members, text_sample
from hypothesis import given
from hypothesis import strategies as st
from properties import tries

from wds_tools.errors import FormatError
from wds_tools.format.index import IndexBuilder, serialize_index
from wds_tools.format.shard import ShardBuilder, group_samples
from wds_tools.format.tar import BLOCK, END, header, padding
from wds_tools.format.tar import scan as scan_module
from wds_tools.format.tar.scan import Scan, scan_runs, scan_tar

TARS = SHARED / "malformed" / "tars"
FORMATS = {"ustar": tarfile.USTAR_FORMAT, "gnu": tarfile.GNU_FORMAT, "pax": tarfile.PAX_FORMAT}
Files = list[tuple[str, bytes | None]]
"""Name and content; None for a folder."""

FILES: Files = [
    (f"{key}.{suffix}", content)
    for key, caption in (("000001", b"one"), ("000002", b""), ("000003", b"three" * 300))
    for suffix, content in (("jpg", b"\xff" * 700), ("json", b'{"caption": "x"}'), ("txt", caption))
]


def python_tar(files: Files, tar_format: int = tarfile.PAX_FORMAT, *, mtime: float = 0) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tar_format) as archive:
        for number, (name, content) in enumerate(files):
            info = tarfile.TarInfo(name)
            info.mtime = mtime + number  # not whole: a pax block before every member
            if content is None:
                info.type = tarfile.DIRTYPE
            info.size = len(content or b"")
            archive.addfile(info, io.BytesIO(content or b""))
    return out.getvalue()


def webdataset_tar(files: Files) -> bytes:
    webdataset = pytest.importorskip("webdataset")
    out = io.BytesIO()
    writer = webdataset.TarWriter(out, encoder=False)
    samples: dict[str, dict[str, Any]] = {}
    for name, content in files:
        key, _, suffix = name.partition(".")
        samples.setdefault(key, {"__key__": key})[suffix] = content or b""
    for sample in samples.values():
        writer.write(sample)
    writer.close()
    return out.getvalue()


def our_tar(_: Files) -> bytes:
    builder = ShardBuilder()
    samples = [*map(image_sample, range(5)), *map(text_sample, range(5))]
    return b"".join(map(builder.add, samples)) + builder.finish("a.tar")[0]


def gnu_tar(files: Files, folder: Path, *options: str) -> bytes:
    for name, content in files:
        path = folder / name
        path.parent.mkdir(exist_ok=True, parents=True)
        path.write_bytes(content or b"")
    return subprocess.run(["tar", "-c", "-C", folder, "--sort=name", *options], capture_output=True, check=True).stdout


def expected(archive: bytes) -> list[tuple[str, int, int, dict[str, tuple[int, bytes]]]]:
    """(key, start, size, suffix -> (offset, payload)) of each sample, read one member after the other."""
    return [
        (
            sample.key,
            sample.start,
            sample.end - sample.start,
            {s: (m.offset, bytes(m.payload)) for s, m in sample.members.items()},
        )
        for sample in group_samples(read_members(archive, "a.tar"), "a.tar")
    ]


def found(archive: bytes, scan: Scan) -> list[tuple[str, int, int, dict[str, tuple[int, bytes]]]]:
    samples: list[tuple[str, int, int, dict[str, tuple[int, bytes]]]] = [
        (key, start, size, {}) for key, start, size in zip(scan.keys, scan.start.tolist(), scan.size.tolist(), strict=True)
    ]
    columns = (scan.sample.tolist(), scan.suffix.tolist(), scan.offset.tolist(), scan.length.tolist())
    for sample, suffix, offset, length in zip(*columns, strict=True):
        samples[sample][3][scan.suffixes[suffix]] = (offset, archive[offset : offset + length])
    return samples


def check_same(archive: bytes) -> bool:
    """Whether the archive can be read; scanner and reader agree on it, and on what is wrong with it."""
    refusal = refusal_of(lambda: expected(archive))
    assert refusal_of(lambda: scan_tar(archive, "a.tar")) == refusal
    check_runs(archive)
    if refusal is not None:
        return False
    samples = expected(archive)
    scan = scan_tar(archive, "a.tar")
    assert found(archive, scan) == samples
    assert [list(sample) for *_, sample in found(archive, scan)] == [list(sample) for *_, sample in samples]
    assert scan.suffixes == tuple(dict.fromkeys(suffix for *_, members in samples for suffix in members))
    payloads = [{suffix: payload for suffix, (_, payload) in members.items()} for *_, members in samples]
    assert list(scan.payloads(memoryview(archive))) == payloads
    assert serialize_index(scan.index(memoryview(archive), "0" * 32)) == serialize_index(built_index(archive))
    return True


SCAN_ANY = scan_module._scan_any
"""The slow way, also where a test forbids it to scan_tar."""


def check_runs(archive: bytes) -> None:
    """What is found in the archive as a run, and in its samples as runs of one and two, is what the scanner finds."""
    run = memoryview(archive)
    found = scan_runs([run])
    if found is None:
        return
    refusal = refusal_of(lambda: SCAN_ANY(archive, "a.tar", is_part=True))
    if refusal is not None:
        assert re.search("keys are unique|is not UTF-8", refusal), "keys are compared with their neighbours', and no more"
        return
    scan = SCAN_ANY(archive, "a.tar", is_part=True)
    assert found.first.tolist() == [0, len(scan.keys)]
    twice = scan_runs([run, run])
    assert twice is not None
    assert twice.first.tolist() == [0, len(scan.keys), 2 * len(scan.keys)], "a run ends a sample, whatever the next one's key is"
    assert (twice.start.tolist(), twice.end.tolist()) == (found.start.tolist() * 2, found.end.tolist() * 2)
    ends = scan.start + scan.size
    borders = [*scan.start[::2].tolist(), int(ends[-1])]
    runs = scan_runs([run[begin:end] for begin, end in pairwise(borders)])
    assert runs is not None
    for part, begins in ((found, [0]), (runs, borders[:-1])):
        base = np.repeat(begins, np.diff(part.first))
        assert ((part.start + base).tolist(), (part.end + base).tolist()) == (scan.start.tolist(), ends.tolist())
        assert [part.suffixes[number] for number in part.suffix] == [scan.suffixes[number] for number in scan.suffix]
        assert part.sample.tolist() == scan.sample.tolist()
        assert (part.offset + base[part.sample]).tolist() == scan.offset.tolist()
        assert part.length.tolist() == scan.length.tolist()


def refusal_of(read: Callable[[], object]) -> str | None:
    try:
        read()
    except FormatError as error:
        return str(error)
    return None


def built_index(archive: bytes) -> Any:
    builder = IndexBuilder()
    for stored in group_samples(read_members(archive)):
        checksum = zlib.crc32(archive[stored.start : stored.end])
        members = [(suffix, found.offset - stored.start, len(found.payload)) for suffix, found in stored.members.items()]
        builder.add(stored.start, stored.end - stored.start, members, checksum, 0, 0)
    return builder.build(len(archive), "0" * 32)


@pytest.fixture
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """No archive of this test needs the way for odd ones."""

    def forbidden(archive: bytes, name: str) -> Scan:
        raise AssertionError(f"{name}: {len(archive)} bytes went the slow way")

    monkeypatch.setattr(scan_module, "_scan_any", forbidden)


# ---- Archives that are scanned at once ----

NESTED = python_tar(FILES, tarfile.PAX_FORMAT, mtime=0.5)
PLAIN: dict[str, Callable[[], bytes]] = {
    "webdataset's writer": lambda: webdataset_tar(FILES),
    "this project's writer": lambda: our_tar(FILES),
    **{f"tarfile, {name}": partial(python_tar, FILES, tar_format) for name, tar_format in FORMATS.items()},
    "tarfile, mtimes that are not whole": lambda: NESTED,
    "tarfile, mtimes of different lengths": lambda: python_tar(FILES, mtime=99999995.5),
    "folders": lambda: python_tar([("set", None), *[(f"set/{name}", content) for name, content in FILES], ("other", None)]),
    "folders with pax blocks": lambda: python_tar([("set", None), *FILES, ("other", None)], mtime=0.5),
    "a folder inside a sample": lambda: python_tar([FILES[0], ("set", None), *FILES[1:]], mtime=0.5),
    "folders named ./": lambda: python_tar([(f"./set/{name}", content) for name, content in FILES]),
    "some names with ./": lambda: python_tar([("./" * (n == 4) + name, content) for n, (name, content) in enumerate(FILES)]),
    "folders with dots": lambda: python_tar([(f"v1.0/a.b/{name}", content) for name, content in FILES]),
    "suffixes with dots": lambda: python_tar([("a.x.y.npy", b"1"), ("a.x.npy", b"2"), ("b.x.npy", b"3")]),
    "one empty file": lambda: python_tar([("a.b", b"")]),
    "names of 100 bytes": lambda: python_tar([("k" * 96 + suffix, b"1") for suffix in (".jpg", ".txt", ".cls")]),
    "samples with other members": lambda: python_tar([("a.jpg", b"1"), ("b.txt", b"2"), ("c.txt", b"3"), ("c.jpg", b"4")]),
    "not ASCII": lambda: python_tar([("日本/ключ é.jpg", b"1"), ("日本/ключ é.été", b"2")], tarfile.GNU_FORMAT),
    "a payload that is a tar": lambda: python_tar([("a.tar", NESTED), ("b.tar", b"x" * 100 + NESTED), ("c.tar", NESTED[512:])]),
    "a payload that is a tar, with pax blocks": lambda: python_tar([("a.tar", NESTED), ("b.tar", NESTED[1024:])], mtime=0.5),
    "many blocks behind the end": lambda: python_tar(FILES) + bytes(70_001),
}


@pytest.mark.parametrize("make", PLAIN.values(), ids=PLAIN)
@pytest.mark.usefixtures("at_once")
def test_a_plain_archive_is_scanned_at_once_and_as_it_is_read(make: Callable[[], bytes]) -> None:
    assert check_same(make())


@pytest.mark.parametrize("options", [["--format=gnu"], ["--format=ustar"], ["--format=posix"], ["--format=gnu", "-b", "1"]])
@pytest.mark.parametrize("names", [["."], ["set"]])
@pytest.mark.usefixtures("at_once")
def test_what_gnu_tar_writes_is_scanned_at_once(options: list[str], names: list[str], tmp_path: Path) -> None:
    files: Files = [(f"set/{name}", content) for name, content in FILES]
    archive = gnu_tar(files, tmp_path, *options, *names)
    assert check_same(archive)
    assert scan_tar(archive).keys == ["set/000001", "set/000002", "set/000003"]


def test_a_view_of_more_than_the_archive_is_scanned_as_the_archive() -> None:
    archive = python_tar(FILES, mtime=0.5)
    held = np.frombuffer(b"junk" + archive + b"junk", np.uint8).copy()
    scan = scan_tar(held.data[4 : 4 + len(archive)])
    assert found(archive, scan) == expected(archive)


# ---- Archives that are odd, or damaged ----

LONG_NAMES: Files = [("folder/" * 20 + f"key.{suffix}", b"x") for suffix in ("jpg", "txt")]
ODD: dict[str, Callable[[], bytes]] = {
    "nothing": lambda: b"",
    "an empty archive": lambda: END,
    "only a folder": lambda: python_tar([("set", None)]),
    "nothing but zeros": lambda: bytes(1 << 20),
    "less than a block": lambda: b"x" * 100,
    "text": lambda: b"<!DOCTYPE html>" * 200,
    **{f"long names, {name}": partial(python_tar, LONG_NAMES, tar_format) for name, tar_format in FORMATS.items()},
    "a name that is split": lambda: header("f" * 90 + "/" + "n" * 95 + ".json", 1) + b"x" + padding(1) + END,
    "a pax path": lambda: python_tar([("é" * 3 + ".jpg", b"x"), *FILES]),
    "old headers": lambda: b"".join(old_header(name, content or b"") for name, content in FILES) + END,
    "no end": lambda: python_tar(FILES, mtime=0.5).rstrip(b"\0"),
    "one block of end": lambda: our_tar(FILES)[:-BLOCK],
    "no block of end": lambda: our_tar(FILES)[: -2 * BLOCK],
    "a second archive": lambda: python_tar(FILES) + python_tar(FILES),
    "a byte behind the end": lambda: python_tar(FILES) + bytes(1000) + b"x",
    "a name without a suffix": lambda: python_tar([*FILES, ("README", b"x")]),
    "a name without a key": lambda: python_tar([*FILES, ("set/.hidden", b"x")]),
    "a name that ends with its dot": lambda: python_tar([*FILES, ("a.", b"x")]),
    "a suffix twice": lambda: python_tar([("a.jpg", b"1"), ("a.txt", b"2"), ("a.jpg", b"3")]),
    "a suffix twice, once as ./": lambda: python_tar([("a.jpg", b"1"), ("./a.jpg", b"3")]),
    "a key that comes back": lambda: python_tar([*FILES, ("000001.cls", b"x")]),
    "a link": lambda: with_field(with_field(python_tar(FILES), 156, b"2"), 124, b"00000000000\0") + python_tar(FILES),
    "stray members": lambda: python_tar([("README", b"x"), FILES[0], ("._" + FILES[1][0], b"x"), *FILES[1:], (".DS_Store", b"")]),
    "a sparse file": lambda: with_field(python_tar(FILES), 156, b"S"),
    "a contiguous file": lambda: with_field(python_tar(FILES), 156, b"7"),
    "an old regular file": lambda: with_field(python_tar(FILES), 156, b"\0"),
    "a pax block and no member": lambda: python_tar(FILES[:1], mtime=0.5)[:1024] + END,
    "a pax block and no member, behind others": lambda: empty_files("a.jpg", "b.jpg") + NESTED[:1024] + END,
    "two pax blocks before a member": lambda: NESTED[:1024] + NESTED,
    "an empty pax block": lambda: pax_member(b""),
    "a pax block of two blocks": lambda: pax_member(b"512 a=" + b"x" * 505 + b"\n" + pax_record("path", "b.jpg")),
    "a folder that claims a size": lambda: (
        with_field(python_tar([("set", None)])[:BLOCK], 124, b"00000001000\0") + empty_files("a.jpg", "b.jpg") + END
    ),
    "a size of twelve digits": lambda: with_field(python_tar(FILES), 124, b"000000001274"),
    "a size with a digit that is none": lambda: with_field(python_tar(FILES), 124, b"00000001268\0"),
    "a checksum with a digit that is none": lambda: (
        header("a.jpg", 3).replace(b"010120\0", b"010118\0") + b"abc" + padding(3) + END  # 1 x 8 + 8 is 2 x 8 + 0
    ),
    "a global pax block": lambda: global_pax({"comment": "x"}),
    "a global pax path": lambda: global_pax({"path": "x.jpg"}),
}


def empty_files(*names: str) -> bytes:
    return b"".join(header(name, 0) for name in names)


def old_header(name: str, content: bytes) -> bytes:
    """A member as tars had them before ustar."""
    block = bytearray(header(name, len(content)))
    block[257:] = bytes(255)
    return repaired(block) + content + padding(len(content))


def with_field(archive: bytes, at: int, value: bytes) -> bytes:
    return repaired(bytearray(archive[:at] + value + archive[at + len(value) : BLOCK])) + archive[BLOCK:]


def global_pax(headers: dict[str, str]) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.PAX_FORMAT, pax_headers=headers) as archive:
        archive.addfile(tarfile.TarInfo("a.jpg"))
    return out.getvalue()


def repaired(block: bytearray) -> bytes:
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


@pytest.mark.parametrize("make", ODD.values(), ids=ODD)
def test_an_odd_archive_is_scanned_as_it_is_read_or_refused_alike(make: Callable[[], bytes]) -> None:
    check_same(make())


OUTCOMES: dict[str, int | str] = {
    "bad_header_checksum_middle.tar": "no tar header at byte 55296",
    "concatenated.tar": "data after the end of the archive at byte 66048",
    "dot_slash_and_hidden.tar": 6,
    "dots_in_keys.tar": 2,
    "duplicate_adjacent.tar": "'000000.txt' at byte 43520 stands twice in one sample",
    "duplicate_names.tar": "'000000.jpg' at byte 55296 comes after other samples",
    "empty_archive.tar": 0,
    "empty_members.tar": 6,
    "git_lfs_pointer.tar": "this is a Git LFS pointer",
    "gnu_long_names.tar": 6,
    "good.tar": 6,
    "good.tar.bz2": "this is bzip2: unpack it first",
    "good.tar.gz": "this is gzip: unpack it first",
    "good.tar.zst": "this is zstd: unpack it first",
    "gz_named.tar": "this is gzip: unpack it first",
    "html_named.tar": "this looks like an HTML or XML page",
    "interleaved_keys.tar": "'000000.txt' at byte 144384 comes after other samples",
    "native_cpython_recursion.tar": "ends at byte 516 inside a member",
    "native_libarchive_test_compat_plexus_archiver_tar.tar": "data after the end of the archive at byte 1536",
    "native_libarchive_test_read_format_gtar_sparse_1_17_posix10.tar": "the member at byte 0 is a sparse file",
    "native_libarchive_test_read_format_tar_V_negative_size.tar": "no tar header at byte 0",
    "native_libarchive_test_read_format_tar_invalid_pax_size.tar": "not a number of bytes",
    "native_libarchive_test_read_format_tar_mac_metadata_1.tar": 0,
    "native_libarchive_test_read_pax_empty_val_no_nl.tar": "has a broken record",
    "native_webdataset_compressed.tar": 3,
    "no_end_blocks.tar": "ends at byte 156672 without the end-of-archive blocks",
    "path_traversal.tar": 10,  # keys that climb; nothing is unpacked
    "trunc.tar.gz": "this is gzip: unpack it first",
    "trunc_at_boundary.tar": "ends at byte 148992 without the end-of-archive blocks",
    "zero_bytes.tar": "ends at byte 0 without the end-of-archive blocks",
}
"""Samples, or what is said."""


@pytest.mark.skipif(not TARS.exists(), reason="the malformed tars are not here")
def test_every_malformed_tar_has_a_stated_outcome() -> None:
    found_outcomes = {}
    for path in TARS.iterdir():
        archive = path.read_bytes()
        check_same(archive)
        said = refusal_of(partial(scan_tar, archive))
        stated = OUTCOMES.get(path.name)
        is_as_stated = isinstance(stated, str) and stated in said if said else stated == len(scan_tar(archive).keys)
        found_outcomes[path.name] = stated if is_as_stated else said
    assert found_outcomes == OUTCOMES


@pytest.mark.parametrize("make", [lambda: our_tar(FILES), lambda: NESTED], ids=["ours", "pax"])
def test_an_archive_that_was_cut_is_refused_alike_at_every_block(make: Callable[[], bytes]) -> None:
    archive = make()
    whole = [size for size in range(0, len(archive) + 1, BLOCK // 2) if check_same(archive[:size])]
    assert min(whole) >= len(archive.rstrip(b"\0"))


NAMES = st.text("ab.é/", min_size=1, max_size=6) | st.sampled_from(
    ["a.jpg", "b.jpg", "b.txt", "./b.jpg", "c.jpg", "s/a.jpg", "k" * 95 + ".jpg", "k" * 200 + ".jpg", "s/" * 70 + "a.jpg"]
)
CONTENTS = st.none() | st.binary(max_size=40) | st.sampled_from([bytes(512), b"x" * 513, NESTED, NESTED[:1536], b"y" + NESTED])


@given(
    st.lists(st.tuples(NAMES, CONTENTS), max_size=8),
    st.sampled_from(list(FORMATS.values())),
    st.sampled_from([0, 0.5, 99.75]),
)
@tries(200)
def test_any_archive_is_scanned_as_it_is_read(files: Files, tar_format: int, mtime: float) -> None:
    try:
        archive = python_tar(files, tar_format, mtime=mtime)
    except ValueError:  # a name that ustar can't hold
        return
    check_same(archive)


MODELS = [make() for name, make in PLAIN.items() if "webdataset" not in name]
MUTATIONS = st.lists(st.tuples(st.integers(0, 1 << 16), st.integers(0, 511), st.integers(0, 255)), min_size=1, max_size=3)
FIELDS = st.sampled_from([0, 1, 99, 100, 124, 130, 134, 135, 148, 153, 154, 155, 156, 257, 261, 262, 263, 345, 346])
TELLING = st.sampled_from([*b'\0 ./0179=\n"LKxgS5', 0x80, 0xFF])


@pytest.mark.slow
@given(
    st.sampled_from(MODELS),
    MUTATIONS | st.lists(st.tuples(st.integers(0, 60), FIELDS, TELLING), min_size=1, max_size=3),
    st.booleans(),
)
@tries(1500)
def test_a_mutated_archive_is_scanned_as_it_is_read_or_refused_alike(
    archive: bytes, changes: Iterable[tuple[int, int, int]], repair: bool
) -> None:
    bad = bytearray(archive)
    for block, at, value in changes:
        begin = block % (len(bad) // BLOCK) * BLOCK
        bad[begin + at] = value
        if repair and bad[begin + 257 : begin + 262] == b"ustar" and not 148 <= at < 156:
            bad[begin : begin + BLOCK] = repaired(bad[begin : begin + BLOCK])
    check_same(bytes(bad))


PAX = st.lists(
    st.tuples(st.sampled_from(["mtime", "atime", "path", "size", "GNU.sparse.major", "x"]), st.text("1./é", max_size=4)),
    max_size=3,
)


@given(st.lists(PAX, min_size=1, max_size=5), st.integers(0, 3))
@tries(300)
def test_any_pax_records_are_understood_as_they_are_read(blocks: list[list[tuple[str, str]]], flaw: int) -> None:
    archive = b""
    for number, records in enumerate(blocks):
        payload = b"".join(pax_record(key, value) for key, value in records)
        if flaw == 1 and number == len(blocks) - 1:
            payload = payload[:-1]
        if flaw == 2 and number == len(blocks) - 1:
            payload = payload.replace(b"=", b"-", 1)
        archive += pax_member(payload, f"{number}.jpg")[: -len(END)]
    check_same(archive + END)


def pax_member(payload: bytes, name: str = "a.jpg") -> bytes:
    """An archive of one member with a pax block before it."""
    pax = bytearray(header("PaxHeader", len(payload)))
    pax[156:157] = b"x"
    return repaired(pax) + payload + padding(len(payload)) + header(name, 1) + b"x" + padding(1) + END


def pax_record(key: str, value: str) -> bytes:
    body = f" {key}={value}\n".encode()
    return next(b"%d%s" % (size, body) for size in range(len(body), len(body) + 4) if len(b"%d%s" % (size, body)) == size)


# ---- Indices ----


def test_the_index_of_a_scan_is_that_of_the_builder_of_the_shard() -> None:
    builder = ShardBuilder()
    samples = [*map(image_sample, range(20)), *map(text_sample, range(20))]
    archive = b"".join(map(builder.add, samples))
    end, index, row = builder.finish("a.tar")
    archive += end
    scan = scan_tar(archive)
    text_chars, num_codes = [len(sample.text) for sample in samples], [sample.num_codes for sample in samples]
    rebuilt = scan.index(memoryview(archive), xxhash.xxh3_128_hexdigest(archive), text_chars, num_codes)
    assert serialize_index(rebuilt) == serialize_index(index)
    assert scan.keys == [sample.key for sample in samples]
    assert scan.suffixes == row.members


def test_a_tar_whose_samples_all_have_suffixes_of_their_own_is_refused_before_memory_runs_out() -> None:
    blocks = [header(f"{n}.photo-{n}.jpg", 0) for n in range(6000)]
    archive = b"".join(blocks) + END
    assert len(scan_tar(archive).keys) == 6000
    with pytest.raises(FormatError, match=r"6000 samples with 6000 different suffixes .*rename the files"):
        scan_tar(archive).index(memoryview(archive), "0" * 32)
