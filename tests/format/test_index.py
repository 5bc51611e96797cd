"""The index of a shard: written, rebuilt from the tar, stale, damaged, and of tars that other programs made."""

from __future__ import annotations

import io
import json
import tarfile
import zlib
from dataclasses import fields, replace
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
import xxhash
from factory import read_members
from hypothesis import given
from hypothesis import strategies as st
from properties import tries

from wds_tools.errors import FormatError
from wds_tools.format.index import ABSENT, IndexBuilder, ShardIndex, check_fresh, parse_index, read_part, serialize_index
from wds_tools.format.schema import Sample
from wds_tools.format.shard import ShardBuilder, group_samples, sample_from_members

GRID_HW = np.arange(16, dtype="<u2").reshape(4, 4)


def shard(texts: list[str], *, with_codes: bool = True, last_has_image: bool = False) -> tuple[bytes, ShardIndex]:
    builder = ShardBuilder()
    archive = b""
    for n, text in enumerate(texts):
        image: dict[str, Any] = (
            {"image": text.encode(), "image_extension": "jpg"} if last_has_image and n == len(texts) - 1 else {}
        )
        codes = {"vqcode_512": GRID_HW} if with_codes else {}
        archive += builder.add(Sample(key=f"{n:08d}", data_type="image_text", text=text, codes=codes, **image))
    end, index, _ = builder.finish("shard.tar")
    return archive + end, index


def rebuild(archive: bytes) -> ShardIndex:
    """The index of a tar, from nothing but the tar."""
    builder = IndexBuilder()
    for stored in group_samples(read_members(archive)):
        start, end = stored.start, stored.end
        payloads = {suffix: member.payload for suffix, member in stored.members.items()}
        sample = sample_from_members(stored.key, payloads) if "json" in payloads else None
        builder.add(
            start,
            end - start,
            [(suffix, member.offset - start, len(member.payload)) for suffix, member in stored.members.items()],
            zlib.crc32(archive[start:end]),
            len(sample.text) if sample else 0,
            sample.num_codes if sample else 0,
        )
    return builder.build(len(archive), xxhash.xxh3_128_hexdigest(archive))


def equal(a: ShardIndex, b: ShardIndex) -> bool:
    return all(np.array_equal(getattr(a, field.name), getattr(b, field.name)) for field in fields(ShardIndex))


def payload(archive: bytes, index: ShardIndex, row: int, member: str) -> bytes | None:
    column = index.members.index(member)
    length = int(index.lengths[row, column])
    at = int(index.start[row]) + int(index.offsets[row, column])
    return None if length == ABSENT else archive[at : at + length]


def columns_of(data: bytes) -> dict[str, Any]:
    return safetensors.numpy.load(data)


def third_party_tar(tar_format: int, members: list[tuple[str, bytes | None]]) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tar_format) as archive:
        for name, data in members:
            info = tarfile.TarInfo(name)
            if data is None:
                info.type = tarfile.DIRTYPE
            else:
                info.size, info.mtime = len(data), 1.5  # a float: a pax header a member, as webdataset's writer makes them
            archive.addfile(info, io.BytesIO(data or b""))
    return out.getvalue()


@given(
    st.lists(st.text(st.characters(exclude_categories=["Cs"]), max_size=900), max_size=6),
    st.booleans(),
    st.booleans(),
)
@tries(60)
def test_an_index_survives_and_is_the_one_rebuilt_from_the_tar(texts: list[str], with_codes: bool, last_has_image: bool) -> None:
    archive, index = shard(texts, with_codes=with_codes, last_has_image=last_has_image)
    data = serialize_index(index)
    found = parse_index(data)
    assert equal(found, index)
    assert equal(rebuild(archive), index)
    assert serialize_index(found) == data == serialize_index(rebuild(archive))
    assert len(found) == len(texts)
    assert found.text_chars.tolist() == [len(text) for text in texts]
    for row in range(len(texts)):
        start, end = int(found.start[row]), int(found.start[row]) + int(found.size[row])
        assert zlib.crc32(archive[start:end]) == found.crc32[row]
        record = payload(archive, found, row, "json")
        assert record is not None
        assert json.loads(record)["text"] == texts[row]


ROWS = st.lists(
    st.tuples(
        st.integers(0, 3000),  # gap before the sample
        st.dictionaries(st.sampled_from(["json", "jpg", "txt", "cls.npy"]), st.integers(0, 1 << 20), min_size=1),
        st.integers(0, (1 << 32) - 1),
        st.integers(0, 1 << 40),
    ),
    max_size=6,
)
Row = tuple[int, dict[str, int], int, int]


def index_of(rows: list[Row], base: int) -> ShardIndex:
    builder = IndexBuilder()
    at = base
    for gap, lengths, crc32, text_chars in rows:
        at += gap
        members, size = [], 0
        for suffix, length in lengths.items():
            members.append((suffix, size + 512 + gap % 2 * 1024, length))
            size = members[-1][1] + length
        builder.add(at, size, members, crc32, text_chars, 0)
        at += size
    return builder.build(at, "0" * 32)


@given(ROWS, st.sampled_from([0, 1 << 33]))
@tries(100)
def test_any_layout_survives(rows: list[Row], base: int) -> None:
    index = index_of(rows, base)
    assert equal(parse_index(serialize_index(index)), index)


@pytest.mark.parametrize(("with_codes", "bytes_per_sample"), [(False, 16), (True, 20)])
def test_an_index_takes_the_stated_bytes_a_sample(with_codes: bool, bytes_per_sample: int) -> None:
    _, index = shard(["text"] * 2000, with_codes=with_codes)
    data = serialize_index(index)
    assert set(columns_of(data)) == {"lengths", "crc32", "text_chars", "num_codes"}
    assert bytes_per_sample <= len(data) / 2000 < bytes_per_sample + 0.5


@pytest.mark.parametrize("tar_format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_other_layouts_keep_their_offsets(tar_format: int) -> None:
    files: list[tuple[str, bytes | None]] = [
        ("set", None),
        ("set/a.jpg", b"x" * 700),
        ("set/a.txt", b"one"),
        ("set/b.jpg", b""),
        ("set/sub", None),
        ("set/c.txt", b"t" * 512),
        ("set/c.jpg", b"three"),
    ]
    archive = third_party_tar(tar_format, files)
    index = rebuild(archive)
    data = serialize_index(index)
    assert {"start", "size", "offsets"} <= set(columns_of(data))
    found = parse_index(data)
    assert equal(found, index)
    assert found.members == ("jpg", "txt")
    assert [payload(archive, found, row, "jpg") for row in range(3)] == [b"x" * 700, b"", b"three"]
    assert [payload(archive, found, row, "txt") for row in range(3)] == [b"one", None, b"t" * 512]
    assert found.start[0] >= 512  # behind the folder


def test_a_missing_member_alone_needs_no_offsets() -> None:
    archive, index = shard(["one", "two"], last_has_image=True)
    data = serialize_index(index)
    assert "offsets" not in columns_of(data)
    found = parse_index(data)
    assert [payload(archive, found, row, "jpg") for row in range(2)] == [None, b"two"]


def test_a_stale_index_is_refused() -> None:
    archive, index = shard(["one", "two"])
    shard_is: dict[str, Any] = {
        "samples": 2,
        "tar_bytes": len(archive),
        "xxh128": xxhash.xxh3_128_hexdigest(archive),
        "name": "shard.tar.index",
    }
    for found in (index, parse_index(serialize_index(index)), read_part(serialize_index(index), 1, 2)):
        check_fresh(found, **shard_is)
        for change in ({"tar_bytes": len(archive) + 512}, {"xxh128": "0" * 32}, {"samples": 3}):
            with pytest.raises(FormatError, match=r"^shard.tar.index: the index is stale: .*rebuild it with `wds-tools index`"):
                check_fresh(found, **shard_is | change)


@given(ROWS, st.sampled_from([0, 1 << 33]), st.tuples(st.integers(0, 6), st.integers(0, 6)))
@tries(80)
def test_rows_are_read_as_they_stand_in_the_whole(rows: list[Row], base: int, cut: tuple[int, int]) -> None:
    index = index_of(rows, base)
    data = serialize_index(index)
    first, last = sorted(min(at, len(index)) for at in cut)
    whole, part = parse_index(data), read_part(memoryview(data), first, last)
    assert len(part) == last - first
    for field in fields(ShardIndex):
        value = getattr(whole, field.name)
        expected = value[first:last] if isinstance(value, np.ndarray) else value
        assert np.array_equal(getattr(part, field.name), expected), field.name


def test_rows_of_this_projects_own_layout_are_read_as_they_stand_in_the_whole() -> None:
    _, index = shard([n * "text " for n in range(700)], last_has_image=True)
    for first, last in ((0, 700), (0, 0), (350, 351), (699, 700), (700, 700)):
        part = read_part(serialize_index(index), first, last)
        assert part.start.tolist() == index.start[first:last].tolist()
        assert part.offsets.tolist() == index.offsets[first:last].tolist()
        assert len(part) == last - first
        assert part.samples == 700


@pytest.mark.parametrize(("first", "last"), [(0, 3), (2, 3), (-1, 1), (2, 1), (1 << 70, (1 << 70) + 1)])
def test_rows_that_an_index_does_not_have_are_a_format_error(first: int, last: int) -> None:
    with pytest.raises(FormatError, match=r"^a.index: has 2 samples, asked for were .*rebuild it with `wds-tools index`"):
        read_part(serialize_index(shard(["one", "two"])[1]), first, last, "a.index")


def test_a_cut_index_is_a_format_error_at_every_byte() -> None:
    data = serialize_index(shard(["one", "two"])[1])
    for length in range(len(data)):
        with pytest.raises(FormatError, match="rebuild it with `wds-tools index`"):
            parse_index(data[:length])
    with pytest.raises(FormatError, match="rebuild it"):
        parse_index(data + b"\0")


INDICES = [
    serialize_index(shard(["one", "two", "three"])[1]),
    serialize_index(shard([])[1]),
    serialize_index(
        rebuild(third_party_tar(tarfile.PAX_FORMAT, [("d", None), ("a.jpg", b"1"), ("b.txt", b"2"), ("b.jpg", b"3")]))
    ),
]


@pytest.mark.slow
@given(
    st.sampled_from(INDICES),
    st.lists(st.tuples(st.integers(0, 2000), st.integers(0, 255)), min_size=1, max_size=6),
    st.sampled_from([(0, 0), (0, 1), (1, 2), (1, 3), (2, 3)]),
)
@tries(1000)
def test_a_mutated_index_is_possible_or_a_format_error(data: bytes, changes: list[tuple[int, int]], cut: tuple[int, int]) -> None:
    bad = bytearray(data)
    for at, value in changes:
        bad[at % len(bad)] = value
    for read in (parse_index, lambda data: read_part(data, *cut)):
        try:
            index = read(bytes(bad))
        except FormatError:
            continue
        check_possible(index)


def check_possible(index: ShardIndex) -> None:
    end = 0
    for row in range(len(index)):
        start, size = int(index.start[row]), int(index.size[row])
        assert end <= start
        end = start + size
        assert end <= index.tar_bytes
        for column in range(len(index.members)):
            if index.lengths[row, column] != ABSENT:
                assert int(index.offsets[row, column]) + int(index.lengths[row, column]) <= size


@given(st.binary(max_size=300))
@tries(100)
def test_random_bytes_are_a_format_error(data: bytes) -> None:
    with pytest.raises(FormatError):
        parse_index(data)
    with pytest.raises(FormatError):
        parse_index(len(data).to_bytes(8, "little") + data)


GOOD = shard(["one", "two", "three"])[1]
HUGE = 2**64 - 1
IMPOSSIBLE: dict[str, dict[str, Any]] = {
    "tar of a negative size": {"tar_bytes": -1},
    "tar of no whole bytes": {"tar_bytes": 1.5},
    "tar of True bytes": {"tar_bytes": True},
    "tar of 2**63 bytes": {"tar_bytes": 1 << 63},
    "tar that is too small": {"tar_bytes": GOOD.tar_bytes - 1025},
    "hash that is a number": {"tar_xxh128": 5},
    "too few members": {"members": ("json",)},
    "a member twice": {"members": ("json", "json")},
    "a member that is a number": {"members": ("json", 1)},
    "too few checksums": {"crc32": GOOD.crc32[:2]},
    "too many lengths": {"lengths": np.concatenate([GOOD.lengths, GOOD.lengths])},
    "checksums in two dimensions": {"crc32": GOOD.crc32[:, None]},
    "lengths in one dimension": {"lengths": GOOD.lengths[:, 0]},
    "lengths in three dimensions": {"lengths": GOOD.lengths[:, :, None]},
    "signed lengths": {"lengths": GOOD.lengths.astype("<i8")},
    "lengths of floats": {"lengths": GOOD.lengths.astype("<f4")},
    "checksums of bytes": {"crc32": GOOD.crc32.astype("u1")},
    "a length beyond the sample": {"lengths": GOOD.lengths * np.uint32(1000)},
    "lengths that wrap around": {"lengths": np.full_like(GOOD.lengths, HUGE, dtype="<u8")},
    "a start that wraps around": {"start": np.array([0, 4096, HUGE - 100], "<u8")},
    "a size that wraps around": {"size": np.array([HUGE, 1, 1], "<u8")},
    "starts that go back": {"start": GOOD.start[::-1].copy()},
    "samples that overlap": {"start": np.zeros_like(GOOD.start)},
    "an offset beyond the sample": {"offsets": GOOD.offsets + np.uint32(4000)},
    "an offset that wraps around": {"offsets": np.full_like(GOOD.offsets, HUGE, dtype="<u8")},
}


@pytest.mark.parametrize("change", IMPOSSIBLE.values(), ids=IMPOSSIBLE)
def test_an_impossible_index_is_a_format_error(change: dict[str, Any]) -> None:
    bad = replace(GOOD, **change)
    head = {"version": 1, "members": list(bad.members), "tar_bytes": bad.tar_bytes, "tar_xxh128": bad.tar_xxh128}
    names = {"lengths", "crc32", "text_chars", "num_codes"}
    for explicit in ({"start", "size", "offsets"}, set()):
        if not explicit and not names & set(change) and not {"tar_bytes", "tar_xxh128", "members"} & set(change):
            continue
        columns = {name: np.ascontiguousarray(getattr(bad, name)) for name in names | explicit}
        data = safetensors.numpy.save(columns, {"wds_tools_index": json.dumps(head)})
        with pytest.raises(FormatError, match=r"^a.index: .*rebuild it with `wds-tools index`"):
            parse_index(data, "a.index")


@pytest.mark.parametrize("head", ["", "[]", "1", "null", "{}", '{"version": 1}', '{"version": 2, "members": []}', "not json"])
def test_an_index_with_another_head_is_a_format_error(head: str) -> None:
    columns = columns_of(serialize_index(GOOD))
    for metadata in ({"wds_tools_index": head}, {"format": "np"}, None):
        with pytest.raises(FormatError, match="rebuild it with `wds-tools index`"):
            parse_index(safetensors.numpy.save(columns, metadata))
