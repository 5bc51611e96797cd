"""Whatever obstore doesn't speak (hf://, abfs://, ftp://, ...), through fsspec and the package of that protocol.

A writer spools to a temporary file and uploads it when closed, since not every fsspec backend can take back a file it
has begun: it needs local disk for one file. Whatever is asked of a backend is asked in a thread of its own (_ask), which is left
alone after WDS_TOOLS_RETRY_S seconds and the time that its bytes have at WDS_TOOLS_LEAST_BYTES_PER_S, since few backends have a
limit, and fsspec none. The publish is as atomic as the backend's upload: one commit on the Hugging
Face hub, one object on a cloud; on a plain file protocol (sftp, smb) a reader may catch the file half there.
"""

# A backend may raise anything; all of it becomes ours:
# ruff: noqa: BLE001
import importlib
import io
import os
import tempfile
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import Future, wait
from contextlib import suppress
from typing import Any, TypeVar

from wds_tools.errors import MissingPackage, NotFound, StorageError, UsageError
from wds_tools.storage.base import TEMP_FOLDER, Buffer, Entry, Store, Writer, cause, check_name, join, redact, split_scheme
from wds_tools.storage.local import translate, translating
from wds_tools.storage.remote import client
from wds_tools.storage.remote.meanings import translated
from wds_tools.storage.remote.waits import waiting

Answer = TypeVar("Answer")
BLOCK_BYTES = 8 << 20  # what a reader fetches at once
_PACKAGES = {
    "hf": "huggingface_hub",
    "abfs": "adlfs",
    "abfss": "adlfs",
    "sftp": "paramiko",
    "ssh": "paramiko",
    "smb": "smbprotocol",
}


class FsspecStore(Store):
    """A folder of an fsspec file system. See Store for what the methods promise.

    Args:
        url: protocol://path; the protocol is one that fsspec knows.
    """

    def __init__(self, url: str) -> None:
        super().__init__(url)
        self._raw = url
        self._fs: Any = None
        self._root = ""
        self._pid = 0

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_fs": None, "_root": "", "_pid": 0}

    def _entries(self, folder: str) -> Iterable[Entry]:
        fs = self._connect()
        fs.invalidate_cache()
        top = join(self._root, folder) if folder else self._root

        def walk() -> Iterable[Any]:
            files, folders = [], [top]
            for at in folders:  # its own find and walk leave out folders that can't be listed
                for info in fs.ls(at, detail=True):
                    if info["type"] != "directory":
                        files.append(info)
                    elif info["name"].rstrip("/") != at.rstrip("/"):
                        folders.append(info["name"])
            return files

        try:
            files = self._ask("list", folder, walk)
        except NotFound:
            return []
        skip = len(self._root.rstrip("/")) + 1
        entries = (Entry(info["name"][skip:], int(info["size"])) for info in files)
        return (entry for entry in entries if not entry.name.startswith(TEMP_FOLDER + "/"))

    def size(self, name: str) -> int:
        path, fs = self._path(name), self._connect()
        fs.invalidate_cache()
        info = self._ask("look at", name, lambda: fs.info(path))
        if info["type"] != "file":
            raise NotFound(f"{self._show(name)}: can't look at it, no file is there")
        return int(info["size"])

    def _range(self, name: str, start: int, end: int) -> tuple[bytes, int | None]:
        path, fs = self._path(name), self._connect()
        # hf:// reads 5 MB more than is asked for, unless told not to, and asks for the size, unless it is told one
        exactly = {"cache_type": "none", "size": end} if split_scheme(self._raw)[0] == "hf" else {}

        def read(begin: int) -> bytes:
            last = min(begin + BLOCK_BYTES, end)  # some backends set all the memory aside before they look
            return self._ask("read", name, lambda: bytes(fs.cat_file(path, start=begin, end=last, **exactly)), last - begin)

        parts = []
        for begin in range(start, end, BLOCK_BYTES):
            parts.append(read(begin))
            if len(parts[-1]) < min(BLOCK_BYTES, end - begin):
                return b"".join(parts), self.size(name)
        return b"".join(parts), None

    def open(self, name: str) -> io.BufferedReader:
        path, fs = self._path(name), self._connect()
        file = self._ask("read", name, lambda: fs.open(path, "rb", block_size=BLOCK_BYTES, cache_type="readahead"))
        return io.BufferedReader(_Reader(self, name, file), 1 << 20)

    def write(self, name: str) -> Writer:
        self._path(name)
        return FsspecWriter(self, name)

    def delete(self, name: str) -> None:
        path, fs = self._path(name), self._connect()
        with suppress(NotFound):
            self._ask("delete", name, lambda: fs.rm_file(path))

    def _path(self, name: str) -> str:
        check_name(name, self.url)
        self._connect()
        return join(self._root, name) if self._root else name

    def _connect(self) -> Any:
        if self._pid == os.getpid():
            return self._fs
        core = importlib.import_module("fsspec.core")
        scheme = split_scheme(self._raw)[0]
        try:
            self._fs, self._root = self._ask("open", "", lambda: core.url_to_fs(self._raw))
        except ImportError as error:
            package = _PACKAGES.get(scheme, "")
            fix = f"pip install {package}" if package else _one_line(error)
            raise MissingPackage(f"{self.url}: {scheme}:// needs a package that isn't here: {fix}") from cause(error)
        except ValueError as error:
            raise UsageError(f"{self.url}: {scheme}:// is no protocol that fsspec knows: {_one_line(error)}") from cause(error)
        self._pid = os.getpid()
        return self._fs

    def _ask(self, verb: str, name: str, call: Callable[[], Answer], num_bytes: int = 0) -> Answer:
        """What call() gives, in time; its errors are ours, but for those that say that a package or a protocol is missing."""
        show = self._show(name)
        limit_s = (client.retry_s() or 60) + num_bytes / (client.least_bytes_per_s() or 1)
        answer: Future[Answer] = Future()

        def work() -> None:
            try:
                answer.set_result(call())
            except BaseException as error:
                answer.set_exception(error)

        with waiting(f"{verb} {show}", "/".join(self.url.split("/")[:3]), limit_s, num_bytes):
            threading.Thread(target=work, name="wds-fsspec", daemon=True).start()  # no pool's, which Python would wait for
            wait([answer], limit_s)
        if not answer.done():
            limits = f"{client.RETRY_VARIABLE}={client.retry_s():g}"
            limits += f" and {num_bytes} bytes at {client.LEAST_VARIABLE}={client.least_bytes_per_s():g}" if num_bytes else ""
            raise StorageError(f"{show}: can't {verb}, no answer in {limit_s:.1f} s of trying ({limits}): check the network")
        error = answer.exception()
        if not isinstance(error, Exception) or (verb == "open" and isinstance(error, ImportError | ValueError)):
            return answer.result()
        raise self._translate(error, verb, name) from cause(error)

    def _translate(self, error: Exception, verb: str, name: str) -> StorageError:
        show = self._show(name)
        scheme, rest = split_scheme(self.url)
        if verb == "list" and isinstance(error, OSError) and error.errno is not None and error.filename:
            return translate(error, verb, redact(str(error.filename)))  # a folder below that can't be listed
        if ours := translated(error, show, verb, scheme, rest.partition("/")[0]):
            return ours
        if isinstance(error, OSError) and (error.errno is not None or isinstance(error, FileNotFoundError | StorageError)):
            return translate(error, verb, show)
        return StorageError(f"{show}: can't {verb}: {type(error).__name__}: {_one_line(error)}")


class FsspecWriter(Writer):
    """A file being spooled to a local temporary file. See Writer.

    Args:
        store: where to.
        name: relative to the store.
    """

    def __init__(self, store: FsspecStore, name: str) -> None:
        self._store, self._name = store, name
        with translating("spool", store._show(name)):
            self._file = tempfile.NamedTemporaryFile(prefix="wds-tools-")  # noqa: SIM115 - closed by close or abort

    def write(self, data: Buffer, /) -> int:
        with translating(f"spool to {tempfile.gettempdir()}", self._store._show(self._name)):
            return self._file.write(data)

    def _publish(self) -> None:
        path, ask = self._store._path(self._name), self._store._ask
        try:
            with translating("spool", self._store._show(self._name)):
                self._file.flush()
                fs, size = self._store._connect(), self._file.tell()
                ask("write", self._name, lambda: fs.makedirs(path.rpartition("/")[0], exist_ok=True))
                ask("write", self._name, lambda: fs.put_file(self._file.name, path), size)
        finally:
            self._discard()

    def _discard(self) -> None:
        with suppress(OSError):
            self._file.close()


class _Reader(io.RawIOBase):
    """An fsspec file whose errors are ours."""

    def __init__(self, store: FsspecStore, name: str, file: Any) -> None:
        self._store, self._name, self._file = store, name, file

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any, /) -> int:
        data = self._store._ask("read", self._name, lambda: self._file.read(len(buffer)), max(len(buffer), BLOCK_BYTES))
        buffer[: len(data)] = data
        return len(data)

    def readall(self) -> bytes:
        return b"".join(
            iter(lambda: self._store._ask("read", self._name, lambda: self._file.read(BLOCK_BYTES), BLOCK_BYTES), b"")
        )

    def close(self) -> None:
        if not self.closed:
            self._file.close()
        super().close()


def _one_line(error: BaseException) -> str:
    return redact(" ".join(str(error).split()))[:300]
