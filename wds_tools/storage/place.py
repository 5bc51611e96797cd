"""Whether two spellings of a root are one place, so that a pass does not remove its own input."""

import os
from urllib.parse import unquote

from wds_tools.storage.base import split_scheme


def same_place(url: str, other: str) -> bool:
    """Whether two roots, as open_store takes them, are the same; on disk, symlinks are followed."""
    return _place(url) == _place(other)


def _place(url: str) -> str:
    scheme, path = split_scheme(url)
    return f"{scheme}://{path.rstrip('/')}" if scheme not in ("", "file") else os.path.realpath(unquote(path) if scheme else path)
