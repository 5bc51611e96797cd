"""A web proxy on loopback that breaks what passes through it on purpose: point an S3 client at it instead of the server.

    with FaultProxy(s3.endpoint) as proxy:
        os.environ["AWS_ENDPOINT_URL"] = proxy.endpoint
        proxy.once(reset(1000), status(503), stall(2, after=10))            # one a GET, in this order
        proxy.faults = Faults(reset=0.1, truncate=0.1, stall_s=2, seed=7)   # chances, for a whole epoch
        proxy.leave(); proxy.come_back()                                    # connections are refused in between
        proxy.requests                                                      # what was asked, and how much of it was sent

Only reads of objects are broken: GETs without a query. The host header passes unchanged, so signatures stay good. Which
request breaks, and where, depends on the seed, its path, its first byte and how often it was asked before, not on time or on
the order of threads; what has failed `in_a_row` times goes through, so progress is certain. A thread a connection; 0.2 ms a
request and a few hundred MB/s.
"""

from __future__ import annotations

import contextlib
import fcntl
import http.client
import http.server
import random
import re
import socket
import struct
import termios
import threading
import time
from collections import defaultdict, deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from types import TracebackType
from urllib.parse import urlsplit

PIECE_BYTES = 1 << 16
_RESET_ON_CLOSE = struct.pack("ii", 1, 0)  # SO_LINGER: on, for no time at all
_OF_A_CONNECTION = {"connection", "keep-alive", "expect", "transfer-encoding"}  # not passed on


@dataclass(frozen=True)
class Fault:
    """What happens to one response; made by reset, truncate, status, stall.

    Attributes:
        kind: the name of what made it.
        after: bytes of the body that are sent first, modulo its length; -1 for before the first byte of the response.
        status: what is answered instead of the object.
        seconds: how long nothing is sent; the rest follows then.
    """

    kind: str
    after: int = 0
    status: int = 0
    seconds: float = 0.0


def reset(after: int) -> Fault:
    """The connection is reset (RST) after that many bytes of the body."""
    return Fault("reset", after=after)


def truncate(after: int) -> Fault:
    """The server hangs up, as if all were said, after that many bytes of a body that was announced longer."""
    return Fault("truncate", after=after)


def status(code: int) -> Fault:
    """An error is answered instead of the object, and the connection stays open."""
    return Fault("status", status=code)


def stall(seconds: float, after: int = -1) -> Fault:
    """Nothing is sent for a while after that many bytes of the body (-1: not even the status line), then the rest."""
    return Fault("stall", after=after, seconds=seconds)


@dataclass(frozen=True, kw_only=True)
class Faults:
    """Chances of each fault, per GET of an object; at most one happens to a request. Call it with a request for its fault."""

    reset: float = 0.0
    truncate: float = 0.0
    unavailable: float = 0.0  # a status of `statuses`
    stall: float = 0.0
    stall_s: float = 2.0
    statuses: tuple[int, ...] = (503,)
    seed: int = 0

    def __call__(self, request: Request) -> Fault | None:
        draw = random.Random(f"{self.seed} {request.path} {request.start} {request.turn}")
        after = draw.randrange(request.num_bytes) if request.num_bytes else 0
        kinds = {
            reset(after): self.reset,
            truncate(after): self.truncate,
            status(draw.choice(self.statuses)): self.unavailable,
            stall(self.stall_s, draw.choice([-1, after])): self.stall,
        }
        return draw.choices([*kinds, None], [*kinds.values(), 1 - sum(kinds.values())])[0]


@dataclass
class Request:
    """One request as the proxy saw it.

    Attributes:
        method: "GET", "PUT", ...
        path: as in the request line: /bucket/key, with its query.
        start: first byte asked for; 0 without a range.
        end: one past the last; None without one.
        turn: how many requests with this method, path and start came before.
        status: what was answered; 0 if it never came to that.
        sent: bytes of the body that were sent back.
        fault: what was done to it, if anything.
        headers: of the request, names in lower case.
    """

    method: str
    path: str
    start: int
    end: int | None
    turn: int
    headers: dict[str, str] = field(repr=False)
    status: int = 0
    sent: int = 0
    fault: Fault | None = None

    @property
    def num_bytes(self) -> int:
        """How many were asked for; 0 if it didn't say."""
        return 0 if self.end is None else self.end - self.start

    @property
    def reads_an_object(self) -> bool:
        return self.method == "GET" and "?" not in self.path


class FaultProxy:
    """The proxy; a context manager that listens while the block runs.

    Args:
        upstream: http://host:port of the real server.
        in_a_row: how often requests for one path and first byte may fail in a row before one passes; once() is not held to it.

    Attributes:
        endpoint: http://127.0.0.1:port, for the client.
        requests: all that came, in the order in which they did.
        faults: which fault a request gets, by chance or by your own function; None for none.
        latency_s: added to every response.
        bytes_per_s: of a body, on each connection; 0 for no limit.
    """

    def __init__(self, upstream: str, in_a_row: int = 3) -> None:
        self.upstream = urlsplit(upstream).netloc
        self.requests: list[Request] = []
        self.faults: Callable[[Request], Fault | None] | None = None
        self.latency_s = 0.0
        self.bytes_per_s = 0.0
        self._in_a_row = in_a_row
        self._script: deque[Fault | None] = deque()
        self._turns: defaultdict[tuple[str, str, int], int] = defaultdict(int)
        self._failed: defaultdict[tuple[str, int], int] = defaultdict(int)
        self._lock = threading.Lock()
        self._closing = threading.Event()
        self._listener: socket.socket | None = None
        self._connections: set[socket.socket] = set()
        self._threads: list[threading.Thread] = []
        self._port = 0

    def __enter__(self) -> FaultProxy:
        self.come_back()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self._closing.set()
        self.leave()
        for thread in self._threads:
            thread.join(10)

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self._port}"

    def once(self, *faults: Fault | None) -> None:
        """Do this to the next reads of objects, one each, in order (None: nothing), before `faults` is asked again."""
        with self._lock:
            self._script.extend(faults)

    def leave(self) -> None:
        """Be gone: reset every connection, refuse new ones."""
        if self._listener is not None:
            with contextlib.suppress(OSError):
                self._listener.shutdown(socket.SHUT_RDWR)  # wakes accept()
            self._listener.close()
            self._listener = None
        with self._lock:
            for connection in self._connections:
                with contextlib.suppress(OSError):
                    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET_ON_CLOSE)
                    connection.shutdown(socket.SHUT_RDWR)

    def come_back(self) -> None:
        """Listen again, on the same port as before."""
        self._listener = socket.create_server(("127.0.0.1", self._port), backlog=128)
        self._port = self._listener.getsockname()[1]
        self._start(self._accept, self._listener)

    def reads(self, name: str = "") -> list[Request]:
        """The reads of objects whose path ends with `name`."""
        return [request for request in self.requests if request.reads_an_object and request.path.endswith(name)]

    def wait(self, seconds: float) -> None:
        """Sleep, but not longer than the proxy lives."""
        self._closing.wait(seconds)

    def begin(self, method: str, path: str, headers: dict[str, str]) -> Request:
        """Note a request and choose its fault."""
        asked = re.fullmatch(r"bytes=(\d+)-(\d+)", headers.get("range", ""))
        start, end = (int(asked[1]), int(asked[2]) + 1) if asked else (0, None)
        with self._lock:
            turn = self._turns[method, path, start]
            self._turns[method, path, start] += 1
            request = Request(method, path, start, end, turn, headers)
            self.requests.append(request)
            if request.reads_an_object:
                request.fault = self._choose(request)
        return request

    def _choose(self, request: Request) -> Fault | None:
        if self._script:
            return self._script.popleft()
        place = request.path, request.start
        fault = self.faults(request) if self.faults and self._failed[place] < self._in_a_row else None
        self._failed[place] = self._failed[place] + 1 if fault else 0
        return fault

    def _accept(self, listener: socket.socket) -> None:
        while True:
            try:
                connection, address = listener.accept()
            except OSError:
                return
            self._start(self._serve, connection, address)

    def _serve(self, connection: socket.socket, address: object) -> None:
        with self._lock:
            self._connections.add(connection)
        try:
            with connection, contextlib.suppress(OSError):  # clients hang up
                connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                _Handler(connection, address, self)  # type: ignore[arg-type]
        finally:
            with self._lock:
                self._connections.discard(connection)

    def _start(self, target: Callable[..., None], *arguments: object) -> None:
        thread = threading.Thread(target=target, args=arguments, daemon=True)
        self._threads = [other for other in self._threads if other.is_alive()]
        thread.start()
        self._threads.append(thread)


class _Handler(http.server.BaseHTTPRequestHandler):
    """One connection of a client; a new connection to the server for each request."""

    protocol_version = "HTTP/1.1"
    server: FaultProxy  # type: ignore[assignment]
    connection: socket.socket

    def handle_one_request(self) -> None:
        self.raw_requestline = self.rfile.readline(65537)
        if not self.raw_requestline or not self.parse_request():  # which answers "Expect: 100-continue" itself
            self.close_connection = True
            return
        proxy = self.server
        headers = {name.lower(): value for name, value in self.headers.items()}
        request = proxy.begin(self.command, self.path, headers)
        body = self.rfile.read(int(headers.get("content-length", 0)))
        proxy.wait(proxy.latency_s)
        fault = request.fault
        if fault and fault.kind == "status":
            self._refuse(request, fault.status)
            return
        if fault and fault.after < 0:
            proxy.wait(fault.seconds)
        upstream = http.client.HTTPConnection(proxy.upstream, timeout=60)
        try:
            upstream.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
            for name, value in self.headers.items():
                if name.lower() not in _OF_A_CONNECTION:
                    upstream.putheader(name, value)
            upstream.endheaders(body or None)
            self._answer(request, upstream.getresponse())
        except (ConnectionRefusedError, http.client.RemoteDisconnected):
            self._refuse(request, 502)
        finally:
            upstream.close()

    def _refuse(self, request: Request, code: int) -> None:
        body = b"<Error><Code>Broken</Code><Message>by the fault proxy</Message></Error>"
        request.status = code
        self.send_response_only(code)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _answer(self, request: Request, response: http.client.HTTPResponse) -> None:
        """Send the server's response back, up to where the fault strikes."""
        request.status = response.status
        self.send_response_only(response.status, response.reason)
        for name, value in response.getheaders():
            if name.lower() not in _OF_A_CONNECTION:
                self.send_header(name, value)
        if response.length is None and self.command != "HEAD":  # it ends where the server hangs up, or is chunked
            self.close_connection = True
            self.send_header("Connection", "close")
        self.end_headers()
        fault = request.fault if request.fault and request.fault.after >= 0 else None
        strikes_at = fault.after % (response.length or 1) if fault else -1
        began = time.monotonic()
        while True:
            if fault and request.sent == strikes_at:
                if fault.kind != "stall":
                    self._hang_up(fault.kind == "reset")
                    return
                self.server.wait(fault.seconds)
                fault = None
            piece = response.read(min(PIECE_BYTES, strikes_at - request.sent) if fault else PIECE_BYTES)
            if not piece:
                return
            self.wfile.write(piece)
            request.sent += len(piece)
            if self.server.bytes_per_s:
                self.server.wait(began + request.sent / self.server.bytes_per_s - time.monotonic())

    def _hang_up(self, with_reset: bool) -> None:
        self.close_connection = True
        if not with_reset:
            return
        deadline = time.monotonic() + 5
        while _unsent(self.connection) and time.monotonic() < deadline:  # a reset takes back what has not arrived yet
            time.sleep(0.001)
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET_ON_CLOSE)

    def log_message(self, format: str, *arguments: object) -> None:
        pass


@contextlib.contextmanager
def serve_raw(answer: Callable[[socket.socket, bytes], None]) -> Iterator[str]:
    """A server that does with each request what you say, until the block ends.

    Args:
        answer: called with the connection and the request's head, in a thread a connection, until it raises OSError.

    Yields:
        http://127.0.0.1:port
    """
    connections: list[socket.socket] = []

    def serve(connection: socket.socket) -> None:
        head = b""
        with connection, contextlib.suppress(OSError):
            while data := connection.recv(1 << 16):
                head += data
                if b"\r\n\r\n" in head:
                    answer(connection, head)
                    head = b""

    def accept() -> None:
        with contextlib.suppress(OSError):
            while True:
                connections.append(listener.accept()[0])
                threading.Thread(target=serve, args=(connections[-1],), daemon=True).start()

    with socket.create_server(("127.0.0.1", 0), backlog=128) as listener:
        threading.Thread(target=accept, daemon=True).start()
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        with contextlib.suppress(OSError):
            listener.shutdown(socket.SHUT_RDWR)
    for connection in connections:
        with contextlib.suppress(OSError):
            connection.shutdown(socket.SHUT_RDWR)


def _unsent(connection: socket.socket) -> int:
    """Bytes written that the other side's kernel has not acknowledged."""
    return int(struct.unpack("i", fcntl.ioctl(connection, termios.TIOCOUTQ, b"\0\0\0\0"))[0])
