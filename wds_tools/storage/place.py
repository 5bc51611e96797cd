"""Whether two spellings of a root are one place, so that a pass does not remove its own input, or read its own output."""

import os
from urllib.parse import unquote

from wds_tools.storage.base import split_scheme


def same_place(url: str, other: str) -> bool:
    """Whether two roots, as open_store takes them, are the same; on disk, symlinks are followed."""
    return _place(url) == _place(other)


def below(url: str, other: str) -> str | None:
    """How names below the root `url` begin that are of the root `other`, if that lies below it: "sets/out/"; else None."""
    place, root = _place(url).rstrip("/") + "/", _place(other) + "/"
    return root.removeprefix(place) if root.startswith(place) and root != place else None


def _place(url: str) -> str:
    scheme, path = split_scheme(url)
    return f"{scheme}://{path.rstrip('/')}" if scheme not in ("", "file") else os.path.realpath(unquote(path) if scheme else path)
