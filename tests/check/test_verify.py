"""`verify` finds whatever differs from the manifest and names it; `index` brings a lost index back byte for byte."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
from commands import tree, wds_tools
from factory import CODEBOOK_SIZE, image_sample, make_dataset, text_sample
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from properties import tries

from wds_tools.check.verify import VerifyConfig, verify
from wds_tools.cli.main import main
from wds_tools.dataset.layout import OFFSETS
from wds_tools.dataset.output import Output, OutputSpec
from wds_tools.dataset.reader import read_manifest
from wds_tools.dataset.writer import ShardLimits, TaskWriter
from wds_tools.errors import FormatError, NotFound, Reject
from wds_tools.format.index import parse_index, serialize_index
from wds_tools.format.manifest import Manifest, parse_manifest, serialize_manifest
from wds_tools.format.offsets import hash_offsets
from wds_tools.format.schema import Sample
from wds_tools.jobs.index_tars import rebuild_indices
from wds_tools.storage import open_store
from wds_tools.terminal import counted

CODES = {"vqcode_512": {"codebook_size": CODEBOOK_SIZE, "tokenizer": "test", "precision": "fp32"}}


def problems(folder: Path, workers: int = 1) -> tuple[str, ...]:
    return verify(VerifyConfig(input=str(folder), quiet=True, workers=workers)).problems


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three shards of texts and codes, and two rejects."""
    folder = tmp_path_factory.mktemp("original") / "set"
    store = open_store(str(folder))
    output = Output(store, OutputSpec(num_tasks=1, source={}, codes=CODES))
    output.begin()
    with TaskWriter(store, 0, ShardLimits(samples=4)) as writer:
        for number in range(10):
            writer.add(text_sample(number) if number % 2 else image_sample(number))
        writer.reject(Reject("bad_json", "broken"), source="a.jsonl", line=3)
        writer.reject(Reject("empty_text", "nothing"), source="a.jsonl", line=4)
        writer.finish(12)
    output.finish(output.results())
    return folder


@pytest.fixture
def folder(original: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(original, tmp_path / "set"))


SHARD = "shard-000000-0001.tar"
INDEX = f"{SHARD}.index"


def change_byte(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


def change_manifest(folder: Path, change: Callable[[Manifest], Manifest]) -> None:
    """An edit that keeps the manifest's own sums and fingerprint right."""
    path = folder / "manifest.json"
    path.write_bytes(serialize_manifest(change(parse_manifest(path.read_bytes()))))


def change_row(**changes: Any) -> Callable[[Manifest], Manifest]:
    def change(manifest: Manifest) -> Manifest:
        rows = [replace(row, **changes) if row.name == SHARD else row for row in manifest.shards]
        samples = sum(row.samples for row in rows)
        return replace(manifest, shards=tuple(rows), inputs=samples + sum(manifest.rejects.values()))

    return change


@pytest.mark.parametrize("workers", [1, 2])
def test_a_good_set_has_no_problems(original: Path, workers: int) -> None:
    assert problems(original, workers) == ()


def test_an_empty_set_has_no_problems(tmp_path: Path) -> None:
    make_dataset(tmp_path / "set", [])
    assert problems(tmp_path / "set") == ()


FEWER = change_row(samples=3, data_types={"image_text": 3})
DAMAGE: Mapping[str, tuple[Callable[[Path], object], str]] = {
    "a flipped byte in a payload": (lambda f: change_byte(f / SHARD, 520), SHARD),
    "a flipped byte in a header": (lambda f: change_byte(f / SHARD, 5), SHARD),
    "a flipped byte in padding": (lambda f: change_byte(f / SHARD, 1020), SHARD),
    "a flipped byte in the end marker": (lambda f: change_byte(f / SHARD, -3), SHARD),
    "a truncated shard": (lambda f: (f / SHARD).write_bytes((f / SHARD).read_bytes()[:1500]), SHARD),
    "a shard cut between members": (lambda f: (f / SHARD).write_bytes((f / SHARD).read_bytes()[:1024]), SHARD),
    "an empty shard": (lambda f: (f / SHARD).write_bytes(b""), SHARD),
    "bytes behind a shard": (lambda f: (f / SHARD).write_bytes((f / SHARD).read_bytes() + b"\0" * 512), SHARD),
    "a missing shard": (lambda f: (f / SHARD).unlink(), SHARD),
    "two shards exchanged": (lambda f: shutil.copy(f / "shard-000000-0000.tar", f / SHARD), SHARD),
    "a missing index": (lambda f: (f / INDEX).unlink(), INDEX),
    "a stale index": (lambda f: shutil.copy(f / "shard-000000-0000.tar.index", f / INDEX), f"{INDEX}: the index is stale"),
    "a truncated index": (lambda f: (f / INDEX).write_bytes((f / INDEX).read_bytes()[:-5]), INDEX),
    "an empty index": (lambda f: (f / INDEX).write_bytes(b""), INDEX),
    "an edited index": (lambda f: change_index(f), f"{INDEX}: differs from an index rebuilt"),
    "missing offsets": (lambda f: (f / OFFSETS).unlink(), OFFSETS),
    "a flipped byte in the offsets": (lambda f: change_byte(f / OFFSETS, 130), f"{OFFSETS}: its hash is another"),
    "offsets of other tars": (lambda f: change_offsets(f), f"{OFFSETS}: samples begin elsewhere"),
    "an extra file": (lambda f: (f / "notes.txt").write_text("hi"), "notes.txt: not in the manifest"),
    "an extra shard": (lambda f: shutil.copy(f / SHARD, f / "shard-000009-0000.tar"), "shard-000009-0000.tar: not in"),
    "a working file": (lambda f: ((f / "_work").mkdir(), (f / "_work/plan.json").write_text("{}")), "_work/plan.json: not in"),
    "missing rejects": (lambda f: shutil.rmtree(f / "rejects"), "rejects/ lists {}"),
    "a reject too few": (lambda f: cut_rejects(f), "rejects/ lists {'bad_json': 1}"),
    "broken rejects": (lambda f: (f / "rejects/task-000000.jsonl").write_text("["), "rejects/task-000000.jsonl: not a list"),
    "a wrong hash": (lambda f: change_manifest(f, change_row(xxh128="0" * 32)), f"{SHARD}: xxh128 is"),
    "a wrong size": (lambda f: change_manifest(f, change_row(bytes=51_200)), f"{SHARD}: bytes is"),
    "a wrong number of samples": (
        lambda f: change_manifest(f, change_row(samples=3, data_types={"image_text": 3})),
        f"{SHARD}: samples is 4",
    ),
    "wrong data types": (lambda f: change_manifest(f, change_row(data_types={"text_pretrain": 4})), f"{SHARD}: data_types is"),
    "a wrong number of characters": (lambda f: change_manifest(f, change_row(text_chars=1)), f"{SHARD}: text_chars is"),
    "a wrong number of codes": (lambda f: change_manifest(f, change_row(num_codes=1)), f"{SHARD}: num_codes is 32"),
    "wrong members": (lambda f: change_manifest(f, change_row(members=("json",))), f"{SHARD}: members is"),
}


def change_index(folder: Path) -> None:
    index = parse_index((folder / INDEX).read_bytes())
    (folder / INDEX).write_bytes(serialize_index(replace(index, text_chars=index.text_chars + 1)))


def change_offsets(folder: Path) -> None:
    change_byte(folder / OFFSETS, -1)
    made = hash_offsets((folder / OFFSETS).read_bytes())
    change_manifest(folder, lambda manifest: replace(manifest, offsets_hash=made))


def cut_rejects(folder: Path) -> None:
    path = folder / "rejects/task-000000.jsonl"
    path.write_bytes(path.read_bytes().splitlines(keepends=True)[0])


@pytest.mark.parametrize("what", DAMAGE)
def test_damage_is_found_and_named(folder: Path, what: str, capsys: pytest.CaptureFixture[str]) -> None:
    damage, name = DAMAGE[what]
    damage(folder)
    found = problems(folder)
    assert any(name in problem for problem in found), found
    assert len(found) <= 5, found
    assert main(["verify", str(folder), "--quiet"]) == 1
    assert f"verify: {counted(len(found), 'problem')}" in capsys.readouterr().out


QUICK = ("a truncated shard", "a stale index", "a reject too few")


@pytest.mark.parametrize("what", [*QUICK, *(pytest.param(what, marks=pytest.mark.slow) for what in DAMAGE if what not in QUICK)])
def test_workers_find_the_same_damage(folder: Path, what: str) -> None:
    DAMAGE[what][0](folder)
    assert problems(folder, workers=2) == problems(folder)


def test_a_problem_of_one_shard_hides_none_of_another(folder: Path) -> None:
    (folder / "shard-000000-0000.tar").unlink()
    change_byte(folder / "shard-000000-0002.tar", 520)
    (folder / INDEX).unlink()
    text = "\n".join(problems(folder))
    for name in ("shard-000000-0000.tar", "shard-000000-0002.tar", INDEX):
        assert name in text


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("samples", 11),
        ("inputs", 11),
        ("bytes", 1),
        ("fingerprint", "sha256:0"),
        ("data_types", {}),
        ("format", "x"),
        ("schema_version", 99),
        ("shards", []),
        ("rejects", {}),
    ],
)
def test_an_edited_manifest_is_refused_and_named(
    folder: Path, key: str, value: object, capsys: pytest.CaptureFixture[str]
) -> None:
    path = folder / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_bytes()), key: value}))
    assert main(["verify", str(folder)]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert "manifest.json" in line


def test_a_manifest_without_hashes_is_noted(folder: Path) -> None:
    path = folder / "manifest.json"
    document = json.loads(path.read_bytes())
    del document["manifest_hash"], document["rejects_hash"]
    path.write_text(json.dumps(document))
    found = verify(VerifyConfig(input=str(folder), quiet=True))
    assert found.problems == ()
    assert [note.partition(" (")[0] for note in found.notes] == ["manifest.json has no manifest_hash and no rejects_hash"]


@pytest.mark.parametrize("data", [b"", b"[]", b"null", b"{", b'{"format": "wds-tools"}', b"\xff"])
def test_what_is_no_manifest_is_refused(folder: Path, data: bytes) -> None:
    (folder / "manifest.json").write_bytes(data)
    with pytest.raises(FormatError, match=r"manifest\.json"):
        problems(folder)


def test_no_manifest_is_no_dataset(folder: Path) -> None:
    (folder / "manifest.json").unlink()
    with pytest.raises(NotFound, match="--resume"):
        problems(folder)


@pytest.mark.parametrize("places", [[(0, 7), (1, 7)], [(0, 7), (1, 9), (2, 7)]])
def test_a_key_that_stands_twice_in_the_set_is_found(tmp_path: Path, places: list[tuple[int, int]]) -> None:
    store = open_store(str(tmp_path / "set"))
    output = Output(store, OutputSpec(num_tasks=len(places), source={}))
    output.begin()
    for task, number in places:
        with TaskWriter(store, task, ShardLimits()) as writer:
            writer.add(text_sample(number, f"from task {task}"))
            writer.finish(1)
    output.finish(output.results())
    (problem,) = problems(tmp_path / "set")
    last = places[-1][0]
    assert problem.startswith("1 keys stand more than once in the dataset")
    assert "shard-000000-0000.tar" in problem
    assert f"shard-00000{last}-0000.tar" in problem


def test_keys_that_only_do_not_ascend_are_fine(tmp_path: Path) -> None:
    make_dataset(tmp_path / "set", [text_sample(number) for number in (5, 3, 9, 1)], shard_samples=2)
    assert problems(tmp_path / "set") == ()


def test_a_code_outside_of_its_codebook_is_found_and_is_the_only_problem(tmp_path: Path) -> None:
    small = {"vqcode_512": {"codebook_size": 16}}
    sample = image_sample(0)
    codes_hw = sample.codes["vqcode_512"] % 16
    good = sample._replace(codes={"vqcode_512": codes_hw})
    make_dataset(tmp_path / "good", [good], codes=small)
    assert problems(tmp_path / "good") == ()
    bad_hw = codes_hw.copy()
    bad_hw[1, 2] = 16
    make_dataset(tmp_path / "bad", [sample._replace(codes={"vqcode_512": bad_hw})], codes=small)
    (problem,) = problems(tmp_path / "bad")
    assert "vqcode_512 holds the code 16; the codebook has 16 entries" in problem
    assert "shard-000000-0000.tar, byte 0: image-00000000" in problem


def test_codes_nobody_vouches_for_are_found(tmp_path: Path) -> None:
    make_dataset(tmp_path / "set", [image_sample(0)])
    (problem,) = problems(tmp_path / "set")
    assert "vqcode_512 has no provenance" in problem


def test_a_sample_that_breaks_the_schema_is_one_problem(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr("wds_tools.format.shard.validate", lambda *_: None)
        broken = Sample(key="b", data_type="poem", text="x")
        make_dataset(tmp_path / "set", [text_sample(1), broken, text_sample(2)])
    (problem,) = problems(tmp_path / "set")
    assert "data_type='poem'" in problem


@settings(tries(60), suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_no_single_byte_of_a_set_can_change_unnoticed(original: Path, tmp_path: Path, data: st.DataObject) -> None:
    folder = tmp_path / "copy"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(original, folder)
    path = folder / data.draw(st.sampled_from(["shard-000000-0000.tar", "shard-000000-0000.tar.index", SHARD, OFFSETS]))
    change_byte(path, data.draw(st.integers(0, path.stat().st_size - 1)))
    assert any(path.name in problem for problem in problems(folder))


# ---- index ----


@pytest.mark.slow
@pytest.mark.parametrize("harm", [lambda path: path.unlink(), lambda path: path.write_bytes(b"junk")])
def test_index_brings_a_lost_index_back_byte_for_byte(folder: Path, original: Path, harm: Callable[[Path], object]) -> None:
    harm(folder / INDEX)
    said = wds_tools("index", folder)
    assert said.stdout.startswith(f"index: rebuilt 3 index files of {folder}: 10 samples, ")
    assert tree(folder) == tree(original)


def test_index_never_blesses_a_damaged_shard(folder: Path) -> None:
    change_byte(folder / SHARD, 520)
    (folder / INDEX).unlink()
    with pytest.raises(FormatError, match=SHARD):
        rebuild_indices(open_store(str(folder)))
    assert not (folder / INDEX).exists()


def test_the_factory_and_the_reader_agree(folder: Path) -> None:
    manifest = read_manifest(open_store(str(folder)))
    assert (manifest.samples, manifest.inputs) == (10, 12)
    assert [asdict(row)["samples"] for row in manifest.shards] == [4, 4, 2]


# --- Every bit -----------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_flipped_bit_of_manifest_rejects_index_or_tar_is_found(tmp_path: Path) -> None:
    """Every bit of the rejects, and some of the others: of the manifest every bit is flipped in test_manifest.py."""
    folder = tmp_path / "set"
    store = open_store(str(folder))
    output = Output(store, OutputSpec(num_tasks=1, source={}))
    output.begin()
    with TaskWriter(store, 0, ShardLimits()) as writer:
        writer.add(text_sample(1))
        writer.reject(Reject("x", "y"), source="z", line=1)
        writer.finish(2)
    output.finish(output.results())
    assert problems(folder) == ()
    shard = "shard-000000-0000.tar"
    for name, step in (("manifest.json", 31), ("rejects/task-000000.jsonl", 1), (f"{shard}.index", 17), (shard, 199)):
        data = (folder / name).read_bytes()
        for bit in range(0, 8 * len(data), step):
            flipped = bytearray(data)
            flipped[bit // 8] ^= 1 << bit % 8
            (folder / name).write_bytes(flipped)
            try:
                assert problems(folder), f"bit {bit} of {name}"
            except FormatError:
                pass
        (folder / name).write_bytes(data)


def test_of_a_manifest_without_hashes_verify_says_that_nothing_protects_it(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    change_manifest(folder, lambda manifest: replace(manifest, rejects_hash=None))
    assert main(["verify", str(folder), "--quiet"]) == 0
    said = capsys.readouterr().out
    assert "NOTE   manifest.json has no manifest_hash and no rejects_hash" in said
    assert said.endswith("verify: all is well\n")


def test_the_hash_over_rejects_is_that_of_what_sha256sum_prints(folder: Path) -> None:
    printed = subprocess.run(["sha256sum", "rejects/task-000000.jsonl"], cwd=folder, capture_output=True, check=True).stdout
    assert read_manifest(open_store(str(folder))).rejects_hash == f"sha256:{hashlib.sha256(printed).hexdigest()}"
