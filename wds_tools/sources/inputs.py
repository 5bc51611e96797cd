"""What a user names -> the files that are read.

What lies in an input folder is taken, or counted and named: on standard error, in the manifest, and in the summary.
"""

from __future__ import annotations

import os
import posixpath
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from braceexpand import braceexpand

from wds_tools.dataset.layout import IS_REJECTS_FILE
from wds_tools.errors import NotFound, StorageError, UsageError
from wds_tools.sources.record import InputFile
from wds_tools.storage import join, open_store, split_url
from wds_tools.storage.base import split_scheme
from wds_tools.terminal import say

_NAMED_FILES = 8
_NO_DATA = ("state.json", "dataset_info.json")
"""Of save_to_disk, beside the data."""

Choice = Callable[[str, Mapping[str, int]], Sequence[str]]
"""URL of a folder, and the names and sizes of the files below it -> the names of those that are inputs."""


class Inputs(NamedTuple):
    """The files of a conversion, and the URLs of what lies in its folders and is left out."""

    files: list[InputFile]
    left_out: list[str]

    def describe(self, kinds: Iterable[str]) -> str:
        """One line: what is read, files of these kinds."""
        names = ", ".join(dict.fromkeys(kinds)) or "empty"
        left_out = f"; {len(self.left_out):,} files are left out" if self.left_out else ""
        num_bytes = sum(file.size for file in self.files)
        size = f"{num_bytes / 1e6:,.1f} MB" if num_bytes >= 1e6 else f"{num_bytes:,} bytes"
        return f"{len(self.files):,} {'file' if len(self.files) == 1 else 'files'} ({names}), {size}{left_out}"

    @property
    def source(self) -> dict[str, Any]:
        """For the manifest."""
        record: dict[str, Any] = {"inputs": [{"url": file.url, "bytes": file.size} for file in self.files]}
        if self.left_out:
            one_of_each: dict[str, str] = {}
            for url in self.left_out:
                one_of_each.setdefault(posixpath.splitext(url)[1].lower(), url)
            names = ", ".join(list(one_of_each.values())[:_NAMED_FILES]).encode(errors="replace").decode()
            record["left_out"] = {"files": len(self.left_out), "such_as": names}
        return record


def by_suffix(*suffixes: str) -> Choice:
    """Files whose names end so, in upper or lower case."""

    def choose(url: str, sizes: Mapping[str, int]) -> Sequence[str]:
        names = [name for name in sizes if name.lower().endswith(suffixes) and not IS_REJECTS_FILE.search(name)]
        if not names:
            others = f"; there are {len(sizes)} other files, such as {min(sizes)}" if sizes else ""
            raise NotFound(f"{url}: no such file, and no *{' or *'.join(suffixes)} under a folder of that name{others}")
        return names

    return choose


def expand_inputs(patterns: Sequence[str], choose: Choice, *, strict_links: bool = False) -> Inputs:
    """The files that are meant; says on standard error what is left out.

    Args:
        patterns: files, folders (of which `choose` takes what it wants) and brace patterns, as part-{000..127}.jsonl.
        choose: such as `by_suffix(".jsonl")`.
        strict_links: follow no symlink that leads out of a folder.

    Raises:
        UsageError: no inputs, or a broken pattern.
        NotFound: something does not exist, or a folder has no such file.
    """
    inputs = Inputs([], [])
    for pattern in patterns:
        for url in _expand_braces(pattern):
            _add_files(inputs, url, choose, strict_links)
    if not inputs.files:
        raise UsageError("no input: pass --input with files or folders")
    if inputs.left_out:
        left_out = inputs.source["left_out"]
        what = f"{left_out['files']:,} files of the input folders are not read as records, such as {left_out['such_as']}"
        say(f"wds-tools: {what}", error=True)
    return inputs


def _expand_braces(pattern: str) -> list[str]:
    if os.path.lexists(pattern):
        return [pattern]
    try:
        return list(braceexpand(pattern, escape=False))
    except ValueError as error:
        raise UsageError(f"--input {pattern!r}: unbalanced braces") from error


def _add_files(inputs: Inputs, url: str, choose: Choice, strict_links: bool) -> None:
    try:
        root, name = split_url(url)
        inputs.files.append(InputFile(url, open_store(root).size(name)))
        return
    except (UsageError, StorageError):
        if split_scheme(url)[0] in ("http", "https"):
            raise  # there are no folders
        # a bucket, or a folder: what is wrong with it shows when it is listed
    sizes = dict(open_store(url).list())
    allowed = {name for name, _ in open_store(url, strict_links=True).list()} if strict_links else sizes.keys()
    chosen = choose(url, {name: size for name, size in sizes.items() if name in allowed})
    for name in chosen:
        inputs.files.append(InputFile(join(url, name), sizes[name] or open_store(url).size(name)))  # raises for a link to nothing
    left_out = sorted(sizes.keys() - set(chosen))
    inputs.left_out.extend(join(url, name) for name in left_out if posixpath.basename(name) not in _NO_DATA)
