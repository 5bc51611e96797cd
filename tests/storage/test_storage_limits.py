"""What does not come, or creeps, ends in time and is announced before; what a store says against us is said in our words."""

from __future__ import annotations

import re
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import fsspec
import pytest
from faults import serve_raw

from wds_tools.errors import NotFound, OutOfSpace, StorageError
from wds_tools.storage import Store, open_store
from wds_tools.storage.remote import client, profile, waits

DATA = bytes(range(256)) * 400
IN_TIME_S = 15.0
"""What ends within a budget of 2 s or less does so on the busiest machine; the defaults are minutes."""
NAMES = ("read", "read_range", "open", "size", "list", "put", "put in parts", "write", "delete")


@pytest.fixture(autouse=True)
def limits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small ones: 2 s in all, a body is judged after 0.5 s, and 0.2 s are worth a line."""
    for name in ("AWS_PROFILE", "AWS_SESSION_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    for name, value in {
        "AWS_ACCESS_KEY_ID": "a",
        "AWS_SECRET_ACCESS_KEY": "b",
        "AWS_REGION": "us-east-1",
        "WDS_TOOLS_RETRY_S": "2",
        "WDS_TOOLS_STALL_S": "1",
    }.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(client, "PERIOD_S", 0.5)
    monkeypatch.setattr(waits, "NOTICE_S", 0.2)
    monkeypatch.setattr(waits, "_thread", None)  # one that looks as often as that
    monkeypatch.setattr(waits, "_quiet_until", {})


def use(store: Store, name: str) -> object:
    """Do one thing with a store."""
    if name == "write":
        with store.write("a") as writer:
            return writer.write(bytes(20 << 20))
    return {
        "read": lambda: store.read("a"),
        "read_range": lambda: store.read_range("a", 0, len(DATA)),
        "open": lambda: store.open("a").read(),
        "size": lambda: store.size("a"),
        "list": lambda: list(store.list()),
        "put": lambda: store.put("a", b"1"),
        "put in parts": lambda: store.put("a", bytes(20 << 20)),
        "delete": lambda: store.delete("a"),
    }[name]()


def at_s3(monkeypatch: pytest.MonkeyPatch, endpoint: str) -> Store:
    monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
    return open_store("s3://bucket/set")


def send(connection: socket.socket, status: str, body: bytes, **headers: object) -> None:
    lines = "".join(f"{name.replace('_', '-')}: {value}\r\n" for name, value in {"Content_Length": len(body), **headers}.items())
    connection.sendall(f"HTTP/1.1 {status}\r\n{lines}\r\n".encode() + body)


def send_range(connection: socket.socket, head: bytes, *, creep: bool, ranges: bool = True) -> None:
    """DATA, or some of it, as asked; creeping, 20 bytes a second."""
    asked = re.search(rb"range: bytes=(\d+)-(\d+)", head, re.IGNORECASE) if ranges else None
    start, end = (int(asked[1]), min(int(asked[2]) + 1, len(DATA))) if asked else (0, len(DATA))
    part = {"Content_Range": f"bytes {start}-{end - 1}/{len(DATA)}"} if asked else {}
    status = "206 Partial Content" if asked else "200 OK"
    date = "Sun, 22 Nov 2026 00:00:00 GMT"
    send(connection, status, b"", **part, ETag='"x"', Last_Modified=date, Content_Length=end - start)
    at_once = 1 if creep else len(DATA)
    for at in range(start, end, at_once):
        connection.sendall(DATA[at : min(at + at_once, end)])
        time.sleep(0.05 * creep)


def test_silence_ends_within_the_budget_and_the_message_has_the_true_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever was asked for; all of it at once, so that it takes no longer than one."""
    said = re.compile(r"s3://bucket/set.* no answer in ([\d.]+) s of trying \(WDS_TOOLS_RETRY_S=2\): ")

    def give_up(name: str) -> tuple[str, float]:
        begun = time.monotonic()
        with pytest.raises(StorageError) as caught:
            use(store, name)
        return str(caught.value), time.monotonic() - begun

    with serve_raw(lambda connection, _: connection.recv(1 << 20) and None) as endpoint, ThreadPoolExecutor(len(NAMES)) as pool:
        store = at_s3(monkeypatch, endpoint)
        told = dict(zip(NAMES, pool.map(give_up, NAMES), strict=True))
    for name, (message, took_s) in told.items():
        found = said.match(message)
        assert found, (name, message)
        assert 0.6 < float(found[1]) <= took_s + 0.1, (name, took_s)
        assert float(found[1]) < IN_TIME_S, name


def test_a_body_that_creeps_is_given_up_and_the_least_rate_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    limits = r"less than 10000 bytes a second \(WDS_TOOLS_LEAST_BYTES_PER_S\) in [\d.]+ s of trying \(WDS_TOOLS_RETRY_S=2"

    def give_up(name: str) -> None:
        with pytest.raises(StorageError, match=limits):
            use(store, name)

    with serve_raw(lambda connection, head: send_range(connection, head, creep=True)) as endpoint, ThreadPoolExecutor(3) as pool:
        store = at_s3(monkeypatch, endpoint)
        list(pool.map(give_up, ["read", "read_range", "open"]))


def test_a_list_whose_body_breaks_off_is_asked_for_again(monkeypatch: pytest.MonkeyPatch) -> None:
    entry = b"<Contents><Key>set/a</Key><LastModified>2026-11-22T00:00:00.000Z</LastModified><Size>5</Size></Contents>"
    body = b"<ListBucketResult><IsTruncated>false</IsTruncated>" + entry + b"</ListBucketResult>"
    broken = [True, True]

    def answer(connection: socket.socket, head: bytes) -> None:
        if broken:
            broken.pop()
            send(connection, "200 OK", body[:60], Content_Length=len(body))
            raise OSError
        send(connection, "200 OK", body)

    with serve_raw(answer) as endpoint:
        assert list(at_s3(monkeypatch, endpoint).list()) == [("a", 5)]
    assert not broken


def test_a_list_that_creeps_is_given_up_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    creep = serve_raw(lambda connection, head: send_range(connection, head, creep=True, ranges=False))
    with creep as endpoint, pytest.raises(StorageError, match=r"can't list, .* in [\d.]+ s of trying"):
        use(at_s3(monkeypatch, endpoint), "list")


def test_a_file_without_ranges_that_creeps_is_given_up_too() -> None:
    creep = serve_raw(lambda connection, head: send_range(connection, head, creep=True, ranges=False))
    with creep as endpoint, pytest.raises(StorageError, match=r"/a: can't read, less than 10000 bytes a second .* s of trying"):
        open_store(endpoint).read("a")


def test_a_connection_that_creeps_is_replaced_by_one_that_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    heads: list[bytes] = []

    def answer(connection: socket.socket, head: bytes) -> None:
        heads.append(head)
        send_range(connection, head, creep=len(heads) < 3)

    with serve_raw(answer) as endpoint:
        assert at_s3(monkeypatch, endpoint).read_range("a", 0, len(DATA)) == DATA
    assert len(heads) == 3
    resumed = re.search(rb"range: bytes=(\d+)-", heads[2], re.IGNORECASE)
    assert resumed
    assert int(resumed[1]) > 0, "what had come was kept"


@pytest.mark.slow
def test_a_slow_body_above_the_least_rate_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WDS_TOOLS_LEAST_BYTES_PER_S", "10")
    monkeypatch.setattr(f"{__name__}.DATA", DATA[:50])  # 2.5 s
    with serve_raw(lambda connection, head: send_range(connection, head, creep=True)) as endpoint:
        assert at_s3(monkeypatch, endpoint).read_range("a", 0, 50) == DATA


def test_waiting_is_announced_once_an_endpoint_whatever_the_threads(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def read(name: str) -> None:
        with pytest.raises(StorageError):
            stores[name[0]].read_range(name, 0, 5)

    with serve_raw(lambda *_: time.sleep(3)) as one, serve_raw(lambda *_: time.sleep(3)) as two:
        stores = {"a": at_s3(monkeypatch, one), "b": open_store(two)}
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(read, [f"{letter}{number}" for letter in "ab" for number in range(4)]))
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2, lines
    clock = r"\d\d:\d\d:\d\d"
    expected = (
        rf"wds-tools: s3://bucket at {one}: no answer for \d s(| \(.*\)): trying to read s3://bucket/set/a\d until {clock}",
        rf"wds-tools: {two}: no answer for \d s(| \(.*\)): trying to read {two}/b\d until {clock}",
    )
    for line, pattern in zip(sorted(lines, reverse=True), expected, strict=True):
        assert re.fullmatch(pattern, line), line


def test_nothing_is_announced_of_what_answers_in_time(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with serve_raw(lambda connection, head: send_range(connection, head, creep=False)) as endpoint:
        store = at_s3(monkeypatch, endpoint)
        for _ in range(5):
            assert store.read("a") == DATA
        time.sleep(0.3)
    assert capsys.readouterr().err == ""


# --- fsspec -----------------------------------------------------------------------------------------------------------------


class Hangs(fsspec.AbstractFileSystem):  # type: ignore[misc]
    """A backend that answers when it is told to."""

    protocol = "hangs"
    cachable = False
    answers = threading.Event()

    def _wait(self, *_: Any, **__: Any) -> Any:
        self.answers.wait(20)

    info = cat_file = ls = put_file = rm_file = makedirs = _open = _wait


@pytest.fixture
def hangs() -> Iterator[Store]:
    fsspec.register_implementation("hangs", Hangs, clobber=True)
    Hangs.answers.clear()
    yield open_store("hangs://host/set")
    Hangs.answers.set()


@pytest.mark.parametrize("name", [name for name in NAMES if name != "put in parts"])
def test_a_backend_of_fsspec_that_hangs_is_given_up_in_time_and_announced(
    name: str, hangs: Store, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WDS_TOOLS_RETRY_S", "0.5")
    monkeypatch.setenv("WDS_TOOLS_LEAST_BYTES_PER_S", "1e9")
    monkeypatch.setattr(waits, "SLOW_BYTES_PER_S", 1e9)
    begun = time.monotonic()
    with pytest.raises(StorageError, match=r"^hangs://host/set.* no answer in [\d.]+ s of trying \(WDS_TOOLS_RETRY_S=0\.5"):
        use(hangs, name)
    assert 0.5 <= time.monotonic() - begun < IN_TIME_S
    assert re.match(r"wds-tools: hangs://host: no answer for 0 s: trying to .*hangs://host/set.* until", capsys.readouterr().err)


# --- what errors mean -------------------------------------------------------------------------------------------------------


def error_body(code: str, message: str, more: str = "") -> bytes:
    """As S3 writes them."""
    xml = f"<Error><Code>{code}</Code><Message>{message}</Message>{more}<RequestId>4442587FB7D0A2F9</RequestId></Error>"
    return f'<?xml version="1.0" encoding="UTF-8"?>\n{xml}'.encode()


MEANINGS: dict[str, tuple[str, bytes, type[StorageError], str]] = {
    "clock": (
        "403 Forbidden",
        error_body("RequestTimeTooSkewed", "The difference between the request time and the current time is too large."),
        StorageError,
        "this machine's clock is wrong",
    ),
    "region": (
        "400 Bad Request",
        error_body(
            "AuthorizationHeaderMalformed",
            "The authorization header is malformed; the region 'us-east-1' is wrong; expecting 'eu-west-1'",
            "<Region>eu-west-1</Region>",
        ),
        StorageError,
        "the bucket is in another region (eu-west-1): set AWS_REGION",
    ),
    "redirect": (
        "301 Moved Permanently",
        error_body(
            "PermanentRedirect", "The bucket you are attempting to access must be addressed using the specified endpoint."
        ),
        StorageError,
        "the bucket is in another region: set AWS_REGION",
    ),
    "expired": (
        "400 Bad Request",
        error_body("ExpiredToken", "The provided token has expired."),
        StorageError,
        "the keys have expired: get new ones",
    ),
    "unknown key": (
        "403 Forbidden",
        error_body("InvalidAccessKeyId", "The AWS Access Key Id you provided does not exist in our records."),
        StorageError,
        "the store does not know this key: check AWS_ACCESS_KEY_ID",
    ),
    "denied": (
        "403 Forbidden",
        error_body("AccessDenied", "Access Denied"),
        StorageError,
        "access denied: check AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY",
    ),
    "no bucket": (
        "404 Not Found",
        error_body("NoSuchBucket", "The specified bucket does not exist", "<BucketName>bucket</BucketName>"),
        NotFound,
        "there is no bucket bucket: create it, or correct the URL",
    ),
    "archive": (
        "403 Forbidden",
        error_body("InvalidObjectState", "The operation is not valid for the object's storage class"),
        StorageError,
        "it is in an archive: restore it first",
    ),
    "full": ("507 Insufficient Storage", error_body("XMinioStorageFull", "Full."), OutOfSpace, "the store says that it is full"),
}


@pytest.mark.parametrize("row", MEANINGS)
def test_each_refusal_says_what_it_is_and_what_to_do_whatever_was_asked(row: str, monkeypatch: pytest.MonkeyPatch) -> None:
    status, body, kind, message = MEANINGS[row]

    def answer(connection: socket.socket, head: bytes) -> None:
        if head.startswith(b"HEAD"):
            send(connection, status, b"")
        else:
            send(connection, status, body, Connection="close")
            raise OSError

    monkeypatch.setenv("WDS_TOOLS_RETRY_S", "0")
    with serve_raw(answer) as endpoint:
        store = at_s3(monkeypatch, endpoint)
        for name in ("read_range", "list", "put", "size"):
            if (name, row) == ("size", "no bucket"):
                continue  # a HEAD of a missing object is answered in the same way
            begun = time.monotonic()
            with pytest.raises(kind, match=re.escape(message)) as caught:
                use(store, name)
            assert type(caught.value) is kind
            assert str(caught.value).startswith("s3://bucket/set")
            assert "\n" not in str(caught.value)
            assert time.monotonic() - begun < IN_TIME_S, "nothing is tried again that can't get better"


def test_a_key_of_a_users_own_is_no_code_of_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    body = error_body("InternalError", "We encountered an internal error.", "<Key>set/NoSuchBucket</Key>")
    monkeypatch.setenv("WDS_TOOLS_RETRY_S", "0")
    broken = serve_raw(lambda connection, _: send(connection, "500 Internal Server Error", body))
    said = r"the server is overloaded or broken \(500 Internal Server Error: InternalError\)"
    with broken as endpoint, pytest.raises(StorageError, match=said):
        at_s3(monkeypatch, endpoint).read_range("NoSuchBucket", 0, 1)


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (OSError("An error occurred (RequestTimeTooSkewed) when calling the GetObject operation: skewed"), "clock is wrong"),
        (PermissionError("Access Denied"), "access denied: check the keys of this protocol"),
        (FileNotFoundError("a"), "nothing is there"),
    ],
)
def test_errors_of_fsspec_are_read_from_the_same_table(error: Exception, message: str) -> None:
    def fails(*_: Any, **__: Any) -> Any:
        raise error

    class Fails(Hangs):
        cat_file: Callable[..., Any] = fails

    fsspec.register_implementation("fails", Fails, clobber=True)
    with pytest.raises(StorageError, match=f"^fails://host/set/a: can't read, .*{message}"):
        open_store("fails://host/set").read_range("a", 0, 5)


def test_keys_that_expire_in_mid_run_are_waited_for_where_a_profile_may_get_new_ones(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    pytest.importorskip("boto3")
    monkeypatch.setattr(profile, "LOOK_EVERY_S", 0.1)
    login = tmp_path / "credentials"
    text = "[default]\naws_access_key_id={}\naws_secret_access_key=b\naws_session_token=c\n"
    login.write_text(text.format("OLD"))
    expired = b"<Error><Code>ExpiredToken</Code></Error>"
    turns: list[bool] = []

    def answer(connection: socket.socket, head: bytes) -> None:
        turns.append(b"Credential=OLD/" in head)
        if len(turns) == 4:
            login.write_text(text.format("NEW"))
        if turns[-1]:
            send(connection, "400 Bad Request", expired)
        else:
            send_range(connection, head, creep=False)

    with serve_raw(answer) as endpoint:
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", "OLD")
        with pytest.raises(StorageError, match="the keys have expired: get new ones"):  # of the environment, which can't change
            at_s3(monkeypatch, endpoint).read_range("a", 0, len(DATA))
        assert turns == [True]
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            monkeypatch.delenv(name)
        monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(login))
        assert at_s3(monkeypatch, endpoint).read_range("a", 0, len(DATA)) == DATA
    assert turns[1:4] == [True] * 3
    assert not turns[-1]
