"""What a run was handed at a step, and when it was handed a sample: the same as its loaders handed over, and its inverse."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from properties import tries
from trainings import Training, config, grown, make

from loaders import LoaderConfig, ShardDataset, Source, World, build_loader
from loaders.cost.simulate import imagined_source
from loaders.order.samples import SampleOrder, order_spec
from loaders.proof.history import Place
from loaders.proof.history import Run as Asked
from loaders.proof.steps import skipped
from wds_tools.errors import UsageError

SHARD_SAMPLES = 4


class Run(Training):
    """A run over several starts: which rank was handed which key at each step."""

    def __init__(self) -> None:
        super().__init__()
        self.steps: list[list[tuple[int, str]]] = []

    def go_on(
        self, config: LoaderConfig, steps: int, world_size: int = 1, change: Any = None, skips: tuple[tuple[int, int], ...] = ()
    ) -> None:
        loaders = [build_loader(config, World(rank=rank, world_size=world_size)) for rank in range(world_size)]
        handed = []
        for rank, loader in enumerate(loaders):
            if self.state is not None:
                loader.load_state_dict(self.state, change)
            for skip in skips:
                loader.skip(*skip)
            batches: list[list[tuple[int, str]]] = []
            while len(batches) < steps:
                assert len(loader) > 0
                for batch in loader:
                    batches.append([(rank, key) for key in batch["__key__"]])
                    if len(batches) == steps:
                        break
            handed.append(batches)
        self.steps += [[one for rank in ranks for one in rank] for ranks in zip(*handed, strict=True)]
        states = [json.loads(json.dumps(loader.state_dict())) for loader in loaders]
        assert all(state == states[0] for state in states)
        self.state = states[0]
        self.receipts += [loader.receipt() | {"run": f"{len(self.receipts)}"} for loader in loaders]

    def asked(self, record: dict[str, Any] | None = None, moved: tuple[str, ...] = (), exclude: str | None = None) -> Asked:
        with TemporaryDirectory() as folder:
            path = Path(folder) / "run.json"
            path.write_text(json.dumps(record or self.state))
            return Asked.open(str(path), moved, exclude)


def key_of(history: Asked, place: Place) -> str:
    """As `make` names it."""
    return f"{Path(history.origins[place.source].url).name}-{place.shard * SHARD_SAMPLES + place.sample_index:04d}"


def check(run: Run, history: Asked) -> None:
    """`at` is what was handed over at every step, and `seen` its inverse."""
    expected = set()
    for number, handed in enumerate(run.steps):
        found = history.at(number)
        keys = [key_of(history, place) for place in found.places]
        assert list(zip(found.ranks, keys, strict=True)) == handed
        rank = handed[-1][0]
        own = history.at(number, rank)
        assert [key_of(history, place) for place in own.places] == [key for each, key in handed if each == rank]
        expected |= {(place, found.epoch, number, rank) for place, rank in zip(found.places, found.ranks, strict=True)}
    places = [
        Place(source, shard, sample_index)
        for source, opened in enumerate(history.order.sources)
        for shard, info in enumerate(opened.manifest.shards)
        for sample_index in range(info.samples)
    ]
    seen = [(places[one.sample], one.epoch, one.step, one.rank) for one in history.seen(places)]
    assert len(seen) == sum(map(len, run.steps))
    assert set(seen) == expected


@tries(60)
@given(st.data())
def test_positions_of_is_the_inverse_of_locate(data: st.DataObject) -> None:
    draw = data.draw
    is_weighted, num_sources = draw(st.booleans()), draw(st.integers(1, 3))
    opened = []
    for number in range(num_sources):
        source = Source(
            f"memory://{number}",
            weight=draw(st.sampled_from([0.5, 1.0, 2.0])) if is_weighted else None,
            repeat=draw(st.integers(1, 3)),
            max_samples=draw(st.none() | st.integers(1, 8)) if is_weighted or num_sources == 1 else None,
        )
        made_up = imagined_source(draw(st.integers(8, 60)), 1000, draw(st.integers(2, 15)))
        opened.append(replace(made_up, source=source))
    shuffle = is_weighted or draw(st.booleans())
    wanted = LoaderConfig(sources=tuple(each.source for each in opened), batch_size=draw(st.integers(1, 6)), shuffle=shuffle)
    block = draw(st.sampled_from([1, 3000, 7000]))
    spec = replace(
        order_spec(opened, wanted),
        block_bytes=block,
        chunk_bytes=block * draw(st.integers(1, 4)),
        lanes_per_sample=draw(st.integers(1, 8)),
    )
    order = SampleOrder(opened, replace(spec, length=draw(st.integers(1, 200))) if is_weighted else spec)
    low = draw(st.integers(0, 200))
    high = low + draw(st.integers(1, 100))
    samples = np.array(
        [
            (source, shard, index)
            for source, each in enumerate(opened)
            for shard, n in enumerate(each.shards.num_samples.tolist())
            for index in range(n)
        ]
    )
    which, positions = order.positions_of(*samples.T, low, high)
    assert positions.tolist() == list(range(low, high))
    located = order.locate(0, np.arange(low, high))
    assert np.array_equal(samples[which], np.stack(located[:3], axis=1))


@settings(max_examples=6, deadline=None)
@given(st.data())
def test_at_and_seen_are_what_was_handed_over_whatever_the_run_went_through(data: st.DataObject) -> None:
    draw = data.draw
    with TemporaryDirectory() as name:
        folder = Path(name)
        a, b = make(folder, "a", draw(st.integers(8, 30))), make(folder, "b", draw(st.integers(8, 20)))
        is_weighted = draw(st.booleans())
        wanted = config(
            Source(a, weight=0.6 if is_weighted else None),
            Source(b, weight=0.4 if is_weighted else None, repeat=1 if is_weighted else draw(st.integers(1, 2))),
            batch_size=draw(st.integers(1, 6)),
            **({"stop_at": draw(st.integers(6, 40))} if is_weighted else {}),
        )
        run = Run()
        excluded: list[str] = []
        for start in range(draw(st.integers(1, 4))):
            change = None
            if start and is_weighted and draw(st.booleans()):
                weight, change = draw(st.sampled_from([0.2, 0.5])), "future"
                wanted = replace(
                    wanted, sources=(replace(wanted.sources[0], weight=weight), replace(wanted.sources[1], weight=1 - weight))
                )
            if draw(st.booleans()):
                excluded += [
                    key for key in draw(st.sets(st.sampled_from([f"a-{n:04d}" for n in range(6)]))) if key not in excluded
                ]
                (folder / "ids.txt").write_text("".join(f"{key}\n" for key in excluded))
            ids = str(folder / "ids.txt") if excluded else None
            world_size = draw(st.integers(1, 3))
            wanted = replace(
                wanted,
                sources=(replace(wanted.sources[0], exclude=ids), wanted.sources[1]),
                batch_size=draw(st.integers(world_size, 6)) if start else max(wanted.batch_size, world_size),
                last_batch=draw(st.sampled_from(["drop", "short", "wrap"])),
            )
            done = len(run.steps)
            skips = ((done + draw(st.integers(0, 3)), done + 3 + draw(st.integers(1, 9))),) if draw(st.booleans()) else ()
            run.go_on(wanted, draw(st.integers(1, 9)), world_size, change, skips)
            assert run.state is not None
        history = run.asked(exclude=ids)
        check(run, history)
        check(run, run.asked(run.receipts[-1], exclude=ids))
        assert run.audited(**({"exclude": ids} if excluded and run.state["masks"] else {})).is_exact()


def test_a_skipped_stretch_is_left_out_once_however_often_the_run_is_resumed_and_all_records_know_it(tmp_path: Path) -> None:
    url = make(tmp_path, "a", 42)
    wanted = config(Source(url))
    plain = [key for _ in range(2) for batch in build_loader(wanted, World()) for key in batch["__key__"]][:42]
    run = Run()
    run.go_on(wanted, 2, skips=((3, 5),))
    assert run.state is not None
    assert run.state["skips"] == [[3, 5]]
    early = run.asked()
    begun = build_loader(wanted, World())
    begun.load_state_dict(run.state)
    assert len(begun) == 11 - 2 - 2
    run.go_on(wanted, 1, world_size=2, skips=((3, 5),))  # at its edge, and said again
    assert run.state["position"] == 5 * 4
    run.go_on(wanted, 2, skips=((3, 5), (9, 30)))  # the second goes beyond the epoch
    check(run, run.asked())
    for number in range(2, 5):  # to come, when that state was saved
        assert [key_of(early, place) for place in early.at(number).places] == [key for _, key in run.steps[number]]
    run.go_on(replace(wanted, batch_size=6), 9, world_size=3)
    handed = [key for step in run.steps for _, key in step]
    assert handed[: 3 * 4] == plain[: 3 * 4]
    assert handed[3 * 4 : 5 * 4] == plain[5 * 4 : 7 * 4]
    check(run, run.asked())
    check(run, run.asked(run.receipts[-1]))
    assert len(json.dumps(run.state)) < 2000
    found = run.audited()
    assert found.is_exact()
    assert found.epochs[0].skipped >= 8
    assert found.epochs[0].missing.num_samples == 0
    assert sum(one.skipped for one in found.epochs) == sum(high - low for low, high in skipped_in(run))


def skipped_in(run: Run) -> list[tuple[int, int]]:
    asked = run.asked()
    return list(skipped(asked.order.epochs, asked.record))


def test_steps_that_are_past_can_not_be_skipped_and_a_loop_under_way_begins_again(tmp_path: Path) -> None:
    loader = build_loader(config(Source(make(tmp_path, "a", 40))), World())
    batches = iter(loader)
    first = next(batches)["__key__"]
    loader.skip(1, 2)
    with pytest.raises(UsageError, match="skip or close came since this loop began"):
        next(batches)
    for steps in ((0, 4), (3, 3)):
        with pytest.raises(UsageError, match=r"skip\(.*the run stands at step 1"):
            loader.skip(*steps)
    rest = [key for batch in loader for key in batch["__key__"]]
    assert len({*first, *rest}) == 40 - 4
    assert (loader.stats()["skipped"], loader.stats()["samples"]) == (4, 36)


def test_what_a_state_can_not_tell_is_refused_with_why(tmp_path: Path) -> None:
    url = make(tmp_path, "a", 20)
    run = Run()
    run.go_on(config(Source(url)), 3)
    assert run.state is not None
    asked = run.asked({"loader": run.state, "done": 3})  # as an EpochLoader saves it
    assert asked.at(7).is_to_come
    assert not asked.at(2).is_to_come
    with pytest.raises(UsageError, match=r"rank 1 is not in 0 \.\.\. 0"):
        asked.at(2, rank=1)
    with pytest.raises(UsageError, match=r"packed on the fly.*packed ahead"):
        run.asked({**run.state, "packing": {}})
    with pytest.raises(UsageError, match="has not excluded"):
        run.asked(exclude="ids.txt")
    with pytest.raises(UsageError, match="ShardDataset, which makes no batches"):
        run.asked(ShardDataset(url, rank=0, world_size=1).state_dict())
    (tmp_path / "ids.txt").write_text("a-0003\n")
    run.go_on(config(Source(url, exclude=str(tmp_path / "ids.txt"))), 3)
    assert run.asked().at(2).excluded == 0
    with pytest.raises(UsageError, match=r"excluded 1 keys of .*give the file with --exclude"):
        run.asked().at(3)
    check(run, run.asked(exclude=str(tmp_path / "ids.txt")))


def test_a_source_that_grew_and_moved_is_asked_about_in_every_epoch(tmp_path: Path) -> None:
    a, b = make(tmp_path, "a", 12), make(tmp_path, "b", 30)
    more = grown(tmp_path, a, 20)
    run = Run()
    run.go_on(config(Source(a, weight=0.5), Source(b, weight=0.5), stop_at=21, last_batch="wrap"), 11, world_size=2)
    run.go_on(config(Source(more, weight=0.5), Source(b, weight=0.5), stop_at=21, last_batch="wrap"), 20, change="future")
    moved = Path(more).rename(tmp_path / "a-moved")
    check(run, run.asked(moved=(str(moved),)))


def test_a_last_batch_that_was_filled_up_before_a_change_or_a_mask_is_audited_as_it_was(tmp_path: Path) -> None:
    a, b = make(tmp_path, "a", 24), make(tmp_path, "b", 10)
    before = config(Source(a, weight=0.2), Source(b, weight=0.8), stop_at=6, last_batch="wrap")
    run = Run()
    run.go_on(before, 2)
    (tmp_path / "ids.txt").write_text("".join(f"{key}\n" for _, key in run.steps[1] if key.startswith("b")))
    after = replace(before, sources=(Source(a, weight=0.6), Source(b, weight=0.4, exclude=str(tmp_path / "ids.txt"))))
    run.go_on(after, 9, change="future")
    check(run, run.asked(exclude=str(tmp_path / "ids.txt")))
    assert run.audited(exclude=str(tmp_path / "ids.txt")).is_exact()


def test_steps_that_no_run_comes_to_are_refused_in_place_of_counting_epochs_without_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("loaders.proof.steps._MAX_EPOCHS", 100)
    wanted = config(Source(make(tmp_path, "a", 8)))  # two steps an epoch
    run = Run()
    run.go_on(wanted, 1)
    assert run.state is not None
    assert run.asked().at(197).epoch == 98
    with pytest.raises(UsageError, match=r"step 200 is 100 epochs behind step 0, and a later one was asked for"):
        run.asked().at(10**20)
    loader = build_loader(wanted, World())
    for first in (0, 5):
        with pytest.raises(UsageError, match="100 epochs"):
            loader.skip(first, 10**20)
    assert (loader.step, loader.position, loader.state_dict()["skips"]) == (0, 0, [])
