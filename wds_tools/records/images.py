"""What a record has for an image -> the image's bytes: a path, a data URI, base64, the bytes, or Hugging Face's struct.

One file that can't be read is a reject, wherever it lies on this machine; a storage that does not answer is an error.
"""

from __future__ import annotations

import binascii
import errno
import os
import posixpath
import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from wds_tools.errors import NotFound, Reject, StorageError, UsageError
from wds_tools.storage import LocalStore, Store, open_store, split_url

_NO_SUCH_NAME = (errno.ENAMETOOLONG, errno.ELOOP)
_SHORTAGES = (errno.EMFILE, errno.ENFILE, errno.ENOMEM)
_MOUNT_IS_GONE = (errno.ENOTCONN, errno.ESTALE, errno.ETIMEDOUT, errno.EHOSTDOWN, errno.EHOSTUNREACH, errno.ECONNRESET)
_BASE64 = re.compile(r"(/9j/|iVBORw0KGgo|R0lGOD|UklGR)[A-Za-z0-9+/\s]{100,}={0,2}\s*")
"""An image in base64, by how JPEG, PNG, GIF and RIFF begin. No path is as long without a dot."""


class ImageFile(NamedTuple):
    """An image that a source found itself, beside its record: read where it lies, whatever --image-root says."""

    url: str
    """Path or URL."""


def is_base64(text: str) -> bool:
    """Whether a text is the base64 of an image, without a data URI's head."""
    return bool(_BASE64.fullmatch(text))


def read_image(value: Any, max_bytes: int, read_file: Callable[[str, int], bytes]) -> bytes:
    """The bytes of an image, one more than max_bytes at most where they are read from a file.

    Args:
        value: a path, a data URI, base64, bytes, an ImageFile, or {"bytes", "path"}, of which the bytes count if there are any.
        max_bytes: of the image.
        read_file: (path, max_bytes) -> bytes, for paths.

    Raises:
        Reject: "wrong_type", "empty_text"; "too_many_bytes", "corrupt_image", "unsupported_format" (data URIs); see ImageSource.
    """
    if isinstance(value, bytes):
        return value
    if isinstance(value, ImageFile):
        root, name = split_url(value.url)
        return _read_file(open_store(root), name, value.url, max_bytes)
    if isinstance(value, Mapping):
        for inner in (value.get("bytes"), value.get("path")):
            if inner is not None and not isinstance(inner, Mapping):
                return read_image(inner, max_bytes, read_file)
        names = ", ".join(map(str, list(value)[:8]))[:200]
        raise Reject("wrong_type", f"an image is an object of {names or 'nothing'}, expected bytes or path in it")
    if not isinstance(value, str):
        raise Reject("wrong_type", f"an image is a {type(value).__name__}, expected a path, a data URI, bytes or {{bytes, path}}")
    if not value or value.isspace():
        raise Reject("empty_text", "the path of an image is empty")
    if value[:5].lower() == "data:":
        return _data_of_uri(value, max_bytes)
    return _decoded(value, 0, max_bytes) if is_base64(value) else read_file(value, max_bytes)


def _read_file(store: Store, name: str, path: str, max_bytes: int) -> bytes:
    """The bytes of a file, which a record calls `path`. Raises as ImageSource.read."""
    on_disk = isinstance(store, LocalStore)
    try:
        with store.open(name) as stream:
            return stream.read(max_bytes + 1)
    except NotFound as error:
        what = "no such file" if error.__cause__ or not on_disk else "a folder, a device or a pipe, not a file"
        raise Reject("missing_image", f"{path[:300]}: {what}") from error
    except UsageError as error:
        raise Reject("outside_root", f"{path[:300]}: not a path inside {store.url}") from error
    except StorageError as error:
        cause = error.__cause__
        if not on_disk or not isinstance(cause, OSError) or cause.errno in (*_SHORTAGES, *_MOUNT_IS_GONE):
            raise
        reason = "missing_image" if cause.errno in _NO_SUCH_NAME else "unreadable_image"
        raise Reject(reason, f"{path[:300]}: {cause.strerror}") from error


def _data_of_uri(uri: str, max_bytes: int) -> bytes:
    """The bytes in data:image/png;base64,... . Raises Reject."""
    head, comma, _ = uri[:300].partition(",")
    if not comma or not head.lower().endswith(";base64"):
        raise Reject("unsupported_format", f"the data URI {uri[:60]!r} is not in base64")
    return _decoded(uri, len(head) + 1, max_bytes)


def _decoded(text: str, begin: int, max_bytes: int) -> bytes:
    """The bytes of the base64 behind `begin`, which may be in lines. Raises Reject."""
    if (num_characters := len(text) - begin) // 4 * 3 > max_bytes + 2:
        raise Reject(
            "too_many_bytes", f"an image of {num_characters:,} base64 characters, at most {max_bytes:,} bytes are allowed"
        )
    try:
        return binascii.a2b_base64("".join(text[begin:].split()), strict_mode=True)
    except ValueError as error:
        raise Reject("corrupt_image", f"the base64 of {text[:60]!r} is broken: {error}") from error


class ImageSource:
    """Finds the image of a path in a file of records. Fenced, no path leads out of one folder; with strict links, no link either.

    Args:
        file_url: the file of records.
        image_root: what fences; without it, and on a disk, paths begin at the file's folder, and may leave it.
        strict_links: see wds_tools.storage.local.
    """

    def __init__(self, file_url: str, image_root: str | None, strict_links: bool = False) -> None:
        self._folder = split_url(file_url)[0] if image_root is None else image_root
        self._is_local = "://" not in self._folder
        self._is_fenced = image_root is not None or not self._is_local
        self._roots = [self._folder]
        if self._is_local:
            self._folder = os.path.realpath(self._folder)
            self._roots = [os.path.abspath(self._roots[0]), self._folder]  # noqa: PTH100  as it is named, and as it is
        self._store: Store = open_store(self._folder if self._is_fenced else "/", strict_links=strict_links)

    def read(self, image_path: str, max_bytes: int) -> bytes:
        """The image's bytes, one more than max_bytes at most.

        Raises:
            Reject: "missing_image", "outside_root" or "unreadable_image".
            StorageError: the storage does not answer; not the record's fault.
        """
        try:
            return _read_file(self._store, self._name(image_path), image_path, max_bytes)
        except StorageError as error:
            if self._leads_out(image_path):
                raise Reject("outside_root", f"{image_path[:300]}: a symlink that leads out of {self._folder}") from error
            raise

    def _name(self, image_path: str) -> str:
        path = image_path
        for root in self._roots:
            path = path.removeprefix(root.rstrip("/") + "/")
        if "://" in path:
            raise Reject("outside_root", f"{image_path[:300]}: not below {self._folder}; a URL is read only below --image-root")
        if not self._is_fenced:
            return posixpath.normpath(posixpath.join(self._folder, path)).lstrip("/")
        return posixpath.normpath(path)

    def _leads_out(self, image_path: str) -> bool:
        if not (self._is_fenced and self._is_local):
            return False
        path = os.path.realpath(posixpath.join(self._folder, self._name(image_path)))
        return not path.startswith(self._folder.rstrip("/") + "/")
