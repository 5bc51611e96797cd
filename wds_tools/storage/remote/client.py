"""obstore itself: its module, its clients, how bytes are got from them, and what its errors say. objects.py makes a Store of it.

obstore tries again by itself, and resumes a body at the byte reached if the object has a tag, both for as long as its client's
budget lasts from the request's first moment: one that has run for longer dies of any fault, however well it went. So reads go
through fetch(), with clients of their own that have a quarter of the budget, WDS_TOOLS_RETRY_S (default 180 seconds), and a
minute for a body, and call a connection dead that brings no byte for WDS_TOOLS_STALL_S (default 20 seconds, a quarter of the
budget at most). What obstore gives up, fetch() goes on with, round after round, until for so long nothing has come, or less than
WDS_TOOLS_LEAST_BYTES_PER_S (default 10,000), that one more would exceed the budget. All other requests are obstore's alone; one
try has half of the budget, a minute at most, body included, and all tries together end within the budget.

obstore's I/O threads don't survive a fork, while its epoll descriptor is shared by it: used in a forked child, it hangs the
child and can crash the parent (seen with 0.12). So obstore() gives a forked child a copy of its own, and nothing of the
parent's is ever freed in the child, since freeing a connection would also take it out of the parent's epoll.
"""

import base64
import importlib
import importlib.machinery
import importlib.util
import os
import random
import re
import sys
import threading
import time
from datetime import timedelta
from typing import Any, Literal
from urllib.parse import unquote

from wds_tools.errors import StorageError, UsageError
from wds_tools.storage.base import Buffer, cause
from wds_tools.storage.remote.meanings import EXPIRED, HINTS, code_of, reason, status_of
from wds_tools.storage.remote.profile import ProfileKeys, has_default_profile
from wds_tools.storage.remote.waits import Wait

RETRY_VARIABLE = "WDS_TOOLS_RETRY_S"
RETRY_S = 180.0  # obstore advises to stay below 5 minutes: a retried request keeps its credentials
STALL_VARIABLE = "WDS_TOOLS_STALL_S"
STALL_S = 20.0
LEAST_VARIABLE = "WDS_TOOLS_LEAST_BYTES_PER_S"
LEAST_BYTES_PER_S = 10_000.0
PERIOD_S = 60.0  # after which a body that is slower is cut
FIRST_PAUSE_S = 0.1
LONGEST_PAUSE_S = 15.0
ROUNDS = 4  # a read's budget over that of one request

Use = Literal["ranges", "whole", "other"]
"""What a client is for: fetch(), files of servers that know no ranges, and everything else."""

_OWN_KEYS = {
    "AWS_ACCESS_KEY_ID",
    "AWS_SKIP_SIGNATURE",
    "AWS_WEB_IDENTITY_TOKEN_FILE",
    "AWS_CONTAINER_CREDENTIALS_RELATIVE_URI",
    "AWS_CONTAINER_CREDENTIALS_FULL_URI",
}
"""With one of these, obstore needs no profile."""
_lock = threading.Lock()
_clients: dict[tuple[Any, ...], Any] = {}
_kept: list[Any] = []  # what belongs to the process we were forked from
_owner_pid = 0  # whose obstore sys.modules has; 0 = nobody's yet, -1 = that of a parent who loaded it without us


def obstore() -> Any:
    """The obstore of this process.

    Returns:
        The module. In a child forked from a process that had used it, a second copy (30 ms, 15 MB) with its own threads,
        loaded from memory since the dynamic linker would recognise the file.

    Raises:
        StorageError: this system doesn't allow that copy.
    """
    global _owner_pid
    if _owner_pid == os.getpid():
        return sys.modules["obstore"]
    with _lock:
        if _owner_pid not in (0, os.getpid()):
            _kept.append(dict(_clients))
            _clients.clear()
            _load_copy()
        module = importlib.import_module("obstore")
        importlib.import_module("obstore.store")
        _owner_pid = os.getpid()
    return module


def _load_copy() -> None:
    """Replace the obstore modules of sys.modules by ones over a second copy of the compiled library."""
    old = {name: module for name, module in sys.modules.items() if name.partition(".")[0] == "obstore"}
    library = old["obstore._obstore"].__file__
    assert library is not None
    for name in old:
        del sys.modules[name]
    try:
        descriptor = os.memfd_create("obstore")
        try:
            with open(library, "rb") as file:
                while os.sendfile(descriptor, file.fileno(), None, 1 << 30):
                    pass
            path = f"/proc/self/fd/{descriptor}"
            loader = importlib.machinery.ExtensionFileLoader("obstore._obstore", path)
            spec = importlib.util.spec_from_file_location("obstore._obstore", path, loader=loader)
            assert spec is not None
            module = importlib.util.module_from_spec(spec)
            loader.exec_module(module)
        finally:
            os.close(descriptor)
    except (OSError, AttributeError, ImportError) as error:
        sys.modules.update(old)
        raise StorageError(
            "this process was forked from one that had used an object store, which obstore doesn't survive: start "
            "workers with 'spawn' or 'forkserver' (DataLoader: multiprocessing_context='forkserver')"
        ) from error
    module.__file__ = library  # a child of this process will copy it again
    _kept.append(old)
    sys.modules["obstore._obstore"] = module


def _after_fork() -> None:
    global _lock, _owner_pid
    _lock = threading.Lock()  # a thread of the parent may have held it
    if _owner_pid == 0 and "obstore._obstore" in sys.modules:
        _owner_pid = -1


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


def retry_s() -> float:
    """The budget for retries in seconds, from WDS_TOOLS_RETRY_S; 0 means a single try. Raises UsageError."""
    return _number(RETRY_VARIABLE, RETRY_S, "seconds", 0, 3600)


def stall_s() -> float:
    """After how many seconds without a byte a read is cut and resumed, from WDS_TOOLS_STALL_S. Raises UsageError."""
    return _number(STALL_VARIABLE, STALL_S, "seconds", 0.1, 3600)


def least_bytes_per_s() -> float:
    """How fast bytes have to come, over a minute, from WDS_TOOLS_LEAST_BYTES_PER_S; 0 for no limit. Raises UsageError."""
    return _number(LEAST_VARIABLE, LEAST_BYTES_PER_S, "bytes a second", 0, 1e9)


def _number(variable: str, default: float, unit: str, least: float, most: float) -> float:
    value = os.environ.get(variable, "")
    try:
        number = float(value) if value else default
    except ValueError:
        number = -1
    if not least <= number <= most:
        raise UsageError(f"{variable}={value!r}: expected a number of {unit} from {least:g} to {most:g}")
    return number


def client_of(kind: str, bucket: str, login: str | None, use: Use) -> Any:
    """The client of a bucket: one per process and environment, so that all stores in it share its connections.

    Args:
        kind: "s3", "gs", "az", "http" or "memory".
        bucket: its name; the container for az, scheme://host for http, "" for memory.
        login: user:password of an http address, percent-encoded.
        use: what for.

    Returns:
        An obstore store.

    Raises:
        StorageError: obstore refuses the settings it finds in the environment.
        UsageError: one of our own variables is no number.
        MissingPackage: AWS_PROFILE is set, and boto3 isn't here to read it.
    """
    store = obstore().store
    settings = {
        name: value
        for name, value in os.environ.items()
        if name.startswith(("AWS_", "AZURE_", "GOOGLE_")) or name in (RETRY_VARIABLE, STALL_VARIABLE, LEAST_VARIABLE)
    }
    key = (kind,) if kind == "memory" else (kind, bucket, login, use, *sorted(settings.items()))
    with _lock:
        if key not in _clients:
            _clients[key] = store.MemoryStore() if kind == "memory" else _new(store, kind, bucket, login, use, settings)
        return _clients[key]


def _new(store: Any, kind: str, bucket: str, login: str | None, use: Use, settings: dict[str, str]) -> Any:
    # The last try begins after the longest pause, and all has to be over within the budget.
    least_bytes_per_s()  # said now if it is no number
    budget = retry_s() if use == "other" else retry_s() / ROUNDS
    silence_s = min(60, budget / 2 or 60) if use == "other" else min(stall_s(), budget or stall_s())
    pause_s = min(LONGEST_PAUSE_S, max(FIRST_PAUSE_S, budget / 6))
    answer_s = {"other": silence_s, "ranges": PERIOD_S, "whole": 86400}[use]
    options: dict[str, Any] = {
        "connect_timeout": f"{min(10, silence_s) * 1000:.0f}ms",
        "read_timeout": f"{silence_s * 1000:.0f}ms",  # counts while a body is sent, too
        "timeout": f"{answer_s * 1000:.0f}ms",
    }
    retry = {
        "max_retries": 1000 if budget else 0,  # time is the limit, not the count
        "retry_timeout": timedelta(seconds=max(0, budget - silence_s - pause_s)),
        "backoff": {
            "init_backoff": timedelta(seconds=FIRST_PAUSE_S),
            "max_backoff": timedelta(seconds=pause_s),
            "base": 2,
        },
    }
    more: dict[str, Any] = {}
    endpoints = [value for name, value in settings.items() if "ENDPOINT" in name]
    if any(address.startswith("http://") for address in (bucket, *endpoints)):
        options["allow_http"] = True  # whoever wrote http:// meant it
    if login:  # in a header, so that no message can show it
        token = base64.b64encode(unquote(login).encode()).decode()
        options["default_headers"] = {"authorization": f"Basic {token}"}
    if kind == "s3" and not _OWN_KEYS.intersection(settings) and (settings.get("AWS_PROFILE") or has_default_profile(settings)):
        more["credential_provider"] = ProfileKeys(settings.get("AWS_PROFILE", "default"))
    make = {"s3": "S3Store", "gs": "GCSStore", "az": "AzureStore", "http": "HTTPStore"}[kind]
    try:
        return getattr(store, make)(bucket, client_options=options, retry_config=retry, **more)
    except foreign() as error:
        show = bucket if kind == "http" else f"{kind}://{bucket}"
        raise StorageError(f"{show}: can't set up a client: {reason(error)}; {HINTS[kind]}") from cause(error)


class FetchError(Exception):
    """What fetch() finds out by itself; its cause, if any, is the last of obstore's errors."""


class Stuck(FetchError):
    """No byte came in the time that may be spent on waiting for one, or too few.

    Attributes:
        start: first byte wanted.
        end: one past the last.
        reached: the first that didn't come.
        seconds: how long it was tried to get that one, or enough of those before it.
        num_bytes: that came in this time, or 1 if there were some.
    """

    def __init__(self, start: int, end: int, reached: int, seconds: float, num_bytes: int) -> None:
        super().__init__(f"bytes [{start}, {end}): {num_bytes} up to {reached} in {seconds:.1f} s")
        self.start, self.end, self.reached, self.seconds, self.num_bytes = start, end, reached, seconds, num_bytes


class Replaced(FetchError):
    """The object is no longer the one whose first bytes are here."""


class Pace:
    """Whether bytes come fast enough: since when they don't, or nothing does, and how many have come since.

    Args:
        wait: what is said aloud if they don't.
    """

    def __init__(self, wait: Wait) -> None:
        self._least, self._wait = least_bytes_per_s(), wait
        self.renew()

    def renew(self, num_bytes: int = 0) -> None:
        """All is well so far; so many bytes are to come at once."""
        self.since, self.num_bytes = time.monotonic(), 0
        self._wait.renew(num_bytes)

    def add(self, num_bytes: int) -> bool:
        """Take note of bytes; whether they came fast enough, as all before."""
        self.num_bytes += num_bytes
        is_well = self.num_bytes >= self._least * self.waited_s
        if is_well:
            self.renew()
        return is_well

    @property
    def waited_s(self) -> float:
        """Seconds since all was well."""
        return time.monotonic() - self.since


def fetch(bucket: Any, key: str, start: int, end: int, wait: Wait) -> tuple[Buffer, Any]:
    """Bytes of an object, however often the connection breaks on the way.

    The first request is obstore's: it copies nothing into Python, and resumes by itself; what it got is lost if it fails in
    the end. What follows is taken piece by piece, so that no byte of it is asked for twice, and only of the same version of
    the object. Before it is a pause: anything up to 0.1 s, doubled with every failure in a row, 15 s at most.

    Args:
        bucket: a client for ranges.
        key: the object's.
        start: first byte.
        end: one past the last, more than `start`; the object may end before.
        wait: for this.

    Returns:
        The bytes, read-only, and obstore's metadata of the object.

    Raises:
        Stuck: for so long nothing came, or less than least_bytes_per_s(), that another round would exceed retry_s().
        Replaced: the object changed on the way.
        foreign(): what trying again would not mend.
    """
    get, errors = obstore().get, foreign()
    round_s = retry_s() / ROUNDS
    options: dict[str, Any] = {"range": (start, end)}
    meta: Any = None
    data = memoryview(b"")
    reached, last = start, end  # the object may end before `end`
    num_failures, pace, begun = 0, Pace(wait), time.monotonic()
    while reached < last:
        is_first = meta is None
        try:
            result = get(bucket, key, options=options)
            wait.answered_s = wait.answered_s or time.monotonic() - begun
            if is_first:
                meta, last = result.meta, result.range[1]
                wait.num_bytes = last - start
                return memoryview(result.bytes()), meta
            if _version(result.meta) != _version(meta):
                raise Replaced(f"{key}: {_version(meta)} became {_version(result.meta)}")
            for piece in result.stream(min_chunk_size=1):
                data[reached - start : reached - start + len(piece)] = piece
                reached += len(piece)
                if pace.add(len(piece)):
                    num_failures = 0
            if reached < last:
                raise ConnectionError(f"the response ended at byte {reached}, it was to end at {last}")
        except errors as error:
            if meta is not None and status_of(error) in (412, 416):  # If-Match failed, or the object got shorter
                raise Replaced(f"{key}: {_version(meta)} is gone") from cause(error)
            if not may_pass(error) and not (code_of(error) in EXPIRED and getattr(bucket, "credential_provider", None)):
                raise
            if is_first and meta is not None:
                data = memoryview(bytearray(last - start))
                if pace.waited_s < PERIOD_S:  # bytes did come, a round ago at most
                    pace.renew()
                else:  # it was cut for coming too slowly
                    pace.num_bytes = 1
            wait.reason = reason(error)
            left_s = (ROUNDS - 1) * round_s - pace.waited_s
            if left_s <= 0:
                raise Stuck(start, end, reached, pace.waited_s, pace.num_bytes) from cause(error)
            longest_s = min(LONGEST_PAUSE_S, FIRST_PAUSE_S * 2 ** min(num_failures, 20))
            time.sleep(min(_jitter.uniform(0, longest_s), left_s))
            num_failures += 1
            options = {"range": (reached, last)}
            if meta is not None and not (meta["e_tag"] or "W/").startswith("W/"):  # a weak tag matches nothing
                options["if_match"] = meta["e_tag"]
    return data.toreadonly(), meta


_jitter = random.SystemRandom()  # of the caller's random numbers none is used up, and forked processes don't pause in step


def _version(meta: Any) -> tuple[Any, ...]:
    return meta["e_tag"] or meta["last_modified"], meta["size"]


def foreign() -> tuple[type[Exception], ...]:
    """What obstore raises: its own errors and, for some, Python's. For `except`."""
    return (obstore().exceptions.BaseError, OSError, ValueError)


def failures() -> tuple[type[Exception], ...]:
    """What fetch() raises. For `except`."""
    return (FetchError, *foreign())


def tried_s(error: BaseException) -> float | None:
    """How long obstore tried, by its own account; None if it doesn't say."""
    found = re.search(r"performing \w+ \S+ in ([\d.]+)(ms|s)", str(error))
    return float(found[1]) / (1000 if found[2] == "ms" else 1) if found else None


def may_pass(error: BaseException) -> bool:
    """Whether the same request may do better: nobody answered, the connection broke, or the server is overloaded or broken."""
    status = status_of(error)
    if "169.254.169.254" in str(error):  # where obstore looks for keys if there are no others
        return False
    if status is not None:
        return status in (408, 429) or (status >= 500 and status not in (501, 505))
    return isinstance(error, ConnectionError) or "HTTP error: " in str(error)
