"""`ahead`: everything in order, and as much under way as the caller needs."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Executor, Future
from typing import Any

import pytest
from commands import wait_until
from hypothesis import given
from hypothesis import strategies as st

import wds_tools.storage.ahead as module
from wds_tools.storage.ahead import READ_AHEAD, ahead


@given(st.lists(st.integers(), max_size=30), st.integers(0, 30))
def test_all_comes_in_order_and_whoever_stops_gets_no_more(items: list[int], count: int) -> None:
    found = ahead(lambda item: (item, item + 1), items)
    assert [next(found, None) for _ in range(count)] == [(item, item + 1) for item in items[:count]] + [None] * (
        count - len(items)
    )
    found.close()


class AtOnce(Executor):
    """Has done what it is given when it has been given it."""

    def __init__(self, *_: object) -> None:
        pass

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        future: Future[Any] = Future()
        future.set_result(fn(*args, **kwargs))
        return future


def test_for_a_caller_who_never_waits_two_are_under_way(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "ThreadPoolExecutor", AtOnce)
    asked: list[int] = []
    for number, _ in enumerate(ahead(asked.append, range(9))):
        assert len(asked) == min(number + 1 + READ_AHEAD, 9)


def test_for_one_who_waits_there_are_twice_as_many_each_time_up_to_eight() -> None:
    asked: list[int] = []
    gates = [threading.Event() for _ in range(30)]

    def fetch(item: int) -> None:
        asked.append(item)
        gates[item].wait()

    found = ahead(fetch, range(30))
    for number, num_ahead in enumerate((4, 8, 8, 8)):
        taker = threading.Thread(target=next, args=(found,))
        taker.start()
        wait_until(lambda number=number, more=num_ahead: len(asked) == number + more, "as many are under way", 10)
        gates[number].set()
        taker.join()
    for gate in gates:
        gate.set()
    assert len(list(found)) == 26
    assert sorted(asked) == [*range(30)]


def test_an_error_comes_when_it_is_its_turn() -> None:
    found = ahead(lambda item: 12 // item, [3, 2, 0, 1])
    assert [next(found), next(found)] == [4, 6]
    with pytest.raises(ZeroDivisionError):
        next(found)
