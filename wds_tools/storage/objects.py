"""Object stores and web servers, through obstore: s3, gs, az, http(s), and one memory store a process for tests.

A small object is one GET or one PUT. A large one is read as ranges of 8 MiB, two ahead of the reader, so a slow consumer
never meets a timeout, and up to eight for one who has to wait; a writer sends parts of 8 MiB, two under way, and the object
appears when the last is acknowledged. Either holds about 32 MiB, a reader that has to wait up to 80. A range whose connection
breaks, stalls or creeps is resumed at the byte reached (client.fetch). What fails is tried again with growing pauses, for
WDS_TOOLS_RETRY_S seconds (default 180) without progress, then reported; after 5 of them a line on stderr says so (waits). Every
request goes through _asking, which is where obstore's errors become ours.

A reader or writer doesn't cross a fork; a store does (client.py says how).
"""

import io
import os
import time
from collections import deque
from collections.abc import Generator, Iterable, Iterator
from contextlib import AbstractContextManager, closing, contextmanager, suppress
from typing import Any
from urllib.parse import unquote

from wds_tools.errors import StorageError, UsageError
from wds_tools.storage.ahead import ahead
from wds_tools.storage.base import Buffer, Entry, Store, Writer, cause, check_name, redact, split_scheme
from wds_tools.storage.remote import client
from wds_tools.storage.remote.meanings import HINTS, reason, status_of, translated
from wds_tools.storage.remote.waits import Wait, waiting

SCHEMES = {
    "s3": "s3",
    "s3a": "s3",
    "gs": "gs",
    "gcs": "gs",
    "az": "az",
    "http": "http",
    "https": "http",
    "memory": "memory",
}

CHUNK_BYTES = 8 << 20  # of a ranged read, and of a part of a multipart upload (10,000 parts: objects up to 80 GiB)
PARTS_UNDER_WAY = 2
_ANSWERS = 256
_UNDER_WAY_BYTES = (PARTS_UNDER_WAY + 1) * CHUNK_BYTES  # that a writer may have to send before it goes on
_ENDPOINTS = ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "AWS_ENDPOINT")
MAX_PUT_BYTES = CHUNK_BYTES  # a larger put() is sent as a multipart upload: a try is a minute at most


class ObjectStore(Store):
    """A prefix of a bucket, or a folder of a web server. See Store for what the methods promise.

    Args:
        url: scheme://bucket/prefix; its scheme is a key of SCHEMES.
    """

    def __init__(self, url: str) -> None:
        scheme, rest = split_scheme(url)
        super().__init__(url)
        self._kind = SCHEMES[scheme]
        self._login: str | None = None
        if "?" in rest or "#" in rest:
            raise UsageError(f"{self.url}: a query or fragment can't be part of a root: give the plain address")
        if self._kind == "memory":
            self._bucket, path = "", rest
        else:
            self._bucket, _, path = rest.partition("/")
            login, _, host = self._bucket.rpartition("@")
            if not host:
                raise UsageError(f"{self.url}: expected {scheme}://bucket/prefix")
            if login and self._kind != "http":
                raise UsageError(f"{self.url}: keys don't belong in a URL: {HINTS[self._kind]}")
            if self._kind == "http":
                self._login = login or None
                self._bucket = f"{scheme}://{host}"
                path = unquote(path)
        self._prefix = path.strip("/")
        if self._prefix:
            check_name(self._prefix, url)
        self._clients: dict[client.Use, Any] = {}
        self._pid = 0
        self.first_bytes_s: deque[float] = deque(maxlen=_ANSWERS)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_clients": {}, "_pid": 0}

    def _entries(self, folder: str) -> Iterable[Entry]:
        if self._kind == "http":
            raise StorageError(f"{self.url}: a web server can't be asked for a list: name the files, or use a manifest")
        top = self._key(folder) if folder else self._prefix
        skip = len(self._prefix) + 1 if self._prefix else 0
        bucket = self._connect()
        found: list[Entry] = []
        with self._asking("list", folder) as wait:
            begun = time.monotonic()
            while True:
                try:
                    for page in client.obstore().list(bucket, top or None, chunk_size=1000):
                        found.extend(Entry(meta["path"][skip:], meta["size"]) for meta in page)
                        wait.renew()
                    break
                except client.foreign() as error:  # obstore asks again for all but a body that breaks off
                    if "list response body" not in str(error) or time.monotonic() - begun > client.retry_s() / 2:
                        raise
                    found.clear()
        return found

    def size(self, name: str) -> int:
        key, bucket = self._key(name), self._connect()
        with self._asking("look at", name):
            try:
                return int(client.obstore().head(bucket, key)["size"])
            except client.foreign() as error:
                if status_of(error) not in (400, 403):
                    raise
            return int(client.obstore().get(bucket, key, options={"range": (0, 1)}).meta["size"])  # HEAD doesn't say why

    def _range(self, name: str, start: int, end: int) -> tuple[Buffer, int]:
        key, bucket = self._key(name), self._connect("ranges")
        try:
            with self._waiting("read", name) as wait:
                data, meta = client.fetch(bucket, key, start, end, wait)
        except client.failures() as error:
            found = self._size_if_known(name) if self._is_about_range(error) else None
            if found is not None and found < end:
                raise self._short(name, start, end, found) from cause(error)
            raise self._translate(error, "read", name) from cause(error)
        self.first_bytes_s.append(wait.answered_s)
        return data, int(meta["size"])

    def open(self, name: str) -> io.BufferedReader:
        return io.BufferedReader(_ChunkReader(self._chunks(name)), 1 << 20)

    def put(self, name: str, data: Buffer) -> None:
        key = self._key_to_write(name)
        bucket = self._connect()
        large = len(data) > MAX_PUT_BYTES
        with self._asking("write", name, len(data)):
            client.obstore().put(bucket, key, data, use_multipart=large, chunk_size=CHUNK_BYTES, max_concurrency=PARTS_UNDER_WAY)

    def write(self, name: str) -> Writer:
        return ObjectWriter(self, name)

    def delete(self, name: str) -> None:
        key, bucket = self._key_to_write(name), self._connect()
        with self._asking("delete", name), suppress(FileNotFoundError):
            client.obstore().delete(bucket, key)

    def _chunks(self, name: str) -> Generator[memoryview, None, None]:
        """The object's bytes in order, fetched ahead of whoever takes them."""
        key, bucket = self._key(name), self._connect("ranges")

        def fetch(start: int) -> tuple[memoryview, Any]:
            try:
                with self._waiting("read", name) as wait:
                    data, meta = client.fetch(bucket, key, start, start + CHUNK_BYTES, wait)
                return memoryview(data), meta
            except client.failures() as error:
                if start == 0 and self._has_no_ranges(name, error):
                    raise _NoRangesError from error
                raise self._translate(error, "read", name) from cause(error)

        try:
            data, meta = fetch(0)
        except _NoRangesError:
            yield from self._whole(name)
            return
        size, tag, position = int(meta["size"]), meta["e_tag"], len(data)
        yield data
        if position >= size:
            return
        with closing(ahead(fetch, range(position, size, CHUNK_BYTES))) as chunks:
            for data, meta in chunks:
                if meta["size"] != size or meta["e_tag"] != tag:
                    raise self._translate(client.Replaced(), "read", name)
                end = min(position + CHUNK_BYTES, size)
                if len(data) != end - position:
                    raise self._short(name, position, end, position + len(data))
                yield data
                position = end

    def _has_no_ranges(self, name: str, error: Exception) -> bool:
        """Whether the first range was refused for being one: empty objects have none, some web servers know none."""
        if type(error).__name__ == "NotSupportedError":
            return True
        return self._is_about_range(error) and self._size_if_known(name) == 0

    def _is_about_range(self, error: Exception) -> bool:
        """Whether it was the range that was refused: status 416, or the memory store's error without one."""
        return status_of(error) == 416 or (self._kind == "memory" and not isinstance(error, FileNotFoundError))

    def _whole(self, name: str) -> Iterator[memoryview]:
        """The same of a server that knows no ranges: one request, which can't be resumed."""
        key, bucket = self._key(name), self._connect("whole")
        with self._asking("read", name) as wait:
            pieces = iter(client.obstore().get(bucket, key).stream(min_chunk_size=1))
        waited_s, num_bytes = 0.0, 0  # so far without enough bytes; what the reader does with them doesn't count
        while True:
            with self._asking("read", name) as wait:
                piece = next(pieces, None)
                waited_s += time.monotonic() - wait.since
            if piece is None:
                return
            num_bytes += len(piece)
            if num_bytes >= client.least_bytes_per_s() * waited_s:
                waited_s, num_bytes = 0.0, 0
            elif waited_s > client.PERIOD_S:
                raise self._translate(client.Stuck(0, 0, 0, waited_s, num_bytes), "read", name)
            yield memoryview(piece)

    def _size_if_known(self, name: str) -> int | None:
        try:
            return self.size(name)
        except StorageError:
            return None

    def _key(self, name: str) -> str:
        check_name(name, self.url)
        return f"{self._prefix}/{name}" if self._prefix else name

    def _key_to_write(self, name: str) -> str:
        key = self._key(name)
        if self._kind == "http":
            raise StorageError(f"{self._show(name)}: http(s) addresses are read-only here: write to a folder or a bucket")
        return key

    def _connect(self, use: client.Use = "other") -> Any:
        """The client of this process for a use."""
        if self._pid != os.getpid():
            self._clients = {}
            self._pid = os.getpid()
        if use not in self._clients:
            self._clients[use] = client.client_of(self._kind, self._bucket, self._login, use)
        return self._clients[use]

    def _waiting(self, verb: str, name: str, num_bytes: int = 0) -> AbstractContextManager[Wait]:
        where = self._bucket if self._kind == "http" else f"{self._kind}://{self._bucket}"
        endpoint = next((os.environ[name] for name in _ENDPOINTS if self._kind == "s3" and os.environ.get(name)), "")
        where = f"{where} at {redact(endpoint)}" if endpoint else where
        return waiting(f"{verb} {self._show(name)}", where, client.retry_s(), num_bytes)

    @contextmanager
    def _asking(self, verb: str, name: str, num_bytes: int = 0) -> Iterator[Wait]:
        """While obstore is asked for something: if it takes long, it is said, and its errors are ours."""
        with self._waiting(verb, name, num_bytes) as wait:
            try:
                yield wait
            except client.foreign() as error:
                raise self._translate(error, verb, name, time.monotonic() - wait.since) from cause(error)

    def _translate(self, error: BaseException, verb: str, name: str, waited_s: float = 0.0) -> StorageError:
        """Our error for one of obstore's or of client.fetch, to be raised from it."""
        show = self._show(name)
        if isinstance(error, client.Replaced):
            return StorageError(f"{show} was replaced while it was read: read it again")
        seconds, came = client.tried_s(error) or waited_s, "no answer"
        stuck = isinstance(error, client.Stuck)
        if isinstance(error, client.Stuck):
            seconds = error.seconds
            verb = f"{verb} bytes [{error.start}, {error.end})" if error.end else verb
            came = f"nothing from byte {error.reached} on" if error.reached > error.start else came
            if error.num_bytes:
                came = f"less than {client.least_bytes_per_s():g} bytes a second ({client.LEAST_VARIABLE})"
            error = error.__cause__ or error
        if ours := translated(error, show, verb, self._kind, self._bucket):
            return ours
        if stuck or client.may_pass(error):
            todo = "check the network" + (" and AWS_ENDPOINT_URL" if self._kind == "s3" else " and the address")
            if status_of(error) is not None:
                todo = "the server is overloaded or broken"
            limit = f"{client.RETRY_VARIABLE}={client.retry_s():g}"
            return StorageError(
                f"{show}: can't {verb}, {came} in {round(seconds, 1):g} s of trying ({limit}): {todo} ({reason(error)})"
            )
        return StorageError(f"{show}: can't {verb}: {reason(error)}")


class ObjectWriter(Writer):
    """An object being uploaded. See Writer. Below CHUNK_BYTES it is one PUT at close, above it is a multipart upload.

    Args:
        store: where to.
        name: relative to the store.
    """

    def __init__(self, store: ObjectStore, name: str) -> None:
        self._store, self._name = store, name
        self._file: Any = None
        key, bucket = store._key_to_write(name), store._connect()
        with store._asking("write", name):
            self._file = client.obstore().open_writer(bucket, key, buffer_size=CHUNK_BYTES, max_concurrency=PARTS_UNDER_WAY)

    def write(self, data: Buffer, /) -> int:
        if self._done:
            raise ValueError("write to a closed writer")
        with self._store._asking("write", self._name, _UNDER_WAY_BYTES):
            self._file.write(data)
        return len(data)

    def _publish(self) -> None:
        try:
            with self._store._asking("write", self._name, _UNDER_WAY_BYTES):
                self._file.close()
        finally:
            self._file = None

    def _discard(self) -> None:
        self._file = None  # never completed, so never visible


class _NoRangesError(Exception):
    """Read it with one plain GET."""


class _ChunkReader(io.RawIOBase):
    """A file over a generator of chunks; the first is taken at once, so that a missing object is noticed at open()."""

    def __init__(self, chunks: Generator[memoryview, None, None]) -> None:
        self._chunks = chunks
        self._chunk = next(chunks, memoryview(b""))

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any, /) -> int:
        if not self._chunk:
            self._chunk = next(self._chunks, memoryview(b""))
        count = min(len(buffer), len(self._chunk))
        buffer[:count] = self._chunk[:count]
        self._chunk = self._chunk[count:]
        return count

    def readall(self) -> bytes:
        rest = b"".join((self._chunk, *self._chunks))
        self._chunk = memoryview(b"")
        return rest

    def close(self) -> None:
        self._chunk = memoryview(b"")
        self._chunks.close()
        super().close()
