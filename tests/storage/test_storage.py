"""Every backend does the same things: one table of behaviours, run on folders, memory, a real S3 server and fsspec."""

import base64
import errno
import http.server
import importlib
import io
import os
import pickle
import shutil
import socket
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from s3 import S3Server

from wds_tools.errors import MissingPackage, NotFound, OutOfSpace, StorageError, UsageError
from wds_tools.storage import Entry, LocalStore, Store, join, local, open_store, redact, split_url
from wds_tools.storage.base import check_name
from wds_tools.storage.local import translate

MB = 1 << 20
REPOSITORY = Path(__file__).parents[2]
BACKENDS = ["local", "file", "memory", "s3", "fsspec"]
HOSTILE_NAMES = ["", "/", "/etc/passwd", "..", "../x", "a/../../x", "a/..", ".", "./a", "a//b", "a/", "a\\b", "a\0b", "a\nb"]
ODD_NAMES = ["a b/c d.txt", "ü/ö.txt", "p%20q#x?y*~&+=;:@!$", "日本.tar", "q'(),[]{}^`|<>\"", ".hidden", "..x", "-rf"]


def pattern(num_bytes: int) -> bytes:
    """Bytes that differ from place to place, so that a range or chunk out of order shows."""
    return np.arange(num_bytes // 8 + 1, dtype="<u8").tobytes()[:num_bytes]


def run_python(script: str, *arguments: str, prefix: tuple[str, ...] = ()) -> "subprocess.CompletedProcess[str]":
    command = [*prefix, sys.executable, "-W", "ignore", "-c", script, *arguments]
    return subprocess.run(
        command, capture_output=True, text=True, timeout=200, env={**os.environ, "PYTHONPATH": str(REPOSITORY)}, check=False
    )


def url_of(backend: str, tmp_path: Path) -> str:
    fresh = uuid.uuid4().hex
    return {
        "local": str(tmp_path / "a root"),
        "file": f"file://{tmp_path}/a%20root",
        "memory": f"memory://{fresh}/root",
        "s3": f"s3://tests/{fresh}/a root",
        "fsspec": f"local://{tmp_path}/root",
    }[backend]


@pytest.fixture(params=BACKENDS)
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    if request.param == "s3":
        request.getfixturevalue("s3")
    return open_store(url_of(request.param, tmp_path))


# --- the same on every backend ---------------------------------------------------------------------------------------------


def test_what_is_put_is_read_back(store: Store) -> None:
    for name, data in {"a.bin": b"hello", "deep/er/b.bin": pattern(1000), "empty": b""}.items():
        store.put(name, data)
        assert store.read(name) == data
        assert store.size(name) == len(data)
        assert store.exists(name)


def test_a_put_replaces_what_was_there(store: Store) -> None:
    store.put("a", b"a long first version")
    store.put("a", b"second")
    assert store.read("a") == b"second"


def test_names_with_odd_characters_come_back_as_they_were(store: Store) -> None:
    for name in ODD_NAMES:
        store.put(name, name.encode())
    assert [entry.name for entry in store.list()] == sorted(ODD_NAMES)
    assert all(store.read(name) == name.encode() for name in ODD_NAMES)


def test_a_range_is_exactly_its_bytes(store: Store) -> None:
    data = pattern(10_000)
    store.put("a", data)
    for start, end in [(0, 1), (0, 10_000), (9_999, 10_000), (1234, 5678), (5, 5), (10_000, 10_000)]:
        assert store.read_range("a", start, end) == data[start:end]


@pytest.mark.parametrize(("start", "end"), [(0, 6), (3, 9), (5, 6), (7, 9), (5, 1 << 40)])
def test_a_range_past_the_end_is_an_error_that_names_both(store: Store, start: int, end: int) -> None:
    store.put("a", b"12345")
    with pytest.raises(StorageError, match=rf"/a: wanted bytes \[{start}, {end}\), the file ends at 5: "):
        store.read_range("a", start, end)


def test_a_range_of_an_empty_file_is_an_error(store: Store) -> None:
    store.put("a", b"")
    with pytest.raises(StorageError, match="ends at 0"):
        store.read_range("a", 0, 1)


def test_a_backward_range_is_the_callers_mistake(store: Store) -> None:
    for start, end in [(2, 1), (-1, 1), (-3, -1)]:
        with pytest.raises(UsageError, match="expected 0 <= start <= end"):
            store.read_range("a", start, end)


def test_what_is_missing_is_not_found(store: Store) -> None:
    store.put("folder/file", b"")
    for name in ("nothing", "no/where", "folder"):
        assert not store.exists(name)
        for read in (store.read, store.size, store.open, lambda name: store.read_range(name, 0, 1)):
            with pytest.raises(NotFound, match=f"/{name}"):
                read(name)


def test_a_listing_is_sorted_recursive_and_relative(store: Store) -> None:
    names = ["b", "a/c", "a-b", "a/b/d", "a.b", "B", "a0", "ä", "a/z"]
    for name in names:
        store.put(name, name.encode())
    assert list(store.list()) == [Entry(name, len(name.encode())) for name in sorted(names)]


def test_a_listing_by_prefix_is_by_text_and_stays_in_the_root(store: Store) -> None:
    for name in ("rejects/a", "rejects/b/c", "rejects-too", "shard-0.tar", "shard-1.tar", "x/shard-2.tar"):
        store.put(name, b"1")
    for prefix, names in {
        "rejects/": ["rejects/a", "rejects/b/c"],
        "rejects": ["rejects-too", "rejects/a", "rejects/b/c"],
        "rejects/b": ["rejects/b/c"],
        "shard-": ["shard-0.tar", "shard-1.tar"],
        "nothing/": [],
        "nothing": [],
        "rejects/a/": [],
    }.items():
        assert [entry.name for entry in store.list(prefix)] == names, prefix
    for prefix in ("../", "/", "a//", "x/../"):
        with pytest.raises(UsageError):
            store.list(prefix)


def test_nothing_there_lists_as_nothing(store: Store) -> None:
    assert list(store.list()) == []
    assert list(store.list("a/b/")) == []


def test_roots_beside_each_other_do_not_see_each_other(store: Store) -> None:
    inner, sibling = open_store(join(store.url, "set")), open_store(join(store.url, "set-2"))
    inner.put("a", b"1")
    sibling.put("b", b"2")
    assert [entry.name for entry in inner.list()] == ["a"]
    assert [entry.name for entry in store.list()] == ["set-2/b", "set/a"]


def test_a_deleted_file_is_gone_and_a_missing_one_may_be_deleted(store: Store) -> None:
    store.put("folder/a", b"1")
    store.delete("folder/a")
    store.delete("folder/a")
    store.delete("no/where")
    assert not store.exists("folder/a")
    assert list(store.list()) == []


@pytest.mark.slow
def test_a_stream_gives_40_mb_in_order_however_it_is_read(store: Store) -> None:
    data = pattern(40 * MB + 5)
    store.put("big", data)
    for num_bytes in (333_333, 8 * MB, 9 * MB + 1):
        with store.open("big") as file:
            assert b"".join(iter(lambda n=num_bytes: file.read(n), b"")) == data  # type: ignore[misc]
    with store.open("big") as file:
        assert file.read(3) == data[:3]
        assert file.read() == data[3:]
        assert file.read(1) == b""
    assert store.read("big") == data


def test_a_stream_reads_lines_and_can_be_left_early(store: Store) -> None:
    store.put("lines", b"one\ntwo\n" + bytes(30 * MB))
    with store.open("lines") as file:
        assert isinstance(file, io.BufferedReader)
        assert [file.readline(), file.readline()] == [b"one\n", b"two\n"]
    store.put("empty", b"")
    with store.open("empty") as file:
        assert file.read() == b""


def test_a_writer_publishes_what_was_written_when_it_ends_and_not_before(store: Store) -> None:
    data = pattern(20 * MB + 3)
    with store.write("folder/big") as writer:
        for at in range(0, len(data), 700_001):
            piece = memoryview(data)[at : at + 700_001]
            assert writer.write(piece) == len(piece)
        assert not store.exists("folder/big")
        assert list(store.list()) == []
    assert store.read("folder/big") == data
    writer.close()
    writer.abort()
    assert store.size("folder/big") == len(data)


@pytest.mark.parametrize("num_bytes", [0, 10, 20 * MB])
def test_a_writer_that_fails_leaves_nothing(store: Store, num_bytes: int) -> None:
    with pytest.raises(ZeroDivisionError), store.write("a") as writer:  # noqa: PT012
        writer.write(bytes(num_bytes))
        raise ZeroDivisionError
    assert not store.exists("a")
    assert list(store.list()) == []
    store.put("b", b"as it was")
    writer = store.write("b")
    writer.write(bytes(num_bytes))
    writer.abort()
    writer.close()
    assert store.read("b") == b"as it was"


def test_a_writer_of_nothing_makes_an_empty_file(store: Store) -> None:
    with store.write("empty"):
        pass
    assert store.size("empty") == 0


def test_writing_to_a_closed_writer_is_an_error(store: Store) -> None:
    with store.write("a") as writer:
        writer.write(b"1")
    with pytest.raises(ValueError, match="closed"):
        writer.write(b"2")


@pytest.mark.parametrize("name", HOSTILE_NAMES)
def test_a_name_that_escapes_is_refused_by_every_method(store: Store, name: str) -> None:
    for use in (store.read, store.size, store.exists, store.open, store.write, store.delete):
        with pytest.raises(UsageError):
            use(name)
    with pytest.raises(UsageError):
        store.put(name, b"")
    with pytest.raises(UsageError):
        store.read_range(name, 0, 1)


def test_the_folder_of_unfinished_files_is_out_of_bounds(store: Store) -> None:
    with pytest.raises(UsageError, match="files being written"):
        store.put(".tmp/x", b"")


def test_clean_temp_may_be_called_on_anything(store: Store) -> None:
    store.clean_temp()
    store.put("a", b"1")
    store.clean_temp()
    assert store.read("a") == b"1"


def test_a_pickled_store_is_the_same_store(store: Store) -> None:
    store.put("a", b"1")
    again = pickle.loads(pickle.dumps(store))  # noqa: S301 - our own
    assert again.read("a") == b"1"
    assert again.url == store.url
    assert store.url in repr(again)


def test_a_store_is_used_from_many_threads(store: Store) -> None:
    failures: list[BaseException] = []

    def work(number: int) -> None:
        try:
            for turn in range(10):
                store.put(f"{number}/{turn}", pattern(1000 * number))
                assert store.read(f"{number}/{turn}") == pattern(1000 * number)
        except BaseException as error:  # noqa: BLE001 - carried over to the test's thread
            failures.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert len(list(store.list())) == 80


MEMORY = """
import sys
from wds_tools.storage import open_store
store, num_mb = open_store(sys.argv[1]), int(sys.argv[2])
block = bytes(range(256)) * 4096
def peak():  # not ru_maxrss: see memory.py
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("VmHWM")) // 1024
with store.write("warm") as writer:
    writer.write(block)
assert store.read("warm") == block
start = peak()
with store.write("big") as writer:
    for _ in range(num_mb):
        writer.write(block)
written = peak() - start
total = 0
with store.open("big") as file:
    while piece := file.read(1 << 20):
        assert piece == block
        total += len(piece)
assert total == num_mb << 20
print(written, peak() - start)
"""


@pytest.mark.parametrize("backend", ["local", "s3", "fsspec"])
def test_a_large_file_is_written_and_streamed_in_bounded_memory(
    backend: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    if backend == "s3":
        request.getfixturevalue("s3")
    done = run_python(MEMORY, url_of(backend, tmp_path), "160")
    assert done.returncode == 0, done.stderr
    written_mb, streamed_mb = map(int, done.stdout.split())
    assert written_mb < 64
    assert streamed_mb < 120  # eight ranges of 8 MiB ahead, and what the client holds


# --- urls ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("url", "root", "name"),
    [
        ("s3://bucket/set/a.tar", "s3://bucket/set", "a.tar"),
        ("s3://bucket/a.tar", "s3://bucket", "a.tar"),
        ("set/a.tar", "set", "a.tar"),
        ("a.tar", ".", "a.tar"),
        ("/a.tar", "/", "a.tar"),
        ("file:///a/b.tar", "file:///a", "b.tar"),
        ("file:///b.tar", "file:///", "b.tar"),
        ("memory://x", "memory://", "x"),
        ("https://host/a%20b/c%20d.jsonl", "https://host/a%20b", "c d.jsonl"),
        ("hf://datasets/o/n/a.tar", "hf://datasets/o/n", "a.tar"),
    ],
)
def test_a_url_is_cut_into_root_and_name(url: str, root: str, name: str) -> None:
    assert split_url(url) == (root, name)


@pytest.mark.parametrize("url", ["s3://bucket", "s3://bucket/", "set/", "", "s3://", "https://host"])
def test_a_url_without_a_file_is_refused(url: str) -> None:
    with pytest.raises(UsageError, match="names no file"):
        split_url(url)


@pytest.mark.parametrize(
    "url",
    [
        "",
        "s3://",
        "s3:///x",
        "gs://",
        "s3://key:secret@bucket/x",
        "https://host/x?signature=secret",
        "file://host/x",
        "s3://b/a/../c",
    ],
)
def test_a_root_that_is_none_is_refused_without_showing_secrets(url: str) -> None:
    with pytest.raises(UsageError) as caught:
        open_store(url)
    assert "secret" not in str(caught.value)


def test_credentials_are_taken_out_of_urls() -> None:
    assert redact("can't read https://user:p@ss@host/x?sig=abc, sorry") == "can't read https://host/x, sorry"
    assert redact("is it there? yes: a@b") == "is it there? yes: a@b"
    assert open_store("https://user:secret@host/x").url == "https://host/x"
    assert "secret" not in repr(open_store("ftp://user:secret@host/x"))


@given(st.text(alphabet=st.sampled_from("ab./\\~\0 %"), max_size=12))
def test_a_name_is_refused_or_stays_inside(name: str) -> None:
    try:
        check_name(name, "root")
    except UsageError:
        return
    assert os.path.normpath(f"/root/{name}") == f"/root/{name}"


def test_importing_storage_loads_no_backend() -> None:
    done = run_python("import sys, wds_tools.storage; print([m for m in ('obstore', 'fsspec', 'torch') if m in sys.modules])")
    assert done.stdout == "[]\n"


# --- folders ---------------------------------------------------------------------------------------------------------------


def test_with_strict_links_symlinks_are_followed_inside_the_root_only(tmp_path: Path) -> None:
    root, outside = tmp_path / "root", tmp_path / "outside"
    for folder in (root / "folder", outside):
        folder.mkdir(parents=True)
        (folder / "file").write_bytes(b"1234")
    links = {"inside": "folder/file", "out": "../outside/file", "absolute": "/etc/passwd", "dangling": "nowhere"}
    for name, target in {**links, "folder-in": "folder", "folder-out": "../outside", "loop": "."}.items():
        (root / name).symlink_to(target)
    (tmp_path / "link").symlink_to(root)
    for store in (open_store(str(root), strict_links=True), open_store(str(tmp_path / "link"), strict_links=True)):
        assert [entry.name for entry in store.list()] == ["folder/file", "inside"]
        assert store.read("inside") == store.read("folder-in/file") == b"1234"
        assert list(store.list("folder-out/")) == []
        for name in ("out", "absolute", "folder-out/file"):
            for read in (store.read, store.size, store.exists, store.open):
                with pytest.raises(StorageError, match="leads out of its folder"):
                    read(name)
        for write in (store.write, store.delete, lambda name, store=store: store.put(name, b"")):
            with pytest.raises(StorageError, match="nothing is written or removed through a symlink"):
                write("folder-out/new")
        assert not store.exists("dangling")
    assert [path.name for path in outside.iterdir()] == ["file"]
    store.put("out", b"in its place")
    assert (outside / "file").read_bytes() == b"1234"
    assert store.read("out") == b"in its place"


def test_symlinks_are_followed_by_every_read_and_nothing_is_written_or_removed_through_them(tmp_path: Path) -> None:
    root, blobs = tmp_path / "root", tmp_path / "blobs"
    for folder in (root / "a/b", blobs / "more"):
        folder.mkdir(parents=True)
    for file in (root / "a/b/real", blobs / "x", blobs / "more/y"):
        file.write_bytes(b"1234")
    links = {"x": blobs / "x", "far": blobs, "near": "a", "a/b/up": "../..", "loop": ".", "self": "self", "gone": "nowhere"}
    for name, target in links.items():
        (root / name).symlink_to(target)
    store = open_store(str(root))
    assert [(entry.name, entry.size) for entry in store.list()] == [
        ("a/b/real", 4),
        ("far/more/y", 4),
        ("far/x", 4),
        ("gone", 0),  # listed, for whoever wants it to hear of it
        ("near/b/real", 4),
        ("self", 0),
        ("x", 4),
    ]
    for prefix in ("a/", "far/more/", "near/", "a/b/up/", "loop/", "x", "nowhere/"):
        assert list(store.list(prefix)) == [entry for entry in store.list() if entry.name.startswith(prefix)]
    assert store.read("x") == store.read_range("far/more/y", 0, 4) == bytes(LocalStore(str(root)).map("near/b/real")) == b"1234"
    for read in (store.read, store.size, store.open):
        with pytest.raises(NotFound, match=r"gone: can't .*, it is a symlink to nowhere, where nothing is"):
            read("gone")
    for write in (store.delete, lambda name: store.put(name, b"")):
        with pytest.raises(StorageError, match="nothing is written or removed through a symlink"):
            write("far/x")
    store.delete("x")
    store.put("gone", b"here")
    assert (blobs / "x").read_bytes() == b"1234"
    assert not (root / "nowhere").exists()
    (root / ".tmp").symlink_to(blobs)
    with pytest.raises(StorageError, match="nothing is written"):
        store.put("new", b"")
    for only_dead in (False, True):
        with pytest.raises(StorageError):
            store.clean_temp(only_dead=only_dead)
    assert sorted(path.name for path in blobs.iterdir()) == ["more", "x"]


def test_folders_that_all_link_to_each_other_are_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(local, "_MAX_LINKED_FOLDERS", 50)
    for folder in range(5):
        (tmp_path / f"{folder}").mkdir()
        for other in range(5):
            (tmp_path / f"{folder}/{other}").symlink_to(f"../{other}")
    with pytest.raises(StorageError, match="more than 50 symlinks to folders: they lead to each other"):
        list(open_store(str(tmp_path)).list())


def test_a_killed_writer_leaves_only_a_temporary_file(tmp_path: Path) -> None:
    script = (
        "import os, signal, sys; from wds_tools.storage import open_store\n"
        "writer = open_store(sys.argv[1]).write('folder/a')\n"
        "writer.write(bytes(5 << 20)); os.kill(os.getpid(), signal.SIGKILL)"
    )
    assert run_python(script, str(tmp_path)).returncode == -9
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert [path.parent.name for path in files] == [".tmp"]
    store = open_store(str(tmp_path))
    assert list(store.list()) == []
    store.put("b", b"1")
    assert files[0].exists(), "another writer must not sweep it away"
    elsewhere = tmp_path / ".tmp" / f"0{files[0].name}"
    elsewhere.write_bytes(b"of another machine")
    with store.write("c") as writer:
        writer.write(b"of a process that lives")
        store.clean_temp(only_dead=True)
        assert not files[0].exists()
    assert (tmp_path / "c").exists()
    assert elsewhere.exists(), "whether that process lives can't be known here"
    store.clean_temp()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["b", "c"]


def test_a_finished_writer_leaves_no_temporary_folder(tmp_path: Path) -> None:
    store = open_store(str(tmp_path))
    with store.write("a"), store.write("b"):
        assert len(list((tmp_path / ".tmp").iterdir())) == 2
    store.write("c").abort()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b"]


def test_a_published_file_has_the_usual_mode(tmp_path: Path) -> None:
    (tmp_path / "plain").write_bytes(b"")
    open_store(str(tmp_path)).put("a", b"")
    assert (tmp_path / "a").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_a_relative_root_stays_put_when_the_folder_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    store = open_store("set")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    store.put("a", b"1")
    assert (tmp_path / "set" / "a").exists()


def test_what_is_no_regular_file_is_not_read_and_nobody_waits_for_it(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "fifo")
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(os.path.relpath(tmp_path / "socket"))
    (tmp_path / "device").symlink_to("/dev/zero")
    store = LocalStore(str(tmp_path))
    for name in ("folder", "fifo", "socket", "device"):
        for read in (store.open, store.read, store.size, store.map, lambda name: store.read_range(name, 0, 1)):
            with pytest.raises(NotFound, match="not a file"):
                read(name)
        assert not store.exists(name)


def test_a_file_of_no_size_is_empty_though_reading_it_would_give_bytes_or_wait(tmp_path: Path) -> None:
    for name in ("kmsg", "self/mem", "self/environ"):
        if os.access(f"/proc/{name}", os.R_OK):
            (tmp_path / "link").unlink(missing_ok=True)
            (tmp_path / "link").symlink_to(f"/proc/{name}")
            with open_store(str(tmp_path)).open("link") as stream:
                assert (stream.read(10), stream.read()) == (b"", b"")


def test_a_file_in_the_way_of_a_folder_is_an_error(tmp_path: Path) -> None:
    store = open_store(str(tmp_path))
    store.put("a", b"1")
    with pytest.raises(StorageError, match="a/b"):
        store.put("a/b", b"2")
    with pytest.raises(StorageError):
        list(open_store(str(tmp_path / "a")).list())
    assert list(store.list()) == [Entry("a", 1)]


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_and_a_full_quota_are_out_of_space(code: int) -> None:
    assert isinstance(translate(OSError(code, "full"), "write", "a"), OutOfSpace)


def test_a_full_quota_and_a_disk_without_inodes_are_not_called_a_full_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "the quota of bytes or of files is full" in str(translate(OSError(errno.EDQUOT, "full"), "write", "a"))
    counts = {"f_files": 5, "f_favail": 0}
    monkeypatch.setattr(os, "statvfs", lambda path: SimpleNamespace(**counts))  # noqa: ARG005
    full = OSError(errno.ENOSPC, "full", "/nowhere/a")
    assert "no inodes for more files (`df -i`)" in str(translate(full, "write", "a"))
    counts.update(f_files=0)  # of a file system that makes inodes as it needs them
    assert "the disk is full" in str(translate(full, "write", "a"))


@pytest.mark.parametrize("backend", ["local", "fsspec"])
def test_a_folder_that_cannot_be_listed_is_an_error_that_names_it(
    backend: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = open_store(url_of(backend, tmp_path))
    for name in ("a/b/closed/c.txt", "a/d.txt", "e.txt"):
        store.put(name, b"x")
    scandir = os.scandir

    def guarded(path: str) -> object:  # root may list any folder
        if str(path).endswith("closed"):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", guarded)
    for prefix in ("", "a/", "a/b/closed/"):
        with pytest.raises(StorageError, match="a/b/closed: can't list, permission denied"):
            list(store.list(prefix))


def test_a_disk_without_inodes_says_so(tmp_path: Path) -> None:
    script = (
        "import subprocess, sys; from wds_tools.errors import OutOfSpace; from wds_tools.storage import open_store\n"
        "subprocess.run(['mount', '-t', 'tmpfs', '-o', 'nr_inodes=4', 'tmpfs', sys.argv[1]], check=True); print('mounted')\n"
        "store = open_store(sys.argv[1]); store.put('a', b'1')\n"
        "for name in ('b', 'c', 'd/e'):\n"
        "    try: store.put(name, b'1')\n"
        "    except OutOfSpace as error: print(error)\n"
    )
    for unshare in (("unshare", "--mount"), ("unshare", "--mount", "--map-root-user")):
        done = run_python(script, str(tmp_path), prefix=unshare) if shutil.which("unshare") else None
        if done is not None and "mounted" in done.stdout:
            assert done.returncode == 0, done.stderr
            assert "can't write, the disk has space, but no inodes for more files (`df -i`): delete some files" in done.stdout
            return
    pytest.skip("may not mount a small tmpfs here, not even in a namespace of its own")


def test_a_full_disk_is_out_of_space_and_leaves_nothing(tmp_path: Path) -> None:
    script = (
        "import os, subprocess, sys; from wds_tools.errors import OutOfSpace; from wds_tools.storage import open_store\n"
        "subprocess.run(['mount', '-t', 'tmpfs', '-o', 'size=2m', 'tmpfs', sys.argv[1]], check=True); print('mounted')\n"
        "store = open_store(sys.argv[1]); store.put('a', b'1')\n"
        "for size in (3 << 20, 5 << 20):\n"
        "    try: store.put('big', bytes(size))\n"
        "    except OutOfSpace as error: print(error)\n"
        "    assert os.listdir(sys.argv[1]) == ['a']\n"
        "store.put('b', bytes(1 << 20))"
    )
    for unshare in (("unshare", "--mount"), ("unshare", "--mount", "--map-root-user")):
        done = run_python(script, str(tmp_path), prefix=unshare) if shutil.which("unshare") else None
        if done is not None and "mounted" in done.stdout:
            assert done.returncode == 0, done.stderr
            assert done.stdout.count("can't write, the disk is full: free some space") == 2
            return
    pytest.skip("may not mount a small tmpfs here, not even in a namespace of its own")


@pytest.mark.slow
def test_100_000_files_are_listed_in_seconds(tmp_path: Path) -> None:
    for folder in range(100):
        (tmp_path / f"{folder:03}").mkdir()
        for file in range(1000):
            os.close(os.open(tmp_path / f"{folder:03}" / f"{file:04}", os.O_CREAT | os.O_WRONLY))
    start = time.monotonic()
    names = [entry.name for entry in open_store(str(tmp_path)).list()]
    assert time.monotonic() - start < 10  # 0.4 s where this was written
    assert len(names) == 100_000
    assert names == sorted(names)


# --- object stores ---------------------------------------------------------------------------------------------------------


def test_a_large_write_on_s3_is_a_multipart_upload(s3: S3Server) -> None:
    import obstore
    from obstore.store import S3Store

    folder = uuid.uuid4().hex
    store = open_store(f"s3://tests/{folder}")
    with store.write("big") as writer:
        for _ in range(104):
            writer.write(bytes(MB))
    store.put("small", b"1")
    bucket = S3Store("tests", client_options={"allow_http": True})
    tags = {name: obstore.head(bucket, f"{folder}/{name}")["e_tag"] or "" for name in ("big", "small")}
    assert tags["big"].strip('"').endswith("-13")
    assert "-" not in tags["small"]


def test_an_object_replaced_while_it_is_read_is_noticed(s3: S3Server) -> None:
    store = open_store(f"s3://tests/{uuid.uuid4().hex}")
    store.put("a", bytes(40 * MB))
    with store.open("a") as file:
        file.read(1)
        store.put("a", b"\1" * (40 * MB))
        with pytest.raises(StorageError, match="replaced while it was read"):
            file.read()


def test_a_wrong_secret_says_which_variable_to_check(s3: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "not-the-secret")
    store = open_store("s3://tests/x")
    writer = store.write("a")
    writer.write(b"1")
    for use in (
        lambda: store.read("a"),
        lambda: list(store.list()),
        lambda: store.put("a", b""),
        lambda: store.exists("a"),
        lambda: store.read_range("a", 0, 1),
        lambda: store.delete("a"),
        writer.close,
    ):
        with pytest.raises(
            StorageError, match=r"^s3://tests/x.*is not that of the key: check AWS_SECRET_ACCESS_KEY.*403 Forb"
        ) as caught:
            use()
        assert not isinstance(caught.value, NotFound)
        assert caught.value.__cause__ is not None
        assert "\n" not in str(caught.value)
        assert "not-the-secret" not in str(caught.value)


def test_a_missing_bucket_is_named(s3: S3Server) -> None:
    with pytest.raises(NotFound, match="there is no bucket nowhere: create it"):
        list(open_store("s3://nowhere/x").list())
    with pytest.raises(NotFound):
        open_store("s3://nowhere/x").read("a")


def test_a_server_that_is_not_there_is_given_up_in_time(s3: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
    monkeypatch.setenv("WDS_TOOLS_RETRY_S", "1")
    store = open_store("s3://tests/x")
    for use in (lambda: store.read("a"), lambda: list(store.list()), lambda: store.read_range("a", 0, 1)):
        start = time.monotonic()
        with pytest.raises(
            StorageError, match=r"no answer in [\d.]+ s of trying \(WDS_TOOLS_RETRY_S=1\).*AWS_ENDPOINT_URL.*refused"
        ):
            use()
        assert time.monotonic() - start < 30  # without the variable it is three minutes


@pytest.mark.parametrize(
    ("variable", "value"),
    [
        ("WDS_TOOLS_RETRY_S", "soon"),
        ("WDS_TOOLS_STALL_S", "0"),
        ("WDS_TOOLS_STALL_S", "1h"),
        ("WDS_TOOLS_LEAST_BYTES_PER_S", "-1"),
    ],
)
def test_a_limit_that_is_no_number_is_refused(variable: str, value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(variable, value)
    with pytest.raises(UsageError, match=f"{variable}='{value}': expected a number of "):
        open_store("s3://tests/x").read("a")


def test_a_server_that_comes_back_is_waited_for(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("WDS_TOOLS_RETRY_S", "20")
    (tmp_path / "a").write_bytes(b"at last")
    answers = iter([503, 500, 503])
    with serve_http(tmp_path, lambda _: next(answers, 0)) as url:
        assert open_store(url).read("a") == b"at last"


@pytest.mark.parametrize("profile", ["mine", "default"])
def test_keys_of_a_profile_are_read(s3: S3Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, profile: str) -> None:
    pytest.importorskip("boto3")
    (tmp_path / "credentials").write_text(
        f"[{profile}]\naws_access_key_id={s3.access_key}\naws_secret_access_key={s3.secret_key}\n"
    )
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    if profile != "default":
        monkeypatch.setenv("AWS_PROFILE", profile)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "credentials"))
    store = open_store(f"s3://tests/{uuid.uuid4().hex}")
    store.put("a", b"1")
    assert store.read("a") == b"1"


def test_keys_that_only_boto3_can_read_are_said_to_be_such(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setitem(sys.modules, "obstore.auth.boto3", None)
    (tmp_path / ".aws").mkdir()
    (tmp_path / ".aws" / "credentials").write_text("[default]\naws_access_key_id=a\naws_secret_access_key=b\n")
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(
        MissingPackage, match=r"profile default \(AWS_PROFILE, ~/\.aws\), which takes boto3 to read: pip install boto3"
    ):
        open_store("s3://of-nobody/x").read("a")  # no test has its client


FORK = """
import multiprocessing, os, sys, threading
from wds_tools.storage import open_store
store = open_store(sys.argv[1])
data = os.urandom(20 << 20)
store.put("a", data)
assert store.read("a") == data  # threads and connections are up
def child(depth):
    for _ in range(3):
        assert store.read("a") == data
        assert len(list(store.list())) == 1
    assert open_store(sys.argv[1]).read_range("a", 5, 9) == data[5:9]
    if depth:
        run(depth - 1)
def run(depth):
    children = [multiprocessing.get_context("fork").Process(target=child, args=(depth,)) for _ in range(3 if depth else 1)]
    for process in children:
        process.start()
    for _ in range(10):
        assert store.read("a") == data
    for process in children:
        process.join(60)
        assert process.exitcode == 0, process.exitcode
if __name__ == "__main__":
    run(1)
    print("fine")
"""


@pytest.mark.slow
def test_a_store_that_was_used_works_in_forked_children_and_goes_on_in_the_parent(s3: S3Server) -> None:
    done = run_python(FORK, f"s3://tests/{uuid.uuid4().hex}")
    assert (done.returncode, done.stdout) == (0, "fine\n"), done.stderr


def test_a_fork_after_someone_else_used_obstore_is_survived(s3: S3Server) -> None:
    url = f"s3://tests/{uuid.uuid4().hex}"
    open_store(url).put("a", b"1")
    script = (
        "import os, sys, obstore; from obstore.store import S3Store; from wds_tools.storage import open_store\n"
        "bucket = S3Store('tests', client_options={'allow_http': True}); obstore.list(bucket).collect()\n"
        "pid = os.fork()\n"
        "if pid == 0: os._exit(0 if open_store(sys.argv[1]).read('a') == b'1' else 1)\n"
        "obstore.list(bucket).collect(); print(os.waitpid(pid, 0)[1])"
    )
    done = run_python(script, url)
    assert (done.returncode, done.stdout) == (0, "0\n"), done.stderr


def test_a_store_works_in_a_spawned_process(s3: S3Server) -> None:
    store = open_store(f"s3://tests/{uuid.uuid4().hex}")
    store.put("a", b"hello")
    script = "import base64, pickle, sys; print(pickle.loads(base64.b64decode(sys.argv[1])).read('a'))"
    done = run_python(script, base64.b64encode(pickle.dumps(store)).decode())
    assert done.stdout == "b'hello'\n", done.stderr


# --- web servers -----------------------------------------------------------------------------------------------------------


@contextmanager
def serve_http(folder: Path, refuse: object = None) -> Iterator[str]:
    """A plain web server of a folder, which knows no ranges; refuse(request) gives a status to answer with, or 0."""

    class Handler(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *arguments: object) -> None:
            super().__init__(*arguments, directory=str(folder))  # type: ignore[arg-type]

        def do_GET(self) -> None:
            status = refuse(self) if callable(refuse) else 0
            if status:
                self.send_error(status)
            else:
                super().do_GET()

        def log_message(self, *_: object) -> None:
            pass

    class Server(http.server.ThreadingHTTPServer):
        def handle_error(self, *_: object) -> None:
            pass  # a client that hangs up, as ours does when it is sent more than it asked for

    with Server(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()


def test_a_web_server_is_read_even_without_ranges_and_nothing_else(tmp_path: Path) -> None:
    (tmp_path / "a set").mkdir()
    (tmp_path / "a set" / "big").write_bytes(pattern(20 * MB))
    (tmp_path / "a set" / "empty").write_bytes(b"")
    with serve_http(tmp_path) as url:
        store = open_store(f"{url}/a%20set")
        assert store.read("big") == pattern(20 * MB)
        assert store.read("empty") == b""
        assert store.size("big") == 20 * MB
        with store.open("big") as file:
            assert file.read(100) == pattern(100)
        assert not store.exists("nothing")
        with pytest.raises(NotFound):
            store.open("nothing")
        with pytest.raises(StorageError, match="can't read"):
            store.read_range("big", 1, 2)
        with pytest.raises(StorageError, match="can't be asked for a list"):
            store.list()
        for write in (store.write, store.delete, lambda name: store.put(name, b"")):
            with pytest.raises(StorageError, match="read-only"):
                write("a")


def test_a_login_in_a_web_address_is_used_and_never_shown(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"1")
    expected = "Basic " + base64.b64encode(b"me:s@cret").decode()

    def refuse(request: http.server.SimpleHTTPRequestHandler) -> int:
        return 0 if request.headers["Authorization"] == expected else 401

    with serve_http(tmp_path, refuse) as url:
        assert open_store(url.replace("//", "//me:s%40cret@")).read("a") == b"1"
        wrong = open_store(url.replace("//", "//me:s3cret@"))
        with pytest.raises(StorageError, match="access denied: this address needs a login") as caught:
            wrong.read("a")
    assert "cret" not in f"{caught.value} {caught.value.__cause__} {wrong!r}"


# --- fsspec ----------------------------------------------------------------------------------------------------------------


def test_a_protocol_nobody_knows_is_refused() -> None:
    with pytest.raises(UsageError, match="nonsense:// is no protocol"):
        list(open_store("nonsense://x/y").list())


def test_no_ranged_read_of_the_hub_asks_for_the_size_first(monkeypatch: pytest.MonkeyPatch) -> None:
    fsspec = pytest.importorskip("fsspec")
    data, asked = bytes(range(256)) * 80_000, []

    class File(fsspec.spec.AbstractBufferedFile):  # type: ignore[misc, name-defined]
        def _fetch_range(self, start: int, end: int) -> bytes:
            asked.append((start, end))
            return data[start:end]

    class Hub(fsspec.AbstractFileSystem):  # type: ignore[misc]
        protocol = "hf"

        def info(self, path: str, **_: Any) -> dict[str, Any]:
            asked.append("size")
            return {"name": path, "size": len(data), "type": "file"}

        def _open(self, path: str, mode: str = "rb", **options: Any) -> Any:
            return File(self, path, mode, **options)

    monkeypatch.setitem(importlib.import_module("fsspec.registry")._registry, "hf", Hub)
    store = open_store("hf://datasets/o/n")
    assert store.read_range("a", 1000, 3000, len(data)) == data[1000:3000]
    assert store.read_range("a", 10, 20_000_000, len(data)) == data[10:20_000_000]
    ends = [10, 10 + (8 << 20), 10 + (16 << 20), 20_000_000]
    assert asked == [(1000, 3000), *pairwise(ends)]
    with pytest.raises(StorageError, match=f"wanted bytes .*, the file ends at {len(data)}"):
        store.read_range("a", len(data) - 5, len(data) + 5)


def test_a_missing_package_is_named_with_its_pip_line() -> None:
    pytest.importorskip("fsspec")
    with pytest.raises(MissingPackage, match="pip install smbprotocol"):
        open_store("smb://host/share").read("a")
