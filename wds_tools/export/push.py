"""A finished export of Parquet files -> a dataset repository of the Hugging Face Hub; interrupted, it goes on where it stopped.

    local files - those that the repository has already, by hash -> commits of a few files -> the card, and stale files go

Invariant: the card (README.md) is in the last commit, so a repository with this card has all its files, and no others of ours.
The token and the endpoint are those of Hugging Face's own tools (HF_TOKEN or `hf auth login`, HF_ENDPOINT). The only module that
imports huggingface_hub. Cost: each local file is hashed once here, and what is missing once more by the upload itself.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from wds_tools.errors import MissingPackage, StorageError
from wds_tools.export import card
from wds_tools.run.progress import Advance, Progress
from wds_tools.storage import open_store

COMMIT_FILES = 32
"""Files of a commit: the Hub allows some hundred commits an hour."""
_OURS = re.compile(r"data/train-\d{5}-of-\d{5}\.parquet")


def push(folder: Path, repository: str, *, private: bool = False, quiet: bool = True) -> int:
    """Upload an export.

    Args:
        folder: with README.md and data/.
        repository: "owner/name"; made if it isn't there.
        private: make it a private one.
        quiet: show no progress.

    Returns:
        Files sent; those that the repository had already are not.

    Raises:
        MissingPackage: huggingface_hub is not installed.
        StorageError: the Hub can't be reached, or refuses. What was sent stays: another call goes on from there.
    """
    try:
        import huggingface_hub as hub
        import huggingface_hub.utils as bars
    except ImportError as error:
        raise MissingPackage("pushing to the Hub needs huggingface_hub: pip install huggingface_hub") from error
    api = hub.HfApi()
    shows_bars = not bars.are_progress_bars_disabled()
    bars.disable_progress_bars()  # there is one here
    found = open_store(str(folder)).list("data/")  # an error where it can't be read: what is not found is deleted from the Hub
    local = {entry.name: folder / entry.name for entry in found if _OURS.fullmatch(entry.name)}
    sent = 0
    try:
        api.create_repo(repository, repo_type="dataset", private=private, exist_ok=True)
        remote = {
            file.path: file
            for file in api.list_repo_tree(repository, repo_type="dataset", recursive=True)
            if isinstance(file, hub.RepoFile)
        }
        missing = [name for name, path in local.items() if not _is_same(remote.get(name), path)]
        with Progress("push", sum(local[name].stat().st_size for name in missing), quiet=quiet, unit="files") as progress:
            for names in _groups(missing):
                added = [hub.CommitOperationAdd(name, local[name]) for name in names]
                api.create_commit(repository, added, repo_type="dataset", commit_message=f"Add {names[0]} and so on")
                sent += len(names)
                progress(Advance(units=sum(local[name].stat().st_size for name in names), samples=len(names)))
        last: list[Any] = [hub.CommitOperationDelete(name) for name in _stale(remote, local)]
        if not _is_same(remote.get(card.NAME), folder / card.NAME):
            last.append(hub.CommitOperationAdd(card.NAME, folder / card.NAME))
            sent += 1
        if last:
            api.create_commit(repository, last, repo_type="dataset", commit_message="Complete the dataset")
    except (OSError, ValueError, RuntimeError, _transport_error(hub)) as error:
        what = ": ".join((str(one).strip() or type(one).__name__).splitlines()[0] for one in (error, error.__cause__) if one)
        raise StorageError(
            f"hf://datasets/{repository}: can't be pushed to, after {sent} files that stay there: {what}: check the token "
            "(HF_TOKEN, or `hf auth login`) and the name, then run again with --resume"
        ) from error
    finally:
        if shows_bars:
            bars.enable_progress_bars()
    return sent


def _transport_error(hub: Any) -> type[Exception]:
    """What its HTTP library raises without an answer: that of this version, which the Hub's own error is derived from."""
    base: type[Exception] = hub.errors.HfHubHTTPError.__mro__[1]
    return base


def _groups(names: list[str]) -> Iterator[list[str]]:
    for start in range(0, len(names), COMMIT_FILES):
        yield names[start : start + COMMIT_FILES]


def _stale(remote: Mapping[str, Any], local: Mapping[str, Path]) -> list[str]:
    """Parts of an earlier export, which a reader of data/ would take for more rows."""
    return sorted(name for name in remote if _OURS.fullmatch(name) and name not in local)


def _is_same(remote: Any, path: Path) -> bool:
    """Whether the repository has this file: by its SHA-256 in large file storage, else by git's hash of its content."""
    if remote is None or remote.size != path.stat().st_size:
        return False
    if remote.lfs is not None:
        stated, digest = remote.lfs.sha256, hashlib.sha256()
    else:
        stated, digest = remote.blob_id, hashlib.sha1(f"blob {remote.size}\0".encode(), usedforsecurity=False)
    with path.open("rb") as file:
        return bool(hashlib.file_digest(file, lambda: digest).hexdigest() == stated)
