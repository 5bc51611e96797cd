"""Requests in flight find the level of what answers them; and what is needed first is asked for first."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from loaders.config import LoaderConfig, Source
from loaders.cost.simulate import imagined_source
from loaders.order.samples import SampleOrder, order_spec
from loaders.reading.concurrency import FIRST_LEVEL, Concurrency, levels
from loaders.reading.planner import Planner, PositionRange


def served(most: int, num_requests: int, latency_s: float, link: Callable[[int], float], size: int = 1 << 18) -> list[int]:
    """The levels over time of a link that gives `link(requests in flight)` bytes a second, each `latency_s` after it is asked."""
    now = 0.0
    concurrency = Concurrency(most, lambda: now)
    flying: deque[float] = deque()
    found = []
    for _ in range(num_requests):
        while len(flying) < concurrency.level:
            flying.append(now)
        now = max(now + size / link(len(flying)), flying.popleft() + latency_s)
        concurrency.done(size, is_busy=True)
        found.append(concurrency.level)
    return found


@pytest.mark.parametrize("most", [1, 20, 32, 100, 256])
def test_where_latency_is_all_there_is_it_grows_to_what_is_allowed(most: int) -> None:
    found = served(most, 2000, 0.1, lambda _: 1e12)
    assert found[-1] == most
    assert found == sorted(found)


def test_it_stays_where_more_brings_no_more() -> None:
    """At 0.1 s 40 requests of 256 KiB fill a link of 100 MB/s."""
    found = served(1024, 20_000, 0.1, lambda _: 1e8)
    assert max(found) == 128  # which it tried, to see
    assert np.median(found) == 64


def test_it_goes_back_where_more_brings_less() -> None:
    found = served(1024, 20_000, 0.01, lambda flying: 1e9 if flying <= FIRST_LEVEL else 5e8)
    assert np.median(found) == FIRST_LEVEL


def test_it_finds_a_link_that_has_become_faster() -> None:
    speed = [1e8]
    served_so_far = 0

    def link(_: int) -> float:
        nonlocal served_so_far
        served_so_far += 1
        speed[0] = 1e8 if served_so_far < 5000 else 1e12
        return speed[0]

    found = served(512, 40_000, 0.1, link)
    assert max(found[:5000]) == 128
    assert found[-1] == 512


def test_nothing_is_learnt_while_places_are_free() -> None:
    concurrency = Concurrency(256)
    for _ in range(1000):
        concurrency.done(1 << 20, is_busy=False)
    assert concurrency.level == FIRST_LEVEL


@given(st.integers(1, 300), st.lists(st.tuples(st.integers(0, 1 << 24), st.floats(0, 1), st.booleans()), max_size=400))
def test_it_is_never_less_than_one_or_more_than_allowed(most: int, requests: list[tuple[int, float, bool]]) -> None:
    now = 0.0
    concurrency = Concurrency(most, lambda: now)
    for num_bytes, seconds, is_busy in requests:
        now += seconds
        concurrency.done(num_bytes, is_busy=is_busy)
        assert 1 <= concurrency.level <= most
        assert concurrency.bytes_per_s >= 0


def test_the_levels_on_the_way_up_are_those_of_a_run_that_only_waits() -> None:
    on_the_way = levels(256)
    assert [next(on_the_way) for _ in range(5)] == [64, 128, 256, 256, 256]


def test_what_a_step_needs_is_asked_for_before_what_later_ones_need() -> None:
    source = imagined_source(1_000_000, 4096)
    config = LoaderConfig(sources=(source.source,), batch_size=64)
    order = SampleOrder([source], order_spec([source], config))
    planner = Planner(order, 64, 64, config.memory_bytes, [False])
    plans, units = planner.plan([PositionRange(0, 64 * step, 64 * step + 64) for step in range(8)])
    needed_by = {key: step for step, plan in reversed(list(enumerate(plans))) for key in plan.counts}
    steps = [min(needed_by[key] for key in request.keys if key in needed_by) for request in planner.requests(units, ())]
    assert len(steps) > 300
    assert steps == sorted(steps)


def test_the_setting_is_checked() -> None:
    with pytest.raises(ValueError, match="max_requests=0, expected an int of 1 or more"):
        LoaderConfig(sources=(Source("a"),), batch_size=1, max_requests=0)
