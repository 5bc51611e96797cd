"""Blocks of shards on a local disk, shared by all processes of this machine.

    BlockCache(folder, max_bytes).read(content, start, end) -> bytes | None
                                  .write(content, start, end, data)

A block is known by its shard's XXH3-128, so data that was moved or renamed is still found. It lies in
`folder/ab/<hash>-<start>-<end>`: its bytes, then 16 bytes of XXH3-128 over name and bytes. A file that doesn't add up (torn,
flipped, under another's name) is deleted and counts as a miss. Files are written under a temporary name and renamed.

No process waits for another. `folder/written` grows by a byte with every 64 KiB that any of them writes: with the total at its
last look and that file's length, each knows about how much is there. Over the limit, it looks, and deletes what was longest
not read, down to 90 %. Two that do so at once delete the same files. The limit is exceeded by the writes under way at most.

Cost of a read beside the bytes: two opens and the checksum (0.1 ms a MiB). Of a look: 3 µs a block. Nothing is kept open.
"""

# Descriptors, O_NOFOLLOW and dir_fd live in os:
# ruff: noqa: PTH100, PTH103, PTH118, PTH208
from __future__ import annotations

import os
import re
import stat
import threading
import time
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

from wds_tools.errors import UsageError
from wds_tools.format.checksum import content_hash
from wds_tools.storage.base import Buffer

LEFTOVER_S = 3600.0  # a temporary file of that age has no writer any more
TOUCH_S = 60.0  # a block is marked as read no more often than this
KEEP = 0.9  # of max_bytes, when blocks are deleted
WRITTEN = "written"
UNIT_BYTES = 64 << 10  # that a byte of WRITTEN stands for
MAX_WRITTEN_BYTES = 1 << 20  # then it begins again

_COUNTS = ("hits", "misses", "written", "evicted", "damaged", "not_written")
_TEMP_PREFIX = ".tmp-"
_CONTENT = re.compile(r"[0-9a-f]{32}")
_FOLDER = re.compile(r"[0-9a-f]{2}")
_BLOCK = re.compile(r"[0-9a-f]{32}-\d+-\d+")
_TRAILER_BYTES = 16
_READ = os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC
_CREATE = os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC


class _File(NamedTuple):
    """A block as the scan found it; the oldest sorts first."""

    read_ns: int
    num_bytes: int
    folder: str
    name: str


class BlockCache:
    """The cache; usable from many threads, after a fork and after pickling. The counts are those of one process.

    Args:
        folder: on a local disk; made at the first write, for this user alone. Files in it that are no blocks stay untouched.
        max_bytes: size limit of all blocks together.

    Raises:
        UsageError: no folder, or a limit below 1.
    """

    def __init__(self, folder: str, max_bytes: int) -> None:
        if not folder or max_bytes < 1:
            raise UsageError(f"a cache in {folder!r} of {max_bytes} bytes: expected a folder, and a size of 1 or more")
        self.folder = os.path.abspath(folder)
        self.max_bytes = max_bytes
        self._begin()

    def _begin(self) -> None:
        """What belongs to one process."""
        self._pid = os.getpid()
        self._lock = threading.Lock()  # of the counts
        self._looking = threading.Lock()  # one thread looks, others that write wait for it
        self._counts: Counter[str] = Counter(dict.fromkeys(_COUNTS, 0))
        self._is_off = False
        self._seen_bytes = 0  # of blocks, at the last look
        self._seen_written = -1  # length of WRITTEN then; -1: never looked

    def __reduce__(self) -> tuple[Any, ...]:
        return BlockCache, (self.folder, self.max_bytes)

    def stats(self) -> dict[str, int]:
        """Counts of this process: hits, misses, written, evicted, damaged (a miss, too), not_written (no space or permission)."""
        self._check_pid()
        with self._lock:
            return dict(self._counts)

    def read(self, content: str, start: int, end: int) -> Buffer | None:
        """Bytes [start, end) of a shard, or None if they aren't here. Never fails for what the disk does.

        Args:
            content: XXH3-128 of the shard, in hex.
            start: first byte.
            end: one past the last. Start and end must be those of the write.
        """
        self._check_pid()
        name = _name(content, start, end)
        data = None
        try:
            with _opened(os.path.join(self.folder, name[:2]), _READ | os.O_DIRECTORY) as folder:
                with _opened(name, _READ | os.O_NONBLOCK, folder) as file:  # a FIFO would be waited for
                    data = _checked(file, name, end - start)
                if data is None:
                    os.unlink(name, dir_fd=folder)
                    self._count("damaged")
        except OSError:
            pass  # not there, not any more, or not for us
        self._count("misses" if data is None else "hits")
        return data

    def write(self, content: str, start: int, end: int, data: Buffer) -> None:
        """Keep bytes [start, end) of a shard. If that can't be done there is one warning, and no further write is tried.

        Raises:
            UsageError: `data` isn't end - start bytes long.
        """
        self._check_pid()
        name = _name(content, start, end)
        if len(data) != end - start:
            raise UsageError(f"{len(data)} bytes given to the cache as [{start}, {end}) of {content}: expected {end - start}")
        if len(data) + _TRAILER_BYTES > self.max_bytes:
            return
        if self._is_off:
            self._count("not_written")
            return
        try:
            self._publish(name, data)
            self._keep_limit(len(data) + _TRAILER_BYTES)
        except OSError as error:
            self._turn_off(error)

    def _publish(self, name: str, data: Buffer) -> None:
        path, temp = os.path.join(self.folder, name[:2]), _TEMP_PREFIX + os.urandom(8).hex()
        os.makedirs(path, 0o700, exist_ok=True)
        with _opened(path, _READ | os.O_DIRECTORY) as folder:
            try:
                with _opened(temp, _CREATE | os.O_EXCL, folder) as file:
                    for piece in (data, _trailer(name, data)):
                        rest = memoryview(piece).cast("B")
                        while rest:
                            rest = rest[os.write(file, rest) :]
                os.rename(temp, name, src_dir_fd=folder, dst_dir_fd=folder)
            except OSError:
                _unlink(temp, folder)
                raise
        self._count("written")

    def _keep_limit(self, num_bytes: int) -> None:
        """Count what was written; if that is too much with what is there already, make room."""
        with _opened(os.path.join(self.folder, WRITTEN), _CREATE | os.O_APPEND) as written:
            os.write(written, bytes(-(-num_bytes // UNIT_BYTES)))
            if not self._is_within(written):
                with self._looking:  # who comes second waits: a look takes long on a busy machine, and writes would go on
                    if not self._is_within(written):
                        self._make_room(written)

    def _is_within(self, written: int) -> bool:
        """Whether what is known to be there is within the limit."""
        grown = os.fstat(written).st_size - self._seen_written
        is_known = self._seen_written >= 0 and grown >= 0  # somebody may have let the file begin again
        return is_known and self._seen_bytes + grown * UNIT_BYTES <= self.max_bytes

    def _make_room(self, written: int) -> None:
        """Look at what is there; above the limit, delete blocks down to KEEP of it."""
        seen_written = os.fstat(written).st_size  # before the look: what is written meanwhile counts twice, not never
        if seen_written > MAX_WRITTEN_BYTES:
            os.ftruncate(written, 0)
            seen_written = 0
        files = list(self._scan())
        total = sum(file.num_bytes for file in files)
        if total > self.max_bytes:
            for file in sorted(files):
                if total <= KEEP * self.max_bytes:
                    break
                total -= file.num_bytes
                with _opened(os.path.join(self.folder, file.folder), _READ | os.O_DIRECTORY) as folder:
                    if _unlink(file.name, folder):
                        self._count("evicted")
        self._seen_bytes, self._seen_written = total, seen_written

    def _scan(self) -> Iterator[_File]:
        """All blocks. Temporary files whose writer must be dead are deleted on the way."""
        for name in filter(_FOLDER.fullmatch, os.listdir(self.folder)):
            try:
                with _opened(os.path.join(self.folder, name), _READ | os.O_DIRECTORY) as folder, os.scandir(folder) as entries:
                    for entry in entries:
                        is_temp = entry.name.startswith(_TEMP_PREFIX)
                        if not is_temp and not _BLOCK.fullmatch(entry.name):
                            continue
                        try:
                            status = entry.stat(follow_symlinks=False)
                        except FileNotFoundError:
                            continue
                        if not stat.S_ISREG(status.st_mode):
                            continue
                        if not is_temp:
                            yield _File(status.st_mtime_ns, status.st_size, name, entry.name)
                        elif status.st_mtime < time.time() - LEFTOVER_S:
                            _unlink(entry.name, folder)
            except (NotADirectoryError, FileNotFoundError):
                continue  # a symlink, or a file: none of ours

    def _turn_off(self, error: OSError) -> None:
        with self._lock:
            self._counts["not_written"] += 1
            was_off, self._is_off = self._is_off, True
        if not was_off:
            warnings.warn(
                f"{self.folder}: can't write to the cache, {error.strerror or error}: what is there is still read, but nothing "
                f"is added; free some space, choose another folder, or a limit below {self.max_bytes} bytes",
                stacklevel=3,
            )

    def _check_pid(self) -> None:
        if self._pid != os.getpid():  # forked: locks may be held by threads that aren't here
            self._begin()

    def _count(self, what: str) -> None:
        with self._lock:
            self._counts[what] += 1


def _name(content: str, start: int, end: int) -> str:
    """The file name of a block. Raises UsageError for what could not be one."""
    if not _CONTENT.fullmatch(content) or not 0 <= start < end:
        raise UsageError(f"bytes [{start}, {end}) of {content!r}: expected 0 <= start < end, and an XXH3-128 in 32 hex digits")
    return f"{content}-{start}-{end}"


def _trailer(name: str, data: Buffer) -> bytes:
    checksum = content_hash(name.encode())
    checksum.update(data)
    return bytes(checksum.digest())


def _checked(file: int, name: str, num_bytes: int) -> bytes | None:
    """A block's bytes, marked as read; None if the file isn't what was written."""
    status = os.fstat(file)
    if not stat.S_ISREG(status.st_mode) or status.st_size != num_bytes + _TRAILER_BYTES:
        return None
    data = os.pread(file, num_bytes, 0)
    if len(data) != num_bytes or os.pread(file, _TRAILER_BYTES, num_bytes) != _trailer(name, data):
        return None
    if status.st_mtime < time.time() - TOUCH_S:
        try:
            os.utime(file)
        except OSError:
            pass  # a read-only file system
    return data


def _unlink(name: str, folder: int) -> bool:
    """Delete a file; False if that didn't happen, as when another process was faster."""
    try:
        os.unlink(name, dir_fd=folder)
    except OSError:
        return False
    return True


@contextmanager
def _opened(path: str, flags: int, folder: int | None = None) -> Iterator[int]:
    """A descriptor for a while; the last part of the path may not be a symlink."""
    descriptor = os.open(path, flags, 0o600, dir_fd=folder)
    try:
        yield descriptor
    finally:
        os.close(descriptor)
