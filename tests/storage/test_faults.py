"""What breaks on the way to an object store costs time and no byte: none wrong, none twice; what doesn't pass is said in time."""

from __future__ import annotations

import http.client
import http.server
import random
import re
import threading
import time
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import pytest
from commands import wait_until
from faults import Fault, FaultProxy, Faults, Request, reset, stall, status, truncate
from s3 import S3Server

from wds_tools.errors import NotFound, StorageError
from wds_tools.storage import Store, open_store

MB = 1 << 20
DATA = random.Random(1).randbytes(6 * MB)
START, END = 100_001, 5 * MB + 7
IN_TIME_S = 30.0
"""What ends within a budget of 1 s does so on the busiest machine; without it, the proxy's minute of patience would pass."""


@pytest.fixture
def proxy(s3: S3Server, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultProxy]:
    """A proxy before the S3 server, and an environment that points at it: 60 s of patience, 0.5 s for a stall."""
    with FaultProxy(s3.endpoint) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
        monkeypatch.setenv("WDS_TOOLS_RETRY_S", "60")
        monkeypatch.setenv("WDS_TOOLS_STALL_S", "0.5")
        yield proxy


@pytest.fixture(scope="module")
def url(s3_server: S3Server) -> str:
    """A root that has DATA as "a"."""
    with pytest.MonkeyPatch.context() as environment:
        for name, value in s3_server.env.items():
            environment.setenv(name, value)
        url = f"s3://tests/{uuid.uuid4().hex}"
        open_store(url).put("a", DATA)
    return url


@pytest.fixture
def store(url: str, proxy: FaultProxy) -> Store:
    """That root, through the proxy."""
    return open_store(url)


def seconds_of(start: float) -> float:
    return time.monotonic() - start


def parts(requests: list[Request]) -> list[tuple[int, int]]:
    """The ranges of bytes that were sent, in the order of the requests."""
    return [(request.start, request.start + request.sent) for request in requests if request.sent and request.status == 206]


def assert_each_byte_once(requests: list[Request], start: int, end: int) -> None:
    wait_until(lambda: parts(requests)[-1][1] >= end, "the proxy counts a piece, when it has gone")
    at = start
    for begin, stop in parts(requests):
        assert begin == at, parts(requests)
        at = stop
    assert at == end


# --- the proxy itself ------------------------------------------------------------------------------------------------------


def test_without_faults_the_proxy_changes_nothing(store: Store, proxy: FaultProxy) -> None:
    assert store.read("a") == DATA
    assert store.size("a") == len(DATA)
    store.put("folder/b c", b"1")
    assert [entry.name for entry in store.list()] == ["a", "folder/b c"]
    with store.write("big") as writer:
        writer.write(DATA + DATA)
    assert store.read("big") == DATA + DATA
    store.delete("big")
    assert not store.exists("big")
    with pytest.raises(NotFound):
        store.read("nothing")
    assert {request.method for request in proxy.requests} >= {"PUT", "GET", "HEAD", "POST"}
    assert {request.fault for request in proxy.requests} == {None}


def test_faults_are_a_function_of_seed_place_and_turn() -> None:
    def outcome(seed: int, order: list[int]) -> dict[tuple[int, int], Fault | None]:
        faults = Faults(reset=0.2, truncate=0.2, unavailable=0.2, stall=0.2, seed=seed)
        requests = [Request("GET", "/b/a", start, start + 1000, turn, {}) for start in order for turn in range(3)]
        return {(request.start, request.turn): faults(request) for request in requests}

    one = outcome(1, list(range(200)))
    assert one == outcome(1, list(range(199, -1, -1)))
    assert one != outcome(2, list(range(200)))
    kinds = [fault.kind if fault else None for fault in one.values()]
    assert all(80 <= kinds.count(kind) <= 160 for kind in ("reset", "truncate", "status", "stall", None))


def test_the_same_place_never_fails_more_than_three_times_in_a_row(store: Store, proxy: FaultProxy) -> None:
    proxy.faults = Faults(unavailable=1.0)
    assert store.read_range("a", 0, 5) == DATA[:5]
    assert [request.status for request in proxy.reads("/a")] == [503, 503, 503, 206]


def test_latency_and_bandwidth_are_as_set(store: Store, proxy: FaultProxy) -> None:
    proxy.latency_s, proxy.bytes_per_s = 0.2, 4 * MB
    start = time.monotonic()
    assert store.read_range("a", 0, 2 * MB) == DATA[: 2 * MB]
    assert seconds_of(start) > 0.6


def test_a_truncated_body_is_seen_as_one_by_any_client(store: Store, proxy: FaultProxy, s3: S3Server) -> None:
    proxy.once(truncate(10))
    connection = http.client.HTTPConnection(proxy.endpoint.removeprefix("http://"))
    connection.request("GET", "/tests/nothing")
    response = connection.getresponse()
    assert response.status in (403, 404)
    with pytest.raises(http.client.IncompleteRead):
        response.read()
    connection.close()


# --- what passes -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "script",
    [
        [],
        [reset(0)],
        [reset(1)],
        [reset(3 * MB + 17)],
        [reset(END - START - 1)],
        [reset(MB), reset(1), reset(0), reset(2 * MB)],
        [truncate(0)],
        [truncate(1)],
        [truncate(3 * MB + 17)],
        [truncate(END - START - 1), truncate(0)],
        [status(503)],
        [status(500), status(502), status(504), status(429)],
        [stall(2)],
        [stall(2, after=0)],
        [stall(2, after=MB)],
        [reset(MB), status(503), status(429), truncate(1000), stall(2, after=MB)],
    ],
    ids=lambda script: ",".join(
        f"{fault.kind}@{fault.after}" if fault.kind != "status" else str(fault.status) for fault in script
    ),
)
def test_a_fault_that_passes_costs_no_byte_and_none_is_sent_twice(store: Store, proxy: FaultProxy, script: list[Fault]) -> None:
    proxy.once(*script)
    start = time.monotonic()
    data = store.read_range("a", START, END)
    assert data == DATA[START:END]
    assert len(data) == END - START
    assert memoryview(data).readonly
    assert seconds_of(start) < IN_TIME_S
    reads = proxy.reads("/a")
    assert len(reads) == len(script) + 1
    assert_each_byte_once(reads, START, END)


def test_a_pause_below_the_stall_time_is_just_a_pause(store: Store, proxy: FaultProxy, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WDS_TOOLS_STALL_S", "5")
    proxy.once(stall(0.5, after=MB))
    assert open_store(store.url).read_range("a", START, END) == DATA[START:END]
    assert len(proxy.reads("/a")) == 1


def test_a_slow_transfer_is_no_stall_and_may_take_longer_than_the_budget(
    store: Store, proxy: FaultProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WDS_TOOLS_RETRY_S", "1")
    proxy.bytes_per_s = MB
    start = time.monotonic()
    assert open_store(store.url).read_range("a", 0, 2 * MB) == DATA[: 2 * MB]
    assert seconds_of(start) > 1.5
    assert len(proxy.reads("/a")) == 1


@pytest.mark.slow
def test_progress_renews_the_budget(store: Store, proxy: FaultProxy, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WDS_TOOLS_RETRY_S", "1")
    proxy.bytes_per_s = MB
    proxy.faults = lambda _: reset(MB // 4)
    start = time.monotonic()
    assert open_store(store.url).read_range("a", 0, 3 * MB) == DATA[: 3 * MB]
    assert seconds_of(start) > 3
    reads = proxy.reads("/a")
    # The first request is obstore's own, for a quarter of the budget; what it got until it gives up is fetched once more.
    again = next(i for i, request in enumerate(reads) if i and request.start == 0)
    assert sum(request.sent for request in reads[:again]) <= MB
    assert_each_byte_once(reads[again:], 0, 3 * MB)


@pytest.mark.slow
def test_a_server_that_restarts_is_waited_for(store: Store, proxy: FaultProxy) -> None:
    proxy.leave()
    back = threading.Timer(2.5, proxy.come_back)
    back.start()
    assert store.read_range("a", START, END) == DATA[START:END]
    back.join()
    assert_each_byte_once(proxy.reads("/a"), START, END)


def test_a_server_that_restarts_in_the_middle_is_waited_for(store: Store, proxy: FaultProxy) -> None:
    proxy.bytes_per_s = 8 * MB

    def restart() -> None:
        proxy.leave()
        time.sleep(0.7)
        proxy.come_back()

    restarts = threading.Timer(0.3, restart)
    restarts.start()
    assert store.read_range("a", START, END) == DATA[START:END]
    restarts.join()
    assert len(proxy.reads("/a")) == 2


def test_whole_files_and_streams_survive_the_same(store: Store, proxy: FaultProxy) -> None:
    data = DATA * 4
    store.put("big", data)
    proxy.once(reset(MB), status(503), truncate(5 * MB), stall(2, after=100))
    assert store.read("big") == data
    proxy.once(truncate(MB), None, reset(0))
    with store.open("big") as file:
        assert b"".join(iter(lambda: file.read(999_999), b"")) == data


@pytest.mark.slow
def test_an_epoch_through_a_storm_is_unchanged(store: Store, proxy: FaultProxy) -> None:
    proxy.faults = Faults(reset=0.15, truncate=0.15, unavailable=0.2, stall=0.02, stall_s=2, statuses=(503, 500, 429), seed=7)
    draw = random.Random(3)
    ranges = [(start, min(len(DATA), start + draw.randrange(1, MB))) for start in (draw.randrange(len(DATA)) for _ in range(150))]
    with ThreadPoolExecutor(16) as pool:
        found = list(pool.map(lambda span: store.read_range("a", *span), ranges))
    assert all(data == DATA[start:end] for data, (start, end) in zip(found, ranges, strict=True))
    kinds = [request.fault.kind for request in proxy.reads("/a") if request.fault]
    assert {"reset", "truncate", "status"} <= set(kinds)
    sent = sum(request.sent for request in proxy.reads("/a"))
    assert sent <= 1.01 * sum(end - start for start, end in ranges)  # but for what a stalled connection had in its buffers


# --- what doesn't ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("code", "kind", "message"),
    [
        (404, NotFound, "/a: can't read, nothing is there"),
        (403, StorageError, "/a: can't read, access denied"),
        (400, StorageError, "400"),
    ],
)
def test_a_refusal_is_said_at_once_with_the_url(
    store: Store, proxy: FaultProxy, code: int, kind: type[StorageError], message: str
) -> None:
    for script in ([status(code)], [reset(MB), status(code)]):
        proxy.once(*script)
        start = time.monotonic()
        with pytest.raises(kind, match=re.escape(store.url) + ".*" + message):
            store.read_range("a", START, END)
        assert seconds_of(start) < IN_TIME_S
    assert len(proxy.reads("/a")) == 3


def test_a_server_gone_for_good_is_given_up_within_the_budget(
    store: Store, proxy: FaultProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WDS_TOOLS_RETRY_S", "1")
    store = open_store(store.url)
    proxy.leave()
    start = time.monotonic()
    with pytest.raises(
        StorageError,
        match=re.escape(f"{store.url}/a: can't read bytes [{START}, {END}), no answer in ")
        + r"[\d.]+ s of trying \(WDS_TOOLS_RETRY_S=1\): check the network and AWS_ENDPOINT_URL \(Connection refused\)",
    ):
        store.read_range("a", START, END)
    assert 0.7 < seconds_of(start) < IN_TIME_S


def test_a_server_gone_in_the_middle_is_given_up_within_the_budget_after_its_last_byte(
    store: Store, proxy: FaultProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WDS_TOOLS_RETRY_S", "1")
    store = open_store(store.url)
    proxy.bytes_per_s = MB
    gone = threading.Timer(1, proxy.leave)
    gone.start()
    start = time.monotonic()
    with pytest.raises(StorageError, match=r"/a: can't read bytes .* in [\d.]+ s of trying \(WDS_TOOLS_RETRY_S=1\)"):
        store.read_range("a", START, END)
    gone.join()
    assert 1.4 < seconds_of(start) < IN_TIME_S


def test_nothing_but_errors_is_given_up_within_the_budget_and_named(
    store: Store, proxy: FaultProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WDS_TOOLS_RETRY_S", "1")
    store = open_store(store.url)
    proxy.once(*[status(503)] * 1000)
    start = time.monotonic()
    with pytest.raises(
        StorageError, match=r"trying \(WDS_TOOLS_RETRY_S=1\): the server is overloaded or broken \(503 Service Una"
    ):
        store.read_range("a", START, END)
    assert seconds_of(start) < IN_TIME_S
    assert 3 < len(proxy.reads("/a")) < 100, "the pauses grow"


def test_silence_is_given_up_within_the_budget_and_one_stall(
    store: Store, proxy: FaultProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WDS_TOOLS_RETRY_S", "1")
    monkeypatch.setenv("WDS_TOOLS_STALL_S", "0.5")
    store = open_store(store.url)
    proxy.once(*[stall(60)] * 100)
    start = time.monotonic()
    with pytest.raises(StorageError, match=r"no answer in .* s of trying \(WDS_TOOLS_RETRY_S=1\): check the network"):
        store.read_range("a", START, END)
    assert seconds_of(start) < IN_TIME_S


def test_a_budget_of_zero_is_one_try(store: Store, proxy: FaultProxy, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WDS_TOOLS_RETRY_S", "0")
    store = open_store(store.url)
    for fault in (status(503), reset(MB), truncate(5)):
        proxy.requests.clear()
        proxy.once(fault)
        with pytest.raises(StorageError, match=r"in 0[.\d]* s of trying \(WDS_TOOLS_RETRY_S=0\)"):
            store.read_range("a", START, END)
        assert len(proxy.reads("/a")) == 1


@pytest.mark.parametrize("fault", [reset(MB), truncate(MB)])
def test_an_object_replaced_while_its_connection_was_broken_is_noticed_and_named(
    store: Store, proxy: FaultProxy, s3: S3Server, monkeypatch: pytest.MonkeyPatch, fault: Fault
) -> None:
    store.put("b", DATA)
    store.read_range("b", 0, 1)
    monkeypatch.setenv("AWS_ENDPOINT_URL", s3.endpoint)
    direct = open_store(store.url)

    def replace(request: Request) -> Fault | None:
        if request.start == START:
            return fault if request.turn == 0 else None
        direct.put("b", random.Random(2).randbytes(len(DATA)))
        return None

    proxy.faults = replace
    with pytest.raises(StorageError, match=r"^s3://tests/.*/b was replaced while it was read: read it again$"):
        store.read_range("b", START, END)
    assert proxy.reads("/b")[-1].headers["if-match"]


def test_an_object_deleted_while_its_connection_was_broken_is_not_found(store: Store, proxy: FaultProxy) -> None:
    proxy.once(reset(MB), status(404))
    with pytest.raises(NotFound, match="/a: can't read, nothing is there"):
        store.read_range("a", START, END)


def test_an_object_that_got_shorter_meanwhile_was_replaced(store: Store, proxy: FaultProxy) -> None:
    proxy.once(reset(3 * MB), status(416), status(416))
    with pytest.raises(StorageError, match="was replaced while it was read"):
        store.read_range("a", START, END)


def test_a_range_past_the_end_is_named_also_when_it_breaks(store: Store, proxy: FaultProxy) -> None:
    proxy.once(reset(100))
    with pytest.raises(
        StorageError, match=rf"wanted bytes \[{len(DATA) - 1000}, {len(DATA) + 5}\), the file ends at {len(DATA)}"
    ):
        store.read_range("a", len(DATA) - 1000, len(DATA) + 5)


# --- where obstore doesn't resume ------------------------------------------------------------------------------------------


@contextmanager
def serve_ranges(data: bytes, tag: str | None) -> Iterator[tuple[str, list[str]]]:
    """A web server that knows ranges, for one file whose every body but the third and later ones ends early."""
    asked: list[str] = []

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            found = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers["Range"])
            assert found
            start, end = int(found[1]), int(found[2]) + 1
            asked.append(f"{start}-{end} {self.headers['If-Match']}")
            self.send_response(206)
            for name, value in {
                "Content-Length": end - start,
                "Content-Range": f"bytes {start}-{end - 1}/{len(data)}",
                "Last-Modified": "Sun, 22 Nov 2026 00:00:00 GMT",
                **({"ETag": tag} if tag else {}),
            }.items():
                self.send_header(name, str(value))
            self.end_headers()
            self.wfile.write(data[start : end if len(asked) > 2 else start + 1000])
            self.close_connection = len(asked) <= 2

        def log_message(self, *_: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}", asked
        finally:
            server.shutdown()
            thread.join()


def test_an_object_without_a_tag_is_resumed_by_us(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WDS_TOOLS_RETRY_S", "8")
    with serve_ranges(DATA, None) as (url, asked):
        assert open_store(url).read_range("a", START, END) == DATA[START:END]
    assert asked == [f"{START}-{END} None", f"{START}-{END} None", f"{START + 1000}-{END} None"]


@pytest.mark.parametrize(("tag", "sent"), [('"strong"', '"strong"'), ('W/"weak"', "None")])
def test_a_tag_is_sent_back_if_it_can_match(tag: str, sent: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WDS_TOOLS_RETRY_S", "8")
    with serve_ranges(DATA, tag) as (url, asked):
        assert open_store(url).read_range("a", START, END) == DATA[START:END]
    assert asked == [f"{START}-{END} None", f"{START}-{END} {sent}", f"{START + 1000}-{END} {sent}"]


def test_random_numbers_of_the_caller_are_left_alone(store: Store, proxy: FaultProxy) -> None:
    random.seed(5)
    proxy.once(status(503), reset(5), status(429))
    state = random.getstate()
    store.read_range("a", START, END)
    assert random.getstate() == state
