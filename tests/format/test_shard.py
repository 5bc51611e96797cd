"""Samples to members to tars and back, as other libraries read them; members that are hostile."""

from __future__ import annotations

import hashlib
import io
import itertools
import json
import pickle
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xxhash
from commands import SHARED
from factory import image_sample, read_members
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from properties import tries

from wds_tools.errors import FormatError
from wds_tools.format.codes import CODE_COLUMNS, code_dtype, join_grids
from wds_tools.format.index import serialize_index
from wds_tools.format.schema import DATA_TYPES, IMAGE_EXTENSIONS, MARKED_TYPES, Sample, SourceImage, validate
from wds_tools.format.shard import (
    ShardBuilder,
    encode_members,
    form_of,
    group_samples,
    is_stray,
    npy_bytes,
    parse_npy,
    sample_from_members,
    split_name,
)
from wds_tools.format.tar import END, header, padding

TARS = SHARED / "malformed" / "tars"
CAPTION = (
    "A brown dog leaps over the wet sand of a wide and empty beach to catch a red frisbee, while far behind it two small "
    + ("children in coats look for shells where the last wave left a line of weed.")
)
CODES_HW = np.arange(1024, dtype="<u2").reshape(32, 32) * 7


def build(samples: list[Sample]) -> bytes:
    builder = ShardBuilder()
    return b"".join(map(builder.add, samples)) + builder.finish("shard.tar")[0]


def read_back(archive: bytes) -> list[Sample]:
    return [
        sample_from_members(stored.key, {suffix: member.payload for suffix, member in stored.members.items()})
        for stored in group_samples(read_members(archive))
    ]


def same(a: Sample, b: Sample) -> bool:
    fields = ("key", "data_type", "text", "width", "height", "images", "conversations", "grids")
    return (
        all(getattr(a, name) == getattr(b, name) for name in fields)
        and dict(a.provenance) == dict(b.provenance)
        and list(a.codes) == list(b.codes)
        and all(a.codes[name].dtype == b.codes[name].dtype and np.array_equal(a.codes[name], b.codes[name]) for name in a.codes)
    )


TEXT = st.text(st.characters(exclude_categories=["Cs"]))
KEYS = st.text("abcXYZ0123456789_-", min_size=1, max_size=64)
GRIDS = st.sampled_from(["<u2", "<u4"]).flatmap(
    lambda dtype: hnp.arrays(dtype, hnp.array_shapes(min_dims=2, max_dims=2, min_side=1, max_side=48))
)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(1 << 63), (1 << 63) - 1) | st.floats(allow_nan=False, allow_infinity=False) | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=5,
)


@st.composite
def samples(draw: st.DrawFn) -> Sample:
    data_type = draw(st.sampled_from(DATA_TYPES))
    fields: dict[str, Any] = {}
    if data_type != "text_pretrain":
        if draw(st.booleans()):
            fields["codes"] = {draw(st.sampled_from((*CODE_COLUMNS, "vqcode_256", "vqcode_fit720-emu3"))): draw(GRIDS)}
        if draw(st.booleans()):
            fields |= {"image": draw(st.binary(max_size=2000)), "image_extension": draw(st.sampled_from(IMAGE_EXTENSIONS))}
        if draw(st.booleans()):
            fields |= {"width": draw(st.integers(1, 1 << 16)), "height": draw(st.integers(1, 1 << 16))}
    text = draw(TEXT)
    if data_type == "visual_sft":
        turn = st.fixed_dictionaries({"from": st.sampled_from(["human", "gpt"]), "value": TEXT})
        fields["conversations"] = draw(st.lists(turn, max_size=4))
    if data_type in MARKED_TYPES:
        if "image" in fields:
            image = st.builds(SourceImage, st.binary(max_size=200), st.sampled_from(IMAGE_EXTENSIONS))
            fields["more_images"] = tuple(draw(st.lists(image, max_size=12)))
        if draw(st.booleans()):
            codes, shapes = join_grids(
                draw(st.lists(GRIDS.filter(lambda grid: grid.dtype == "<u2"), max_size=4)), np.dtype("<u2")
            )
            fields |= {"codes": {"vqcode_512": codes}, "grids": {"vqcode_512": shapes}}
    names = TEXT.map(lambda name: f"p_{name}")
    sample = Sample(
        key=draw(KEYS),
        data_type=data_type,
        text=text,
        provenance=draw(st.dictionaries(names, VALUES, max_size=3)),
        **fields,
    )
    return sample if data_type != "interleaved" else sample._replace(text=f"{text}<image>" * sample.num_images)


# --- Round trips ---------------------------------------------------------------------------------------------------


@pytest.mark.slow
@given(st.lists(samples(), max_size=4, unique_by=lambda sample: sample.key))
@tries(150)
def test_samples_of_every_kind_survive(batch: list[Sample]) -> None:
    archive = build(batch)
    found = read_back(archive)
    assert len(found) == len(batch)
    assert all(same(a, b) for a, b in zip(found, batch, strict=True))
    assert build(found) == archive
    for sample in found:
        validate(sample)


@pytest.mark.parametrize(
    "text",
    ["", "\0", "a\0b", "😀👩‍👩‍👧", "\u2028\x85\v", "é\u0301", '\\ " \n\r\t', "x" * 3_000_000, "日" * 1_000_000],
    ids=range(9),
)
def test_texts_survive_to_the_character(text: str) -> None:
    (found,) = read_back(build([Sample(key="a", data_type="text_pretrain", text=text)]))
    assert found.text == text
    assert found.length == len(text)


@pytest.mark.parametrize("dtype", ["<u2", "<u4"])
@pytest.mark.parametrize("shape", [(1, 1), (1, 99), (32, 32), (24, 64), (256, 256)])
def test_grids_keep_dtype_shape_and_values_whatever_their_layout_in_memory(dtype: str, shape: tuple[int, int]) -> None:
    grid_hw = np.random.default_rng(0).integers(0, np.iinfo(dtype).max, shape, dtype, endpoint=True)
    for layout_hw in (grid_hw, np.asfortranarray(grid_hw), grid_hw[::-1, ::-1], np.broadcast_to(grid_hw[:1], shape)):
        sample = Sample(key="a", data_type="image_text", text="t", codes={"vqcode_512": layout_hw})
        (found,) = read_back(build([sample]))
        found_hw = found.codes["vqcode_512"]
        assert (found_hw.dtype.str, found_hw.shape) == (dtype, shape)
        assert np.array_equal(found_hw, layout_hw)
        assert not found_hw.flags.writeable
        assert np.array_equal(np.load(io.BytesIO(npy_bytes(layout_hw)), allow_pickle=False), layout_hw)


def test_members_lie_json_first_and_the_length_counts_codes_as_four_characters() -> None:
    sample = Sample(
        key="k", data_type="image_text", text="four", codes={"vqcode_512": CODES_HW}, image=b"jpeg", image_extension="jpg"
    )
    (stored,) = group_samples(read_members(build([sample])))
    assert list(stored.members) == ["json", "vqcode_512.npy", "jpg"]
    assert (stored.start, stored.end) == (0, stored.members["jpg"].end)
    record = json.loads(bytes(stored.members["json"].payload))
    assert record == {"data_type": "image_text", "text": "four", "length": 4 + 4 * 1024, "width": None, "height": None}


def test_a_shard_knows_its_size_hash_and_contents() -> None:
    batch = three_samples()
    builder = ShardBuilder()
    pieces = [builder.add(sample) for sample in batch]
    assert builder.num_bytes == sum(map(len, pieces))
    end, index, row = builder.finish("shard-000000-0000.tar")
    archive = b"".join(pieces) + end
    assert end == END
    assert archive == build(batch)
    assert (row.name, row.samples, row.bytes) == ("shard-000000-0000.tar", 3, len(archive))
    assert row.xxh128 == index.tar_xxh128 == xxhash.xxh3_128_hexdigest(archive)
    assert row.data_types == {"image_text": 3}
    assert row.members == ("json", "vqcode_512.npy")
    assert (row.text_chars, row.num_codes) == (sum(len(sample.text) for sample in batch), 3 * 1024)


def three_samples() -> list[Sample]:
    return [
        Sample(
            key=f"000000-{n:08d}", data_type="image_text", text=f"{CAPTION} {n}", codes={"vqcode_512": CODES_HW + np.uint16(n)}
        )
        for n in range(3)
    ]


def test_the_bytes_of_a_shard_are_pinned() -> None:
    assert (
        hashlib.sha256(build(three_samples())).hexdigest() == "22e803a9cef76960b2c727a2608f4f04d3c969282eab146d5c840e0921d613c5"
    )


def test_a_512_pixel_sample_with_its_caption_and_index_takes_at_most_4200_bytes() -> None:
    assert len(CAPTION.split()) == 40
    builder = ShardBuilder()
    for n in range(1000):
        builder.add(Sample(key=f"000000-{n:08d}", data_type="image_text", text=CAPTION, codes={"vqcode_512": CODES_HW}))
    _, index, row = builder.finish("shard.tar")
    assert (row.bytes + len(serialize_index(index))) / 1000 <= 4200


def test_an_empty_shard_is_an_empty_tar() -> None:
    archive, index, row = ShardBuilder().finish("shard.tar")
    assert archive == END
    assert (len(index), row.samples, row.members) == (0, 0, ())


# --- What other libraries make of it -------------------------------------------------------------------------------


@pytest.fixture
def shard(tmp_path: Path) -> Path:
    path = tmp_path / "shard-000000-0000.tar"
    path.write_bytes(build(three_samples()))
    return path


def check_decoded(found: list[dict[str, Any]]) -> None:
    assert len(found) == 3
    for sample, wanted in zip(found, three_samples(), strict=True):
        assert sample["__key__"] == wanted.key
        assert sample["json"]["text"] == wanted.text
        assert sample["json"]["length"] == wanted.length
        codes_HW = np.asarray(sample["vqcode_512.npy"])
        assert np.array_equal(codes_HW, wanted.codes["vqcode_512"])


@pytest.mark.filterwarnings("ignore::ResourceWarning")  # webdataset leaves the file to the garbage collector
def test_webdataset_reads_it(shard: Path) -> None:
    import webdataset as wds

    found = list(wds.WebDataset(str(shard), shardshuffle=False).decode())
    check_decoded(found)
    assert found[0]["vqcode_512.npy"].dtype == np.uint16


def test_hugging_face_datasets_streams_it(shard: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    stream = datasets.load_dataset(
        "webdataset", data_files=str(shard), split="train", streaming=True, cache_dir=str(tmp_path / "cache")
    )
    check_decoded(list(stream))


def test_tarfile_reads_it(shard: Path) -> None:
    found = []
    with tarfile.open(shard) as archive:
        members = iter(archive)
        for text, codes in zip(members, members, strict=True):
            record, grid = archive.extractfile(text), archive.extractfile(codes)
            assert record is not None
            assert grid is not None
            key = text.name.removesuffix(".json")
            assert codes.name == f"{key}.vqcode_512.npy"
            found.append({"__key__": key, "json": json.load(record), "vqcode_512.npy": np.load(io.BytesIO(grid.read()))})
    check_decoded(found)


# --- Samples that break the schema ---------------------------------------------------------------------------------

GRID_HW = np.zeros((2, 2), "<u2")
TURNS = [{"from": "human", "value": "hi"}]
TALK = {"data_type": "visual_sft", "conversations": TURNS}


PAGE = {
    **{"data_type": "interleaved", "text": "a <image> b <image>"},
    **{"codes": {"vqcode_512": GRID_HW[None, 0]}, "grids": {"vqcode_512": [[1, 1], [1, 1]]}},
}


def grids(value: Any) -> dict[str, Any]:
    """A conversation with four codes and these grids."""
    return {**TALK, "codes": {"vqcode_512": GRID_HW}, "grids": value}


INVALID: dict[str, tuple[dict[str, Any], str]] = {
    "no key": ({"key": ""}, "expected 1 to 64"),
    "key of 65": ({"key": "k" * 65}, "expected 1 to 64"),
    "key with a dot": ({"key": "a.b"}, "letters, digits"),
    "key with a slash": ({"key": "a/b"}, "letters, digits"),
    "key with a space": ({"key": "a b"}, "letters, digits"),
    "key with a NUL": ({"key": "a\0"}, "letters, digits"),
    "key beyond ASCII": ({"key": "é"}, "letters, digits"),
    "key of an Arabic digit": ({"key": "٣"}, "letters, digits"),
    "unknown data type": ({"data_type": "video"}, "data_type='video' is not one of"),
    "data type of another type": ({"data_type": ["image_text"]}, "is not one of"),
    "text is None": ({"text": None}, "text is a NoneType"),
    "text is bytes": ({"text": b"x"}, "text is a bytes"),
    "text with half a character": ({"text": "\ud83d"}, "can't be written as JSON"),
    "width of zero": ({"width": 0}, "width=0"),
    "width below zero": ({"width": -5}, "width=-5"),
    "width is True": ({"width": True}, "width=True"),
    "height is a float": ({"height": 512.0}, "height=512.0"),
    "codes in another column": ({"codes": {"codes": GRID_HW}}, "expected 'vqcode_'"),
    "code column with a dot": ({"codes": {"vqcode_a.b": GRID_HW}}, "expected 'vqcode_'"),
    "code column with a slash": ({"codes": {"vqcode_../x": GRID_HW}}, "expected 'vqcode_'"),
    "code column of 32": ({"codes": {"vqcode_" + "x" * 25: GRID_HW}}, "at most 31"),
    "codes in one dimension": ({"codes": {"vqcode_512": GRID_HW[0]}}, r"<u2 \(2,\)"),
    "codes in three dimensions": ({"codes": {"vqcode_512": GRID_HW[None]}}, r"<u2 \(1, 2, 2\)"),
    "no codes in the grid": ({"codes": {"vqcode_512": GRID_HW[:0]}}, "non-empty"),
    "signed codes": ({"codes": {"vqcode_512": GRID_HW.astype("<i2")}}, "<i2"),
    "big-endian codes": ({"codes": {"vqcode_512": GRID_HW.astype(">u2")}}, ">u2"),
    "codes of 8 bytes": ({"codes": {"vqcode_512": GRID_HW.astype("<u8")}}, "<u8"),
    "object codes": ({"codes": {"vqcode_512": GRID_HW.astype(object)}}, r"\|O"),
    "image without extension": ({"image": b"x"}, "together"),
    "extension without image": ({"image_extension": "jpg"}, "together"),
    "unknown extension": ({"image": b"x", "image_extension": "jpeg2"}, "image_extension='jpeg2'"),
    "conversation of an image": ({"conversations": TURNS}, "belong to visual_sft"),
    "no conversation": ({"data_type": "visual_sft"}, "belong to visual_sft"),
    "conversation is a string": ({"data_type": "visual_sft", "conversations": "hi"}, "not a list of turns"),
    "turn without value": ({"data_type": "visual_sft", "conversations": [{"from": "gpt"}]}, "not a list of turns"),
    "turn of a number": ({"data_type": "visual_sft", "conversations": [{"from": "gpt", "value": 1}]}, "not a list of turns"),
    "further images of a pair": (
        {"image": b"x", "image_extension": "jpg", "more_images": (SourceImage(b"y", "png"),)},
        "more_images",
    ),
    "fewer marks than images": ({**PAGE, "text": "a <image> b"}, "1 <image> marks, 2 images"),
    "more marks than images": ({**PAGE, "text": "<image><image><image>"}, "3 <image> marks, 2 images"),
    "marks without images": ({"data_type": "interleaved", "text": "a <image> b"}, "1 <image> marks, 0 images"),
    "turns of a page": ({**PAGE, "conversations": TURNS}, "belong to visual_sft"),
    "further images without a first": ({**TALK, "more_images": (SourceImage(b"y", "png"),)}, "more_images"),
    "further image of unknown kind": (
        {**TALK, "image": b"x", "image_extension": "jpg", "more_images": (SourceImage(b"y", "svg"),)},
        "image_extension='svg'",
    ),
    "grids of a pair": ({"codes": {"vqcode_512": GRID_HW}, "grids": {"vqcode_512": [[2, 2]]}}, "grids belong to visual_sft"),
    "grids of another column": (grids({"vqcode_multi768": [[2, 2]]}), "expected an object with the code columns vqcode_512"),
    "grids that are a list": (grids([[2, 2]]), "expected an object with the code columns vqcode_512"),
    "a grid of three sides": (grids({"vqcode_512": [[2, 2, 1]]}), r"expected a list of \[height, width\]"),
    "a grid without height": (grids({"vqcode_512": [[0, 2]]}), r"expected a list of \[height, width\]"),
    "a grid of another shape": (grids({"vqcode_512": [[1, 4]]}), r"its 1 grids \[\[1, 4\]\] need \(1, 4\)"),
    "grids of too many codes": (grids({"vqcode_512": [[2, 2], [1, 1]]}), r"need \(1, 5\)"),
    "several grids that are not one row": (grids({"vqcode_512": [[1, 2], [1, 2]]}), r"need \(1, 4\)"),
    "no grids, but codes": (grids({"vqcode_512": []}), r"need \(1, 0\)"),
    "document with codes": ({"data_type": "text_pretrain", "codes": {"vqcode_512": GRID_HW}}, "neither image nor codes"),
    "document with image": ({"data_type": "text_pretrain", "image": b"", "image_extension": "jpg"}, "neither image nor codes"),
    "provenance named text": ({"provenance": {"text": 1}}, "reserved names text"),
    "provenance named id": ({"provenance": {"id": 1, "cls": 2}}, "reserved names cls, id"),
    "provenance named as a sample names itself": ({"provenance": {"__key__": "x"}}, "reserved names __key__"),
    "provenance that is no JSON": ({"provenance": {"when": {1, 2}}}, "can't be written as JSON"),
    "provenance beyond 64 bits": ({"provenance": {"n": 1 << 64}}, "can't be written as JSON"),
    "provenance name that is a number": ({"provenance": {1: 2}}, "can't be written as JSON"),
}


@pytest.mark.parametrize(("change", "problem"), INVALID.values(), ids=INVALID)
def test_a_sample_that_breaks_the_schema_is_refused_and_leaves_no_trace(change: dict[str, Any], problem: str) -> None:
    builder = ShardBuilder()
    first = builder.add(three_samples()[0])
    with pytest.raises(FormatError, match=problem):
        builder.add(Sample(**{"key": "k", "data_type": "image_text", "text": "t", **change}))
    archive = first + builder.add(three_samples()[1]) + builder.finish("shard.tar")[0]
    assert archive == build(three_samples()[:2])


def test_the_longest_key_and_column_fit() -> None:
    sample = Sample(key="k" * 64, data_type="image_text", text="", codes={"vqcode_" + "x" * 24: GRID_HW})
    assert same(read_back(build([sample]))[0], sample)


@pytest.mark.parametrize(("entries", "dtype"), [(1, "<u2"), (8192, "<u2"), (65536, "<u2"), (65537, "<u4"), (1 << 32, "<u4")])
def test_the_dtype_follows_the_codebook(entries: int, dtype: str) -> None:
    assert code_dtype(entries).str == dtype


@pytest.mark.parametrize("entries", [0, -1, (1 << 32) + 1])
def test_an_impossible_codebook_is_refused(entries: int) -> None:
    with pytest.raises(FormatError, match=f"codebook_size={entries}"):
        code_dtype(entries)


# --- Members that are not what they say ----------------------------------------------------------------------------

GOOD_JSON = b'{"data_type": "image_text", "text": "t", "length": 1, "width": null, "height": null}'
BAD_MEMBERS: dict[str, tuple[dict[str, bytes], str]] = {
    "no members": ({}, "has no .json member, only nothing"),
    "no json": ({"jpg": b"x"}, "has no .json member, only jpg"),
    "empty json": ({"json": b""}, "not a sample"),
    "cut json": ({"json": GOOD_JSON[:-1]}, "not a sample"),
    "json of a list": ({"json": b"[1]"}, "not a sample"),
    "json of a string": ({"json": b'"data_type"'}, "not a sample"),
    "json of null": ({"json": b"null"}, "not a sample"),
    "json not in UTF-8": ({"json": GOOD_JSON.replace(b'"t"', b'"\xff"')}, "not a sample"),
    "json without text": ({"json": b'{"data_type": "image_text", "width": 1, "height": 1}'}, "KeyError: 'text'"),
    "json too deep": ({"json": b"[" * 100_000}, "not a sample"),
    "unknown member": ({"json": GOOD_JSON, "mp4": b""}, "a.mp4: not a member of this schema"),
    "a pickle": ({"json": GOOD_JSON, "pyd": pickle.dumps(1)}, "a.pyd: not a member of this schema"),
    "a further image without the first": ({"json": GOOD_JSON, "1.png": b""}, "a.1.png: not a member of this schema"),
    "a further image out of turn": ({"json": GOOD_JSON, "jpg": b"", "2.png": b""}, "a.2.png: not a member of this schema"),
    "an image of an odd number": ({"json": GOOD_JSON, "jpg": b"", "01.png": b""}, "a.01.png: not a member of this schema"),
    "two images": ({"json": GOOD_JSON, "jpg": b"", "png": b""}, "a.png: not a member of this schema"),
    "codes that are no npy": ({"json": GOOD_JSON, "vqcode_512.npy": b"x" * 200}, "a.vqcode_512.npy: not an npy file"),
}


@pytest.mark.parametrize(("members", "problem"), BAD_MEMBERS.values(), ids=BAD_MEMBERS)
def test_members_that_make_no_sample_are_refused(members: dict[str, bytes], problem: str) -> None:
    with pytest.raises(FormatError, match=problem):
        sample_from_members("a", members)


@given(st.binary(max_size=200))
@tries(100)
def test_random_json_and_npy_bytes_are_a_format_error(data: bytes) -> None:
    with pytest.raises(FormatError):
        sample_from_members("a", {"json": data})
    with pytest.raises(FormatError):
        sample_from_members("a", {"json": GOOD_JSON, "vqcode_512.npy": data})


def npy(descr: str, shape: str, data: bytes = b"", *, fortran: str = "False", version: bytes = b"\x01\x00") -> bytes:
    return npy_with(f"{{'descr': {descr}, 'fortran_order': {fortran}, 'shape': {shape}, }}\n".encode(), data, version)


def npy_with(head: bytes, data: bytes = b"", version: bytes = b"\x01\x00") -> bytes:
    return b"\x93NUMPY" + version + len(head).to_bytes(2 if version[0] == 1 else 4, "little") + head + data


BAD_NPY: dict[str, tuple[bytes, str]] = {
    "nothing": (b"", "not an npy file"),
    "only magic": (b"\x93NUMPY", "not an npy file"),
    "version 4": (npy("'<u2'", "(1,)", b"xx", version=b"\x04\x00"), "not an npy file"),
    "version 1.1": (npy("'<u2'", "(1,)", b"xx", version=b"\x01\x01"), "not an npy file"),
    "big-endian": (npy("'>u2'", "(1,)", b"xx"), "little-endian"),
    "signed": (npy("'<i2'", "(1,)", b"xx"), "'<i2'"),
    "float": (npy("'<f4'", "(1,)", b"xxxx"), "'<f4'"),
    "bool": (npy("'|b1'", "(1,)", b"x"), "'|b1'"),
    "text": (npy("'<U1'", "(1,)", b"xxxx"), "'<U1'"),
    "native order": (npy("'=u2'", "(1,)", b"xx"), "'=u2'"),
    "no dtype": (npy("''", "(1,)", b"xx"), "got ''"),
    "object": (npy("'|O'", "(1,)", pickle.dumps([1])), r"'\|O'"),
    "structure": (npy("[('a', '<u2')]", "(1,)", b"xx"), "unreadable npy header"),
    "subarray": (npy("('<u2', (2,))", "(1,)", b"xxxx"), "unreadable npy header"),
    "Fortran order": (npy("'<u2'", "(2, 2)", b"x" * 8, fortran="True"), "fortran_order=True"),
    "order is a number": (npy("'<u2'", "(2, 2)", b"x" * 8, fortran="0"), "unreadable npy header"),
    "too few bytes": (npy("'<u2'", "(2, 2)", b"x" * 7), r"7 bytes of data, its header <u2 \(2, 2\) needs 8"),
    "too many bytes": (npy("'<u2'", "(2, 2)", b"x" * 9), "9 bytes of data"),
    "negative shape": (npy("'<u2'", "(-1,)", b"xx"), "unreadable npy header"),
    "twice negative shape": (npy("'<u2'", "(-1, -2)", b"xxxx"), "unreadable npy header"),
    "shape of floats": (npy("'<u2'", "(1.0,)", b"xx"), "unreadable npy header"),
    "shape of booleans": (npy("'<u2'", "(True,)", b"xx"), "unreadable npy header"),
    "shape is a list": (npy("'<u2'", "[1]", b"xx"), "unreadable npy header"),
    "shape of old Python": (npy("'<u2'", "(1L,)", b"xx"), "unreadable npy header"),
    "huge shape": (npy("'<u2'", "(999999999999, 999999999999)", b"xx"), "2 bytes of data"),
    "huge and empty": (npy("'<u2'", "(0, 999999999999999999)"), "0 bytes of data"),
    "shape beyond 64 bits": (npy("'<u2'", "(0, 1180591620717411303424)"), "unreadable npy header"),
    "33 dimensions": (npy("'<u2'", "(" + "1, " * 33 + ")", b"xx"), "unreadable npy header"),
    "shape that multiplies": (npy("'<u2'", "(1,) * 50", b"xx"), "unreadable npy header"),
    "header that is cut": (npy("'<u2'", "(1,)", b"")[:30], "unreadable npy header"),
    "header of 5000 bytes": (npy_with(b" " * 5000), "an npy header of 5000"),
    "header of 4 GiB": (b"\x93NUMPY\x02\x00\xff\xff\xff\xff" + b"x" * 100, "an npy header of 4294967295 bytes"),
    "header of nothing": (npy_with(b""), "not an npy file|unreadable npy header"),
    "header of code": (npy_with(b"__import__('os').abort()"), "unreadable npy header"),
    "header of brackets": (npy_with(b"[" * 4000), "unreadable npy header"),
    "header of signs": (npy_with(b"-" * 4000 + b"1"), "unreadable npy header"),
    "header of braces": (npy_with(b"{'descr': '" + b"}{" * 1900), "unreadable npy header"),
    "header of keys": (npy_with(b"{'shape': (1, " * 280), "unreadable npy header"),
    "header not in ASCII": (npy("'\xff'", "(1,)", b"xx"), "little-endian"),
}


@pytest.mark.parametrize(("data", "problem"), BAD_NPY.values(), ids=BAD_NPY)
def test_a_hostile_npy_is_refused(data: bytes, problem: str) -> None:
    with pytest.raises(FormatError, match=f"^a.npy: .*({problem})"):
        parse_npy(data, "a.npy")


def test_a_pickle_in_an_npy_is_never_run(tmp_path: Path) -> None:
    witness = tmp_path / "witness"

    class Hostile:
        def __reduce__(self) -> tuple[Any, ...]:
            return Path.touch, (witness,)

    out = io.BytesIO()
    np.save(out, np.array([Hostile()], dtype=object), allow_pickle=True)
    hostile = out.getvalue()
    for data in (hostile, hostile.replace(b"'|O'", b"'<u2'"), npy("'|O'", "()", pickle.dumps(Hostile()))):
        with pytest.raises(FormatError):
            parse_npy(data, "a.npy")
        archive = tar_of({"a.json": GOOD_JSON, "a.vqcode_512.npy": data})
        with pytest.raises(FormatError):
            read_back(archive)
    assert not witness.exists()
    np.load(io.BytesIO(hostile), allow_pickle=True)
    assert witness.exists()  # it would have worked


@given(st.lists(st.tuples(st.integers(0, 200), st.integers(0, 255)), min_size=1, max_size=4))
@tries(300)
def test_a_mutated_npy_is_an_array_of_codes_or_refused(changes: list[tuple[int, int]]) -> None:
    bad = bytearray(npy_bytes(np.arange(40, dtype="<u2").reshape(5, 8)))
    for at, value in changes:
        bad[at % len(bad)] = value
    try:
        found = parse_npy(bytes(bad), "a.npy")
    except FormatError:
        return
    assert found.dtype.kind == "u"


@pytest.mark.parametrize("version", [b"\x01\x00", b"\x02\x00", b"\x03\x00"])
@pytest.mark.parametrize("dtype", ["u1", "<u2", "<u4", "<u8"])
@pytest.mark.parametrize("shape", [(), (0,), (3,), (2, 3), (2, 0, 3), (1,) * 32])
def test_npy_files_of_numpy_are_read_in_every_version(version: bytes, dtype: str, shape: tuple[int, ...]) -> None:
    array = np.arange(np.prod(shape, dtype=int)).astype(dtype).reshape(shape)
    out = io.BytesIO()
    np.lib.format.write_array(out, array, version=(version[0], version[1]))
    found = parse_npy(out.getvalue(), "a.npy")
    assert (found.dtype, found.shape) == (array.dtype, shape)
    assert np.array_equal(found, array)


def test_an_npy_of_another_writer_is_read() -> None:
    data = npy_with(b"{'shape':(2, 1),'fortran_order': False,'descr':'<u2'}   ", b"\x01\x00\x02\x00")
    assert parse_npy(data, "a.npy").tolist() == [[1], [2]]


def test_an_array_of_a_writable_buffer_is_read_only() -> None:
    assert not parse_npy(memoryview(bytearray(npy_bytes(GRID_HW))), "a.npy").flags.writeable


# --- Grouping ------------------------------------------------------------------------------------------------------


def tar_of(members: dict[str, bytes]) -> bytes:
    return b"".join(header(name, len(data)) + data + padding(len(data)) for name, data in members.items()) + END


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("a.json", ("a", "json")),
        ("a.vqcode_512.npy", ("a", "vqcode_512.npy")),
        ("./a.json", ("a", "json")),
        ("x/y/a.b.c", ("x/y/a", "b.c")),
        ("x.y/a.json", ("x.y/a", "json")),
        ("/a.json", ("/a", "json")),
        ("a..json", ("a", ".json")),
    ],
)
def test_a_name_is_cut_at_the_first_dot_behind_the_last_slash_as_webdataset_does(name: str, expected: tuple[str, str]) -> None:
    import webdataset.tariterators as wds

    assert split_name(name, "here") == expected
    assert wds.base_plus_ext(name.removeprefix("./")) == expected


@pytest.mark.parametrize("name", ["", "a", "a.", ".json", "x/.json", "x.y/a", "folder/", "./", "._a.json"])
def test_a_name_without_key_or_suffix_is_refused(name: str) -> None:
    with pytest.raises(FormatError, match=r"^here: .* is not KEY\.SUFFIX"):
        split_name(name, "here")
    assert is_stray(name)


@pytest.mark.parametrize("suffix", ["__key__", "__url__", "__source__", "__local_path__", "____"])
def test_a_member_that_would_replace_what_a_sample_says_of_itself_is_refused(suffix: str) -> None:
    with pytest.raises(FormatError, match=f"^here: .*would replace the sample's own {suffix}"):
        split_name(f"a.{suffix}", "here")
    assert split_name("__a__.__b.json", "here") == ("__a__", "__b.json")


OUTCOMES: dict[str, int | str] = {
    "good.tar": 6,
    "empty_archive.tar": 0,
    "gnu_long_names.tar": 6,
    "empty_members.tar": 6,
    "native_webdataset_compressed.tar": 3,
    "dots_in_keys.tar": 2,  # img.v1.000000.jpg and img.v1.000001.jpg are members of img: as in webdataset
    "duplicate_adjacent.tar": "'000000.txt' at byte 43520 stands twice in one sample",
    "duplicate_names.tar": "'000000.jpg' at byte 55296 comes after other samples",
    "interleaved_keys.tar": "'000000.txt' at byte 144384 comes after other samples",
    "dot_slash_and_hidden.tar": 6,
    "native_libarchive_test_read_format_tar_mac_metadata_1.tar": 0,
}


@pytest.mark.skipif(not TARS.is_dir(), reason=f"the malformed archives are not at {'/'.join(TARS.parts[-4:])}")
@pytest.mark.parametrize("name", OUTCOMES)
def test_members_of_real_odd_archives_are_grouped_or_refused(name: str) -> None:
    expected = OUTCOMES[name]
    members = read_members((TARS / name).read_bytes())
    if isinstance(expected, str):
        with pytest.raises(FormatError, match=expected):
            list(group_samples(members))
        return
    found = list(group_samples(members))
    assert len(found) == expected
    assert sum(len(stored.members) for stored in found) == sum(not is_stray(member.name) for member in members)


@pytest.mark.parametrize("order", ["aba", "abcab"])
def test_a_key_that_comes_back_is_refused(order: str) -> None:
    def members() -> Iterator[tuple[str, bytes]]:
        for n, key in enumerate(order):
            yield f"{key}.m{n}", b""

    with pytest.raises(FormatError, match=r"'a.m\d' at byte \d+ comes after other samples than the rest of 'a'"):
        list(group_samples(read_members(tar_of(dict(members())))))


def test_encoded_members_are_what_the_tar_holds() -> None:
    sample = three_samples()[0]
    (stored, *_) = group_samples(read_members(build([sample])))
    assert [(suffix, bytes(member.payload)) for suffix, member in stored.members.items()] == encode_members(sample)


# ---- Forms ----

RECORD = {"data_type": "image_text", "text": "a caption", "length": 9, "width": None, "height": None}
FIELDS: dict[str, list[Any]] = {
    "data_type": ["text_pretrain", "visual_sft", "interleaved", "x", None, ["image_text"]],
    "text": ["", "another", "an <image>", None, 1],
    "width": [1, True, 1.0, 0, -1, [1]],
    "height": [512, "512"],
    "conversations": [None, [], [{"from": "human", "value": "?"}], ["?"]],
    "grids": [None, {}, {"vqcode_512": [[4, 4]]}, 1],
    "jpg": ["a field, and no member"],
    "id": [1],
}
GRID = npy_bytes(np.zeros((4, 4), "<u2"))


def npy_with_header(version: int, text: bytes) -> bytes:
    return b"\x93NUMPY" + bytes([version, 0]) + len(text).to_bytes(2 if version == 1 else 4, "little") + text + bytes(32)


BEGIN = b"{'descr': '<u2', 'fortran_order': False, "
PAYLOADS: list[tuple[str, bytes]] = [
    *(
        ("vqcode_512.npy", npy_bytes(np.zeros(shape, dtype)))
        for shape in ((4, 4), (2, 8), (16,), (0, 4))
        for dtype in ("<u2", ">u2")
    ),
    ("vqcode_512.npy", npy_bytes(np.zeros((4, 2), "<u4"))),
    ("vqcode_512.npy", npy_bytes(np.ones((4, 4), "<u2"))),
    ("vqcode_512.npy", GRID[:-1]),
    ("vqcode_512.npy", GRID[:100]),
    ("vqcode_512.npy", b""),
    *(("vqcode_512.npy", npy_with_header(1, BEGIN + b" " * 100 + shape)) for shape in (b"'shape': (4, 4)}", b"'shape': (16, )}")),
    *(("vqcode_512.npy", npy_with_header(2, (BEGIN + b"'shape': (4, 4)").ljust(117) + end)) for end in (b"}", b"x")),
    ("other.npy", GRID),
    ("jpg", b""),
    ("jpg", b"x"),
    ("png", b"x"),
    ("1.jpg", b"x"),
    ("txt", b"x"),
]


def samples_that_differ_a_little() -> Iterator[dict[str, bytes]]:
    changes = [(name, value) for name, values in FIELDS.items() for value in values]
    pairs = itertools.product(changes, changes)
    records = [RECORD, *(RECORD | {name: value} for name, value in changes), *(RECORD | dict(pair) for pair in pairs)]
    members = [[], *([payload] for payload in PAYLOADS), [("vqcode_512.npy", GRID), ("jpg", b"x")]]
    for record, others in itertools.product(records, members):
        own = [("json", json.dumps(record).encode())]
        yield dict(own + others)
        yield dict(others + own)


def test_samples_of_one_form_are_all_valid_or_none() -> None:
    verdicts: dict[Any, int | None] = {}
    for members in samples_that_differ_a_little():
        form, text = form_of(members) or (None, "")
        if form is None:
            continue
        try:
            sample = sample_from_members("key", members)
            validate(sample)
        except FormatError:
            verdict = None
        else:
            verdict = sample.num_codes
            assert text == sample.text
        assert verdicts.setdefault(form, verdict) == verdict, members
    assert len(set(verdicts.values())) > 2


def test_usual_samples_have_a_form_and_share_it() -> None:
    forms = {form_of(dict(encode_members(image_sample(number)))) for number in range(5)}
    assert len({form for form, _ in forms}) == 1  # type: ignore[misc]
    assert form_of({"txt": b"a caption"}) is None
