"""Tasks on a Ray cluster: the same callable and the same tasks as `local`, wherever there is room.

    on_cluster: connected while it is open
    driver: tasks -> Ray, a few more than there is room for -> results, as they come
    worker: unpickles `fn` once and keeps it (a loaded model stays) -> fn(task, report) -> result
    board:  an actor beside the driver; workers tell it once a second how far they are, the driver asks it

A task whose worker or node dies is started again elsewhere; what it had reported is taken back. An exception of `fn` is no such
death: it ends the run. The only module that imports ray, and only when it is used.
Invariant: whatever ends the driver ends its tasks: the cluster does that for drivers that it no longer hears of.
"""

from __future__ import annotations

import logging
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import ExitStack, contextmanager, redirect_stdout
from itertools import islice
from typing import Any, TypeVar

from wds_tools.errors import MissingPackage, UsageError, WorkerDied
from wds_tools.run.local import Report, Rest, Work
from wds_tools.run.progress import Advance
from wds_tools.terminal import say

Task = TypeVar("Task")
Result = TypeVar("Result")

_RETRIES = 5
"""Times that a task is started again because its worker or node died."""
_POLL_S = 0.5
_TELL_EVERY_S = 1.0
_MIN_AHEAD = 16
_CONNECT_S = 10.0
_FEW_TRIES = "RAY_NUM_REDIS_GET_RETRIES", "3"
"""How often Ray tries to connect, for 40 s each, where something else listens at the address; by itself 20 times."""
_held: dict[str, Callable[..., Any]] = {}
"""In a worker: the callable that it was last given, under the id of the object that Ray keeps it in."""


@contextmanager
def on_cluster(address: str | None, *, quiet: bool = False) -> Iterator[None]:
    """Connected to a cluster while this is open, if this process was not before.

    Args:
        address: of the cluster, as `ray.init` takes it; None: RAY_ADDRESS, the one on this machine, or one that is started.
        quiet: show nothing of what Ray tells, such as of workers that died and are replaced.

    Raises:
        MissingPackage: Ray is not installed.
        UsageError: there is no cluster at that address.
    """
    os.environ.setdefault(*_FEW_TRIES)
    ray = _load_ray()
    with ExitStack() as stack:  # Ray tells of dead workers on standard output, which is for what a command found
        stack.enter_context(redirect_stdout(stack.enter_context(open(os.devnull, "w")) if quiet else sys.stderr))
        is_ours = not ray.is_initialized()
        if is_ours:
            listener = signal.getsignal(signal.SIGTERM)
            _connect(ray, address)
            if listener is not None and threading.current_thread() is threading.main_thread():
                signal.signal(signal.SIGTERM, listener)  # Ray has put its own there, which exits without a word
        try:
            yield
        finally:
            if is_ours:
                ray.shutdown()


def run_on_ray(
    fn: Work[Task, Result],
    tasks: Sequence[Task],
    *,
    cpus: float,
    gpus: float | None,
    device: str,
    on_report: Report,
) -> Generator[Result, None, None]:
    """Run `fn` over the tasks, inside of `on_cluster`.

    Args:
        fn: picklable; its modules are installed on every node.
        tasks: picklable; started in this order.
        cpus, gpus: that a task takes.
        device: if gpus is None, "cuda" means 1, "auto" means 1 if the cluster has any, all else none.
        on_report: gets every report, in this process. What a task reported before its worker died comes again with a minus.

    Yields:
        The results, as they come.

    Raises:
        WorkerDied: a task killed its worker, or lost its node, time and again.
        Exception: whatever `fn` raised; the other tasks are stopped.
    """
    ray = _load_ray()
    if gpus is None:
        gpus = float(device.startswith("cuda") or (device == "auto" and ray.cluster_resources().get("GPU", 0) > 0))
    _check_room(ray, cpus, gpus)
    # Ray would give a GPU task a new process each time; kept, the model stays loaded.
    remote = ray.remote(num_cpus=cpus, num_gpus=gpus, max_retries=_RETRIES, max_calls=0)(_run_in_worker)
    node = ray.get_runtime_context().get_node_id()
    on_node = ray.util.scheduling_strategies.NodeAffinitySchedulingStrategy(node, soft=False)
    board = ray.remote(num_cpus=0, scheduling_strategy=on_node)(_Board).remote()
    box = [ray.put(fn)]
    known = Advance()
    waiting = enumerate(tasks)
    pending: dict[Any, int] = {}
    try:
        while True:
            for number, task in islice(waiting, max(_room(ray, cpus, gpus) - len(pending), 0)):
                pending[remote.remote(box, board, number, task)] = number
            if not pending:
                return
            done, _ = ray.wait(list(pending), timeout=_POLL_S)
            before, known = known, ray.get(board.total.remote())
            on_report(known - before)
            for ref in done:
                yield _get(ray, ref, pending.pop(ref))
    finally:
        for ref in pending:
            ray.cancel(ref, force=True)


class _Board:
    """What all tasks have done. One that begins again, since its worker died, takes back what it had said."""

    def __init__(self) -> None:
        self._sums: dict[int, Advance] = {}
        self._total = Advance()

    def tell(self, number: int, done: Advance) -> None:
        self._total += done - self._sums.get(number, Advance())
        self._sums[number] = done

    def total(self) -> Advance:
        return self._total


def _run_in_worker(box: list[Any], board: Any, number: int, task: Any) -> Any:
    """Do a task. When its result is there, the board has heard all of it."""
    ray = _load_ray()
    key = box[0].hex()
    if key not in _held:
        _held.clear()
        _held[key] = ray.get(box[0])
    done = Advance()
    reported_s = 0.0

    def report(new: Advance) -> None:
        nonlocal done, reported_s
        done += new
        if time.monotonic() - reported_s >= _TELL_EVERY_S:
            reported_s = time.monotonic()
            board.tell.remote(number, done)

    result = _held[key](task, report)
    ray.get(board.tell.remote(number, done))
    return result.finish() if isinstance(result, Rest) else result


def _get(ray: Any, ref: Any, number: int) -> Any:
    try:
        return ray.get(ref)
    except ray.exceptions.RayTaskError as error:
        raise error.cause from error
    except ray.exceptions.RayError as error:
        raise WorkerDied(
            f"task {number} lost its worker or its node {_RETRIES + 1} times, or ran out of memory: "
            f"{str(error).splitlines()[0]}. Finished shards are kept: run again with --resume, and with more --task-cpus, "
            "so that fewer tasks share a node, if memory was short"
        ) from error


def _room(ray: Any, cpus: float, gpus: float) -> int:
    """How many tasks are kept with Ray: twice what fits, so that none waits for the driver."""
    has = ray.cluster_resources()
    fits = [has.get(name, 0) / need for name, need in (("CPU", cpus), ("GPU", gpus)) if need]
    return max(_MIN_AHEAD, int(2 * min(fits, default=0)))


def _connect(ray: Any, address: str | None) -> None:
    """Raise UsageError if there is no cluster at that address."""
    cluster, named = address, "--ray-address"
    if address in (None, "auto") and os.environ.get("RAY_ADDRESS"):
        cluster, named = os.environ["RAY_ADDRESS"], "RAY_ADDRESS"
    host, colon, port = (cluster or "").removeprefix("ray://").rpartition(":")
    try:
        if colon and port.isdecimal():  # Ray itself would try for longer
            socket.create_connection((host.strip("[]"), int(port)), timeout=_CONNECT_S).close()
        logging.getLogger("ray").setLevel(logging.ERROR)  # ray.init sets it only where it configures logging
        started = {} if address else {"include_dashboard": False}  # of a cluster that is started for this run
        ray.init(address=address, log_to_driver=False, configure_logging=False, **started)
    except (OSError, OverflowError, ValueError, RuntimeError) as error:
        cause = str(error).partition("\n")[0]
        what = {"--ray-address": "see `ray start --head`", "RAY_ADDRESS": "correct or unset it, or give --ray-address"}[named]
        raise UsageError(f"{named} {cluster}: no Ray cluster answers there ({cause}): {what}") from error


def check_device(device: str) -> None:
    """Raise UsageError for a device by number, or for several: Ray deals them out."""
    if ":" in device or "," in device:
        raise UsageError(f"--device {device} with --executor ray: each task gets a GPU of its own, so give --device cuda")


def _check_room(ray: Any, cpus: float, gpus: float) -> None:
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    if not any(node.get("CPU", 0) >= cpus and node.get("GPU", 0) >= gpus for node in nodes):
        say(
            f"wds-tools: no node of the cluster has the {cpus:g} CPUs and {gpus:g} GPUs of a task: waiting for one to join "
            "(see --task-cpus, --task-gpus)",
            error=True,
        )


def _load_ray() -> Any:
    try:
        import ray
        import ray.exceptions
        import ray.util.scheduling_strategies
    except ImportError as error:
        raise MissingPackage("--executor ray needs Ray on this machine and on all nodes: pip install 'wds-tools[ray]'") from error
    return ray
