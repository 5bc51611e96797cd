"""select: which samples are chosen, and that they come through as they are."""

from __future__ import annotations

import itertools
import json
import random
import shutil
import tarfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import webdataset as wds
from commands import disturb, read_rejects, read_samples, tree, wds_tools
from factory import image_sample, make_dataset, multi_sample, page_sample, talk_sample, text_sample
from hypothesis import given, settings
from hypothesis import strategies as st

from wds_tools import DatasetWriter, Manifest, Sample
from wds_tools.check.verify import VerifyConfig, verify
from wds_tools.cli.main import main
from wds_tools.dataset.layout import FIELDS
from wds_tools.dataset.reader import read_manifest
from wds_tools.errors import FormatError, StorageError, TooManyRejects, UsageError
from wds_tools.jobs.finalize import FinalizeConfig, finalize
from wds_tools.jobs.index_tars import index_tars
from wds_tools.select.choose import Judge
from wds_tools.select.choose import choose as decide
from wds_tools.select.fields import KEY, Fields, values_of
from wds_tools.select.select import SelectConfig, select
from wds_tools.storage import LocalStore, open_store

CODES = {"vqcode_512": {"tokenizer": "tiny", "codebook_size": 8192, "stride": 16}}
COUNTER = itertools.count()
SHARES = st.sampled_from([0.5, 0.9, 1.0])
CONDITIONS = ("score >= 3", "score < 7 and not odd", "odd or score > 8", "len(url) > 5", "num_codes == 16", "image_width > 20")


def sample(number: int) -> Sample:
    """One of 40, of which those with equal numbers modulo 15 have equal codes, modulo 20 equal texts."""
    facts = {"score": number % 11, "odd": bool(number % 2), "url": f"u{number // 3}", "image_width": number}
    made = image_sample(number % 15)
    return made._replace(key=f"000000-{number:08d}", text=f"text {number % 20}", provenance=facts)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """40 samples in shards of 7, with fields."""
    folder = tmp_path_factory.mktemp("source") / "set"
    make_dataset(folder, map(sample, range(40)), shard_samples=7, codes=CODES)
    return folder


@pytest.fixture(scope="module")
def half(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The first 20 of them."""
    folder = tmp_path_factory.mktemp("half") / "set"
    make_dataset(folder, map(sample, range(20)), codes=CODES)
    return folder


def choose(source: Path | str | Sequence[Path], output: Path | str, **options: Any) -> Manifest:
    """The manifest of the only output, which is sound."""
    inputs = (source,) if isinstance(source, Path | str) else source
    made = select(SelectConfig(input=tuple(map(str, inputs)), output=str(output), quiet=True, **options))
    for url in made if "part" not in options and not str(output).startswith("memory:") else ():
        assert verify(VerifyConfig(input=url, quiet=True)).problems == ()
    return next(iter(made.values()))


def keys(url: Path) -> list[int]:
    return [int(sample.key[-8:]) for sample in read_samples(url)]


def members(folder: Path) -> dict[str, bytes]:
    """Name -> content of all files in all tars of a folder."""
    found = {}
    for path in sorted(folder.glob("**/*.tar")):
        with tarfile.open(path) as archive:
            found |= {member.name: archive.extractfile(member).read() for member in archive}  # type: ignore[union-attr]
    return found


def test_what_is_chosen_comes_through_byte_for_byte_with_keys_and_provenance(source: Path, tmp_path: Path) -> None:
    made = choose(source, tmp_path / "out", where="score >= 9")
    before = members(source)
    assert [f"{key}.json" for key in (sample(n).key for n in range(40) if n % 11 >= 9)] == list(members(tmp_path / "out"))[::2]
    assert members(tmp_path / "out").items() <= before.items()
    assert (made.inputs, made.samples, made.rejects) == (40, 6, {"filtered": 34})
    parent = read_manifest(open_store(str(source)))
    assert made.codes == parent.codes
    assert made.source["input"]["fingerprint"] == parent.fingerprint()
    assert made.source["plan"]["settings"]["where"] == "score >= 9"


@pytest.mark.parametrize("limits", [{"shard_samples": 6}, {"shard_bytes": 10_000}, {}])
def test_shards_close_where_they_close_when_samples_come_one_by_one(tmp_path: Path, limits: dict[str, int]) -> None:
    samples = [sample(n) if n % 3 else multi_sample(n)._replace(key=sample(n).key) for n in range(40)]
    made = {**CODES, "vqcode_multi768": CODES["vqcode_512"]}
    for kind in ("mixed", "one"):
        rows = samples if kind == "mixed" else list(map(sample, range(40)))
        make_dataset(tmp_path / kind, rows, codes=made)
        choose(tmp_path / kind, tmp_path / f"{kind}-out", **limits)
        manifest = read_manifest(open_store(str(tmp_path / f"{kind}-out")))
        expected = make_dataset(tmp_path / f"{kind}-expected", rows, **{"shard_samples": limits.get("shard_samples", 10_000)})
        if "shard_bytes" not in limits:
            assert manifest.shards == expected.shards
        else:
            assert all(shard.bytes - 1024 >= 10_000 > (shard.bytes - 1024) - 2048 for shard in manifest.shards[:-1])


@settings(max_examples=8, deadline=None)
@given(first=st.sampled_from(CONDITIONS), second=st.sampled_from(CONDITIONS), shares=st.tuples(SHARES, SHARES))
def test_a_select_of_a_select_is_the_select_of_both(source: Path, first: str, second: str, shares: tuple[float, float]) -> None:
    place = f"memory://select/{next(COUNTER)}"
    both: dict[str, Any] = {"where": f"({first}) and ({second})", "fraction": min(shares)}
    try:
        choose(source, f"{place}/one", where=first, fraction=shares[0])
        choose(f"{place}/one", f"{place}/two", where=second, fraction=shares[1])
    except TooManyRejects:
        with pytest.raises(TooManyRejects):
            choose(source, f"{place}/both", **both)
    else:
        assert choose(source, f"{place}/both", **both).shards == read_manifest(open_store(f"{place}/two")).shards


def sides_of(url: Path, **options: Any) -> dict[str, int]:
    """Key -> which side of a split it falls on."""
    manifest = read_manifest(open_store(str(url)))
    fields = Fields.make(open_store(str(url)), manifest)
    judge = Judge(fields=(fields,), draw="split", edges=(0.5, 0.8), **options)
    _, sides = decide(judge, [str(url)], [manifest])
    names = [key for shard in manifest.shards for key in values_of(fields.read(shard, [KEY]), KEY)]
    return dict(zip(names, sides.tolist(), strict=True))


def test_a_split_by_a_field_inside_another_keeps_equal_values_together(tmp_path: Path) -> None:
    pages = (text_sample(number)._replace(provenance={"meta": {"page": number // 20}}) for number in range(200))
    make_dataset(tmp_path / "set", pages, shard_samples=50)
    sides = sides_of(tmp_path / "set", by="meta.page")
    assert len(set(sides.values())) > 1
    assert all(sides[text_sample(number).key] == sides[text_sample(number // 20 * 20).key] for number in range(200))
    with pytest.raises(UsageError, match=r"no field meta\.sheet in the json of its samples"):
        sides_of(tmp_path / "set", by="meta.sheet")


def test_fields_of_another_shard_are_refused(tmp_path: Path) -> None:
    make_dataset(tmp_path / "set", map(sample, range(20)), shard_samples=10, codes=CODES)
    choose(tmp_path / "set", tmp_path / "one", where="score >= 3")
    first, second = sorted((tmp_path / "set" / FIELDS).rglob("*.parquet"))
    data = first.read_bytes()
    first.write_bytes(second.read_bytes())
    second.write_bytes(data)
    with pytest.raises(
        FormatError, match=r"0000.tar.parquet: it is of shard-000000-0001.tar: remove the file, and it is made again"
    ):
        choose(tmp_path / "set", tmp_path / "two", where="score >= 3")


def test_keys_meet_as_they_are_written(tmp_path: Path) -> None:
    for name, names in (("a", ["pairs-1"]), ("b", ["1"]), ("c", ["2-1"]), ("d", ["-1"])):
        make_dataset(tmp_path / name, [text_sample(0)._replace(key=key) for key in names])
    with pytest.raises(UsageError, match="have the same key"):
        choose((tmp_path / "a", tmp_path / "b"), tmp_path / "out", key_prefix=("all", "all-pairs"))
    assert choose((tmp_path / "c", tmp_path / "d"), tmp_path / "both", key_prefix=("v", "v2")).samples == 2


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 2**64 - 1), by=st.sampled_from([None, "url"]))
def test_a_split_stays_as_it_is_when_a_dataset_grows_and_keeps_equal_values_together(
    source: Path, half: Path, seed: int, by: str | None
) -> None:
    whole, before = sides_of(source, seed=seed, by=by), sides_of(half, seed=seed, by=by)
    assert len(whole) == 40
    assert len(before) == 20
    assert before.items() <= whole.items()
    if by == "url":
        assert all(whole[sample(n).key] == whole[sample(n // 3 * 3).key] for n in range(40))


def test_the_sides_of_a_split_are_disjoint_and_complete_and_of_the_size_that_was_asked_for(source: Path, tmp_path: Path) -> None:
    choose(source, f"{tmp_path}/{{split}}", split="a=0.5,b=0.3,c=.2", seed=3)
    found = {side: keys(tmp_path / side) for side in "abc"}
    assert sorted(itertools.chain(*found.values())) == list(range(40))
    assert all(abs(len(found[side]) - expected) < 10 for side, expected in {"a": 20, "b": 12, "c": 8}.items())


@pytest.mark.parametrize("what", ["text", "codes"])
def test_unique_keeps_exactly_the_first_of_equals_among_those_that_other_options_keep(
    source: Path, tmp_path: Path, what: str
) -> None:
    made = choose(source, tmp_path / "out", unique=what, where="score > 0")
    period = 20 if what == "text" else 15
    expected: dict[int, int] = {}
    for number in (n for n in range(40) if n % 11 > 0):
        expected.setdefault(number % period, number)
    assert keys(tmp_path / "out") == sorted(expected.values())
    assert made.rejects == {"duplicate": 36 - len(expected), "filtered": 4}


def test_unique_draws_before_a_split_so_that_no_copy_is_on_another_side(source: Path, tmp_path: Path) -> None:
    choose(source, f"{tmp_path}/{{split}}", unique="text", split="a=0.5,b=0.5")
    assert sorted(keys(tmp_path / "a") + keys(tmp_path / "b")) == list(range(20))


def test_parts_and_resumed_runs_give_the_same_bytes(source: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {"where": "score > 2", "unique": "codes", "shard_samples": 7}
    whole = choose(source, tmp_path / "whole", **options)
    for number in (1, 0):
        choose(source, tmp_path / "parts", part=f"{number}/2", **options)
    assert finalize(FinalizeConfig(output=str(tmp_path / "parts"))).shards == whole.shards
    assert choose(source, tmp_path / "whole", resume=True, **options) == whole
    with pytest.raises(UsageError, match="was begun with other inputs or settings: where was"):
        choose(source, tmp_path / "whole", resume=True, **{**options, "where": "score > 3"})


@pytest.mark.slow
def test_any_number_of_workers_and_kills_give_the_same_bytes(tmp_path: Path) -> None:
    make_dataset(tmp_path / "set", map(sample, range(600)), shard_samples=30, codes=CODES)
    args = [
        "select",
        "--input",
        str(tmp_path / "set"),
        "--where",
        "score > 0",
        "--unique",
        "text",
        "--shard-samples",
        "3",
        "--quiet",
    ]
    wds_tools(*args, "--output", tmp_path / "one")
    fields = tree(tmp_path / "set/fields")
    shutil.rmtree(tmp_path / "set/fields")
    wds_tools(*args, "--output", tmp_path / "two", "--workers", "2")
    assert tree(tmp_path / "set/fields") == fields
    disturb(args, tmp_path / "three", workers=2, num_kills=2, work_s=0.3, rng=random.Random(0))
    assert tree(tmp_path / "one") == tree(tmp_path / "two") == tree(tmp_path / "three")


# Lists of keys


def test_listed_keys_are_taken_or_left_out_and_those_of_no_sample_are_named(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    listed = tmp_path / "keys"
    listed.write_text(f"000000-00000003\r\n\n{source}/\t000000-00000005\nelsewhere\tx\n000000-99999999\n")
    assert choose(source, tmp_path / "out", keys=str(listed)).rejects == {"not_chosen": 38}
    assert keys(tmp_path / "out") == [3, 5]
    said = capsys.readouterr().err
    assert "--keys: 1 line is of other datasets, such as elsewhere" in said
    assert "--keys: 1 key is of no sample, such as 000000-99999999" in said
    choose(source, tmp_path / "rest", exclude=str(listed))
    assert keys(tmp_path / "rest") == [n for n in range(40) if n not in (3, 5)]
    listed.write_bytes(b"a\nb\xff\n")
    with pytest.raises(UsageError, match=r"--keys .*, line 2: expected KEY"):
        choose(source, tmp_path / "more", keys=str(listed))


def test_several_inputs_follow_one_another_and_their_keys_are_told_apart(source: Path, tmp_path: Path) -> None:
    other, listed = tmp_path / "other", tmp_path / "keys"
    make_dataset(other, [sample(n) for n in range(5)] + [text_sample(7)], codes=CODES)
    with pytest.raises(UsageError, match=r"-0000.tar and .*other/shard-000000-0000.tar have the same key: --key-prefix"):
        choose((source, other), tmp_path / "out")
    listed.write_text("000000-00000003\n")
    with pytest.raises(UsageError, match=r"1 keys are of several inputs, such as 000000-00000003 \(.*: write DATASET<tab>KEY"):
        choose((source, other), tmp_path / "out", keys=str(listed))
    listed.write_text(f"{other}\t000000-00000003\n{source}\t000000-00000001\ntext-00000007\n")
    made = choose((source, other), tmp_path / "out", keys=str(listed))
    assert [sample.key for sample in read_samples(tmp_path / "out")] == ["000000-00000001", "000000-00000003", "text-00000007"]
    assert [parent["url"] for parent in made.source["inputs"]] == [str(source), str(other)]
    choose((source, other), tmp_path / "all", key_prefix=("a", "b"))
    assert [sample.key for sample in read_samples(tmp_path / "all")][38:42] == [
        "a-000000-00000038",
        "a-000000-00000039",
        "b-000000-00000000",
        "b-000000-00000001",
    ]
    assert list(members(tmp_path / "all").values())[:80] == list(members(source).values())


@pytest.mark.parametrize("order", [("old", "new"), ("new", "old")])
def test_samples_of_an_older_and_a_newer_schema_go_together(order: tuple[str, str], tmp_path: Path) -> None:
    make_dataset(tmp_path / "old", [text_sample(0)])
    make_dataset(tmp_path / "new", [page_sample(1, (4, 4))], codes=CODES)
    manifest = choose([tmp_path / name for name in order], tmp_path / "out")
    assert manifest.schema_version == read_manifest(open_store(str(tmp_path / "new"))).schema_version == 2
    assert manifest.data_types == {"interleaved": 1, "text_pretrain": 1}


def test_what_does_not_go_together_is_refused(source: Path, tmp_path: Path) -> None:
    make_dataset(tmp_path / "wide", [sample(50)], codes={"vqcode_512": {**CODES["vqcode_512"], "codebook_size": 9000}})
    with pytest.raises(UsageError, match=r"vqcode_512 of .* another codebook_size \(9000\) than that of .*set \(8192\)"):
        choose((source, tmp_path / "wide"), tmp_path / "out")
    with pytest.raises(UsageError, match="lies in the input"):
        choose(source, source / "inside")
    with pytest.raises(UsageError, match=r"--output .* is the input"):
        choose(source, str(source.parent / "{split}"), split="set=0.5,rest=0.5")
    make_dataset(tmp_path / "text", [text_sample(0)])
    with pytest.raises(UsageError, match="--unique codes: its samples have no codes"):
        choose(tmp_path / "text", tmp_path / "out", unique="codes")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"where": "score >"}, "not an expression"),
        ({"where": "nsfw < 1"}, "has no field nsfw .* only bytes, .*score.*convert again with --keep nsfw, or .*relabel"),
        ({"where": "inner.value < 1"}, "has no field inner.value"),
        ({"fraction": 0.0}, "--fraction 0.0: expected more than 0"),
        ({"fraction": 0.5, "by": "host"}, "has no field host"),
        ({"by": "url"}, "are for --fraction and --split"),
        ({"split": "a=0.5,b=0.5"}, "has {split} in it exactly with --split"),
        ({"key_prefix": ("a", "b")}, "2 for 1 inputs"),
    ],
)
def test_a_choice_that_cannot_be_made_is_refused(source: Path, tmp_path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        choose(source, tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("split", ["", "a", "a=1,b", "a=0.5", "a=0.5,a=0.5", "a=0.5,b=0.6", "a=-0.5,b=1.5", "../a=0.5,b=0.5"])
def test_a_split_that_is_none_is_refused(split: str) -> None:
    with pytest.raises(UsageError, match="--split"):
        SelectConfig(input=("a",), output="{split}", split=split)


def test_values_that_cannot_be_compared_are_rejects_and_named(tmp_path: Path) -> None:
    rows = [
        text_sample(n)._replace(provenance={"score": "high" if n == 2 else n, "tags": ["a"], "big": 2**63}) for n in range(20)
    ]
    make_dataset(tmp_path / "set", rows)
    made = choose(tmp_path / "set", tmp_path / "out", where='score >= 1 and "a" in tags')
    assert (made.samples, made.rejects) == (18, {"filtered": 1, "wrong_type": 1})
    (reject,) = read_rejects(tmp_path / "out")
    assert (reject["element"], reject["reason"]) == (2, "wrong_type")


# Fields


def test_fields_are_made_once_and_a_damaged_file_says_what_to_do(source: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(source, tmp_path / "set", ignore=shutil.ignore_patterns("fields")))
    choose(folder, tmp_path / "one", where="score > 1")
    made = sorted((folder / "fields").rglob("*.parquet"))
    assert len(made) == 6
    before = [path.stat().st_mtime_ns for path in made]
    made[2].unlink()
    choose(folder, tmp_path / "two", where="score > 1")
    assert [path.stat().st_mtime_ns == time for path, time in zip(made, before, strict=True)] == [
        True,
        True,
        False,
        True,
        True,
        True,
    ]
    assert verify(VerifyConfig(input=str(folder), quiet=True)).problems == ()
    made[0].write_bytes(made[1].read_bytes()[:-50] + bytes(50))
    with pytest.raises(FormatError, match="remove the file, and it is made again"):
        choose(folder, tmp_path / "three", where="score > 1")
    with DatasetWriter(str(folder), overwrite=True) as writer:
        writer.add(text_sample(0))
    assert not list((folder / "fields").rglob("*.parquet"))


def test_fields_of_what_cannot_be_written_go_into_the_output(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = Path(shutil.copytree(source, tmp_path / "set", ignore=shutil.ignore_patterns("fields")))
    put = LocalStore.put

    def refuse(store: LocalStore, name: str, data: bytes) -> None:
        if store.url == str(folder):
            raise StorageError("read-only")
        put(store, name, data)

    monkeypatch.setattr(LocalStore, "put", refuse)
    choose(folder, tmp_path / "out", where="score > 1")
    assert f"{folder} can't be written: its fields go to {tmp_path / 'out'}" in capsys.readouterr().err
    assert not (folder / "fields").exists()
    assert len(list(open_store(str(tmp_path / "out")).list(FIELDS))) == 6
    choose(folder, tmp_path / "out", where="score > 2", overwrite=True)
    assert keys(tmp_path / "out") == [n for n in range(40) if n % 11 > 2]


# Other kinds of datasets


def test_conversations_documents_and_token_rows_can_be_chosen(tmp_path: Path) -> None:
    rows = [talk_sample(0, (2, 3), (4, 4)), text_sample(1), image_sample(2), multi_sample(3), talk_sample(4, (2, 3), (4, 4))]
    make_dataset(tmp_path / "set", rows, codes={**CODES, "vqcode_multi768": CODES["vqcode_512"]})
    choose(
        tmp_path / "set",
        tmp_path / "out",
        where='data_type != "image_text" and (num_codes > 12 or width == 96 or text_chars > 9)',
    )
    assert [sample.key for sample in read_samples(tmp_path / "out")] == [rows[n].key for n in (0, 1, 3, 4)]


def test_third_party_tars_keep_what_they_had(tmp_path: Path) -> None:
    (tmp_path / "tars").mkdir()
    with wds.ShardWriter(str(tmp_path / "tars/%d.tar"), maxcount=4, verbose=0) as writer:
        for number in range(10):
            writer.write({"__key__": f"a/{number}", "json": {"score": number}, "txt": f"t{number % 5}", "jpg": b"pixels"})
    index_tars(open_store(str(tmp_path / "tars")))
    made = choose(tmp_path / "tars", tmp_path / "out", where="score >= 3", unique="text")
    assert [name for name in members(tmp_path / "out") if name.endswith("txt")] == [f"a/{n}.txt" for n in range(3, 8)]
    assert members(tmp_path / "out").items() <= members(tmp_path / "tars").items()
    assert made.schema_version == 0
    (tmp_path / "tars/9.tar").write_bytes((tmp_path / "tars/0.tar").read_bytes())
    (tmp_path / "tars/manifest.json").unlink()
    index_tars(open_store(str(tmp_path / "tars")))
    with pytest.raises(UsageError, match="have the same key: third-party tars may repeat keys"):
        choose(tmp_path / "tars", tmp_path / "more")


def test_the_command_says_what_was_dropped_and_why(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    args = [
        "select",
        "--input",
        str(source),
        "--where",
        "score > 0",
        "--unique",
        "text",
        "--output",
        str(tmp_path / "out"),
        "--quiet",
    ]
    assert main(args) == 0
    assert "filtered     4 dropped by --where, 16 equal to an earlier one (--unique)" in capsys.readouterr().out
    assert main(args) == 2
    assert "already" in capsys.readouterr().err
    split = ["--split", "a=0.5,b=0.5", "--output", str(tmp_path / "{split}"), "--json", "--quiet"]
    assert main(["select", "--input", str(source), *split]) == 0
    assert json.loads(capsys.readouterr().out)[f"{tmp_path}/a"]["inputs"] == 40
