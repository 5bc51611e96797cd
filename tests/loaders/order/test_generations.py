"""A run that changes in its future: what was read stays, nothing is lost or repeated, on any topology, and receipts add up."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from trainings import State, Training, config, grown, make

from loaders import Loader, LoaderConfig, Source, World, build_loader
from loaders.order.generations import Epochs
from loaders.testing import Topology, check_resume
from wds_tools.errors import UsageError


def each_as_often(keys: Sequence[str], name: str, count: int) -> bool:
    """Whether a source gave every sample as often as any other, but for epochs that lanes begin one after the other."""
    counts = Counter({f"{name}-{number:04d}": 0 for number in range(count)})
    counts.update(key for key in keys if key.startswith(name))
    return len(counts) == count and max(counts.values()) - min(counts.values()) <= 4


def test_weights_that_change_hold_from_the_state_on_and_draws_go_on_counting(tmp_path: Path) -> None:
    a, b = make(tmp_path, "a", 30), make(tmp_path, "b", 50)
    before = config(Source(a, weight=0.5), Source(b, weight=0.5), stop_at=40)
    after = config(Source(a, weight=0.2), Source(b, weight=0.8), stop_at=40)
    run = Training()
    run.train(before, 6)
    with pytest.raises(UsageError, match=r"schedule was .* change='future'"):
        run.train(after, 1)
    later = run.train(after, 40, "future")
    assert 0.15 < np.mean([key.startswith("a") for key in later]) < 0.25
    assert each_as_often(run.keys, "a", 30)
    assert run.state is not None
    assert [one["position"] for one in run.state["generations"]] == [0, 24]
    run.train(after, 3, world_size=2)  # the state says the rest
    found = run.audited()
    assert found.is_exact()
    assert found.totals_compared > 0
    with pytest.raises(UsageError, match="schedule was"):
        run.train(before, 1)


def test_steps_of_a_schedule_are_those_of_the_training_from_the_change_on(tmp_path: Path) -> None:
    a, b = make(tmp_path, "a", 30), make(tmp_path, "b", 50)
    before = config(Source(a, weight=0.5), Source(b, weight=0.5), stop_at=400, schedule=((20, (0.2, 0.8)),))
    run = Training()
    run.train(before, 4)
    run.train(replace(before, batch_size=6), 1)  # the old schedule stays at position 80
    after = replace(before, batch_size=6, schedule=((2, (0.9, 0.1)), (8, (1.0, 0.0))))
    run.train(after, 1, "future")
    run.train(replace(after, batch_size=2), 2, world_size=2)
    assert run.state is not None
    first, second = run.state["generations"]
    assert first["spec"]["schedule"] == [[0, [0.5, 0.5]], [80, [0.2, 0.8]]]
    assert (second["position"], second["step"], second["step_samples"]) == (22, 5, 6)
    assert second["spec"]["schedule"] == [[0, [0.9, 0.1]], [22 + 3 * 6, [1.0, 0.0]]]
    later = run.train(replace(after, batch_size=2), 60)
    assert {key[0] for key in later[40 - 32 :]} == {"a"}
    assert run.audited().is_exact()


def test_a_source_is_added_and_another_removed_even_if_it_is_gone(tmp_path: Path) -> None:
    a, b, c = make(tmp_path, "a", 30), make(tmp_path, "b", 50), make(tmp_path, "c", 20)
    two = config(Source(a, weight=0.5), Source(b, weight=0.5), stop_at=40)
    other = config(Source(c, weight=0.4), Source(b, weight=0.6), stop_at=40)
    run = Training()
    run.train(two, 6)
    with pytest.raises(UsageError, match="other data"):
        run.train(other, 1)
    moved = (tmp_path / "a").rename(tmp_path / "moved")
    later = run.train(other, 20, "future")
    assert {key[0] for key in later} == {"b", "c"}
    assert each_as_often(run.keys, "c", 20)
    run.train(other, 4)
    moved.rename(tmp_path / "a")
    assert run.audited().is_exact()
    back = run.train(config(Source(a, weight=1.0), stop_at=40), 4, "future")
    assert {key[0] for key in back} == {"a"}
    assert run.audited().is_exact()


def test_a_dataset_that_grew_counts_from_its_next_epoch(tmp_path: Path) -> None:
    a = make(tmp_path, "a", 24)
    more = grown(tmp_path, a, 34)
    run = Training()
    run.train(config(Source(a)), 2)
    with pytest.raises(UsageError, match=r"other data: .* 24 samples.* has 34.*change='future'"):
        run.train(config(Source(more)), 1)
    run.train(config(Source(more)), 1, "future")
    run.train(config(Source(more)), 30, world_size=4)
    assert sorted(run.keys[:24]) == sorted(f"a-{number:04d}" for number in range(24))
    for start in (24, 58):
        assert sorted(run.keys[start : start + 34]) == sorted(f"a-{number:04d}" for number in range(34))
    found = run.audited(moved=[more])
    assert found.is_exact()
    assert [one.expected for one in found.epochs][:3] == [24, 34, 34]
    changed = make(tmp_path / "changed", "a", 40, 5)
    with pytest.raises(UsageError, match="other data"):
        run.train(config(Source(changed)), 1)
    with pytest.raises(UsageError, match="none can be added or removed"):
        run.train(config(Source(changed)), 1, "future")


def test_a_source_of_a_mixture_grows_from_its_first_epoch_that_no_lane_has_begun(tmp_path: Path) -> None:
    a, b = make(tmp_path, "a", 12), make(tmp_path, "b", 64)
    more = grown(tmp_path, a, 20)
    run = Training()
    run.train(config(Source(a, weight=0.5), Source(b, weight=0.5), stop_at=64), 8)
    run.train(config(Source(more, weight=0.5), Source(b, weight=0.5), stop_at=64), 40, "future")
    counts = Counter(key for key in run.keys if key.startswith("a"))
    old, new = [[counts[f"a-{number:04d}"] for number in numbers] for numbers in (range(12), range(12, 20))]
    assert max(old) - min(old) <= 1
    assert max(new) - min(new) <= 1
    assert 0 < max(new) < max(old)
    assert each_as_often(run.keys, "b", 64)
    assert run.audited(moved=[more]).is_exact()


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"seed": 7}, "seed was 42, is 7"),
        ({"sources": (Source("a"), Source("b"), Source("c"))}, "none can be added"),
        ({"sources": (Source("a"),)}, "none can be added or removed"),
        ({"sources": (Source("a", repeat=2), Source("b"))}, "repeat of source 0 was 1, is 2"),
        ({"sources": (Source("a", weight=1), Source("b", weight=1))}, "without weights or with"),
    ],
)
def test_what_concerns_the_past_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: dict[str, Any], says: str
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in "abc":
        make(tmp_path, name, 8)
    run = Training()
    run.train(config(Source("a"), Source("b")), 2)
    with pytest.raises(UsageError, match=says):
        run.train(replace(config(Source("a"), Source("b")), **change), 1, "future")
    with pytest.raises(UsageError, match="change='past' is not"):
        run.train(config(Source("a"), Source("b")), 1, "past")


def begun(config: LoaderConfig, state: State, change: Any) -> Callable[[Topology, World], Loader]:
    """Makes loaders that have gone on from a state, for check_resume."""

    def make_loader(topology: Topology, world: World) -> Loader:
        loader = build_loader(replace(config, batch_size=topology.batch_size), world)
        loader.load_state_dict(state, change)
        return loader

    return make_loader


def test_a_run_resumes_everywhere_after_changes_of_weights_data_and_masks(tmp_path: Path) -> None:
    a, b, c = make(tmp_path, "a", 14), make(tmp_path, "b", 23), make(tmp_path, "c", 9)
    more = grown(tmp_path, a, 19)
    (tmp_path / "ids.txt").write_text("b-0003\nb-0004\nb-0005\nb-0006\nb-0007\n")
    masked = Source(b, weight=0.7, exclude=str(tmp_path / "ids.txt"))
    run = Training()
    run.train(config(Source(a, weight=0.5), Source(b, weight=0.5), stop_at=30), 4)
    run.train(config(Source(a, weight=0.3), masked, stop_at=30, schedule=((9, (0.6, 0.4)),)), 4, "future")
    last = config(Source(c, weight=0.2), Source(more, weight=0.3), masked, stop_at=44, schedule=((11, (0.1, 0.8, 0.1)),))
    assert run.state is not None
    check_resume(begun(last, run.state, "future"), [Topology(4), Topology(6, 3)], every=3)
    run.train(last, 30, "future", world_size=2)
    found = run.audited(moved=[more], exclude=str(tmp_path / "ids.txt"))
    assert found.is_exact()
    assert found.totals_compared > 2
    assert found.excluded == ((b, 16, 5),)


@pytest.mark.slow
@settings(max_examples=10, deadline=None)
@given(st.data())
def test_any_run_of_any_changes_resumes_everywhere_and_adds_up(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    folder = tmp_path_factory.mktemp("any")
    counts = [8 * data.draw(st.integers(1, 3)) for _ in range(3)]
    named = list(zip("abc", counts, strict=True))
    sets = [[make(folder / str(size), name, count + 8 * size) for size in range(3)] for name, count in named]
    sizes = [0, 0, 0]
    run = Training()
    held: list[str] = []
    for number in range(data.draw(st.integers(2, 4))):
        weights = data.draw(st.lists(st.sampled_from([0.0, 0.2, 0.5, 0.9]), min_size=3, max_size=3).filter(any))
        sizes = [min(size + data.draw(st.integers(0, 1)), 2) for size in sizes]
        fresh = data.draw(st.lists(st.integers(0, counts[0] - 1).map(lambda at: f"a-{at:04d}"), max_size=2))
        held = list(dict.fromkeys([*held, *fresh]))[: counts[0] - 1]
        (folder / "ids.txt").write_text("".join(f"{key}\n" for key in held))
        sources = [
            Source(urls[size], weight=weight, exclude=str(folder / "ids.txt") if name == 0 else None)
            for name, (urls, size, weight) in enumerate(zip(sets, sizes, weights, strict=True))
        ]
        batch_size, stop_at = data.draw(st.integers(2, 7)), data.draw(st.integers(20, 50))
        wanted = config(*sources, batch_size=batch_size, stop_at=stop_at)
        if run.state is not None and number == 2:
            check_resume(begun(wanted, run.state, "future"), [Topology(batch_size), Topology(5, 2)], every=4)
        run.train(wanted, data.draw(st.integers(1, 12)), "future" if number else None, data.draw(st.integers(1, 2)))
    excluded = {"exclude": str(folder / "ids.txt")} if held else {}
    assert run.audited(moved=[urls[size] for urls, size in zip(sets, sizes, strict=True)], **excluded).is_exact()


def test_a_state_has_under_two_kilobytes_with_a_generation_and_twenty_starts(tmp_path: Path) -> None:
    a, b = make(tmp_path, "a", 30), make(tmp_path, "b", 30)
    run = Training()
    sizes = []
    for start in range(20):
        weight = 0.5 if start < 10 else 0.25
        run.train(
            config(Source(a, weight=weight), Source(b, weight=0.5), batch_size=4 + start % 2),
            1,
            "future" if start == 10 else None,
        )
        sizes.append(len(json.dumps(run.state)))
    assert run.state is not None
    assert (len(run.state["starts"]), len(run.state["generations"])) == (20, 2)
    assert run.state["starts"][:3] == [[0, 0, 4, 1, "short"], [4, 1, 5, 1, "short"], [9, 2, 4, 1, "short"]]
    assert sizes[-1] < 2000
    assert all(after - before < 30 for number, (before, after) in enumerate(pairwise(sizes)) if number != 9)
    assert sizes[10] - sizes[9] < 400


@given(st.integers(1, 9), st.lists(st.tuples(st.integers(0, 60), st.integers(1, 9)), max_size=4))
def test_epochs_of_several_lengths_lie_side_by_side(length: int, changes: list[tuple[int, int]]) -> None:
    epochs = Epochs(length)
    for index, (at, new) in enumerate(sorted(changes)):
        before = [epochs.at(place) for place in range(at)]
        first = epochs.change(at, new)
        assert [epochs.at(place) for place in range(at)] == before, index
        assert epochs.start(first) >= at > epochs.start(first) - epochs.length(max(first - 1, 0)) or first == 0
        assert epochs.length(first) == epochs.length(first + 5) == new
    found = [epochs.at(place) for place in range(100)]
    assert found[0] == (0, 0)
    for (epoch, place), after in pairwise(found):
        assert after == ((epoch, place + 1) if place + 1 < epochs.length(epoch) else (epoch + 1, 0))
        assert epochs.start(epoch) + place == found.index((epoch, place))
