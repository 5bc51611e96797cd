"""Runs requests in the background, a few at a time, and starts none once the process ends; and workers end with their trainer.

    Fetcher(threads).submit(task) -> Future

A plain thread pool is waited for at exit until its queue is empty: a run that is interrupted would first fetch all that it had
planned. Here the pool has what is under way only; what waits is handed to it as threads get free, which it refuses at exit.

A worker of torch looks every 5 s whether its trainer lives. That does not help one that waits for a read, nor one that has ended
its work and waits for somebody to take more than a pipe holds: `end_with_trainer` ends those too.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from functools import cache
from threading import Lock
from typing import Generic, TypeVar

from torch.utils.data import get_worker_info

from wds_tools.run.local import exit_with_parent

_T = TypeVar("_T")
_GRACE_S = 10.0
"""For a worker without a trainer to end by itself, which leaves no temporary folder behind."""


def end_with_trainer() -> None:
    """In a worker process of torch, whoever has started it: it does not outlive the process that it reads for. Elsewhere nothing.

    To be called wherever a dataset begins to read; costs something once a process.
    """
    if get_worker_info() is not None:
        _watch_trainer()


@cache
def _watch_trainer() -> None:
    exit_with_parent(_GRACE_S)


class Fetcher(Generic[_T]):
    """Up to `num_threads` tasks at a time, in the order in which they were given. Belongs to one process."""

    def __init__(self, num_threads: int) -> None:
        self._pool = ThreadPoolExecutor(num_threads, thread_name_prefix="wds-fetch")
        self._free = num_threads
        self._lock = Lock()
        self._waiting: deque[tuple[Future[_T], Callable[[], _T]]] = deque()

    def submit(self, task: Callable[[], _T]) -> Future[_T]:
        """Have a task run. Its future can be cancelled until it has begun."""
        future: Future[_T] = Future()
        with self._lock:
            self._waiting.append((future, task))
            if not self._free:
                return future
            self._free -= 1
        self._pool.submit(self._run)
        return future

    def _run(self) -> None:
        """Run what waits longest, then come back for the next."""
        with self._lock:
            if not self._waiting:
                self._free += 1
                return
            future, task = self._waiting.popleft()
        if future.set_running_or_notify_cancel():
            try:
                future.set_result(task())
            except BaseException as error:  # noqa: BLE001  # it is for whoever waits
                future.set_exception(error)
        with suppress(RuntimeError):  # the process ends
            self._pool.submit(self._run)
