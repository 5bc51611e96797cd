"""Worker processes of a loader, or this process in their place: requests -> results, in order.

    WorkerPool.begin(requests), then next() for each

torch's DataLoader runs them. It tells of a dead worker by an error raised from a handler of SIGCHLD, in whatever line the
trainer has come to; here only while the trainer waits for a batch, so that it is one error, at one place: WorkerDied.
"""

from __future__ import annotations

import atexit
import math
import multiprocessing
import signal
import threading
import time
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from multiprocessing.connection import wait
from typing import Any, TypeVar

import torch
from torch._C import _remove_worker_pids, _set_worker_pids
from torch.utils.data._utils import MP_STATUS_CHECK_INTERVAL
from torch.utils.data.dataloader import _MultiProcessingDataLoaderIter

from loaders.config import LoaderConfig
from loaders.order.samples import OpenSource
from loaders.workers.handover import affordable_prefetch, tell_of_failures
from loaders.workers.steps import StepDataset, StepRequest, StepResult
from loaders.world import World
from wds_tools.errors import StorageError, UsageError, WdsToolsError, WorkerDied
from wds_tools.run.by_file import ByFile
from wds_tools.storage import LocalStore, join

T = TypeVar("T")
_GUARD = "a script puts what it does below `if __name__ == '__main__':`, since worker processes import it"


class WorkerPool:
    """Fetches steps. Workers start at the first loop and stay until `close`.

    Args:
        dataset: of the rank.
        config: number of workers, how they start, batches ahead.
        world: this process among the training processes.
        sources: what is read.
    """

    def __init__(self, dataset: StepDataset, config: LoaderConfig, world: World, sources: Sequence[OpenSource]) -> None:
        self._dataset, self._config, self._world, self._sources = dataset, config, world, sources
        self._workers: Any = None
        """The DataLoader."""
        self._requests = _Requests()
        self._results: Iterator[StepResult | WdsToolsError] = iter(())
        self._has_answered = False

    def __getstate__(self) -> dict[str, Any]:
        if self._requests.current:
            raise UsageError("a loader that was begun can't be copied or sent: its config and state_dict() can")
        return self.__dict__

    def begin(self, requests: Iterable[StepRequest]) -> None:
        """Ask for the steps of a loop.

        Raises:
            UsageError: /dev/shm has no room for a batch of each worker.
            WorkerDied: a worker ended.
        """
        self._requests.current = requests
        try:
            self._results = self._awaited(self._begun)
        except BaseException:  # in the midst of asking workers to leave what they do: what they give could be of a loop before
            self.close()
            raise

    def next(self, asked: tuple[int, int, int]) -> StepResult:
        """The result of the next step, which is the one that is asked for; see StepResult.asked.

        Raises:
            WdsToolsError: the step met an error.
            WorkerDied: a worker ended, gives no batch for timeout_s, or another step.
        """
        result = self._awaited(lambda: next(self._results))
        self._has_answered = True
        if isinstance(result, WdsToolsError):
            raise result
        if result.asked != asked:
            self.close()
            raise WorkerDied(f"a worker gave the step {result.asked} where {asked} was asked for: begin another loop")
        return result

    def close(self) -> None:
        """End the worker processes."""
        workers, self._workers = self._workers, None
        if workers is not None and workers._iterator is not None:
            workers._iterator._shutdown_workers()

    @property
    def _method(self) -> str:
        """How worker processes start."""
        return self._config.start_method or multiprocessing.get_start_method()

    @property
    def _iterator(self) -> _Waiting | None:
        """Of the workers, once they have started."""
        return None if self._workers is None else self._workers._iterator

    def _awaited(self, what: Callable[[], T]) -> T:
        """What comes of something that waits for workers.

        Raises:
            WorkerDied: one ended. DataLoader tells of it by a RuntimeError, or fails to get the tensors that it had sent.
        """
        iterator = self._iterator
        if iterator is None and self._config.num_workers == 0:
            return what()
        try:
            if iterator is None:
                return what()
            try:
                iterator.watch(self._config.timeout_s)
                return what()
            finally:
                iterator.unwatch()
        except WorkerDied:  # they give nothing
            if self._iterator is not None:
                self._iterator.kill()
            self.close()
            raise
        except (RuntimeError, ConnectionError, EOFError, FileNotFoundError) as error:
            if isinstance(error, WdsToolsError) or (isinstance(error, RuntimeError) and not _tells_of_a_worker(error)):
                raise
            if not (ended := self._iterator.ended() if self._iterator is not None else str(error)):
                raise
            self.close()
            is_clear = self._has_answered or self._method == "fork"
            hint = "" if is_clear else f"; where workers are started by {self._method}, {_GUARD}"
            raise WorkerDied(f"a worker process ended ({ended}{self._cut_off()}){hint}") from error

    def _begun(self) -> Iterator[StepResult | WdsToolsError]:
        with torch.device("cpu"):  # whatever the trainer has for its tensors: workers inherit this
            return iter(self._fetched())

    def _fetched(self) -> Iterable[StepResult | WdsToolsError]:
        if not self._config.num_workers:
            return map(self._dataset.__getitem__, self._requests)
        if getattr(multiprocessing.current_process(), "_inheriting", False):  # what multiprocessing itself looks at
            raise UsageError(f"this process imports the script that started it, which reads at once: {_GUARD}")
        if self._workers is None:
            dataset: Any = self._dataset if self._method == "fork" else ByFile(self._dataset)
            self._workers = _Workers(
                dataset,
                sampler=self._requests,
                batch_size=None,
                num_workers=self._config.num_workers,
                prefetch_factor=affordable_prefetch(self._config, self._world, self._sources),
                worker_init_fn=tell_of_failures,
                persistent_workers=True,
                collate_fn=_as_it_is,
                multiprocessing_context=self._config.start_method,
                generator=torch.Generator(),  # else each loop would take a number from the trainer's
            )
            atexit.register(_close, weakref.ref(self))  # in good order, before multiprocessing kills them
        return self._workers  # type: ignore[no-any-return]

    def _cut_off(self) -> str:
        """A local shard that is not as long as it was: who touches what is missing of a mapped file, dies."""
        for opened in self._sources:
            for info in opened.manifest.shards if isinstance(opened.store, LocalStore) else ():
                with suppress(StorageError):
                    if (size := opened.store.size(info.name)) < info.bytes:
                        return f"; {join(opened.store.url, info.name)} has {size} bytes, the manifest says {info.bytes}"
        return ""


class _Waiting(_MultiProcessingDataLoaderIter):
    """Waits for a batch as DataLoader does, which does so for ever, but no longer than `timeout_s` (DataLoader's own `timeout`
    would not look whether the workers live); and is told of dead workers only meanwhile."""

    _begun, _timeout_s = 0.0, math.inf

    def __init__(self, workers: _Workers) -> None:
        super().__init__(workers)
        self.unwatch()

    def watch(self, timeout_s: float) -> None:
        """A worker that ends is told of by a RuntimeError, wherever this process is, from here on until `unwatch`.

        Raises:
            RuntimeError: one has ended before.
        """
        self._begun, self._timeout_s = time.monotonic(), timeout_s
        if threading.current_thread() is threading.main_thread():  # in others no handler runs: DataLoader looks now and then
            _set_worker_pids(id(self), tuple(worker.pid for worker in self._workers if worker.pid is not None))
            self._worker_pids_set = True
        if pids := [worker.pid for worker in self._workers if worker.exitcode is not None]:
            raise RuntimeError(f"DataLoader worker (pid(s) {pids}) ended between two batches")

    def unwatch(self) -> None:
        if self._worker_pids_set:
            _remove_worker_pids(id(self))
            self._worker_pids_set = False

    def ended(self) -> str:
        """Which workers have ended, and how, after a moment for the one that is about to. Empty if none."""
        dying = wait([worker.sentinel for worker in self._workers], 1)
        for worker in self._workers:
            if worker.sentinel in dying:
                worker.join()
        codes = {worker.pid: worker.exitcode for worker in self._workers if worker.exitcode is not None}
        return ", ".join(f"{pid}: {signal.strsignal(-code) if code < 0 else f'exit code {code}'}" for pid, code in codes.items())

    def _try_get_data(self, timeout: float = MP_STATUS_CHECK_INTERVAL) -> Any:
        left = self._begun + self._timeout_s - time.monotonic()
        if left <= 0:
            raise WorkerDied(
                f"the workers gave no batch for timeout_s={self._timeout_s:g} seconds: a transform that never ends, a lock that "
                "was held when they were forked (start_method='spawn' helps), or a slow storage"
            )
        return super()._try_get_data(min(left, timeout))  # type: ignore[no-untyped-call]

    def _shutdown_workers(self) -> None:
        """In good order, unless the lock of the event that tells workers to end was in the hand of one that was killed. One that
        does not end, such as a stopped one, is killed."""
        if not hasattr(self, "_workers_done_event"):  # it came to nothing
            return
        event: Any = self._workers_done_event
        if not event._cond.acquire(timeout=MP_STATUS_CHECK_INTERVAL):
            self.kill()
            self._workers_done_event: Any = threading.Event()
        else:
            event._cond.release()
        super()._shutdown_workers()
        self.kill()

    def kill(self) -> None:
        """End those that live."""
        for worker in self._workers:
            if worker.is_alive():
                worker.kill()
                worker.join()


class _Workers(torch.utils.data.DataLoader["StepResult | WdsToolsError"]):
    def _get_iterator(self) -> Any:
        return _Waiting(self)


class _Requests(Iterable[StepRequest]):
    """The requests of the current loop: the one sampler that a DataLoader may have."""

    current: Iterable[StepRequest] = ()

    def __iter__(self) -> Iterator[StepRequest]:
        return iter(self.current)


def _close(pool: weakref.ref[WorkerPool]) -> None:
    if (living := pool()) is not None:
        living.close()


def _tells_of_a_worker(error: Exception) -> bool:
    return "DataLoader worker (pid" in str(error)  # of an error in one it says "in DataLoader worker process"


def _as_it_is(result: Any) -> Any:
    return result
