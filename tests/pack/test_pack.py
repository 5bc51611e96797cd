"""`wds-tools pack`: datasets in, shards of token rows out, that anyone can read and that a kill does not change."""

from __future__ import annotations

import io
import random
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from commands import disturb, tree, wds_tools
from factory import image_sample, make_dataset, text_sample
from tokens import PROVENANCE, readmes, write_tokenizer

from loaders import LoaderConfig, Source, build_loader
from wds_tools.check.verify import VerifyConfig, verify
from wds_tools.dataset.output import Output, OutputSpec
from wds_tools.dataset.reader import read_manifest
from wds_tools.dataset.writer import ShardLimits, TaskWriter
from wds_tools.errors import TooManyRejects, UsageError
from wds_tools.format.manifest import Manifest
from wds_tools.format.schema import ANY_MEMBERS, Sample
from wds_tools.format.shard import npy_bytes
from wds_tools.pack.rows import PackConfig, pack
from wds_tools.sequences.build import ExampleBuilder
from wds_tools.sequences.config import SequenceConfig
from wds_tools.storage import open_store

LENGTH = 128


def documents(count: int) -> Iterator[Sample]:
    rng = random.Random(1)
    text = " ".join(readmes()[:30])
    for number in range(count):
        begin = rng.randrange(len(text) - 2000)
        yield text_sample(number, text[begin : begin + int(rng.lognormvariate(5.5, 0.8)) + 1])


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with a tokenizer, 200 pairs of 36 codes and 300 documents."""
    folder = tmp_path_factory.mktemp("inputs")
    write_tokenizer(folder / "tokenizer")
    make_dataset(folder / "pairs", (image_sample(n, side=6) for n in range(200)), shard_samples=30, codes=PROVENANCE)
    make_dataset(folder / "text", documents(300), shard_samples=70)
    return folder


def config(inputs: Path, output: Path, **settings: Any) -> PackConfig:
    urls = (str(inputs / "pairs"), str(inputs / "text"))
    given = {"input": urls, "tokenizer": str(inputs / "tokenizer"), "max_length": LENGTH, "output": str(output), "quiet": True}
    return PackConfig(**{**given, **settings})


def read_part(url: Path) -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """(ids, loss, segments) by tarfile and numpy, as a stranger would read them."""
    manifest = read_manifest(open_store(str(url)), any_members=True)
    shards = [str(url / row.name) for row in manifest.shards]
    rows = []
    for shard in shards:
        with tarfile.open(shard) as tar:
            members = {member.name: np.load(io.BytesIO(tar.extractfile(member).read())) for member in tar}
        for key in sorted({name.partition(".")[0] for name in members}):
            ids, loss, segments = (members[f"{key}.{suffix}"] for suffix in ("tokens.npy", "loss.npy", "segments.npy"))
            rows.append((ids, np.unpackbits(loss)[:LENGTH], segments))
    return rows


@pytest.fixture(scope="module")
def made(inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Manifest]:
    output = tmp_path_factory.mktemp("packed") / "rows"
    return output, pack(config(inputs, output, task_samples=200, shard_samples=50))


def test_rows_hold_every_token_of_every_sample_once_and_little_padding(inputs: Path, made: tuple[Path, Manifest]) -> None:
    output, manifest = made
    builder = ExampleBuilder(SequenceConfig(tokenizer=str(inputs / "tokenizer"), max_length=LENGTH), 42, 8192)
    pairs, texts = [image_sample(n, side=6) for n in range(200)], list(documents(300))
    examples = [*builder.build(pairs, [0] * 200), *builder.build(texts, [0] * 300)]
    rows = read_part(output)
    counts = manifest.source["counts"]
    tokens = [token for ids, _, segments in rows for token in ids[: segments.sum()].tolist()]
    assert sorted(tokens) == sorted(token for example in examples for token in example.ids.tolist())
    assert sum(int(loss.sum()) for _, loss, _ in rows) == sum(int(example.loss.sum()) for example in examples)
    whole = {ids[end - size : end].tobytes() for ids, _, seg in rows for size, end in zip(seg, np.cumsum(seg), strict=True)}
    assert all(example.ids.astype("<u2").tobytes() in whole for example in examples[:200])
    assert counts == {"samples": 500, "shortened": 0, "tokens": len(tokens), "padding": LENGTH * len(rows) - len(tokens)}
    assert counts["padding"] / (LENGTH * len(rows)) < 0.05
    assert {ids.dtype.str for ids, _, _ in rows} == {"<u2"}


def test_the_manifest_says_what_a_model_needs_and_verify_finds_nothing(made: tuple[Path, Manifest]) -> None:
    output, manifest = made
    assert manifest.source["rows"] == {"version": 2, "length": LENGTH, "vocabulary_size": 2003 + 8192, "text_size": 2003}
    assert manifest.samples == len(read_part(output))
    assert wds_tools("verify", output).stdout


def rewritten(made: tuple[Path, Manifest], folder: Path, **changes: Any) -> Path:
    """The first rows again, with other members, by the writer that made them."""
    source = {**made[1].source, **changes.pop("source", {})}
    store = open_store(str(folder))
    output = Output(store, OutputSpec(num_tasks=1, source=source, schema_version=ANY_MEMBERS))
    output.begin()
    with TaskWriter(store, 0, ShardLimits()) as writer:
        for number, (ids, loss, segments) in enumerate(read_part(made[0])[:3]):
            arrays = {"tokens.npy": ids, "loss.npy": np.packbits(loss), "segments.npy": segments}
            arrays |= {name.replace("_", "."): array for name, array in changes.items() if number == 1}
            writer.add_members(f"row-{number}", [(name, npy_bytes(array)) for name, array in arrays.items() if array is not None])
        writer.finish(3)
    output.finish(output.results())
    return folder


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({}, None),
        (
            {"tokens_npy": np.array([5] * 9 + [10_195] * (LENGTH - 9), "<u2")},
            "row-1: holds the id 10195 at 9; the vocabulary has",
        ),
        ({"tokens_npy": np.zeros(LENGTH - 1, "<u2")}, f"tokens ({LENGTH - 1},) and loss ({LENGTH // 8},), expected ({LENGTH},)"),
        ({"loss_npy": np.zeros(3, "u1")}, f"loss (3,), expected ({LENGTH},) and ({LENGTH // 8},)"),
        ({"loss_npy": None}, "has the members tokens.npy, segments.npy, expected tokens.npy, loss.npy, segments.npy"),
        ({"segments_npy": np.array([LENGTH, 1], "<u2")}, f"segments are [{LENGTH}, 1], expected lengths from 1"),
        ({"segments_npy": np.array([3, 0], "<u2")}, "segments are [3, 0], expected lengths from 1"),
    ],
    ids=str,
)
def test_verify_holds_rows_to_their_length_and_vocabulary(
    made: tuple[Path, Manifest], tmp_path: Path, changes: dict[str, Any], message: str | None
) -> None:
    found = verify(VerifyConfig(input=str(rewritten(made, tmp_path / "set", **changes)), quiet=True)).problems
    if message is None:
        assert found == ()
    else:
        assert len(found) == 1
        assert message in found[0]


@pytest.mark.parametrize(
    ("words", "hint"),
    [
        (["encode", "--device", "cpu"], "encode the images first, then pack"),
        (["export", "hf"], "export those datasets"),
        (["pack", "--max-length", "64", "--tokenizer", "tok"], "train on the rows as they are, or pack those datasets again"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_a_command_that_needs_samples_says_what_rows_are_and_what_to_do_instead(
    inputs: Path, made: tuple[Path, Manifest], tmp_path: Path, words: list[str], hint: str
) -> None:
    (line,) = wds_tools(*words, "--input", made[0], "--output", tmp_path / "out", status=2).stderr.splitlines()
    whence = f"{inputs / 'pairs'}, {inputs / 'text'}"
    assert f"{made[0]} holds rows of {LENGTH} tokens that `wds-tools pack` made of {whence}, no samples with texts" in line
    assert hint in line


@pytest.mark.slow
def test_workers_and_resumes_change_no_byte(inputs: Path, made: tuple[Path, Manifest], tmp_path: Path) -> None:
    words = ["pack", "--input", str(inputs / "pairs"), str(inputs / "text"), "--tokenizer", str(inputs / "tokenizer")]
    words += ["--max-length", str(LENGTH), "--task-samples", "200", "--shard-samples", "50"]
    disturb(words, tmp_path / "rows", workers=2, num_kills=1, work_s=0.5, rng=random.Random(7))
    assert tree(tmp_path / "rows") == tree(made[0])


def test_another_epoch_or_seed_makes_other_rows_of_the_same_samples(
    inputs: Path, made: tuple[Path, Manifest], tmp_path: Path
) -> None:
    again, epoch, seed = (
        pack(config(inputs, tmp_path / name, task_samples=200, shard_samples=50, **settings)).fingerprint()
        for name, settings in (("again", {}), ("epoch", {"epoch": 1}), ("seed", {"seed": 1}))
    )
    assert again == made[1].fingerprint()
    assert len({again, epoch, seed}) == 3


def test_what_does_not_fit_is_a_reject_with_its_key_or_stops_the_pass(inputs: Path, tmp_path: Path) -> None:
    manifest = pack(config(inputs, tmp_path / "rows", max_length=40, max_rejects="200"))
    assert manifest.rejects == {"too_long": 200}
    lines = (tmp_path / "rows/rejects/task-000000.jsonl").read_text().splitlines()
    assert (len(lines), "image-00000000" in lines[0]) == (200, True)
    assert manifest.source["counts"]["samples"] == 300
    with pytest.raises(TooManyRejects):
        pack(config(inputs, tmp_path / "few", max_length=40))


def test_a_codebook_that_the_codes_exceed_is_refused_with_keys(inputs: Path, tmp_path: Path) -> None:
    manifest = pack(config(inputs, tmp_path / "rows", codebook_size=4096, max_rejects="100%"))
    assert manifest.rejects["code_out_of_range"] > 150
    assert "4096 entries" in (tmp_path / "rows/rejects/task-000000.jsonl").read_text()


def test_one_of_several_sets_of_codes_is_packed_and_streamed_alone(inputs: Path, tmp_path: Path) -> None:
    first, second = (
        [image_sample(n + start, side=6)._replace(key=f"{n:04d}", text=f"caption {n}") for n in range(20)] for start in (0, 100)
    )
    both = [a._replace(codes={**a.codes, "vqcode_512-b": b.codes["vqcode_512"]}) for a, b in zip(first, second, strict=True)]
    other = {"tokenizer": "other", "codebook_size": 9000, "weights_hash": "sha256:1"}
    facts = {"vqcode_512": PROVENANCE["vqcode_512"], "vqcode_512-b": other}
    make_dataset(tmp_path / "both", both, codes=facts)
    make_dataset(tmp_path / "first", first, codes={"vqcode_512": PROVENANCE["vqcode_512"]})
    make_dataset(tmp_path / "second", second, codes={"vqcode_512": other})
    sequences = SequenceConfig(tokenizer=str(inputs / "tokenizer"), max_length=LENGTH)
    for name, alone in ((None, "first"), ("", "first"), ("b", "second")):
        chosen = pack(config(inputs, tmp_path / f"rows-{name}", input=(str(tmp_path / "both"),), code_set=name))
        expected = pack(config(inputs, tmp_path / f"alone-{name}", input=(str(tmp_path / alone),)))
        assert chosen.fingerprint() == expected.fingerprint()
        batches = []
        for url, codes in (("both", name), (alone, None)):
            source = Source(str(tmp_path / url), code_set=codes)
            loader = build_loader(LoaderConfig(sources=(source,), batch_size=20, shuffle=False, sequences=sequences))
            batches.append(next(iter(loader))["input_ids"])
            loader.close()
        assert torch.equal(*batches)
    with pytest.raises(UsageError, match="has no codes named 'c', but vqcode_512, vqcode_512-b: choose with --code-set"):
        pack(config(inputs, tmp_path / "none", input=(str(tmp_path / "both"),), code_set="c"))


def test_codes_of_two_tokenizers_in_one_input_are_not_mixed(inputs: Path, tmp_path: Path) -> None:
    pairs = [image_sample(number, side=6) for number in range(8)]
    pairs[4:] = [one._replace(codes={"vqcode_512-b": one.codes["vqcode_512"]}) for one in pairs[4:]]
    facts = {"vqcode_512": PROVENANCE["vqcode_512"], "vqcode_512-b": {"tokenizer": "other", "codebook_size": 9000}}
    make_dataset(tmp_path / "joined", pairs, codes=facts, shard_samples=4)
    with pytest.raises(UsageError, match="samples with vqcode_512-b beside others with vqcode_512: codes of different"):
        pack(config(inputs, tmp_path / "rows", input=(str(tmp_path / "joined"),)))


def test_impossible_arguments_are_refused_before_anything_is_written(inputs: Path, tmp_path: Path) -> None:
    bare = write_tokenizer(tmp_path / "bare", added=())
    with pytest.raises(UsageError, match="no <boi>"):
        pack(config(inputs, tmp_path / "rows", tokenizer=str(bare)))
    with pytest.raises(UsageError, match="task-samples"):
        config(inputs, tmp_path / "rows", task_samples=0)
    for spelling in ("text", "text/", "pairs/../text"):
        with pytest.raises(UsageError, match=r"--output .* is the input "):
            config(inputs, inputs / "text", input=(str(inputs / "pairs"), f"{inputs}/{spelling}"), overwrite=True)
    with pytest.raises(UsageError, match="max_length=1"):
        config(inputs, tmp_path / "rows", max_length=1)
    assert not (tmp_path / "rows").exists()


@pytest.mark.slow
def test_the_command_adds_tokens_and_packs_and_says_what_the_model_needs(inputs: Path, tmp_path: Path) -> None:
    bare = write_tokenizer(tmp_path / "bare", added=())
    told = wds_tools("vocabulary", bare, status=1).stdout
    assert "missing" in told
    told = wds_tools("vocabulary", bare, "--output", tmp_path / "new", "--codebook-size", "8192").stdout
    assert "10,195 at least, 10,240 as a multiple of 128" in told
    words = ("--input", inputs / "pairs", "--tokenizer", tmp_path / "new", "--max-length", "64", "--output", tmp_path / "rows")
    assert "vocab_size >= 10,195" in wds_tools("pack", *words).stdout
