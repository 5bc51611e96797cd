"""Mixtures whose weights are shares of tokens: counted once by a job, held by the order, told beforehand."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from factory import image_sample, make_dataset, text_sample
from tokens import PROVENANCE, write_tokenizer

from loaders import LoaderConfig, SequenceConfig, Source, World, build_loader
from wds_tools.cli.main import main
from wds_tools.errors import FormatError, UsageError
from wds_tools.sequences.tokenizer import TextTokenizer, tokenizer_hash


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with a tokenizer, 60 pairs of 64 codes, and 40 documents of up to 400 words, counted."""
    folder = tmp_path_factory.mktemp("tokens")
    write_tokenizer(folder / "tokenizer")
    make_dataset(folder / "pairs", (image_sample(number, side=8) for number in range(60)), shard_samples=7, codes=PROVENANCE)
    make_dataset(folder / "texts", (text_sample(n, "some words of prose " * (n % 9 * 12)) for n in range(40)), shard_samples=9)
    for name in ("pairs", "texts"):
        assert main(["index", str(folder / name), "--tokens", str(folder / "tokenizer"), "--quiet"]) == 0
    return folder


def config(data: Path, weights: tuple[float, float] = (1, 1)) -> LoaderConfig:
    sources = tuple(Source(str(data / name), weight=weight) for name, weight in zip(("pairs", "texts"), weights, strict=True))
    sequences = SequenceConfig(tokenizer=str(data / "tokenizer"), max_length=2048)
    return LoaderConfig(sources=sources, batch_size=4, last_batch="short", unit="tokens", sequences=sequences)


def tokens_of(data: Path, keys: list[str]) -> tuple[int, int]:
    """Tokens of the pairs and of the documents among these."""
    tokenizer = TextTokenizer(str(data / "tokenizer"))
    pairs = [key for key in keys if key.startswith("image")]
    texts = [int(key[-8:]) for key in keys if key.startswith("text")]
    captions = tokenizer.encode([image_sample(int(key[-8:])).text for key in pairs])
    documents = tokenizer.encode([text_sample(n, "some words of prose " * (n % 9 * 12)).text for n in texts])
    return 64 * len(pairs) + sum(map(len, captions)), sum(map(len, documents))


@pytest.mark.parametrize("weights", [(1, 3), (5, 2), pytest.param((1, 1), marks=pytest.mark.slow)])
def test_weights_are_shares_of_tokens(data: Path, weights: tuple[float, float]) -> None:
    loader = build_loader(replace(config(data, weights), sequences=None, unit="samples"), World())
    by_samples = [key for batch in loader for key in batch["__key__"]]
    settings = replace(config(data, weights), stop_at=2000)
    keys = [key for batch in build_loader(settings, World()) for key in batch["__key__"]]
    pairs, texts = tokens_of(data, keys)
    assert pairs / texts == pytest.approx(weights[0] / weights[1], rel=0.03)
    pairs, texts = tokens_of(data, by_samples)
    assert pairs / texts != pytest.approx(weights[0] / weights[1], rel=0.1)


def test_a_run_goes_on_by_tokens_and_a_change_of_the_unit_is_refused(data: Path) -> None:
    loader = build_loader(config(data), World())
    keys = [batch["__key__"] for batch, _ in zip(loader, range(9), strict=False)]
    state = json.loads(json.dumps(build_loader(config(data), World()).state_dict()))
    again = build_loader(config(data), World())
    again.load_state_dict(state)
    assert [batch["__key__"] for batch, _ in zip(again, range(9), strict=False)] == keys
    with pytest.raises(UsageError, match="schedule was"):
        build_loader(replace(config(data), unit="samples"), World()).load_state_dict(state)


def test_what_was_not_counted_or_is_damaged_is_said_with_what_to_type(data: Path, tmp_path: Path) -> None:
    make_dataset(tmp_path / "new", (text_sample(number) for number in range(9)))
    lone = replace(config(data), sources=(Source(str(tmp_path / "new"), weight=1), config(data).sources[1]))
    with pytest.raises(UsageError, match=rf"have not been counted .*: wds-tools index {tmp_path}/new --tokens {data}/tokenizer"):
        build_loader(lone, World())
    unused = replace(lone, sources=(replace(lone.sources[0], weight=0), lone.sources[1]))
    assert next(iter(build_loader(unused, World())))["__key__"], "a source that is not drawn from needs no count"
    assert main(["index", str(tmp_path / "new"), "--tokens", str(data / "tokenizer")]) == 0
    build_loader(lone, World())
    assert main(["verify", str(tmp_path / "new")]) == 0
    (tmp_path / "new/tokens" / f"{tokenizer_hash(str(data / 'tokenizer'))}.json").write_text("{}")
    with pytest.raises(FormatError, match="tokens/"):
        build_loader(lone, World())
    with pytest.raises(UsageError, match="unit='tokens' is for sources with weights, by the tokenizer of sequences"):
        replace(lone, sequences=None)


def test_simulate_tells_the_tokens_of_each_source(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["simulate", str(data / "pairs"), str(data / "texts"), "--tokenizer", str(data / "tokenizer"), "--batch-size", "4"]
    assert main([*words, "--weights", "1", "3", "--json"]) == 0
    pairs, texts = json.loads(capsys.readouterr().out)["tokens"]
    assert pairs["image_tokens"] == pytest.approx(64 * pairs["samples"])
    assert 3 * (pairs["text_tokens"] + pairs["image_tokens"]) == pytest.approx(texts["text_tokens"])
    assert main(words) == 0
    assert "60 samples, " in (said := capsys.readouterr().out)
    assert "3,840 of images" in said


def test_index_says_the_tokens_in_lines_and_in_json(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["index", str(data / "pairs"), "--tokens", str(data / "tokenizer"), "--quiet"]
    assert main([*words, "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert record["image_tokens"] == 60 * 64
    assert main(words) == 0
    assert f"tokens: {record['text_tokens']:,} of texts, 3,840 of images" in capsys.readouterr().out
