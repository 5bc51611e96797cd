"""Values by file: a spawned process gets what it was given, and what it does with it is its own."""

from __future__ import annotations

import multiprocessing
import pickle
from typing import Any

import numpy as np
import pytest

from wds_tools.run.by_file import ByFile


def answer(value: Any, queue: Any) -> None:
    large = value["large"]
    queue.put((int(large.sum()), large.shape, type(large.base).__name__, value["small"].tolist(), value["text"]))
    large[:] = 0


@pytest.mark.slow
@pytest.mark.parametrize("method", ["spawn", "forkserver"])
def test_processes_get_the_value_and_map_its_arrays(method: str) -> None:
    context = multiprocessing.get_context(method)
    value = {"large": np.arange(1 << 18).reshape(2, -1), "again": None, "small": np.arange(3), "text": "x"}
    value["again"] = value["large"]
    by_file, queue = ByFile(value), context.SimpleQueue()
    processes = [context.Process(target=answer, args=(by_file, queue)) for _ in range(2)]
    for process in processes:
        process.start()
        assert queue.get() == (sum(range(1 << 18)), (2, 1 << 17), "mmap", [0, 1, 2], "x")
        process.join()
    assert value["large"][1, 5] == (1 << 17) + 5, "a worker changed what the others have"


def test_elsewhere_it_is_the_value_itself() -> None:
    assert pickle.loads(pickle.dumps(ByFile({"a": 1}))) == {"a": 1}  # noqa: S301
