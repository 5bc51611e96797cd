"""The manifest: round trip, what its fingerprint stands for, and manifests that were edited, damaged or made to harm."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from properties import tries

from wds_tools.errors import FormatError
from wds_tools.format.manifest import Manifest, ShardInfo, parse_manifest, serialize_manifest
from wds_tools.format.schema import ANY_MEMBERS


def row(number: int, samples: int = 5, **changes: Any) -> ShardInfo:
    fields: dict[str, Any] = {
        "name": f"shard-{number:06d}-0000.tar",
        "samples": samples,
        "bytes": 4096 * samples + 1024,
        "xxh128": f"{number:032x}",
        "members": ("json", "vqcode_512.npy"),
        "data_types": {"image_text": samples} if samples else {},
        "text_chars": 100,
        "num_codes": 1024 * samples,
    }
    return ShardInfo(**{**fields, **changes})


MANIFEST = Manifest(
    shards=(row(0), row(1, 3, data_types={"image_text": 1, "text_pretrain": 2})),
    inputs=11,
    rejects={"truncated_image": 2, "bad_json": 1},
    codes={"vqcode_512": {"tokenizer": "tiny", "codebook_size": 8192, "stride": 16}},
    source={"command": "convert pairs", "plan": {"seed": None, "files": ["a.jsonl"]}},
)


def edited(change: Callable[[Any], Any]) -> bytes:
    """The manifest's bytes after a change to its JSON."""
    record = json.loads(serialize_manifest(MANIFEST))
    change(record)
    return json.dumps(record).encode()


# --- Round trip and fingerprint ------------------------------------------------------------------------------------


def test_a_manifest_survives() -> None:
    data = serialize_manifest(MANIFEST)
    found = parse_manifest(data)
    assert found == MANIFEST
    assert serialize_manifest(found) == data
    assert (found.samples, found.bytes) == (8, 4096 * 8 + 2048)
    assert found.data_types == {"image_text": 6, "text_pretrain": 2}


NAMES = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
ROWS = st.builds(
    row,
    st.integers(0, 10**6),
    st.integers(0, 10**9),
    members=st.lists(NAMES, max_size=3).map(tuple),
    text_chars=st.integers(0, (1 << 53) - 1),
    xxh128=st.text("0123456789abcdef", min_size=32, max_size=32),
)


@given(
    st.lists(ROWS, max_size=5, unique_by=lambda shard: shard.name),
    st.dictionaries(NAMES, st.integers(0, 10**9), max_size=3),
    st.dictionaries(NAMES, st.dictionaries(NAMES, st.integers(0, 9) | NAMES | st.none(), max_size=3), max_size=2),
)
@tries(100)
def test_any_manifest_survives(shards: list[ShardInfo], rejects: dict[str, int], codes: dict[str, Any]) -> None:
    inputs = sum(shard.samples for shard in shards) + sum(rejects.values())
    manifest = Manifest(shards=tuple(shards), inputs=inputs, rejects=rejects, codes=codes, source={"of": codes})
    assert parse_manifest(serialize_manifest(manifest)) == manifest


def test_an_empty_dataset_has_a_manifest() -> None:
    manifest = Manifest(shards=(), inputs=0)
    assert parse_manifest(serialize_manifest(manifest)) == manifest


def test_a_shard_of_unknown_data_types_is_accepted() -> None:
    manifest = Manifest(shards=(row(0, data_types={}),), inputs=5)
    assert parse_manifest(serialize_manifest(manifest)) == manifest


def test_a_manifest_of_any_members_survives_and_has_a_fingerprint_of_its_own() -> None:
    rows = tuple(row(n, data_types={}, text_chars=0, num_codes=0, members=("jpg", f"{n}.txt")) for n in range(2))
    ours = Manifest(shards=rows, inputs=10, source={"command": "index"})
    any_members = replace(ours, schema_version=ANY_MEMBERS)
    assert parse_manifest(serialize_manifest(any_members)) == any_members
    assert any_members.fingerprint() != ours.fingerprint()
    assert any_members.members == ("jpg", "0.txt", "1.txt")
    assert any_members.is_indexed
    assert not MANIFEST.is_indexed


def test_the_fingerprint_is_pinned() -> None:
    assert MANIFEST.fingerprint() == "sha256:b2098b2187180c70c80c05ffcd277673259620aaf990d7ecf049162ab04a799a"


@pytest.mark.parametrize(
    "change",
    [
        {"source": {}},
        {"codes": {}},
        {"rejects": {}, "inputs": 8},
        {"shards": (row(0, members=("json",), text_chars=1, num_codes=1, bytes=1, data_types={}), MANIFEST.shards[1])},
    ],
    ids=["source", "codes", "rejects", "what follows from the bytes"],
)
def test_the_fingerprint_ignores_provenance(change: dict[str, Any]) -> None:
    assert replace(MANIFEST, **change).fingerprint() == MANIFEST.fingerprint()


@pytest.mark.parametrize(
    "change",
    [
        {"shards": MANIFEST.shards[::-1]},
        {"shards": MANIFEST.shards[:1]},
        {"shards": (row(0, name="other.tar"), MANIFEST.shards[1])},
        {"shards": (row(0, samples=6), MANIFEST.shards[1])},
        {"shards": (row(0, xxh128="f" * 32), MANIFEST.shards[1])},
        {"schema_version": 3},
    ],
    ids=["order", "number", "name", "samples", "hash", "schema"],
)
def test_the_fingerprint_depends_on_what_is_trained_on(change: dict[str, Any]) -> None:
    assert replace(MANIFEST, **change).fingerprint() != MANIFEST.fingerprint()


# --- Manifests that contradict themselves --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("samples", 9),
        ("bytes", 1),
        ("data_types", {"image_text": 8}),
        ("fingerprint", "sha256:" + "0" * 64),
    ],
)
def test_a_stated_total_that_is_not_the_sum_is_refused(key: str, value: Any) -> None:
    with pytest.raises(FormatError, match=f"^m.json: states {key} .*it was edited or damaged"):
        parse_manifest(edited(lambda record: record.update({key: value})), "m.json")


@pytest.mark.parametrize(
    "change",
    [
        lambda record: record["shards"].pop(),
        lambda record: record["shards"].reverse(),
        lambda record: record["shards"][0].update(name="other.tar"),
        lambda record: record["shards"][0].update(xxh128="f" * 32),
        lambda record: record["shards"][0].update(samples=6, data_types={"image_text": 6}),
        lambda record: record["shards"][0].update(bytes=5 * 4096),
    ],
    ids=["shard gone", "order", "name", "hash", "samples", "bytes"],
)
def test_a_tampered_shard_row_is_refused(change: Callable[[Any], Any]) -> None:
    with pytest.raises(FormatError, match=r"it was edited or damaged|records are unaccounted for"):
        parse_manifest(edited(change))


@pytest.mark.parametrize("inputs", [10, 12, 8, 0])
def test_inputs_are_samples_and_rejects(inputs: int) -> None:
    with pytest.raises(FormatError, match=rf"{inputs} inputs are not 8 samples \+ 3 rejects: {inputs - 11} records"):
        serialize_manifest(replace(MANIFEST, inputs=inputs))
    with pytest.raises(FormatError, match=f"{inputs - 11} records are unaccounted for"):
        parse_manifest(edited(lambda record: record.update(inputs=inputs)))


# --- Its hash ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("every", [pytest.param(1, marks=pytest.mark.slow), 9])
def test_every_bit_of_a_manifest_is_protected(every: int) -> None:
    """With 9, nearly every byte is tried, each with another of its bits."""
    data = serialize_manifest(MANIFEST)
    for at in range(0, 8 * len(data), every):
        flipped = bytearray(data)
        flipped[at // 8] ^= 1 << at % 8
        with pytest.raises(FormatError):
            parse_manifest(bytes(flipped))


def test_the_hash_is_that_of_the_file_with_zeros_in_its_place() -> None:
    data = serialize_manifest(MANIFEST)
    stated = json.loads(data)["manifest_hash"].removeprefix("sha256:")
    assert hashlib.sha256(data.replace(stated.encode(), b"0" * 64)).hexdigest() == stated


def test_a_manifest_without_hashes_is_read_and_packed_as_it_was() -> None:
    old = serialize_manifest(replace(MANIFEST, rejects_hash=None))
    assert b'_hash"' not in old.replace(b"weights_hash", b"")
    found = parse_manifest(old)
    assert found.rejects_hash is None
    assert serialize_manifest(found) == old


# --- Manifests that are something else -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("data", "problem"),
    [
        (b"", "not a manifest"),
        (b"{}", "format is missing"),
        (b"[]", "not a manifest"),
        (b"null", "not a manifest"),
        (b'"x"', "not a manifest"),
        (b"\xff", "not a manifest"),
        (b"[" * 100_000, "not a manifest"),
        (edited(lambda record: record.update(format="parquet")), "format is 'parquet', expected 'wds-tools'"),
        (edited(lambda record: record.update(schema_version=3)), "schema_version is 3, expected 0 or 1 or 2"),
        (edited(lambda record: record.update(schema_version=None)), "schema_version is None"),
        (serialize_manifest(MANIFEST)[:-3], "not a manifest"),
    ],
)
def test_what_is_no_manifest_of_this_release_is_refused(data: bytes, problem: str) -> None:
    with pytest.raises(FormatError, match=f"^manifest.json: .*{problem}"):
        parse_manifest(data)


@pytest.mark.parametrize("key", json.loads(serialize_manifest(MANIFEST)))
def test_a_missing_field_is_refused(key: str) -> None:
    with pytest.raises(FormatError, match="has one of manifest_hash and rejects_hash" if "_hash" in key else f"{key} is missing"):
        parse_manifest(edited(lambda record: record.pop(key)))


@pytest.mark.parametrize("key", json.loads(serialize_manifest(MANIFEST))["shards"][0])
def test_a_missing_field_of_a_shard_is_refused(key: str) -> None:
    with pytest.raises(FormatError, match=rf"not a manifest .*shards\[0\]\.{key} is missing"):
        parse_manifest(edited(lambda record: record["shards"][0].pop(key)))


def test_fields_that_a_later_release_adds_are_passed_over() -> None:
    record = json.loads(serialize_manifest(replace(MANIFEST, rejects_hash=None)))
    record["added"] = record["shards"][0]["added"] = 1
    assert parse_manifest(json.dumps(record).encode()) == replace(MANIFEST, rejects_hash=None)


BAD_NAMES = [
    "",
    ".",
    "..",
    "../shard.tar",
    "a/../../shard.tar",
    "a/./shard.tar",
    "/etc/passwd",
    "a//b.tar",
    "a/",
    "s3://bucket/shard.tar",
    "..\\shard.tar",
    "C:\\shard.tar",
    "a\0.tar",
    "a\n.tar",
    "a.tar 5 " + "0" * 64 + "\nb.tar",
    "a\x1b[31m.tar",
    "a\u202egpj.tar",
]


@pytest.mark.parametrize("name", BAD_NAMES, ids=repr)
def test_a_shard_name_that_leads_elsewhere_is_refused(name: Any) -> None:
    with pytest.raises(FormatError, match="is not a plain relative path"):
        parse_manifest(edited(lambda record: record["shards"][0].update(name=name)))
    with pytest.raises(FormatError, match="is not a plain relative path"):
        serialize_manifest(replace(MANIFEST, shards=(row(0, name=name), MANIFEST.shards[1])))


@pytest.mark.parametrize("name", ["a.tar", "train/a.tar", "..a.tar", "a b.tar", "日本.tar", ".hidden.tar"])
def test_a_plain_shard_name_is_accepted(name: str) -> None:
    manifest = Manifest(shards=(row(0, name=name),), inputs=5)
    assert parse_manifest(serialize_manifest(manifest)) == manifest


def test_a_shard_named_twice_is_refused() -> None:
    with pytest.raises(FormatError, match=r"names the shard shard-000000-0000\.tar more than once"):
        serialize_manifest(Manifest(shards=(row(0), row(0)), inputs=10))
    with pytest.raises(FormatError, match="more than once"):
        parse_manifest(edited(lambda record: record["shards"][1].update(name="shard-000000-0000.tar")))


NO_COUNTS = [-1, 1.0, "5", True, None, [], {}, 1 << 53, 1 << 70]


@pytest.mark.parametrize("key", ["samples", "bytes", "text_chars", "num_codes"])
@pytest.mark.parametrize("value", NO_COUNTS, ids=repr)
def test_a_count_of_a_shard_that_is_none_is_refused(key: str, value: Any) -> None:
    with pytest.raises(FormatError, match=rf"shards\[0\]\.{key} is .*, expected a whole number from 0 to \d+"):
        parse_manifest(edited(lambda record: record["shards"][0].update({key: value})))


HOSTILE: dict[str, Callable[[Any], Any]] = {
    "samples are text": lambda record: record.update(samples="8"),
    "data_types is null": lambda record: record.update(data_types=None),
    "fingerprint is null": lambda record: record.update(fingerprint=None),
    "a name is null": lambda record: record["shards"][0].update(name=None),
    "a name is a list": lambda record: record["shards"][0].update(name=["a.tar"]),
    "more samples than bytes hold": lambda record: record["shards"][0].update(samples=1 << 31, data_types={}),
    "a codebook that is text": lambda record: record["codes"]["vqcode_512"].update(codebook_size="8192"),
    "a codebook of nothing": lambda record: record["codes"]["vqcode_512"].update(codebook_size=0),
    "a codebook beyond uint32": lambda record: record["codes"]["vqcode_512"].update(codebook_size=1 << 33),
    "a plan that is text": lambda record: record["source"].update(plan="x"),
    "inputs that are text": lambda record: record["source"].update(inputs=["a.jsonl"]),
    "token rows without a length": lambda record: record["source"].update(rows={"vocabulary_size": 5, "text_size": 1}),
    "a source that is nested too deep": lambda record: record["source"].update(input=json.loads("[" * 200 + "]" * 200)),
    "shards is a number": lambda record: record.update(shards=1),
    "shards is an object": lambda record: record.update(shards={"a": 1}),
    "a shard is a string": lambda record: record["shards"].append("a.tar"),
    "a shard is null": lambda record: record["shards"].append(None),
    "members is a string": lambda record: record["shards"][0].update(members="json"),
    "members is null": lambda record: record["shards"][0].update(members=None),
    "members are numbers": lambda record: record["shards"][0].update(members=[1]),
    "data types is a list": lambda record: record["shards"][0].update(data_types=["image_text"]),
    "data types is null": lambda record: record["shards"][0].update(data_types=None),
    "data types are strings": lambda record: record["shards"][0].update(data_types={"image_text": "5"}),
    "data types below zero": lambda record: record["shards"][0].update(data_types={"a": 6, "b": -1}),
    "data types that do not add up": lambda record: record["shards"][0].update(data_types={"image_text": 4}),
    "a hash that is short": lambda record: record["shards"][0].update(xxh128="0" * 31),
    "a hash in capitals": lambda record: record["shards"][0].update(xxh128="A" * 32),
    "a hash with a line end": lambda record: record["shards"][0].update(xxh128="0" * 32 + "\n"),
    "a hash that is a number": lambda record: record["shards"][0].update(xxh128=0),
    "inputs below zero": lambda record: record.update(inputs=-1),
    "inputs is a string": lambda record: record.update(inputs="11"),
    "inputs is null": lambda record: record.update(inputs=None),
    "rejects is a list": lambda record: record.update(rejects=[3]),
    "rejects is a number": lambda record: record.update(rejects=3),
    "rejects below zero": lambda record: record.update(rejects={"a": 4, "b": -1}),
    "rejects are strings": lambda record: record.update(rejects={"a": "3"}),
    "rejects are null": lambda record: record.update(rejects={"a": None}),
    "codes is a list": lambda record: record.update(codes=[]),
    "codes are strings": lambda record: record.update(codes={"vqcode_512": "tiny"}),
    "source is a list": lambda record: record.update(source=[]),
    "source is null": lambda record: record.update(source=None),
}


def test_token_rows_without_their_facts_are_refused() -> None:
    with pytest.raises(FormatError, match=r"source \(rows\.length is 'many', expected a whole number from 1 to"):
        parse_manifest(
            edited(lambda record: record["source"].update(rows={"length": "many", "vocabulary_size": 9, "text_size": 5}))
        )


@pytest.mark.parametrize("change", HOSTILE.values(), ids=HOSTILE)
def test_values_of_a_wrong_kind_are_a_format_error(change: Callable[[Any], Any]) -> None:
    with pytest.raises(FormatError, match=r"^m\.json: "):
        parse_manifest(edited(change), "m.json")


@given(
    st.lists(st.sampled_from(["shards", "inputs", "rejects", "codes", "source", "samples", "bytes", "fingerprint"]), max_size=2),
    st.lists(st.sampled_from(["name", "samples", "bytes", "xxh128", "members", "data_types", "text_chars"]), max_size=2),
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=4),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
        max_leaves=4,
    ),
)
@tries(300)
def test_any_value_anywhere_is_read_or_a_format_error(keys: list[str], row_keys: list[str], value: Any) -> None:
    def change(record: Any) -> None:
        for key in row_keys:
            record["shards"][0][key] = value
        for key in keys:
            record[key] = value

    try:
        parse_manifest(edited(change))
    except FormatError:
        pass


@given(st.lists(st.tuples(st.integers(0, 3000), st.integers(0, 255)), min_size=1, max_size=4))
@tries(300)
def test_a_mutated_manifest_is_read_or_a_format_error(changes: list[tuple[int, int]]) -> None:
    bad = bytearray(serialize_manifest(MANIFEST))
    for at, value in changes:
        bad[at % len(bad)] = value
    try:
        parse_manifest(bytes(bad))
    except FormatError:
        pass
