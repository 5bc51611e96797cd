"""build_loader: exactly once, one sequence on every topology, resumed from any state, and honest about what it did."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
from factory import make_dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing._internal.distributed.fake_pg import FakeStore

from loaders import Loader, LoaderConfig, ShardDataset, Source, TarDataset, World, build_loader
from loaders.config import LastBatch
from loaders.order.partition import BatchPartition
from loaders.testing import Topology, check_resume, run
from loaders.workers.steps import StepDataset, StepRequest
from wds_tools.errors import DataError, FormatError, NotFound, Reject, StorageError, UsageError
from wds_tools.format.schema import Sample


def pair(number: int, prefix: str = "p") -> Sample:
    grid_hw = np.random.default_rng(number).integers(0, 8192, (4, 4), dtype="<u2")
    return Sample(key=f"{prefix}-{number:05d}", data_type="image_text", text=f"{prefix} {number}", codes={"vqcode_512": grid_hw})


def document(number: int) -> Sample:
    return Sample(key=f"d-{number:05d}", data_type="text_pretrain", text=f"document {number} " * (number % 7 + 1))


def make_pairs(url: Path, count: int, shard_samples: int = 10, prefix: str = "p") -> str:
    make_dataset(url, [pair(number, prefix) for number in range(count)], shard_samples=shard_samples)
    return str(url)


def make_documents(url: Path, count: int, shard_samples: int = 7) -> str:
    make_dataset(url, [document(number) for number in range(count)], shard_samples=shard_samples)
    return str(url)


def keys(loader: Iterable[dict[str, Any]]) -> list[str]:
    return [key for batch in loader for key in batch["__key__"]]


def config(*sources: Source | str, batch_size: int = 4, **settings: Any) -> LoaderConfig:
    opened = tuple(source if isinstance(source, Source) else Source(source) for source in sources)
    return LoaderConfig(**{"sources": opened, "batch_size": batch_size, "last_batch": "short", **settings})


def loader(*sources: Source | str, rank: int = 0, world_size: int = 1, **settings: Any) -> Loader:
    return build_loader(config(*sources, **settings), World(rank=rank, world_size=world_size))


TOPOLOGIES = [Topology(8), Topology(5, 2), Topology(8, 4), Topology(7, 7), Topology(11, 3)]


@pytest.mark.parametrize(
    ("count", "shard_samples", "every"),
    [
        pytest.param(60, 1, 1, marks=pytest.mark.slow),
        pytest.param(61, 10, 1, marks=pytest.mark.slow),
        (61, 10, 6),
        (13, 5, 1),
        (3, 2, 1),
    ],
)
def test_a_state_saved_anywhere_goes_on_on_any_topology(tmp_path: Path, count: int, shard_samples: int, every: int) -> None:
    url = make_pairs(tmp_path / "set", count, shard_samples)

    def make(topology: Topology, world: World) -> Loader:
        return build_loader(config(url, batch_size=topology.batch_size), world)

    order = check_resume(make, TOPOLOGIES, every=every)
    assert sorted(order) == [f"p-{number:05d}" for number in range(count)]


@pytest.mark.slow
def test_a_mixture_with_a_schedule_goes_on_on_any_topology(tmp_path: Path) -> None:
    pairs, documents = make_pairs(tmp_path / "pairs", 23, 5), make_documents(tmp_path / "documents", 41)
    tiny = make_pairs(tmp_path / "tiny", 2, 1, "t")

    def make(topology: Topology, world: World) -> Loader:
        sources = Source(pairs, weight=0.5), Source(documents, weight=0.4), Source(tiny, weight=0.1)
        # The schedule counts in steps of the first run's batch size: here always 4.
        schedule = (
            ((3 * 4 // topology.batch_size or 1, (0.2, 0.2, 0.6)),) if topology.batch_size == 4 else ((3, (0.2, 0.2, 0.6)),)
        )
        made = config(*sources, batch_size=topology.batch_size, schedule=schedule, stop_at=97)
        return build_loader(made, world)

    order = check_resume(make, [Topology(4), Topology(4, 2), Topology(4, 4)])
    assert len(order) == 97
    saved = build_loader(
        config(
            Source(pairs, weight=0.5),
            Source(documents, weight=0.4),
            Source(tiny, weight=0.1),
            schedule=((3, (0.2, 0.2, 0.6)),),
            stop_at=97,
        ),
        World(),
    )
    found, states = run(lambda *_: saved, Topology(4), None, lambda batch: batch["__key__"])
    for seen, state in states[:-1]:
        for topology in TOPOLOGIES:
            rest, _ = run(make, topology, state, lambda batch: batch["__key__"])
            assert (found[:seen] + rest)[:97] == order
            assert len(rest) in (97 - seen, topology.world_size)


@pytest.mark.slow
def test_worker_processes_read_the_same_sequence_and_resume_into_any_number(tmp_path: Path) -> None:
    url = make_pairs(tmp_path / "set", 90, 10)
    topologies = [Topology(8), Topology(8, 1, 2), Topology(10, 2, 2)]
    check_resume(
        lambda topology, world: build_loader(
            config(url, batch_size=topology.batch_size, num_workers=topology.num_workers), world
        ),
        topologies,
        every=7,
    )


@settings(max_examples=12, deadline=None)
@given(st.data())
def test_an_epoch_has_every_sample_once_over_any_ranks(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    count = data.draw(st.integers(1, 40))
    url = make_pairs(tmp_path_factory.mktemp("once") / "set", count, data.draw(st.integers(1, 12)))
    world_size = data.draw(st.integers(1, 9))
    batch_size = data.draw(st.integers(world_size, 40))
    for _ in range(2):
        found, _ = run(
            lambda topology, world: build_loader(config(url, batch_size=topology.batch_size), world),
            Topology(batch_size, world_size),
            None,
            lambda batch: batch["__key__"],
        )
        assert sorted(found[:count]) == [f"p-{number:05d}" for number in range(count)]
        assert len(found) == max(count, world_size)


def test_a_batch_has_texts_types_sources_and_one_tensor_of_codes(tmp_path: Path) -> None:
    url = make_pairs(tmp_path / "set", 20)
    batch = next(iter(loader(Source(url, name="pairs"), batch_size=6)))
    assert list(batch) == ["__key__", "__source__", "data_type", "text", "codes"]
    assert batch["__source__"] == ["pairs"] * 6
    assert batch["data_type"] == ["image_text"] * 6
    assert batch["codes"].dtype == torch.int32
    for key, text, codes_hw in zip(batch["__key__"], batch["text"], batch["codes"], strict=True):
        expected = pair(int(key[2:]))
        assert (key, text) == (expected.key, expected.text)
        assert np.array_equal(codes_hw.numpy(), expected.codes["vqcode_512"])


def test_grids_that_differ_come_as_a_list_and_documents_as_none(tmp_path: Path) -> None:
    wide = np.arange(10, dtype="<u4").reshape(2, 5)
    samples = [pair(1), document(2), Sample(key="w", data_type="image_text_multi", text="w", codes={"vqcode_multi768": wide})]
    make_dataset(tmp_path / "set", samples)
    for num_workers in (0, 1):
        batch = next(iter(loader(str(tmp_path / "set"), batch_size=3, num_workers=num_workers)))
        found = dict(zip(batch["__key__"], batch["codes"], strict=True))
        assert found["d-00002"] is None
        assert found["w"].tolist() == wide.tolist()
        assert found["p-00001"].shape == (4, 4)


def test_a_batch_of_documents_has_no_codes(tmp_path: Path) -> None:
    assert "codes" not in next(iter(loader(make_documents(tmp_path / "set", 9))))


def test_images_and_conversations_come_along(tmp_path: Path) -> None:
    turns = [{"from": "human", "value": "what?"}, {"from": "gpt", "value": "a cat"}]
    samples = [
        Sample(key="a", data_type="image_text", text="a", image=b"jpeg bytes", image_extension="jpg"),
        Sample(key="b", data_type="visual_sft", text="", conversations=turns),
    ]
    make_dataset(tmp_path / "set", samples)
    batch = next(iter(loader(str(tmp_path / "set"), batch_size=2)))
    assert dict(zip(batch["__key__"], batch["image"], strict=True)) == {"a": b"jpeg bytes", "b": None}
    assert dict(zip(batch["__key__"], batch["conversations"], strict=True)) == {"a": None, "b": turns}


def test_epochs_follow_each_other_in_other_orders_with_and_without_workers(tmp_path: Path) -> None:
    url = make_pairs(tmp_path / "set", 50)
    for num_workers in (0, 2):
        made = loader(url, num_workers=num_workers)
        epochs = [keys(made) for _ in range(3)]
        assert made.epoch == 3
        assert len({tuple(epoch) for epoch in epochs}) == 3
        assert len({tuple(sorted(epoch)) for epoch in epochs}) == 1
        made.close()


def test_a_loop_that_was_left_goes_on_where_it_stopped(tmp_path: Path) -> None:
    url = make_pairs(tmp_path / "set", 50)
    whole = keys(loader(url))
    for num_workers in (0, 2):
        made = loader(url, num_workers=num_workers)
        found = []
        for number, batch in enumerate(made):
            found += batch["__key__"]
            if number == 3:
                break
        assert len(made) == 9
        found += keys(made)
        assert found == whole
        made.close()


def test_what_was_prefetched_and_not_handed_over_does_not_count(tmp_path: Path) -> None:
    made = loader(make_pairs(tmp_path / "set", 50), num_workers=2)
    iterator = iter(made)
    next(iterator)
    assert made.state_dict()["position"] == made.position == 4
    made.close()


@pytest.mark.parametrize(("last_batch", "steps", "seen"), [("drop", 4, 40), ("short", 5, 43), ("wrap", 5, 50)])
@pytest.mark.parametrize("world_size", [1, 3])
def test_the_tail_is_dropped_dealt_out_or_filled_up(
    tmp_path: Path, last_batch: Any, steps: int, seen: int, world_size: int
) -> None:
    url = make_pairs(tmp_path / "set", 43)
    ranks = [loader(url, batch_size=10, last_batch=last_batch, rank=rank, world_size=world_size) for rank in range(world_size)]
    assert {len(rank) for rank in ranks} == {steps}
    found = [[batch["__key__"] for batch in rank] for rank in ranks]
    assert {len(batches) for batches in found} == {steps}
    flat = Counter(key for batches in found for batch in batches for key in batch)
    assert flat.total() == seen
    assert len(flat) == min(seen, 43)
    assert sum(rank.stats()["dropped"] for rank in ranks[:1]) == (3 if last_batch == "drop" else 0)
    if last_batch == "wrap":
        second = [key for batch in loader_at(url, 1) for key in batch["__key__"]]
        assert sorted(key for key, count in flat.items() if count == 2) == sorted(second[:7])


def loader_at(url: str, epoch: int) -> Loader:
    made = loader(url, batch_size=10)
    made.load_state_dict({**made.state_dict(), "position": epoch * made.num_samples})
    return made


@settings(deadline=None)
@given(st.integers(1, 200), st.integers(0, 199), st.integers(1, 20), st.integers(0, 19), st.sampled_from(get_args(LastBatch)))
def test_no_batch_of_any_world_is_empty_and_what_is_left_is_handed_out_once(
    length: int, start: int, world_size: int, more: int, last_batch: Any
) -> None:
    start, batch_size = start % length, world_size + more
    left = length - start
    steps = BatchPartition(length, start, batch_size, last_batch, world_size)
    parts = [[steps.part(step, rank) for rank in range(world_size)] for step in range(len(steps))]
    assert all(low < high for step in parts for low, high in step)
    handed = [position for step in parts for part in step for position in range(*part)]
    assert handed == list(range(start, start + len(handed)))
    if last_batch == "short":
        assert len(handed) == max(left, world_size)
        assert all(steps.end(step) - steps.part(step, 0)[0] < batch_size + world_size for step in range(len(steps)))
        assert len(steps) in (-(-left // batch_size), max(left // batch_size, 1))
    else:
        assert len(handed) == (left - steps.dropped if last_batch == "drop" else -(-left // batch_size) * batch_size)


def test_less_than_a_sample_for_each_rank_goes_with_the_step_before_or_is_made_up(tmp_path: Path) -> None:
    url = make_pairs(tmp_path / "set", 12)
    ranks = [loader(url, batch_size=5, rank=rank, world_size=4) for rank in range(4)]
    assert [[len(batch["__key__"]) for batch in rank] for rank in ranks] == [[1, 1], [1, 2], [1, 2], [2, 2]]
    few = make_pairs(tmp_path / "few", 2)
    ranks = [loader(few, batch_size=5, rank=rank, world_size=5) for rank in range(5)]
    for _ in range(2):
        assert [[len(batch["__key__"]) for batch in rank] for rank in ranks] == [[1]] * 5


def test_sources_without_weights_are_one_pool_that_is_seen_once(tmp_path: Path) -> None:
    pairs, documents = make_pairs(tmp_path / "pairs", 30), make_documents(tmp_path / "documents", 20)
    made = loader(Source(pairs, repeat=2, name="pairs"), Source(documents, name="documents"))
    counts: Counter[tuple[str, str]] = Counter()
    for batch in made:
        counts.update(zip(batch["__source__"], batch["__key__"], strict=True))
    assert len(counts) == 50
    assert {(source, count) for (source, _), count in counts.items()} == {("pairs", 2), ("documents", 1)}
    assert {key[0] for source, key in counts if source == "documents"} == {"d"}


@pytest.mark.parametrize("limit", [{"max_samples": 12}, {"fraction": 0.3}])
def test_a_part_of_a_source_is_the_same_part_every_epoch(tmp_path: Path, limit: dict[str, Any]) -> None:
    url = make_pairs(tmp_path / "set", 40)
    made = loader(Source(url, **limit))
    epochs = [keys(made) for _ in range(2)]
    assert len(epochs[0]) == 12
    assert sorted(epochs[0]) == sorted(epochs[1])
    assert epochs[0] != epochs[1]


@pytest.mark.parametrize("limit", [{"max_samples": 12}, {"fraction": 0.3}, {"fraction": 1.0}])
def test_a_part_of_a_source_is_repeated_as_often_as_the_source(tmp_path: Path, limit: dict[str, Any]) -> None:
    url = make_pairs(tmp_path / "set", 40)
    seen = Counter(keys(loader(Source(url, repeat=3, **limit))))
    assert set(seen) == set(keys(loader(Source(url, **limit))))
    assert set(seen.values()) == {3}


def test_a_part_larger_than_the_source_is_refused_however_often_it_is_repeated(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"max_samples=41 is not in 1 \.\.\. 40"):
        loader(Source(make_pairs(tmp_path / "set", 40), repeat=2, max_samples=41))


def test_a_mixture_ends_when_the_first_or_the_last_source_was_seen(
    tmp_path: Path, lanes_per_sample: Callable[[int], None]
) -> None:
    lanes_per_sample(2)
    pairs, documents = make_pairs(tmp_path / "pairs", 20), make_documents(tmp_path / "documents", 60)
    sources = Source(pairs, weight=0.5), Source(documents, weight=0.5)
    first = Counter(keys(loader(*sources)))
    assert sum(key.startswith("p") for key in first) == 20
    assert first.total() - len(first) < 8  # a lane may be ahead of the others, in its source's next epoch
    assert all(count == 1 for key, count in first.items() if key.startswith("d"))
    last = Counter(keys(loader(*sources, stop_at="all_exhausted")))
    assert sum(key.startswith("d") for key in last) == 60
    assert sum(count for key, count in last.items() if key.startswith("d")) - 60 < 8
    assert {count for key, count in last.items() if key.startswith("p")} <= {2, 3, 4}
    assert len(keys(loader(*sources, stop_at=33))) == 33


def test_a_source_may_be_left_off_before_it_was_seen_in_full(tmp_path: Path) -> None:
    sources = Source(make_pairs(tmp_path / "pairs", 50), weight=1), Source(make_documents(tmp_path / "documents", 1000), weight=1)
    schedule = ((20, (1.0, 0.0)),)
    found = Counter(keys(loader(*sources, schedule=schedule)))
    assert sum(key.startswith("p") for key in found) == 50
    assert sum(key.startswith("d") for key in found) == 40
    with pytest.raises(UsageError, match=r"source 1 is never seen in full: .*: stop_at=NUMBER"):
        loader(*sources, schedule=schedule, stop_at="all_exhausted")


def test_of_two_sources_with_the_same_data_the_one_that_is_left_goes_on(tmp_path: Path) -> None:
    url = make_documents(tmp_path / "set", 60)
    one, two = Source(url, weight=1, name="one"), Source(url, weight=3, name="two")
    first = loader(one, two)
    seen = [
        key
        for batch in islice(first, 10)
        for source, key in zip(batch["__source__"], batch["__key__"], strict=True)
        if source == "two"
    ]
    second = loader(two)
    second.load_state_dict(first.state_dict(), change="future")
    seen += keys(islice(second, (60 - len(seen)) // 4 - 2))
    assert len(seen) == len(set(seen)) > 45


def test_codes_of_two_tokenizers_in_one_source_are_chosen_or_refused(tmp_path: Path) -> None:
    pairs = [pair(number) for number in range(8)]
    pairs[4:] = [one._replace(codes={"vqcode_512-b": one.codes["vqcode_512"]}) for one in pairs[4:]]
    codes = {name: {"tokenizer": name, "codebook_size": 8192} for name in ("vqcode_512", "vqcode_512-b")}
    url = str(tmp_path / "set")
    make_dataset(url, pairs, codes=codes, shard_samples=4)
    with pytest.raises(UsageError, match=r"samples with vqcode_512-b.npy beside others with vqcode_512.npy: codes of diff"):
        keys(loader(url))
    grids = [grid for batch in loader(Source(url, code_set="b")) for grid in batch.get("codes", [None] * 4)]
    assert sum(grid is not None for grid in grids) == 4


def test_a_mixture_goes_on_through_its_sources_over_its_own_epochs(
    tmp_path: Path, lanes_per_sample: Callable[[int], None]
) -> None:
    lanes_per_sample(1)
    pairs, documents = make_pairs(tmp_path / "pairs", 20), make_documents(tmp_path / "documents", 60)
    made = loader(Source(pairs, weight=1), Source(documents, weight=1), stop_at=40)
    found = Counter(key for _ in range(3) for key in keys(made))
    assert {count for key, count in found.items() if key.startswith("d")} == {1}
    assert {count for key, count in found.items() if key.startswith("p")} == {3}


def test_weights_that_are_rounded_by_more_than_a_hundredth_are_warned_of(tmp_path: Path) -> None:
    often, rare = make_pairs(tmp_path / "often", 40), make_pairs(tmp_path / "rare", 40)
    with pytest.warns(UserWarning, match=r"rounded: by 4\.7% of a weight; write fewer digits"):
        loader(Source(often, weight=1), Source(rare, weight=1.00123e-5), stop_at=400)
    loader(Source(often, weight=0.123456789), Source(rare, weight=1), stop_at=400)  # a warning would be an error


def test_workers_that_share_lanes_are_warned_of_with_what_they_fetch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("loaders.reading.planner.SMALL_BYTES", 0)
    make_dataset("memory://sets/shared", [pair(number) for number in range(40)], shard_samples=5)
    with pytest.warns(UserWarning, match=r"num_workers=3, .* is read by 3\.0 processes, .* num_workers of 1, 2, 4, 8 keep"):
        loader("memory://sets/shared", num_workers=3)
    kept = loader("memory://sets/shared", num_workers=4)  # a warning would be an error
    with pytest.warns(UserWarning, match=r"batch_size=5: each of the 32 lanes .* a batch_size that divides them"):
        loader("memory://sets/shared", batch_size=5, world_size=2).load_state_dict(kept.state_dict())


@pytest.mark.parametrize("last_batch", ["drop", "short", "wrap"])
@pytest.mark.parametrize("num_workers", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_a_run_ends_with_its_last_epoch_and_fetches_nothing_of_another(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, last_batch: Any, num_workers: int
) -> None:
    monkeypatch.setattr("loaders.reading.planner.SMALL_BYTES", 0)
    monkeypatch.setattr("loaders.order.plan.SMALL_BYTES", 0)
    url = str(tmp_path)  # workers do not see what is in memory
    make_dataset(url, [pair(number) for number in range(70)], shard_samples=5)
    settings: dict[str, Any] = {
        "num_workers": num_workers,
        "last_batch": last_batch,
        "start_method": "fork" if num_workers else None,
    }
    endless = loader(url, **settings)
    twice = [keys(endless) for _ in range(2)]
    made = loader(url, epochs=2, **settings)
    sizes = [len(made)]
    read = []
    for _ in range(3):
        read.append(keys(made))
        sizes.append(len(made))
    assert read == [*twice, []]
    assert sizes == [len(twice[0]) // 4 + (last_batch == "short")] * 2 + [0, 0]
    assert (made.epoch, made.position) == (2, 0)
    again = loader(url, epochs=2, **settings)
    again.load_state_dict(made.state_dict())
    assert keys(again) == []
    for each in (endless, made, again):
        each.close()


def test_nothing_of_a_next_epoch_is_asked_for_behind_the_last() -> None:
    make_dataset("memory://sets/last", [pair(number) for number in range(70)], shard_samples=5)
    dataset = loader("memory://sets/last", epochs=2)._pool._dataset
    steps = BatchPartition(70, 0, 4, "drop", 1)
    upcoming = [list(dataset._upcoming(StepRequest(epoch, steps, 0, 1, 1))) for epoch in (0, 1)]
    assert [{positions.epoch for positions in each} for each in upcoming] == [{0, 1}, {1}]


def test_moved_data_goes_on_and_changed_data_is_refused(tmp_path: Path) -> None:
    url = make_pairs(tmp_path / "set", 30)
    made = loader(url)
    iterator = iter(made)
    before = [next(iterator)["__key__"] for _ in range(3)]
    state = made.state_dict()
    shutil.copytree(url, tmp_path / "moved")
    moved = loader(str(tmp_path / "moved"))
    moved.load_state_dict(state)
    assert [key for batch in before for key in batch] + keys(moved) == keys(loader(url))
    other = loader(make_pairs(tmp_path / "other", 31))
    with pytest.raises(UsageError, match=r"other data: .*30 samples.*31"):
        other.load_state_dict(state)
    with pytest.raises(UsageError, match="1 sources, the config has 2"):
        loader(url, str(tmp_path / "moved")).load_state_dict(state)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"seed": 7}, "seed was 42, is 7"),
        ({"shuffle": False}, "shuffle was True, is False"),
        ({"sources": {"repeat": 2}}, "repeat of source 0 was 1, is 2"),
        ({"sources": {"max_samples": 10}}, "max_samples of source 0 was None, is 10"),
        ({"sources": {"weight": 1.0}}, r"schedule was \[\], is \[\[0, \[1.0\]\]\]"),
    ],
)
def test_a_state_of_another_order_is_refused_with_what_differs(tmp_path: Path, change: dict[str, Any], says: str) -> None:
    url = make_pairs(tmp_path / "set", 30)
    state = loader(url).state_dict()
    source = Source(url, **change.pop("sources", {}))
    with pytest.raises(UsageError, match=says):
        loader(source, **change).load_state_dict(state)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"version": 99}, "version 99"),
        ({"order_version": 0}, "order version 0"),
        ({"position": -1}, "position is -1, expected a whole number from 0 to"),
        ({"step": "1"}, "step is '1', expected a whole number"),
        ({"starts": []}, "starts are not"),
        ({"starts": [[0, 0, 4, 1, "drop"], [9, 3, 4, 1, "drop"], [8, 2, 4, 1, "drop"]]}, "3 starts are not"),
        ({"starts": [[0, 0, 4, 1, "drop"]] * (1 << 16 | 1)}, "65,537 starts are not"),
        ({"starts": [[0, 0, 0, 1, "drop"]]}, "expected a whole number from 1"),
        ({"skips": [[1, 2]] * 1025}, "1,025 skips"),
        ({"generations": []}, "expected 1 to 256"),
        ({"generations": [{}] * 257}, "257, expected 1 to 256"),
        ({"generations": [{}]}, "not the state"),
        ({"generations": None}, "not the state"),
    ],
)
def test_what_is_no_state_is_refused(tmp_path: Path, change: dict[str, Any], says: str) -> None:
    made = loader(make_pairs(tmp_path / "set", 30))
    with pytest.raises(UsageError, match=says):
        made.load_state_dict({**made.state_dict(), **change})
    with pytest.raises(UsageError, match="not the state"):
        made.load_state_dict({})


def test_a_state_is_small_json_whatever_was_read(tmp_path: Path) -> None:
    made = loader(make_pairs(tmp_path / "set", 30))
    keys(made)
    state = made.state_dict()
    assert json.loads(json.dumps(state)) == state
    assert len(json.dumps(state)) < 1000
    assert (state["position"], state["step"], state["starts"]) == (30, 8, [[0, 0, 4, 1, "short"]])


def test_a_loop_that_is_overtaken_by_another_says_so(tmp_path: Path) -> None:
    made = loader(make_pairs(tmp_path / "set", 30))
    one, other = iter(made), iter(made)
    next(one)
    next(other)
    with pytest.raises(UsageError, match="another loop"):
        next(one)


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("end", [Loader.close, lambda made: made.load_state_dict(made.state_dict())])
def test_a_loop_whose_loader_is_closed_or_restored_within_says_so(tmp_path: Path, end: Any, num_workers: int) -> None:
    url = make_pairs(tmp_path / "set", 30)
    made = loader(url, num_workers=num_workers)
    loop = iter(made)
    seen = list(next(loop)["__key__"])
    end(made)
    with pytest.raises(UsageError, match="began: begin again"):
        next(loop)
    assert seen + keys(made) == keys(loader(url))
    made.close()


@pytest.mark.parametrize("num_workers", [0, 2])
def test_the_trainers_random_numbers_are_left_alone(tmp_path: Path, num_workers: int) -> None:
    made = loader(make_pairs(tmp_path / "set", 30), num_workers=num_workers)
    torch.manual_seed(3)
    before = torch.get_rng_state()
    for _ in range(2):
        keys(made)
    made.close()
    assert torch.equal(torch.get_rng_state(), before)


def test_weights_may_be_numpys(tmp_path: Path) -> None:
    pairs, documents = make_pairs(tmp_path / "pairs", 20), make_documents(tmp_path / "documents", 20)
    half, one = np.float64(0.5), np.float64(1)
    made = loader(Source(pairs, weight=half), Source(documents, weight=half), schedule=((2, (one, half)),))
    made.load_state_dict(json.loads(json.dumps(made.state_dict())))


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"batch_size": 0}, "batch_size=0"),
        ({"batch_size": 4.0}, r"batch_size=4\.0, expected an int"),
        ({"batch_size": np.int64(4)}, "batch_size=.*4.*, expected an int"),
        ({"seed": "42"}, "seed='42', expected an int"),
        ({"last_batch": "cut"}, "last_batch='cut'"),
        ({"on_error": "skip"}, "on_error='skip'"),
        ({"seed": -1}, "seed=-1"),
        ({"epochs": 0}, "epochs=0, expected an int of 1 or more"),
        ({"num_workers": -1}, "num_workers=-1, expected an int of 0 or more"),
        ({"memory_bytes": 4e9}, "memory_bytes=4000000000.0, expected an int"),
        ({"stop_at": 5}, "stop_at=5 is for sources with weights"),
        ({"schedule": ((3, (1.0,)),)}, "schedule of weights needs"),
        ({"sources": ()}, "one or more Source"),
        ({"sources": Source("x")}, "one or more Source"),
    ],
)
def test_settings_that_make_no_sense_are_refused(tmp_path: Path, settings: dict[str, Any], says: str) -> None:
    with pytest.raises(UsageError, match=says):
        LoaderConfig(**{"sources": (Source("x"),), "batch_size": 4, **settings})


@pytest.mark.parametrize(
    ("source", "says"),
    [
        ({"weight": -1.0}, "weight=-1"),
        ({"repeat": 0}, "repeat=0"),
        ({"max_samples": 0}, "max_samples=0"),
        ({"max_samples": 2.5}, r"max_samples=2\.5, expected an int"),
        ({"url": Path("x")}, "a PosixPath, expected a string"),
        ({"fraction": 1.5}, "fraction=1.5"),
        ({"fraction": 0.5, "max_samples": 3}, "not both"),
    ],
)
def test_a_source_that_makes_no_sense_is_refused(source: dict[str, Any], says: str) -> None:
    with pytest.raises(UsageError, match=says):
        Source(**{"url": "x", **source})


def test_weights_are_for_all_or_none_and_a_batch_has_one_for_each_rank(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="some have none"):
        config(Source("x", weight=1), Source("y"))
    url = make_pairs(tmp_path / "set", 30)
    with pytest.raises(UsageError, match="batch_size=4 is less"):
        loader(url, world_size=5)
    with pytest.raises(UsageError, match="30 samples is less than a batch of 31"):
        loader(url, batch_size=31, last_batch="drop")
    with pytest.raises(NotFound, match="wds-tools index"):
        loader(str(tmp_path))


def test_the_world_is_that_of_torchrun_or_one_process() -> None:
    assert World.detect({}) == World(rank=0, world_size=1)
    assert World.detect({"RANK": "3", "WORLD_SIZE": "8"}) == World(rank=3, world_size=8)
    for environment in ({"RANK": "3"}, {"WORLD_SIZE": "3"}, {"RANK": "x", "WORLD_SIZE": "8"}):
        with pytest.raises(UsageError, match="RANK"):
            World.detect(environment)
    with pytest.raises(UsageError, match="rank=8"):
        World(rank=8, world_size=8)


@pytest.mark.parametrize("name", ["SLURM_NTASKS", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE"])
def test_several_processes_without_ranks_are_no_world_of_one(name: str) -> None:
    assert World.detect({name: "1"}) == World()
    assert World.detect({name: "2", "RANK": "1", "WORLD_SIZE": "2"}) == World(rank=1, world_size=2)
    with pytest.raises(UsageError, match=rf"{name}=2 without RANK: .*World\(rank=\.\.\., world_size=\.\.\.\)"):
        World.detect({name: "2"})


@pytest.fixture
def late_group(tmp_path: Path) -> Iterator[Callable[[], None]]:
    """Sets up a process group that says rank 1 of 2; it never communicates, so one process is enough."""

    def init() -> None:
        torch.distributed.init_process_group("fake", store=FakeStore(), rank=1, world_size=2)

    yield init
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


Make = Callable[[str, World | None], Any]
MAKERS: dict[str, Make] = {
    "build_loader": lambda url, world: build_loader(LoaderConfig(sources=(Source(url),), batch_size=2), world),
    "ShardDataset": lambda url, world: ShardDataset(url, **named(world)),
    "TarDataset": lambda url, world: TarDataset(url, **named(world)),
}


def named(world: World | None) -> dict[str, int]:
    return {} if world is None else {"rank": world.rank, "world_size": world.world_size}


@pytest.mark.parametrize("kind", MAKERS)
def test_a_world_that_was_detected_is_compared_with_a_group_that_came_later(
    tmp_path: Path, late_group: Callable[[], None], kind: str
) -> None:
    url = make_pairs(tmp_path / "set", 30)
    make = MAKERS[kind]
    early, on_purpose = make(url, None), make(url, World())
    late_group()
    with pytest.raises(UsageError, match=r"rank 0 of 1, torch\.distributed says rank 1 of 2: make it after init_process"):
        next(iter(early))
    if kind != "build_loader":
        with pytest.raises(UsageError, match="says rank 1 of 2"):  # on its way to a worker that is not forked
            pickle.dumps(early)
    next(iter(on_purpose))
    late = make(url, None)
    next(iter(late))


def test_half_a_world_is_refused(tmp_path: Path) -> None:
    url = make_pairs(tmp_path / "set", 3)
    for dataset in (ShardDataset, TarDataset):
        for half in ({"rank": 1}, {"world_size": 2}):
            with pytest.raises(UsageError, match="give both"):
                dataset(url, **half)


def damage(url: str, key: str, old: bytes, new: bytes) -> None:
    """Change the first `old` behind a key's header in its shard."""
    for path in Path(url).glob("*.tar"):
        data = path.read_bytes()
        at = data.find(f"{key}.json".encode())
        if at >= 0:
            at = data.index(old, at)
            path.write_bytes(data[:at] + new + data[at + len(old) :])
            return
    raise AssertionError(f"no {key}")


def test_an_unreadable_sample_stops_the_run_with_where_it_lies(tmp_path: Path) -> None:
    url = make_pairs(tmp_path / "set", 30)
    damage(url, "p-00013", b'{"data_type"', b'["data_type"')
    made = loader(url)
    with pytest.raises(FormatError, match=r"(?s)shard-000000-0001\.tar, sample 3 at byte \d+.*epoch 0, position \d+") as caught:
        keys(made)
    assert "on_error='substitute'" in str(caught.value)
    assert made.state_dict()["position"] == made.position


@pytest.mark.parametrize("num_workers", [0, 1])
def test_an_error_keeps_its_type_and_its_arguments_and_says_where_the_run_stands(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, num_workers: int
) -> None:
    def fetch(*_: Any) -> None:
        raise Reject("a_reason", "of two arguments")

    monkeypatch.setattr(StepDataset, "fetch", fetch)
    made = loader(make_pairs(tmp_path / "set", 30), num_workers=num_workers, start_method="fork" if num_workers else None)
    with pytest.raises(Reject, match="Everything before epoch 0, position 0 was handed over") as caught:
        next(iter(made))
    assert caught.value.args == ("a_reason", "of two arguments")
    made.close()


@pytest.mark.parametrize("num_workers", [0, 2])
def test_an_unreadable_sample_is_replaced_by_the_next_of_its_shard_when_asked(tmp_path: Path, num_workers: int) -> None:
    whole = keys(loader(make_pairs(tmp_path / "good", 30)))
    url = make_pairs(tmp_path / "set", 30)
    damage(url, "p-00019", b"NUMPY", b"NOMPY")  # the last of its shard: the first steps in
    made = loader(url, on_error="substitute", num_workers=num_workers)
    assert keys(made) == ["p-00010" if key == "p-00019" else key for key in whole]
    assert [(bad["sample_index"], bad["substitute_index"]) for bad in made.receipt()["substitutions"]] == [(9, 0)]
    made.close()


def test_a_shard_without_a_readable_sample_stops_the_run_all_the_same(tmp_path: Path) -> None:
    url = make_pairs(tmp_path / "set", 3)
    for key in ("p-00000", "p-00001", "p-00002"):
        damage(url, key, b"NUMPY", b"NOMPY")
    with pytest.raises(FormatError, match="nor can any of the next 2 of its shard"):
        keys(loader(url, on_error="substitute"))


def test_bad_samples_are_counted_by_reason_and_bounded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lanes_per_sample: Callable[[int], None]
) -> None:
    lanes_per_sample(1)
    monkeypatch.setattr("loaders.order.plan.SMALL_BYTES", 0)
    url = make_pairs(tmp_path / "set", 30)
    damage(url, "p-00013", b"NUMPY", b"NOMPY")
    damage(url, "p-00025", b'{"data_type"', b"{'data_type'")
    whole = keys(loader(make_pairs(tmp_path / "good", 30)))
    made = loader(url, on_error="substitute")
    found = keys(made)
    assert len(found) == 30
    assert [one for one, other in zip(found, whole, strict=True) if one == other] == [
        key for key in whole if key not in ("p-00013", "p-00025")
    ]
    stats = made.stats()
    assert (stats["bad"], stats["bad_format"], stats["bad_json"]) == (2, 1, 1)
    substitutions = made.receipt()["substitutions"]
    assert sorted((bad["shard"], bad["sample_index"], bad["reason"]) for bad in substitutions) == [
        (1, 3, "format"),
        (2, 5, "json"),
    ]
    assert keys(loader(url, on_error="substitute")) == found
    with pytest.raises(DataError, match="2 unreadable samples, max_bad=1"):
        keys(loader(url, on_error="substitute", max_bad=1))


def test_a_flipped_bit_is_found_by_the_crc_when_asked(tmp_path: Path) -> None:
    url = make_pairs(tmp_path / "set", 30)
    damage(url, "p-00013", b"p 13", b"p 14")
    assert len(keys(loader(url))) == 30
    with pytest.raises(FormatError, match=r"shard-000000-0001\.tar, sample 3 at byte .* CRC-32"):
        keys(loader(url, check_crc=True))


def test_a_truncated_shard_and_a_missing_one_are_named(tmp_path: Path) -> None:
    url = make_pairs(tmp_path / "set", 30)
    shard = Path(url) / "shard-000000-0001.tar"
    os.truncate(shard, shard.stat().st_size - 512)
    with pytest.raises(FormatError, match=r"shard-000000-0001\.tar: \d+ bytes, the manifest says"):
        keys(loader(url))
    shard.unlink()
    with pytest.raises(StorageError, match=r"shard-000000-0001\.tar"):
        keys(loader(url, num_workers=1))


def test_statistics_are_a_plain_dict_of_numbers(tmp_path: Path) -> None:
    made = loader(make_pairs(tmp_path / "set", 30))
    keys(made)
    stats = made.stats()
    assert (stats["epoch"], stats["batches"], stats["samples"], stats["bad"]) == (1, 8, 30, 0)
    assert 0 <= stats["wait_p50_s"] <= stats["wait_p99_s"]
    assert all(isinstance(value, int | float) for value in stats.values())


def test_less_memory_reads_more_often_and_never_changes_the_order(
    monkeypatch: pytest.MonkeyPatch, lanes_per_sample: Callable[[int], None]
) -> None:
    lanes_per_sample(4)
    monkeypatch.setattr("loaders.order.plan.SMALL_BYTES", 0)
    monkeypatch.setattr("loaders.reading.planner.SMALL_BYTES", 0)
    monkeypatch.setattr("loaders.order.plan.MIN_BLOCK_BYTES", 16384)
    make_dataset("memory://sets/less", [pair(number) for number in range(300)], shard_samples=50)
    whole = loader("memory://sets/less")
    order = keys(whole)
    assert sorted(order) == [f"p-{number:05d}" for number in range(300)]
    with pytest.raises(UsageError, match=r"memory_bytes=20,000 does not hold .* 16 lanes .*: give it 349,526"):
        keys(loader("memory://sets/less", memory_bytes=20_000))
    tight = loader("memory://sets/less", memory_bytes=20_000, scarce_memory=True)
    assert keys(tight) == order
    assert tight.stats()["requests"] > whole.stats()["requests"]
    assert (whole.stats()["evicted"], tight.stats()["evicted"] > 0) == (0, True)


def test_select_on_several_ranks_is_refused_since_they_would_end_at_different_steps(tmp_path: Path) -> None:
    url = make_pairs(tmp_path / "set", 31)
    kept = [sample["__key__"] for sample in ShardDataset(url).map(dict).select(lambda sample: sample["__key__"][-1] in "05")]
    assert len(kept) == 7
    with pytest.raises(UsageError, match=r"on 2 ranks: .*`wds-tools select`"):
        ShardDataset(url, rank=0, world_size=2).map(dict).select(bool)


def test_shard_dataset_reads_the_order_of_the_plan_and_resumes_on_other_ranks(tmp_path: Path) -> None:
    url = make_pairs(tmp_path / "set", 31)
    whole = [sample["__key__"] for sample in ShardDataset(url)]
    halves = [ShardDataset(url, rank=rank, world_size=2) for rank in range(2)]
    iterators = [iter(half) for half in halves]
    found = [next(iterator)["__key__"] for _ in range(7) for iterator in iterators]
    assert found == whole[:14]
    assert halves[0].state_dict() == halves[1].state_dict()
    for world_size in (1, 3):
        rest = [ShardDataset(url, rank=rank, world_size=world_size) for rank in range(world_size)]
        for dataset in rest:
            dataset.load_state_dict(halves[0].state_dict())
        columns = [[sample["__key__"] for sample in dataset] for dataset in rest]
        merged = [column[at] for at in range(17) for column in columns if at < len(column)]
        assert found + merged == whole
