"""What takes long is said: one line on stderr when something has been tried for NOTICE_S seconds, with what and until when.

    with waiting("read s3://b/a", "http://host:9000", limit_s) as wait:   # around every request, in whatever thread
        ...
        wait.renew()                                                      # when something has come

A single thread looks at all that is waited for in this process, and says one line an endpoint until that line's time is over.
Cost: a microsecond a request, and that thread.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field

from wds_tools.terminal import say

NOTICE_S = 5.0
SLOW_BYTES_PER_S = 1_000_000
"""Bytes are given this much more time before it is said that they are late."""


@dataclass(eq=False, kw_only=True)
class Wait:
    """Something that is waited for."""

    what: str
    """"read s3://bucket/a", for "trying to ..."."""
    where: str
    """Who has to answer: there is one line for each."""
    limit_s: float
    """When it is given up, from `since`."""
    num_bytes: int = 0
    """That have to be moved now."""
    reason: str = ""
    """Why the last try failed, if that is known."""
    since: float = field(default_factory=time.monotonic)
    answered_s: float = 0.0
    """From the first request to the first answer, if it came at all."""

    def renew(self, num_bytes: int = 0) -> None:
        """Something came; next to come are so many bytes."""
        self.since, self.num_bytes, self.reason = time.monotonic(), num_bytes, ""


_lock = threading.Lock()
_waits: set[Wait] = set()
_quiet_until: dict[str, float] = {}
_thread: threading.Thread | None = None


@contextmanager
def waiting(what: str, where: str, limit_s: float, num_bytes: int = 0) -> Iterator[Wait]:
    """While this is open, the process waits for it. See Wait for the arguments."""
    global _thread
    wait = Wait(what=what, where=where, limit_s=limit_s, num_bytes=num_bytes)
    with _lock:
        _waits.add(wait)
        if _thread is None:
            _thread = threading.Thread(target=_look, name="wds-waits", daemon=True)
            _thread.start()
    try:
        yield wait
    finally:
        with _lock:
            _waits.discard(wait)


def _look() -> None:
    while True:
        time.sleep(NOTICE_S / 5)
        now = time.monotonic()
        with _lock:
            late = [wait for wait in _waits if now - wait.since >= NOTICE_S + wait.num_bytes / SLOW_BYTES_PER_S]
        for wait in late:
            until = wait.since + wait.limit_s
            if now >= _quiet_until.get(wait.where, now):
                _quiet_until[wait.where] = max(until, now + NOTICE_S)
                why = f" ({wait.reason})" if wait.reason else ""
                clock = time.strftime("%H:%M:%S", time.localtime(time.time() + max(0, until - now)))
                line = (
                    f"wds-tools: {wait.where}: no answer for {now - wait.since:.0f} s{why}: trying to {wait.what} until {clock}"
                )
                with suppress(OSError, ValueError, AttributeError):  # nobody reads it
                    say(line, error=True)


def _after_fork() -> None:
    global _lock, _thread
    _lock, _thread = threading.Lock(), None  # a thread of the parent may have held the one, and has the other
    _waits.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
