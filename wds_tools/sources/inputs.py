"""What a user names -> the files that are read.

What lies in an input folder is taken, or counted and named: on standard error, in the manifest, and in the summary.
"""

from __future__ import annotations

import os
import posixpath
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from braceexpand import braceexpand

from wds_tools.dataset.layout import IS_REJECTS_FILE
from wds_tools.errors import NotFound, StorageError, UsageError
from wds_tools.sources.detect import is_candidate
from wds_tools.sources.folders import companions, named_by_records, pictures_of
from wds_tools.sources.record import InputFile
from wds_tools.storage import join, open_store, split_url
from wds_tools.storage.base import check_writable, split_scheme
from wds_tools.terminal import counted, say, sized

_NAMED_FILES = 8
_STARS = re.compile(r"[*?]")
_REMARKS = {
    "left_out": ("file of the input folders is not read as a record", "files of the input folders are not read as records"),
    "named_twice": ("input is named twice, and read once", "inputs are named twice, and read once"),
}
_NO_DATA = ("state.json", "dataset_info.json")
"""Of save_to_disk, beside the data."""
_EXPORT = "export.json"
_OF_EXPORT = (_EXPORT, "README.md")
"""What `export` writes beside the data, if the first is there."""

Choice = Callable[[str, Mapping[str, int]], Sequence[str]]
"""URL of a folder, and the names and sizes of the files below it -> the names of those that are inputs."""


class Inputs(NamedTuple):
    """The files of a conversion, the URLs of what lies in its folders and is left out, and of what was named twice."""

    files: list[InputFile]
    left_out: list[str]
    named_twice: list[str]

    def describe(self, kinds: Iterable[str]) -> str:
        """One line: what is read, files of these kinds."""
        names = ", ".join(dict.fromkeys(kinds)) or "empty"
        left_out = f"; {counted(len(self.left_out), 'file is', 'files are')} left out" if self.left_out else ""
        size = sized(sum(file.size for file in self.files))
        return f"{counted(len(self.files), 'file')} ({names}), {size}{left_out}"

    @property
    def source(self) -> dict[str, Any]:
        """For the manifest."""
        record: dict[str, Any] = {"inputs": [{"url": file.url, "bytes": file.size} for file in self.files]}
        for name, urls in {"left_out": self.left_out, "named_twice": self.named_twice}.items():
            if urls:
                one_of_each: dict[str, str] = {}
                for url in urls:
                    one_of_each.setdefault(posixpath.splitext(url)[1].lower(), url)
                names = ", ".join(list(one_of_each.values())[:_NAMED_FILES]).encode(errors="replace").decode()
                record[name] = {"files": len(urls), "such_as": names}
        return record


def by_suffix(*suffixes: str) -> Choice:
    """Files whose names end so, in upper or lower case."""

    def choose(url: str, sizes: Mapping[str, int]) -> Sequence[str]:
        names = [name for name in sizes if name.lower().endswith(suffixes) and not IS_REJECTS_FILE.search(name)]
        if not names:
            others = f"; what is there: {counted(len(sizes), 'other file')}, such as {min(sizes)}" if sizes else ""
            raise NotFound(f"{url}: no such file, and no *{' or *'.join(suffixes)} under a folder of that name{others}")
        return names

    return choose


def expand_inputs(patterns: Sequence[str], choose: Choice, *, strict_links: bool = False) -> Inputs:
    """The files that are meant; says on standard error what is left out.

    Args:
        patterns: files, folders (of which `choose` takes what it wants) and patterns: part-{000..127}.jsonl, *, ? and ** as
            shells have them, on disk and in object stores. A file that is meant twice is taken once.
        choose: such as `by_suffix(".jsonl")`.
        strict_links: follow no symlink that leads out of a folder.

    Raises:
        UsageError: no inputs, or a broken pattern.
        NotFound: something does not exist, or a folder has no such file.
    """
    inputs = Inputs([], [], [])
    for pattern in patterns:
        meant = Inputs([], [], [])
        for braced in _expand_braces(pattern):
            for url in _expand_stars(braced, strict_links):
                _add_files(meant, url, choose, strict_links)
        beside = set() if len(meant.files) == 1 else _beside(meant.files)
        inputs.files.extend(file for file in meant.files if file not in beside)
        inputs.left_out.extend((*meant.left_out, *(file.url for file in beside)))
    if not inputs.files:
        raise UsageError("no input: pass --input with files or folders")
    inputs = _once(inputs)
    for name, what in _REMARKS.items():
        if files := inputs.source.get(name):
            say(f"wds-tools: {counted(files['files'], *what)}, such as {files['such_as']}", error=True)
    return inputs


def _beside(files: Sequence[InputFile]) -> set[InputFile]:
    """Of the files of a folder or pattern those that lie beside what is read: `companions`, and images below files of records.
    What is named by itself is read."""
    by_name = {_identity(file.url).lstrip("/"): file for file in files}
    pictures = pictures_of(by_name)
    beside = companions(by_name, pictures)
    beside |= named_by_records(pictures, (name for name in by_name if name not in beside | pictures and is_candidate(name)))
    return {by_name[name] for name in beside}


def _once(inputs: Inputs) -> Inputs:
    """Each file once."""
    files: dict[str, InputFile] = {}
    twice = [file.url for file in inputs.files if files.setdefault(_identity(file.url), file) is not file]
    left_out = set(inputs.left_out).difference(file.url for file in files.values())
    return Inputs([*files.values()], sorted(left_out), twice)


def _identity(url: str) -> str:
    """A file as it is named, however its path is written."""
    return url if split_scheme(url)[0] else os.path.abspath(url)  # noqa: PTH100  no link is followed


def _expand_stars(pattern: str, strict_links: bool) -> list[str]:
    """The files and folders that *, ? and ** stand for, none whose names begin with a dot; a pattern without these as it is."""
    star = _STARS.search(pattern)
    if star is None or split_scheme(pattern)[0] in ("http", "https") or os.path.lexists(pattern):
        return [pattern]
    cut = pattern.rfind("/", 0, star.start()) + 1
    root, regex = pattern[:cut], _regex(pattern[cut:])
    found: dict[str, None] = {}
    for name, _ in open_store(root or ".", strict_links=strict_links).list():
        match = next((path for path in (*reversed(list(_parents(name))), name) if regex.fullmatch(path)), None)
        if match is not None:
            found[match] = None
    if not found:
        raise NotFound(f"{pattern}: no such file, and nothing that this pattern stands for")
    return [root + name for name in found]


def _parents(name: str) -> Iterator[str]:
    while name := posixpath.dirname(name):
        yield name


def _regex(pattern: str) -> re.Pattern[str]:
    parts = pattern.split("/")
    text = ""
    for number, part in enumerate(parts, 1):
        is_last = number == len(parts)
        if part == "**":
            text += r"(?:[^/.][^/]*/)*" + (r"[^/.][^/]*" if is_last else "")
            continue
        literal = "".join({"*": "[^/]*", "?": "[^/]"}.get(character, re.escape(character)) for character in part)
        text += (r"(?!\.)" if part[:1] in "*?" else "") + literal + ("" if is_last else "/")
    return re.compile(text)


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
        if split_scheme(url)[0] in ("http", "https") or (os.path.exists(url) and not os.path.isdir(url)):  # noqa: PTH110, PTH112
            raise  # there are no folders, or this is a pipe
        # a bucket, or a folder: what is wrong with it shows when it is listed
    sizes = dict(open_store(url).list())
    allowed = {name for name, _ in open_store(url, strict_links=True).list()} if strict_links else sizes.keys()
    chosen = choose(url, {name: size for name, size in sizes.items() if name in allowed})
    for name in chosen:
        check_writable(name)
        inputs.files.append(InputFile(join(url, name), sizes[name] or open_store(url).size(name)))  # raises for a link to nothing
    names = (posixpath.split(name) for name in sorted(sizes.keys() - set(chosen)))
    left_out = [
        posixpath.join(folder, base)
        for folder, base in names
        if base not in (_NO_DATA + _OF_EXPORT if posixpath.join(folder, _EXPORT) in sizes else _NO_DATA)
    ]
    inputs.left_out.extend(join(url, name) for name in left_out)
