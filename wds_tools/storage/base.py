"""What every backend shares: Store and Writer, of which each makes its own, the rules for names, and URLs that are safe to show.

Nothing here does I/O. check_name is the gate every name passes: relative, '/'-separated, no '..', no empty segment.
What it lets through can't leave the root by its text; local.py adds the check against symlinks.
"""

import io
import re
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from types import TracebackType
from typing import NamedTuple, Self
from urllib.parse import unquote

from wds_tools.errors import NotFound, StorageError, UsageError

_PARALLEL_DELETES = 16
TEMP_FOLDER = ".tmp"  # under a local root: files being written; hidden from list(), refused as a name

Buffer = bytes | bytearray | memoryview

_UNWRITABLE = re.compile(r"[\0-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")
_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://")
_USERINFO = re.compile(r"://[^/\s]*@")
_QUERY = re.compile(r"(://[^\s?\"']*)\?[^\s,)\"']+")


class Entry(NamedTuple):
    """One file of a listing.

    Attributes:
        name: relative to the store's root, '/'-separated.
        size: in bytes.
    """

    name: str
    size: int


class Writer:
    """A file being written; a context manager that publishes on a clean exit and leaves nothing visible otherwise."""

    _done = False

    def write(self, data: Buffer, /) -> int:
        """Append bytes.

        Args:
            data: the bytes.

        Returns:
            How many: always all of them.
        """
        raise NotImplementedError

    def close(self) -> None:
        """Publish under the name, atomically, replacing what was there. A second call does nothing."""
        if not self._done:
            self._done = True
            self._publish()

    def abort(self) -> None:
        """Give up: the name keeps what it had before. A second call, or one after close, does nothing."""
        if not self._done:
            self._done = True
            self._discard()

    def _publish(self) -> None:
        raise NotImplementedError

    def _discard(self) -> None:
        raise NotImplementedError

    def __enter__(self) -> Self:
        return self

    def __exit__(self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None) -> None:
        if exc_type is None:
            self.close()
        else:
            self.abort()


class Store(ABC):
    """Files under one root. Every method may raise StorageError, and UsageError for a name that is refused.

    Attributes:
        url: the root as it was given, without credentials; safe to print.
        first_bytes_s: seconds to the answers of the latest reads of ranges, where they are known.

    Args:
        url: the root.
    """

    first_bytes_s: Collection[float] = ()

    def __init__(self, url: str) -> None:
        self.url = redact(url)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.url!r})"

    def list(self, prefix: str = "") -> Iterator[Entry]:
        """All files below the root whose name starts with `prefix` (text, not a pattern), sorted by name.

        Args:
            prefix: such as "rejects/" or "shard-"; only the folder it names is walked.

        Returns:
            The entries, recursively; none if nothing is there. Files under `.tmp/` are not shown.
        """
        folder = prefix.rpartition("/")[0]
        if folder or prefix.startswith("/"):
            check_name(folder, self.url)
        found = sorted(self._entries(folder))
        return (entry for entry in found if entry.name.startswith(prefix)) if prefix else iter(found)

    @abstractmethod
    def _entries(self, folder: str) -> Iterable[Entry]:
        """All files below a folder, "" for the root, in any order."""

    @abstractmethod
    def size(self, name: str) -> int:
        """The size in bytes.

        Args:
            name: relative to the root, '/'-separated.

        Raises:
            NotFound: no such file.
        """

    def exists(self, name: str) -> bool:
        """Whether the file is there (and therefore complete).

        Args:
            name: relative to the root, '/'-separated.
        """
        try:
            self.size(name)
        except NotFound:
            return False
        return True

    def read(self, name: str) -> bytes:
        """The whole file.

        Args:
            name: relative to the root, '/'-separated.

        Raises:
            NotFound: no such file.
        """
        with self.open(name) as file:
            return file.read()

    def read_range(self, name: str, start: int, end: int, size: int | None = None) -> Buffer:
        """Exactly the bytes [start, end), not to be written to. On an object store from as many threads as you like.

        Args:
            name: the file.
            start: first byte, from 0.
            end: one past the last byte; end = start gives b"" and asks nobody.
            size: what the file should have in all; compared where the answer says it, which fsspec does not.

        Returns:
            end - start bytes.

        Raises:
            UsageError: not 0 <= start <= end.
            NotFound: no such file.
            StorageError: the file ends before `end`, or has another size; the message names both.
        """
        if not 0 <= start <= end:
            raise UsageError(f"bytes [{start}, {end}) of {name}: expected 0 <= start <= end")
        if start == end:
            check_name(name, self.url)
            return b""
        data, found = self._range(name, start, end)
        if len(data) != end - start:
            raise self._short(name, start, end, found)
        if found is not None and size not in (None, found):
            raise StorageError(f"{self._show(name)}: {found} bytes, expected {size}: it was cut off or replaced")
        return data

    @abstractmethod
    def _range(self, name: str, start: int, end: int) -> tuple[Buffer, int | None]:
        """These bytes, or fewer if the file ends before; and its size, or None where that would take another request."""

    @abstractmethod
    def open(self, name: str) -> io.BufferedReader:
        """A file to read from start to end in constant memory. Not seekable on every backend.

        Args:
            name: relative to the root, '/'-separated.

        Raises:
            NotFound: no such file; at once.
        """

    def put(self, name: str, data: Buffer) -> None:
        """Publish a file, atomically.

        Args:
            name: relative to the root, '/'-separated.
            data: its bytes.

        Raises:
            OutOfSpace: there is no room for it.
        """
        with self.write(name) as writer:
            writer.write(data)

    @abstractmethod
    def write(self, name: str) -> Writer:
        """A writer of a file, which appears under its name when that is closed.

        Args:
            name: relative to the root, '/'-separated.

        Raises:
            OutOfSpace: there is no room; so do the writer's methods.
        """

    @abstractmethod
    def delete(self, name: str) -> None:
        """Remove the file; nothing happens if there is none.

        Args:
            name: relative to the root, '/'-separated.
        """

    def delete_all(self, names: Iterable[str]) -> None:
        """Remove files, several at a time and in any order.

        Args:
            names: relative to the root, '/'-separated.
        """
        with ThreadPoolExecutor(_PARALLEL_DELETES) as pool:
            for _ in pool.map(self.delete, names):
                pass

    def clean_temp(self, *, only_dead: bool = False) -> None:  # noqa: B027
        """Remove what killed local writers left under `.tmp/`. Call it while nobody writes here: theirs would go too.

        Args:
            only_dead: while others write here: only what is of processes of this machine that have ended.

        Elsewhere it does nothing. The parts of an unfinished multipart upload are invisible but may be billed: give the
        bucket a lifecycle rule that aborts incomplete uploads after a day.
        """

    def _show(self, name: str) -> str:
        """A file of this store for messages; "" is the root."""
        return join(self.url, name) if name else self.url

    def _short(self, name: str, start: int, end: int, size: int | None) -> StorageError:
        return StorageError(
            f"{self._show(name)}: wanted bytes [{start}, {end}), the file ends at {size}: "
            "it was truncated or replaced, or its index is of another file"
        )


def check_writable(text: str) -> None:
    """Refuse what no path or name may hold, since both are written into JSON and into lines.

    Raises:
        UsageError: there is a control character (a newline too) in it, or what stands for bytes that are not UTF-8.
    """
    if _UNWRITABLE.search(text):
        raise UsageError(
            f"{redact(text)!r} has a control character, or bytes that are not UTF-8, and could not be written down in a manifest "
            "or a message: rename it, or name it by a symlink"
        )


def check_name(name: str, url: str) -> str:
    """Refuse a name that isn't a plain relative path.

    Args:
        name: from a manifest or a caller.
        url: the store's, for the message.

    Returns:
        The name.

    Raises:
        UsageError: empty, absolute, with an empty, '.' or '..' segment, a backslash or what check_writable refuses; in `.tmp/`.
    """
    segments = name.split("/")
    if any(segment in ("", ".", "..") for segment in segments):
        problem = "is not a plain relative path (a/b.tar)"
    elif "\\" in name or _UNWRITABLE.search(name):
        problem = "has a backslash, a control character, or bytes that are not UTF-8"
    elif segments[0] == TEMP_FOLDER:
        problem = f"lies in {TEMP_FOLDER}/, which is for files being written"
    else:
        return name
    raise UsageError(f"the name {name!r} in {redact(url)} {problem}")


def split_scheme(url: str) -> tuple[str, str]:
    """`s3://b/x` -> ("s3", "b/x"); a plain path -> ("", path). The scheme is in lower case."""
    match = _SCHEME.match(url)
    return (match[1].lower(), url[match.end() :]) if match else ("", url)


def redact(text: str) -> str:
    """The text with the credentials of any URL in it taken out: `user:key@` and everything from `?` on.

    Args:
        text: with or without URLs.
    """
    return _QUERY.sub(r"\1", _USERINFO.sub("://", text)) if "://" in text else text


def cause(error: BaseException) -> BaseException:
    """A foreign error as the cause of ours, or a stand-in if its message shows credentials (a signed URL)."""
    text = str(error)
    return error if redact(text) == text else RuntimeError(redact(text))


def join(url: str, name: str) -> str:
    """The URL (or path) of `name` under the root `url`, for messages and for other libraries.

    Args:
        url: a root as open_store takes it.
        name: relative to it.

    Returns:
        `url` and `name` with exactly one slash between them.
    """
    return url + name if url.endswith("/") else f"{url}/{name}"


def split_url(url: str) -> tuple[str, str]:
    """Cut the URL of one file into its folder and its name: open_store takes the first, the store's methods the second.

    Args:
        url: `s3://bucket/set/a.tar`, `set/a.tar`, `a.tar`.

    Returns:
        Root and name: ("s3://bucket/set", "a.tar"), ("set", "a.tar"), (".", "a.tar").

    Raises:
        UsageError: there is no file name in it (`s3://bucket`, `set/`).
    """
    scheme, rest = split_scheme(url)
    folder, slash, name = rest.rpartition("/")
    host_is_root = scheme not in ("", "file", "memory")
    if not name or (host_is_root and not folder):
        raise UsageError(f"{redact(url)} names no file: expected something like folder/file.tar or s3://bucket/file.tar")
    if scheme:
        if scheme in ("http", "https"):  # as the root is, where that is opened
            name = unquote(name)
        return f"{scheme}://{folder}{'/' if slash and not folder else ''}", name
    return folder or ("/" if slash else "."), name
