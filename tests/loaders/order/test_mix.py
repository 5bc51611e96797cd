"""Mixtures: exact proportions, and no draw lost or repeated, whatever the schedule."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from properties import tries

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
@settings(deadline=None)
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


@pytest.mark.parametrize("weights", [(), (0.0, 0.0), (-1.0, 2.0), (float("nan"),), (float("inf"), 1.0)])
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
def test_epochs_of_a_source_overlap_by_few_draws_a_lane(weights: tuple[float, ...], lanes: int) -> None:
    size = 5000
    mixture = Mixture([size] * len(weights), lanes, [(0, weights)])
    for source, weight in enumerate(weights):
        drawn = mixture.locate(np.arange(int(2.5 * size / weight) + 3 * lanes))
        for epoch in (1, 2):
            last_of_before = np.flatnonzero((drawn.source == source) & (drawn.epoch == epoch - 1))[-1]
            first = np.flatnonzero((drawn.source == source) & (drawn.epoch == epoch))[0]
            assert last_of_before - first <= 5 * lanes / weight


@st.composite
def weights_of_any_kind(draw: st.DrawFn) -> tuple[float, ...]:
    kind = draw(st.sampled_from(["counts", "decimals", "any"]))
    if kind == "counts":
        return tuple(map(float, draw(st.lists(st.integers(1, 2000), min_size=2, max_size=6))))
    if kind == "decimals":
        share = draw(st.integers(1, 999))
        return share / 1000, 1 - share / 1000
    return tuple(draw(st.lists(st.floats(0.001, 1), min_size=2, max_size=6)))


@given(weights_of_any_kind(), st.integers(1, 5000), st.integers(0, 10**12))
@tries(60)
@example((9999.0, 1.0), 320, 0)
@example((0.0987, 0.9013), 2048, 0)
@example((1.0, 2.0**19), 1597, 0)
@example((1.0, 1.0, 1.0, 7.0, 1070.0, 2000.0), 155, 0)
@example((8.0, 1231.0, 5.0, 63.0), 42, 0)
@example((1488.0, 6.0, 1270.0, 715.0, 1222.0), 239, 530766543172)
@example((2.0, 1738.0, 10.0, 4.0, 1491.0, 8.0), 326, 0)
@example((1100.0, 3.0), 234, 0)
def test_in_every_window_of_100_draws_of_a_source_its_share_is_within_30_percent(
    weights: tuple[float, ...], lanes: int, begin: int
) -> None:
    mixed = Mixture([1000] * len(weights), lanes, [(0, weights)])
    total = sum(weights)
    for number, weight in enumerate(weights):
        window = round(100 * total / weight)
        if window <= 100_000:
            drawn = mixed.locate(np.arange(begin, begin + 3 * window)).source == number
            before = np.concatenate([[0], np.cumsum(drawn)])
            count = before[window:] - before[:-window]
            assert 70 <= count.min() <= count.max() <= 130, (number, count.min(), count.max())


def test_weights_of_a_long_period_are_rounded_to_a_millionth_of_their_sum_and_say_by_how_much() -> None:
    assert Weights((0.123456, 0.876544)).error == 0
    for weights in ((0.123456789, 0.5), (2.0**19, 1, 3), (1 / 3, 1 / 7, 1e-5)):
        rounded = Weights(weights)
        shares = np.array(weights) / sum(weights)
        assert rounded.period == rounded.counts.sum() <= 1 << 20
        assert np.abs(rounded.counts / rounded.period / shares - 1).max() == pytest.approx(rounded.error, abs=1e-9)
        assert rounded.error <= (2.0**-20 / shares).max()


def test_a_weight_of_0_draws_nothing_and_one_that_is_too_small_is_refused() -> None:
    assert set(Mixture([5, 0, 7], 3, [(0, (1.0, 0.0, 2.0))]).locate(np.arange(500)).source.tolist()) == {0, 2}
    with pytest.raises(UsageError, match="source 1 is 5e-07 of their sum: expected 0, which leaves it out, or at least"):
        Weights((1.0, 5e-7))
    with pytest.raises(UsageError, match="1 to 4096 numbers"):
        Weights((1.0,) * 4097)


def test_the_order_of_a_mixture_is_pinned() -> None:
    """These change only together with ORDER_VERSION."""
    draws = Mixture([5, 3, 2], 4, [(0, (0.5, 0.3, 0.2)), (20, (0.0, 0.5, 0.123456789))]).locate(np.arange(32))
    assert draws.source.tolist() == PINNED_SOURCES
    assert draws.position.tolist() == PINNED_POSITIONS


PINNED_SOURCES = [0, 1, 0, 0, 1, 0, 0, 2, 0, 0, 2, 1, 0, 2, 1, 0, 2, 1, 0, 2, 1, 1, 1, 2, 1, 1, 1, 1, 2, 1, 1, 1]
PINNED_POSITIONS = [0, 1, 2, 3, 0, 1, 1, 1, 4, 0, 0, 0, 3, 1, 2, 2, 0, 2, 0, 1, 1, 0, 0, 1, 2, 1, 1, 1, 0, 2, 2, 2]
