"""obstore itself: its module, its clients, and what its errors say. objects.py makes a Store of it.

obstore's I/O threads don't survive a fork, while its epoll descriptor is shared by it: used in a forked child, it hangs the
child and can crash the parent (seen with 0.12). So obstore() gives a forked child a copy of its own, and nothing of the
parent's is ever freed in the child, since freeing a connection would also take it out of the parent's epoll.
"""

import base64
import importlib
import importlib.machinery
import importlib.util
import os
import re
import sys
import threading
from datetime import timedelta
from typing import Any
from urllib.parse import unquote

from wds_tools.errors import MissingPackage, StorageError, UsageError
from wds_tools.storage.base import cause, redact

RETRY_VARIABLE = "WDS_TOOLS_RETRY_S"
RETRY_S = 180.0  # obstore advises to stay below 5 minutes: a retried request keeps its credentials

HINTS = {
    "s3": "check AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY (and AWS_SESSION_TOKEN), and that they may use the bucket "
    "(a public one wants AWS_SKIP_SIGNATURE=true)",
    "gs": "check GOOGLE_APPLICATION_CREDENTIALS, and that this account may use the bucket",
    "az": "check AZURE_STORAGE_ACCOUNT_NAME and AZURE_STORAGE_ACCOUNT_KEY, and that this account may use the container",
    "http": "this address needs a login, or forbids it",
}

_REASONS = (
    r"status code: (\d+ [A-Za-z ]+)",
    r"<Code>(\w+)</Code>",
    r'message: "([^"]+)"',  # of an errno, or of the resolver
)

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
    value = os.environ.get(RETRY_VARIABLE, "")
    try:
        seconds = float(value) if value else RETRY_S
    except ValueError:
        seconds = -1
    if not 0 <= seconds <= 3600:
        raise UsageError(f"{RETRY_VARIABLE}={value!r}: expected a number of seconds from 0 to 3600")
    return seconds


def client_of(kind: str, bucket: str, login: str | None) -> Any:
    """The client of a bucket: one per process and environment, so that all stores in it share its connections.

    Args:
        kind: "s3", "gs", "az", "http" or "memory".
        bucket: its name; the container for az, scheme://host for http, "" for memory.
        login: user:password of an http address, percent-encoded.

    Returns:
        An obstore store.

    Raises:
        StorageError: obstore refuses the settings it finds in the environment.
        UsageError: WDS_TOOLS_RETRY_S is no number of seconds.
        MissingPackage: AWS_PROFILE is set, and boto3 isn't here to read it.
    """
    store = obstore().store
    settings = {
        name: value
        for name, value in os.environ.items()
        if name.startswith(("AWS_", "AZURE_", "GOOGLE_")) or name == RETRY_VARIABLE
    }
    key = (kind,) if kind == "memory" else (kind, bucket, login, *sorted(settings.items()))
    with _lock:
        if key not in _clients:
            _clients[key] = store.MemoryStore() if kind == "memory" else _new(store, kind, bucket, login, settings)
        return _clients[key]


def _new(store: Any, kind: str, bucket: str, login: str | None, settings: dict[str, str]) -> Any:
    budget = retry_s()
    options: dict[str, Any] = {"connect_timeout": "10s", "read_timeout": "60s", "timeout": "120s"}
    retry = {
        "max_retries": 1000 if budget else 0,  # time is the limit, not the count
        "retry_timeout": timedelta(seconds=budget),
        "backoff": {
            "init_backoff": timedelta(milliseconds=100),
            "max_backoff": timedelta(seconds=min(15.0, max(0.1, budget / 4))),
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
    if kind == "s3" and settings.get("AWS_PROFILE") and "AWS_ACCESS_KEY_ID" not in settings:
        more["credential_provider"] = _profile()
    make = {"s3": "S3Store", "gs": "GCSStore", "az": "AzureStore", "http": "HTTPStore"}[kind]
    try:
        return getattr(store, make)(bucket, client_options=options, retry_config=retry, **more)
    except foreign() as error:
        show = bucket if kind == "http" else f"{kind}://{bucket}"
        raise StorageError(f"{show}: can't set up a client: {reason(error)}; {HINTS[kind]}") from cause(error)


def _profile() -> Any:
    """What asks boto3 for the keys of AWS_PROFILE, which obstore doesn't read."""
    try:
        return importlib.import_module("obstore.auth.boto3").Boto3CredentialProvider()
    except ImportError as error:
        raise MissingPackage("AWS_PROFILE is set, and reading profiles takes boto3: pip install boto3") from error


def foreign() -> tuple[type[Exception], ...]:
    """What obstore raises: its own errors and, for some, Python's. For `except`."""
    return (obstore().exceptions.BaseError, OSError, ValueError)


def reason(error: BaseException) -> str:
    """What a foreign message comes down to: status and S3's word for it, what the socket said, or its first line."""
    text = str(error)
    parts = [match[1] for pattern in _REASONS if (match := re.search(pattern, text))]
    return ": ".join(parts) or redact(text.partition("\n")[0])[:300] or type(error).__name__


def status_of(error: BaseException) -> int | None:
    """The HTTP status in obstore's message, which has no field for it; None without one."""
    _, found, rest = str(error).partition("status code: ")
    return int(rest[:3]) if found and rest[:3].isdigit() else None


def is_unreachable(error: BaseException) -> bool:
    """Whether nobody answered, as opposed to an answer we don't like."""
    return any(mark in str(error) for mark in ("kind: Connect", "kind: Timeout", "error sending request"))
