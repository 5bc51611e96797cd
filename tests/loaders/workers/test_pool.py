"""Workers that are interrupted, stopped, or asked again: what they give is what was asked for, or an error."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice, repeat
from typing import Any

import pytest
from commands import wait_until
from factory import make_dataset, text_sample
from torch.utils.data import get_worker_info

from loaders import Loader, LoaderConfig, Source, World, build_loader
from wds_tools.errors import WorkerDied


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("pool") / "set"
    make_dataset(folder, map(text_sample, range(120)), shard_samples=40)
    return str(folder)


def slower(sample: dict[str, Any], _: Any) -> dict[str, Any]:
    """The second worker has the slower storage."""
    info = get_worker_info()
    time.sleep(0 if info is None else (0.01, 0.08)[info.id])
    return {"text": sample["text"]}


def loader(url: str, num_workers: int = 2, **settings: Any) -> Loader:
    sources = (Source(url),)
    return build_loader(LoaderConfig(sources=sources, batch_size=4, num_workers=num_workers, **settings), World())


@contextmanager
def interrupted_after(seconds: float) -> Iterator[None]:
    """As by Ctrl-C, if it takes as long."""

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, interrupt)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    except KeyboardInterrupt:
        pass
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@pytest.mark.parametrize("again_s", [0.01, 0.05, 0.1])
def test_a_loop_that_is_left_and_left_again_while_it_begins_goes_on_exactly(url: str, again_s: float) -> None:
    expected = [batch["__key__"] for batch in loader(url, 0, transform=slower)]
    made = loader(url, transform=slower)
    found = [batch["__key__"] for batch in islice(made, 3)]
    with interrupted_after(again_s):  # while the slow worker is at what the first loop asked for
        found.extend(batch["__key__"] for batch in islice(made, 1))
    found.extend(batch["__key__"] for batch in made)
    made.close()
    assert found == expected


def test_what_a_worker_gives_is_compared_with_what_was_asked(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    made = loader(url, 0)
    batches = iter(made)
    before = next(batches)
    made._pool._results = repeat(next(made._pool._results))
    next(batches)
    with pytest.raises(WorkerDied, match=r"a worker gave the step \(1, 0, 4\) where \(1, 0, 8\) was asked for"):
        next(batches)
    assert made.position == 2 * len(before["__key__"])
    assert [before["__key__"], *(batch["__key__"] for batch in made)][2:] == [batch["__key__"] for batch in loader(url, 0)][3:]


def test_a_stopped_worker_costs_the_time_limit_and_is_ended(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    made = loader(url, timeout_s=0.5, prefetch_factor=1)
    batches = iter(made)
    next(batches)
    workers = [worker.pid for worker in made._pool._workers._iterator._workers]
    os.kill(workers[0], signal.SIGSTOP)
    with pytest.raises(WorkerDied, match=r"no batch for timeout_s=0\.5 seconds"):
        list(batches)
    wait_until(lambda: not any(map(is_alive, workers)), "both end")


def is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True
