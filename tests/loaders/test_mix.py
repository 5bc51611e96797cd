"""Mixtures: exact proportions, and no draw lost or repeated, whatever the schedule."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from loaders.order.mix import Mixture, Weights
from wds_tools.errors import UsageError

SIZES = st.lists(st.integers(1, 60), min_size=1, max_size=4)


@st.composite
def mixtures(draw: st.DrawFn) -> tuple[list[int], int, list[tuple[int, tuple[float, ...]]]]:
    sizes = draw(SIZES)
    weights = st.tuples(*[st.sampled_from([0, 0.1, 0.25, 0.5, 1, 3])] * len(sizes)).filter(any)
    starts = [0, *sorted(draw(st.sets(st.integers(1, 900), max_size=3)))]
    return sizes, draw(st.integers(1, 40)), [(start, draw(weights)) for start in starts]


@given(mixtures())
def test_the_draws_of_a_source_on_a_lane_count_up_without_gaps(
    mixture: tuple[list[int], int, list[tuple[int, tuple[float, ...]]]],
) -> None:
    sizes, lanes, schedule = mixture
    positions = np.arange(1500)
    draws = Mixture(sizes, lanes, schedule).locate(positions)
    number = draws.epoch * np.array(sizes)[draws.source] + draws.position
    for source in range(len(sizes)):
        for lane in range(min(lanes, 7)):
            own = number[(draws.source == source) & (positions % lanes == lane)]
            assert own.tolist() == [lane + lanes * count for count in range(len(own))]


@given(mixtures(), st.lists(st.integers(0, 10**12), min_size=1, max_size=20))
def test_a_position_leads_to_one_draw_in_whatever_company(
    mixture: tuple[list[int], int, list[tuple[int, tuple[float, ...]]]], positions: list[int]
) -> None:
    sizes, lanes, schedule = mixture
    mixed = Mixture(sizes, lanes, schedule)
    together = mixed.locate(np.array(positions))
    for at, position in enumerate(positions):
        alone = mixed.locate(np.array([position]))
        assert [int(column[0]) for column in alone] == [int(column[at]) for column in together]


@given(st.lists(st.integers(1, 9), min_size=1, max_size=5), st.integers(1, 50))
def test_every_period_of_a_lane_has_exact_proportions(counts: list[int], lanes: int) -> None:
    mixed = Mixture([10] * len(counts), lanes, [(0, tuple(map(float, counts)))])
    period = Weights(counts).period
    source = mixed.locate(np.arange(3 * period * lanes)).source.reshape(3, period, lanes)
    expected = np.array(counts) * period // sum(counts)
    for number in range(len(counts)):
        assert ((source == number).sum(1) == expected[number]).all()


@pytest.mark.parametrize("batch_size", [64, 100, 256])
def test_a_batch_is_close_to_the_proportions(batch_size: int) -> None:
    mixed = Mixture([1000, 1000, 1000], 512, [(0, (0.7, 0.2, 0.1))])
    source = mixed.locate(np.arange(batch_size * 40)).source.reshape(40, batch_size)
    for number, share in enumerate((0.7, 0.2, 0.1)):
        assert np.abs((source == number).sum(1) - share * batch_size).max() <= 4


@given(mixtures())
def test_a_source_is_exhausted_at_the_first_position_behind_which_all_of_a_source_was_drawn(
    mixture: tuple[list[int], int, list[tuple[int, tuple[float, ...]]]],
) -> None:
    sizes, lanes, schedule = mixture
    mixed = Mixture(sizes, lanes, schedule)
    draws = mixed.locate(np.arange(12_000))
    for source, size in enumerate(sizes):
        if not schedule[-1][1][source]:
            continue
        for times in (1, 2):
            within = np.flatnonzero((draws.source == source) & (draws.epoch < times))
            if len(within) == size * times:
                assert mixed.exhausted_at(source, times) == within[-1] + 1


def test_a_source_whose_weight_ends_before_it_was_seen_is_named() -> None:
    with pytest.raises(UsageError, match="source 0 is never seen"):
        Mixture([100, 100], 4, [(0, (1.0, 1.0)), (20, (0.0, 1.0))]).exhausted_at(0)


@pytest.mark.parametrize("weights", [(), (0.0, 0.0), (-1.0, 2.0), (float("nan"),), (float("inf"), 1.0), (0.123456789, 0.5)])
def test_what_is_no_weight_is_refused(weights: tuple[float, ...]) -> None:
    with pytest.raises(UsageError, match="weights"):
        Weights(weights)


def test_a_schedule_that_does_not_ascend_or_fit_is_refused() -> None:
    with pytest.raises(UsageError, match="ascends"):
        Mixture([5], 2, [(0, (1.0,)), (0, (1.0,))])
    with pytest.raises(UsageError, match="2 sources"):
        Mixture([5, 5], 2, [(0, (1.0,))])


@pytest.mark.parametrize("weights", [(0.7, 0.3), (0.95, 0.05), (0.5, 0.3, 0.2), (0.99, 0.01), (0.61, 0.29, 0.07, 0.03)], ids=str)
@pytest.mark.parametrize("lanes", [1, 64, 100])
def test_epochs_of_a_source_overlap_by_two_draws_a_lane_at_most(weights: tuple[float, ...], lanes: int) -> None:
    size = 5000
    mixture = Mixture([size] * len(weights), lanes, [(0, weights)])
    for source, weight in enumerate(weights):
        drawn = mixture.locate(np.arange(int(2.5 * size / weight) + 3 * lanes))
        for epoch in (1, 2):
            last_of_before = np.flatnonzero((drawn.source == source) & (drawn.epoch == epoch - 1))[-1]
            first = np.flatnonzero((drawn.source == source) & (drawn.epoch == epoch))[0]
            assert last_of_before - first <= 2 * lanes / weight


@pytest.mark.parametrize(("weights", "lanes"), [((999, 1), 32), ((499, 1), 1), ((0.99, 0.008, 0.002), 7)])
def test_a_rare_source_is_absent_for_as_long_as_is_said(weights: tuple[float, ...], lanes: int) -> None:
    mixed = Mixture([1000] * len(weights), lanes, [(0, weights)])
    source = mixed.locate(np.arange(3 * Weights(weights).period * lanes)).source
    found = [int(np.diff(np.flatnonzero(source == number)).max()) - 1 for number in range(len(weights))]
    rare = [number for number in range(len(weights)) if mixed.longest_absence(number)]
    assert [mixed.longest_absence(number) for number in rare] == [found[number] for number in rare]
    assert rare == [number for number in range(len(weights)) if found[number] > 100 * lanes + 2 * lanes - 2]
    assert rare
