"""Where roots lie, in whatever way they are spelled, so that nothing is written into what is being read."""

import os
from collections.abc import Sequence
from urllib.parse import unquote

from wds_tools.errors import UsageError
from wds_tools.storage.base import redact, split_scheme
from wds_tools.storage.objects import SCHEMES


def check_apart(inputs: str | Sequence[str], output: str, *, option: str = "--output") -> None:
    """Hold that an output is none of the inputs of its command, and lies in none. On a disk, symlinks are followed.

    Args:
        inputs: files or folders, as open_store takes them.
        output: the same.
        option: what names it.

    Raises:
        UsageError: it is or does.
    """
    place = place_of(output)
    for url in (inputs,) if isinstance(inputs, str) else inputs:
        if f"{place}/".startswith(f"{place_of(url)}/"):
            how = "is the input" if place == place_of(url) else "lies in the input"
            raise UsageError(f"{option} {redact(output)} {how} {redact(url)}: choose a place of its own")


def place_of(url: str) -> str:
    """The place of a root: equal for two that are the same, however they are spelled."""
    scheme, path = split_scheme(url)
    if scheme in ("", "file"):
        path = unquote(path) if scheme else path
        return path if "\0" in path else os.path.realpath(path).rstrip("/")  # such a name is refused where it is opened
    return f"{SCHEMES.get(scheme, scheme)}://{path.rstrip('/')}"
