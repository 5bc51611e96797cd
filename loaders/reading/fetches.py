"""Requests in flight: a few at a time, and none begins once the process ends; and workers end with their trainer.

    Fetches.load(request) -> samples, or a future of them       the seam: `cost.replay` counts here instead of fetching

`BackgroundFetches` loads. A plain thread pool is waited for at exit until its queue is empty: a run that is interrupted would
first fetch all that it had planned. Here the pool has what is under way only; what waits is handed to it as threads get free,
which it refuses at exit.

A worker of torch looks every 5 s whether its trainer lives. That does not help one that waits for a read, nor one that has ended
its work and waits for somebody to take more than a pipe holds: `end_with_trainer` ends those too.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from functools import cache, partial
from threading import Lock
from typing import Generic, Protocol, TypeVar

from torch.utils.data import get_worker_info

from loaders.order.samples import OpenSource
from loaders.reading.cache import BlockCache
from loaders.reading.planner import Request
from loaders.reading.source import LoadedSamples, SourceReader
from wds_tools.run.local import exit_with_parent

_T = TypeVar("_T")
_S_co = TypeVar("_S_co", covariant=True)
_IN_FLIGHT = 16
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


class Fetches(Protocol[_S_co]):
    """Carries out the requests of one process."""

    @property
    def is_mapped(self) -> Sequence[bool]:
        """Of each source, whether its shards are mapped files."""

    @property
    def is_full(self) -> bool:
        """Whether so many requests are in flight that no more should be made ahead of need."""

    def load(self, request: Request) -> _S_co | Future[_S_co]:
        """What a request brings: at once, or later."""

    def cancel(self) -> None:
        """Begin none of the requests that have not begun."""

    def counts(self) -> dict[str, int]:
        """What was done so far, by name."""


class BackgroundFetches:
    """Loads from mapped files at once, from anywhere else in up to 16 threads. Belongs to one process.

    Args:
        sources: what is read.
        cache: on a local disk, for what is fetched.
    """

    def __init__(self, sources: Sequence[OpenSource], cache: BlockCache | None = None) -> None:
        self._sources = [SourceReader(opened, cache, len(sources)) for opened in sources]
        self._cache = cache
        self.is_mapped = [source.is_mapped for source in self._sources]
        self._pool: FetchPool[LoadedSamples] | None = None
        self._in_flight: deque[Future[LoadedSamples]] = deque()

    @property
    def is_full(self) -> bool:
        """See Fetches."""
        while self._in_flight and self._in_flight[0].done():
            self._in_flight.popleft()
        return len(self._in_flight) >= _IN_FLIGHT

    def load(self, request: Request) -> LoadedSamples | Future[LoadedSamples]:
        """See Fetches, and SourceReader.load, which raises here for mapped sources, in the future for others."""
        source = self._sources[request.source]
        if source.is_mapped:
            return source.load(request.shard, request.first, request.last)
        self._pool = self._pool or FetchPool(_IN_FLIGHT)
        future = self._pool.submit(partial(source.load, request.shard, request.first, request.last))
        self._in_flight.append(future)
        return future

    def cancel(self) -> None:
        """See Fetches."""
        for future in self._in_flight:
            future.cancel()
        self._in_flight.clear()

    def counts(self) -> dict[str, int]:
        """Requests and bytes, and what the cache counts, since the process started."""
        counts = {name: sum(getattr(source, f"num_{name}") for source in self._sources) for name in ("requests", "bytes")}
        if self._cache is not None:
            counts |= {f"cache_{name}": count for name, count in self._cache.stats().items()}
        return counts


class FetchPool(Generic[_T]):
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
