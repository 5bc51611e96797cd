"""Bytes in and out of paths and URLs; nothing else in the project names a backend.

    open_store(url) -> Store        root folder or prefix; Store speaks names relative to it
      plain path, file://           local.py    os: temp file, fsync, rename
      s3:// gs:// az:// http(s)://  objects.py  obstore: one PUT or one multipart upload is the atom
      memory://                     objects.py  one store for the whole process, for tests
      anything else (hf:// ...)     fsspec.py   whatever fsspec knows; as atomic as that backend's upload

Invariant: a name that exists is complete. Names come from manifests, which nobody vouches for, so one that would lead
outside the root is refused before any backend sees it. Opening a store costs nothing: the client is made at the first
use, once per process, so stores can be pickled and used after a fork.
"""

from wds_tools.errors import UsageError
from wds_tools.storage.base import Entry, Store, Writer, check_writable, join, redact, split_scheme, split_url
from wds_tools.storage.fsspec import FsspecStore
from wds_tools.storage.local import LocalStore
from wds_tools.storage.objects import SCHEMES, ObjectStore

__all__ = ["Entry", "LocalStore", "Store", "Writer", "join", "open_store", "redact", "split_url"]


def open_store(url: str, *, strict_links: bool = False) -> Store:
    """Make the store of a folder or prefix. Touches neither disk nor network; nothing need exist there yet.

    Args:
        url: a path (`data/set`), or a URL (`file:///data/set`, `s3://bucket/set`, `gs://bucket/set`, `az://container/set`,
            `https://host/set`, `memory://set`, `hf://datasets/owner/name`). Credentials and endpoints come from the
            cloud's own environment variables (AWS_ACCESS_KEY_ID, AWS_ENDPOINT_URL, GOOGLE_APPLICATION_CREDENTIALS,
            AZURE_STORAGE_ACCOUNT_NAME, ...).
        strict_links: of a folder, refuse symlinks that lead out of it; see local.py.

    Returns:
        A store rooted there: picklable, usable from many threads and after a fork.

    Raises:
        UsageError: the URL names no root (empty, `s3://` without a bucket), carries a query or a bucket's key, begins with `~`,
            or could not be written down: a control character (a newline) or bytes that are not UTF-8.
    """
    if not url:
        raise UsageError("'' is not a path or URL: give a folder, or scheme://bucket/prefix")
    check_writable(url)
    if url.partition("/")[0] == "~":
        raise UsageError(f"{url}: ~ is your home folder in a shell only: in Python write os.path.expanduser({url!r})")
    scheme = split_scheme(url)[0]
    if scheme in ("", "file"):
        return LocalStore(url, strict_links=strict_links)
    if scheme in SCHEMES:
        return ObjectStore(url)
    return FsspecStore(url)
