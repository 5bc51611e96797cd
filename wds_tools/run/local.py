"""Tasks on this machine: in this process, or in worker processes.

`run_tasks(fn, tasks, workers=n)` yields `fn(task, report)` for each task as it finishes. With one worker everything happens in
this process. With more, `fn` is pickled once to each spawned process and kept there, so what it loads (a model) is loaded once.
What waits for others at the end of a task, such as an upload, fn may leave as a `Rest`: it is done while the next tasks begin.
`report(Advance(...))` may be called as often as fn likes; reports reach `on_report` in this process.
Invariant: no worker outlives this process or the generator: the generator kills those it leaves behind, and each worker watches
a pipe that closes with this process, however it ends. What asks a run to stop (STOPS) is for this process alone to hear.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, ThreadPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing, contextmanager
from dataclasses import dataclass
from itertools import islice
from multiprocessing.connection import wait as wait_for
from typing import Any, Generic, Protocol, TypeVar

from wds_tools.errors import UsageError, WorkerDied
from wds_tools.run.by_file import ByFile
from wds_tools.run.progress import Advance, Shown

Task = TypeVar("Task")
Result = TypeVar("Result")


class Report(Protocol):
    """Takes what is new since the last report; a Progress is one."""

    def __call__(self, new: Advance, /) -> None:
        """Add to what is done."""


@dataclass(frozen=True, kw_only=True)
class OnWorkers(Shown):
    """How a run uses this machine."""

    help_group = "workers and machines"

    workers: int = 1
    """Processes to use on this machine."""

    def __post_init__(self) -> None:
        if self.workers < 1:
            raise UsageError(f"--workers {self.workers}: at least 1")


@dataclass(frozen=True)
class Rest(Generic[Result]):
    """What is left of a task when its work is done."""

    finish: Callable[[], Result]
    """Gives the task's result; called once, in a thread."""


Work = Callable[[Task, Report], Result | Rest[Result]]

STOPS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
"""Signals that ask a run to stop: Ctrl-C; Slurm, Kubernetes, a machine that is taken back; a terminal that has gone."""
MOST_RESTS = 4
"""Of a process, under way at a time: an upload takes six round trips."""
_POLL_S = 0.25
_LOOK_EVERY_S = 1.0
_worker: _Tasks[Any, Any] | None = None
_all_idle: Any = None


def run_tasks(fn: Work[Task, Result], tasks: Sequence[Task], *, workers: int, on_report: Report) -> Generator[Result, None, None]:
    """Run `fn` over the tasks.

    Args:
        fn: picklable if workers > 1.
        tasks: picklable if workers > 1; started in this order.
        workers: processes, at least 1.
        on_report: gets every report, in this process.

    Close it, whatever ends the loop over it: an interrupt in the loop's own lines would leave the processes at work.

    Yields:
        The results, as they come; those of a `Rest` when a later task of its process has been worked on.

    Raises:
        WorkerDied: a process was killed from outside.
        Exception: whatever `fn` raised; the other tasks are stopped.
    """
    if workers == 1 or len(tasks) <= 1:
        with closing(_Tasks(fn, on_report)) as here:
            for task in tasks:
                yield from here.run(task)
            yield from here.finish()
        return
    context, num_processes = multiprocessing.get_context("spawn"), min(workers, len(tasks))
    with stops_held():
        reports, all_idle = context.SimpleQueue(), context.Barrier(num_processes)
    given: tuple[Any, Any, Any] = (ByFile(fn), reports, all_idle)
    pool = ProcessPoolExecutor(num_processes, mp_context=context, initializer=_start_worker, initargs=given)
    others = set(multiprocessing.active_children())
    waiting = iter(tasks)
    running: set[Future[list[Result]]] = set()
    num_rests = num_processes
    try:
        while True:
            with stops_held():
                for task in islice(waiting, 2 * workers - len(running)):
                    running.add(pool.submit(_run_in_worker, task))
                if not running:
                    running = {pool.submit(_finish_in_worker) for _ in range(num_rests)}
                    num_rests = 0
            if not running:
                break
            done, running = wait(running, timeout=_POLL_S, return_when=FIRST_COMPLETED)
            while not reports.empty():
                on_report(reports.get())
            for future in done:
                yield from future.result()
        while not reports.empty():
            on_report(reports.get())
        pool.shutdown()
    except BrokenProcessPool as error:
        raise WorkerDied(
            "a worker process ended without a word: it was killed, or memory ran out. "
            "Run again with --resume, where the command has that, and with fewer --workers if memory was short"
        ) from error
    finally:
        for process in set(multiprocessing.active_children()) - others:  # none if all went well
            process.kill()
        pool.shutdown(cancel_futures=True)
        reports.close()


@contextmanager
def stops_held() -> Iterator[None]:
    """A signal that asks to stop waits until this is over, so that no process is left half started; and processes that start in
    here never see it, from birth: it is their parent's, which stops them."""
    pressed: list[int] = []
    is_main = threading.current_thread() is threading.main_thread()
    current = {number: signal.getsignal(number) for number in STOPS if is_main}
    handlers = {number: handler for number, handler in current.items() if handler not in (signal.SIG_IGN, None)}
    for number in handlers:
        signal.signal(number, lambda number, _: pressed.append(number))
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, STOPS)  # is inherited, which a handler isn't
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        for number, handler in handlers.items():
            signal.signal(number, handler)
        if pressed:
            signal.raise_signal(pressed[0])


def exit_with_parent(grace_s: float = 0.0) -> None:
    """In a process that multiprocessing has started: see to it that it ends with its parent, however that ends.

    Args:
        grace_s: how long it may take to end by itself.
    """
    parent = multiprocessing.parent_process()
    assert parent is not None
    threading.Thread(target=_exit_with, args=(parent.sentinel, grace_s), daemon=True).start()


class _Tasks(Generic[Task, Result]):
    """Does tasks in this process, one after the other, and the rests of some while the next ones are worked on."""

    def __init__(self, fn: Work[Task, Result], report: Report) -> None:
        self._fn, self._report = fn, report
        self._pool = ThreadPoolExecutor(MOST_RESTS, "wds-rest")
        self._rests: deque[Future[Result]] = deque()

    def run(self, task: Task) -> list[Result]:
        """Do a task; gives what is finished: this one, if it has no rest, and those before it that had one."""
        done = self._fn(task, self._report)
        if not isinstance(done, Rest):
            return [*self.finish(), done]
        self._rests.append(self._pool.submit(done.finish))  # before one that was earlier can fail: each Rest is called
        results = []
        while self._rests and (len(self._rests) > MOST_RESTS or self._rests[0].done()):
            results.append(self._rests.popleft().result())
        return results

    def finish(self) -> list[Result]:
        """Wait for the rests of the last tasks."""
        rests, self._rests = self._rests, deque()
        return [rest.result() for rest in rests]

    def close(self) -> None:
        """The same, whatever came of it."""
        self._pool.shutdown()


def _start_worker(fn: Any, reports: Any, all_idle: Any) -> None:
    global _worker, _all_idle
    exit_with_parent()
    _worker, _all_idle = _Tasks(fn, reports.put), all_idle


def _run_in_worker(task: Any) -> list[Any]:
    assert _worker is not None
    return _worker.run(task)


def _finish_in_worker() -> list[Any]:
    """Waits for the other processes, so that each of them gets one call of this."""
    assert _worker is not None
    results = _worker.finish()
    _all_idle.wait()
    return results


def _exit_with(parent: int, grace_s: float) -> None:
    born_of = os.getppid()  # changes at once, where processes that were forked later keep the pipe open
    while os.getppid() == born_of and not wait_for([parent], _LOOK_EVERY_S):
        pass
    time.sleep(grace_s)
    os._exit(1)
