"""Interleaved documents, images in answers and chosen texts through the loader: padded, packed on the fly, packed ahead."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from factory import answer_sample, image_sample, make_dataset, page_sample, text_sample
from tokens import PROVENANCE, write_tokenizer

from loaders import LoaderConfig, SequenceConfig, Source, World, build_loader
from wds_tools.errors import DataError, UsageError
from wds_tools.format.schema import Sample
from wds_tools.pack.rows import PackConfig, pack
from wds_tools.sequences.build import ExampleBuilder
from wds_tools.sequences.choices import choose_text

LENGTH = 48
WEIGHTS = {"recap": 0.7, "alt": 0.3}


def marked() -> list[Sample]:
    pages = [page_sample(number, *[(3, 4)] * (number % 7)) for number in range(20)]
    return [*pages, *(answer_sample(number, (2, 3), (3, 2)) for number in range(9)), *map(text_sample, range(5))]


def captioned() -> list[Sample]:
    return [
        image_sample(number)._replace(texts={"alt": f"alt {number}", "recap": f"recap {number}" if number % 4 else None})
        for number in range(30)
    ]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    write_tokenizer(folder / "tokenizer")
    make_dataset(folder / "marked", marked(), shard_samples=11, codes=PROVENANCE)
    make_dataset(folder / "captioned", captioned(), shard_samples=11, codes=PROVENANCE)
    return folder


def config(data: Path, name: str, *, texts: dict[str, float] | None = None, **given: Any) -> LoaderConfig:
    sequences = SequenceConfig(tokenizer=str(data / "tokenizer"), max_length=LENGTH)
    settings = {"batch_size": 4, "last_batch": "short", "sequences": sequences, **given}
    return LoaderConfig(sources=(Source(str(data / name), texts=texts),), **settings)


def segments(batch: dict[str, Any]) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Ids and labels of what a batch keeps apart, without padding and the first label, which packed rows have not."""
    if "attention_mask" in batch:
        for ids, labels, mask in zip(*(batch[name].tolist() for name in ("input_ids", "labels", "attention_mask")), strict=True):
            yield tuple(ids[: sum(mask)]), tuple(labels[1 : sum(mask)])
        return
    bounds = batch["cu_seqlens"].tolist()
    ids, labels = (batch[name].reshape(-1).tolist() for name in ("input_ids", "labels"))
    for begin, end in pairwise(bounds):
        yield tuple(ids[begin:end]), tuple(labels[begin + 1 : end])


def expected(data: Path, samples: list[Sample]) -> Counter[Any]:
    made = ExampleBuilder(SequenceConfig(tokenizer=str(data / "tokenizer"), max_length=LENGTH), 42, 8192)
    found: Counter[Any] = Counter()
    for example in made.build(samples, [0] * len(samples)):
        ends = np.cumsum(example.pieces or [len(example.ids)])
        labels = np.where(example.loss, example.ids, -100)
        for begin, end in zip([0, *ends], ends, strict=False):
            found[tuple(example.ids[begin:end].tolist()), tuple(labels[begin + 1 : end].tolist())] += 1
    return found


@pytest.mark.parametrize("name", ["marked", "captioned"])
def test_padded_packed_on_the_fly_and_packed_ahead_hold_the_same_tokens(data: Path, tmp_path: Path, name: str) -> None:
    texts = WEIGHTS if name == "captioned" else None
    samples = marked() if texts is None else captioned()
    if texts is not None:
        chosen = (choose_text(42, 0, one.key, one.text, one.texts, tuple(sorted(WEIGHTS.items()))) for one in samples)
        samples = [one._replace(text=text) for one, text in zip(samples, chosen, strict=True)]
        assert {"recap", "alt"} == {one.text.split()[0] for one in samples}
    wanted = expected(data, samples)
    padded = build_loader(config(data, name, texts=texts, num_workers=2), World())
    assert Counter(segment for batch in padded for segment in segments(batch)) == wanted
    if texts is None:
        assert padded.stats()["split"] > 5
    padded.close()
    words = tuple(f"{key}={weight}" for key, weight in (texts or {}).items())
    url, rows = str(data / name), str(tmp_path / "rows")
    packing = PackConfig(input=(url,), tokenizer=str(data / "tokenizer"), max_length=LENGTH, texts=words, output=rows, quiet=True)
    manifest = pack(packing)
    ahead = build_loader(LoaderConfig(sources=(Source(rows),), batch_size=4, last_batch="short"), World())
    assert wanted <= Counter(segment for batch in ahead for segment in segments(batch))
    assert manifest.source["counts"].get("split", 0) == (0 if texts else padded.stats()["split"])
    assert manifest.source["plan"]["settings"].get("texts") == texts
    fly = build_loader(config(data, name, texts=texts, packing=True), World())
    seen = Counter(segment for batch in islice(fly, 40) for segment in segments(batch))
    assert wanted <= seen  # of the first epoch all, of those that follow some
    state = fly.state_dict()
    assert next(iter(fly))["input_ids"].tolist() == _resumed(data, name, texts, state)


def _resumed(data: Path, name: str, texts: dict[str, float] | None, state: dict[str, Any]) -> list[list[int]]:
    loader = build_loader(config(data, name, texts=texts, packing=True), World())
    loader.load_state_dict(state)
    ids: list[list[int]] = next(iter(loader))["input_ids"].tolist()
    return ids


def test_a_batch_of_samples_has_the_chosen_text_and_a_grid_for_each_mark(data: Path) -> None:
    def texts(seed: int = 42, epochs: int = 1, **given: Any) -> list[list[str]]:
        loader = build_loader(config(data, "captioned", texts=WEIGHTS, sequences=None, seed=seed, **given), World())
        found = [[text for _, text in sorted(pair for b in loader for pair in zip(b["__key__"], b["text"], strict=True))]]
        return found + [[t for b in loader for t in b["text"]] for _ in range(epochs - 1)]

    first, second = texts(epochs=2)
    weights = tuple(sorted(WEIGHTS.items()))
    assert first == [choose_text(42, 0, one.key, one.text, one.texts, weights) for one in captioned()]
    assert [first] == texts(num_workers=2) == texts(batch_size=7) != texts(seed=43)
    assert sorted(first) != sorted(second)
    batches = list(build_loader(config(data, "marked", sequences=None), World()))
    grids = {key: codes for b in batches for key, codes in zip(b["__key__"], b.get("codes") or [None] * 4, strict=False)}
    for sample in marked():
        found = grids[sample.key]
        if sample.data_type != "text_pretrain":
            assert [one.tolist() for one in found or []] == [grid.tolist() for grid in sample.grids_of("vqcode_512")]
    assert any("<image>" in text for batch in batches for text in batch["text"])
    assert torch.is_tensor(next(iter(build_loader(config(data, "captioned", sequences=None), World())))["codes"])


def test_other_weights_are_another_order_and_names_that_are_not_there_stop_the_run(data: Path, tmp_path: Path) -> None:
    loader = build_loader(config(data, "captioned", texts=WEIGHTS), World())
    next(iter(loader))
    state, receipt = loader.state_dict(), loader.receipt()
    for document in (state, receipt):
        assert document["generations"][0]["spec"]["sources"][0]["texts"] == [["alt", 0.3], ["recap", 0.7]]
    with pytest.raises(UsageError, match=r"texts of source 0 was .*0\.7.*, is \[\]"):
        build_loader(config(data, "captioned"), World()).load_state_dict(state)
    for sequences in (None, loader.config.sequences):
        with pytest.raises(DataError, match="has no text named 'ocr': its texts are alt, recap"):
            next(iter(build_loader(config(data, "captioned", texts={"ocr": 1}, sequences=sequences), World())))
    given: dict[str, Any] = {"input": (str(data / "captioned"),), "tokenizer": str(data / "tokenizer"), "max_length": LENGTH}
    given |= {"output": str(tmp_path / "rows"), "quiet": True}
    with pytest.raises(UsageError, match=r"--texts ocr: no input's first pair has a text .*: alt, recap"):
        pack(PackConfig(**given, texts=("ocr=1", "alt=1")))
    assert not (tmp_path / "rows").exists()
    make_dataset(tmp_path / "plain", [image_sample(number) for number in range(3)], codes=PROVENANCE)
    both = given | {"input": (*given["input"], str(tmp_path / "plain")), "max_rejects": "100%"}
    assert pack(PackConfig(**both, texts=("alt=1",))).rejects == {"unknown_text": 3}
    for texts in (("ocr",), ("alt=x",), ("=1",), ("alt=1", "alt=2"), ("alt=0",)):
        with pytest.raises(UsageError, match="--texts"):
            PackConfig(**given, texts=texts)
