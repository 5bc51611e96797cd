"""Folders on this machine or a mounted file system.

A write goes to `.tmp/<random>` under the root, is flushed to the disk, and is renamed: a name that exists is complete,
also after a power cut, and whatever a killed process leaves lies in `.tmp/`. A file costs two fsyncs: its own and its
folder's.

Symlinks are followed while they stay inside the root. One that leaves it is refused by every read and left out of
list(), as is a dangling one; list() doesn't descend into a symlinked folder, so there are no loops. The root itself may be
one.
"""

# A listing makes 100,000 of these calls, and realpath, fsync and O_EXCL live in os:
# ruff: noqa: PTH100, PTH103, PTH105, PTH106, PTH108, PTH112, PTH113, PTH114, PTH116, PTH120, PTH202
import errno
import io
import mmap
import os
import shutil
import stat
from collections.abc import Iterator
from typing import Any
from urllib.parse import unquote, urlsplit

from wds_tools.errors import NotFound, OutOfSpace, StorageError, UsageError
from wds_tools.storage.base import (
    TEMP_FOLDER,
    Buffer,
    Entry,
    WriterBase,
    check_name,
    check_prefix,
    check_range,
    join,
    other_size,
    redact,
    split_scheme,
)

BUFFER_BYTES = 1 << 20  # of a reader and of a writer


class LocalStore:
    """A folder. See Store for what the methods promise.

    Args:
        url: a path, or file:///path with percent escapes.
    """

    def __init__(self, url: str) -> None:
        self.url = redact(url)
        self._root = os.path.abspath(_path_of(url))  # so that a worker with another current folder means the same

    def __repr__(self) -> str:
        return f"LocalStore({self.url!r})"

    def list(self, prefix: str = "") -> Iterator[Entry]:
        folder = check_prefix(prefix, self.url)
        found: list[Entry] = []
        try:
            real_root = os.path.realpath(self._root)
            top = os.path.realpath(join(self._root, folder)) if folder else self._root
            if folder and not _is_inside(top, real_root):
                return iter(())
            _scan(top, f"{folder}/" if folder else "", real_root, found)
        except NotADirectoryError as error:
            if not folder:
                raise StorageError(f"{self.url} is a file, or lies below one: give a folder") from error
        except OSError as error:
            where = self.url if error.filename in (None, self._root) else str(error.filename)  # a folder below it, perhaps
            raise translate(error, "list", where) from error
        found.sort()
        return (entry for entry in found if entry.name.startswith(prefix)) if prefix else iter(found)

    def size(self, name: str) -> int:
        path = self._existing(name)
        try:
            status = os.stat(path)
        except OSError as error:
            raise translate(error, "look at", self._show(name)) from error
        if os.path.isdir(path):
            raise NotFound(f"{self._show(name)} is a folder, not a file")
        return status.st_size

    def exists(self, name: str) -> bool:
        try:
            self.size(name)
        except NotFound:
            return False
        return True

    def read(self, name: str) -> bytes:
        with self.open(name) as file:
            return file.read()

    def read_range(self, name: str, start: int, end: int, size: int | None = None) -> bytes:
        check_range(name, start, end)
        path = self._existing(name)
        if start == end:
            return b""
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            try:
                found = os.fstat(descriptor).st_size
                data = _pread(descriptor, start, end) if end <= found else b""
            finally:
                os.close(descriptor)
        except OSError as error:
            raise translate(error, "read", self._show(name)) from error
        if len(data) != end - start:
            raise StorageError(
                f"{self._show(name)}: wanted bytes [{start}, {end}), the file ends at {found}: "
                "it was truncated or replaced, or its index is of another file"
            )
        if size not in (None, found):
            raise StorageError(other_size(self._show(name), found, size))
        return data

    def map(self, name: str) -> memoryview:
        """The whole file, mapped: reading it costs no copy, and all processes share its pages.

        A file that is cut short while it is mapped ends the process with SIGBUS: replace data by renaming, as put() does.

        Raises:
            NotFound, StorageError: as read().
        """
        path = self._existing(name)
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            try:
                if not os.fstat(descriptor).st_size:  # mmap refuses it
                    return memoryview(b"")
                return memoryview(mmap.mmap(descriptor, 0, prot=mmap.PROT_READ))
            finally:
                os.close(descriptor)
        except OSError as error:
            raise translate(error, "read", self._show(name)) from error

    def open(self, name: str) -> io.BufferedReader:
        path = self._existing(name)
        try:
            if stat.S_ISREG(os.stat(path).st_mode):  # opening a FIFO would wait for somebody to write to it
                return io.BufferedReader(_File(path, self._show(name)), BUFFER_BYTES)
        except OSError as error:
            raise translate(error, "read", self._show(name)) from error
        raise NotFound(f"{self._show(name)}: can't read, this is a folder or a device, not a file")

    def put(self, name: str, data: Buffer) -> None:
        with self.write(name) as writer:
            writer.write(data)

    def write(self, name: str) -> "LocalWriter":
        return LocalWriter(self._new(name), self._root, self._show(name))

    def delete(self, name: str) -> None:
        path = self._new(name)
        try:
            os.unlink(path)
        except (FileNotFoundError, NotADirectoryError):
            pass
        except OSError as error:
            raise translate(error, "delete", self._show(name)) from error
        self._drop_empty_folder(os.path.dirname(path))

    def clean_temp(self) -> None:
        try:
            shutil.rmtree(join(self._root, TEMP_FOLDER))
        except FileNotFoundError:
            pass
        except OSError as error:
            if error.errno != errno.ENOTEMPTY:  # somebody begins to write at this moment, and stays
                raise translate(error, "delete", self._show(TEMP_FOLDER)) from error

    def _drop_empty_folder(self, folder: str) -> None:
        """As on an object store, a folder below the root is there only for its files."""
        if folder != self._root:
            try:
                os.rmdir(folder)
            except OSError:
                pass  # another file is in it

    def _show(self, name: str) -> str:
        return join(self.url, name)

    def _existing(self, name: str) -> str:
        """The path to read from, which is inside the root after all symlinks."""
        return self._inside(check_name(name, self.url), name)

    def _new(self, name: str) -> str:
        """The path to write or delete: its folder is inside the root; if it is a symlink, the link itself is meant."""
        folder, _, last = check_name(name, self.url).rpartition("/")
        return join(self._inside(folder, name), last)

    def _inside(self, relative: str, name: str) -> str:
        """The path of `relative`, refused for `name` if a symlink takes it out of the root."""
        path = self._root
        for segment in relative.split("/") if relative else ():
            path = join(path, segment)
            if os.path.islink(path):  # rare; without one the text decides, for a microsecond a segment
                break
        else:
            return path
        path = os.path.realpath(join(self._root, relative))
        if _is_inside(path, os.path.realpath(self._root)):
            return path
        raise StorageError(
            f"{self._show(name)} is a symlink that leads out of its folder, to {path}: "
            "copy the file in, or open the folder that holds it"
        )


class LocalWriter(WriterBase):
    """A file being written under `.tmp/`. See Writer.

    Args:
        path: where it will be published; folders on the way are made then.
        root: the store's folder.
        show: the URL for messages.
    """

    def __init__(self, path: str, root: str, show: str) -> None:
        self._path, self._root, self._show = path, root, show
        self._temp = join(join(root, TEMP_FOLDER), os.urandom(12).hex())
        try:
            self._raw = io.FileIO(_create(self._temp), "wb")
            self._file = io.BufferedWriter(self._raw, BUFFER_BYTES)
        except OSError as error:
            raise translate(error, "write", show) from error

    def write(self, data: Buffer, /) -> int:
        try:
            return self._file.write(data)
        except OSError as error:
            raise translate(error, "write", self._show) from error

    def _publish(self) -> None:
        try:
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()
            folder = os.path.dirname(self._path)
            os.makedirs(folder, exist_ok=True)
            os.replace(self._temp, self._path)
            _sync_folder(folder)
        except OSError as error:
            self._discard()
            raise translate(error, "write", self._show) from error
        self._drop_temp_folder()

    def _discard(self) -> None:
        try:
            self._raw.close()  # not through the buffer, which would try to write once more
            os.unlink(self._temp)
        except OSError:
            pass  # the caller's exception is the one worth reading; clean_temp takes the rest
        self._drop_temp_folder()

    def _drop_temp_folder(self) -> None:
        try:
            os.rmdir(join(self._root, TEMP_FOLDER))
        except OSError:
            pass  # another writer's file is in it


class _File(io.FileIO):
    """A file opened for reading whose errors are ours."""

    def __init__(self, path: str, show: str) -> None:
        super().__init__(path, "rb")
        self._show = show

    def readinto(self, buffer: Any, /) -> int | None:
        try:
            return super().readinto(buffer)
        except OSError as error:
            raise translate(error, "read", self._show) from error

    def readall(self) -> bytes:
        try:
            return super().readall()
        except OSError as error:
            raise translate(error, "read", self._show) from error


def translate(error: OSError, verb: str, show: str) -> StorageError:
    """Our error for one of the operating system's.

    Args:
        error: what was raised.
        verb: what was tried: "read", "write", "list", ...
        show: path or URL for the message, without credentials.

    Returns:
        NotFound, OutOfSpace or StorageError, to be raised from `error`.
    """
    if isinstance(error, StorageError):
        return error
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        what = "the disk is full: free some space"
        if error.errno == errno.EDQUOT:
            what = "the quota of bytes or of files is full (`quota` says which): delete some files"
        elif error.filename is not None and _has_no_inodes(os.path.dirname(error.filename) or "."):
            what = "the disk has space, but no inodes for more files (`df -i`): delete some files, or write larger shards"
        return OutOfSpace(f"{show}: can't {verb}, {what} or choose another place, then run again")
    if isinstance(error, FileNotFoundError):
        return NotFound(f"{show}: can't {verb}, nothing is there")
    if isinstance(error, IsADirectoryError):
        return NotFound(f"{show}: can't {verb}, this is a folder, not a file")
    if isinstance(error, NotADirectoryError):
        return NotFound(f"{show}: can't {verb}, a part of this path is a file, not a folder")
    if isinstance(error, PermissionError):
        return StorageError(f"{show}: can't {verb}, permission denied: check the owner and mode of the file and its folders")
    return StorageError(f"{show}: can't {verb}: {error.strerror or error}")


def _has_no_inodes(folder: str) -> bool:
    """Whether a file system that counts its files has no room for another."""
    try:
        counts = os.statvfs(folder)
    except OSError:
        return False
    return counts.f_files > 0 and not counts.f_favail


def _scan(folder: str, at: str, real_root: str, found: list[Entry]) -> None:
    """Add the files below `folder`, whose names begin with `at`."""
    try:
        entries = os.scandir(folder)
    except FileNotFoundError:
        return
    with entries:
        for entry in entries:
            name = at + entry.name
            try:
                if entry.is_symlink():
                    target = os.path.realpath(entry.path)
                    if _is_inside(target, real_root) and os.path.isfile(target):
                        found.append(Entry(name, os.path.getsize(target)))
                elif entry.is_dir():
                    if name != TEMP_FOLDER:
                        _scan(entry.path, name + "/", real_root, found)
                else:
                    found.append(Entry(name, entry.stat(follow_symlinks=False).st_size))
            except FileNotFoundError:
                continue  # deleted while we looked


def _pread(descriptor: int, start: int, end: int) -> bytes:
    """Bytes [start, end), or fewer if the file ends; Linux gives at most 2 GiB a call."""
    pieces: list[bytes] = []
    while start < end and (piece := os.pread(descriptor, min(end - start, 1 << 30), start)):
        pieces.append(piece)
        start += len(piece)
    return pieces[0] if len(pieces) == 1 else b"".join(pieces)


def _path_of(url: str) -> str:
    scheme, _ = split_scheme(url)
    if not scheme:
        return url
    parts = urlsplit(url)
    if parts.netloc not in ("", "localhost") or not parts.path:
        raise UsageError(f"{redact(url)}: a file URL is file:///absolute/path, with three slashes")
    return unquote(parts.path)


def _is_inside(path: str, root: str) -> bool:
    return path == root or path.startswith(root if root == "/" else root + "/")


def _create(path: str) -> int:
    """Open a new file in a folder that another writer may be removing at this moment, for being empty."""
    for attempt in range(100):
        try:
            os.makedirs(os.path.dirname(path), exist_ok=True)
            return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        except (FileNotFoundError, FileExistsError):  # the latter from makedirs, where the folder goes while it looks at it
            if attempt == 99:
                raise
    raise AssertionError("unreachable")


def _sync_folder(folder: str) -> None:
    """Make the rename itself survive a power cut; some file systems can't, and say so."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(descriptor)
