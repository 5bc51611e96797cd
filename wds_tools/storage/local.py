"""Folders on this machine or a mounted file system.

A write goes to `.tmp/<process>-<random>` under the root, is flushed to the disk, and is renamed: a name that exists is complete,
also after a power cut, and whatever a killed process leaves lies in `.tmp/`. A file costs two fsyncs: its own and its
folder's.

Symlinks are followed by reads and by list(), as by any other tool: the Hugging Face cache, DVC, and data on several disks are
made of them. A file is the path as it was named, never its target. list() does not enter a folder that is one of those it lies
in (by device and inode), and shows a link to nothing, so that whoever wants it hears of it. With `strict_links` reads refuse a
link that leaves the root, and list() leaves it out, as it does links to folders and to nothing. Nothing is written or removed
through a link; the root itself may be one. Only regular files are opened: a FIFO would wait, a device might act.
"""

# A listing makes 100,000 of these calls, and realpath, fsync and O_EXCL live in os:
# ruff: noqa: PTH100, PTH103, PTH105, PTH106, PTH108, PTH113, PTH114, PTH115, PTH116, PTH120, PTH202, PTH208
import errno
import io
import mmap
import os
import shutil
import stat
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from itertools import accumulate
from typing import Any
from urllib.parse import unquote, urlsplit

from wds_tools.errors import NotFound, OutOfSpace, StorageError, UsageError
from wds_tools.storage.base import TEMP_FOLDER, Buffer, Entry, Store, Writer, check_name, join, redact, split_scheme
from wds_tools.storage.process import is_gone, mark

BUFFER_BYTES = 1 << 20  # of a reader and of a writer
_NO_FILE = "is a folder, a device or a pipe, not a file"
_MAX_LINKED_FOLDERS = 100_000  # a few folders with links to each other have more paths than anyone can walk


class LocalStore(Store):
    """A folder. See Store for what the methods promise.

    Args:
        url: a path, or file:///path with percent escapes.
        strict_links: see above.
    """

    def __init__(self, url: str, *, strict_links: bool = False) -> None:
        super().__init__(url)
        self._strict_links = strict_links
        self._root = os.path.abspath(_path_of(url))  # so that a worker with another current folder means the same

    def _entries(self, folder: str) -> Iterable[Entry]:
        try:
            real_root = os.path.realpath(self._root)
            top = join(self._root, folder) if folder else self._root
            if self._strict_links and not _is_inside(os.path.realpath(top), real_root):
                return []
            return list(_scan(self._root, folder, real_root if self._strict_links else None))
        except NotADirectoryError as error:
            if not folder:
                raise StorageError(f"{self.url} is a file, or lies below one: give a folder") from error
            return []
        except OSError as error:
            where = self.url if error.filename in (None, self._root) else str(error.filename)  # a folder below it, perhaps
            raise translate(error, "list", where) from error

    def size(self, name: str) -> int:
        path = self._existing(name)
        try:
            status = os.stat(path)
        except OSError as error:
            raise self._failure(error, "look at", name) from error
        if not stat.S_ISREG(status.st_mode):
            raise NotFound(f"{self._show(name)} {_NO_FILE}")
        return status.st_size

    def _range(self, name: str, start: int, end: int) -> tuple[bytes, int]:
        descriptor, found = self._open(name)
        with _closing(descriptor), translating("read", self._show(name)):
            return _pread(descriptor, start, end) if end <= found else b"", found

    def map(self, name: str) -> memoryview:
        """The whole file, mapped: reading it costs no copy, and all processes share its pages.

        A file that is cut short while it is mapped ends the process with SIGBUS: replace data by renaming, as put() does.

        Args:
            name: relative to the root, '/'-separated.

        Raises:
            NotFound, StorageError: as read().
        """
        descriptor, size = self._open(name)
        with _closing(descriptor), translating("read", self._show(name)):
            return memoryview(mmap.mmap(descriptor, 0, prot=mmap.PROT_READ) if size else b"")  # mmap refuses to map nothing

    def open(self, name: str) -> io.BufferedReader:
        return io.BufferedReader(_File(*self._open(name), self._show(name)), BUFFER_BYTES)

    def write(self, name: str) -> Writer:
        self._refuse_links(TEMP_FOLDER, name)
        return LocalWriter(self._new(name), self._root, self._show(name))

    def delete(self, name: str) -> None:
        path = self._new(name)
        with translating("delete", self._show(name)), suppress(FileNotFoundError, NotADirectoryError):
            os.unlink(path)
        self._drop_empty_folder(os.path.dirname(path))

    def clean_temp(self, *, only_dead: bool = False) -> None:
        folder = join(self._root, TEMP_FOLDER)
        try:
            if only_dead:
                self._refuse_links(TEMP_FOLDER, TEMP_FOLDER)
                for name in filter(is_gone, os.listdir(folder)):
                    os.unlink(join(folder, name))
                self._drop_empty_folder(folder)
            else:
                shutil.rmtree(folder)
        except FileNotFoundError:
            pass
        except OSError as error:
            if error.errno != errno.ENOTEMPTY:  # somebody begins to write at this moment, and stays
                raise translate(error, "delete", self._show(TEMP_FOLDER)) from error

    def _drop_empty_folder(self, folder: str) -> None:
        """As on an object store, a folder below the root is there only for its files."""
        if folder != self._root:
            with suppress(OSError):  # another file is in it
                os.rmdir(folder)

    def _open(self, name: str) -> tuple[int, int]:
        """A descriptor of a regular file, and its size. Raises NotFound, StorageError."""
        path = self._existing(name)
        try:
            if stat.S_ISREG(os.stat(path).st_mode):
                descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
                status = os.fstat(descriptor)
                if stat.S_ISREG(status.st_mode):  # not a FIFO that was put in its place
                    os.set_blocking(descriptor, True)
                    return descriptor, status.st_size
                os.close(descriptor)
        except OSError as error:
            raise self._failure(error, "read", name) from error
        raise NotFound(f"{self._show(name)}: can't read, this {_NO_FILE}")

    def _failure(self, error: OSError, verb: str, name: str) -> StorageError:
        if isinstance(error, FileNotFoundError) and os.path.islink(path := join(self._root, name)):
            return NotFound(f"{self._show(name)}: can't {verb}, it is a symlink to {os.readlink(path)}, where nothing is")
        return translate(error, verb, self._show(name))

    def _existing(self, name: str) -> str:
        """The path to read from; with strict_links it is inside the root after all symlinks."""
        path = join(self._root, check_name(name, self.url))
        if not self._strict_links or not _has_link(self._root, name):  # rare; without one the text decides
            return path
        path = os.path.realpath(path)
        if _is_inside(path, os.path.realpath(self._root)):
            return path
        raise StorageError(
            f"{self._show(name)} is a symlink that leads out of its folder, to {path}: "
            "copy the file in, or open the folder that holds it"
        )

    def _new(self, name: str) -> str:
        """The path to write or delete; if that is a symlink, the link itself is meant."""
        self._refuse_links(check_name(name, self.url).rpartition("/")[0], name)
        return join(self._root, name)

    def _refuse_links(self, folder: str, name: str) -> None:
        if folder and _has_link(self._root, folder):
            raise StorageError(
                f"{self._show(name)}: {folder} is a symlink, or behind one: nothing is written or removed through a symlink"
            )


class LocalWriter(Writer):
    """A file being written under `.tmp/`. See Writer.

    Args:
        path: where it will be published; folders on the way are made then.
        root: the store's folder.
        show: the URL for messages.
    """

    def __init__(self, path: str, root: str, show: str) -> None:
        self._path, self._root, self._show = path, root, show
        self._temp = join(join(root, TEMP_FOLDER), f"{mark()}-{os.urandom(12).hex()}")
        with translating("write", show):
            self._raw = io.FileIO(_create(self._temp), "wb")
        self._file = io.BufferedWriter(self._raw, BUFFER_BYTES)

    def write(self, data: Buffer, /) -> int:
        try:  # a context manager would take as long as to write a document
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
        with suppress(OSError):  # the caller's exception is the one worth reading; clean_temp takes the rest
            self._raw.close()  # not through the buffer, which would try to write once more
            os.unlink(self._temp)
        self._drop_temp_folder()

    def _drop_temp_folder(self) -> None:
        with suppress(OSError):  # another writer's file is in it
            os.rmdir(join(self._root, TEMP_FOLDER))


class _File(io.FileIO):
    """A file opened for reading whose errors are ours. One of size 0 is empty: some of /proc's wait, or have no end."""

    def __init__(self, descriptor: int, size: int, show: str) -> None:
        super().__init__(descriptor, "rb")
        self._is_empty = not size
        self._show = show

    def readinto(self, buffer: Any, /) -> int | None:
        with translating("read", self._show):
            return 0 if self._is_empty else super().readinto(buffer)

    def readall(self) -> bytes:
        with translating("read", self._show):
            return b"" if self._is_empty else super().readall()


@contextmanager
def translating(verb: str, show: str) -> Iterator[None]:
    """While the operating system is asked for something: its errors are ours. See `translate`."""
    try:
        yield
    except StorageError:
        raise
    except OSError as error:
        raise translate(error, verb, show) from error


@contextmanager
def _closing(descriptor: int) -> Iterator[None]:
    try:
        yield
    finally:
        os.close(descriptor)


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


def _scan(root: str, start: str, real_root: str | None) -> Iterator[Entry]:
    """The files below the folder `start` of the root, in no order; with `real_root`, only those inside it after all symlinks."""
    folders = list(accumulate([root, *start.split("/")] if start else [root], join))
    try:
        above = tuple(_place(os.stat(folder)) for folder in folders)
    except FileNotFoundError:
        return
    todo = [(folders[-1], f"{start}/" if start else "", above)] if len({*above}) == len(above) else []
    num_linked = 0
    while todo:
        folder, at, above = todo.pop()
        with suppress(FileNotFoundError), os.scandir(folder) as entries:  # it may go while we look
            for entry in entries:
                name, is_link = at + entry.name, entry.is_symlink()
                try:
                    if is_link and real_root is not None:
                        target = os.path.realpath(entry.path)
                        if _is_inside(target, real_root) and os.path.isfile(target):
                            yield Entry(name, os.path.getsize(target))
                    elif not entry.is_dir():
                        yield Entry(name, entry.stat().st_size)
                    elif name != TEMP_FOLDER and (place := _place(entry.stat())) not in above:
                        todo.append((entry.path, name + "/", (*above, place)))
                        num_linked += is_link
                except OSError as error:
                    if error.errno not in (errno.ENOENT, errno.ELOOP):
                        raise
                    if is_link and real_root is None:
                        yield Entry(name, 0)  # a link to nothing; else deleted while we looked
        if num_linked > _MAX_LINKED_FOLDERS:
            raise StorageError(f"{root}: more than {_MAX_LINKED_FOLDERS} symlinks to folders: they lead to each other")


def _place(status: os.stat_result) -> tuple[int, int]:
    return status.st_dev, status.st_ino


def _has_link(root: str, relative: str) -> bool:
    """Whether the path below the root is a symlink or lies behind one."""
    path = root
    for segment in relative.split("/"):
        path = join(path, segment)
        if os.path.islink(path):
            return True
    return False


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
    with _closing(descriptor):
        try:
            os.fsync(descriptor)
        except OSError as error:
            if error.errno not in (errno.EINVAL, errno.ENOTSUP):
                raise
