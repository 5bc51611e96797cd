"""One run at a time writes to an output, or one a part: a lease, a file that its run rewrites while it lives.

    with Lease(store, part) as lease:   _work/run-ID.json, or _work/run-ID-PART-of-PARTS.json
        ... lease.check() ...           is it still ours?

A run that comes puts its lease, lists the others, and is refused by one that holds the output or has a lower name. Then it
marks its own as held, lists again, and goes on when those with a lower name have given up. It needs nothing of a store but what
all have. A run that was killed leaves its lease behind: if it ran on this machine, its process is gone; elsewhere, its lease does
not change any more. Invariant: of runs that could write the same file and come at the same moment one goes on, no two.
Cost: a small file written every HEARTBEAT_S, and two lists; after a kill on another machine LEASE_TIMEOUT_S of waiting.
"""

from __future__ import annotations

import os
import re
import socket
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from types import TracebackType
from typing import Any, Self

import orjson

from wds_tools.dataset.layout import LABELS, LEASES
from wds_tools.errors import FormatError, NotFound, StorageError, UsageError
from wds_tools.format.typed_json import read_json
from wds_tools.storage import Store
from wds_tools.storage.process import identity
from wds_tools.terminal import say

HEARTBEAT_S = 60.0
LEASE_TIMEOUT_S = 3.0 * HEARTBEAT_S
"""A lease that has not changed for so long belongs to no run any more."""
_FIRST_LOOK_S, _LOOK_EVERY_S = 0.02, 2.0
_LEAVE_S = 10.0
_TRIES = 5
_held: set[Lease] = set()
"""Those of this process."""
_PART = re.compile(r"-(\d+)-of-(\d+)\.json$")


@dataclass(frozen=True)
class Part:
    """One of so many equal parts of a job."""

    number: int = 0
    num_parts: int = 1

    def tasks(self, num_tasks: int) -> range:
        """The tasks of this part, of so many: those whose number leaves the part's over when divided."""
        return range(self.number, num_tasks, self.num_parts)


def files_of(store: Store) -> list[str]:
    """All files there, but for the leases of runs and what they prepare before they begin."""
    return [entry.name for entry in store.list() if not entry.name.startswith((LEASES, LABELS))]


class Lease:
    """A run's right to write to an output. A context manager: taken on entering, set free on leaving.

    Args:
        store: the output.
        part: what this run does, beside runs that do other parts of as many; None: all of it.

    Raises:
        UsageError: on entering: another run is writing there.
    """

    def __init__(self, store: Store, part: Part | None = None) -> None:
        self._store = store
        self._part = part
        ending = f"-{part.number}-of-{part.num_parts}" if part else ""
        self._name = f"{LEASES}{os.urandom(8).hex()}{ending}.json"
        self._facts: dict[str, Any] = {
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "process": identity(os.getpid()),
            "since": datetime.now(UTC).isoformat(timespec="seconds"),
            "is_held": False,
        }
        self._beats = 0
        self._putting = threading.Lock()
        self._is_lost = threading.Event()
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._beat, daemon=True)

    def __enter__(self) -> Self:
        _held.add(self)
        try:
            self._put_with_retries()
            self._thread.start()
            known = {name: self._read(name) for name in self._others()}
            self._outlast(known)
            if not self._store.exists(self._name):
                self._is_lost.set()
            self.check()
            self._facts["is_held"] = True
            self._put_with_retries()
            self._outlast({name: known.get(name) for name in self._others()})
        except BaseException:
            self._leave()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if error is not None:
            with suppress(StorageError):
                self.check()
                self._store.clean_temp(only_dead=self._part is not None)  # of workers that were stopped in the midst of writing
        self._leave()

    def check(self) -> None:
        """Raise StorageError if another run has taken this one for dead and gone on in its place."""
        if self._is_lost.is_set():
            raise StorageError(
                f"{self._store.url}: this run lost its lease (no heartbeat for {LEASE_TIMEOUT_S:g} s) and another run took over: "
                "stopping"
            )

    def _put_with_retries(self) -> None:
        """Put the lease, though a run that begins or ends at this moment may clear away what looks half written."""
        for attempt in range(_TRIES):
            try:
                self._put()
                return
            except NotFound:
                if attempt == _TRIES - 1:
                    raise

    def _put(self) -> None:
        with self._putting:  # so that no older heartbeat comes after a newer one
            self._store.put(self._name, orjson.dumps({**self._facts, "beats": self._beats}))
            self._beats += 1

    def _beat(self) -> None:
        while not self._is_over.wait(HEARTBEAT_S):
            try:
                if not self._store.exists(self._name):
                    self._is_lost.set()
                    return
                self._put()
            except StorageError:
                pass  # the run's own writes will say so, if it lasts

    def _leave(self) -> None:
        self._is_over.set()
        if self._thread.ident is not None:
            self._thread.join(_LEAVE_S)
        try:
            self._store.delete(self._name)
        except StorageError:
            pass  # whatever ended the run is worth more; a lease that is left is found to be dead
        _held.discard(self)

    def _outlast(self, others: Mapping[str, bytes | None]) -> None:
        """Return when each of these leases has gone or gives way to this one; those of dead runs are removed.

        Args:
            others: as they were when they were first seen; one that has changed since then is alive.
        """
        waiting = dict(others)
        deadline = time.monotonic() + LEASE_TIMEOUT_S
        pause_s, is_reported = _FIRST_LOOK_S, False
        while True:
            is_late = time.monotonic() > deadline
            for name, before in list(waiting.items()):
                now = self._read(name)
                is_held = now is not None and _facts(now).get("is_held", True)
                is_alive = None if now is None else _lives(now)
                if is_alive is None and now is not None and now != before:
                    is_alive = True
                if now is None:
                    del waiting[name]
                elif is_alive is False or (is_alive is None and is_late):
                    self._store.delete(name)
                    del waiting[name]
                elif name > self._name and (self._facts["is_held"] or not is_held):
                    del waiting[name]  # it sees this one, and gives way
                elif is_alive and (is_held or is_late or not self._facts["is_held"]):
                    raise UsageError(
                        f"{self._store.url}: another run is writing there ({_who(now)}): wait until it has ended, or stop it"
                    )
            if not waiting:
                return
            if not (is_reported or self._facts["is_held"]):
                is_reported = True
                say(
                    f"wds-tools: {self._store.url} has a lease of {_who(others[next(iter(waiting))])}: "
                    f"waiting up to {LEASE_TIMEOUT_S:g} s to see whether that run is alive",
                    error=True,
                )
            time.sleep(pause_s)
            pause_s = min(2 * pause_s, _LOOK_EVERY_S, LEASE_TIMEOUT_S / 10)

    def _others(self) -> list[str]:
        """The leases of runs that may write what this one writes: all but those of other parts of as many."""
        names = [entry.name for entry in self._store.list(LEASES) if entry.name != self._name]
        return [name for name in names if not self._goes_with(name)]

    def _goes_with(self, name: str) -> bool:
        match = _PART.search(name)
        if match is None or self._part is None:
            return False
        return self._part.num_parts == int(match[2]) and self._part.number != int(match[1])

    def _read(self, name: str) -> bytes | None:
        try:
            return self._store.read(name)
        except NotFound:
            return None


def free_leases() -> None:
    """Leave every output of this process, as an interrupt of its main thread would. For one that ends right after."""
    for lease in tuple(_held):
        lease.__exit__(KeyboardInterrupt, KeyboardInterrupt(), None)


def _lives(lease: bytes) -> bool | None:
    """Whether the process of a lease runs on this machine; None if it can't be told from here."""
    process = _facts(lease).get("process")
    this = identity(os.getpid())
    if this is None or not isinstance(process, list) or len(process) != len(this) or process[:2] != this[:2]:
        return None
    pid = _facts(lease).get("pid")
    return isinstance(pid, int) and identity(pid) == process


def _who(lease: bytes | None) -> str:
    facts = _facts(lease or b"{}")
    return f"process {facts.get('pid')} on {facts.get('host')}, since {facts.get('since')}"


def _facts(lease: bytes) -> dict[str, Any]:
    try:
        return read_json(dict[str, Any], lease, "not a lease")
    except FormatError:
        return {}
