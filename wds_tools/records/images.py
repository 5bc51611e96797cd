"""Image paths in a file of records -> the images' bytes.

One file that can't be read is a reject, wherever it lies on this machine; a storage that does not answer is an error.
"""

from __future__ import annotations

import errno
import os
import posixpath
from typing import NamedTuple

from wds_tools.errors import NotFound, Reject, StorageError, UsageError
from wds_tools.storage import LocalStore, Store, open_store, split_url

_NO_SUCH_NAME = (errno.ENAMETOOLONG, errno.ELOOP)
_SHORTAGES = (errno.EMFILE, errno.ENFILE, errno.ENOMEM)
_MOUNT_IS_GONE = (errno.ENOTCONN, errno.ESTALE, errno.ETIMEDOUT, errno.EHOSTDOWN, errno.EHOSTUNREACH, errno.ECONNRESET)


class ImageFile(NamedTuple):
    """An image that a source found itself, beside its record: read where it lies, whatever --image-root says."""

    url: str
    """Path or URL."""


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
        on_disk = isinstance(self._store, LocalStore)
        try:
            with self._store.open(self._name(image_path)) as stream:
                return stream.read(max_bytes + 1)
        except NotFound as error:
            what = "no such file" if error.__cause__ or not on_disk else "a folder, a device or a pipe, not a file"
            raise Reject("missing_image", f"{image_path[:300]}: {what}") from error
        except UsageError as error:
            raise Reject("outside_root", f"{image_path[:300]}: not a path inside {self._folder}") from error
        except StorageError as error:
            if self._leads_out(image_path):
                raise Reject("outside_root", f"{image_path[:300]}: a symlink that leads out of {self._folder}") from error
            cause = error.__cause__
            if not on_disk or not isinstance(cause, OSError) or cause.errno in (*_SHORTAGES, *_MOUNT_IS_GONE):
                raise
            reason = "missing_image" if cause.errno in _NO_SUCH_NAME else "unreadable_image"
            raise Reject(reason, f"{image_path[:300]}: {cause.strerror}") from error

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
