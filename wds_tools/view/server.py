"""`Pages` over HTTP, on this machine, for a browser and nobody else.

    request ─▶ Host, origin, method ─▶ Pages.answer ─▶ body under fixed headers
                    └▶ 421, 403, 405     └▶ 404, 4xx with a sentence as JSON

Invariant: nothing can be changed from here, only GET and HEAD are answered. A request whose Host is a name that nobody gave us
is refused, so a web page elsewhere can't reach the data by pointing its own name at this address (DNS rebinding); one that a
page of another site makes is refused too. Content-Security-Policy lets the page run its own files and nothing else.
Cost: a thread a connection, at most MAX_CONNECTIONS. A peer has IDLE_S for each request head and each piece of an answer, however
it drips; and when all threads are taken, whoever has kept one waiting longest makes room, so nobody can lock the viewer.
"""

from __future__ import annotations

import ipaddress
import select
import socket
import socketserver
import sys
import threading
import time
import traceback
from contextlib import suppress
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qsl

import orjson

from wds_tools.errors import DataError, NotFound, StorageError, UsageError, WdsToolsError
from wds_tools.storage import open_store
from wds_tools.terminal import say
from wds_tools.view.pages import Answer, Pages, PagesConfig, Request

MAX_CONNECTIONS = 64
IDLE_S = 30.0
_LOOK_EVERY_S = 0.05
_MAX_FIELDS = 16
_STATUSES = ((UsageError, 404), (NotFound, 404), (DataError, 422), (StorageError, 502))
_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data: blob:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
    "require-trusted-types-for 'script'; trusted-types 'none'",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Permissions-Policy": "camera=(), geolocation=(), microphone=()",
}


@dataclass(frozen=True, kw_only=True)
class ViewConfig(PagesConfig):
    """Look at a dataset in a browser."""

    input: str
    """The dataset: a directory or URL."""
    port: int = 8765
    """Where to listen; 0 takes any free port."""
    host: str = "127.0.0.1"
    """The address to listen on. There is no password: with any other address, everyone who can reach it can read the dataset."""
    allow_host: tuple[str, ...] = ()
    """Host names that requests may use, beside localhost and numeric addresses: for a proxy in front."""
    strict_links: bool = False
    """Follow no symlink that leads out of the dataset: for archives from strangers."""

    def __post_init__(self) -> None:
        if not 0 <= self.port <= 65535:
            raise UsageError(f"--port {self.port}: 0 to 65535")


class ViewServer(ThreadingHTTPServer):
    """Listens from when it is made; `serve_forever` answers.

    Args:
        config: settings.

    Raises:
        NotFound, FormatError: there is no dataset, or its manifest is damaged.
        UsageError: the address can't be listened on.
    """

    daemon_threads = True
    request_queue_size = MAX_CONNECTIONS

    def __init__(self, config: ViewConfig) -> None:
        self.pages = Pages(open_store(config.input, strict_links=config.strict_links), config)
        self.allowed_names = {"localhost", *(name.lower() for name in config.allow_host)}
        self._free = threading.BoundedSemaphore(MAX_CONNECTIONS)
        self._on_peers: dict[socket.socket, float] = {}
        """Connections whose peer is to send or to take something, and since when; the longest first."""
        self._lock = threading.Lock()
        try:
            self.address_family = socket.getaddrinfo(config.host, config.port, type=socket.SOCK_STREAM)[0][0]
            super().__init__((config.host, config.port), _Handler)
        except OSError as error:
            raise UsageError(
                f"can't listen on {config.host} port {config.port} ({error.strerror or error}): --port 0 takes a free one"
            ) from error

    @property
    def url(self) -> str:
        """Where it answers."""
        host = str(self.server_address[0])
        return f"http://{f'[{host}]' if ':' in host else host}:{self.server_address[1]}/"

    def server_bind(self) -> None:
        """Without HTTPServer's look-up of the machine's name, which may ask a name server."""
        socketserver.TCPServer.server_bind(self)

    def process_request(self, request: Any, client_address: Any) -> None:
        """In a thread, when one is free."""
        while not self._free.acquire(timeout=_LOOK_EVERY_S):
            self._cut(self._kept_waiting(0.0)[:1])
        super().process_request(request, client_address)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        """Free the thread again."""
        try:
            super().process_request_thread(request, client_address)
        finally:
            self.wait_for(request, None)
            self._free.release()

    def service_actions(self) -> None:
        """Now and then: end what has lasted too long."""
        self._cut(self._kept_waiting(IDLE_S))

    def wait_for(self, connection: socket.socket, since: float | None) -> None:
        """Note that a connection waits for its peer since then (time.monotonic), or that it does not."""
        with self._lock:
            self._on_peers.pop(connection, None)
            if since is not None:
                self._on_peers[connection] = since

    def _kept_waiting(self, patience_s: float) -> list[socket.socket]:
        with self._lock:
            return [peer for peer, since in self._on_peers.items() if time.monotonic() - since >= patience_s]

    def _cut(self, connections: list[socket.socket]) -> None:
        for connection in connections:
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)  # its thread reads an end, or can't write

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A browser that has left is no error."""
        if not isinstance(sys.exc_info()[1], OSError):
            super().handle_error(request, client_address)

    def server_close(self) -> None:
        """Stop listening."""
        super().server_close()
        self.pages.close()


class _Handler(BaseHTTPRequestHandler):
    server: ViewServer
    protocol_version = "HTTP/1.1"
    server_version = "wds-tools"
    sys_version = ""
    timeout = IDLE_S

    def handle_one_request(self) -> None:
        """Wait for a request."""
        self.server.wait_for(self.connection, time.monotonic())
        super().handle_one_request()

    def do_GET(self) -> None:
        """Answer, or say why not."""
        self.server.wait_for(self.connection, None)
        if (refusal := self._refusal()) is not None:
            return self._fail(*refusal)
        path, _, query = self.path.partition("?")
        try:
            fields = dict(parse_qsl(query, max_num_fields=_MAX_FIELDS))
        except ValueError:
            return self._fail(400, "the query can't be read")
        try:
            answer = self.server.pages.answer(path, Request(query=fields, is_wanted=self._is_connected))
            if answer is None:
                raise NotFound("there is nothing at this address")
        except WdsToolsError as error:
            if "text/html" in self.headers.get("Accept", ""):  # a person opens it: scripts and images ask for other things
                return self._send(_status(error), self.server.pages.failure(str(error)))
            return self._fail(_status(error), str(error))
        except Exception:  # noqa: BLE001 (our own mistake: said here, in full, and never to the browser)
            traceback.print_exc()
            return self._fail(500, "a fault of the viewer: its terminal says more")
        return self._send(200, answer, is_fixed=answer.is_fixed and f"v={self.server.pages.version}" in query)

    do_HEAD = do_GET  # noqa: N815

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:  # noqa: ARG002
        """What http.server refuses by itself: other methods, broken requests. Without its HTML."""
        self.close_connection = True
        self._fail(int(code), message or "a request that can't be answered")

    def _refusal(self) -> tuple[int, str] | None:
        """Why a request is not looked at, if so."""
        hosts = self.headers.get_all("Host") or []
        if len(hosts) != 1 or not self._is_ours(hosts[0]):
            return (
                421,
                "this Host is not one that is served here: use the address that wds-tools view printed, or --allow-host NAME",
            )
        if self.headers.get("Sec-Fetch-Site", "none") not in ("none", "same-origin") and not self._is_link():
            return 403, "asked for by a page of another site"
        return None

    def _is_ours(self, host: str) -> bool:
        name = host.rpartition(":")[0] if host.rpartition(":")[2].isdigit() else host
        if name.lower() in self.server.allowed_names:
            return True
        try:
            ipaddress.ip_address(name.removeprefix("[").removesuffix("]"))
        except ValueError:
            return False
        return True  # an address in numbers can't be pointed elsewhere, as a name can

    def _is_link(self) -> bool:
        """Whether a person has followed a link to here, in a window of its own."""
        return self.headers.get("Sec-Fetch-Mode") == "navigate" and self.headers.get("Sec-Fetch-Dest") == "document"

    def _is_connected(self) -> bool:
        """Whether the browser still waits: one that has left makes its connection readable, at its end."""
        readable, _, _ = select.select([self.connection], [], [], 0)
        return not readable or bool(self.connection.recv(1, socket.MSG_PEEK))

    def _fail(self, status: int, why: str) -> None:
        body = orjson.dumps({"error": why})
        self._send(status, Answer(body=body, content_type="application/json; charset=utf-8", length=len(body)))

    def _send(self, status: int, answer: Answer, *, is_fixed: bool = False) -> None:
        self.server.wait_for(self.connection, time.monotonic())
        self.send_response(status)
        for name, value in _HEADERS.items():
            self.send_header(name, value)
        self.send_header("Content-Type", answer.content_type)
        self.send_header("Content-Length", str(answer.length))
        self.send_header("Cache-Control", "private, max-age=86400, immutable" if is_fixed else "no-store")
        self.end_headers()
        if self.command == "HEAD":
            return
        try:
            for piece in (answer.body,) if isinstance(answer.body, bytes) else answer.body:
                self.server.wait_for(self.connection, time.monotonic())
                self.wfile.write(piece)
                self.server.wait_for(self.connection, None)
        except WdsToolsError as error:  # too late for another status: the browser sees an answer that breaks off
            say(f"wds-tools view: {error}", error=True)
            self.close_connection = True

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing: the terminal is for what went wrong."""


def _status(error: WdsToolsError) -> int:
    return next((status for kind, status in _STATUSES if isinstance(error, kind)), 500)
