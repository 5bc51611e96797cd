"""Batches of token rows from the loader: padded, packed on the fly, packed ahead; on any topology, after any resume."""

from __future__ import annotations

import json
import random
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from commands import wds_tools
from factory import image_sample, make_dataset, multi_sample, talk_sample, text_sample
from s3 import S3Server
from tokens import PROVENANCE, readmes, write_tokenizer

from loaders import Loader, LoaderConfig, SequenceConfig, Source, World, build_loader, flatten, merge_states
from loaders.testing import Topology, check_resume
from wds_tools.dataset.output import Output, OutputSpec
from wds_tools.dataset.writer import ShardLimits, TaskWriter
from wds_tools.errors import FormatError, UsageError
from wds_tools.format.schema import ANY_MEMBERS, TOKEN_MEMBERS, Sample
from wds_tools.format.shard import npy_bytes
from wds_tools.pack.rows import PackConfig, pack
from wds_tools.sequences.build import ExampleBuilder
from wds_tools.storage import open_store

LENGTH = 96
PAIRS, TEXTS = 37, 53


def pairs() -> list[Sample]:
    return [image_sample(n, side=6) if n % 3 else multi_sample(n, height=48, width=96) for n in range(PAIRS)]


def texts() -> list[Sample]:
    rng = random.Random(3)
    prose = " ".join(readmes()[:10])
    return [text_sample(n, prose[n * 50 :][: int(rng.lognormvariate(5.3, 1.0)) + 1]) for n in range(TEXTS)]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with a tokenizer, pairs of two shapes, documents of all lengths, and both packed ahead."""
    folder = tmp_path_factory.mktemp("data")
    write_tokenizer(folder / "tokenizer")
    make_dataset(folder / "pairs", pairs(), shard_samples=7, codes=PROVENANCE)
    make_dataset(folder / "texts", texts(), shard_samples=11)
    urls = (str(folder / "pairs"), str(folder / "texts"))
    tokenizer = str(folder / "tokenizer")
    pack(PackConfig(input=urls, tokenizer=tokenizer, max_length=LENGTH, output=str(folder / "rows"), shard_samples=5, quiet=True))
    return folder


def sequences(data: Path, **settings: Any) -> SequenceConfig:
    return SequenceConfig(**{"tokenizer": str(data / "tokenizer"), "max_length": LENGTH, **settings})


def config(data: Path, *, batch_size: int = 4, weights: tuple[float, float] | None = None, **settings: Any) -> LoaderConfig:
    first, second = weights or (None, None)
    sources = (Source(str(data / "pairs"), weight=first), Source(str(data / "texts"), weight=second))
    return LoaderConfig(
        **{"sources": sources, "sequences": sequences(data), "batch_size": batch_size, "last_batch": "short", **settings}
    )


@pytest.fixture(autouse=True)
def two_lanes_for_each_sample(lanes_per_sample: Callable[[int], None]) -> None:
    """Eight lanes with batches of 4, so that few rows come from all of them."""
    lanes_per_sample(2)


def rows_of(batch: Mapping[str, Any]) -> list[tuple[Any, ...]]:
    """Everything about each row of a batch."""
    names = [name for name in ("input_ids", "labels", "position_ids", "attention_mask") if name in batch]
    columns = [batch[name].tolist() for name in names]
    return [
        (tuple(map(str, key)) if isinstance(key, list) else key, *row)
        for key, *row in zip(batch["__key__"], *columns, strict=True)
    ]


def unpadded(batch: Mapping[str, Any]) -> Iterator[tuple[str, list[int], list[int]]]:
    for key, ids, labels, mask in rows_of(batch):
        yield key, ids[: sum(mask)], labels[: sum(mask)]


def test_a_padded_epoch_holds_every_sample_once_as_its_sequence_and_long_documents_in_full(data: Path) -> None:
    loader = build_loader(config(data), World())
    found: dict[str, list[tuple[list[int], list[int]]]] = {}
    for batch in loader:
        assert batch["input_ids"].dtype == batch["labels"].dtype == torch.int64
        assert batch["input_ids"].shape == batch["attention_mask"].shape == (len(batch["__key__"]), batch["input_ids"].shape[1])
        assert len(batch["__source__"]) == len(batch["__key__"])
        for key, ids, labels in unpadded(batch):
            found.setdefault(key, []).append((ids, labels))
    examples = ExampleBuilder(sequences(data), 42, 8192).build([*pairs(), *texts()], [0] * (PAIRS + TEXTS))
    assert len(found) == PAIRS + TEXTS
    for example in examples:
        ids, labels = ([token for part in found[example.key] for token in part[which]] for which in (0, 1))
        assert ids == example.ids.tolist()
        assert labels == np.where(example.loss, example.ids, -100).tolist()
    assert max(len(parts) for parts in found.values()) > 2
    stats = loader.stats()
    assert (stats["samples"], stats["tokens"]) == (PAIRS + TEXTS, sum(len(example.ids) for example in examples))
    assert stats["rows"] == sum(map(len, found.values()))


def test_conversations_with_any_number_of_images_become_rows_as_they_do_ahead(data: Path, tmp_path: Path) -> None:
    talks = [talk_sample(0, (2, 3), (4, 2)), talk_sample(1), talk_sample(2, (5, 1)), talk_sample(3, (1, 2), (2, 2), (3, 3))]
    make_dataset(tmp_path / "talks", talks, codes=PROVENANCE)
    expected = ExampleBuilder(sequences(data), 42, 8192).build(talks, [0] * len(talks))
    made = replace(config(data), sources=(Source(str(tmp_path / "talks")),))
    found = {key: ids for batch in build_loader(made, World()) for key, ids, _ in unpadded(batch)}
    assert found == {example.key: example.ids.tolist() for example in expected}


GRID = [Topology(4), Topology(8, 2), Topology(2, 1, 2), Topology(6, 3)]


@pytest.mark.slow
def test_padded_batches_resume_anywhere(data: Path) -> None:
    def make(topology: Topology, world: World) -> Loader:
        return build_loader(config(data, batch_size=topology.batch_size, num_workers=topology.num_workers), world)

    def items(batch: Mapping[str, Any]) -> list[Any]:
        return list(unpadded(batch))

    check_resume(make, GRID, items=items, every=9)


@pytest.mark.slow
def test_rows_packed_ahead_resume_anywhere_and_are_each_given_once(data: Path) -> None:
    def make(topology: Topology, world: World) -> Loader:
        settings = LoaderConfig(
            sources=(Source(str(data / "rows")),),
            batch_size=topology.batch_size,
            last_batch="short",
            num_workers=topology.num_workers,
        )
        return build_loader(settings, world)

    seen = check_resume(make, GRID, items=rows_of, every=7)
    assert len({row[0] for row in seen}) == len(seen)
    assert all(len(row[1]) == LENGTH for row in seen)


def test_lists_of_segments_are_read_whatever_their_number_and_type(tmp_path: Path) -> None:
    lists = [
        np.array([60], "<u4"),
        np.array([20, 30], "<u2"),
        np.array([96], "<u4"),
        np.array([1, 2, 3], "u1"),
        np.zeros(0, "u1"),
    ]
    assert len(npy_bytes(lists[0])) == len(npy_bytes(lists[1]))  # so their length does not tell what they are
    store = open_store(str(tmp_path / "rows"))
    source = {"rows": {"length": LENGTH, "vocabulary_size": 300, "text_size": 200}}
    output = Output(store, OutputSpec(num_tasks=1, source=source, schema_version=ANY_MEMBERS))
    output.begin()
    with TaskWriter(store, 0, ShardLimits()) as writer:
        for number, segments in enumerate(lists):
            members = (np.arange(LENGTH, dtype="<u2"), np.packbits(np.ones(LENGTH, np.bool_)), segments)
            payloads = [(name, npy_bytes(array)) for name, array in zip(TOKEN_MEMBERS, members, strict=True)]
            writer.add_members(f"row-{number}", payloads)
        writer.finish(len(lists))
    output.finish(output.results())
    (batch,) = build_loader(LoaderConfig(sources=(Source(store.url),), batch_size=len(lists), shuffle=False), World())
    expected = [[60, 36], [20, 30, 46], [96], [1, 2, 3, 90], [96]]
    assert batch["__key__"] == [f"row-{number}" for number in range(len(lists))]
    assert np.diff(batch["cu_seqlens"]).tolist() == [length for own in expected for length in own]


class Bounded:
    """The first rows of a packed stream, which has no end: lists of a rank's rows, without those beyond."""

    def __init__(self, loader: Loader, rows: int) -> None:
        self._loader = loader
        self._rows = rows
        self.state_dict, self.load_state_dict, self.close = loader.state_dict, loader.load_state_dict, loader.close

    def __iter__(self) -> Iterator[list[Any]]:
        size, world = self._loader.config.batch_size, self._loader.world
        for batch in self._loader if self._loader.position < self._rows else ():
            first = self._loader.position - size + size * world.rank // world.world_size
            yield rows_of(batch)[: max(self._rows - first, 0)]
            if self._loader.position >= self._rows:
                break


@pytest.mark.parametrize(
    ("weights", "topologies", "num_rows"),
    [
        pytest.param(None, [Topology(4), Topology(12, 3), Topology(2, 1, 2), Topology(6, 2)], 120, marks=pytest.mark.slow),
        pytest.param((0.6, 0.4), [Topology(3), Topology(12, 4), Topology(4, 2)], 120, marks=pytest.mark.slow),
        ((0.6, 0.4), [Topology(3), Topology(12, 4), Topology(4, 2)], 36),
    ],
)
def test_rows_packed_on_the_fly_resume_on_any_topology(
    data: Path, weights: tuple[float, float] | None, topologies: list[Topology], num_rows: int
) -> None:
    def make(topology: Topology, world: World) -> Bounded:
        sizes = {"batch_size": topology.batch_size, "num_workers": topology.num_workers}
        return Bounded(build_loader(config(data, weights=weights, packing=True, last_batch="drop", **sizes), world), num_rows)

    seen = check_resume(make, topologies, items=lambda rows: rows, every=13, merge=merge_states)
    assert len(seen) == num_rows


def test_lanes_that_no_rank_or_worker_keeps_give_the_same_rows(data: Path) -> None:
    begun = build_loader(config(data, packing=True), World()).state_dict()

    def rows(batch_size: int, world_size: int, num_workers: int = 0) -> list[Any]:
        loaders = [
            build_loader(
                config(data, batch_size=batch_size, packing=True, num_workers=num_workers),
                World(rank=rank, world_size=world_size),
            )
            for rank in range(world_size)
        ]
        for loader in loaders:
            loader.load_state_dict(begun)
        found = [
            row
            for parts in zip(*(islice(loader, 60 // batch_size) for loader in loaders), strict=True)
            for part in parts
            for row in rows_of(part)
        ]
        for loader in loaders:
            loader.close()
        return found

    expected = rows(4, 1)
    assert rows(5, 2) == rows(10, 3) == rows(20, 4) == rows(3, 2, num_workers=2) == expected


def test_a_state_of_one_rank_is_right_too_and_says_what_it_costs(data: Path) -> None:
    def make(rank: int, world_size: int) -> Loader:
        return build_loader(config(data, batch_size=4, packing=True), World(rank=rank, world_size=world_size))

    whole = [row for batch in islice(make(0, 1), 12) for row in rows_of(batch)]
    half = make(0, 2)
    list(islice(half, 6))
    state = json.loads(json.dumps(half.state_dict()))
    one = make(0, 1)
    with pytest.warns(UserWarning, match="4 of 8 lanes"):
        one.load_state_dict(state)
    assert [row for batch in islice(one, 6) for row in rows_of(batch)] == whole[24:]
    assert len(json.dumps(state["packing"]["lanes"])) < 1000


def test_a_loop_that_was_left_goes_on_with_packed_rows(data: Path) -> None:
    whole = [row for batch in islice(build_loader(config(data, packing=True), World()), 9) for row in rows_of(batch)]
    loader = build_loader(config(data, packing=True, num_workers=2), World())
    parts = [row for _ in range(3) for batch in islice(loader, 3) for row in rows_of(batch)]
    loader.close()
    assert parts == whole


@pytest.mark.parametrize("num_workers", [0, 2])
def test_loops_over_packed_rows_may_be_left_anywhere(
    data: Path, num_workers: int, lanes_per_sample: Callable[[int], None]
) -> None:
    lanes_per_sample(5)
    settings: dict[str, Any] = {"packing": True, "prefetch_factor": 1}  # five steps of them: two workers meet all
    whole = [row for batch in islice(build_loader(config(data, **settings), World()), 18) for row in rows_of(batch)]
    for first in (1, 2):
        loader = build_loader(config(data, num_workers=num_workers, **settings), World())
        parts = [row for steps in (first, 2, 14) for batch in islice(loader, steps) for row in rows_of(batch)]
        loader.close()
        assert parts == whole[: len(parts)]


def test_packed_rows_hold_whole_examples_and_documents_piece_by_piece_in_order_and_little_padding(
    data: Path, lanes_per_sample: Callable[[int], None]
) -> None:
    lanes_per_sample(1)
    epochs = 6
    loader = build_loader(config(data, packing=True), World())
    builder = ExampleBuilder(sequences(data), 42, 8192)
    whole = [
        {one.key: one.ids.tolist() for one in builder.build([*pairs(), *texts()], [e] * (PAIRS + TEXTS))} for e in range(epochs)
    ]
    begun: dict[tuple[str, int], list[int]] = {}  # how far each copy of a document has come in a lane
    complete = set()
    for batch in islice(loader, 80):
        segments = pairwise(batch["cu_seqlens"].tolist())
        for lane, keys in enumerate(batch["__key__"]):  # row q of lane q mod 4
            for key in keys:
                begin, end = next(segments)
                ids = batch["input_ids"].reshape(-1)[begin:end].tolist()
                assert batch["position_ids"].reshape(-1)[begin:end].tolist() == list(range(end - begin))
                assert batch["labels"].reshape(-1)[begin] == -100
                if not key.startswith("text"):
                    assert ids in [epoch[key] for epoch in whole]
                    complete.add(key)
                    continue
                copies, document = begun.setdefault((key, lane), []), whole[0][key]
                at = next(at for at in (*copies, 0) if document[at : at + len(ids)] == ids)
                if at:
                    copies.remove(at)
                if at + len(ids) < len(document):
                    copies.append(at + len(ids))
                else:
                    complete.add(key)
            if end < (lane + 1) * LENGTH:
                begin, end = next(segments)
                assert end == (lane + 1) * LENGTH
                assert set(batch["input_ids"].reshape(-1)[begin:end].tolist()) == {builder.vocabulary.eos}
    assert complete == whole[0].keys()
    assert all(len(copies) <= 2 for copies in begun.values())
    stats = loader.stats()
    assert stats["padding"] / (stats["tokens"] + stats["padding"]) < 0.1


def test_choices_change_with_the_epoch_of_each_source(data: Path) -> None:
    loader = build_loader(config(data), World())
    first, second = ({key: ids for batch in loader for key, ids, _ in unpadded(batch)} for _ in range(2))
    assert first.keys() == second.keys()
    assert 5 < sum(first[key] != second[key] for key in first if not key.startswith("text")) <= PAIRS
    assert all(first[key] == second[key] for key in first if key.startswith("text"))


def test_a_model_sees_in_a_packed_row_what_it_sees_in_each_sequence_alone(data: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    size = ExampleBuilder(sequences(data), 42, 8192).vocabulary.size
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=size, **shape)).eval()
    batch = next(batch for batch in build_loader(config(data, packing=True), World()) if len(batch["cu_seqlens"]) > 6)
    with torch.no_grad():
        packed = model(input_ids=batch["input_ids"], position_ids=batch["position_ids"], use_cache=False).logits
        bounds = batch["cu_seqlens"].tolist()
        alone = [model(input_ids=batch["input_ids"].reshape(1, -1)[:, a:b]).logits[0] for a, b in pairwise(bounds)]
        together = flatten(dict(batch))
        flat = model(input_ids=together["input_ids"], position_ids=together["position_ids"], use_cache=False).logits
    assert len(alone) > 4
    torch.testing.assert_close(packed.reshape(-1, size), torch.cat(alone), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(flat[0], torch.cat(alone), rtol=1e-4, atol=1e-4)
    assert (together["cu_seq_lens_q"].dtype, together["max_length_q"]) == (torch.int32, max(np.diff(bounds)))


def test_images_of_several_sizes_stand_in_one_batch(data: Path) -> None:
    batch = next(iter(build_loader(config(data, batch_size=PAIRS + TEXTS), World())))
    lengths = {key: sum(token >= 2003 for token in ids) for key, ids, _ in unpadded(batch) if not key.startswith("text")}
    assert set(lengths.values()) == {18, 36}


def test_an_image_that_fits_no_row_or_no_codebook_stops_the_run_or_is_replaced_and_counted(data: Path) -> None:
    small = sequences(data, max_length=56)
    with pytest.raises(FormatError, match=r"multi-0000\d+ needs rows of \d+ tokens for its images, max_length is 56"):
        list(build_loader(config(data, sequences=small), World()))
    with pytest.raises(FormatError, match="the codebook has 512 entries"):
        list(build_loader(config(data, sequences=sequences(data, codebook_size=512)), World()))
    for packing in (False, True):
        kept = config(data, sequences=small, on_error="substitute", max_bad=1000, packing=packing)
        loader = build_loader(kept, World())
        assert len(list(islice(loader, 20))) == 20
        assert loader.stats()["bad_too_long"] > 5


def test_what_packing_shortens_and_pads_is_counted_ahead_and_on_the_fly(data: Path, tmp_path: Path) -> None:
    make_dataset(tmp_path / "long", [image_sample(0)._replace(text="so it is " * 100), image_sample(1)], codes=PROVENANCE)
    url, settings = str(tmp_path / "long"), {"tokenizer": str(data / "tokenizer"), "unconditional_ratio": 0.0}
    output = str(tmp_path / "made")
    counts = pack(PackConfig(input=(url,), output=output, max_length=LENGTH, quiet=True, **settings)).source["counts"]
    assert counts["shortened"] == 1
    assert counts["padding"] + counts["tokens"] == 2 * LENGTH
    rows = SequenceConfig(max_length=LENGTH, **settings)
    loader = build_loader(LoaderConfig(sources=(Source(url),), sequences=rows, batch_size=2), World())
    (batch,) = loader
    stats = loader.stats()
    assert (stats["shortened"], stats["tokens"]) == (1, int(batch["attention_mask"].sum()))
    assert stats["padding"] == batch["input_ids"].numel() - stats["tokens"] > 0


def test_what_does_not_go_together_is_refused(data: Path, tmp_path: Path) -> None:
    bare = write_tokenizer(tmp_path / "bare", added=())
    rows = Source(str(data / "rows"))
    with pytest.raises(UsageError, match="no <boi>"):
        build_loader(config(data, sequences=sequences(data, tokenizer=str(bare))), World())
    with pytest.raises(UsageError, match="packing=True"):
        config(data, sequences=None, packing=True)
    with pytest.raises(UsageError, match="leave them out"):
        build_loader(config(data, sources=(rows,)), World())
    with pytest.raises(UsageError, match="can't be mixed"):
        build_loader(config(data, sources=(rows, Source(str(data / "texts"))), sequences=None), World())
    other = pack(
        PackConfig(
            input=(str(data / "texts"),),
            tokenizer=str(data / "tokenizer"),
            max_length=64,
            output=str(tmp_path / "rows"),
            quiet=True,
        )
    )
    assert other.samples
    with pytest.raises(UsageError, match="one version, length and vocabulary"):
        build_loader(config(data, sources=(rows, Source(str(tmp_path / "rows"))), sequences=None), World())


def test_states_of_other_rows_are_refused_with_what_differs(data: Path) -> None:
    packed, padded = build_loader(config(data, packing=True), World()), build_loader(config(data), World())
    next(iter(packed))
    state = packed.state_dict()
    with pytest.raises(UsageError, match="packing=True, the config has False"):
        padded.load_state_dict(state)
    with pytest.raises(UsageError, match="packing=False, the config has True"):
        packed.load_state_dict(padded.state_dict())
    other = build_loader(config(data, packing=True, sequences=sequences(data, t2i_ratio=0.9)), World())
    with pytest.raises(UsageError, match=r"t2i_ratio was 0\.5, is 0\.9"):
        other.load_state_dict(state)
    wrong = [[9, [0, 0, []]]], [[0, [0, 0, [[0, 0]]]]], [[0, [-1, 0, []]]], ["a"], {}, [[0, [0, 5, [[3, 0], [2, 0]]]]]
    for lanes in (*wrong, [[0, [0, 0, []]]] * 2):
        with pytest.raises(UsageError, match="lane cursors are invalid"):
            packed.load_state_dict({**state, "packing": {**state["packing"], "lanes": lanes}})
    with pytest.raises(TypeError, match="no end"):
        len(packed)
    with pytest.raises(UsageError, match="receipt"):
        packed.receipt()
    with pytest.raises(UsageError, match="differ in position"):
        merge_states([state, {**state, "position": 99}])


@pytest.mark.slow
def test_receipts_of_padded_rows_and_of_rows_packed_ahead_are_audited(data: Path, tmp_path: Path) -> None:
    settings = {
        "padded": config(data),
        "ahead": LoaderConfig(sources=(Source(str(data / "rows")),), batch_size=4, last_batch="short"),
    }
    for name, setting in settings.items():
        loader = build_loader(setting, World())
        list(loader)
        (tmp_path / f"{name}.json").write_text(json.dumps(loader.receipt()))
        assert wds_tools("audit", tmp_path / f"{name}.json", "--complete").stdout


@pytest.mark.slow
def test_workers_that_are_spawned_load_their_own_tokenizer(data: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loader = build_loader(config(data, packing=True, num_workers=1, start_method="spawn"), World())
        rows = [row for batch in islice(loader, 2) for row in rows_of(batch)]
        loader.close()
    here = build_loader(config(data, packing=True), World())
    assert rows == [row for batch in islice(here, 2) for row in rows_of(batch)]


def test_rows_packed_from_object_storage_are_the_same_and_nothing_is_fetched_twice(data: Path, s3: S3Server) -> None:
    total = 0
    for name, samples in (("pairs", pairs()), ("texts", texts())):
        manifest = make_dataset(f"s3://{s3.bucket}/rows/{name}", samples, shard_samples=9, codes=PROVENANCE)
        total += manifest.bytes
    sources = tuple(Source(f"s3://{s3.bucket}/rows/{name}") for name in ("pairs", "texts"))
    here = tuple(replace(source, url=str(data / source.url.rpartition("/")[2])) for source in sources)
    local = build_loader(config(data, sources=here, packing=True, shuffle=False), World())
    remote = build_loader(config(data, sources=sources, packing=True, shuffle=False, num_workers=1), World())
    expected, found = ([row for batch in islice(loader, 12) for row in rows_of(batch)] for loader in (local, remote))
    remote.close()
    assert found == expected
    stats = remote.stats()
    assert (stats["evicted"], stats["requests"] > 0) == (0, True)
    assert stats["bytes"] < 1.5 * total
